"""Records the GPU work of a program once and replays it: small bound programs spend their time on launches.

``Replay`` is one recording without gradients; ``Recorder`` decides when a program is recorded, and when a recording is
out of date. ``GraphedStep`` does both for the loss and the gradients of a training step.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _get_current_dispatch_mode

from pyxai_bounds import ops
from pyxai_bounds.errors import on_gpu

# Where launches are what costs: a program that writes more spends longer on memory (a GPU moves 4 GiB in about 1 ms)
# than on the launches that a graph saves, and would hold memory for good. Of a deep program that is so if its operators
# write much each: one launched from Python takes as long as 64 MiB and more.
LARGEST = 2**32  # bytes that a recorded program may write, all its results together,
LARGEST_EACH = 2**26  # or on average an operator of it


class _Graph:
    """Copies of ``example`` on the GPU, and what a function did with them, recorded as a CUDA graph."""

    def __init__(self, example: Sequence[Tensor]) -> None:
        self.inputs = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in example]
        self.outputs: Any = None
        self._graph: Any = None

    def fill(self, tensors: Sequence[Tensor]) -> None:
        for kept, given in zip(self.inputs, tensors, strict=True):
            _once(kept).copy_(_once(given))

    def record(self, fn: Callable[..., Any]) -> None:
        """Nothing runs. What cannot be recorded must be done: kernels compiled for such inputs, tile sizes measured."""
        graph = torch.cuda.CUDAGraph()
        # On a stream of this device; other threads (those that load data) may allocate meanwhile.
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
            self.outputs = fn(*self.inputs)
        self._graph = graph

    def replay(self) -> None:
        self._graph.replay()


@contextlib.contextmanager
def _on(stream: Any) -> Iterator[None]:
    """On another stream, which waits for the current one and for which the current one waits."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


class Replay:
    """``fn`` on CUDA tensors of the shapes, dtypes and strides of ``example``, as a CUDA graph.

    The graph reads parameters where they lie: what an optimiser writes into them is seen, rebinding them is not.
    ``fn`` returns a tuple of tensors, needs no gradient and must not look at values on the host. A target is then
    checked on the device, which stops at one that is out of range: better check it before each call and leave it out.
    Calls copy their arguments in and their results out, on any stream and from any thread: one waits for the other.
    Raises ValueError for other shapes, dtypes or devices than those of ``example``.
    """

    def __init__(self, fn: Callable[..., Sequence[Tensor]], example: Sequence[Tensor]) -> None:
        if not example or not all(on_gpu(t) for t in example):
            raise ValueError("Only work on CUDA tensors can be recorded; call the function itself.")
        self._lock = threading.Lock()
        with torch.cuda.device(example[0].device), torch.no_grad():  # all streams are the current device's
            self._graph = _Graph(example)
            self._graph.fill(example)
            with _on(torch.cuda.Stream()):
                for _ in range(2):
                    fn(*self._graph.inputs)
            self._graph.record(fn)
            self._free = torch.cuda.Event()
            self._free.record()

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        for kept, given in zip(self._graph.inputs, tensors, strict=True):
            if kept.shape != given.shape or kept.dtype != given.dtype or kept.device != given.device:
                raise ValueError(
                    f"Recorded for {kept.dtype} {list(kept.shape)} on {kept.device}, called with {given.dtype} "
                    f"{list(given.shape)} on {given.device}: record again for these."
                )
        with self._lock, torch.cuda.device(self._graph.inputs[0].device):
            self._free.wait()  # a call on another stream may still be reading its results
            self._graph.fill(tensors)
            self._graph.replay()
            results = tuple(t.clone() for t in self._graph.outputs)
            self._free.record()
        return results


def _once(t: Tensor) -> Tensor:
    """The part of an expanded tensor that lies in memory: nothing can be copied into the whole."""
    return t[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in t.stride())]


