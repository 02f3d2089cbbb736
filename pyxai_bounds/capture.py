"""Capture: a Python function on tensors becomes one flat, functional graph of ATen operators.

The first stage of the engine. Whatever the function does through PyTorch, ``torch.autograd.grad`` and
Captum included, is recorded at fake tensors; in-place operators are then removed. Parameters stay live:
``get_attr`` nodes hold the very ``nn.Parameter`` objects, so that one capture serves every training step.
``make_fx`` is semi-public and is imported here alone, for programs with shapes that depend on values.
"""

from __future__ import annotations

import contextlib
import linecache
import logging
import math
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from torch.distributions import Distribution
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn.modules import transformer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from pyxai_bounds.decompose import DECOMPOSED, REWRITTEN
from pyxai_bounds.errors import CaptureError
from pyxai_bounds.rounding import without_autocast
from pyxai_bounds.tracer import trace
from pyxai_bounds.watch import ModuleWatch, preserved

aten = torch.ops.aten

# Tracing swaps global state (hooks, dispatch modes, the modules' own attributes): one capture at a time.
_lock = threading.RLock()

_READABLE = 2**20  # elements; larger tensors are not read into Python

_IDENTITIES = frozenset({"aten::detach", "aten::alias", "aten::clone", "aten::lift_fresh", "aten::lift_fresh_copy"})


@dataclass
class Captured:
    """A function, captured for arguments of certain shapes, dtypes, devices and strides, and for certain constants."""

    graph: fx.GraphModule  # one placeholder per tensor argument, in order; one flat tuple of results
    out_spec: pytree.TreeSpec
    modules: ModuleWatch
    symbolic: bool = False  # does it contain sizes that depend on values?
    specialised: bool = False  # are the values of its integer arguments constants of the graph?
    derived: dict[Any, Any] = field(default_factory=dict)  # programs made from this graph

    def constants(self) -> Iterator[Tensor]:
        """The live tensors that the graph or the modules behind it hold."""
        for node in self.graph.graph.find_nodes(op="get_attr"):
            value = getattr(self.graph, node.target)
            if isinstance(value, Tensor):
                yield value
        yield from self.modules.tensors()

    def is_current(self) -> bool:
        """Are the modules that the function refers to or calls still what they were?"""
        return self.modules.unchanged()


def capture(fn: Callable, spec: pytree.TreeSpec, leaves: list[Any], *, specialise: bool = False) -> Captured:
    """Capture ``fn(*args, **kwargs)``, where ``(args, kwargs)`` is ``spec`` with ``leaves``.

    Tensor leaves become placeholders, in order; all other leaves are constants of the graph. With
    ``specialise``, integer tensors are constants too, because some programs read them.
    Raises CaptureError for what a fixed graph cannot express: values read back into Python, random
    numbers, dropout or batch statistics in training mode.
    """
    tensor_positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = [leaves[i] for i in tensor_positions]
    others = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    constants = {i: leaves[i].detach().clone() for i in tensor_positions if specialise and is_readable(leaves[i])}
    out_spec: pytree.TreeSpec | None = None
    record = _Record(readable=list(constants.values()), makes_constants=specialise)

    def program(*tensors: Tensor) -> list[Any]:
        nonlocal out_spec
        values = list(leaves)
        for i, tensor in zip(tensor_positions, tensors, strict=True):
            values[i] = constants.get(i, tensor)
        args, kwargs = pytree.tree_unflatten(values, spec)
        with torch.enable_grad(), record, _RefuseConversions(record):
            results, out_spec = pytree.tree_flatten(fn(*args, **kwargs))
            _refuse_hidden_tensors(results)
        return results

    def traced(clear_grads: bool, symbolic: bool) -> tuple[fx.GraphModule, ModuleWatch, bool]:
        with preserved([fn, *others], _check_mode, clear_grads=clear_grads) as (watch, saved):
            record.watch = watch
            try:
                graph = _trace(program, _plain(tensors), DECOMPOSED, symbolic)
                _refuse_randomness(graph)
                return _functional(graph, record, symbolic), watch, symbolic
            except (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException) as error:
                if symbolic:
                    raise (record.random or _refusal_of_values(_users_line_of(error))) from error
                symbolic = True
            except Exception as error:
                # A function that calls .backward() would add to gradients that are real: try it without them.
                if record.random is not None:
                    raise record.random from error
                if clear_grads or not saved.had_grads():
                    raise
                clear_grads = True
            finally:
                record.undo_writes()
        return traced(clear_grads, symbolic)

    with _lock, _clean_modes():
        graph, watch, symbolic = traced(clear_grads=False, symbolic=False)
    _simplify(graph)
    _refuse_values_in_results(graph)
    _refuse_lost_writes(graph, record)
    assert out_spec is not None
    return Captured(graph, out_spec, watch, symbolic, specialise)


