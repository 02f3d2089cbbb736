"""The table of rules, and what every rule may use: halves, hulls, products.

A rule is written once for all modes of rounding. Rounded to nearest, it works in the dtype of its arguments. Rounded
outward, most rules are *wide*: their arguments are converted to float64, which is exact, what they compute there is
stepped outward by far more than float64 arithmetic loses, and the result is rounded outward to the dtype it should
have. So for float32 the margins cost nothing. The hot operators keep their dtype and prove their own rounding.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._ops import OpOverload

from pyxai_bounds import ops
from pyxai_bounds import rounding as rd
from pyxai_bounds.interval import Interval
from pyxai_bounds.ops.smooth import extremes
from pyxai_bounds.rules import facts


class UnsupportedArgumentsError(NotImplementedError):
    """Raised by a rule for arguments that it cannot bound; the message completes 'this operator …'."""


Precision = Literal["exact", "own", "wide"]


@dataclass(frozen=True)
class Rule:
    """How to bound one operator.

    precision: what the rule needs where bounds are proofs. "exact": it only moves, negates or selects numbers, so
    that a point stays a point; "own": it keeps its arguments' dtype and covers its rounding itself; "wide": see above.
    ulps: how much more float32 arithmetic may lose than the rule covers already, in units of u·|result|; None if
    nothing is known, so that ``semantics="float32"`` is refused.
    """

    function: Callable[..., Any]
    shape_only: frozenset[int]  # positions of arguments of which the result uses no value
    precision: Precision = "wide"
    ulps: float | None = None
    set_first: int = 0  # the argument that becomes a set where only points come in, and the operator rounds

    def takes_sets(self, args: tuple, kwargs: dict) -> bool:
        """Does the result depend on the value of any Interval argument? If not, a point stays a point."""
        used = [arg for i, arg in enumerate(args) if i not in self.shape_only]
        return any(isinstance(leaf, Interval) for leaf in pytree.tree_leaves((used, kwargs)))


RULES: dict[OpOverload, Rule] = {}


def rule(
    *operators: OpOverload,
    shape_only: tuple[str, ...] = (),
    precision: Precision = "wide",
    ulps: float | None = None,
    set_first: str | None = None,
) -> Callable[[Callable], Callable]:
    """Register a function as the rule of the operators; see :class:`Rule`. Arguments are named as in their schemas."""

    def register(function: Callable) -> Callable:
        for op in operators:
            names = [argument.name for argument in op._schema.arguments]
            ignored = frozenset(names.index(name) for name in shape_only if name in names)
            first = names.index(set_first) if set_first else next((i for i in range(len(names)) if i not in ignored), 0)
            RULES[op] = Rule(function, ignored, precision, 0.0 if precision == "exact" else ulps, first)
        return function

    return register


Value = Tensor | Interval


class Truth(Interval):
    """A boolean that is true, false or either: [1, 1], [0, 0] or [0, 1], so that it can be multiplied and summed."""

    __slots__ = ()


@dataclass(frozen=True)
class Ranks:
    """Which elements of rows stand at which places of them in sorted order; a maximum is the one that stands first.

    chosen: makes (must, may), [..., elements, places] with ``dim`` moved to the end, of the rows in ``found``;
    kept: have the indices the dimension too? values: what stands at these places, with the dimension.
    """

    found: Interval
    dim: int
    kept: bool
    chosen: Callable[[], tuple[Tensor, Tensor]]
    values: Callable[[], Interval]


class Indices(Interval):
    """The places of a set's maxima, which have no single value: what is computed from them is refused, but for rules
    that know what to make of the set in which they were found.
    """

    __slots__ = ("_windows", "expanded", "ranks", "viewed")

    ranks: Ranks | None
    viewed: list[int] | None  # the shape in which a pool's places are seen, where that is another one than it gave them
    expanded: list[int] | None  # to which they are repeated after that
    why = "uses indices that differ within a set"

    def __init__(
        self,
        *,
        windows: tuple[Interval, Callable[[], Any]] | None = None,
        ranks: Ranks | None = None,
        viewed: list[int] | None = None,
        expanded: list[int] | None = None,
    ) -> None:
        self._windows, self.ranks, self.viewed, self.expanded = windows, ranks, viewed, expanded
        self.facts = self.state = None

    def windows(self) -> tuple[Interval, Any]:
        """The set in which a pool found these places, and its windows."""
        if self._windows is None:
            raise UnsupportedArgumentsError(self.why)
        x, places = self._windows
        return x, places()

    def reshaped(self, op: OpOverload, *args: Any) -> Indices:
        """The same places with a dimension more or less, where that is known to be the one along which they lie."""
        if self._windows is not None and self.expanded is None:
            if op in _RESHAPES:
                return Indices(windows=self._windows, viewed=list(args[0]))
            if op is torch.ops.aten.expand.default and self.viewed is not None:
                return Indices(windows=self._windows, viewed=self.viewed, expanded=list(args[0]))
        if (
            self._windows is not None
            and self.viewed is None
            and op in (torch.ops.aten.unsqueeze.default, torch.ops.aten.squeeze.dim)
        ):
            return self
        if self.ranks is not None:
            rows = self.ranks.found.shape
            whole = [1 if d == self.ranks.dim else n for d, n in enumerate(rows)]
            unsqueezed = op is torch.ops.aten.unsqueeze.default and args[0] % len(rows) == self.ranks.dim
            if (unsqueezed and not self.ranks.kept) or (op in _RESHAPES and list(args[0]) == whole):
                return Indices(ranks=replace(self.ranks, kept=True))
            squeezed = op is torch.ops.aten.squeeze.dim and args[0] % len(rows) == self.ranks.dim
            if squeezed and self.ranks.kept and self.ranks.values().shape[self.ranks.dim] == 1:
                return Indices(ranks=replace(self.ranks, kept=False))
        if op in _MOVES:
            return Indices()  # a pool's gradient under vmap needs no more than the set itself
        raise UnsupportedArgumentsError(self.why)

    @property
    def mid(self) -> Tensor:  # type: ignore[override]
        raise UnsupportedArgumentsError(self.why)

    rad = mid


_RESHAPES = (torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten._unsafe_view.default)
_MOVES = (
    *_RESHAPES,
    torch.ops.aten.expand.default,
    torch.ops.aten.permute.default,
    torch.ops.aten.unsqueeze.default,
    torch.ops.aten.squeeze.dim,
    torch.ops.aten.squeeze.dims,
)


def singleton(x: Tensor) -> Interval:
    """The set of one point, unchecked: rules run on tensors without values."""
    return Interval.of(x, torch.zeros_like(x))


def as_set(x: Value) -> Interval:
    """A point as the set of that point alone; a set as it is."""
    return x if isinstance(x, Interval) else singleton(x)


def mid_of(x: Any) -> Any:
    """The midpoint of a set; anything else as it is."""
    return x.mid if isinstance(x, Interval) else x


def rad_of(x: Any) -> Any:
    """The radius of a set; zeros for a point."""
    return x.rad if isinstance(x, Interval) else torch.zeros_like(x)


Product = Literal["rump", "exact"]
_product: contextvars.ContextVar[Product] = contextvars.ContextVar("pyxai_bounds_product", default="rump")


@contextlib.contextmanager
def use_product(kind: Product) -> Iterator[None]:
    """Bound products of two sets in this way inside the ``with`` block."""
    token = _product.set(kind)
    try:
        yield
    finally:
        _product.reset(token)


def exact_product() -> bool:
    """Are matrix products and convolutions of two sets to be exact?"""
    return _product.get() == "exact"


def outward() -> bool:
    """Are the bounds that are being built proofs?"""
    return rd.mode() != rd.Rounding.NEAREST


def ends(x: Any) -> tuple[Any, Any]:
    """Lower and upper end points; of a point, the point twice. Rounded outward they lie on or outside the set's."""
    if not isinstance(x, Interval):
        if x is None or isinstance(x, bool) or rd.mode() != rd.Rounding.EVALUATED:
            return x, x
        # A number in the program, or an integer, is one of the dtype when it runs.
        if not isinstance(x, Tensor):
            stored = float(torch.tensor(x, dtype=torch.float32, device="cpu"))
            return min(x, stored), max(x, stored)
        if x.is_floating_point() or x.dtype == torch.bool:
            return x, x
        held, exact = x.float().double(), x.double()
        return torch.minimum(exact, held), torch.maximum(exact, held)
    lower, upper = x.mid - x.rad, x.mid + x.rad
    if not outward():
        return lower, upper
    is_point = x.rad == 0
    return torch.where(is_point, x.mid, rd.down(lower)), torch.where(is_point, x.mid, rd.up(upper))


