"""bound(): the captured graph, run on Intervals.

A captured graph is interpreted once with the interval rules while being traced again: what comes out is a flat
program on tensors alone, midpoints and radii in and out, which is optimised and kept. Calls of the same kind run it.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import os
import re
import reprlib
import threading
import time
import traceback
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, get_args

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from pyxai_bounds import fuse, memory, ops
from pyxai_bounds import rounding as rd
from pyxai_bounds.capture import Captured, capture, is_readable, retrace
from pyxai_bounds.chain import chain
from pyxai_bounds.errors import CaptureError
from pyxai_bounds.identity import identity, is_dead, tensors_of, token_of_argument, unwrap
from pyxai_bounds.interpreter import SET, Interpreter
from pyxai_bounds.interval import Interval
from pyxai_bounds.parameters import ParameterBox
from pyxai_bounds.recompute import checkpointed, constants_last, direct
from pyxai_bounds.recorder import Recorder, TrainingRecorder
from pyxai_bounds.rounding import Semantics
from pyxai_bounds.rules.registry import Product, use_product
from pyxai_bounds.tracer import lazy, without_collector, written
from pyxai_bounds.widths import Measuring, Meter, Widths

CACHE_SIZE = 128  # captures kept per function
_log = logging.getLogger(__name__)


def bound(
    fn: Callable,
    *,
    sound: bool = False,
    semantics: Semantics = "real",
    parameters: ParameterBox | None = None,
    product: Product = "rump",
    checkpoint: bool = False,
) -> BoundFunction:
    """Bounds on anything that PyTorch computes.

    ``fn`` is a module or any function of tensors, and may differentiate inside: an explanation is such a function.
    The result takes the same arguments, each tensor replaced by an :class:`Interval` where it is a set, and returns
    Intervals in the structure that ``fn`` returns. They are differentiable in the parameters and in the box.

    sound: round outward, so that the bounds are a proof: for every member of the box, what ``fn`` is in real arithmetic
    (with the numbers that the parameters and constants hold) lies inside. Otherwise bounds are rounded to nearest.
    semantics: with ``sound=True`` and "float32", what float32 arithmetic makes of ``fn``, in any order of summation,
    lies inside as well. ``docs/soundness.md`` says for which algorithms.

    parameters: a :func:`~pyxai_bounds.parameter_box`: the bounds then hold for every network in it as well.
    product: how matrix products and convolutions of two sets are bounded (a box of inputs with a box of parameters,
    attention): "rump" needs matrix products alone and is at most 1.5 times too wide; "exact" is as fast in
    the compiled CPU backend (``bench/results/cpu/interval_matmul.csv``), and slower where there is no kernel for it.

    checkpoint: in training, keep few values and compute the others again in the backward pass: less memory, more
    time, the same bounds bit for bit and the same gradients up to rounding. Without effect where gradients are off,
    and inside ``torch.compile``, dispatch modes and ``torch.func``, which must see every operator.

    A function is captured once for each kind of arguments, which takes seconds where networks are deep; at level INFO
    the logger ``pyxai_bounds.program`` tells of it. Each call looks whether what it refers to is still what was
    captured: closures, globals and options of the function; mode, attributes, children, hooks and tensors of modules,
    their methods, and the globals that these use.
    Values of tensors may change freely; what else may change unnoticed is said at :meth:`BoundFunction.recapture`.
    Several threads may call it at once; captures wait for one another.
    Arguments are independent of one another: a function that writes into one of them must not be given two that share
    memory.

    Raises UnsupportedOperatorError, listing every operator without a rule; CaptureError (a ValueError) if the
    function is no fixed program; ValueError for options that do not exist, or a parameter box that the function does
    not use.
    """
    if not callable(fn):
        raise TypeError(f"bound() takes a module or a function, got {type(fn).__name__}.")
    _refuse_bounded(fn)
    if parameters is not None and not isinstance(parameters, ParameterBox):
        raise TypeError(f"parameters must be made by xb.parameter_box(model, …), got {type(parameters).__name__}.")
    if product not in get_args(Product):
        raise ValueError(f"product={product!r} is unknown; choose one of {', '.join(get_args(Product))}.")
    return BoundFunction(fn, rd.choose(sound, semantics), parameters, product, checkpoint or _checkpointing.get())


def _refuse_bounded(fn: Callable) -> None:
    if isinstance(fn, BoundFunction):
        raise TypeError("A function of tensors is needed, but this one is bounded already: pass what was bounded.")


_checkpointing: contextvars.ContextVar[bool] = contextvars.ContextVar("pyxai_bounds_checkpointing", default=False)


@contextlib.contextmanager
def checkpointing(enabled: bool = True) -> Iterator[None]:
    """Functions that are bounded inside the ``with`` block are bounded with ``checkpoint=True``, by whomever."""
    token = _checkpointing.set(enabled)
    try:
        yield
    finally:
        _checkpointing.reset(token)


class BoundFunction:
    """A function on Intervals. Its compiled programs are shared with every other bound of an equal function."""

    def __init__(
        self,
        fn: Callable,
        rounding: rd.Rounding,
        parameters: ParameterBox | None,
        product: Product,
        checkpoint: bool,
    ) -> None:
        self.fn = unwrap(fn)
        self.rounding = rounding
        self.parameters = parameters
        self.product = product
        self.checkpoint = checkpoint

    def __repr__(self) -> str:
        return f"BoundFunction({_name(self.fn)}, rounding={self.rounding.name.lower()!r})"

    @property
    def options(self) -> tuple:
        """Equal for functions that are bounded in the same way."""
        return self.rounding, self.product, None if self.parameters is None else self.parameters.key

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = None if kwargs else self._plain_key(args)
        if key is None:
            leaves, spec = pytree.tree_flatten((args, kwargs))
            return _program(self, leaves, spec)(_tensors(leaves), self.checkpoint)
        captures = _captures_of(self.fn)
        program = captures.programs.get(key)
        if program is None or not program.captured.is_current():
            leaves, spec = pytree.tree_flatten((args, kwargs))
            program = _program(self, leaves, spec)
            if not program.captured.specialised:
                captures.keep(key, program)
        return program(_tensors(args), self.checkpoint)

    def _plain_key(self, args: tuple) -> tuple | None:
        """A key for calls whose arguments are all tensors and sets, which is cheap to build; None for other calls."""
        key: list[Any] = [self.options, torch.get_default_dtype()]
        for argument in args:
            if type(argument) is Interval:
                key += (_leaf_key(argument.mid), argument.rad.stride())
            elif type(argument) is Tensor:
                key += (_leaf_key(argument), None)
            else:
                return None
        return tuple(key)

    def recapture(self) -> None:
        """Forget what was captured of this function, and of functions equal to it: the next call captures it anew.

        For changes that no call notices: attributes of plain objects that a module holds (``model.config.scale = 2``),
        attributes and gradients of tensors, attributes of functions, elements of lists inside of lists inside of lists,
        and of lists and arrays with more than 1000; what functions six calls away, environment or context variables
        say.
        """
        _captures_of(self.fn).clear()

    def graph(self, *args: Any, **kwargs: Any) -> fx.GraphModule:
        """The compiled program for these arguments, to read, to print, or to run inside ``torch.compile``.

        It takes and returns tensors, a set as midpoint and radius. Where gradients are off, it is the program without
        the marks that switch them on and off.
        """
        leaves, spec = pytree.tree_flatten((args, kwargs))
        program = _program(self, leaves, spec)
        return written(program.graph if torch.is_grad_enabled() else program._inference_graph)

    def peak_bytes(self, *args: Any, **kwargs: Any) -> int:
        """The memory that a call with such arguments takes without gradients, by the program's shapes; nothing is run.

        Counts the values of the program where most of them are alive, in bytes. The arguments, the model, and the
        buffers of PyTorch's libraries come on top.
        """
        leaves, spec = pytree.tree_flatten((args, kwargs))
        return _program(self, leaves, spec).peak_bytes

    @torch.no_grad()
    def widths(self, *args: Any, **kwargs: Any) -> Widths:
        """Where the bounds widen: what a call bounds on its way, a row for each layer and for each operator.

        ``print`` the result, or draw it with ``pyxai_bounds.report.plots.plot_widths``. The rules are those of a call,
        run one after the other and not fused, so that the numbers agree up to rounding. Takes the time of a few calls,
        and at first that of building the bounds once more. Raises what a call raises.
        """
        leaves, spec = pytree.tree_flatten((args, kwargs))
        captured = _captured(self.fn, leaves, spec)
        key = ("widths", *_kind(self, leaves))
        meter = captured.derived.get(key)
        if meter is None:
            measuring = Measuring(captured.graph, self.parameters)
            meter = captured.derived[key] = Meter(measuring, _traced(measuring, captured, leaves, self))
        with _circumstances(self.rounding):
            return meter(_tensors(leaves))

    def constants_are_finite(self) -> bool:
        """Are all parameters, buffers and other constants that the function has used so far finite numbers?"""
        tensors = [t for captured in _captures_of(self.fn).values() for t in captured.constants()]
        return all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point() and not t.is_meta)


def captured_graph(fn: Callable, *args: Any, **kwargs: Any) -> Captured:
    """The ATen graph of ``fn`` at these tensors: what ``bound`` runs on Intervals, to run or rewrite otherwise."""
    _refuse_bounded(fn)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    return _captured(unwrap(fn), leaves, spec)


def _program(bounded: BoundFunction, leaves: list[Any], spec: pytree.TreeSpec) -> Program:
    start = time.perf_counter()
    captured = _captured(bounded.fn, leaves, spec)
    key = _kind(bounded, leaves)
    program = captured.derived.get(key)
    if program is None:
        count = len(captured.graph.graph.nodes)
        _log.info("Building the bounds of a program of %d operators, once for arguments of this kind.", count)
        program = captured.derived[key] = Program(captured, leaves, bounded)
        seconds = time.perf_counter() - start
        _log.info("Captured and built in %.1f s: %d operators on tensors.", seconds, len(program.graph.graph.nodes))
    return program


def _kind(bounded: BoundFunction, leaves: list[Any]) -> tuple[Any, ...]:
    """What programs made of one captured graph differ in: options, and which arguments are sets in which layout."""
    return bounded.options, tuple(leaf.rad.stride() if isinstance(leaf, Interval) else None for leaf in leaves)


def _captured(fn: Callable, leaves: list[Any], spec: pytree.TreeSpec) -> Captured:
    """The captured graph for arguments of this kind, from the cache where it is there and still true."""
    points = [leaf.mid if isinstance(leaf, Interval) else leaf for leaf in leaves]
    captures = _captures_of(fn)
    key: tuple[Any, ...] = (spec, (torch.get_default_dtype(), *(_leaf_key(leaf) for leaf in points)))
    found = captures.get(key)
    if found is _READS_INTEGERS:
        key = (*key, _integers(points))
        found = captures.get(key)
    if found is None or not found.is_current():
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise CaptureError(
                "The first call of a bound function captures it, which cannot be done inside torch.func.grad, vmap and "
                "their like: call it once outside, with arguments of these shapes."
            )
        _check_devices(points)
        try:
            key, found = _capture(fn, spec, points, key, captures)
        except Exception as error:
            _note_the_call(fn, points, error)
            raise
        captures.put(key, found)
    return found


@without_collector()
def _capture(
    fn: Callable, spec: pytree.TreeSpec, points: list[Any], key: tuple, captures: _Captures
) -> tuple[tuple, Captured]:
    if len(key) == 3:
        return key, capture(fn, spec, points, specialise=True)
    try:
        return key, capture(fn, spec, points)
    except Exception as error:
        # Some programs look at the value of an integer argument, or of an integer that they made of such and of shapes,
        # which fake tensors do not have.
        if not (isinstance(error, CaptureError) or any(is_readable(leaf) for leaf in points)):
            _explain_mismatch(fn, points, error)
            raise
    try:
        captured = capture(fn, spec, points, specialise=True)
    except Exception as error:
        _explain_mismatch(fn, points, error)
        raise
    captures.put(key, _READS_INTEGERS)
    return (*key, _integers(points)), captured


def _integers(points: list[Any]) -> tuple[bytes, ...]:
    return tuple(leaf.contiguous().cpu().numpy().tobytes() for leaf in points if is_readable(leaf))


def _explain_mismatch(fn: Callable, points: list[Any], error: Exception) -> None:
    """Say which dtypes and devices meet where PyTorch says that some do not fit."""
    if not isinstance(error, RuntimeError) or not re.search("dtype|device", str(error)):
        return
    arguments = {f"{t.dtype} on {t.device}" for t in points if isinstance(t, Tensor) and t.is_floating_point()}
    held = {f"{t.dtype} on {t.device}" for t in tensors_of(fn) if t.is_floating_point()}
    if held and arguments != held:
        raise ValueError(
            f"The arguments are {' and '.join(sorted(arguments))}, the model's tensors {' and '.join(sorted(held))}: "
            f"convert one of them, for example x.to(...) or model.to(...). ({str(error).splitlines()[0]})"
        ) from error


def _name(fn: Callable) -> str:
    return getattr(fn, "__qualname__", type(fn).__name__)


def _note_the_call(fn: Callable, points: list[Any], error: Exception) -> None:
    """Add to an error of PyTorch's or of the function's own, which does not mention bounds, what was called."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    if frame.f_code.co_filename.startswith(os.path.dirname(__file__)):
        return
    given = ", ".join(
        f"{str(p.dtype).removeprefix('torch.')} {list(p.shape)}" if isinstance(p, Tensor) else reprlib.repr(p)
        for p in points
    )
    error.add_note(
        f"pyxai_bounds was recording {_name(fn)}, called with {given}. If it fails on such tensors by itself, too, "
        "they do not fit it; else it does something that cannot be recorded."
    )
    if "require grad" in str(error):
        error.add_note(
            "It gets tensors that require no gradient: where it differentiates by x, begin with "
            "x = x.detach().requires_grad_()."
        )