def retrace(program: Callable, tensors: list[Tensor], symbolic: bool) -> fx.GraphModule:
    """Trace a function that is already functional, such as a captured graph run on intervals."""
    with _lock, _clean_modes(), torch.no_grad():
        return _trace(program, _plain(tensors), DECOMPOSED, symbolic, functional=True)


def is_readable(leaf: Any) -> bool:
    """May a program read the values of this argument, if it is captured anew for each? Targets, masks, lengths may."""
    if not isinstance(leaf, Tensor) or leaf.is_floating_point() or leaf.is_complex():
        return False
    return leaf.numel() <= _READABLE


def source_of(node: fx.Node) -> str:
    """Where in the user's code a node comes from: file, line and code, and the layer that was running."""
    return node.stack_trace or "(unknown source)"


def is_backward(node: fx.Node) -> bool:
    """Does autograd compute it?"""
    return source_of(node).startswith(_BACKWARD)


def layer_of(node: fx.Node) -> str:
    """The path of the layer that was running, as ``named_modules`` has it; "" where none was, or the model itself."""
    found = re.search(r" \(in ([^\s:()]+)(: .*)?\)$", source_of(node))
    return found[1] if found else ""


def _trace(
    program: Callable, tensors: list[Tensor], decompositions: dict, symbolic: bool, functional: bool = False
) -> fx.GraphModule:
    with fx.traceback.preserve_node_meta():
        if not symbolic:
            return trace(program, tensors, decompositions, functional=functional)
        # make_fx looks at the signature of what it is given; a lambda hides it.
        tracer = make_fx(lambda *a: program(*a), decompositions, tracing_mode="fake", _allow_non_fake_inputs=True)
        return tracer(*tensors)


def _plain(tensors: list[Tensor]) -> list[Tensor]:
    return [t.clone() if t.is_inference() else t.detach() for t in tensors]


def _functional(graph: fx.GraphModule, record: _Record, symbolic: bool) -> fx.GraphModule:
    """The same graph without in-place operators. Nodes keep their lines of the user's code."""

    def run(*args: Any) -> Any:
        interpreter = _FunctionalConstants(graph)
        results = interpreter.run(*args)
        record.written_memory.update(interpreter.written_memory())
        return results

    examples = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    functional = torch.func.functionalize(run, remove="mutations")
    with torch.no_grad():
        return _trace(functional, examples, {}, symbolic, functional=True)


