"""Elementwise functions: exponentials and logarithms, powers, waves and angles, and the special ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from pyxai_bounds import rounding as rd
from pyxai_bounds.interval import Interval
from pyxai_bounds.rules.elementwise import abs_, clamp, reciprocal
from pyxai_bounds.rules.logic import ge, le, logical_and, where
from pyxai_bounds.rules.registry import (
    UnsupportedArgumentsError,
    Value,
    as_set,
    enclose,
    ends,
    evaluated,
    filled,
    increasing,
    monotone,
    multiply,
    outward,
    range_of,
    rule,
    steep,
)

aten = torch.ops.aten


# Non-decreasing functions, computed at both ends to within so many u.
for op in (aten.exp, aten.exp2, aten.expm1, aten.log2, aten.log10, aten.erf, aten.sinh, aten.asin, aten.atan):
    increasing(op.default, ulps=4)
for op in (aten.asinh, aten.acosh, aten.atanh):
    increasing(op.default, ulps=8)
log = increasing(aten.log.default, ulps=4)
log1p = increasing(aten.log1p.default, ulps=4)


@rule(aten.sqrt.default, ulps=2)
def sqrt(x: Interval) -> Interval:
    return monotone(steep(torch.sqrt), x, ulps=2)


def _decreasing(function: Callable[[Tensor], Tensor], x: Interval, ulps: float) -> Interval:
    """The range of a non-increasing function, whose value at 0 is not 0."""
    lower, upper = ends(x)
    return enclose(function(upper), function(lower), ulps)


def _register_decreasing(op: Any, ulps: float) -> None:
    rule(op, ulps=ulps)(lambda x: _decreasing(op, x, ulps))


for op in (aten.rsqrt, aten.acos, aten.erfc):
    _register_decreasing(op.default, ulps=4)


@rule(aten.erfinv.default, ulps=16)
def erfinv(x: Interval) -> Interval:
    """A rational approximation with two Newton steps, each of which divides by the density."""
    return monotone(torch.erfinv, x, ulps=64)


@rule(aten.cosh.default, ulps=4)
def cosh(x: Interval) -> Interval:
    return range_of(torch.cosh, x, [(0.0, 1.0)], ulps=4)


@rule(aten.special_entr.default, ulps=8)
def entr(x: Interval) -> Interval:
    """−x·log x, greatest at 1/e."""
    return range_of(torch.special.entr, x, [(1 / math.e, 1 / math.e)], ulps=8)


# --- the gamma function -----------------------------------------------------------------------------------------

_LEAST_GAMMA = (1.4616321449683622, -0.12148629053584961)  # where digamma is 0, and log Γ there


def _on_positive(x: Interval, out: Interval) -> Interval:
    """What holds of positive numbers; a set that reaches 0 has no bound."""
    return filled(out, ~(ends(x)[0] > 0), rad=math.inf)


@rule(aten.lgamma.default, ulps=None)
def lgamma(x: Interval) -> Interval:
    """Convex on positive numbers; around its zeros, 1 and 2, it is off by a few u."""
    return _on_positive(x, range_of(torch.lgamma, x, [_LEAST_GAMMA], ulps=16, absolute=16))


@rule(aten.digamma.default, ulps=None)
def digamma(x: Interval) -> Interval:
    """Increasing on positive numbers: a sum of ten fractions and a series, off by a few u of each."""
    return _on_positive(x, monotone(torch.digamma, x, ulps=64, absolute=64))


@rule(aten.polygamma.default, ulps=None, set_first="self")
def polygamma(n: int, x: Interval) -> Interval:
    """Of n = 1, which decreases on positive numbers. PyTorch breaks the series off from x = 6.5 on before 1/(30 x⁹), in
    whatever dtype, which is less than 2e-9.
    """
    if n != 1:
        raise UnsupportedArgumentsError(f"is asked for derivative {n} of digamma; only the first has a rule")
    lower, upper = ends(x)
    (at_lower, at_upper), off = (aten.polygamma(1, end) for end in (lower, upper)), 4e-9 / rd.unit(x.dtype)
    return _on_positive(x, enclose(at_upper, at_lower, ulps=64, absolute=off))


# --- powers ---------------------------------------------------------------------------------------------------


@rule(aten.pow.Tensor_Scalar, ulps=16)
def pow_(x: Interval, exponent: float) -> Interval:
    """Negative powers are reciprocals; where a root meets a negative number the result is NaN, which has no bound."""
    if exponent < 0:
        return reciprocal(pow_(x, -exponent))
    if exponent == 0:
        return Interval.of(torch.ones_like(x.mid), torch.zeros_like(x.rad))
    power: Callable[[Tensor], Tensor] = lambda t: aten.pow(t, exponent)  # noqa: E731
    critical = [(0.0, 0.0)] if exponent % 2 == 0 else []
    out = range_of(steep(power) if exponent < 1 else power, x, critical, ulps=8)
    # An exponent that float32 rounds costs |exponent·log x| u, which is at most 104 u where the result is a number.
    return out if rd.stored(exponent, torch.float32)[1] == 0 else evaluated(out, 128)


@rule(aten.pow.Scalar, ulps=None, set_first="exponent")
def pow_scalar(base: float, x: Interval) -> Interval:
    """A positive number to the power of a set is monotone; of other bases only whole powers are numbers."""
    if not base > 0:
        raise UnsupportedArgumentsError(f"raises {base} to powers in a set; only positive bases have such powers")
    if base >= 1:
        return monotone(lambda t: aten.pow(base, t), x, ulps=8)
    return _decreasing(lambda t: aten.pow(base, t), x, ulps=8)


@rule(aten.pow.Tensor_Tensor, ulps=None)
def pow_tensor(base: Value, exponent: Value) -> Interval:
    """Of positive bases it is monotone in each argument, so that the corners have its extremes; other bases have the
    power of a whole number alone, which is even, as that of |base|, or odd, and increasing where it is positive.
    """
    (bl, bu), (el, eu) = ends(base), ends(exponent)
    whole = (el == eu) & (el == torch.floor(el))
    odd = whole & (torch.remainder(el, 2) != 0)
    al, au = ends(abs_(as_set(base)))
    bl, bu = torch.where(whole & ~odd, al, bl), torch.where(whole & ~odd, au, bu)
    corners = [torch.pow(b, e) for b in (bl, bu) for e in (el, eu)]
    out = enclose(reduce(torch.minimum, corners), reduce(torch.maximum, corners), ulps=8)
    fits = (bl > 0) | ((bl >= 0) & (el > 0)) | ((bl == bu) & (el == eu)) | (odd & ((el > 0) | (bu < 0)))
    return Interval.of(out.mid, torch.where(fits, out.rad, math.inf))


# --- waves and angles -----------------------------------------------------------------------------------------


@rule(aten.sin.default, ulps=0)
def sin(x: Interval) -> Interval:
    return _wave(torch.sin, x, 0.25)


@rule(aten.cos.default, ulps=0)
def cos(x: Interval) -> Interval:
    return _wave(torch.cos, x, 0.0)


def _wave(function: Callable[[Tensor], Tensor], x: Interval, crest: float) -> Interval:
    """±1 where a crest (at so many periods of 2π) or a trough lies inside, else between the values at the ends.

    Where an end is that close to an extremum that rounding hides on which side, within 8u of the number of periods, the
    extremum counts as inside, which moves the bound by the square of that. Beyond 1e6 periods nothing is known.
    """
    lower, upper = ends(x)
    near = 8 * rd.unit(x.dtype) if outward() else 0.0

    def inside(phase: float) -> Tensor:
        first, last = lower.detach() / (2 * math.pi) - phase, upper.detach() / (2 * math.pi) - phase
        return torch.ceil(first - near * (1 + first.abs())) <= torch.floor(last + near * (1 + last.abs()))

    at_lower, at_upper = function(lower), function(upper)
    far = ~(torch.maximum(lower.abs(), upper.abs()) < 2e6 * math.pi) & (lower < upper)
    least = torch.where((inside(crest + 0.5) & (lower < upper)) | far, -1.0, torch.minimum(at_lower, at_upper))
    greatest = torch.where((inside(crest) & (lower < upper)) | far, 1.0, torch.maximum(at_lower, at_upper))
    least, greatest = (torch.where(lower.isnan() | upper.isnan(), lower, t) for t in (least, greatest))
    return evaluated(enclose(least, greatest, ulps=4), 4)


@rule(aten.tan.default, ulps=8)
def tan(x: Interval) -> Interval:
    """Increasing between two poles; a set that may hold one has no bound. Beyond 1e6 periods nothing is known."""
    lower, upper = ends(x)
    out = enclose(torch.tan(lower), torch.tan(upper), ulps=8)
    near = 8 * rd.unit(x.dtype) if outward() else 0.0
    first, last = lower.detach() / math.pi - 0.5, upper.detach() / math.pi - 0.5
    pole = torch.ceil(first - near * (1 + first.abs())) <= torch.floor(last + near * (1 + last.abs()))
    pole = (pole | ~(torch.maximum(first.abs(), last.abs()) < 2e6)) & (lower < upper)
    return filled(out, pole, rad=math.inf)


@rule(aten.atan2.default, ulps=8)
def atan2(y: Value, x: Value) -> Interval:
    """The angle of a box of the plane: that of one of its corners, unless it holds 0 or meets the half-line where the
    angle jumps from π to −π. There it is π, but −π in arithmetic that has come to a −0.
    """
    (yl, yu), (xl, xu) = ends(y), ends(x)
    unsigned = [[torch.where(t == 0, 0.0, t) for t in pair] for pair in ((yl, yu), (xl, xu))]
    corners = [torch.atan2(a, b) for ys, xs in (((yl, yu), (xl, xu)), unsigned) for a in ys for b in xs]
    least, greatest = reduce(torch.minimum, corners), reduce(torch.maximum, corners)
    point = (yl == yu) & (xl == xu)
    below = (yl <= 0) if rd.mode() == rd.Rounding.EVALUATED else (yl < 0) & ~point
    jumps = below & (yu >= 0) & (xl <= 0)
    out = enclose(torch.where(jumps, -math.pi, least), torch.where(jumps, math.pi, greatest), ulps=8)
    return filled(out, point & (least == 0) & (greatest == 0))


@rule(aten.hypot.default, ulps=4)
def hypot(a: Value, b: Value) -> Interval:
    """It grows with the size of either."""
    sizes = [ends(abs_(as_set(x))) for x in (a, b)]
    (least, greatest) = (_hypot(*(size[i] for size in sizes)) for i in (0, 1))
    return filled(enclose(least, greatest, ulps=8), greatest == 0)


def _hypot(a: Tensor, b: Tensor) -> Tensor:
    """With the slope 0 at 0, where PyTorch's is NaN."""
    zero = (a == 0) & (b == 0)
    return torch.where(zero, 0.0, torch.hypot(torch.where(zero, 1.0, a), b))


