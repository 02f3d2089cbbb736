"""The table of rules, and what every rule may use: halves, hulls, products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._ops import OpOverload

from pyxai_bounds import ops
from pyxai_bounds.interval import Interval


class UnsupportedArgumentsError(NotImplementedError):
    """Raised by a rule for arguments that it cannot bound; the message completes 'this operator …'."""


@dataclass(frozen=True)
class Rule:
    function: Callable[..., Any]
    shape_only: frozenset[int]  # positions of arguments of which the result uses no value

    def takes_sets(self, args: tuple, kwargs: dict) -> bool:
        """Does the result depend on the value of any Interval argument? If not, a point stays a point."""
        used = [arg for i, arg in enumerate(args) if i not in self.shape_only]
        return any(isinstance(leaf, Interval) for leaf in pytree.tree_leaves((used, kwargs)))


RULES: dict[OpOverload, Rule] = {}


def rule(*operators: OpOverload, shape_only: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Register a function as the rule of the operators. ``shape_only`` names arguments whose value is unused."""

    def register(function: Callable) -> Callable:
        for op in operators:
            names = [argument.name for argument in op._schema.arguments]
            RULES[op] = Rule(function, frozenset(names.index(name) for name in shape_only if name in names))
        return function

    return register


Value = Tensor | Interval


class Truth(Interval):
    """A boolean that is true, false or either: [1, 1], [0, 0] or [0, 1], so that it can be multiplied and summed."""

    __slots__ = ()


class _Indices(Interval):
    """The places of a set's maxima, which have no single value: whatever is computed from them is refused."""

    __slots__ = ()

    @property
    def mid(self) -> Tensor:  # type: ignore[override]
        raise UnsupportedArgumentsError("uses indices that differ within a set")

    rad = mid


NO_VALUE = _Indices.__new__(_Indices)


def mid_of(x: Any) -> Any:
    """The midpoint of a set; anything else as it is."""
    return x.mid if isinstance(x, Interval) else x


def rad_of(x: Any) -> Any:
    """The radius of a set; zeros for a point."""
    return x.rad if isinstance(x, Interval) else torch.zeros_like(x)


def ends(x: Value) -> tuple[Tensor, Tensor]:
    """Lower and upper end points; of a point, the point twice."""
    return (x.mid - x.rad, x.mid + x.rad) if isinstance(x, Interval) else (x, x)


def between(lower: Tensor, upper: Tensor) -> Interval:
    """The set with these end points."""
    return Interval.of((lower + upper) * 0.5, (upper - lower) * 0.5)


def bilinear(product: Callable[[Tensor, Tensor], Tensor], a: Value, b: Value) -> Interval:
    """Any product that is linear in both arguments with non-negative coefficients (a matrix product, a convolution).

    A point factor gives the exact range: mid′ = a·mid, rad′ = |a|·rad. Two sets take Rump's midpoint-radius product
    |ma|·rb + ra·(|mb| + rb), at most 1.5 times too wide (Rump, BIT 39, 1999).
    """
    mid = product(mid_of(a), mid_of(b))
    if not isinstance(b, Interval):
        return Interval.of(mid, product(rad_of(a), b.abs()))
    rad = product(mid_of(a).abs(), b.rad)
    if isinstance(a, Interval):
        rad = rad + product(a.rad, b.mid.abs() + b.rad)
    return Interval.of(mid, rad)


def multiply(a: Any, b: Any) -> Interval:
    """Elementwise product with broadcasting; exact for two sets as for a set and a point or number."""
    if isinstance(a, Interval) and isinstance(b, Interval):
        parts = torch.broadcast_tensors(a.mid, a.rad, b.mid, b.rad)
        return Interval.of(*ops.interval_mul(*parts))
    if not isinstance(a, Interval):
        a, b = b, a
    if isinstance(b, Tensor) and b.dtype == torch.bool:
        return Interval.of(a.mid * b, a.rad * b)
    return Interval.of(a.mid * b, a.rad * abs(b))


def monotone(function: Callable[[Tensor], Tensor], x: Interval) -> Interval:
    """The range of a non-decreasing function."""
    lower, upper = ends(x)
    return between(function(lower), function(upper))


def range_of(
    function: Callable[[Tensor], Tensor], x: Interval, critical: Sequence[tuple[float, float]] = ()
) -> Interval:
    """The range of a function that is monotone between its critical points, given as (point, value) pairs.

    A function that jumps lists the point of the jump once with each one-sided limit. A set of one element takes
    the function's own value there.
    """
    lower, upper = ends(x)
    at_lower, at_upper = function(lower), function(upper)
    least, greatest = torch.minimum(at_lower, at_upper), torch.maximum(at_lower, at_upper)
    for point, value in critical:
        inside = (lower <= point) & (point <= upper) & (lower < upper)
        least = torch.where(inside, least.clamp(max=value), least)
        greatest = torch.where(inside, greatest.clamp(min=value), greatest)
    return between(least, greatest)


def positive_linear(*operators: OpOverload, shape_only: tuple[str, ...] = ()) -> None:
    """Register operators that are linear with non-negative coefficients in all their floating arguments together.

    Rearrangements, sums and averages are of this kind. The midpoints go through the operator, and so do the radii,
    where a point counts as zeros (an integer one too: it is promoted); indices, masks and numbers go through unchanged.
    """
    for op in operators:
        names = [argument.name for argument in op._schema.arguments]
        ignored = {names.index(name) for name in shape_only if name in names}
        ignored |= {i for i, name in enumerate(names) if name in ("index", "indices", "condition")}

        def apply(*args: Any, _op: OpOverload = op, _ignored: set[int] = ignored, **kwargs: Any) -> Any:
            def part(pick: Callable[[Any], Any]) -> Any:
                picked = [mid_of(a) if i in _ignored else pytree.tree_map(pick, a) for i, a in enumerate(args)]
                return _op(*picked, **kwargs)

            leaves = pytree.tree_leaves(args)
            mids, rads = part(mid_of), part(_radius_part)
            kind = Interval
            if any(isinstance(leaf, Truth) for leaf in leaves):
                # Rearranged truth values are truth values; summed ones are numbers.
                plain = pytree.tree_leaves(part(lambda a: a.mid > 0 if isinstance(a, Truth) else mid_of(a)))
                kind = Truth if plain[0].dtype == torch.bool else Interval
            if isinstance(mids, Tensor):
                return kind.of(mids, rads)
            return [kind.of(mid, rad) for mid, rad in zip(mids, rads, strict=True)]

        rule(op, shape_only=shape_only)(apply)


def _radius_part(x: Any) -> Any:
    return rad_of(x) if isinstance(x, Interval | Tensor) else x