def _tensors(leaves: Iterable[Any]) -> list[Tensor]:
    """The tensors of the arguments in order; a set gives its midpoint and its radius."""
    tensors: list[Tensor] = []
    for leaf in leaves:
        if isinstance(leaf, Interval):
            tensors += (leaf.mid, leaf.rad)
        elif isinstance(leaf, Tensor):
            tensors.append(leaf)
    return tensors


def _leaf_key(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return Tensor, leaf.shape, leaf.dtype, leaf.device, leaf.stride()
    if type(leaf).__module__ == "numpy" and not isinstance(leaf, (float, int)):
        raise TypeError(f"An argument is a numpy {type(leaf).__name__}; convert it with torch.from_numpy or float().")
    return token_of_argument(leaf)


def _check_devices(points: list[Any]) -> None:
    devices = {str(leaf.device) for leaf in points if isinstance(leaf, Tensor)}
    if len(devices) > 1:
        raise ValueError(f"The arguments are on different devices, {' and '.join(sorted(devices))}; move them to one.")


class Program:
    """A compiled bound program: tensors in, Intervals out."""

    @without_collector()
    def __init__(self, captured: Captured, leaves: list[Any], bounded: BoundFunction) -> None:
        self.captured = captured
        self.rounding = bounded.rounding
        interpreter = Interpreter(captured.graph, bounded.parameters)
        self.graph = _traced(interpreter, captured, leaves, bounded)
        self.results = interpreter.results
        self.single = captured.out_spec == _LEAF and self.results == [SET]
        fuse.optimise(self.graph)

    def __call__(self, tensors: list[Tensor], checkpoint: bool = False) -> Any:
        if torch.is_grad_enabled():
            try:
                with self._circumstances():
                    flat = self._with_grad(tensors, checkpoint)
            finally:
                torch._C._set_grad_enabled(True)
        else:
            with self._circumstances():
                flat = self._without_grad(tensors)
        if self.single:
            return Interval.of(*flat)
        values = iter(flat)
        results = [Interval.of(next(values), next(values)) if result is SET else result for result in self.results]
        return pytree.tree_unflatten(results, self.captured.out_spec)

    def _circumstances(self) -> contextlib.AbstractContextManager[Any]:
        return _circumstances(self.rounding)

    def _with_grad(self, tensors: list[Tensor], checkpoint: bool) -> Any:
        if ops.needs_dispatcher(*tensors):
            return self.graph(*tensors)
        if checkpoint:
            return self._checkpointed(*tensors)
        if tensors and tensors[0].is_cuda:
            return self._on_gpu_with_grad(tensors)
        return self._undispatched_with_grad(*tensors)

    def _without_grad(self, tensors: list[Tensor]) -> Any:
        if ops.needs_dispatcher(*tensors):
            return self._inference_graph(*tensors)
        if tensors and tensors[0].is_cuda:
            return self._on_gpu(tensors)
        return self._undispatched(*tensors)

    @functools.cached_property
    def _on_gpu(self) -> Recorder:
        return Recorder(self._inference_graph)

    @functools.cached_property
    def _on_gpu_with_grad(self) -> TrainingRecorder:
        return TrainingRecorder(self.graph, self._undispatched_with_grad, self._circumstances)

    @functools.cached_property
    def _inference_graph(self) -> fx.GraphModule:
        """The program without the marks that switch gradients on and off."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph.graph, {}))
        _remove_marks(graph)
        return lazy(self.graph, graph)

    @functools.cached_property
    def peak_bytes(self) -> int:
        return memory.peak_bytes(self._inference_graph.graph)

    @functools.cached_property
    def _undispatched(self) -> Callable:
        def make(graph: fx.Graph, _: list[fx.Node]) -> Callable:
            _remove_marks(graph)
            chain(graph)
            return direct(graph, grads=False)

        return _with_constants(self.graph, make) or self._inference_graph

    @functools.cached_property
    def _undispatched_with_grad(self) -> Callable:
        def make(graph: fx.Graph, _: list[fx.Node]) -> Callable:
            chain(graph, grads=True)
            return direct(graph, grads=True)

        return _with_constants(self.graph, make) or self.graph

    @functools.cached_property
    def _checkpointed(self) -> Callable:
        def make(graph: fx.Graph, constants: list[fx.Node]) -> Callable:
            return checkpointed(graph, constants, self._circumstances)

        return _with_constants(self.graph, make) or self.graph


def _traced(interpreter: Interpreter, captured: Captured, leaves: list[Any], bounded: BoundFunction) -> fx.GraphModule:
    """What the interpreter does with arguments of this kind, as a program on their tensors."""
    if bounded.rounding != rd.Rounding.NEAREST:
        for tensor in _tensors(leaves):
            if tensor.is_floating_point():
                rd.check_dtype(tensor.dtype)
    # Per placeholder of the captured graph: is it a set?
    kinds = [isinstance(leaf, Interval) for leaf in leaves if isinstance(leaf, (Interval, Tensor))]
    with rd.use(bounded.rounding), use_product(bounded.product):
        return retrace(lambda *flat: interpreter.run_flat(flat, kinds), _tensors(leaves), symbolic=captured.symbolic)


def _circumstances(rounding: rd.Rounding) -> contextlib.AbstractContextManager[Any]:
    """What a program assumes: no autocast, and arithmetic without shortcuts where bounds are proofs."""
    if rounding == rd.Rounding.NEAREST:
        return rd.without_autocast() if torch._C._is_any_autocast_enabled() else _NOTHING
    stack = contextlib.ExitStack()
    stack.enter_context(rd.without_autocast())
    stack.enter_context(rd.ieee_arithmetic())
    return stack


def _remove_marks(graph: fx.Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled):
        graph.erase_node(node)


@without_collector()
def _with_constants(program: fx.GraphModule, make: Callable[[fx.Graph, list[fx.Node]], Callable]) -> Callable | None:
    """``make`` applied to the program's graph with its constants as further arguments, which every call then adds.

    None where constants cannot be arguments.
    """
    found = constants_last(program)
    if found is None:
        return None
    graph, nodes, constants = found
    run = make(graph, nodes)
    return lambda *tensors: run(*tensors, *constants)


_NOTHING = contextlib.nullcontext()
_LEAF = pytree.tree_structure(0)
# In the cache in the place of a capture: the program reads its integer arguments and is captured for each value.
_READS_INTEGERS: Any = object()


# --- the cache: captures of equal functions, dropped with the function ---------------------------------------


class _Captures:
    """The most recently used captures of one function."""

    def __init__(self) -> None:
        self._entries: OrderedDict[Any, Any] = OrderedDict()
        self.programs: dict[tuple, Program] = {}  # by ``BoundFunction._plain_key``
        self._lock = threading.Lock()

    def keep(self, key: tuple, program: Program) -> None:
        with self._lock:
            for other in [k for k, p in self.programs.items() if k == key or not p.captured.is_current()]:
                del self.programs[other]
            while len(self.programs) >= CACHE_SIZE:
                self.programs.pop(next(iter(self.programs)))
            self.programs[key] = program

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self.programs.clear()

    def get(self, key: Any) -> Any:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def values(self) -> list[Captured]:
        with self._lock:
            entries = [*self._entries.values(), *(program.captured for program in self.programs.values())]
            return list({id(entry): entry for entry in entries if isinstance(entry, Captured)}.values())

    def put(self, key: Any, captured: Any) -> None:
        with self._lock:
            self._entries[key] = captured
            while len(self._entries) > CACHE_SIZE:
                self._entries.popitem(last=False)


_cache: dict[int, tuple[weakref.ref, dict[Any, _Captures]]] = {}
_cache_lock = threading.Lock()


def _captures_of(fn: Callable) -> _Captures:
    """The captures of a function and of all equal ones: one model's explanations of one kind, a lambda made anew."""
    anchor, options = identity(fn)
    with _cache_lock:
        entry = _cache.get(id(anchor))
        if entry is None or entry[0]() is not anchor:
            number = id(anchor)
            # The dead reference is pop's default. When Python ends, the global may be gone before the anchor is.
            entry = weakref.ref(anchor, functools.partial(_cache.pop, number)), {}
            _cache[number] = entry
        kinds = entry[1]
        if options not in kinds:
            for gone in [kind for kind in kinds if is_dead(kind)]:
                del kinds[gone]
            while len(kinds) >= CACHE_SIZE:
                kinds.pop(next(iter(kinds)))
            kinds[options] = _Captures()
        return kinds[options]
