"""Capture: a Python function on tensors becomes one flat, functional graph of ATen operators.

The first stage of the engine. Whatever the function does through PyTorch, ``torch.autograd.grad`` and
Captum included, is recorded at fake tensors; in-place operators are then removed. Parameters stay live:
``get_attr`` nodes hold the very ``nn.Parameter`` objects, so that one capture serves every training step.
``make_fx`` is semi-public and is imported here alone.
"""

from __future__ import annotations

import contextlib
import copy
import linecache
import os
import sys
import threading
import traceback
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._python_dispatch import TorchDispatchMode

from pyxai_bounds.errors import CaptureError

aten = torch.ops.aten

# Tracing swaps global state (hooks, dispatch modes, the modules' own attributes): one capture at a time.
_lock = threading.RLock()

_IDENTITIES = frozenset({"aten::detach", "aten::alias", "aten::clone", "aten::lift_fresh", "aten::lift_fresh_copy"})


@dataclass
class Captured:
    """A function, captured for one set of shapes, dtypes, devices, strides and constants."""

    graph: fx.GraphModule  # one placeholder per tensor argument, in order; one flat tuple of results
    out_spec: pytree.TreeSpec
    modules: ModuleWatch
    derived: dict[Any, Any] = field(default_factory=dict)  # programs made from this graph

    def constants(self) -> Iterator[Tensor]:
        """The live tensors that the graph or the modules behind it hold."""
        for node in self.graph.graph.find_nodes(op="get_attr"):
            value = getattr(self.graph, node.target)
            if isinstance(value, Tensor):
                yield value
        yield from self.modules.tensors()

    def is_current(self) -> bool:
        """Do the modules that the function called still hold the tensors that the graph holds?"""
        return self.modules.unchanged()


@dataclass
class ModuleWatch:
    """What a function's modules looked like when it was captured."""

    seen: dict[int, tuple[weakref.ref[nn.Module], tuple]] = field(default_factory=dict)

    def add(self, module: nn.Module) -> bool:
        """Watch a module; False if it is watched already."""
        if id(module) in self.seen:
            return False
        self.seen[id(module)] = weakref.ref(module), _fingerprint(module)
        return True

    def tensors(self) -> Iterator[Tensor]:
        for reference, _ in self.seen.values():
            module = reference()
            if module is not None:
                yield from (t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)

    def unchanged(self) -> bool:
        for reference, fingerprint in self.seen.values():
            module = reference()
            if module is None or _fingerprint(module) != fingerprint:
                return False
        return True


def _fingerprint(module: nn.Module) -> tuple:
    """Mode, and identity and layout of every tensor: values may change freely, the rest may not."""
    tensors = [*module._parameters.values(), *module._buffers.values()]
    return module.training, [(id(t), t.dtype, t.device, t.stride()) for t in tensors if t is not None]


