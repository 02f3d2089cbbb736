"""A captured graph, interpreted with the interval rules.

Arguments are Intervals or points. ``program`` runs this while it traces: what the rules do with tensors is recorded,
and neither Intervals nor rules are left in the result.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from pyxai_bounds import rounding as rd
from pyxai_bounds.capture import source_of
from pyxai_bounds.errors import UnsupportedOperatorError
from pyxai_bounds.fuse import VIEWS
from pyxai_bounds.interval import Interval
from pyxai_bounds.parameters import ParameterBox
from pyxai_bounds.patterns import Part, norms
from pyxai_bounds.rules import RULES, UnsupportedArgumentsError, facts
from pyxai_bounds.rules.complex import Complex, is_complex
from pyxai_bounds.rules.complex import bounded as complex_bounded
from pyxai_bounds.rules.logic import eq
from pyxai_bounds.rules.reduce import normalised
from pyxai_bounds.rules.registry import (
    Indices,
    Rule,
    Truth,
    as_set,
    ends,
    evaluated,
    in_float64,
    narrow,
    outward,
    singleton,
    within,
)
from pyxai_bounds.rules.standardise import Standardised, centred, rooted, shaped, standardised_backward

aten = torch.ops.aten

_AT_POINTS = " (at points, where sound=True would bound its rounding: compute it outside, and use the tensor here)"

_IN_PARAMETRIZATION = re.compile(r"\(in (\S+\.)?parametrizations\.")
_PARAMETRIZED = (
    " (computes a parameter: torch.nn.utils.parametrize.remove_parametrizations(layer, name) keeps its value)"
)

_OTHER_POOL = " (differentiates a max pool's gradient forwards inside of vmap; use jacrev, or autograd.grad twice)"

SET = object()  # marks a result that is a set among results that are constants


class _Unknown:
    """The result of an operator that has no rule, so that the rest of the graph can still be checked."""


class Interpreter(fx.Interpreter):
    """Runs a captured graph on Intervals and points, collecting every operator that cannot be bounded."""

    joins_terms = True  # may a term of a sum stand for another one, which is then 0?

    def __init__(self, graph: fx.GraphModule, parameters: ParameterBox | None) -> None:
        super().__init__(graph, garbage_collect_values=False)  # ``_maxima`` reads earlier values
        self.parameters = parameters
        self.boxed = {} if parameters is None else {id(p): name for name, p in parameters.parameters().items()}
        self.used: set[int] = set()  # the ids of those that the graph reads
        self.extra_traceback = False  # our messages name the user's line themselves
        self.unsupported: list[tuple[str, str]] = []
        self.results: list[Any] = []  # the structure: SET, or a constant
        self.norms: dict[fx.Node, Part] = {}
        self.rooted: dict[fx.Node, Standardised] = {}

    def run(self, *args: Any, **options: Any) -> Any:
        self.norms = norms(self.graph) if facts.are_kept() else {}
        return super().run(*args, **options)

    def run_flat(self, flat: tuple[Tensor, ...], kinds: list[bool]) -> list[Tensor]:
        tensors = iter(flat)
        arguments = [Interval.of(next(tensors), next(tensors)) if is_set else next(tensors) for is_set in kinds]
        results = self.run(*arguments, enable_io_processing=False)
        if self.unsupported:
            raise UnsupportedOperatorError(list(dict.fromkeys(self.unsupported)))
        if self.boxed and not self.used:
            raise ValueError(
                f"The function uses none of the parameters in the box ({', '.join(self.boxed.values())}): build the "
                "box from the model that the function calls."
            )
        self.results = [SET if isinstance(r, (Interval, Tensor)) else r for r in results]
        sets = [_floating_point(r) for r in results if isinstance(r, (Interval, Tensor))]
        return [tensor for s in sets for tensor in (s.mid, s.rad)]

    def get_attr(self, target: Any, args: tuple, kwargs: dict) -> Any:
        value = super().get_attr(target, args, kwargs)
        if self.parameters is None or id(value) not in self.boxed:
            return value
        self.used.add(id(value))
        return self.parameters.interval(value)

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output":
            for result in n.all_input_nodes:
                if isinstance(self.env[result], Indices):
                    self._cannot_bound(result, " (its result is a place that differs within a set: return the values)")
                elif isinstance(self.env[result], Complex):
                    self._cannot_bound(result, " (its result is complex: return torch.view_as_real of it)")
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.target in _POOL_GRADIENTS and isinstance(args[-1], Indices):
            pooled = self._pooled(n)
            if pooled is None:
                return self._cannot_bound(n, _OTHER_POOL)
            args = (args[0], pooled, *args[2:])
        if n.target is aten.div.Tensor and isinstance(args[0], Interval) and rd.mode() != rd.Rounding.EVALUATED:
            unit = _normalised(n, args[0])
            if unit is not None:
                return unit
        if n in self.norms:
            part = self._of_norm(self.norms[n])
            if part is not None:
                return part
        if n.target is aten._to_copy.default and isinstance(args[0], Interval) and self._is_place(n):
            return _at_point(n.target, fx.map_arg(n.args, self._at_constants({})), kwargs)
        if n.target is operator.getitem:
            return args[0] if isinstance(args[0], _Unknown) else args[0][args[1]]
        rule = RULES.get(n.target)  # type: ignore[call-overload]
        leaves = pytree.tree_leaves((args, kwargs))
        if any(isinstance(leaf, _Unknown) for leaf in leaves):
            return _Unknown() if rule is not None else self._cannot_bound(n, "")
        if any(map(is_complex, leaves)) or _is_complex(n):
            return self._complex(n, args, kwargs, leaves)
        if rule is not None and not rule.takes_sets(args, kwargs):
            args, kwargs = pytree.tree_map_only(Interval, lambda x: x.mid, (args, kwargs))
            leaves = pytree.tree_leaves((args, kwargs))
        if not any(isinstance(leaf, Interval) for leaf in leaves):
            if not outward() or _is_exact(n, rule, args, kwargs):
                return _at_point(n.target, args, kwargs)
            if rule is None:
                return self._cannot_bound(n, _AT_POINTS)
            args = _enclosed(rule, args)
        elif rule is None:
            return self._cannot_bound(n, "")
        try:
            result = applied(rule, n, args, kwargs)
            maxima = self._maxima(n, result)
            return facts.carried(n.target, args, kwargs, result) if maxima is None else maxima
        except UnsupportedArgumentsError as reason:
            return self._cannot_bound(n, f" ({reason})")

    def _of_norm(self, part: Part) -> Interval | None:
        """A node of a norm, with the bounds of the norm as a whole; None where the node's own rule must do."""
        x = self.env[part.x]
        grad: Any = self.env[part.grad] if part.grad is not None else None
        if not isinstance(x, Interval) or isinstance(grad, _Unknown) or (grad is not None and not self.joins_terms):
            return None
        if part.role == "rest":
            return singleton(torch.zeros_like(x.mid))
        outer, inner = x.shape[: -part.dims], x.shape[-part.dims :]

        def rows(t: Any) -> Interval:
            return shaped(as_set(in_float64(t) if outward() else t), [math.prod(outer), math.prod(inner)])

        if part.role == "centred":
            return narrow(shaped(centred(rows(x)), x.shape), x.dtype)
        if part.inverse not in self.rooted:
            self.rooted[part.inverse] = rooted(rows(x), part.eps)
        out, _, inverse = self.rooted[part.inverse]
        if part.role == "inverse":
            return narrow(shaped(inverse, [*outer, *[1] * part.dims]), x.dtype)
        if part.role == "gradient":
            out = standardised_backward(rows(grad), out, inverse, contracts=True, centred=False)
        return narrow(shaped(out, x.shape), x.dtype)

    def _complex(self, n: fx.Node, args: tuple, kwargs: dict, leaves: list[Any]) -> Any:
        """The result of an operator that takes or makes complex numbers."""
        rule = RULES.get(n.target)  # type: ignore[call-overload]
        moves = n.target in _MOVING or (rule is not None and rule.precision == "exact")
        if not any(isinstance(leaf, Interval) for leaf in leaves) and (
            not outward() or moves or not any(isinstance(leaf, Tensor) for leaf in leaves)
        ):
            return _at_point(n.target, args, kwargs)
        value = n.meta["val"]
        dtype = (value[0] if isinstance(value, (list, tuple)) else value).dtype
        try:
            return complex_bounded(n.target, args, kwargs, dtype)  # type: ignore[arg-type]
        except UnsupportedArgumentsError as reason:
            return self._cannot_bound(n, f" ({reason})")

    def _pooled(self, n: fx.Node) -> Any:
        """The input of the max pool whose gradient a node computes; None if it cannot be found.

        The operator itself reads the places of the maxima alone. Where PyTorch differentiates it forwards, its argument
        is a tangent instead of the pool's input.
        """
        (given, _), (found, in_order) = _origin(n.args[1]), _origin(n.args[-1])
        pool = found.args[0] if found.target is operator.getitem else None
        if not isinstance(pool, fx.Node) or pool.target not in _POOLS:
            return None
        if given is _origin(pool.args[0])[0]:
            return self.env[n.args[1]]  # type: ignore[index]
        shape = n.args[1].meta["val"].shape  # type: ignore[union-attr]
        x = self.env[pool.args[0]]  # type: ignore[index]
        if not in_order or shape.numel() != x.shape.numel():
            return None
        return Interval.of(x.mid.reshape(shape), x.rad.reshape(shape))

    def _is_place(self, n: fx.Node) -> bool:
        """Is it an integer or a truth value that is computed from shapes and numbers alone, as relative positions are?

        Then PyTorch's value is part of the program, rounding included, and needs no bounds.
        """
        if n.meta["val"].is_floating_point():
            return False
        seen, pending = set(), [n]
        while pending:
            node = pending.pop()
            if node.op in ("placeholder", "get_attr"):
                value = self.env[node]
                number = isinstance(value, Tensor) and value.dim() == 0 and not isinstance(value, torch.nn.Parameter)
                if not isinstance(value, Tensor) or (
                    value.is_floating_point() and not (number and node.op == "get_attr")
                ):
                    return False
            pending += [before for before in node.all_input_nodes if before not in seen]
            seen.update(node.all_input_nodes)
        return True

    def _at_constants(self, known: dict[fx.Node, Any]) -> Callable[[fx.Node], Any]:
        """A function that returns what PyTorch computes for a node at points; ``known`` holds what it has computed."""

        def value(n: fx.Node) -> Any:
            if not any(isinstance(leaf, Interval) for leaf in pytree.tree_leaves(self.env[n])):
                return self.env[n]
            if n not in known:
                args: Any = fx.map_arg(n.args, value)
                kwargs: Any = fx.map_arg(n.kwargs, value)
                known[n] = _at_point(n.target, args, kwargs)
            return known[n]

        return value

    def _maxima(self, n: fx.Node, result: Any) -> Interval | None:
        """Tighter bounds for "which elements equal the maximum" and their number, if the node computes one of these.

        Derivatives of maxima are divided among the maxima, of which there is at least one, if the maximum is finite.
        """
        if n.target is aten.scatter_add.default or n.target is aten.eq.Tensor:
            scattered = self._scattered_maxima(n, result)
            if scattered is not None:
                return scattered
        equal = n.args[0] if n.target in _SUMS else n
        if equal is not n and isinstance(equal, fx.Node) and equal.target is aten.logical_or.default:
            equal = equal.args[0]
        if not isinstance(equal, fx.Node) or equal.target is not aten.eq.Tensor:
            return None
        for x, shown in (equal.args[:2], equal.args[1::-1]):
            extremum = shown
            while isinstance(extremum, fx.Node) and extremum.target in (aten.unsqueeze.default, aten.view.default):
                extremum = extremum.args[0]
            if not isinstance(extremum, fx.Node) or extremum.target not in _EXTREMA or extremum.args[0] is not x:
                continue
            assert isinstance(x, fx.Node) and isinstance(shown, fx.Node)
            value, rows = self.env[shown], self.env[x].shape
            dims = _dims(extremum, rows)
            joined = [1 if d in dims else size for d, size in enumerate(rows)]
            if not isinstance(value, Interval) or (value.shape and list(value.shape) != joined):
                continue
            if n is equal:
                candidates = (result.mid + result.rad > 0).sum(list(dims), keepdim=True)
                sure = (result.rad > 0) & (candidates == 1) & value.isfinite()
                return Truth.of(torch.where(sure, 1.0, result.mid), torch.where(sure, 0.0, result.rad))
            if _dims(n, rows) == dims and value.shape in (result.shape, ()):
                at_least = torch.where(value.isfinite(), 1.0, -torch.inf).to(result.dtype)
                return within(result, at_least, torch.full_like(at_least, torch.inf))
        return None

    def _scattered_maxima(self, n: fx.Node, result: Any) -> Interval | None:
        """The same for ``scatter_reduce``, which takes a maximum for each place of its result."""
        counts = n.target is aten.scatter_add.default
        equal = _converted(n.args[3]) if counts else n
        reduced = _scattered(equal)
        if reduced is None or equal.args[0] is not reduced.args[3]:
            return None
        held, dim, places, *_ = cast(Any, reduced.args)
        index, value = self.env[places], self.env[reduced]
        if not isinstance(value, Interval) or isinstance(index, Interval) or not isinstance(result, Interval):
            return None
        if counts:
            own = _converted(n.args[0])
            if n.args[1:3] != (dim, places) or own.target is not aten.eq.Tensor or own.args != (held, reduced):
                return None
            at_least = torch.where(value.isfinite(), 1.0, -torch.inf).to(result.dtype)
            return within(result, at_least, torch.full_like(at_least, torch.inf))
        _, may_be_held = ends(eq(self.env[held], value))
        may = result.mid + result.rad > 0
        candidates = (may_be_held > 0).long().scatter_add(dim, index, may.long()).gather(dim, index)
        sure = (result.rad > 0) & (candidates == 1) & value.isfinite().gather(dim, index)
        return Truth.of(torch.where(sure, 1.0, result.mid), torch.where(sure, 0.0, result.rad))

    def _cannot_bound(self, node: fx.Node, reason: str) -> _Unknown:
        name = node.target.name() if isinstance(node.target, torch._ops.OpOverload) else str(node.target)
        source = source_of(node)
        reason = reason or _WHY.get(node.target, "") or (_PARAMETRIZED if _IN_PARAMETRIZATION.search(source) else "")
        self.unsupported.append((name + reason, source))
        return _Unknown()


