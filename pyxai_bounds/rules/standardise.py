"""Normalisation with a sample's own statistics: layer, group and instance norm, and their backward sides; variances.

The norms standardise rows: y = (x − mean)/σ with σ = √(v + eps), v the mean of (x − mean)² over the N entries of a row.
The quotient of the naive sets is loose, since mean and variance move with x. So y is bounded in two ways, and lies in
what both have in common:

* By parts, good for wide boxes. Let d = x_i − mean, and S = Σ(x_j − m)² over the others, whose mean is m. Then
  Nv = S + d²·N/(N − 1), and y_i = √N·d/√(S + d²·N/(N − 1) + N·eps) rises with d, and falls with S where d > 0. So the
  ends of d and S give those of y_i, which never leaves ±√(N − 1).
* By slopes, exact to first order. ∂y_i/∂x_j = ([i = j] − 1/N − y_i y_j/N)/σ, so by the mean value theorem y_i moves by
  no more than Σ_j r_j·|∂y_i/∂x_j| at its greatest over the box, for y as the first way found it.
* By norms, good behind linear layers (``facts``). That matrix is symmetric with the eigenvalues 0, 1/σ and eps/σ³, so
  that a row that lies within ρ of its midpoint moves y by ρ/σ at most; and √(Nv) = ‖x − mean‖ moves by ρ itself.

Rounded outward, rows are computed in float64. A sum of N terms is off by less than ``lost`` = 8(N + 16)u of their
sizes, by which bounds are widened; and ``slack`` = lost·max|x| covers what the subtraction of the mean cancels: it is
added to every radius, so that each box holds x_j less the computed mean. Squares may underflow: sums of them are moved
outward by ``_floor``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyxai_bounds import rounding as rd
from pyxai_bounds.interval import Interval
from pyxai_bounds.rules import facts
from pyxai_bounds.rules.elementwise import square
from pyxai_bounds.rules.reduce import normalised
from pyxai_bounds.rules.registry import (
    UnsupportedArgumentsError,
    Value,
    as_set,
    enclose,
    ends,
    in_float64,
    mid_of,
    minus,
    multiply,
    narrow,
    outward,
    plus,
    rad_of,
    rule,
    singleton,
    steep,
    total,
    within,
)

aten = torch.ops.aten


class Standardised(NamedTuple):
    """Rows [M, N] divided by their deviation, the mean they had and 1/σ [M, 1]."""

    value: Interval
    mean: Interval
    inverse: Interval


def _lost(count: int, dtype: torch.dtype) -> float:
    return 8 * (count + 16) * rd.unit(dtype) if outward() else 0.0


def _floor(count: int, dtype: torch.dtype) -> float:
    """More than what the underflow of so many squares, and of a few products, loses."""
    return 4 * (count + 4) * torch.finfo(dtype).tiny if outward() else 0.0


def _sum(t: Tensor) -> Tensor:
    return t.sum(1, keepdim=True)


class _Moments(NamedTuple):
    """What is known of rows: centred midpoints, radii and their slack, the mean, bounds of N·v [M, 1]."""

    centred: Tensor
    rad: Tensor
    slack: Tensor
    mean: Interval
    least: Tensor
    most: Tensor
    near: Tensor  # how far each entry must be from the mean at the centre


def _moments(x: Interval) -> _Moments:
    """N·v = Σ(x_j − a)² − N(mean − a)² ≤ Σ(x_j − a)², with a the mean at the centre.

    And N·v ≥ F(mean) for F(a) = Σ dist(a, box_j)², which is convex: F(mean) ≥ F(a) − |F′(a)||mean − a| with
    F′(a) = 2Σ ±dist(a, box_j); or simply N·v ≥ F(a) − N(mean − a)².
    """
    count = x.shape[1]
    lost, floor = _lost(count, x.dtype), _floor(count, x.dtype)
    centre = x.mid.mean(1, keepdim=True)
    slack = lost * x.mid.detach().abs().amax(1, keepdim=True)
    d, r = x.mid - centre, x.rad * (1 + lost) + slack
    reach = _sum(r) * ((1 + lost) / count) + slack
    size = d.abs()
    near = (size - r).clamp(min=0) * (1 - lost)
    squares = _sum(near.square()) * (1 - lost) - floor
    signed = _sum(d.sign() * near).abs() + 2 * lost * _sum(near)
    least = torch.maximum(squares - 2 * signed * reach * (1 + lost), squares - count * reach.square() * (1 + lost))
    most = _sum((size + r).square()) * (1 + lost) + floor
    mean = Interval.of(centre, reach)
    return _Moments(d, r, slack, mean, (least - floor).clamp(min=0) * (1 - lost), most, near)


def standardised(x: Interval, eps: float) -> Standardised:
    """Rows [M, N], in float64 where bounds are proofs."""
    count = x.shape[1]
    m = _moments(x)
    norm = facts.norm_over(x, [1])
    least, most = _within(m, norm)
    inverse = enclose((most / count + eps).rsqrt(), (least / count + eps).rsqrt(), ulps=16)
    if count == 1:
        zero = x.mid - x.mid  # NaN where nothing is known
        value = Interval.of(zero, x.rad - x.rad)
    else:
        value = _by_slopes(m, _by_parts(m, count, eps), inverse, eps, norm)
    if eps <= 0:  # of a constant row the quotient is 0/0
        value = facts.kept(Interval.of(value.mid, torch.where(least / count + eps > 0, value.rad, math.inf)), value)
    return Standardised(value, m.mean, inverse)


def centred(x: Interval) -> Interval:
    """Rows [M, N] less their means: x_i(1 − 1/N) less the others' share; a projection, which lengthens no row."""
    m = _moments(x)
    norm = facts.norm_over(x, [1]) + math.sqrt(x.shape[1]) * m.slack
    rad = _centred_width(m)
    out = Interval.of(m.centred, rd.up(rad, underflows=True) if outward() else rad)
    return facts.with_norm(out, facts.above(norm))