def between(lower: Tensor, upper: Tensor) -> Interval:
    """The set with these end points. Rounded outward, its radius covers the rounding of midpoint, radius and halves."""
    if not outward():
        return Interval.of((lower + upper) * 0.5, (upper - lower) * 0.5)
    # Halved first: the sum of two large ends would overflow, and two such sets would look equal.
    same = lower == upper
    mid, rad = lower * 0.5 + upper * 0.5, upper * 0.5 - lower * 0.5
    lost = mid.detach().abs() * (4 * rd.unit(mid.dtype))
    return Interval.of(torch.where(same, lower, mid), torch.where(same, 0.0, rd.up(rad + lost, underflows=True)))


def within(x: Interval, lower: Tensor, upper: Tensor) -> Interval:
    """The part of the set between two bounds of the same values; its midpoint stays where nothing is cut off."""
    least, greatest = ends(x)
    cut = (least < lower) | (greatest > upper)
    common = between(torch.maximum(least, lower), torch.minimum(greatest, upper))
    return Interval.of(torch.where(cut, common.mid, x.mid), torch.where(cut, common.rad.clamp(min=0), x.rad))


def filled(x: Interval, mask: Tensor, rad: float = 0.0) -> Interval:
    """The set; where the mask is true, 0 ± ``rad``."""
    return Interval.of(torch.where(mask, 0.0, x.mid), torch.where(mask, rad, x.rad))