class _FunctionalConstants(fx.Interpreter):
    """Runs a graph under functionalisation with live tensors treated as arguments.

    Otherwise what is computed from live tensors alone would not be functional, and could not be written in place.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self._wrapped: dict[int, tuple[Tensor, Tensor]] = {}  # by id: a second read must see what was written

    def get_attr(self, target: Any, args: tuple, kwargs: dict) -> Any:
        value = super().get_attr(target, args, kwargs)
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._wrapped:
            level = torch._C._functorch.maybe_current_level()
            assert level is not None  # functionalisation is one
            self._wrapped[id(value)] = value, torch._C._functorch._wrap_functional_tensor(value, level)
        return self._wrapped[id(value)][1]

    def written_memory(self) -> Iterator[int]:
        """The storages of the live tensors that were written into, directly or through a view."""
        for value, wrapped in self._wrapped.values():
            torch._sync(wrapped)
            if torch._C._functorch._unwrap_functional_tensor(wrapped, False) is not value:
                yield _memory_of(value)


def _memory_of(t: Tensor) -> int:
    return t.untyped_storage()._cdata


@contextlib.contextmanager
def _clean_modes() -> Iterator[None]:
    """Make the graph independent of the caller's modes: gradients possible, no autocast, nothing compiled."""
    import torch._dynamo  # here, because it takes a second, which only a capture should cost

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(without_autocast())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_no_fused_layers())
        stack.enter_context(_unchecked_distributions())
        # The caller's hooks on saved tensors (non-reentrant checkpointing sets some) return copies that the tracer does
        # not know and takes for constants. The innermost hooks count, so these switch them off; but only where there
        # are any, because torch.func refuses hooks.
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_itself, _itself))
        stack.enter_context(torch._dynamo.config.patch(error_on_nested_fx_trace=False))  # torch 2.11 refuses instead
        # These warnings are caused by tracing itself, which reads .grad and hooks modules, not by the user's program.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        warnings.filterwarnings("ignore", message=r"Using `torch.compile\(module\)` when there are global hooks")
        stack.enter_context(_no_second_report())
        yield


@contextlib.contextmanager
def _no_second_report() -> Iterator[None]:
    """Silence the log of fake tensors where shapes do not fit: they log the traceback that they also raise."""
    log = logging.getLogger("torch._subclasses.fake_tensor")

    def report(record: logging.LogRecord) -> bool:
        return not record.msg.startswith("failed while attempting to run meta")

    log.addFilter(report)
    try:
        yield
    finally:
        log.removeFilter(report)


def _itself(t: Tensor) -> Tensor:
    return t


@contextlib.contextmanager
def _no_fused_layers() -> Iterator[None]:
    """Make PyTorch run layers in parts for which there are rules, the same on every device.

    Attention and encoder layers become matrix products, softmax and norms. Without cuDNN, batch norm, recurrent layers
    and grids run the same operators on a GPU as on a CPU. And encoders do not read their mask to see whether it is the
    causal one, which only serves to choose among fused layers.
    """
    fast, cudnn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_cudnn_enabled()
    looks = transformer._detect_is_causal_mask
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_cudnn_enabled(False)
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            yield
    finally:
        transformer._detect_is_causal_mask = looks
        torch._C._set_cudnn_enabled(cudnn)
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def _unchecked_distributions() -> Iterator[None]:
    """``torch.distributions`` reads the values of its arguments to check them; it checks as before afterwards."""
    checks = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(checks)


_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_MAKE_CONSTANTS = (torch.arange, torch.linspace, torch.tensor, torch.as_tensor)
_FILL = (torch.zeros, torch.ones, torch.full)  # often written into: not constants themselves
_SHOW = (Tensor.unbind, torch.unbind, Tensor.__getitem__)
_READ = (Tensor.tolist, Tensor.item, Tensor.__float__, Tensor.__int__, Tensor.__bool__)