# --- logarithms of sums, products with logarithms --------------------------------------------------------------


@rule(aten.logaddexp.default, ulps=8)
def logaddexp(a: Value, b: Value) -> Interval:
    """max + log1p(exp(−|a − b|)), which grows with both: a sum loses 2u of its terms where it cancels."""
    return _log_of_sum(torch.logaddexp, a, b)


@rule(aten.logaddexp2.default, ulps=8)
def logaddexp2(a: Value, b: Value) -> Interval:
    return _log_of_sum(torch.logaddexp2, a, b)


def _log_of_sum(function: Callable[[Tensor, Tensor], Tensor], a: Value, b: Value) -> Interval:
    (al, au), (bl, bu) = ends(a), ends(b)
    absolute = 8 * (torch.maximum(al.abs(), au.abs()).clamp(max=1e300) + 1)
    lost = absolute * rd.unit(absolute.dtype) if outward() else 0.0
    out = enclose(function(al, bl) - lost, function(au, bu) + lost, ulps=8)
    if rd.mode() == rd.Rounding.EVALUATED:
        return evaluated(out, 8, absolute)
    return out


@rule(aten.xlogy.Tensor, aten.xlogy.Scalar_Other, ulps=8)
@rule(aten.xlogy.Scalar_Self, ulps=8, set_first="other")
def xlogy(x: Any, y: Any) -> Interval:
    """x·log y, and 0 where x is the point 0, whatever y is."""
    if isinstance(y, Interval):
        return _product_with_log(x, log(y), y)
    dtype = torch.float64 if outward() or not isinstance(y, Tensor) else x.dtype
    return _product_with_log(x, torch.log(torch.as_tensor(y, dtype=dtype)), y)