def _centred_width(m: _Moments) -> Tensor:
    """How far an entry less the mean may lie from what was computed."""
    count = m.rad.shape[1]
    lost = _lost(count, m.rad.dtype)
    return (m.rad * (1 - 2 / count) + _sum(m.rad) / count) * (1 + lost) + m.slack


def rooted(x: Interval, eps: float) -> Standardised:
    """Rows [M, N] divided by σ = √(mean x² + eps), eps > 0, and 1/σ; in float64 where bounds are proofs.

    The range over a box is exact (``normalised``). ∂y/∂x = (I − yyᵀ/N)/σ has eigenvalues between 0 and 1/σ, so that a
    row within ρ of its midpoint moves y by ρ/σ at most; and √(Σx²) moves by ρ itself.
    """
    count = x.shape[1]
    lost, floor = _lost(count, x.dtype), _floor(count, x.dtype)
    norm, size = facts.norm_over(x, [1]), facts.length(x.mid, [1])
    lowest, highest = ends(square(x))
    moved = norm + lost * size + math.sqrt(floor)
    least = torch.maximum(_sum(lowest) * (1 - lost) - floor, (size - moved).clamp(min=0).square() * (1 - lost))
    most = torch.minimum(_sum(highest) * (1 + lost) + floor, (size + moved).square() * (1 + lost))
    least = least.clamp(min=0)
    most = torch.maximum(least, most)  # equal at a point, but for rounding
    inverse = enclose((most / count + eps).rsqrt(), (least / count + eps).rsqrt(), ulps=16)
    box = normalised(x, [1], lambda length: (length.square() / count + eps).sqrt())
    s = x.mid * (_sum(x.mid.square()) / count + eps).rsqrt()
    ball = norm * (inverse.mid + inverse.rad) * (1 + lost)
    off = 4 * lost * s.abs()
    out = within(box, s - ball - off, s + ball + off)
    out = facts.with_norm(out, facts.above(ball + facts.length(off, [1]) + facts.length(out.mid - s, [1])))
    return Standardised(out, singleton(torch.zeros_like(size)), inverse)