def unwrap(fn: Callable) -> Callable:
    """The function or module behind DataParallel, DistributedDataParallel and ``torch.compile``."""
    while True:
        if isinstance(fn, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            fn = fn.module
        elif isinstance(fn, nn.Module) and "_orig_mod" in fn._modules:
            fn = fn._modules["_orig_mod"]  # type: ignore[assignment]
        elif hasattr(fn, "_torchdynamo_orig_callable"):
            fn = fn._torchdynamo_orig_callable
        else:
            return fn


def capture(fn: Callable, spec: pytree.TreeSpec, leaves: list[Any], *, specialise: bool = False) -> Captured:
    """Capture ``fn(*args, **kwargs)``, where ``(args, kwargs)`` is ``spec`` with ``leaves``.

    Tensor leaves become placeholders, in order; all other leaves are constants of the graph. With
    ``specialise``, integer tensors of one element are constants too, because some programs read them.
    Raises CaptureError for what a fixed graph cannot express: values read back into Python, random
    numbers, dropout or batch statistics in training mode.
    """
    tensor_positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    constants = {i: leaves[i].detach().clone() for i in tensor_positions if specialise and is_one_integer(leaves[i])}
    out_spec: pytree.TreeSpec | None = None
    overwritten: dict[int, tuple[Tensor, Tensor]] = {}

    def program(*tensors: Tensor) -> list[Any]:
        nonlocal out_spec
        values = list(leaves)
        for i, tensor in zip(tensor_positions, tensors, strict=True):
            values[i] = constants.get(i, tensor)
        args, kwargs = pytree.tree_unflatten(values, spec)
        with torch.enable_grad(), _Record(overwritten):
            results, out_spec = pytree.tree_flatten(fn(*args, **kwargs))
        return results

    with _lock, _clean_modes(), _watched_modules(fn) as watch:
        try:
            graph = _functional(_trace(program, [leaves[i] for i in tensor_positions]))
        except (GuardOnDataDependentSymNode, DataDependentOutputException) as error:
            raise CaptureError(
                f"The function reads the value of a tensor into Python (a comparison in an if, .item(), float()) at "
                f"{_users_line_of(error)}. Bounds hold for one fixed program: use torch.where, or pass the number in."
            ) from error
        finally:
            for tensor, value in overwritten.values():
                tensor.data.copy_(value)
    _simplify(graph)
    _refuse_randomness(graph)
    assert out_spec is not None
    return Captured(graph, out_spec, watch)


def retrace(program: Callable, tensors: list[Tensor]) -> fx.GraphModule:
    """Trace a function that is already functional, such as a captured graph run on intervals."""
    with _lock, _clean_modes(), torch.no_grad():
        return _trace(program, tensors)


def is_one_integer(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.numel() == 1 and not leaf.is_floating_point()


def source_of(node: fx.Node) -> str:
    """Where in the user's code a node comes from: file, line and code."""
    return node.stack_trace or "(unknown source)"


def _trace(program: Callable, tensors: list[Tensor]) -> fx.GraphModule:
    # make_fx looks at the signature of what it is given; a lambda hides it.
    tracer = make_fx(lambda *args: program(*args), tracing_mode="fake", _allow_non_fake_inputs=True)
    with fx.traceback.preserve_node_meta():
        return tracer(*[t.clone() if t.is_inference() else t.detach() for t in tensors])


def _functional(graph: fx.GraphModule) -> fx.GraphModule:
    """The same graph without in-place operators; every node keeps its line of the user's code."""

    def run(*args: Any) -> Any:
        return fx.Interpreter(graph).run(*args)

    examples = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    with torch.no_grad(), fx.traceback.preserve_node_meta():
        return make_fx(
            torch.func.functionalize(run, remove="mutations"), tracing_mode="fake", _allow_non_fake_inputs=True
        )(*examples)


@contextlib.contextmanager
def _clean_modes() -> Iterator[None]:
    """Gradients possible, no autocast, compiled functions run as written: the graph must not depend on the caller."""
    import torch._dynamo  # takes a second, which whoever captures nothing need not wait for

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for device_type in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch._dynamo.config.patch(error_on_nested_fx_trace=False))  # torch 2.11 refuses instead
        # What tracing itself provokes is no news about the user's program: it looks at .grad, and it hooks modules.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        warnings.filterwarnings("ignore", message=r"Using `torch.compile\(module\)` when there are global hooks")
        yield


class _Record(TorchDispatchMode):
    """Note the user's line of every operator, and refuse to bake a parameter's value into the graph as a number."""

    def __init__(self, overwritten: dict[int, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._overwritten = overwritten
        self._sources: dict[int, str] = {}  # of each forward operator, by its autograd sequence number

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is aten._local_scalar_dense.default and (
            isinstance(args[0], (nn.Parameter, nn.Buffer)) or args[0].requires_grad
        ):
            raise CaptureError(
                "The function reads a parameter's value into Python (.item(), float(), bool() or a comparison in an "
                "if). The bounds would keep that value for ever. Compute with the tensor itself instead."
            )
        self._save_what_is_written(func, args)
        fx.traceback.set_stack_trace([self._source()])
        return func(*args, **(kwargs or {}))

    def _save_what_is_written(self, func: Any, args: tuple) -> None:
        """Tracing really performs in-place operators on tensors that are no arguments, such as counters in buffers."""
        for argument, value in zip(func._schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(value, Tensor) and not isinstance(value, FakeTensor):
                with torch._C._DisableTorchDispatch():
                    self._overwritten.setdefault(id(value), (value, value.detach().clone()))

    def _source(self) -> str:
        """The user's line; of an operator that autograd runs, the line of the operator that it differentiates."""
        backward = torch._C._current_autograd_node()
        if backward is not None:
            forward = self._sources.get(backward._sequence_nr())
            return f"the backward pass of {forward}" if forward else _users_line()
        source = _users_line()
        self._sources[torch.autograd._get_sequence_nr() - 1] = source
        return source


_TORCH = os.path.dirname(torch.__file__)
_HERE = os.path.dirname(__file__)


def _users_line() -> str:
    return _innermost(traceback.walk_stack(sys._getframe(1)))


def _users_line_of(error: BaseException) -> str:
    return _innermost(reversed(list(traceback.walk_tb(error.__traceback__))))


def _innermost(frames: Iterable[tuple[Any, int]]) -> str:
    """The first of the frames that is the user's: not PyTorch's, not ours, and no library's if there is another."""
    library = ""
    for frame, number in frames:
        filename = frame.f_code.co_filename
        if not filename.startswith((_TORCH, _HERE, "<")):
            line = f"{filename}:{number}: {linecache.getline(filename, number).strip()}"
            if "site-packages" not in filename:
                return line
            library = library or line
    return library or "(unknown source)"


@contextlib.contextmanager
def _watched_modules(fn: Callable) -> Iterator[ModuleWatch]:
    """Record every module that runs, check its mode first, and undo whatever tracing does to it."""
    watch = ModuleWatch()
    saved: dict[int, tuple[nn.Module, dict, list]] = {}
    thread = threading.get_ident()

    def save(module: nn.Module) -> None:
        if id(module) not in saved:
            grads = [(p, p.grad) for p in module._parameters.values() if p is not None]
            saved[id(module)] = module, {k: _shallow(v) for k, v in module.__dict__.items() if "hooks" not in k}, grads

    def before_forward(module: nn.Module, _: Any) -> None:
        if threading.get_ident() != thread:
            return
        for name, part in module.named_modules():
            if watch.add(part):
                _check_mode(part, name)
                save(part)

    # Some functions change a model before they run it, say its gradients.
    for module in _modules_in_reach(fn):
        save(module)
    hook = nn.modules.module.register_module_forward_pre_hook(before_forward)
    try:
        yield watch
    finally:
        hook.remove()
        for module, attributes, grads in saved.values():
            for name in [name for name in module.__dict__ if name not in attributes and "hooks" not in name]:
                del module.__dict__[name]
            for name, value in attributes.items():
                _restore(module.__dict__, name, value)
            for parameter, grad in grads:
                parameter.grad = grad


def _modules_in_reach(fn: Any, depth: int = 4) -> list[nn.Module]:
    """The modules that a function refers to: itself, its closure, the globals it names, its object's attributes."""
    if isinstance(fn, nn.Module):
        return list(fn.modules())
    if depth == 0 or isinstance(fn, (Tensor, type, types.ModuleType, str)):
        return []
    nearby: list[Any] = []
    if isinstance(fn, types.FunctionType):
        nearby += [cell.cell_contents for cell in fn.__closure__ or ()]
        nearby += [fn.__globals__[name] for name in fn.__code__.co_names if name in fn.__globals__]
    elif isinstance(fn, types.MethodType):
        nearby += [fn.__self__]
    elif isinstance(fn, (list, tuple)):
        nearby += fn
    elif isinstance(fn, dict):
        nearby += fn.values()
    else:
        nearby += getattr(fn, "__dict__", {}).values()
    return [module for value in nearby for module in _modules_in_reach(value, depth - 1)]


def _shallow(value: Any) -> Any:
    """The attribute, and a copy of its elements if it is a plain container that tracing may fill."""
    return value, (copy.copy(value) if isinstance(value, (list, dict, set)) else None)


def _restore(attributes: dict, name: str, saved: tuple[Any, Any]) -> None:
    value, elements = saved
    if isinstance(value, list):
        value[:] = elements
    elif elements is not None:
        value.clear()
        value.update(elements)
    attributes[name] = value


def _check_mode(module: nn.Module, name: str) -> None:
    where = f"{type(module).__name__} '{name}'" if name else type(module).__name__
    if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
        raise CaptureError(f"{where} is in training mode: its output is random. Call model.eval() before bounding.")
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
        raise CaptureError(
            f"{where} would normalise with the statistics of the batch, which mixes the samples. Call model.eval() "
            "before bounding (and keep track_running_stats=True)."
        )


def _simplify(graph: fx.GraphModule) -> None:
    """Remove what means nothing to values: aliases, copies, profiler marks, writes back into arguments."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        name = node.target.name() if isinstance(node.target, torch._ops.OpOverload) else ""
        base = name.split(".")[0]
        if base in _IDENTITIES or (base == "aten::_to_copy" and _same_kind(node)):
            node.replace_all_uses_with(node.args[0])
        elif base == "aten::copy_" or (base == "aten::copy" and _is_plain_copy(node)):
            node.replace_all_uses_with(node.args[1])
        elif name in _CONSTANT_LIKE:
            _make_constant(graph.graph, node)
    remove_unused(graph)


# Tensors made in the shape of another one, with what fills them (None: the argument after the shape).
_CONSTANT_LIKE = {
    "aten::zeros_like": 0,
    "aten::ones_like": 1,
    "aten::full_like": None,
    "aten::new_zeros": 0,
    "aten::new_ones": 1,
    "aten::new_full": None,
}


def _make_constant(graph: fx.Graph, node: fx.Node) -> None:
    """The shape is known, so the constant need not keep alive the value it was shaped after."""
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


def remove_unused(graph: fx.GraphModule) -> None:
    """Drop every node without users; a functional graph has no side effects to keep."""
    for node in reversed(list(graph.graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.graph.erase_node(node)
    graph.recompile()


def _same_kind(node: fx.Node) -> bool:
    before, after = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    return before.dtype == after.dtype and before.device == after.device


def _is_plain_copy(node: fx.Node) -> bool:
    """``copy`` keeps the first argument's shape and dtype; it has no derivative, so it goes where they are equal."""
    source, result = node.args[1].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    return source.shape == result.shape and source.dtype == result.dtype and source.device == result.device


def _refuse_randomness(graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags:
            raise CaptureError(
                f"The function draws random numbers ({target.name()} at {source_of(node)}). Bounds hold for one fixed "
                "program: draw the noise outside and pass it as an argument."
            )
        if node.op == "call_function" and target is aten._local_scalar_dense.default:
            raise CaptureError(f"The function reads a tensor's value into Python at {source_of(node)}.")


__all__ = ["Captured", "capture", "is_one_integer", "remove_unused", "retrace", "source_of", "unwrap"]