class _Record(TorchDispatchMode):
    """Records the user's line of every operator and what is written in place; refuses to bake values into the graph."""

    def __init__(self, readable: list[Tensor], makes_constants: bool) -> None:
        super().__init__()
        self.watch = ModuleWatch()  # of the modules that are called
        self._names: dict[int, str] = {}  # of modules, by id
        self._makes_constants = makes_constants
        self._readable = {id(t): t for t in readable}
        # Tensors of written numbers: each with its version and its values then.
        self._numbers: dict[int, tuple[Tensor, int, Tensor]] = {}
        self._sources: dict[int, str] = {}  # lines of forward operators, by autograd's sequence number
        self.random: CaptureError | None = None  # the error to raise if the trace fails after random numbers were drawn
        self.written: dict[int, tuple[Tensor, Tensor]] = {}  # live tensors that were written, with their old values
        self.written_memory: set[int] = set()  # storages of live tensors that were written, also through views

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is aten._local_scalar_dense.default and (self.is_live(args[0]) or args[0].requires_grad):
            _refuse_read()
        if func is aten._local_scalar_dense.default and id(args[0]) in self._readable:
            with _disable_current_modes():
                return func(*args)
        self._save_what_is_written(func, args)
        if self.random is None and torch.Tag.nondeterministic_seeded in func.tags:
            self.random = _refusal_of_randomness(func, _users_line())
        fx.traceback.set_stack_trace([self._source()])
        return func(*args, **(kwargs or {}))

    def is_live(self, value: Any) -> bool:
        """Is it a real tensor that the function did not get as an argument, such as a parameter?"""
        return isinstance(value, Tensor) and not isinstance(value, FakeTensor) and id(value) not in self._readable

    def at_constants(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """The value of a function of integers whose values are known, which is then known, too; or NotImplemented."""
        if not self._makes_constants:
            return NotImplemented
        # What torch.IntTensor([…]) makes, which is no function of torch's, passes here when it is written.
        if func is aten.lift_fresh.default and self.is_live(args[0]) and is_readable(args[0]):
            self._readable[id(args[0])] = args[0]
        value, copies = (NotImplemented, []) if func in _FILL else self._at_known_values(func, args, kwargs)
        if value is NotImplemented:
            return NotImplemented
        made = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
        if not all(is_readable(t) for t in made) or {_memory_of(t) for t in made} & {_memory_of(t) for t in copies}:
            return NotImplemented  # what shows part of a tensor may be written into, and must show it
        self._readable |= {id(t): t for t in made}
        return value

    def numbers(self, t: Any) -> Tensor | None:
        """A copy of what the function wrote into a tensor of its own, or computed of such tensors and of integers that
        are known; None if it is neither, or was written into since.
        """
        if id(t) not in self._numbers:
            return None
        held, version, values = self._numbers[id(t)]
        return values.clone() if held._version == version else None

    def note_numbers(self, func: Any, args: tuple, kwargs: dict, made: Any) -> None:
        """What is read of such tensors, or of truth values that follow from them, is what PyTorch computes."""
        if not (self._makes_constants or func in _MAKE_CONSTANTS or func in _FILL or func in _SHOW):
            return
        if any(isinstance(t, Tensor) and t.numel() > _READABLE for t in pytree.tree_leaves(made)):
            return
        try:
            values, _ = self._at_known_values(func, args, kwargs)
        except Exception:  # it draws random numbers, or takes sizes that are not known
            return
        if values is NotImplemented:
            return
        for t, value in zip(pytree.tree_leaves(made), pytree.tree_leaves(values), strict=True):
            if isinstance(t, Tensor):
                self._numbers[id(t)] = t, t._version, value

    def _at_known_values(self, func: Any, args: tuple, kwargs: dict) -> tuple[Any, list[Tensor]]:
        """What a function makes where all tensors are known, and the copies that it was given; NotImplemented where
        they are not, or where it writes into one of the copies.
        """
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        copies = []
        with _disable_current_modes():
            for i in tensors:
                if id(leaves[i]) in self._readable:
                    continue
                copy = self.numbers(leaves[i])
                if copy is None:
                    return NotImplemented, []
                leaves[i] = copy
                copies.append(copy)
            if not (tensors or func in _MAKE_CONSTANTS or func in _FILL):
                return NotImplemented, []
            args, kwargs = pytree.tree_unflatten(leaves, spec)
            versions = [copy._version for copy in copies]
            with _RefuseRandomness():
                value = func(*args, **kwargs)
        return (value if versions == [copy._version for copy in copies] else NotImplemented), copies

    def _save_what_is_written(self, func: Any, args: tuple) -> None:
        """Save live tensors before they are written: tracing really performs in-place operators on them."""
        for argument, value in zip(func._schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and self.is_live(value):
                with torch._C._DisableTorchDispatch():
                    self.written.setdefault(id(value), (value, value.detach().clone()))

    def undo_writes(self) -> None:
        for tensor, value in self.written.values():
            tensor.data.copy_(value)

    def _source(self) -> str:
        """The user's line; for an operator of a backward pass, that of the operator that is differentiated."""
        backward = torch._C._current_autograd_node()
        if backward is not None:
            forward = self._sources.get(backward._sequence_nr())
            return f"{_BACKWARD}{forward}" if forward else _users_line()
        source = _innermost(traceback.walk_stack(sys._getframe(1)), self._name)
        # The first operator after autograd has taken a number; those that are not differentiated take none.
        self._sources.setdefault(torch.autograd._get_sequence_nr() - 1, source)
        return source

    def _name(self, module: nn.Module) -> str:
        if id(module) not in self._names:
            self._names = {id(module): ""} | self.watch.names()
        return self._names[id(module)]


class _RefuseConversions(TorchFunctionMode):
    """Refuses conversions of whole tensors, which read memory without an operator; replaces ``REWRITTEN`` functions."""

    def __init__(self, record: _Record) -> None:
        super().__init__()
        self._record = record

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        value = self._record.at_constants(func, args, kwargs or {})
        if value is not NotImplemented:
            return value
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__) and self._record.is_live(args[0]):
            _refuse_read()
        if func in (Tensor.numpy, Tensor.__array__):
            raise CaptureError(
                f"The function leaves PyTorch for NumPy at {_users_line()}. Bounds follow PyTorch's operators alone: "
                "compute with torch functions there."
            )
        if func == _SET_DATA:
            raise CaptureError(
                f"The function assigns to .data at {_users_line()}, which passes by PyTorch's operators, and bounds "
                "could not follow. Use the new tensor in the place of the old one, or copy_() into it."
            )
        if func is torch._pack_padded_sequence:
            raise CaptureError(
                f"The function packs sequences of different lengths at {_users_line()}; how many steps there are "
                "depends on the values of a tensor. Give the layer padded sequences, and take of its outputs what each "
                "length allows: output[torch.arange(B), lengths - 1] (a bidirectional layer reads the padding first)."
            )
        if func in _READ:
            with _disable_current_modes():
                numbers = self._record.numbers(args[0])
                if numbers is not None:
                    return func(numbers)
        result = REWRITTEN.get(func, func)(*args, **(kwargs or {}))
        self._record.note_numbers(func, args, kwargs or {}, result)
        return result


def _refuse_read() -> NoReturn:
    raise CaptureError(
        "The function reads a parameter's value, or that of another tensor it did not get as an argument, into Python "
        f"(.item(), float(), bool(), .tolist() or a comparison in an if) at {_users_line()}. The bounds would keep "
        "that value for ever. Compute with the tensor itself instead."
    )


def _refusal_of_values(source: str) -> CaptureError:
    return CaptureError(
        "The function reads the value of a tensor into Python (a comparison in an if, .item(), float()), or makes a "
        f"tensor whose shape depends on values, at {source}. Bounds hold for one fixed program: use torch.where, or "
        "pass the number in. Integers that it has to read (Captum's feature_mask, lengths) must be its arguments."
    )


def _refuse_values_in_results(graph: fx.GraphModule) -> None:
    """Refuse a graph that computes with a number read from a tensor: rules take numbers and tensors, no symbols."""
    for node in graph.graph.nodes:
        if isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool)) and node.users:
            raise _refusal_of_values(source_of(node))