def _within(m: _Moments, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of N·v, also by how far its root moves: the norm, and where the centred midpoints themselves may lie."""
    count = m.rad.shape[1]
    lost, floor = _lost(count, m.rad.dtype), _floor(count, m.rad.dtype)
    size = facts.length(m.centred, [1])  # which has a derivative where rows are constant
    moved = norm + math.sqrt(count) * m.slack + lost * size + math.sqrt(floor)
    least = (size - moved).clamp(min=0).square() * (1 - lost)
    most = (size + moved).square() * (1 + lost)
    least = torch.maximum(m.least, least)
    return least, torch.maximum(least, torch.minimum(m.most, most))  # equal at a point, but for rounding


def _by_parts(m: _Moments, count: int, eps: float) -> Interval:
    """The ends of d_i, and of S_i: Σ(x_j − a)² of the others less (N − 1)(their mean − a)², as in ``_moments``."""
    lost, floor, others = _lost(count, m.rad.dtype), _floor(count, m.rad.dtype), count - 1
    size = m.centred.abs()
    others_reach = (_sum(m.rad) - m.rad) * ((1 + lost) / others) + 2 * m.slack + _sum(m.rad) * lost
    least_mean = (size * ((1 - lost) / others) - others_reach).clamp(min=0)
    most_mean = size * ((1 + lost) / others) + others_reach
    squares = _sum(m.near.square()) * (1 - lost) - floor
    squares = squares - m.near.square() - lost * squares
    towards = m.centred.sign() * m.near
    signed = (_sum(towards) - towards).abs() + 4 * lost * _sum(m.near)
    least = torch.maximum(
        squares - 2 * signed * most_mean * (1 + lost), squares - others * most_mean.square() * (1 + lost)
    )
    least = (least - floor).clamp(min=0)
    most = m.most - (size + m.rad).square() * (1 - lost) - others * least_mean.square() * (1 - lost)
    most = most.clamp(min=0) + lost * m.most + floor
    width = _centred_width(m)
    lower, upper = m.centred - width, m.centred + width
    if outward():
        lower, upper = rd.down(lower), rd.up(upper)

    def quotient(d: Tensor, small: Tensor) -> Tensor:
        """Of a small one the greatest denominator counts, of the other the least; d² may underflow."""
        rest = torch.where(small, most + floor, least - floor)
        return d * (math.sqrt(count) * (rest + d.square() * (count / others) + count * eps).clamp(min=0).rsqrt())

    at_lower = quotient(lower, lower > 0)
    at_upper = quotient(upper, upper < 0)
    return enclose(at_lower, torch.maximum(at_lower, at_upper), ulps=32)  # equal at a point, but for rounding


def _by_slopes(m: _Moments, by_parts: Interval, inverse: Interval, eps: float, norm: Tensor) -> Interval:
    """What ``by_parts`` and y at the centre ± Σ_j r_j|∂y_i/∂x_j|, and within norm/σ, have in common.

    With |y_j − s_j| ≤ p_j: Σ_{j≠i} r_j|1 + y_i y_j| ≤ Σ_{j≠i} r_j|1 + s_i s_j| + |s_i|Σrp + p_iΣr|s| + p_iΣrp, and
    0 ≤ 1 − 1/N − y_i²/N for j = i. Where s itself is computed: d is off by slack, σ by as much and by ``lost``, which
    moves s by (1 + |s|)·slack/σ + lost·|s| to first order; the 4 holds the rest where slack < σ/8.
    """
    count = m.rad.shape[1]
    lost = _lost(count, m.rad.dtype)
    variance = _sum(m.centred.square()) / count + eps
    s = m.centred * variance.rsqrt()
    steepest = inverse.mid + inverse.rad
    off = (1 + s.abs()) * (4 * m.slack * steepest) + 4 * lost * s.abs()
    ball = norm * steepest * (1 + lost)
    p = torch.maximum(by_parts.mid + by_parts.rad - s, s - (by_parts.mid - by_parts.rad)) * (1 + lost) + lost * s.abs()
    p = torch.minimum(p, ball + off)
    least_size = (s.abs() - p).clamp(min=0)
    own = m.rad * ((1 - 1 / count - least_size.square() / count).clamp(min=0) + lost)
    moved = _sum(m.rad * p)
    second = s.abs() * moved + p * _sum(m.rad * s.abs()) + p * moved
    rad = steepest * (own + (_weighted(s, m.rad) + second) / count) * (1 + lost)
    rad = torch.minimum(rad, ball) + off
    out = within(Interval.of(s, rad), *ends(by_parts))
    known = m.slack * steepest < 0.125
    if outward():  # squares keep all their digits
        known = known & (variance > torch.finfo(s.dtype).tiny / rd.unit(s.dtype) ** 2)
    better = known & (out.rad < by_parts.rad)
    out = Interval.of(torch.where(better, out.mid, by_parts.mid), torch.where(better, out.rad, by_parts.rad))
    far = ball + facts.length(off, [1]) + facts.length(out.mid - s, [1])
    return facts.with_norm(out, facts.above(torch.where(known, far, math.inf)))


def _weighted(s: Tensor, weight: Tensor) -> Tensor:
    """Σ_{j≠i} weight_j·|1 + s_i s_j| for every i of a row, by sorting: N log N instead of N².

    For s_i ≥ 0 the terms that are negative are those with s_j < −1/s_i, the first ones in order of s; for s_i < 0 the
    last ones. A term on the wrong side of the search is one that is 0 but for rounding.
    """
    lost = _lost(s.shape[1], s.dtype)
    ordered, order = s.detach().sort(1)
    weights = weight.gather(1, order)
    products = weights * s.gather(1, order)
    before = [torch.cat((torch.zeros_like(t[:, :1]), t.cumsum(1)), 1) for t in (weights, products)]
    found = torch.searchsorted(ordered.contiguous(), s.detach().abs().reciprocal().copysign(-s.detach()).contiguous())
    first = before[0].gather(1, found) + s * before[1].gather(1, found)
    whole = _sum(weight) + s * _sum(weight * s)
    summed = torch.where(s.detach().signbit(), 2 * first - whole, whole - 2 * first)
    sizes = _sum(weight) + s.abs() * _sum(weight * s.abs())
    return (summed - weight * (1 + s.square())).clamp(min=0) + 2 * lost * sizes


def standardised_backward(
    grad: Interval, normal: Interval, inverse: Value, contracts: bool, centred: bool = True
) -> Interval:
    """(g − mean g − y·mean(g·y))/σ over rows [M, N]: a linear map of g, by the slopes above; (g − y·mean(g·y))/σ where
    the mean was not taken off (``centred``).

    With g = c ± r and y = s ± p it is c − mean c − s·mean(cs) at the centre. g moves that by
    Σ_j r_j|[i = j] − 1/N − s_i s_j/N|, y by p|mean(cs)| + |s|mean(|c|p), and both together by
    p·mean(r|s|) + |s|mean(rp) + p·mean((|c| + r)p). Where y is standardised (``contracts``) the map without 1/σ is
    symmetric with the eigenvalues 0, 1 and eps/σ², so that ‖g‖₂ bounds it as well, and it lies in what both have in
    common.
    """
    c, r, s, p = grad.mid, grad.rad, normal.mid, normal.rad
    count = c.shape[1]
    lost = _lost(count, c.dtype)

    def mean(t: Tensor) -> Tensor:
        return t.mean(1, keepdim=True)

    along = mean(c * s)
    if centred:
        mid = c - mean(c) - s * along
        rad = r * (1 - (1 + s.square()) / count).abs() + _weighted(s, r) / count
    else:
        mid = c - s * along
        own = s.square() / count
        rad = r * (1 - own).abs() + (s.abs() * mean(r * s.abs()) - r * own).clamp(min=0)
    rad = rad + p * along.abs() + s.abs() * mean(c.abs() * p)
    rad = rad + p * mean(r * s.abs()) + s.abs() * mean(r * p) + p * mean((c.abs() + r) * p)
    most = c.abs() + r
    if outward():
        sizes = most + mean(most) + (s.abs() + p) * mean(most * (s.abs() + p))
        rad = rd.up(rad * (1 + lost) + sizes * (4 * lost), underflows=True)
    if not contracts:
        return multiply(Interval.of(mid, rad), inverse)
    norm = facts.length(most, [1])
    ball = facts.above(facts.length(c, [1]) + facts.norm_over(grad, [1]))
    norm = torch.where(ball < norm, ball, norm)
    sloped = within(Interval.of(mid, rad), -norm, norm)
    out = multiply(sloped, inverse)
    rows = _norm_of_backward(grad, normal, inverse, sloped.mid, out, centred)
    whole = facts.above(norm * (mid_of(inverse) + rad_of(inverse)))  # about 0
    whole = torch.where((sloped.mid == 0).all(1, keepdim=True) & (whole < rows), whole, rows)
    return facts.with_norm(out, whole)


def _norm_of_backward(
    grad: Interval, normal: Interval, inverse: Value, mid: Tensor, out: Interval, centred: bool
) -> Tensor:
    """With P = I − 11ᵀ/N − yyᵀ/N, or without 11ᵀ/N, which contracts, g = c ± ρ and y = s ± q in norm: P(y)g − P(s)c =
    P(y)(g − c) less (y(y − s)·c + (y − s)s·c)/N, which with ‖y‖ ≤ √N is at most ρ + q(‖c‖/√N + |s·c|/N). Then 1/σ, a
    set itself.
    """
    c, s = grad.mid, normal.mid
    count = c.shape[1]
    lost = _lost(count, c.dtype)
    along = _sum(c * s)
    size = facts.length(c, [1])
    moved = facts.norm_over(normal, [1]) * (size / math.sqrt(count) + along.abs() / count + lost * size)
    centre = (c - c.mean(1, keepdim=True) if centred else c) - s * (along / count)
    far = facts.length(mid - centre, [1]) + (4 * lost) * size * (1 + facts.length(s, [1]) / math.sqrt(count)) ** 2
    centre, spread, scale = mid, rad_of(inverse), mid_of(inverse)
    norm = (facts.norm_over(grad, [1]) + moved + far) * (scale + spread) + facts.length(centre, [1]) * spread
    off = facts.length(out.mid - centre * scale, [1]) + lost * facts.length(out.mid, [1])
    return facts.above((norm + off) * (1 + 4 * lost))


# --- the operators: rows in, rows out -------------------------------------------------------------------------


def _set(x: Value) -> Interval:
    return as_set(in_float64(x) if outward() else x)


def _exact(x: Value | None) -> Any:
    return in_float64(x) if outward() else x


def shaped(x: Value, shape: Any) -> Any:
    """The set in another shape, with what is known of it."""
    if not isinstance(x, Interval):
        return x.reshape(shape)
    return facts.carried(aten.reshape.default, (x, shape), {}, Interval.of(x.mid.reshape(shape), x.rad.reshape(shape)))


def _affine(x: Interval, weight: Value | None, bias: Value | None) -> Interval:
    out = x if weight is None else _times(x, weight)
    if bias is None:
        return out
    bias = _exact(bias)
    return facts.carried(aten.add.Tensor, (out, bias), {}, plus(out, bias))


def _times(x: Interval, weight: Value) -> Interval:
    weight = _exact(weight)
    return facts.carried(aten.mul.Tensor, (x, weight), {}, multiply(x, weight))


def normalise(
    x: Value, rows: Any, statistics: Any, weight: Value | None, bias: Value | None, eps: float
) -> tuple[Interval, Interval, Interval]:
    """Standardise x as ``rows`` [M, N], scale and shift it in its own shape; mean and 1/σ in the shape ``statistics``.

    1/σ carries the standardised rows along for the backward side, which does not know eps.
    """
    done = standardised(shaped(_set(x), rows), eps)
    out = _affine(shaped(done.value, x.shape), weight, bias)
    mean, inverse = (narrow(shaped(part, statistics), x.dtype) for part in (done.mean, done.inverse))
    inverse = Interval.of(inverse.mid, inverse.rad, state=done)
    return narrow(out, x.dtype), mean, inverse


def normalise_backward(
    grad: Value, x: Value, rows: Any, mean: Value, inverse: Value, weight: Value | None
) -> tuple[Interval, Interval]:
    """The gradients of x and, not yet summed, of the weight, in the shape and precision of the rule's arguments."""
    grad = _set(grad)
    known = isinstance(inverse, Interval) and isinstance(inverse.state, Standardised)
    if known:
        normal, _, inverse = inverse.state  # type: ignore[union-attr]
    else:
        mean, inverse = shaped(_exact(mean), (-1, 1)), shaped(_exact(inverse), (-1, 1))
        normal = multiply(minus(shaped(_set(x), rows), mean), inverse)
    scaled = grad if weight is None else _times(grad, weight)
    out = standardised_backward(shaped(scaled, rows), normal, inverse, contracts=known)
    return shaped(out, x.shape), multiply(grad, shaped(normal, x.shape))


def _layer_rows(x: Value, normalized_shape: list[int]) -> tuple[list[int], list[int]]:
    """Rows, and the shape of their statistics."""
    outer = list(x.shape[: len(x.shape) - len(normalized_shape)])
    return [math.prod(outer), math.prod(normalized_shape)], outer + [1] * len(normalized_shape)


@rule(aten.native_layer_norm.default, precision="own")
def layer_norm(
    x: Value, normalized_shape: list[int], weight: Value | None, bias: Value | None, eps: float
) -> tuple[Interval, Interval, Interval]:
    return normalise(x, *_layer_rows(x, normalized_shape), weight, bias, eps)


@rule(aten.native_layer_norm_backward.default, precision="own")
def layer_norm_backward(
    grad: Value, x: Value, normalized_shape: list[int], mean: Value, inverse: Value, weight: Value | None,
    bias: Value | None, output_mask: list[bool],
) -> tuple[Any, Any, Any]:  # fmt: skip
    rows, _ = _layer_rows(x, normalized_shape)
    out, slope = normalise_backward(grad, x, rows, mean, inverse, weight)
    over = range(len(x.shape) - len(normalized_shape))
    return _gradients(grad, out, slope, over, normalized_shape, output_mask)


def _gradients(
    grad: Value, x: Interval, slope: Interval, over: Any, shape: Any, output_mask: list[bool]
) -> tuple[Any, Any, Any]:
    """Of the input, the weight and the bias, as far as they are asked for, in the gradient's dtype."""
    dtype = grad.dtype
    weight = shaped(total(slope, [*over]) if [*over] else slope, shape) if output_mask[1] else None
    bias = shaped(total(_set(grad), [*over]) if [*over] else _set(grad), shape) if output_mask[2] else None
    return (
        narrow(x, dtype) if output_mask[0] else None,
        None if weight is None else narrow(weight, dtype),
        None if bias is None else narrow(bias, dtype),
    )


def per_channel(x: Value | None, dims: int) -> Any:
    return None if x is None else shaped(x, [1, -1] + [1] * (dims - 2))


@rule(aten.native_group_norm.default, precision="own")
def group_norm(
    x: Value, weight: Value | None, bias: Value | None, N: int, C: int, HxW: int, group: int, eps: float
) -> tuple[Interval, Interval, Interval]:
    dims = len(x.shape)
    rows = [x.shape[0] * group, C // group * HxW]
    return normalise(x, rows, [x.shape[0], group], per_channel(weight, dims), per_channel(bias, dims), eps)


@rule(aten.native_group_norm_backward.default, precision="own")
def group_norm_backward(
    grad: Value, x: Value, mean: Value, inverse: Value, weight: Value | None, N: int, C: int, HxW: int, group: int,
    output_mask: list[bool],
) -> tuple[Any, Any, Any]:  # fmt: skip
    rows = [x.shape[0] * group, C // group * HxW]
    out, slope = normalise_backward(grad, x, rows, mean, inverse, per_channel(weight, len(x.shape)))
    return _gradients(grad, out, slope, [0, *range(2, len(x.shape))], [C], output_mask)


BATCH_STATISTICS = "normalises with the statistics of the batch; call model.eval(), and keep track_running_stats=True"


def _check_instance(x: Value) -> None:
    if x.shape[0] != 1:
        raise UnsupportedArgumentsError(BATCH_STATISTICS)
    if rd.mode() == rd.Rounding.EVALUATED:
        raise UnsupportedArgumentsError("computes statistics, for which float32 evaluations are not bounded")


def instance_norm(
    x: Value, weight: Value | None, bias: Value | None, eps: float
) -> tuple[Interval, Interval, Interval]:
    """Batch norm of one sample [1, C, …], whose channels F.instance_norm makes of all samples' channels."""
    _check_instance(x)
    channels, dims = x.shape[1], len(x.shape)
    rows = [channels, math.prod(x.shape[2:])]
    return normalise(x, rows, [channels], per_channel(weight, dims), per_channel(bias, dims), eps)


def instance_norm_backward(
    grad: Value, x: Value, weight: Value | None, mean: Value, inverse: Value, output_mask: list[bool]
) -> tuple[Any, Any, Any]:
    _check_instance(x)
    rows = [x.shape[1], math.prod(x.shape[2:])]
    out, slope = normalise_backward(grad, x, rows, mean, inverse, per_channel(weight, len(x.shape)))
    return _gradients(grad, out, slope, [0, *range(2, len(x.shape))], [x.shape[1]], output_mask)


# --- variance ----------------------------------------------------------------------------------------------------


def _rows(x: Interval, dim: Any) -> tuple[Interval, list[int], int]:
    """The reduced dimensions flattened behind the others; the shape of a result that keeps them."""
    dims = len(x.shape)
    reduced = sorted(d % dims for d in ([dim] if isinstance(dim, int) else dim or range(dims)))
    kept = [d for d in range(dims) if d not in reduced]
    order = [*kept, *reduced]
    count = math.prod(x.shape[d] for d in reduced)
    flat = Interval.of(*(t.permute(order).reshape(-1, count) for t in (x.mid, x.rad)))
    return flat, [1 if d in reduced else x.shape[d] for d in range(dims)], count


def _variance(x: Interval, dim: Any, correction: float | None, root: bool) -> tuple[Interval, Interval, list[int]]:
    rows, shape, count = _rows(x, dim)
    m = _moments(rows)
    divisor = count - (1 if correction is None else correction)
    if divisor <= 0:
        raise UnsupportedArgumentsError(f"divides by {divisor}: {count} numbers have no variance with this correction")
    lower, upper = m.least / divisor, torch.maximum(m.least, m.most) / divisor  # equal at a point, but for rounding
    if root:
        lower, upper = steep(torch.sqrt)(lower), steep(torch.sqrt)(upper)
    return enclose(lower, upper, ulps=16), m.mean, shape


def _dropped(x: Interval, shape: list[int], dim: Any, keepdim: bool) -> Interval:
    if keepdim:
        return shaped(x, shape)
    dims = len(shape)
    reduced = {d % dims for d in ([dim] if isinstance(dim, int) else dim or range(dims))}
    return shaped(x, [n for d, n in enumerate(shape) if d not in reduced])


@rule(aten.var.correction)
def var(x: Interval, dim: Any = None, *, correction: float | None = None, keepdim: bool = False) -> Interval:
    out, _, shape = _variance(x, dim, correction, root=False)
    return _dropped(out, shape, dim, keepdim)


@rule(aten.std.correction)
def std(x: Interval, dim: Any = None, *, correction: float | None = None, keepdim: bool = False) -> Interval:
    out, _, shape = _variance(x, dim, correction, root=True)
    return _dropped(out, shape, dim, keepdim)


@rule(aten.var_mean.correction)
def var_mean(
    x: Interval, dim: Any = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Interval, Interval]:
    out, mean, shape = _variance(x, dim, correction, root=False)
    return _dropped(out, shape, dim, keepdim), _dropped(mean, shape, dim, keepdim)