@rule(aten.special_xlog1py.default, ulps=8)
def xlog1py(x: Value, y: Value) -> Interval:
    """x·log(1 + y), and 0 where x is the point 0."""
    return _product_with_log(x, log1p(y) if isinstance(y, Interval) else torch.log1p(y.to(x.dtype)), y)


def _product_with_log(x: Any, logarithm: Value, y: Any) -> Interval:
    if outward() and isinstance(logarithm, Tensor):
        logarithm = enclose(logarithm, logarithm, ulps=4)
    out = multiply(x, logarithm)
    zero = (x.mid == 0) & (x.rad == 0) if isinstance(x, Interval) else torch.as_tensor(x) == 0
    zero = zero & ~(torch.as_tensor(y.mid if isinstance(y, Interval) else y).isnan())
    return filled(out, zero)


@rule(aten.logit.default, ulps=None)
def logit(x: Interval, eps: float | None = None) -> Interval:
    """log(x/(1 − x)), increasing: the quotient loses 2u of itself and of 1, and log makes that an absolute error."""
    if eps is not None:
        x = clamp(x, eps, 1 - eps)
    return monotone(lambda t: torch.logit(t), x, ulps=8, absolute=16)


@rule(aten.logit_backward.default, ulps=None)
def logit_backward(grad: Value, x: Value, eps: float | None = None) -> Interval:
    """The slope 1/(x(1 − x)) is 4 at 1/2 and grows towards both ends; beyond ``eps`` it is 0."""
    x = as_set(x)
    inside = x if eps is None else clamp(x, eps, 1 - eps)
    slope = reciprocal(range_of(lambda t: t * (1 - t), inside, [(0.5, 0.25)], ulps=4, absolute=4))
    if eps is None:
        outside = (x.mid - x.rad < 0) | (x.mid + x.rad > 1)
        return multiply(grad, Interval.of(torch.where(outside, torch.nan, slope.mid), slope.rad))
    kept = logical_and(ge(x, eps), le(x, 1 - eps))
    return multiply(grad, where(kept, slope, torch.zeros_like(x.mid)))
