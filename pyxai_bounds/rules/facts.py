"""What is known of a set beyond its box, carried from operator to operator: how far rows lie from their midpoint in
the Euclidean norm, and what rows sum to.

A box forgets how its entries move together, and every linear layer behind it pays for that: with random signs
Σ|w||r| is about √N times what a row of the box's length can do. So where a norm has looked at whole rows, a bound ρ on
‖x − mid‖₂ travels with them. A linear map W moves a row by at most ‖W‖₂ρ and one of its entries by at most ‖w‖₂ρ, a
sum adds, a function with slopes up to L multiplies by L; every entry lies within ρ as well. Boxes and facts are two
bounds on one set, and each operator takes what they have in common.

Facts change no set's midpoint, and hold in real arithmetic alone: ``semantics="float32"`` does without them. Where
bounds are proofs they are float64 numbers, rounded up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyxai_bounds import rounding as rd
from pyxai_bounds.interval import Interval

aten = torch.ops.aten


class Facts(NamedTuple):
    """Each has the shape of the set's midpoint, with 1 in the dimensions that it joins.

    norm: ‖x − mid‖₂ over these is no greater. total: the sum over the one such dimension is this, for every member.
    convex: no entry is negative, and each total is 0 or 1.
    """

    norm: Tensor | None = None
    total: Tensor | None = None
    convex: bool = False


NONE = Facts()


def of(x: Any) -> Facts:
    return x.facts if isinstance(x, Interval) and x.facts is not None else NONE


def are_kept() -> bool:
    return rd.mode() != rd.Rounding.EVALUATED


def attach(x: Interval, **facts: Any) -> Interval:
    """The set, with these facts besides those that it has."""
    if are_kept():
        x.facts = of(x)._replace(**facts)
    return x


def with_norm(x: Interval, norm: Tensor | None) -> Interval:
    """The set, within ``norm`` of its midpoint, and no farther than its box reaches; entries lie within it, too."""
    if norm is None or not are_kept():
        return x
    dims = joined(norm, x.shape)
    box = length(wide(x.rad), dims)
    return attach(x, norm=torch.where(norm < box, norm, box))


def wide(t: Tensor) -> Tensor:
    return t.double() if rd.mode() == rd.Rounding.OUTWARD else t


def above(t: Tensor) -> Tensor:
    """A sum of a few products of numbers ≥ 0, rounded up where bounds are proofs."""
    return t * (1 + 64 * rd.unit(t.dtype)) + rd.tiny(t.dtype) if rd.mode() == rd.Rounding.OUTWARD else t


def kept(x: Interval, like: Interval) -> Interval:
    """The set, which has the same members as another one, with its facts."""
    x.facts = like.facts
    return x


def moved(x: Interval, before: Interval) -> Interval:
    """A set that holds the members of another one around other midpoints."""
    known = of(before)
    if known is NONE:
        return x
    if known.norm is not None:
        far = length(wide(x.mid) - wide(before.mid), joined(known.norm, x.shape))
        known = known._replace(norm=above(known.norm + far))
    x.facts = known
    return x


def length(t: Tensor, dims: Sequence[int]) -> Tensor:
    """‖t‖₂ over these dimensions, which are kept; divided by the greatest entry, so that squares do not underflow.

    Of 0 all derivatives are 0: in its place stand ones, since of a norm of 0 the second derivative is NaN.
    """
    if not dims:
        return t.abs()
    top = t.detach().abs().amax(list(dims), keepdim=True)
    scaled = torch.where(top > 0, t / torch.where(top > 0, top, 1.0), 1.0)
    norm = torch.linalg.vector_norm(scaled, dim=list(dims), keepdim=True) * top
    if rd.mode() != rd.Rounding.OUTWARD:
        return norm
    count = math.prod(t.shape[d] for d in dims)
    return norm * (1 + (4 * count + 64) * rd.unit(t.dtype)) + rd.tiny(t.dtype) * (top > 0)


def joined(fact: Tensor, shape: Sequence[int]) -> list[int]:
    """The dimensions that a fact joins."""
    return [d for d, (n, m) in enumerate(zip(fact.shape, shape, strict=True)) if n != m]


def rounded(mid: Tensor, dims: Sequence[int], units: float = 4) -> Any:
    """How far midpoints of this size lie from what they were computed of, ``units`` roundings away."""
    if rd.mode() != rd.Rounding.OUTWARD:
        return 0.0
    return length(wide(mid.detach()), dims) * (units * rd.unit(mid.dtype)) + math.sqrt(mid.numel()) * rd.tiny(mid.dtype)


def norm_over(x: Any, dims: Sequence[int]) -> Tensor:
    """‖x − mid‖₂ over just these dimensions, known or by the box; 0 for a point."""
    norm = of(x).norm
    if norm is not None and joined(norm, x.shape) == [d for d in dims if x.shape[d] > 1]:
        return norm
    if isinstance(x, Interval):
        return length(wide(x.rad), dims)
    return torch.zeros_like(length(wide(x), dims))


def spectral_norm(weight: Tensor) -> Tensor:
    """No less than ‖W‖₂, and for n singular values no more than n^(1/32) times that: σ₁¹⁶ ≤ ‖(WᵀW)⁸‖_F.

    The products lose γ_n√n of ‖G‖²_F, which is at most √n‖G²‖_F, each time it is squared. Each is divided by its
    greatest entry, one of the diagonal: σ₁² of that is 1 to n, and whatever the dtype its squares neither over- nor
    underflow. The divisors are constants that cancel, also from derivatives.
    """
    weight = wide(weight)
    top = weight.detach().abs().max()
    weight = weight / torch.where(top > 0, top, 1.0)
    gram = weight @ weight.t() if weight.shape[0] < weight.shape[1] else weight.t() @ weight
    gram = gram + (top == 0)  # no root of 0, which has no derivative: it is multiplied by 0 below
    power, scales = gram, []
    for _ in range(3):
        scales.append(power.detach().abs().max())
        power = power / scales[-1]
        power = power @ power
    count = len(gram)
    outward = rd.mode() == rd.Rounding.OUTWARD
    lost = 64 * (count + max(weight.shape) + 8) * count * rd.unit(weight.dtype) if outward else 0.0
    root = torch.linalg.vector_norm(power).sqrt()
    for scale in reversed(scales):
        root = (root * scale).sqrt()
    return above(root * (1 + lost) * top)


# --- rearrangements -------------------------------------------------------------------------------------------------

Carrier = Callable[..., Tensor | None]
_CARRIERS: dict[Any, Carrier] = {}  # (a fact, may it be of a part, the set's shape, the result's, arguments) → fact


def _carrier(*operators: Any) -> Callable[[Carrier], Carrier]:
    def register(function: Carrier) -> Carrier:
        _CARRIERS.update(dict.fromkeys(operators, function))
        return function

    return register


for _op in (aten.permute.default, aten.transpose.int, aten.t.default, aten.unsqueeze.default):
    _CARRIERS[_op] = lambda fact, part, before, after, *args, _op=_op: _op(fact, *args)
for _op in (aten.clone.default, aten.detach.default, aten.alias.default):
    _CARRIERS[_op] = lambda fact, part, before, after, *args: fact


@_carrier(aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(fact: Tensor, part: bool, before: Any, after: Any, dims: Any) -> Tensor:
    """A joined dimension has the size 1 in the fact alone."""
    dims = [d for d in ([dims] if isinstance(dims, int) else dims) if before[d] == 1]
    return aten.squeeze(fact, dims)


@_carrier(aten.expand.default)
def _expand(fact: Tensor, part: bool, before: Any, after: Any, *_: Any) -> Tensor:
    new = len(after) - len(before)
    joins = {d + new for d in joined(fact, before)}
    return fact.expand([1 if d in joins else n for d, n in enumerate(after)])


@_carrier(aten.select.int)
def _select(fact: Tensor, part: bool, before: Any, after: Any, dim: int, index: int) -> Tensor | None:
    if dim % len(before) in joined(fact, before):
        return fact.select(dim, 0) if part else None
    return fact.select(dim, index)


@_carrier(aten.slice.Tensor)
def _slice(fact: Tensor, part: bool, before: Any, after: Any, dim: int = 0, *args: Any) -> Tensor | None:
    if dim % len(before) in joined(fact, before):
        return fact if part else None
    return aten.slice(fact, dim, *args)


@_carrier(aten.select_backward.default)
def _select_backward(fact: Tensor, part: bool, before: Any, after: Any, size: Any, dim: int, index: int) -> Tensor:
    dim = dim % len(after)
    joins = {d + (d >= dim) for d in joined(fact, before)}
    return aten.select_backward(fact, [1 if d in joins else n for d, n in enumerate(after)], dim, index)


@_carrier(aten.slice_backward.default)
def _slice_backward(fact: Tensor, part: bool, before: Any, after: Any, size: Any, dim: int, *args: Any) -> Tensor:
    joins = joined(fact, before)
    if dim % len(after) in joins:
        return fact
    return aten.slice_backward(fact, [1 if d in joins else n for d, n in enumerate(after)], dim, *args)


@_carrier(aten.constant_pad_nd.default)
def _pad(fact: Tensor, part: bool, before: Any, after: Any, sizes: Sequence[int], value: float = 0) -> Tensor | None:
    """What is added are points: rows that do not move, and sums of 0 where it is 0."""
    joins = joined(fact, before)
    if not part and (value != 0 or min(sizes) < 0):
        return None
    return aten.constant_pad_nd(fact, [0 if len(before) - 1 - i // 2 in joins else n for i, n in enumerate(sizes)])


@_carrier(aten.roll.default)
def _roll(fact: Tensor, part: bool, before: Any, after: Any, shifts: Any, dims: Any = ()) -> Tensor | None:
    return aten.roll(fact, shifts, dims) if len(dims) == len(shifts) else None  # a joined dimension has the size 1


@_carrier(aten.view.default, aten.reshape.default, aten._unsafe_view.default)
def _reshape(fact: Tensor, part: bool, before: Any, after: Any, *_: Any) -> Tensor | None:
    """Dimensions that become one another: all joined or none is simple. Of a mixture the last one decides: if it is
    joined, the whole becomes one row, ‖·‖² the sum of the rows' squares; if not, parts of rows are no longer than rows.
    """
    joins, shape = joined(fact, before), []
    for old, new in _blocks(before, after):
        inside = [d for d in old if before[d] > 1]
        sizes = [after[d] for d in new]
        if not any(d in joins for d in inside):
            shape += sizes
        elif all(d in joins for d in inside):
            shape += [1] * len(sizes)
        elif not part:
            return None
        elif inside[-1] in joins:
            fact = length(fact, [d for d in inside if d not in joins])
            shape += [1] * len(sizes)
        else:
            fact = fact.expand([before[d] if d in old else n for d, n in enumerate(fact.shape)])
            shape += sizes
    return fact.reshape(shape)


def _blocks(before: Any, after: Any) -> list[tuple[list[int], list[int]]]:
    """The least runs of old and new dimensions that hold as many elements."""
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        old, new, n, m = [], [], 1, 1
        while True:
            if i < len(before) and (n <= m or j == len(after)):
                n, i = n * before[i], i + 1
                old.append(i - 1)
            elif j < len(after):
                m, j = m * after[j], j + 1
                new.append(j - 1)
            if n == m and (old or new):
                break
        blocks.append((old, new))
    return blocks


def carried(op: Any, args: tuple, kwargs: dict, result: Any) -> Any:
    """The result of a rule, with what is known of it because of what is known of the arguments."""
    if not are_kept():
        return result
    if op in _PARTS:
        return _carried_to_parts(op, result, *args)
    if not isinstance(result, Interval):
        return result
    if op in _CARRIERS and result.facts is None:
        x = args[0]
        known = of(x)
        if known is NONE or 0 in x.shape or 0 in result.shape:
            return result
        old = [
            None if fact is None else _CARRIERS[op](fact, part, x.shape, result.shape, *args[1:])
            for fact, part in ((known.norm, True), (known.total, False))
        ]
        norm, total = old
        if total is not None and (op in _SCATTERS or len(joined(total, result.shape)) != 1):
            total = None
        result.facts = Facts(norm, total, known.convex and total is not None)
        return result
    return _RULES[op](result, *args, **kwargs) if op in _RULES else result


def _carried_to_parts(op: Any, results: Any, x: Any, sizes: Any = 0, dim: int = 0) -> Any:
    norm, start = of(x).norm, 0
    if norm is None or 0 in x.shape:
        return results
    for i, part in enumerate(results):
        if op is aten.unbind.int:
            norm_of_part = _select(norm, True, x.shape, part.shape, sizes, i)
        else:
            end = start + part.shape[dim]
            norm_of_part, start = _slice(norm, True, x.shape, part.shape, dim, start, end), end
        if part.shape.numel():
            part.facts = Facts(norm_of_part)
    return results


_PARTS = {aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int}
_SCATTERS = {aten.select_backward.default, aten.slice_backward.default}


# --- sums, products with points, functions --------------------------------------------------------------------------

_RULES: dict[Any, Callable[..., Interval]] = {}


def _after(*operators: Any) -> Callable[[Callable[..., Interval]], Callable[..., Interval]]:
    def register(function: Callable[..., Interval]) -> Callable[..., Interval]:
        _RULES.update(dict.fromkeys(operators, function))
        return function

    return register


@_after(aten.add.Tensor, aten.sub.Tensor)
def _sum(out: Interval, a: Any, b: Any, **scaled: Any) -> Interval:
    """The rows' norms add; that of the term without one is its box's."""
    known = next((x for x in (a, b) if of(x).norm is not None and x.shape == out.shape), None)
    if known is None or scaled or not all(_is_of(x, out.dtype) for x in (a, b)):
        return out
    dims = joined(known.facts.norm, out.shape)
    terms = [x for x in (a, b) if isinstance(x, Interval)]
    if any(x.shape != out.shape for x in terms):
        return out
    return with_norm(out, above(sum(norm_over(x, dims) for x in terms) + rounded(out.mid, dims)))


def _is_of(x: Any, dtype: torch.dtype) -> bool:
    """Does the dtype hold this operand, so that nothing is rounded but the result?"""
    if isinstance(x, Interval | Tensor):
        return x.dtype == dtype
    return math.isfinite(x) and rd.stored(x, dtype)[1] == 0


@_after(aten.mul.Tensor, aten.mul.Scalar)
def _product_with_point(out: Interval, a: Any, b: Any) -> Interval:
    x, factor = (a, b) if isinstance(a, Interval) else (b, a)
    norm = of(x).norm
    if norm is None or isinstance(factor, Interval) or x.shape != out.shape or x.dtype != out.dtype:
        return out
    if factor.dtype != out.dtype if isinstance(factor, Tensor) else not 1e-30 < abs(factor) < 1e30:
        return out
    dims = joined(norm, out.shape)
    if isinstance(factor, Tensor):
        size = wide(factor.abs()).expand(out.shape).amax(dims, keepdim=True) if dims else wide(factor.abs())
    else:
        size = abs(factor)
    return with_norm(out, above(norm * size + rounded(out.mid, dims)))


@_after(aten.div.Tensor, aten.div.Scalar)
def _quotient_by_number(out: Interval, a: Any, b: Any) -> Interval:
    norm = of(a).norm
    if norm is None or isinstance(b, Interval | Tensor) or not 1e-30 < abs(b) < 1e30:
        return out
    dims = joined(norm, out.shape)
    return with_norm(out, above(norm / abs(b) + rounded(out.mid, dims)))


@_after(aten.cat.default)
def _concatenated(out: Interval, tensors: Sequence[Any], dim: int = 0) -> Interval:
    """Rows beside rows; or parts of one row, whose squares add."""
    known = next((x for x in tensors if of(x).norm is not None), None)
    if known is None or any(
        x.dtype != out.dtype or len(x.shape) != len(out.shape) or not x.shape.numel() for x in tensors
    ):
        return out
    dims, dim = joined(known.facts.norm, known.shape), dim % len(out.shape)
    norms = [norm_over(x, dims) for x in tensors]
    norm = length(torch.cat(norms, dim), [dim]) if dim in dims else torch.cat(norms, dim)
    return with_norm(out, above(norm))


# The greatest slopes, and where the backward side is bounded, curvatures: GELU has 1.1290 at √2 and √(2/π) at 0,
# that by tanh 1.1290 and 0.7980; SiLU 1.0999 and 1/2.
_SLOPES = {aten.gelu.default: 1.13, aten.silu.default: 1.1, aten.tanh.default: 1.0, aten.relu.default: 1.0,
           aten.sigmoid.default: 0.25}  # fmt: skip
_CURVATURES = {aten.gelu_backward.default: (1.13, 0.8), aten.silu_backward.default: (1.1, 0.5)}


def _function(op: Any, out: Interval, *args: Any, **kwargs: Any) -> Interval:
    """No farther from f(mid) than L times; f is computed in float64, to within 64 u of itself and 1024 u."""
    x, norm = args[0], of(args[0]).norm
    if norm is None:
        return out
    dims = joined(norm, out.shape)
    value = op(wide(x.mid), *args[1:], **kwargs)
    return with_norm(out, above(_SLOPES[op] * norm + _from(value, 1.0, out, dims)))


def _slope(op: Any, out: Interval, grad: Any, x: Any, **kwargs: Any) -> Interval:
    """g·φ′(x) − c·φ′(m) = (g − c)·φ′(x) + c·(φ′(x) − φ′(m)), where φ′ moves by no more than its curvature times x."""
    known = next((t.facts.norm for t in (x, grad) if of(t).norm is not None), None)
    if known is None or not isinstance(x, Interval) or grad.shape != x.shape:
        return out
    dims = joined(known, out.shape)
    slope, curvature = _CURVATURES[op]
    c = wide(grad.mid if isinstance(grad, Interval) else grad)
    by_box = length(c * wide(x.rad), dims)
    by_norm = (c.abs().amax(dims, keepdim=True) if dims else c.abs()) * norm_over(x, dims)
    moved = curvature * torch.where(by_norm < by_box, by_norm, by_box)
    centre = _from(op(c, wide(x.mid), **kwargs), c.abs(), out, dims)
    return with_norm(out, above(slope * norm_over(grad, dims) + moved + centre))


def _from(value: Tensor, scale: Any, out: Interval, dims: Sequence[int]) -> Tensor:
    """How far the midpoint lies from a computed value, which is off by 64 u of itself and 1024 u of its scale."""
    far = length(wide(out.mid) - value, dims)
    if rd.mode() != rd.Rounding.OUTWARD:
        return far
    u = rd.unit(value.dtype)
    return far + length(value.detach().abs() * (64 * u) + (1024 * u) * scale, dims)


for _op in _SLOPES:
    _RULES[_op] = lambda out, *args, _op=_op, **kwargs: _function(_op, out, *args, **kwargs)
for _op in _CURVATURES:
    _RULES[_op] = lambda out, *args, _op=_op, **kwargs: _slope(_op, out, *args, **kwargs)