def settle(mid: Tensor, rad: Tensor, roundings: int = 1) -> Interval:
    """A set whose midpoint was computed with so many roundings of its own size, and its radius with a few.

    Rounded outward, the radius covers them; 0 ± 0 stays a point, for a sum is exact where it is 0.
    """
    if not outward():
        return Interval.of(mid, rad)
    u = rd.unit(mid.dtype)
    return Interval.of(mid, (rad + mid.detach().abs() * (roundings * u)) * (1 + 16 * u))


def enclose(lower: Tensor, upper: Tensor, ulps: float, absolute: float = 0.0) -> Interval:
    """The set between two computed values, each off by at most ``ulps`` u of itself, ``absolute`` u, and underflow."""
    if outward():
        u = rd.unit(lower.dtype)
        lower = lower - (lower.detach().abs() * (ulps * u) + (absolute * u + 2 * rd.tiny(lower.dtype)))
        upper = upper + (upper.detach().abs() * (ulps * u) + (absolute * u + 2 * rd.tiny(upper.dtype)))
        lower, upper = rd.down(lower), rd.up(upper)
    return between(lower, upper)


def evaluated(x: Interval, ulps: float | Tensor | None, absolute: float | Tensor = 0.0) -> Interval:
    """The set, and what float32 arithmetic may make of its members: off by ``ulps`` u of themselves plus ``absolute``
    u.

    Only ``semantics="float32"`` asks for that; a rule for which nothing is known then refuses.
    """
    if rd.mode() != rd.Rounding.EVALUATED:
        return x
    if ulps is None:
        raise UnsupportedArgumentsError("has no bound on what float32 arithmetic makes of it; use semantics='real'")
    if not isinstance(ulps, Tensor) and not isinstance(absolute, Tensor) and ulps == absolute == 0:
        return x
    u = rd.unit(torch.float32)
    reach = x.mid.detach().abs() + x.rad.detach()
    some = reach != 0
    spread = reach * (ulps * u) + some.to(x.dtype) * (absolute * u + 2 * rd.tiny(torch.float32))
    return settle(x.mid, x.rad + spread, 0)