def _refuse_hidden_tensors(results: list[Any]) -> None:
    for result in results:
        if not isinstance(result, Tensor) and any(
            isinstance(v, Tensor) for v in getattr(result, "__dict__", {}).values()
        ):
            raise TypeError(
                f"The function returns a {type(result).__name__}, whose tensors cannot be seen: return tensors, or "
                "tuples, lists and dicts of them."
            )


_TORCH = os.path.dirname(torch.__file__)
_HERE = os.path.dirname(__file__)
_PYTHON = os.path.dirname(os.__file__)
_BACKWARD = "the backward pass of "


def _users_line() -> str:
    return _innermost(traceback.walk_stack(sys._getframe(1)))


def _users_line_of(error: BaseException) -> str:
    return _innermost(reversed(list(traceback.walk_tb(error.__traceback__))))


def _innermost(frames: Iterable[tuple[Any, int]], name: Callable[[nn.Module], str] = lambda module: "") -> str:
    """The line of the innermost frame of the user's code, else of a library that is neither Python's own, PyTorch nor
    this one; and the innermost layer that was running, which the line does not say where layers repeat.
    """
    users = library = layer = ""
    for frame, number in frames:
        filename = frame.f_code.co_filename
        if not layer and frame.f_code.co_name == "forward" and isinstance(frame.f_locals.get("self"), nn.Module):
            layer = _layer(frame.f_locals["self"], name)
        if not users and not filename.startswith((_TORCH, _HERE, "<")):
            installed = "site-packages" in filename
            line = f"{filename}:{number}: {linecache.getline(filename, number).strip()}"
            if not installed and not filename.startswith(_PYTHON):
                users = line
            elif installed:
                library = library or line
        if users and layer:
            break
    return (users or library or "(unknown source)") + layer


