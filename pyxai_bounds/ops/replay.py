"""Records work on a GPU once and replays it: small bound programs spend their time on launches.

``Replay`` is one recording without gradients; ``GraphedStep`` records and replays the loss and the gradients of a
training step. When bound programs are recorded by themselves is said in ``recorder.py``.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from pyxai_bounds import identity, ops
from pyxai_bounds.errors import capturing, on_gpu


class Graph:
    """Copies of ``example`` on the GPU, and what a function did with them, recorded as a CUDA graph."""

    def __init__(self, example: Sequence[Tensor]) -> None:
        self.inputs = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in example]
        self.outputs: Any = None
        self._graph: Any = None

    def fill(self, tensors: Sequence[Tensor]) -> None:
        for kept, given in zip(self.inputs, tensors, strict=True):
            _once(kept).copy_(_once(given))

    def record(self, fn: Callable[..., Any], stream: Any = None, before: Graph | None = None) -> None:
        """Nothing runs. What cannot be recorded must be done: kernels compiled for such inputs, tile sizes measured.

        ``before``: a graph whose memory this one may use where nothing of it is alive; they never run side by side.
        """
        graph = torch.cuda.CUDAGraph()
        # On a stream of this device; other threads (those that load data) may allocate meanwhile.
        stream, pool = stream or torch.cuda.Stream(), None if before is None else before._graph.pool()
        recording = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        with torch.cuda.stream(torch.cuda.current_stream()):  # where ending it fails, PyTorch leaves its stream current
            recording.__enter__()
            with _and_then(lambda: recording.__exit__(None, None, None)):
                self.outputs = fn(*self.inputs)
        self._graph = graph

    def replay(self) -> None:
        self._graph.replay()

    def check(self, launch: Callable[[], Sequence[Tensor | None]]) -> None:
        """Raises RuntimeError if what was replayed is not, bit by bit, what ``launch`` makes of the same inputs.

        What differs from launch to launch shows nothing: some kernels of PyTorch add in whatever order they come. Nor
        is memory wanted that a replay does without: where it does not suffice, nothing is checked.
        """
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            wanted = launch()
            if same_bits(self.outputs, wanted):
                return
            if all(same_bits(launch(), wanted) for _ in range(REPEATS)):
                raise RuntimeError("its replays do not give what launching it does; please report this")


CHECKED = 2  # replays of each recording: the first one, and one with other arguments, after parameters may have changed
REPEATS = 4  # launches that must agree before a difference counts


def same_bits(some: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> bool:
    """Do all tensors agree bit by bit? NaN equals NaN, and None, a missing gradient, equals None."""
    pairs = list(zip(some, others, strict=True))
    if any((a is None) != (b is None) for a, b in pairs):
        return False
    words = [[t.detach().view(_WORDS[t.element_size()]) for t in pair if t is not None] for pair in pairs]
    return all(torch.equal(*pair) for pair in words if pair)


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextlib.contextmanager
def on(stream: Any) -> Iterator[None]:
    """Run the block on another stream, which first waits for the current one; that waits for it afterwards."""
    here = torch.cuda.current_stream()
    stream.wait_stream(here)
    with _and_then(lambda: here.wait_stream(stream)), torch.cuda.stream(stream):
        yield


@contextlib.contextmanager
def _and_then(end: Callable[[], object]) -> Iterator[None]:
    """Call ``end`` after the block, also if it fails; its error is then that of the block, which came first."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(RuntimeError):
            end()
        raise
    end()