def linear_map(function: Callable[[Tensor], Tensor], x: Interval, terms: int) -> Interval:
    """The image under a linear map with non-negative coefficients, each element a sum of at most ``terms`` terms.

    The coefficients may be rounded themselves (a mean's 1/n), which counts as one more rounding.
    """
    if not outward():
        return Interval.of(function(x.mid), function(x.rad))
    return Interval.of(function(x.mid), function(rd.widen(x.mid, x.rad, rd.errors(terms, x.dtype))))


def total(x: Interval, dims: Sequence[int], keepdim: bool = False) -> Interval:
    """The sum over dimensions."""
    return linear_map(lambda t: t.sum(list(dims), keepdim), x, math.prod(x.shape[d] for d in dims))


def bilinear(product: Callable[[Tensor, Tensor], Tensor], a: Value, b: Value, terms: int) -> Interval:
    """Any product that is linear in both arguments with non-negative coefficients (a matrix product, a convolution),
    each element a sum of at most ``terms`` products.

    A point factor gives the exact range: mid′ = a·mid, rad′ = |a|·rad. Two sets take Rump's midpoint-radius product
    |ma|·rb + ra·(|mb| + rb), at most 1.5 times too wide (Rump, BIT 39, 1999). Rounded outward, the radius that is
    multiplied is widened by what the midpoints' product loses.
    """
    mid = product(mid_of(a), mid_of(b))
    if not outward():
        if not isinstance(b, Interval):
            return Interval.of(mid, product(rad_of(a), b.abs()))
        rad = product(mid_of(a).abs(), b.rad)
        if isinstance(a, Interval):
            rad = rad + product(a.rad, b.mid.abs() + b.rad)
        return Interval.of(mid, rad)
    lost = rd.errors(terms, mid.dtype)
    if not isinstance(b, Interval):
        return Interval.of(
            mid, product(rd.widen(mid_of(a), a.rad if isinstance(a, Interval) else None, lost), rd.magnitude(b, lost))
        )
    rad = product(rd.magnitude(mid_of(a), lost), rd.widen(b.mid, b.rad, lost))
    if isinstance(a, Interval):
        spread = rd.widen(torch.zeros_like(a.rad), a.rad, lost)
        rad = rd.up(rad + product(spread, rd.magnitude(rd.up(b.mid.abs() + b.rad), lost)))
    return Interval.of(mid, rad)


def exact_bilinear(
    exact: Callable[..., tuple[Tensor, Tensor]],
    product: Callable[[Tensor, Tensor], Tensor],
    a: Interval,
    b: Interval,
    terms: int,
) -> Interval:
    """The sum of the exact ranges of all products: ``exact(a.mid, a.rad, b.mid, b.rad)``; ``product`` is the plain one.

    Rounded outward: midpoint and radius together are off by γ of 2·terms roundings times (|a| + ra)·(|b| + rb), as
    ``ops.reference.interval_matmul`` shows, and by underflow; what float32 loses on any members is of that size too.
    """
    mid, rad = exact(a.mid, a.rad, b.mid, b.rad)
    if not outward():
        return Interval.of(mid, rad)
    lost = rd.errors(2 * terms + 2, mid.dtype)
    reach = product(*(rd.magnitude(rd.up(x.mid.abs() + x.rad), lost) for x in (a, b)))
    spread = reach * (lost.of_mid * (1 + 16 * rd.unit(mid.dtype))) + (reach != 0).to(mid.dtype) * (
        terms * lost.floor**2
    )
    return Interval.of(mid, rd.up(rad + spread))