class GraphedStep:
    """A training step's loss and its gradients, on a GPU as one CUDA graph: one launch in place of hundreds.

    ``step = GraphedStep(loss, model.parameters())``, then ``step(*tensors)`` in place of ``loss(*tensors).backward()``:
    it returns the loss, detached, and sets ``.grad`` of the parameters (None where the loss does not depend on one).
    What was in them is gone, so that no ``zero_grad`` is needed and gradients of several calls do not add up.

    The first two calls run as they are written, the third records, and later ones with tensors of the same shapes,
    dtypes and strides replay. Others run as they are written: a smaller last batch, tensors on the CPU, everything
    while ``PYXAI_BOUNDS_CUDA_GRAPHS=0`` is set. After parameters were moved, and with another backend or other
    arithmetic, it begins anew.

    ``loss`` may be several functions, the terms of a sum: each is differentiated before the next is computed, so that
    what they keep for their backward passes is never in memory together.

    ``pieces``: the batch is taken in as many pieces (at most: of ⌈B / pieces⌉ samples each, the last may be smaller),
    one after the other, so that memory is needed for one piece at a time. Each adds its share of the batch times its
    gradients, and the mean loss of the batch is returned, all within one recording. That is the loss of the whole
    batch, to rounding in the parameters' type, where it is a mean over samples; not where it mixes samples (batch
    statistics, contrastive terms, a maximum over the batch) or sums over them, and random draws are others. The length
    of the first argument is the batch's: arguments of that length are cut along dimension 0, those without dimensions
    are given to each piece, and others are refused. The loss may close over what belongs to no sample.

    Only the values of the tensors given, of parameters and of buffers may change from call to call, and random draws.
    All else is as it was when recorded: numbers in Python (give a radius or a weight as a tensor), modes of modules,
    which parameters are trained. Learning rates belong to the optimiser, which is not recorded. Calls belong on one
    stream, and no loss of an earlier step may be alive with its graph (keep ``loss.detach()``).

    ``loss`` must return one number, not look at values on the host and not be wrapped in DistributedDataParallel.
    Raises TypeError for an argument that is no tensor, ValueError for one on another device or that cannot be cut,
    RuntimeError where recording fails. Source: PyTorch's notes on CUDA semantics, "Whole-network capture".
    """

    def __init__(
        self,
        loss: Callable[..., Tensor] | Sequence[Callable[..., Tensor]],
        parameters: Iterable[Tensor],
        pieces: int = 1,
    ) -> None:
        self.terms = (loss,) if callable(loss) else tuple(loss)
        self.parameters = [p for p in parameters if p.requires_grad]
        self.pieces = pieces
        if not self.parameters:
            raise ValueError("None of the parameters requires a gradient: there is nothing to train.")
        if not self.terms:
            raise ValueError("loss holds no function: give one, or the terms of a sum.")
        if not isinstance(pieces, int) or isinstance(pieces, bool) or pieces < 1:
            raise ValueError(f"pieces={pieces!r} must be a whole number of at least 1; 1 takes the batch as a whole.")
        self._forget(None)

    def __call__(self, *tensors: Tensor) -> Tensor:
        device = self.parameters[0].device
        for place, given in enumerate(tensors):
            if not isinstance(given, Tensor):
                raise TypeError(
                    f"Argument {place} is a {type(given).__name__}, which a recorded step could not take anew: give a "
                    "tensor on the model's device, for example torch.tensor(value, device=...)."
                )
            if given.device != device:
                raise ValueError(
                    f"Argument {place} is on {given.device}, the parameters on {device}: move one of them."
                )
        if self.pieces > 1:
            _check_can_be_cut(tensors)
        if not _recordable((*tensors, self.parameters[0])):
            return self._run(*tensors)
        with torch.cuda.device(device):
            return self._on_gpu(tensors)

    def _forget(self, circumstances: tuple | None) -> None:
        self._circumstances = circumstances
        self._recording: tuple[tuple, _Graph, list[Tensor | None]] | None = None  # of a kind of arguments; gradients
        self._begun: dict[tuple, tuple[_Graph, int]] = {}  # until one is recorded: with how many calls

    def _on_gpu(self, tensors: Sequence[Tensor]) -> Tensor:
        circumstances = (*_settings(), *(p.data_ptr() for p in self.parameters))
        if circumstances != self._circumstances:
            self._forget(circumstances)
        kind = tuple((t.shape, t.stride(), t.dtype) for t in tensors)
        if self._recording is None:
            graph, calls = self._begun.get(kind) or (_Graph(tensors), 0)
            if calls < 2:
                graph.fill(tensors)
                with _on(torch.cuda.Stream()):
                    loss = self._run(*graph.inputs)
                self._begun[kind] = graph, calls + 1
                return loss
            self._record(graph)
            self._recording = kind, graph, [p.grad for p in self.parameters]
            self._begun = {}
        recorded, graph, gradients = self._recording
        if kind != recorded:
            return self._run(*tensors)
        graph.fill(tensors)
        graph.replay()
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        return graph.outputs.clone()

    def _record(self, graph: _Graph) -> None:
        try:
            graph.record(self._run)
        except RuntimeError as error:
            raise RuntimeError(
                f"This training step cannot be recorded as a CUDA graph ({_first_line(error)}). Its loss must not look "
                "at values on the host (.item(), an if on a tensor) nor copy from the CPU, and no loss of an earlier "
                "step may be alive with its graph. PYXAI_BOUNDS_CUDA_GRAPHS=0 runs it as it is written."
            ) from error

    def _run(self, *tensors: Tensor) -> Tensor:
        for parameter in self.parameters:
            parameter.grad = None
        losses = [_differentiate(term, piece, share) for piece, share in self._cut(tensors) for term in self.terms]
        return losses[0] if len(losses) == 1 else torch.stack([loss.reshape(()) for loss in losses]).sum()

    def _cut(self, tensors: Sequence[Tensor]) -> list[tuple[Sequence[Tensor], float]]:
        """The pieces of the batch, and the share of it that each is."""
        if self.pieces == 1:
            return [(tensors, 1.0)]
        cut = [t.chunk(self.pieces) if t.dim() else itertools.repeat(t) for t in tensors]
        return [(piece, len(piece[0]) / len(tensors[0])) for piece in zip(*cut, strict=False)]