_WHY: dict[Any, str] = {
    torch.ops.pyxai_bounds.check_target.default: " (the target is computed from the box: compute it outside)",
}


def applied(rule: Rule, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """The rule's result in the node's dtypes; where bounds are proofs, computed in float64 if the rule asks for it."""
    if not outward():
        return rule.function(*args, **kwargs)
    leaves = pytree.tree_leaves((args, kwargs))
    moves = rule.precision == "exact" and _holds_numbers(node.target, args, kwargs)
    if rule.precision == "wide" or (rule.precision == "exact" and not moves):
        kept = rule.shape_only
        args = tuple(pytree.tree_map(_empty_in_float64 if i in kept else in_float64, a) for i, a in enumerate(args))
        kwargs = {
            k: torch.float64 if isinstance(v, torch.dtype) and v.is_floating_point else v for k, v in kwargs.items()
        }
    result = rule.function(*args, **kwargs)
    if moves:
        return result
    given = next((x.dtype for x in leaves if isinstance(x, Interval) and not isinstance(x, Indices)), torch.float64)
    if isinstance(result, Truth):
        return narrow(result, given)
    results = list(result) if isinstance(result, (tuple, list)) else [result]
    values = node.meta["val"] if isinstance(result, (tuple, list)) else [node.meta["val"]]
    for i, (part, value) in enumerate(zip(results, values, strict=True)):
        if isinstance(part, Interval) and not isinstance(part, Indices):
            dtype = value.dtype if value.dtype.is_floating_point else given  # truth values are counted by integers
            results[i] = narrow(evaluated(part, 1 if rule.precision == "exact" else rule.ulps), dtype)
    return results if isinstance(result, (tuple, list)) else results[0]


def _empty_in_float64(x: Any) -> Any:
    """Of an argument of which the shape alone is used: that shape, in the dtype of the others."""
    like = x.mid if isinstance(x, Interval) and not isinstance(x, Indices) else x
    return torch.empty_like(like, dtype=torch.float64) if isinstance(like, Tensor) and like.is_floating_point() else x


def _holds_numbers(op: Any, args: tuple, kwargs: dict) -> bool:
    """Can an operator that moves or compares numbers hold all that it is given? Python numbers, integers, and float64
    tensors without dimensions, are rounded to the dtype of the others.
    """
    given = {a.name: v for a, v in zip(op._schema.arguments, args, strict=False)} | kwargs
    whole = {a.name for a in op._schema.arguments if "number" in str(a.type)}  # others are sizes and places
    numbers = [v for name, v in given.items() if isinstance(v, float) or (name in whole and isinstance(v, int))]
    moved = [leaf for name, v in given.items() if name not in _PLACES for leaf in pytree.tree_leaves(v)]
    tensors = [x for x in moved if isinstance(x, (Interval, Tensor)) and not isinstance(x, Indices)]
    dtypes = {x.dtype for x in tensors if x.dtype != torch.bool}
    floating = {dtype for dtype in dtypes if dtype.is_floating_point}
    return (len(dtypes) < 2 or not floating) and all(rd.stored(x, dtype)[1] == 0 for x in numbers for dtype in floating)


_PLACES = ("index", "indices")  # the arguments that say where numbers stand

_SUMS = frozenset((aten.sum.default, aten.sum.dim_IntList))
_EXTREMA = frozenset(
    (aten.amax.default, aten.amin.default, aten.max.default, aten.min.default, aten.median.default,
     aten.nanmedian.default)
)  # fmt: skip

_POOLS = (
    aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default, aten.adaptive_max_pool2d.default,
    aten.adaptive_max_pool3d.default,
)  # fmt: skip
_POOL_GRADIENTS = frozenset(
    (aten.max_pool2d_with_indices_backward.default, aten.max_pool3d_with_indices_backward.default,
     aten.adaptive_max_pool2d_backward.default, aten.adaptive_max_pool3d_backward.default)
)  # fmt: skip
_IN_ORDER = frozenset(
    (*VIEWS, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
     aten.clone.default)
)  # fmt: skip

# Operators without a rule that return numbers they are given, or numbers that a program may call constants.
_MOVING = frozenset(
    (aten.detach.default, aten.alias.default, aten.clone.default, aten.lift_fresh_copy.default, aten.sort.default,
     aten.topk.default, aten.nan_to_num.default,
     aten.view_as_real.default, aten.view_as_complex.default, aten._conj.default, aten._conj_physical.default,
     aten.complex.default)
)  # fmt: skip


def _is_exact(node: fx.Node, rule: Rule | None, args: tuple, kwargs: dict) -> bool:
    """Are results for points exact: moved or selected numbers, truth values, integers, constants?"""
    if node.target in _MOVING:
        return True
    if rule is not None and rule.precision == "exact":
        # What a program writes into a tensor of its own is a constant, which holds what its dtype can.
        return bool(rule.shape_only) or _holds_numbers(node.target, args, kwargs)
    values = node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else [node.meta["val"]]
    if not any(isinstance(v, Tensor) and v.is_floating_point() for v in values):
        return True
    leaves = pytree.tree_leaves((args, kwargs))
    return rule is None and not any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves)