def multiply(a: Any, b: Any) -> Interval:
    """Elementwise product with broadcasting; exact for two sets as for a set and a point or number.

    Rounded outward, a product with a point loses one rounding, and underflow where neither factor is 0.
    """
    if isinstance(a, Interval) and isinstance(b, Interval):
        if a.dtype != b.dtype:
            a, b = (narrow(x, torch.result_type(a.mid, b.mid)) for x in (a, b))
        parts = torch.broadcast_tensors(a.mid, a.rad, b.mid, b.rad)
        return Interval.of(*ops.interval_mul(*parts, int(rd.mode())))
    if not isinstance(a, Interval):
        a, b = b, a
    if isinstance(b, Tensor) and b.dtype == torch.bool:
        return Interval.of(a.mid * b, a.rad * b)
    if not isinstance(b, Tensor) and abs(b) == 1:
        return Interval.of(a.mid * b, a.rad * 1)
    if outward() and not isinstance(b, Tensor) and not _is_normal(b, a.dtype):
        return multiply(a, number(b, a.mid))
    if outward() and isinstance(b, Tensor) and b.is_floating_point():
        # PyTorch rounds a float64 factor without dimensions to float32, where it may be subnormal.
        dtype = torch.result_type(a.mid, b)
        if dtype != torch.promote_types(a.dtype, b.dtype):
            return multiply(narrow(a, dtype), narrow(singleton(b), dtype))
    product = settle(a.mid * b, a.rad * abs(b), 2)  # a number is rounded to the dtype first
    if not outward():
        return product
    some = ((a.mid != 0) | (a.rad != 0)) & (b != 0)
    return evaluated(Interval.of(product.mid, product.rad + some.to(product.dtype) * (2 * rd.tiny(product.dtype))), 2)


def number(value: Any, like: Tensor) -> Interval:
    """A number of the program as a set of one element, in the dtype of ``like``."""
    held, moved = rd.stored(value, like.dtype)
    return Interval.of(like.new_full((), held), like.new_full((), moved))


def _is_normal(value: float, dtype: torch.dtype) -> bool:
    """Is the number 0, or rounded to the dtype by no more than its unit roundoff?"""
    info = torch.finfo(torch.float32 if rd.mode() == rd.Rounding.EVALUATED else dtype)
    return value == 0 or info.tiny <= abs(value) <= info.max or not math.isfinite(value)


def plus(a: Any, b: Any) -> Interval:
    """Elementwise sum with broadcasting. Rounded outward, it loses one rounding, and what its operands lose when they
    are converted to the dtype of the result: Python numbers, integers, and a float64 tensor without dimensions.
    A mask of −∞ loses nothing.
    """
    (a, a_rad), (b, b_rad) = _terms(a, b)
    out = _sum(a + b, a_rad, b_rad)
    if outward() and _may_be_masked(a, a_rad, b, b_rad):
        masked = _masks(a, a_rad, b, b_rad) | _masks(b, b_rad, a, a_rad)
        return Interval.of(out.mid, torch.where(masked, 0.0, out.rad))
    return out


def _may_be_masked(a: Any, a_rad: Any, b: Any, b_rad: Any) -> bool:
    """Masks are numbers, or small, or spread over what they are added to. Large sums of sets of one shape join branches
    of a network, where a look at every number would take longer than all of the rest.
    """
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a_rad is None or b_rad is None:
        return True
    return a.shape != b.shape or a.numel() <= _SMALL


_SMALL = 2**16


def _masks(a: Any, a_rad: Any, b: Any, b_rad: Any) -> Tensor:
    """Where is a the point −∞ or ∞, and b known not to be the other?"""
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    held = a.isinf() & (torch.as_tensor(0.0 if a_rad is None else a_rad) == 0)
    return held & ((b == a) | b.isfinite()) & torch.as_tensor(0.0 if b_rad is None else b_rad).isfinite()


def minus(a: Any, b: Any) -> Interval:
    """Elementwise difference; see :func:`plus`."""
    (a, a_rad), (b, b_rad) = _terms(a, b)
    return _sum(a - b, a_rad, b_rad)