class Replay:
    """``fn`` on CUDA tensors of the shapes, dtypes and strides of ``example``, as a CUDA graph.

    The graph reads parameters where they lie: what an optimiser writes into them is seen, rebinding them is not.
    ``fn`` returns a tuple of tensors, needs no gradient and must not look at values on the host. A target is then
    checked on the device, which stops at one that is out of range: better check it before each call and leave it out.
    Calls copy their arguments in and their results out, on any stream and from any thread: one waits for the other.
    Raises ValueError for other shapes, dtypes or devices than those of ``example``; RuntimeError if one of the first
    two calls does not return what ``fn`` does.
    """

    def __init__(self, fn: Callable[..., Sequence[Tensor]], example: Sequence[Tensor]) -> None:
        if not example or not all(on_gpu(t) for t in example):
            raise ValueError("Only work on CUDA tensors can be recorded; call the function itself.")
        self._lock = threading.Lock()
        self._fn, self._unchecked = fn, CHECKED
        with torch.cuda.device(example[0].device), torch.no_grad():  # all streams are the current device's
            self._graph = Graph(example)
            self._graph.fill(example)
            with on(torch.cuda.Stream()):
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
            if self._unchecked:
                with torch.no_grad():
                    self._graph.check(lambda: self._fn(*self._graph.inputs))
                self._unchecked -= 1
            results = tuple(t.clone() for t in self._graph.outputs)
            self._free.record()
        return results