def _differentiate(term: Callable[..., Tensor], tensors: Sequence[Tensor], share: float) -> Tensor:
    """Share · term, whose gradients are added to the parameters'; nothing of its graph outlives the call."""
    with torch.enable_grad():
        loss = term(*tensors)
        if not loss.requires_grad:
            raise ValueError("A loss depends on no parameter: leave it out, or add it to one that does.")
        if share != 1:
            loss = share * loss
        loss.backward()
    return loss.detach()


def _check_can_be_cut(tensors: Sequence[Tensor]) -> None:
    if not tensors or not tensors[0].dim() or not len(tensors[0]):
        raise ValueError(
            "The first argument must hold the samples along dimension 0, at least one, to be cut in pieces."
        )
    for place, given in enumerate(tensors):
        if given.dim() and len(given) != len(tensors[0]):
            raise ValueError(
                f"Argument {place} has shape {list(given.shape)}, but the batch has {len(tensors[0])} samples, as "
                "argument 0 says: it can neither be cut in pieces nor be given to each. Give a number as a tensor "
                "without dimensions, and let the loss close over what belongs to no sample."
            )


class Recorder:
    """Runs a program on CUDA tensors, from its second call in the same circumstances on as a CUDA graph.

    A recording is out of date when a constant of the program lies elsewhere in memory (``p.data = …``, ``model.to``),
    or when the backend or the arithmetic was chosen anew. In 4 cases the program runs as it is: it writes more than
    ``LARGEST`` bytes, and more than ``LARGEST_EACH`` an operator; it looks at values on the host; recording it failed,
    which is said once; the environment says ``PYXAI_BOUNDS_CUDA_GRAPHS=0``.
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
        and all(on_gpu(t) and t.device == tensors[0].device and type(t) in _PLAIN for t in tensors)
        and _get_current_dispatch_mode() is None
        and not any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors)
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def _circumstances(constants: Sequence[Tensor]) -> tuple | None:
    """All that a recording takes for granted; None if it cannot: numbers on the CPU would be copied into it."""
    if not all(on_gpu(t) for t in constants):
        return None
    return (*_settings(), *((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in constants))


def _settings() -> tuple:
    """How PyTorch and this package were told to compute."""
    return (
        ops._forced.get(),
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        torch.backends.cudnn.enabled,
        torch.are_deterministic_algorithms_enabled(),
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
    written = operators = 0
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
            operators += 1
    is_small = written <= max(LARGEST, LARGEST_EACH * operators)
    return (fx.GraphModule(program, graph), constants, checks) if is_small else None


def _values(node: fx.Node) -> Sequence[Any]:
    values = node.meta.get("val")
    return values if isinstance(values, (list, tuple)) else [values]


def _bytes(value: Any) -> int:
    return math.prod(value.shape) * value.element_size() if isinstance(value, Tensor) else 0