def _sum(mid: Tensor, a_rad: Any, b_rad: Any) -> Interval:
    rad = a_rad if b_rad is None else b_rad if a_rad is None else a_rad + b_rad
    return evaluated(settle(mid, rad.expand_as(mid).to(mid.dtype)), 2)


def _terms(a: Any, b: Any) -> list[tuple[Any, Any]]:
    """Midpoint and radius, or None, of both terms of a sum, in the dtype of the sum where that may round."""
    dtype = torch.result_type(*(float(x) if isinstance(x, Fraction) else mid_of(x) for x in (a, b)))
    parts: list[tuple[Any, Any]] = []
    for x in (a, b):
        if outward() and isinstance(x, Tensor | Interval) and x.dtype not in (dtype, torch.bool):
            x = narrow(in_float64(x) if isinstance(x, Interval) else singleton(x.double()), dtype)
        if isinstance(x, Interval):
            parts.append((x.mid, x.rad))
        elif isinstance(x, Tensor) or not outward():
            parts.append((x, None))
        else:
            held, moved = rd.stored(x, dtype)
            parts.append((held, moved or None))
    return parts


def in_float64(x: Any) -> Any:
    """Floating tensors and sets converted to float64, which is exact; anything else as it is."""
    if isinstance(x, Interval):
        if isinstance(x, Indices):
            return x
        return x if x.dtype == torch.float64 else facts.kept(type(x).of(x.mid.double(), x.rad.double()), x)
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def narrow(x: Interval, dtype: torch.dtype) -> Interval:
    """The set in ``dtype``; its radius covers what the midpoint and the radius itself are rounded by."""
    if x.dtype == dtype:
        return x
    mid = x.mid.to(dtype)
    if torch.promote_types(x.dtype, dtype) == dtype or isinstance(x, Truth):
        return type(x).of(mid, x.rad.to(dtype))
    moved = (x.mid - mid.to(x.dtype)).detach().abs()  # exact, or off by a rounding where the two differ much
    return facts.moved(Interval.of(mid, rd.narrow_up(rd.up(x.rad + rd.up(moved)), dtype)), x)


def monotone(function: Callable[[Tensor], Tensor], x: Interval, *, ulps: float, absolute: float = 0.0) -> Interval:
    """The range of a non-decreasing function, computed to within ``ulps`` u of itself plus ``absolute`` u.

    0 is for functions that select, which do not round; the libraries' exp, log, tanh, … keep within 4.
    """
    lower, upper = ends(x)
    at_lower, at_upper = function(lower), function(upper)
    if ulps == absolute == 0:
        return between(at_lower, at_upper)
    return _zero_stays(enclose(at_lower, at_upper, ulps, absolute), x, at_lower)