def _layer(module: nn.Module, name: Callable[[nn.Module], str]) -> str:
    """A module by its path; one of PyTorch's by what it is as well: the call of an nn.Sequential does not show it."""
    path, kind = name(module), ""
    if type(module).__module__.startswith("torch.nn.") and next(module.children(), None) is None:
        kind = f"{type(module).__name__}({module.extra_repr()})"
    shown = ": ".join(part for part in (path, kind) if part)
    return f" (in {shown})" if shown else ""


_MEND_MODE = "Call model.eval() before bounding, or, in a training loop, bound inside `with xb.train.deployed(model):`"


def _check_mode(module: nn.Module, name: str) -> None:
    where = f"{type(module).__name__} '{name}'" if name else type(module).__name__
    if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
        raise CaptureError(f"{where} is in training mode: its output is random. {_MEND_MODE}.")
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
        raise CaptureError(
            f"{where} would normalise with the statistics of the batch, which mixes the samples. {_MEND_MODE} "
            "(and keep track_running_stats=True)."
        )
    if type(module).__module__.startswith("torch.ao.nn.quantized"):
        raise CaptureError(f"{where} is quantised: it computes with packed integers. Bound the network in float32.")


def _simplify(graph: fx.GraphModule) -> None:
    """Remove nodes that do not affect the values of results: aliases, copies, profiler marks, writes to arguments."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        name = node.target.name() if isinstance(node.target, torch._ops.OpOverload) else ""
        base = name.split(".")[0]
        if base in _IDENTITIES or (base == "aten::_to_copy" and _same_kind(node)):
            node.replace_all_uses_with(node.args[0])
        elif base == "aten::copy_" or (base == "aten::copy" and _is_plain_copy(node)):
            node.replace_all_uses_with(node.args[1])
        elif base in ("aten::as_strided", "aten::as_strided_scatter") and _same_elements(node):
            shown = node.args[0 if base == "aten::as_strided" else 1]
            with graph.graph.inserting_before(node):
                same = graph.graph.call_function(aten.reshape.default, (shown, list(node.meta["val"].shape)))
            same.meta = node.meta
            node.replace_all_uses_with(same)
        elif name in _CONSTANT_LIKE:
            _make_constant(graph.graph, node)
    remove_unused(graph.graph)
    graph.recompile()


# Operators that make a tensor in the shape of another one, and what they fill it with; None: with an argument.
_CONSTANT_LIKE = {
    "aten::zero": 0,
    "aten::zeros_like": 0,
    "aten::ones_like": 1,
    "aten::full_like": None,
    "aten::new_zeros": 0,
    "aten::new_ones": 1,
    "aten::new_full": None,
}


def _make_constant(graph: fx.Graph, node: fx.Node) -> None:
    """Replace such a node by one that names the shape, so that the tensor it was shaped after need not be computed."""
    fill: Any = _CONSTANT_LIKE[node.target.name()]  # type: ignore[union-attr]
    if fill is None:
        fill = node.args[2 if "new" in str(node.target) else 1]
    value = node.meta["val"]
    with graph.inserting_before(node):
        constant = graph.call_function(
            aten.full.default, (list(value.shape), fill), {"dtype": value.dtype, "device": value.device}
        )
    constant.meta = node.meta
    node.replace_all_uses_with(constant)


def remove_unused(graph: fx.Graph) -> None:
    """Drop every node without users; a functional graph has no side effects to keep."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


