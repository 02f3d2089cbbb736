"""Records the GPU work of a program once and replays it: small bound programs spend their time on launches.

``Replay`` is one recording; ``Recorder`` decides when a program is recorded, and when a recording is out of date.
"""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _get_current_dispatch_mode

from pyxai_bounds import ops

# Where launches are what costs: a program that writes more spends longer on memory (a GPU moves 4 GiB in about 1 ms)
# than on the launches that a graph saves, and would hold that memory for good.
LARGEST = 2**32  # bytes that a recorded program may write, all its results together


class Replay:
    """``fn`` on CUDA tensors of the shapes, dtypes and strides of ``example``, as a CUDA graph.

    The graph reads parameters where they lie: what an optimiser writes into them is seen, rebinding them is not.
    ``fn`` returns a tuple of tensors, needs no gradient and must not look at values on the host (``check_target``
    does: leave it out and call it before). Calls copy their arguments in and their results out, on any stream and from
    any thread: one waits for the other.
    Raises ValueError for other shapes, dtypes or devices than those of ``example``.
    """

    def __init__(self, fn: Callable[..., Sequence[Tensor]], example: Sequence[Tensor]) -> None:
        if not example or not all(_on_gpu(t) for t in example):
            raise ValueError("Only work on CUDA tensors can be recorded; call the function itself.")
        self._inputs = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in example]
        self._lock = threading.Lock()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(example[0].device), torch.no_grad():  # both streams are the current device's
            for kept, given in zip(self._inputs, example, strict=True):
                _once(kept).copy_(_once(given))
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(2):  # compiles kernels and measures tile sizes, neither of which can be recorded
                    fn(*self._inputs)
            torch.cuda.current_stream().wait_stream(aside)
            # Other threads (those that load data) may allocate meanwhile.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._outputs = fn(*self._inputs)
            self._free = torch.cuda.Event()
            self._free.record()

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        for kept, given in zip(self._inputs, tensors, strict=True):
            if kept.shape != given.shape or kept.dtype != given.dtype or kept.device != given.device:
                raise ValueError(
                    f"Recorded for {kept.dtype} {list(kept.shape)} on {kept.device}, called with {given.dtype} "
                    f"{list(given.shape)} on {given.device}: record again for these."
                )
        with self._lock, torch.cuda.device(self._inputs[0].device):
            self._free.wait()  # a call on another stream may still be reading its results
            for kept, given in zip(self._inputs, tensors, strict=True):
                _once(kept).copy_(_once(given))
            self._graph.replay()
            results = tuple(t.clone() for t in self._outputs)
            self._free.record()
        return results


def _on_gpu(t: Tensor) -> bool:
    return t.is_cuda


def _once(t: Tensor) -> Tensor:
    """The part of an expanded tensor that lies in memory: nothing can be copied into the whole."""
    return t[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in t.stride())]


class Recorder:
    """Runs a program on CUDA tensors, from its second call in the same circumstances on as a CUDA graph.

    A recording is out of date when a constant of the program lies elsewhere in memory (``p.data = …``, ``model.to``),
    or when the backend or the arithmetic was chosen anew. In 4 cases the program runs as it is: it writes more than
    ``LARGEST`` bytes; it looks at values on the host; recording it failed, which is said once; the environment says
    ``PYXAI_BOUNDS_CUDA_GRAPHS=0``.
    """

    def __init__(self, program: fx.GraphModule) -> None:
        self.program = program
        self._plan = _plan(program)
        self._circumstances: tuple | None = None  # of the last call
        self._replay: Replay | None = None
        self._failed = False
        self._lock = threading.Lock()

    def __call__(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        if self._plan is None or self._failed or not _recordable(tensors):
            return self.program(*tensors)
        body, constants, checks = self._plan
        circumstances = _circumstances(constants)
        if circumstances is None:
            return self.program(*tensors)
        with self._lock:
            if circumstances != self._circumstances:
                # Not yet: who moves the parameters before every call would record before every call.
                self._circumstances, self._replay = circumstances, None
                replay = None
            else:
                for index, classes in checks:
                    ops.check_target(tensors[index], classes)
                replay = self._replay = self._replay or self._record(body, tensors)
        return self.program(*tensors) if replay is None else replay(*tensors)

    def _record(self, body: fx.GraphModule, tensors: Sequence[Tensor]) -> Replay | None:
        try:
            return Replay(body, tensors)
        except RuntimeError as error:
            self._failed = True
            warnings.warn(
                f"A bound program could not be recorded as a CUDA graph and runs without ({_first_line(error)}). "
                "Set PYXAI_BOUNDS_CUDA_GRAPHS=0 to record none.",
                RuntimeWarning,
                stacklevel=2,
            )
            return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _recordable(tensors: Sequence[Tensor]) -> bool:
    """Are these plain tensors on one GPU, outside of whatever else traces or records?"""
    return (
        bool(tensors)
        and os.environ.get("PYXAI_BOUNDS_CUDA_GRAPHS", "1") != "0"
        and all(_on_gpu(t) and t.device == tensors[0].device and type(t) in _PLAIN for t in tensors)
        and _get_current_dispatch_mode() is None
        and not any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors)
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def _circumstances(constants: Sequence[Tensor]) -> tuple | None:
    """All that a recording takes for granted; None if it cannot: numbers on the CPU would be copied into it."""
    if not all(_on_gpu(t) for t in constants):
        return None
    return (
        ops._forced.get(),
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        torch.backends.cudnn.enabled,
        torch.are_deterministic_algorithms_enabled(),
        *((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in constants),
    )


_HOST_TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded)


def _plan(program: fx.GraphModule) -> tuple[fx.GraphModule, list[Tensor], list[tuple[int, int]]] | None:
    """What to record: the program without its checks of arguments, which come first (argument, classes); its constants.

    None if it should not or cannot be recorded.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    placeholders = graph.find_nodes(op="placeholder")
    checks: list[tuple[int, int]] = []
    constants: list[Tensor] = []
    written = 0
    for node in list(graph.nodes):
        if node.op == "get_attr":
            value: Any = program
            for name in node.target.split("."):
                value = getattr(value, name)
            if isinstance(value, Tensor):
                constants.append(value)
        if node.op != "call_function":
            continue
        if node.target is ops.check_target:
            if node.args[0] not in placeholders:
                return None
            checks.append((placeholders.index(node.args[0]), node.args[1]))
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            continue
        if node.target is ops.interval_matmul and node.args[4]:
            return None  # the exact product asks which factor is a point
        if isinstance(node.target, torch._ops.OpOverload):
            if any(tag in node.target.tags for tag in _HOST_TAGS):
                return None
            written += sum(_bytes(value) for value in _values(node))
    return (fx.GraphModule(program, graph), constants, checks) if written <= LARGEST else None


def _values(node: fx.Node) -> Sequence[Any]:
    values = node.meta.get("val")
    return values if isinstance(values, (list, tuple)) else [values]


def _bytes(value: Any) -> int:
    return math.prod(value.shape) * value.element_size() if isinstance(value, Tensor) else 0
