"""Bound programs as CUDA graphs: recorded at their second call, replayed as long as their assumptions hold.

Stands between ``recompute`` and ``program``. ``Recorder`` is for programs that need no gradient, ``TrainingRecorder``
for those that do: then the program is one graph, and each derivative that is asked for another. ``ops/replay.py``
records and replays.
"""

from __future__ import annotations

import contextlib
import operator
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pyxai_bounds import memory, ops
from pyxai_bounds.errors import on_gpu
from pyxai_bounds.ops import replay
from pyxai_bounds.recompute import Circumstances, constants_last, differentiate_again

# Recording pays where launches cost more than memory traffic. A GPU moves 4 GiB in about 1 ms, and one launch from
# Python takes as long as 64 MiB. A recorded program holds its memory for good.
LARGEST = 2**32  # bytes that a recorded program may write, all its results together,
LARGEST_EACH = 2**26  # or on average an operator of it


class Recorder:
    """Runs a program on CUDA tensors, from its second call in the same circumstances on as a CUDA graph.

    A recording is out of date when a constant of the program has another address (``p.data = …``, ``model.to``), or
    when another backend or arithmetic is chosen. A program is not recorded if it writes more than ``LARGEST`` bytes and
    more than ``LARGEST_EACH`` an operator; if it reads values on the host; if recording failed or the first replays
    differed from the program, which a warning says once; or if ``PYXAI_BOUNDS_CUDA_GRAPHS=0`` is set.
    """

    def __init__(self, program: fx.GraphModule, launched: Callable[..., Sequence[Tensor]] | None = None) -> None:
        self.program = program
        self.launched = launched or program
        self._plan = _plan(program)
        self._circumstances: tuple | None = None  # of the last call
        self._replay: Any = None
        self._failed = False
        self._lock = threading.Lock()

    def __call__(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        recording = self._recording(tensors)
        if recording is not None:
            with self._unless_it_fails():
                return recording(*tensors)
        return self.launched(*tensors)

    def _recording(self, tensors: Sequence[Tensor]) -> Any:
        """The recording that serves these tensors, made now if it is time; None if there is none."""
        if self._plan is None or self._failed or not replay.recordable(tensors):
            return None
        body, constants, checks = self._plan
        circumstances = self._describe(tensors, constants)
        if circumstances is None:
            return None
        with self._lock:
            if circumstances != self._circumstances:
                # Not at the first call: if parameters move before every call, each would be recorded.
                self._circumstances, self._replay = circumstances, None
                return None
            for index, classes in checks:
                ops.check_target(tensors[index], classes)
            if self._replay is None:
                with self._unless_it_fails():
                    self._replay = self._record(body, tensors)
            return self._replay

    def _describe(self, tensors: Sequence[Tensor], constants: Sequence[Tensor]) -> tuple | None:
        """All that a recording assumes. None if some constant is on the CPU: its value would become part of it."""
        if not all(on_gpu(t) for t in constants):
            return None
        return (*replay.settings(), *((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in constants))

    def _record(self, body: fx.GraphModule, tensors: Sequence[Tensor]) -> Any:
        return replay.Replay(body, tensors)

    @contextlib.contextmanager
    def _unless_it_fails(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self._failed, self._replay = True, None
            warnings.warn(
                f"A bound program could not be recorded as a CUDA graph and runs without ({replay.first_line(error)}). "
                "Set PYXAI_BOUNDS_CUDA_GRAPHS=0 to record none.",
                RuntimeWarning,
                stacklevel=4,
            )


class TrainingRecorder(Recorder):
    """The same for a program whose results are differentiated; ``program`` has its marks (see ``fuse``).

    A recording holds what one backward pass needs. So while one call waits for its backward pass, further calls run the
    program without the recording, as do calls inside a backward pass or where hooks decide what autograd saves
    (``torch.utils.checkpoint``). A recording is also out of date when other tensors require gradients.
    """

    def __init__(
        self, program: fx.GraphModule, launched: Callable[..., Sequence[Tensor]], surroundings: Circumstances
    ) -> None:
        super().__init__(program, launched)
        self.surroundings = surroundings  # what the program assumes while it runs
        self._body = None if self._plan is None else constants_last(self._plan[0])
        if self._body is None:
            self._plan = None

    def __call__(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        recording = self._recording(tensors)
        if recording is not None:
            with self._unless_it_fails():  # derivatives are recorded late
                turn = recording.begin()
                if turn is not None:
                    return recording(turn, *tensors)
        return self.launched(*tensors)

    def _describe(self, tensors: Sequence[Tensor], constants: Sequence[Tensor]) -> tuple | None:
        if torch._C._current_graph_task_id() != -1 or torch._C._autograd._top_saved_tensors_default_hooks(False):
            return None
        needs = tuple(t.requires_grad for t in (*tensors, *constants))
        known = super()._describe(tensors, constants)
        return (*known, needs) if known is not None and any(needs) else None

    def _record(self, body: fx.GraphModule, tensors: Sequence[Tensor]) -> TrainingReplay:
        assert self._body is not None  # or there would be no plan
        graph, _, constants = self._body
        return TrainingReplay(fx.GraphModule(torch.nn.Module(), graph), tensors, constants, self.surroundings)


class _Turn:
    """A call's exclusive use of a recording, until its backward pass is done or cannot be asked for any more."""

    def __init__(self) -> None:
        self.is_over = False


class TrainingReplay:
    """``fn`` on ``tensors`` and ``constants``, as a CUDA graph, and its derivatives, each as another.

    The graphs read constants at their addresses. What the first graph leaves for the derivatives stays in place, so
    there is one turn at a time. A derivative (of certain results, in certain arguments) runs unrecorded once and is
    recorded before the next turn. Where a second derivative may be asked for, ``fn`` runs again instead.

    The first replays are compared with ``fn``. A call that differs raises RuntimeError. Where a derivative differs, the
    backward pass is done without the recording, and the next turn raises.
    """

    def __init__(
        self,
        fn: Callable[..., Sequence[Tensor]],
        tensors: Sequence[Tensor],
        constants: Sequence[Tensor],
        surroundings: Circumstances,
    ) -> None:
        self.fn, self.constants, self.surroundings = fn, tuple(constants), surroundings
        self.backend = ops.forced()
        self._lock = threading.Lock()
        self._turn: Callable[[], _Turn | None] = lambda: None
        self._backward: dict[_Derivative, replay.Graph | None] = {}  # None: not recorded yet
        self._unchecked, self._checked = replay.CHECKED, set[_Derivative]()
        self._wrong: RuntimeError | None = None
        with torch.cuda.device(tensors[0].device):
            self._stream, self._free = torch.cuda.Stream(), torch.cuda.Event()
            self._graph = replay.Graph(tensors)
            # Aliases with version counters of their own: optimiser steps and replays must not count as changes of what
            # autograd has saved.
            self._leaves = [t.data for t in (*self._graph.inputs, *constants)]
            for leaf, given in zip(self._leaves, (*tensors, *constants), strict=True):
                leaf.requires_grad_(given.requires_grad)
            with torch.no_grad():
                self._graph.fill(tensors)
            with replay.on(self._stream):
                self.compute(*self._leaves)
            with _addresses_of_saved() as read:
                self._graph.record(lambda *_: self.compute(*self._leaves), self._stream)
            self._free.record()
        self.outputs: list[Tensor] = list(self._graph.outputs)
        reached = leaves_behind(self.outputs)
        self._is_reached = [id(leaf) in reached for leaf in self._leaves]
        self._read_again = [t for t in constants if _address(t) in read]

    def begin(self) -> _Turn | None:
        """A turn, unless another one is not over. Derivatives that were asked for are recorded first."""
        with self._lock:
            if self._wrong is not None:
                raise self._wrong
            last = self._turn()
            if last is not None and not last.is_over:
                return None
            for derivative, graph in self._backward.items():
                if graph is None:
                    self._backward[derivative] = self._record_derivative(derivative)
            turn = _Turn()
            self._turn = weakref.ref(turn)
            return turn

    def __call__(self, turn: _Turn, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = (*tensors, *self.constants)
        # Arguments on which no result depends differentiably are detached, as autograd would have it.
        return _Replayed.apply(
            self, turn, *(t if r else t.detach() for t, r in zip(given, self._is_reached, strict=True))
        )

    def forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        with self._lock, torch.cuda.device(self.outputs[0].device):
            self._free.wait()
            self._graph.fill(tensors)
            self._graph.replay()
            if self._unchecked:
                with torch.enable_grad():
                    self._graph.check(lambda: self.compute(*self._leaves))
                self._unchecked -= 1
            results = [t.detach().clone() for t in self.outputs]
            self._free.record()
        return results

    def backward(
        self, turn: _Turn, derivative: _Derivative, grads: Sequence[Tensor], again: bool
    ) -> Sequence[Tensor | None] | None:
        """The gradients in the arguments that need them; None if there was another turn since, or a replay differs.

        ``again``: may this derivative be asked for again?
        """
        with self._lock, torch.cuda.device(self.outputs[0].device):
            if self._turn() is not turn:
                return None
            self._free.wait()
            graph = self._backward.get(derivative)
            if graph is None:
                if len(self._backward) < MOST_DERIVATIVES:
                    self._backward[derivative] = None
                results = self._differentiate(derivative, grads, self.outputs)
            else:
                for kept, grad in zip(graph.inputs, grads, strict=True):
                    kept.copy_(grad)
                graph.replay()
                if derivative not in self._checked:
                    try:
                        with replay.on(self._stream):  # where the leaves were first read, or autograd warns
                            graph.check(lambda: self._differentiate(derivative, graph.inputs, self._anew()))
                    except RuntimeError as error:
                        self._wrong = error
                        return None
                    self._checked.add(derivative)
                results = [None if t is None else t.clone() for t in graph.outputs]
            self._free.record()
            turn.is_over = not again
        return results

    def versions(self) -> list[int]:
        """The versions of the constants that derivatives read: they must not change before the backward pass."""
        return [t._version for t in self._read_again]

    def compute(self, *given: Tensor) -> Sequence[Tensor]:
        try:
            with ops.backend(self.backend), self.surroundings():
                return self.fn(*given)
        finally:
            torch._C._set_grad_enabled(True)  # the program's marks may leave it off

    def _anew(self) -> Sequence[Tensor]:
        """The outputs computed anew, to check a derivative with; the recorded ones if their inputs have changed."""
        with torch.enable_grad():
            outputs = self.compute(*self._leaves)
        return outputs if replay.same_bits(outputs, self.outputs) else self.outputs

    def _differentiate(
        self, derivative: _Derivative, grads: Sequence[Tensor], results: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        outputs = [t for t, is_given in zip(results, derivative[0], strict=True) if is_given]
        leaves = [t for t, is_needed in zip(self._leaves, derivative[1], strict=True) if is_needed]
        return torch.autograd.grad(outputs, leaves, grads, retain_graph=True, allow_unused=True)

    def _record_derivative(self, derivative: _Derivative) -> replay.Graph:
        outputs = [t.detach() for t, is_given in zip(self.outputs, derivative[0], strict=True) if is_given]
        graph = replay.Graph([torch.empty_like(t) for t in outputs])
        with torch.cuda.device(self.outputs[0].device):
            graph.record(lambda *grads: self._differentiate(derivative, grads, self.outputs), self._stream, self._graph)
        return graph


# Of which results there are gradients, and in which arguments they are needed.
_Derivative = tuple[tuple[bool, ...], tuple[bool, ...]]
MOST_DERIVATIVES = 4


class _Replayed(torch.autograd.Function):
    """A turn of a recording as a node of autograd."""

    @staticmethod
    def forward(ctx: Any, recording: TrainingReplay, turn: _Turn, *given: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.recording, ctx.turn, ctx.versions = recording, turn, recording.versions()
        ctx.save_for_backward(*given)
        results = recording.forward(given[: len(given) - len(recording.constants)])
        pairs = zip(results, recording.outputs, strict=True)
        ctx.mark_non_differentiable(*(result for result, kept in pairs if not kept.requires_grad))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        recording, needs = ctx.recording, ctx.needs_input_grad[2:]
        given = [grad for grad in grads if grad is not None]
        if not given or not any(needs):
            return (None,) * len(ctx.needs_input_grad)
        if recording.versions() != ctx.versions:
            raise RuntimeError(
                "A parameter that the derivative of these bounds needs was changed in place after they were computed: "
                "call backward() before the optimiser's step, or compute the bounds again after it."
            )
        found = None
        if not torch.is_grad_enabled():  # else a derivative of this derivative will be asked for
            derivative = tuple(grad is not None for grad in grads), needs
            again = torch._C._autograd._get_current_graph_task_keep_graph()
            found = recording.backward(ctx.turn, derivative, given, again)
        if found is None:
            return None, None, *differentiate_again(recording.compute, ctx.saved_tensors, needs, grads)
        wanted = iter(found)
        return None, None, *(next(wanted) if need else None for need in needs)


@contextlib.contextmanager
def _addresses_of_saved() -> Iterator[set[int]]:
    """Collects the addresses of what autograd saves inside the block."""
    found: set[int] = set()

    def note(t: Tensor) -> Tensor:
        found.add(_address(t))
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        yield found


def _address(t: Tensor) -> int:
    """The address of a tensor's storage, which its views share."""
    return t.untyped_storage().data_ptr()


def leaves_behind(results: Sequence[Tensor]) -> set[int]:
    """The ids of the leaves of autograd's graph on which the results depend."""
    found, seen = set(), set()
    ahead = [t.grad_fn for t in results]
    for result in results:
        if result.is_leaf and result.requires_grad:
            found.add(id(result))
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        ahead += [behind for behind, _ in node.next_functions]
    return found


# --- what is recorded ------------------------------------------------------------------------------------------

_HOST_TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded)


def _plan(program: fx.GraphModule) -> tuple[fx.GraphModule, list[Tensor], list[tuple[int, int]]] | None:
    """What to record: the program without its checks of targets, its constants, and these checks.

    A check is (position of the argument, number of classes). None if the program cannot be recorded or should not be.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    placeholders = graph.find_nodes(op="placeholder")
    checks: list[tuple[int, int]] = []
    constants: list[Tensor] = []
    written = operators = 0
    for node in list(graph.nodes):
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(program)
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
            written += sum(memory.bytes_of(value) for value in memory.results(node))
            operators += 1
    is_small = written <= max(LARGEST, LARGEST_EACH * operators)
    return (fx.GraphModule(program, graph), constants, checks) if is_small else None
