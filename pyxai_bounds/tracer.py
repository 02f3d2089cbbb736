"""Tracing: what a function does with fake tensors, noted as a graph. ``capture`` decides what is traced.

``make_fx`` does the same for more kinds of tensors and numbers, and takes several times as long: it asks PyTorch for
the shape of every result anew. Layers repeat: here what an operator makes of arguments of the same kind is looked up.
"""

from __future__ import annotations

import contextlib
import gc
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._functorch import config
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.utils._python_dispatch import TorchDispatchMode, autograd_would_have_decomposed

from pyxai_bounds.errors import CaptureError

aten = torch.ops.aten


def trace(
    program: Callable[..., Sequence[Any]],
    tensors: Sequence[Tensor],
    decompositions: Mapping[Any, Callable[..., Any]],
    *,
    functional: bool,
) -> fx.GraphModule:
    """The graph of ``program(*tensors)``, with a placeholder for each tensor. Fake tensors stay those of their mode.

    Real tensors that the program uses become ``get_attr`` nodes that hold them. In-place operators stay, and so does
    what nobody uses. ``meta["val"]`` is a fake tensor, or several, which nodes share: they are to be read alone.
    An operator among the ``decompositions`` is replaced by what these do, unless that is NotImplemented.
    functional: the program writes into no view, so that views need not share memory.
    """
    fake = next((t.fake_mode for t in tensors if isinstance(t, FakeTensor)), None) or _new_mode()
    arguments = [_another(t) if isinstance(t, FakeTensor) else fake.from_tensor(t) for t in tensors]
    tracer = _Tracer(fake, decompositions, functional)
    for argument in arguments:
        tracer.placeholder(argument)
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # it would keep converted parameters beyond the trace
    try:
        with fake, tracer:
            results = program(*arguments)
    finally:
        torch.set_autocast_cache_enabled(cached)
    return tracer.finish(results)


def _another(t: FakeTensor) -> FakeTensor:
    """A tensor of the same kind: what nodes show is shared, but each argument is one of its own."""
    kind = _kind(t)
    return t.detach() if kind is None else kind.new(t.fake_mode)  # type: ignore[return-value]


def _new_mode() -> FakeTensorMode:
    with config.patch(fake_tensor_allow_unsafe_data_ptr_access=False):  # an address is an error, and not 0
        return FakeTensorMode(allow_non_fake_inputs=True)