def steep(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A root, whose slope at 0 is infinite: there it gets the slope 0. An end of a set that is 0 mostly does not move
    either, and the product of both would be NaN.
    """

    def apply(t: Tensor) -> Tensor:
        moves = t > 0
        return torch.where(moves, function(torch.where(moves, t, 1.0)), function(t.detach()))

    return apply


def increasing(op: OpOverload, *, ulps: float = 0) -> Callable[..., Interval]:
    """Register a non-decreasing operator, whose rule applies it to both ends; see :func:`monotone`. Its rule."""

    def apply(x: Interval, *args: Any) -> Interval:
        return monotone(lambda t: op(t, *args), x, ulps=ulps)

    return rule(op, precision="wide" if ulps else "exact", ulps=ulps)(apply)


def _zero_stays(out: Interval, x: Interval, value: Tensor) -> Interval:
    """Where x is the point 0, and 0 was computed there, the value is 0 and not the result of rounding: black
    backgrounds and dead features stay exact.
    """
    if not outward() or value.shape != x.shape:  # a reduction
        return out
    return filled(out, (x.mid == 0) & (x.rad == 0) & (value == 0))


def range_of(
    function: Callable[[Tensor], Tensor],
    x: Interval,
    critical: Sequence[tuple[float, float]] = (),
    *,
    ulps: float,
    absolute: float = 0.0,
) -> Interval:
    """The range of a function that is monotone between its critical points, given as (point, value) pairs.

    A function that jumps lists the point of the jump once with each one-sided limit. A set of one element takes
    the function's own value there. Errors are given as in :func:`monotone`, and cover the critical values; around a
    critical point that is itself rounded the function is flat, so that its rounding costs the square of u.
    """
    lower, upper = ends(x)
    least, greatest, at_lower = extremes(function, lower, upper, critical)
    if ulps == absolute == 0:
        return between(least, greatest)
    return _zero_stays(enclose(least, greatest, ulps, absolute), x, at_lower)


LINEAR: set[OpOverload] = set()  # what ``positive_linear`` registered


def positive_linear(
    *operators: OpOverload, shape_only: tuple[str, ...] = (), terms: Callable[..., int] | None = None
) -> None:
    """Register operators that are linear with non-negative coefficients in all their floating arguments together.

    Rearrangements, sums and averages are of this kind. The midpoints go through the operator, and so do the radii,
    where a point counts as zeros (an integer one too: it is promoted); indices, masks and numbers go through unchanged.
    ``terms`` says, from the operator's arguments with midpoints for sets, how many terms a result may sum; without it
    the operator only moves numbers.
    """
    LINEAR.update(operators)
    for op in operators:
        names = [argument.name for argument in op._schema.arguments]
        ignored = {names.index(name) for name in shape_only if name in names}
        chosen = {i for i, name in enumerate(names) if name in ("index", "indices", "condition", "mask")}
        ignored |= chosen

        def apply(
            *args: Any, _op: OpOverload = op, _ignored: set[int] = ignored, _chosen: set[int] = chosen, **kwargs: Any
        ) -> Any:
            places = pytree.tree_leaves([args[i] for i in _chosen if i < len(args)])
            if any(isinstance(place, Interval) and not isinstance(place, Indices) for place in places):
                raise UnsupportedArgumentsError("with an index or mask that depends on the box")

            def part(pick: Callable[[Any], Any]) -> Any:
                picked = [mid_of(a) if i in _ignored else pytree.tree_map(pick, a) for i, a in enumerate(args)]
                return _op(*picked, **kwargs)

            radius_part = _radius_part
            if terms is not None and outward():
                dtype = next(leaf.dtype for leaf in pytree.tree_leaves(args) if isinstance(leaf, Interval))
                lost = rd.errors(terms(*pytree.tree_map(mid_of, args), **kwargs), dtype)

                def radius_part(x: Any) -> Any:
                    if not isinstance(x, Interval | Tensor):
                        return x
                    return rd.widen(mid_of(x).to(dtype), x.rad if isinstance(x, Interval) else None, lost)

            if isinstance(args[0], Indices):
                return args[0].reshaped(_op, *args[1:])
            if any(isinstance(place, Indices) for place in places):
                raise UnsupportedArgumentsError("uses indices that differ within a set")
            leaves = pytree.tree_leaves(args)
            mids, rads = part(mid_of), part(radius_part)
            kind = Interval
            if any(isinstance(leaf, Truth) for leaf in leaves):
                # Rearranged truth values are truth values; summed ones are numbers.
                plain = pytree.tree_leaves(part(lambda a: a.mid > 0 if isinstance(a, Truth) else mid_of(a)))
                kind = Truth if plain[0].dtype == torch.bool else Interval
            if isinstance(mids, Tensor):
                return kind.of(mids, rads)
            return [kind.of(mid, rad) for mid, rad in zip(mids, rads, strict=True)]

        rule(op, shape_only=shape_only, precision="exact" if terms is None else "wide", ulps=0)(apply)


def _radius_part(x: Any) -> Any:
    return rad_of(x) if isinstance(x, Interval | Tensor) else x