def _once(t: Tensor) -> Tensor:
    """The part of an expanded tensor that exists in memory; one cannot copy into the expanded whole."""
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

    ``concurrent``: a recording runs them side by side instead, each on a stream of its own, so that one uses what
    another leaves idle; what they keep is then in memory together. Gradients are added in the same order. No term may
    write what another reads, as batch norm in training mode writes the statistics that bounds read; for parameters and
    buffers of modules that the functions refer to, this is checked.

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
    Raises TypeError for an argument that is no tensor, ValueError for one on another device or that cannot be cut and
    for terms that must not run side by side, RuntimeError where recording fails. Source: PyTorch's notes on CUDA
    semantics, "Whole-network capture".
    """

    def __init__(
        self,
        loss: Callable[..., Tensor] | Sequence[Callable[..., Tensor]],
        parameters: Iterable[Tensor],
        pieces: int = 1,
        concurrent: bool = False,
    ) -> None:
        self.terms = (loss,) if callable(loss) else tuple(loss)
        self.parameters = [p for p in parameters if p.requires_grad]
        self.pieces, self.concurrent = pieces, concurrent
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
        if not recordable((*tensors, self.parameters[0])):
            return self._run(*tensors)
        with torch.cuda.device(device):
            return self._on_gpu(tensors)

    def _forget(self, circumstances: tuple | None) -> None:
        self._circumstances = circumstances
        self._recording: tuple[tuple, Graph, list[Tensor | None]] | None = None  # of a kind of arguments; gradients
        self._begun: dict[tuple, tuple[Graph, int]] = {}  # until one is recorded: with how many calls

    def _on_gpu(self, tensors: Sequence[Tensor]) -> Tensor:
        circumstances = (*settings(), *(p.data_ptr() for p in self.parameters))
        if circumstances != self._circumstances:
            self._forget(circumstances)
        kind = tuple((t.shape, t.stride(), t.dtype) for t in tensors)
        if self._recording is None:
            graph, calls = self._begun.get(kind) or (Graph(tensors), 0)
            if calls < 2:
                graph.fill(tensors)
                with on(torch.cuda.Stream()):
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
        self._set_gradients(gradients)
        return graph.outputs.clone()

    def _record(self, graph: Graph) -> None:
        try:
            graph.record(self._run)
        except Exception as error:
            self._set_gradients([None] * len(self.parameters))  # which nothing has computed
            if not isinstance(error, RuntimeError):
                raise
            raise RuntimeError(
                f"This training step cannot be recorded as a CUDA graph ({first_line(error)}). Its loss must not look "
                "at values on the host (.item(), an if on a tensor) nor copy from the CPU, and no loss of an earlier "
                "step may be alive with its graph. PYXAI_BOUNDS_CUDA_GRAPHS=0 runs it as it is written."
            ) from error

    def _run(self, *tensors: Tensor) -> Tensor:
        self._set_gradients([None] * len(self.parameters))
        side_by_side = self.concurrent and capturing(self.parameters[0])
        # For all pieces the same: what one piece has used up on a stream is used again by the next one there.
        streams = [torch.cuda.Stream() for _ in self.terms] if side_by_side else []
        differentiate = functools.partial(self._side_by_side, streams) if side_by_side else self._in_turn
        with _recorded_as_a_whole():
            losses = [loss for piece, share in self._cut(tensors) for loss in differentiate(piece, share)]
        return losses[0] if len(losses) == 1 else torch.stack([loss.reshape(()) for loss in losses]).sum()

    def _in_turn(self, tensors: Sequence[Tensor], share: float) -> list[Tensor]:
        return [_differentiate(term, tensors, share) for term in self.terms]

    def _side_by_side(self, streams: Sequence[Any], tensors: Sequence[Tensor], share: float) -> list[Tensor]:
        here = torch.cuda.current_stream()
        losses, gradients = [], [[p.grad for p in self.parameters]]  # of the pieces before

        def join() -> None:  # or the recording could not end
            for stream in streams:
                here.wait_stream(stream)

        for stream in streams:
            stream.wait_stream(here)
        with _and_then(join):
            for term, stream in zip(self.terms, streams, strict=True):
                self._set_gradients([None] * len(self.parameters))
                torch.clear_autocast_cache()  # or a term would read the weights that another one has yet to convert
                with torch.cuda.stream(stream), _writing_nothing_of(self.terms, term):
                    losses.append(_differentiate(term, tensors, share))
                gradients.append([p.grad for p in self.parameters])
        self._set_gradients(_sum(*of_parameter) for of_parameter in zip(*gradients, strict=True))
        return losses

    def _set_gradients(self, gradients: Iterable[Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient

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


@contextlib.contextmanager
def _writing_nothing_of(terms: Sequence[Callable], writer: Callable) -> Iterator[None]:
    """Raises ValueError if the block, in which one term runs, writes a parameter or buffer that another one reaches."""
    reached = {id(t) for term in terms if term is not writer for t in identity.tensors_of(term)}
    shared = [t for t in identity.tensors_of(writer) if id(t) in reached and not t.is_inference()]
    before = [t._version for t in shared]
    yield
    if before != [t._version for t in shared]:
        raise ValueError(
            "A term of the loss writes what another one may read, as batch norm in training mode writes the statistics "
            "that bounds read. Side by side it would be read before or after, by chance: leave concurrent=True out, or "
            "put such layers in evaluation mode."
        )


def _sum(*gradients: Tensor | None) -> Tensor | None:
    given = [gradient for gradient in gradients if gradient is not None]
    return functools.reduce(torch.add, given) if given else None


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


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def recordable(tensors: Sequence[Tensor]) -> bool:
    """Are these plain tensors on one GPU, and does nothing else trace or record at the moment?"""
    return (
        bool(tensors)
        and os.environ.get("PYXAI_BOUNDS_CUDA_GRAPHS", "1") != "0"
        and all(on_gpu(t) and t.device == tensors[0].device and type(t) in _PLAIN for t in tensors)
        and _get_current_dispatch_mode() is None
        and not any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors)
        and not torch.compiler.is_compiling()
        and not _is_part.get()
        and not torch.cuda.is_current_stream_capturing()
    )


_is_part: contextvars.ContextVar[bool] = contextvars.ContextVar("pyxai_bounds_part_of_a_recording", default=False)


@contextlib.contextmanager
def _recorded_as_a_whole() -> Iterator[None]:
    """What runs inside the block is recorded as a whole, so its programs make no recordings of their own."""
    token = _is_part.set(True)
    try:
        yield
    finally:
        _is_part.reset(token)


_PLAIN = (Tensor, torch.nn.Parameter)


def settings() -> tuple:
    """The settings of PyTorch and of this package that choose how to compute."""
    return (
        ops.forced(),
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        torch.backends.cudnn.enabled,
        torch.are_deterministic_algorithms_enabled(),
    )