def _same_kind(node: fx.Node) -> bool:
    before, after = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    return before.dtype == after.dtype and before.device == after.device


def _same_elements(node: fx.Node) -> bool:
    """Does ``as_strided`` show all elements of its tensor in their order, as in averages of channels-last images?

    The stride of a dimension of size 1 does not count.
    """
    whole: Tensor = node.args[0].meta["val"]  # type: ignore[union-attr]
    geometry: Any = node.args[2 if "scatter" in str(node.target) else 1 :]
    size, stride, *offset = geometry
    view, held = _strides_that_count(size, stride), _strides_that_count(whole.shape, whole.stride())
    in_order = [_strides_that_count(s, torch.empty(s, device="meta").stride()) for s in (size, whole.shape)]
    return (
        math.prod(size) == whole.numel()
        and (not offset or offset[0] in (None, whole.storage_offset()))
        and ((list(size) == list(whole.shape) and view == held) or [view, held] == in_order)
    )


def _strides_that_count(size: Any, stride: Any) -> list[int]:
    return [step for n, step in zip(size, stride, strict=True) if n > 1]


def _is_plain_copy(node: fx.Node) -> bool:
    """May ``copy`` be replaced by its second argument? If shape, dtype and device agree. It has no derivative."""
    source, result = node.args[1].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    return source.shape == result.shape and source.dtype == result.dtype and source.device == result.device


def _refuse_lost_writes(graph: fx.GraphModule, record: _Record) -> None:
    """Refuse a graph that reads the old value of a live tensor that the function writes: it would not be a constant."""
    written = record.written_memory | {_memory_of(tensor) for tensor, _ in record.written.values()}
    for node in graph.graph.find_nodes(op="get_attr"):
        value = getattr(graph, node.target)
        if isinstance(value, Tensor) and _memory_of(value) in written:
            raise CaptureError(
                "The function writes into a tensor that it did not get as an argument (a buffer, say) and then "
                f"computes with it, at {source_of(next(iter(node.users)))}. If that is what a module does while it "
                "trains, as spectral norm does, call model.eval(); else build a new tensor instead of writing in place."
            )


def _refuse_randomness(graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        _refuse_if_random(node.target, source_of(node))


def _refuse_if_random(op: Any, source: str) -> None:
    if isinstance(op, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in op.tags:
        raise _refusal_of_randomness(op, source)


def _refusal_of_randomness(op: torch._ops.OpOverload, source: str) -> CaptureError:
    return CaptureError(
        f"The function draws random numbers ({op.name()} at {source}). Bounds hold for one fixed program: draw the "
        "noise outside and pass it as an argument."
    )


class _RefuseRandomness(TorchDispatchMode):
    """Refuses random operators in what is computed during the capture and becomes a constant."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        _refuse_if_random(func, _users_line())
        return func(*args, **(kwargs or {}))


__all__ = [
    "Captured",
    "capture",
    "is_backward",
    "is_readable",
    "layer_of",
    "remove_unused",
    "retrace",
    "source_of",
]