def _is_complex(node: fx.Node) -> bool:
    values = node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else [node.meta["val"]]
    return any(isinstance(v, Tensor) and v.is_complex() for v in values)


def _normalised(n: fx.Node, x: Interval) -> Interval | None:
    """Rows divided by their own norm or a little more: F.normalize, and g / (g.norm(dim=1, keepdim=True) + 1e-8)."""
    divisor: Any = n.args[1]
    while isinstance(divisor, fx.Node) and divisor.target is aten.expand.default:
        divisor = divisor.args[0]
    if not isinstance(divisor, fx.Node) or divisor.kwargs or len(divisor.args) != 2:
        return None
    norm, least = divisor.args
    if not isinstance(norm, fx.Node) or norm.target is not aten.linalg_vector_norm.default or norm.kwargs:
        return None
    of, ord, dim, kept = (*norm.args, *(None, 2, None, False)[len(norm.args) :])[:4]
    if of is not n.args[0] or ord != 2 or not kept or not isinstance(least, int | float) or least < 1e-100:
        return None
    limits = {aten.clamp_min.default: torch.clamp_min, aten.add.Tensor: torch.add, aten.add.Scalar: torch.add}
    limit = limits.get(divisor.target)  # type: ignore[call-overload]
    if limit is None:
        return None
    out = normalised(in_float64(x) if outward() else x, dim, lambda norm: limit(norm, least))
    return narrow(out, n.meta["val"].dtype) if outward() else out