def lazy(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """The graph as a module, whose code is written when somebody runs or reads it: most graphs are only rewritten."""
    return _LazyGraphModule(root, graph)


def written(module: fx.GraphModule) -> fx.GraphModule:
    """The same module, with its code: ``torch.compile`` does not wait for it."""
    _LazyGraphModule.force_recompile(module)
    return module


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Python's collector of garbage waits: of the many objects of graphs hardly one is garbage, and it would look at
    all of them, and at whatever else the process holds, again and again: a quarter of the time.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class _Kind(NamedTuple):
    """What the shapes of results follow from."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device

    def new(self, fake: FakeTensorMode) -> FakeTensor:
        with torch._C._DisableTorchDispatch():
            shape = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
            if self.offset:
                whole = torch.empty(self.offset + shape.untyped_storage().nbytes(), dtype=self.dtype, device="meta")
                shape = whole.as_strided(self.shape, self.stride, self.offset)
        return FakeTensor(fake, shape, self.device)


def _kind(t: Tensor) -> _Kind | None:
    """None for tensors of which it is not all that matters."""
    if (
        t.layout is not torch.strided
        or t.device.type == "meta"
        or t.is_complex()
        or t.is_quantized
        or t.is_neg()
        or t.is_nested
    ):
        return None
    return _Kind(tuple(t.shape), t.stride(), int(t.storage_offset()), t.dtype, t.device)


class _Known(NamedTuple):
    """What a tracer knows of a tensor: its node, and what stands for it in a key. A fake tensor carries it: if it were
    held elsewhere, PyTorch would make a copy of it here and there, for fear that somebody else sees it, too.
    """

    tracer: _Tracer
    node: fx.Node
    token: Any


class _Results(NamedTuple):
    """Of an operator: the kinds of its tensors, None where it returns none, and the type of several results."""

    kinds: list[int | None]
    several: type | None


class _Traits(NamedTuple):
    """What is to be known of an operator before it is called."""

    decomposed: Callable[..., Any] | None
    composite: bool  # has PyTorch itself a decomposition?
    writes: bool
    reads: bool  # does it return a number that depends on values?
    repeats: bool  # do the kinds of its results follow from those of its arguments?
    name: str


class _Tracer(TorchDispatchMode):
    def __init__(
        self, fake: FakeTensorMode, decompositions: Mapping[Any, Callable[..., Any]], functional: bool
    ) -> None:
        super().__init__()
        self._fake, self._decompositions, self._functional = fake, decompositions, functional
        self._graph, self._root = fx.Graph(), nn.Module()
        self._constants: dict[int, tuple[Tensor, _Known]] = {}
        self._traits: dict[Any, _Traits] = {}
        self._numbers: dict[_Kind, int] = {}
        self._kinds: list[tuple[_Kind, FakeTensor]] = []  # by number, with what nodes show
        self._results: dict[tuple, _Results] = {}

    def placeholder(self, argument: FakeTensor) -> None:
        self._note(argument, self._graph.placeholder(f"arg{len(self._graph.nodes)}_1"))

    def finish(self, results: Sequence[Any]) -> fx.GraphModule:
        self._graph.output(self._read(list(results), []))
        self._constants.clear()  # they know the tracer, too: a circle would keep the model until the next collection
        return lazy(self._root, self._graph)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if any(not issubclass(kind, FakeTensor) for kind in types):
            return NotImplemented  # a subclass that says itself what its operators do
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        traits = self._traits.get(func)
        if traits is None:
            traits = self._traits[func] = _traits(func, self._decompositions, self._functional)
        if traits.reads and not types:
            with unset_fake_temporarily():
                return func(*args, **kwargs)  # the value of a real tensor
        for replace in self._replacements(func, traits, args, kwargs):
            with self:
                out = replace(*args, **kwargs)
            if out is not NotImplemented:
                return out
        key: list[Any] = [func, torch.get_default_dtype()]
        read = tuple([self._read(arg, key) for arg in args])
        options = {name: self._read(value, key) for name, value in kwargs.items()}
        key += kwargs
        out = self._run(func, traits, args, kwargs, tuple(key) if traits.repeats else None)
        values = out if isinstance(out, (tuple, list)) else (out,)
        if traits.writes or any(isinstance(value, Tensor) for value in values):
            self._append(func, traits, read, options, out)
        return out

    @staticmethod
    def _replacements(func: Any, traits: _Traits, args: tuple, kwargs: dict) -> Iterator[Callable[..., Any]]:
        if traits.decomposed is not None:
            yield traits.decomposed
        if traits.composite and autograd_would_have_decomposed(func, pytree.tree_leaves((args, kwargs))):
            yield func.decompose  # where autograd, which does so, was switched off

    def _read(self, value: Any, key: list[Any]) -> Any:
        """The value as the graph has it; what it contributes to results is appended to the key."""
        if isinstance(value, Tensor):
            known = getattr(value, "_known", None) if type(value) is FakeTensor else None
            if known is None or known.tracer is not self:
                known = self._of_constant(value)
            key.append(known.token)
            return known.node
        if isinstance(value, (list, tuple)):
            key.append((type(value), len(value)))
            return type(value)([self._read(v, key) for v in value])
        key.append((type(value), value))
        return value

    def _of_constant(self, t: Tensor) -> _Known:
        """A tensor that the program did not make; it is held, so that its id stays its own."""
        if isinstance(t, FakeTensor) and id(t) not in self._constants:
            raise CaptureError(
                f"The function computes at {_source() or '(unknown source)'} with a tensor without values: made where "
                "recording could not see it, in another thread, or kept since an earlier one, in a dict or by "
                "functools.lru_cache. Compute in one thread; clear caches, and fill them by a call on tensors."
            )
        if id(t) not in self._constants:
            kind = "param" if isinstance(t, nn.Parameter) else "tensor"
            name = f"_{kind}_constant{len(self._constants)}"
            setattr(self._root, name, t)
            self._constants[id(t)] = t, self._known(t, self._graph.create_node("get_attr", name))
        return self._constants[id(t)][1]

    def _run(self, func: Any, traits: _Traits, args: tuple, kwargs: dict, key: tuple | None) -> Any:
        try:
            found = None if key is None else self._results.get(key)
        except TypeError:  # an argument without a hash
            found = key = None
        if found is not None:
            made = [None if number is None else self._kinds[number][0].new(self._fake) for number in found.kinds]
            return made[0] if found.several is None else found.several(made)
        out = func(*args, **kwargs)
        if key is not None:
            values = out if isinstance(out, (tuple, list)) else [out]
            kinds = [self._number(value) for value in values]
            given = {id(leaf) for leaf in pytree.tree_leaves((args, kwargs))}
            if all(
                value is None or (kind is not None and id(value) not in given)
                for kind, value in zip(kinds, values, strict=True)
            ):
                self._results[key] = _Results(kinds, None if values is not out else type(out))
        return out

    def _number(self, value: Any) -> int | None:
        """The number of a tensor's kind, unless its value may matter, too."""
        kind = _kind(value) if isinstance(value, Tensor) else None
        if kind is None or getattr(value, "constant", None) is not None:
            return None
        number = self._numbers.setdefault(kind, len(self._numbers))
        if number == len(self._kinds):
            self._kinds.append((kind, kind.new(self._fake)))
        return number

    def _note(self, t: Tensor, node: fx.Node) -> Any:
        """From now on the tensor is that node; what the node shows."""
        known = self._known(t, node)
        if isinstance(t, FakeTensor):
            t._known = known  # type: ignore[attr-defined]
        else:
            self._constants[id(t)] = t, known
        return node.meta["val"]

    def _known(self, t: Tensor, node: fx.Node) -> _Known:
        """A node shows a tensor of the kind."""
        number = self._number(t)
        if number is not None:
            node.meta["val"] = self._kinds[number][1]
        else:
            with self._fake:
                node.meta["val"] = (t if isinstance(t, FakeTensor) else self._fake.from_tensor(t)).detach()
        return _Known(self, node, object() if number is None else number)

    def _append(self, func: Any, traits: _Traits, args: tuple, kwargs: dict, out: Any) -> None:
        if func is aten.lift_fresh.default:
            func = aten.lift_fresh_copy.default  # the program may write into it, but not into the constant
        source = _source()

        def node(*what: Any) -> fx.Node:
            made = self._graph.create_node("call_function", *what)
            if source:
                made.stack_trace = source
            return made

        call = node(func, args, kwargs, traits.name)
        if isinstance(out, Tensor):
            self._note(out, call)
        elif isinstance(out, (tuple, list)):
            call.meta["val"] = type(out)(
                self._note(value, node(operator.getitem, (call, place), {}, "getitem"))
                if isinstance(value, Tensor) else value
                for place, value in enumerate(out)
            )  # fmt: skip


def _source() -> str | None:
    """The user's line that is recorded, where somebody notes it."""
    return fx.traceback.get_current_meta().get("stack_trace") if fx.traceback.has_preserved_node_meta() else None


def _traits(func: Any, decompositions: Mapping[Any, Callable[..., Any]], functional: bool) -> _Traits:
    schema, composite = func._schema, torch._C.DispatchKey.CompositeImplicitAutograd
    aliases = any(value.alias_info is not None for value in schema.returns)
    reads = torch.Tag.data_dependent_output in func.tags
    depends = reads or torch.Tag.dynamic_output_shape in func.tags
    return _Traits(
        decompositions.get(func),
        torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), composite),
        schema.is_mutable,
        reads,
        not (schema.is_mutable or depends or (aliases and not functional) or func in FakeTensorMode.lift_fns),
        func.overloadpacket.__name__,
    )


__all__ = ["lazy", "trace", "without_collector", "written"]
