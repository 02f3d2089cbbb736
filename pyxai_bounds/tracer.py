"""Tracing: runs a function on fake tensors and records its operators as a graph, for ``capture``.

``make_fx`` does the same for more kinds of tensors and numbers, but takes several times as long: it asks PyTorch for
the shape of every result anew. Layers repeat, so this tracer remembers the results for arguments of the same kind.
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
    """The graph of ``program(*tensors)``, with a placeholder for each tensor. Fake tensors keep their mode.

    Real tensors that the program uses become ``get_attr`` nodes. In-place operators and unused nodes stay.
    ``meta["val"]`` is the node's fake tensor, or several; nodes share them, so they must not be changed.
    An operator in ``decompositions`` is replaced by what its function does, unless that returns NotImplemented.
    functional: the program writes into no view, so views in the trace need not share memory.
    """
    fake = next((t.fake_mode for t in tensors if isinstance(t, FakeTensor)), None) or _new_mode()
    arguments = [_another(t) if isinstance(t, FakeTensor) else fake.from_tensor(t) for t in tensors]
    tracer = _Tracer(fake, decompositions, functional)
    for argument in arguments:
        tracer.placeholder(argument)
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # or it would keep fake copies of parameters after the trace
    try:
        with fake, tracer:
            results = program(*arguments)
    finally:
        torch.set_autocast_cache_enabled(cached)
    return tracer.finish(results)


def _another(t: FakeTensor) -> FakeTensor:
    """A new fake tensor of the same kind: nodes share fake tensors, but each argument must be one of its own."""
    kind = _kind(t)
    return t.detach() if kind is None else kind.new(t.fake_mode)  # type: ignore[return-value]


def _new_mode() -> FakeTensorMode:
    with config.patch(fake_tensor_allow_unsafe_data_ptr_access=False):  # asking for an address must fail, not give 0
        return FakeTensorMode(allow_non_fake_inputs=True)


def lazy(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """The graph as a module that generates its code when it first runs: most graphs are only rewritten, never run."""
    return _LazyGraphModule(root, graph)


def written(module: fx.GraphModule) -> fx.GraphModule:
    """The same module with its code generated, which ``torch.compile`` needs."""
    _LazyGraphModule.force_recompile(module)
    return module


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Switch Python's garbage collector off inside the block.

    Building graphs makes many objects, hardly any of them garbage; scanning them again and again took a quarter of the
    time.
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
    """All of a tensor that the kinds of an operator's results depend on."""

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
    """None for a tensor that a _Kind does not describe completely."""
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
    """What a tracer knows of a tensor: its node, and what stands for it in a key.

    It is an attribute of the fake tensor. A table of fake tensors would hold references to them, and PyTorch copies
    tensors to which there are other references in some places where it would otherwise reuse them.
    """

    tracer: _Tracer
    node: fx.Node
    token: Any


class _Results(NamedTuple):
    """The results of an operator: the numbers of their kinds, None for no tensor; the type of sequence if several."""

    kinds: list[int | None]
    several: type | None


class _Traits(NamedTuple):
    """Properties of an operator."""

    decomposed: Callable[..., Any] | None
    composite: bool  # does PyTorch itself have a decomposition?
    writes: bool
    reads: bool  # does it return a number that depends on values?
    repeats: bool  # do the kinds of its arguments determine those of its results?
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
        self._constants.clear()  # they refer to the tracer: such a cycle would keep the model alive for a while
        return lazy(self._root, self._graph)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if any(not issubclass(kind, FakeTensor) for kind in types):
            return NotImplemented  # another subclass, which implements its operators itself
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
            yield func.decompose  # autograd would have done it if it were on

    def _read(self, value: Any, key: list[Any]) -> Any:
        """An argument as the graph refers to it; what results depend on in it is appended to the key."""
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
        """A tensor that the program did not make. It is kept alive, so that its id stays unique."""
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
        """The number of a tensor's kind; None if the kind does not say all, or the value may matter as well."""
        kind = _kind(value) if isinstance(value, Tensor) else None
        if kind is None or getattr(value, "constant", None) is not None:
            return None
        number = self._numbers.setdefault(kind, len(self._numbers))
        if number == len(self._kinds):
            self._kinds.append((kind, kind.new(self._fake)))
        return number

    def _note(self, t: Tensor, node: fx.Node) -> Any:
        """Let the node stand for the tensor from now on; returns the fake tensor that the node shows."""
        known = self._known(t, node)
        if isinstance(t, FakeTensor):
            t._known = known  # type: ignore[attr-defined]
        else:
            self._constants[id(t)] = t, known
        return node.meta["val"]

    def _known(self, t: Tensor, node: fx.Node) -> _Known:
        """The record of a tensor and its node, which gets a fake tensor of the same kind to show."""
        number = self._number(t)
        if number is not None:
            node.meta["val"] = self._kinds[number][1]
        else:
            with self._fake:
                node.meta["val"] = (t if isinstance(t, FakeTensor) else self._fake.from_tensor(t)).detach()
        return _Known(self, node, object() if number is None else number)

    def _append(self, func: Any, traits: _Traits, args: tuple, kwargs: dict, out: Any) -> None:
        if func is aten.lift_fresh.default:
            func = aten.lift_fresh_copy.default  # the program may write into its result, but not into the constant
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
    """The user's line that ``capture`` has noted for the current operator, if it notes them."""
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