def _scattered(equal: Any) -> fx.Node | None:
    """Of source == gather(scatter_reduce(…, source, 'amax' or 'amin')) at the same places the node of the extrema."""
    if not isinstance(equal, fx.Node) or equal.target is not aten.eq.Tensor:
        return None
    shown: Any = equal.args[1]
    if not isinstance(shown, fx.Node) or shown.target is not aten.gather.default:
        return None
    reduced: Any = shown.args[0]
    if reduced.target is not aten.scatter_reduce.two or reduced.args[4] not in ("amax", "amin"):
        return None
    return reduced if shown.args[1:3] == reduced.args[1:3] else None


def _converted(node: Any) -> Any:
    """The node before a conversion of its dtype, if there is one."""
    return node.args[0] if node.target is aten._to_copy.default else node


def _origin(node: Any) -> tuple[fx.Node, bool]:
    """The node that a chain of views shows, and whether all elements are still there, in their order."""
    in_order = True
    while node.target in _IN_ORDER or node.target in (aten.permute.default, aten.expand.default):
        moved = node.target is aten.permute.default and list(node.args[1]) != list(range(len(node.args[1])))
        in_order = in_order and not moved and node.target is not aten.expand.default
        node = node.args[0]
    return node, in_order


def _dims(node: fx.Node, shape: torch.Size) -> set[int]:
    """The dimensions that a reduction reduces: all, if it names none."""
    named: Any = node.args[1] if len(node.args) > 1 else None
    return {d % len(shape) for d in named} if named else set(range(len(shape)))


def _enclosed(rule: Rule, args: tuple) -> tuple:
    """The arguments with one point as a set, so that the rule runs and encloses the rounding of the operator."""
    first = args[rule.set_first]
    if not isinstance(first, Tensor):
        raise UnsupportedArgumentsError("rounds at a point: sound=True bounds that for tensors alone")
    point = singleton(first if first.is_floating_point() else first.double())
    return (*args[: rule.set_first], point, *args[rule.set_first + 1 :])


def _at_point(target: Any, args: tuple, kwargs: dict) -> Any:
    """The plain operator; ``view`` becomes ``reshape``, since the layout may not be the one it was captured with."""
    return (aten.reshape.default if target in VIEWS else target)(*args, **kwargs)


def _floating_point(result: Interval | Tensor) -> Interval:
    """A result as a set; a tensor that depends on no set is a point."""
    if isinstance(result, Interval):
        return result
    return Interval.of(result, torch.zeros_like(result))
