"""Elementwise arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from pyxai_bounds import rounding as rd
from pyxai_bounds.interval import Interval
from pyxai_bounds.rules.logic import eq, ge, gt, le, logical_and, logical_or, where
from pyxai_bounds.rules.registry import (
    Truth,
    UnsupportedArgumentsError,
    Value,
    between,
    enclose,
    ends,
    evaluated,
    minus,
    monotone,
    multiply,
    outward,
    plus,
    range_of,
    rule,
    settle,
    singleton,
    within,
)

aten = torch.ops.aten


def _are_truths(a: Any, b: Any) -> bool:
    """A sum or product of two booleans is another boolean, not a number."""
    return all(isinstance(x, Truth) or (isinstance(x, Tensor) and x.dtype == torch.bool) for x in (a, b))


def _scaled(x: Any, factor: float) -> Any:
    """x·factor; of numbers the exact product, of a tensor one that is not rounded where bounds are proofs."""
    if isinstance(x, Interval):
        return multiply(x, factor)
    if not outward():
        return x * factor
    if isinstance(x, Tensor):
        return multiply(singleton(x if x.is_floating_point() else x.double()), factor)
    return Fraction(x) * Fraction(factor) if math.isfinite(x) and math.isfinite(factor) else x * factor


@rule(aten.add.Tensor, aten.add.Scalar, precision="own", ulps=0)
def add(a: Any, b: Any, alpha: float = 1) -> Interval:
    if _are_truths(a, b) and alpha:
        return logical_or(a, b)
    if alpha == 1:
        return plus(a, b)
    if alpha == -1:
        return minus(a, b)
    return plus(a, _scaled(b, alpha))


@rule(aten.sub.Tensor, aten.sub.Scalar, precision="own", ulps=0)
def sub(a: Any, b: Any, alpha: float = 1) -> Interval:
    if a is b and alpha == 1:
        return Interval.of(a.mid - a.mid, a.rad - a.rad)  # 0, or NaN where nothing is known
    return add(a, b, -alpha)


@rule(aten.rsub.Scalar, aten.rsub.Tensor, precision="own", ulps=0)
def rsub(a: Any, b: Any, alpha: float = 1) -> Interval:
    return add(b, a, -alpha)


@rule(aten.neg.default, precision="exact")
def neg(x: Interval) -> Interval:
    return Interval.of(-x.mid, x.rad)


@rule(aten.mul.Tensor, aten.mul.Scalar, precision="own", ulps=0)
def mul(a: Any, b: Any) -> Interval:
    if _are_truths(a, b):
        return logical_and(a, b)
    return square(a) if a is b else multiply(a, b)


@rule(aten.div.Tensor, aten.div.Scalar, ulps=3)
def div(a: Any, b: Any) -> Interval:
    """By a point it loses one rounding and underflow; a divisor of 0 gives infinities, which certify nothing."""
    if isinstance(b, Interval):
        return multiply(a, reciprocal(b))
    quotient = settle(a.mid / b, a.rad / abs(b), 2)
    if not outward():
        return quotient
    some = (a.mid != 0) | (a.rad != 0)
    return Interval.of(quotient.mid, quotient.rad + some.to(quotient.dtype) * (2 * rd.tiny(quotient.dtype)))


@rule(aten.reciprocal.default, ulps=2)
def reciprocal(x: Interval) -> Interval:
    """Decreasing on either side of 0; a set that touches 0 has no bound, which is (0, ∞)."""
    lower, upper = ends(x)
    out = enclose(1 / upper, 1 / lower, ulps=1)
    touches = ~((lower > 0) | (upper < 0))
    unbounded = torch.full_like(lower, float("inf"))
    return Interval.of(torch.where(touches, 0.0, out.mid), torch.where(touches, unbounded, out.rad))


@rule(aten.abs.default, precision="exact")
def abs_(x: Interval) -> Interval:
    return range_of(torch.abs, x, [(0.0, 0.0)], ulps=0)


@rule(aten.sign.default, aten.sgn.default, precision="exact")
def sign(x: Interval) -> Interval:
    return monotone(lambda t: torch.where(t.isnan(), t, torch.sign(t)), x, ulps=0)


def square(x: Interval) -> Interval:
    return evaluated(range_of(torch.square, x, [(0.0, 0.0)], ulps=2), 2)


@rule(aten.pow.Tensor_Scalar, ulps=16)
def pow_(x: Interval, exponent: float) -> Interval:
    """Negative powers are reciprocals; where a root meets a negative number the result is NaN, which has no bound."""
    if exponent < 0:
        return reciprocal(pow_(x, -exponent))
    if exponent == 0:
        return Interval.of(torch.ones_like(x.mid), torch.zeros_like(x.rad))
    out = range_of(lambda t: aten.pow(t, exponent), x, [(0.0, 0.0)] if exponent % 2 == 0 else [], ulps=8)
    # An exponent that float32 rounds costs |exponent·log x| u, which is at most 104 u where the result is a number.
    return out if rd.stored(exponent, torch.float32)[1] == 0 else evaluated(out, 128)


@rule(aten.sqrt.default, ulps=2)
def sqrt(x: Interval) -> Interval:
    return monotone(torch.sqrt, x, ulps=2)


@rule(aten.rsqrt.default, ulps=4)
def rsqrt(x: Interval) -> Interval:
    lower, upper = ends(x)
    return enclose(torch.rsqrt(upper), torch.rsqrt(lower), ulps=4)


@rule(aten.exp.default, ulps=4)
def exp(x: Interval) -> Interval:
    return monotone(torch.exp, x, ulps=4)


@rule(aten.expm1.default, ulps=4)
def expm1(x: Interval) -> Interval:
    return monotone(torch.expm1, x, ulps=4)


@rule(aten.log.default, ulps=4)
def log(x: Interval) -> Interval:
    return monotone(torch.log, x, ulps=4)


@rule(aten.log1p.default, ulps=4)
def log1p(x: Interval) -> Interval:
    return monotone(torch.log1p, x, ulps=4)


@rule(aten.exp2.default, ulps=4)
def exp2(x: Interval) -> Interval:
    return monotone(torch.exp2, x, ulps=4)


@rule(aten.log2.default, ulps=4)
def log2(x: Interval) -> Interval:
    return monotone(torch.log2, x, ulps=4)


@rule(aten.log10.default, ulps=4)
def log10(x: Interval) -> Interval:
    return monotone(torch.log10, x, ulps=4)


@rule(aten.atan.default, ulps=4)
def atan(x: Interval) -> Interval:
    return monotone(torch.atan, x, ulps=4)


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


@rule(aten.addcmul.default, ulps=2)
def addcmul(x: Value, a: Value, b: Value, *, value: float = 1) -> Interval:
    return plus(x, _scaled(square(_as_set(a)) if a is b else multiply(_as_set(a), b), value))


@rule(aten.addcdiv.default, ulps=4)
def addcdiv(x: Value, a: Value, b: Value, *, value: float = 1) -> Interval:
    return plus(x, _scaled(div(_as_set(a), b), value))


def _as_set(x: Value) -> Interval:
    return x if isinstance(x, Interval) else singleton(x)


@rule(aten.erf.default, ulps=4)
def erf(x: Interval) -> Interval:
    return monotone(torch.erf, x, ulps=4)


@rule(aten.erfc.default, ulps=4)
def erfc(x: Interval) -> Interval:
    return _decreasing(torch.erfc, x, ulps=4)


@rule(aten.erfinv.default, ulps=16)
def erfinv(x: Interval) -> Interval:
    """A rational approximation with two Newton steps, each of which divides by the density."""
    return monotone(torch.erfinv, x, ulps=64)


@rule(aten.sinh.default, ulps=4)
def sinh(x: Interval) -> Interval:
    return monotone(torch.sinh, x, ulps=4)


@rule(aten.cosh.default, ulps=4)
def cosh(x: Interval) -> Interval:
    return range_of(torch.cosh, x, [(0.0, 1.0)], ulps=4)


@rule(aten.asin.default, ulps=4)
def asin(x: Interval) -> Interval:
    return monotone(torch.asin, x, ulps=4)


@rule(aten.acos.default, ulps=4)
def acos(x: Interval) -> Interval:
    return _decreasing(torch.acos, x, ulps=4)


@rule(aten.asinh.default, ulps=8)
def asinh(x: Interval) -> Interval:
    return monotone(torch.asinh, x, ulps=8)


@rule(aten.acosh.default, ulps=8)
def acosh(x: Interval) -> Interval:
    return monotone(torch.acosh, x, ulps=8)


@rule(aten.atanh.default, ulps=8)
def atanh(x: Interval) -> Interval:
    return monotone(torch.atanh, x, ulps=8)


def _decreasing(function: Callable[[Tensor], Tensor], x: Interval, ulps: float) -> Interval:
    return neg(monotone(lambda t: -function(t), x, ulps=ulps))


@rule(aten.tan.default, ulps=8)
def tan(x: Interval) -> Interval:
    """Increasing between two poles; a set that may hold one has no bound. Beyond 1e6 periods nothing is known."""
    lower, upper = ends(x)
    out = enclose(torch.tan(lower), torch.tan(upper), ulps=8)
    near = 8 * rd.unit(x.dtype) if outward() else 0.0
    first, last = lower.detach() / math.pi - 0.5, upper.detach() / math.pi - 0.5
    pole = torch.ceil(first - near * (1 + first.abs())) <= torch.floor(last + near * (1 + last.abs()))
    pole = (pole | ~(torch.maximum(first.abs(), last.abs()) < 2e6)) & (lower < upper)
    unbounded = torch.full_like(lower, float("inf"))
    return Interval.of(torch.where(pole, 0.0, out.mid), torch.where(pole, unbounded, out.rad))


@rule(aten.atan2.default, ulps=8)
def atan2(y: Value, x: Value) -> Interval:
    """The angle of a box of the plane: that of one of its corners, unless it holds 0 or meets the half-line where the
    angle jumps from π to −π.
    """
    (yl, yu), (xl, xu) = ends(y), ends(x)
    corners = [torch.atan2(a, b) for a in (yl, yu) for b in (xl, xu)]
    at = corners[0]
    least, greatest = at, at
    for corner in corners[1:]:
        least, greatest = torch.minimum(least, corner), torch.maximum(greatest, corner)
    point = (yl == yu) & (xl == xu)
    jumps = (yl < 0) & (yu >= 0) & (xl <= 0) & ~point
    out = enclose(torch.where(jumps, -math.pi, least), torch.where(jumps, math.pi, greatest), ulps=8)
    exact = point & (at == 0)
    return Interval.of(torch.where(exact, 0.0, out.mid), torch.where(exact, 0.0, out.rad))


@rule(aten.hypot.default, ulps=4)
def hypot(a: Value, b: Value) -> Interval:
    """It grows with the size of either."""
    sizes = [ends(abs_(_as_set(x))) for x in (a, b)]
    (least, greatest) = (torch.hypot(*(size[i] for size in sizes)) for i in (0, 1))
    out = enclose(least, greatest, ulps=8)
    zero = greatest == 0
    return Interval.of(torch.where(zero, 0.0, out.mid), torch.where(zero, 0.0, out.rad))


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
    return _product_with_log(x, log(y) if isinstance(y, Interval) else torch.log(torch.as_tensor(y).double()), y)


@rule(aten.special_xlog1py.default, ulps=8)
def xlog1py(x: Value, y: Value) -> Interval:
    """x·log(1 + y), and 0 where x is the point 0."""
    return _product_with_log(x, log1p(y) if isinstance(y, Interval) else torch.log1p(y), y)


def _product_with_log(x: Any, logarithm: Value, y: Any) -> Interval:
    if outward() and isinstance(logarithm, Tensor):
        logarithm = enclose(logarithm, logarithm, ulps=4)
    out = multiply(x, logarithm)
    zero = (x.mid == 0) & (x.rad == 0) if isinstance(x, Interval) else torch.as_tensor(x) == 0
    zero = zero & ~(torch.as_tensor(y.mid if isinstance(y, Interval) else y).isnan())
    return Interval.of(torch.where(zero, 0.0, out.mid), torch.where(zero, 0.0, out.rad))


@rule(aten.logit.default, ulps=None)
def logit(x: Interval, eps: float | None = None) -> Interval:
    """log(x/(1 − x)), increasing: the quotient loses 2u of itself and of 1, and log makes that an absolute error."""
    if eps is not None:
        x = clamp(x, eps, 1 - eps)
    return monotone(lambda t: torch.logit(t), x, ulps=8, absolute=16)


@rule(aten.logit_backward.default, ulps=None)
def logit_backward(grad: Value, x: Value, eps: float | None = None) -> Interval:
    """The slope 1/(x(1 − x)) is 4 at 1/2 and grows towards both ends; beyond ``eps`` it is 0."""
    x = _as_set(x)
    inside = x if eps is None else clamp(x, eps, 1 - eps)
    slope = reciprocal(range_of(lambda t: t * (1 - t), inside, [(0.5, 0.25)], ulps=4, absolute=4))
    if eps is None:
        outside = (x.mid - x.rad < 0) | (x.mid + x.rad > 1)
        return multiply(grad, Interval.of(torch.where(outside, torch.nan, slope.mid), slope.rad))
    kept = logical_and(ge(x, eps), le(x, 1 - eps))
    return multiply(grad, where(kept, slope, torch.zeros_like(x.mid)))


# --- whole numbers: the places of the steps are exact where the argument is -----------------------------------


@rule(aten.floor.default, precision="exact")
def floor(x: Interval) -> Interval:
    return monotone(torch.floor, x, ulps=0)


@rule(aten.ceil.default, precision="exact")
def ceil(x: Interval) -> Interval:
    return monotone(torch.ceil, x, ulps=0)


@rule(aten.round.default, precision="exact")
def round_(x: Interval) -> Interval:
    return monotone(torch.round, x, ulps=0)


@rule(aten.trunc.default, precision="exact")
def trunc(x: Interval) -> Interval:
    return monotone(torch.trunc, x, ulps=0)


@rule(aten.round.decimals, ulps=None)
def round_decimals(x: Interval, *, decimals: int) -> Interval:
    """Nothing is known of float32's: where it rounds x·10ⁿ to the middle between two whole numbers."""
    ten: float = 10.0 ** abs(decimals)
    return div(round_(multiply(x, ten)), ten) if decimals >= 0 else multiply(round_(div(x, ten)), ten)


@rule(aten.frac.default, precision="exact")
def frac(x: Interval) -> Interval:
    """x − trunc x, which floating point computes exactly: increasing between whole numbers, where it jumps to 0."""
    lower, upper = ends(x)
    same = torch.trunc(lower) == torch.trunc(upper)
    at_lower, at_upper = lower - torch.trunc(lower), upper - torch.trunc(upper)
    return between(torch.where(same, at_lower, lower.clamp(-1, 0)), torch.where(same, at_upper, upper.clamp(0, 1)))


@rule(aten.remainder.Tensor, aten.remainder.Scalar, ulps=None)
@rule(aten.remainder.Scalar_Tensor, ulps=None, set_first="other")
def remainder(x: Any, y: Any) -> Interval:
    """x − y·floor(x/y), of the sign of y."""
    if isinstance(y, Interval):
        return minus(x, multiply(floor(div(_numeric(x, y), y)), y))
    size = torch.as_tensor(y, dtype=x.dtype, device=x.device).abs()
    zero = torch.zeros_like(size)
    least, greatest = (
        torch.where(torch.as_tensor(y, device=x.device) < 0, a, b) for a, b in ((-size, zero), (zero, size))
    )
    return _modulo(x, lambda t: torch.remainder(t, y), size, least, greatest)


@rule(aten.fmod.Tensor, aten.fmod.Scalar, ulps=None)
def fmod(x: Any, y: Any) -> Interval:
    """x − y·trunc(x/y), of the sign of x."""
    if isinstance(y, Interval):
        return minus(x, multiply(trunc(div(_numeric(x, y), y)), y))
    size = torch.as_tensor(y, dtype=x.dtype, device=x.device).abs()
    lower, upper = ends(x)
    least, greatest = torch.maximum(lower, -size).clamp(max=0), torch.minimum(upper, size).clamp(min=0)
    return _modulo(x, lambda t: torch.fmod(t, y), size, least, greatest)


def _modulo(
    x: Interval, function: Callable[[Tensor], Tensor], size: Tensor, least: Tensor, greatest: Tensor
) -> Interval:
    """A remainder of steps ``size``: increasing where the set meets no step, else between the limits.

    It meets none where it is narrower than a step and the remainder grows from end to end: across a step it would fall
    by the step less the set's width, which is more than the rounding of either remainder.
    """
    lower, upper = ends(x)
    at_lower, at_upper = function(lower), function(upper)
    same = (((upper - lower) <= size * (1 - 2.0**-16)) & (at_upper >= at_lower)) | (lower == upper)
    out = between(at_lower, at_upper)
    if outward():
        lost = size * (4 * rd.unit(x.dtype)) + 2 * rd.tiny(x.dtype)
        out = between(*(torch.where(t == 0, 0.0, t + sign * lost) for t, sign in ((at_lower, -1), (at_upper, 1))))
    steps = between(least, greatest)
    known = ~(at_lower.isnan() | at_upper.isnan())
    mid = torch.where(known, torch.where(same, out.mid, steps.mid), torch.nan)
    return Interval.of(mid, torch.where(same, out.rad, steps.rad))


def _numeric(x: Any, y: Interval) -> Interval:
    return x if isinstance(x, Interval) else singleton(torch.as_tensor(x, dtype=y.dtype, device=y.device))


@rule(aten.div.Tensor_mode, aten.div.Scalar_mode, ulps=None)
def div_mode(a: Any, b: Any, *, rounding_mode: str | None) -> Interval:
    """The quotient, rounded to a whole number."""
    like = a if isinstance(a, Interval) else b
    if rounding_mode is None or isinstance(b, Interval):
        quotient = div(_numeric(a, like), b)
        return quotient if rounding_mode is None else floor(quotient) if rounding_mode == "floor" else trunc(quotient)

    def whole(t: Tensor) -> Tensor:
        """Exact below 2⁵⁰: PyTorch's floor starts from the exact remainder, its trunc from a rounded quotient."""
        floored = torch.div(t, b, rounding_mode="floor")
        return (
            floored
            if rounding_mode == "floor"
            else torch.where(floored < 0, -torch.div(-t, b, rounding_mode="floor"), floored)
        )

    at_lower, at_upper = (whole(t) for t in ends(a))
    least, greatest = torch.minimum(at_lower, at_upper), torch.maximum(at_lower, at_upper)
    if outward():
        least, greatest = (
            torch.where(t.abs() < 2.0**50, t, t + sign * t.abs() * (8 * rd.unit(t.dtype)))
            for t, sign in ((least, -1), (greatest, 1))
        )
    return between(least, greatest)


@rule(aten.floor_divide.default, aten.floor_divide.Scalar, ulps=None)
def floor_divide(a: Any, b: Any) -> Interval:
    return div_mode(a, b, rounding_mode="floor")


@rule(aten.lerp.Scalar, aten.lerp.Tensor, ulps=4)
def lerp(a: Value, b: Value, weight: Any) -> Interval:
    """a + w(b − a) = (1 − w)a + wb: the first uses w once, the second a and b."""
    if not isinstance(weight, Tensor | Interval):
        weight = torch.as_tensor(weight, dtype=a.dtype, device=a.device)
    known = weight if isinstance(weight, Interval) or not outward() else singleton(weight)
    apart = plus(
        multiply(_as_set(a), minus(1.0, known) if isinstance(known, Interval) else 1.0 - known),
        multiply(_as_set(b), known),
    )
    if not isinstance(weight, Interval):
        return apart
    return within(plus(a, multiply(minus(_as_set(b), a), weight)), *ends(apart))


@rule(aten.pow.Scalar, ulps=None, set_first="exponent")
def pow_scalar(base: float, x: Interval) -> Interval:
    """A positive number to the power of a set is monotone; of other bases only whole powers are numbers."""
    if not base > 0:
        raise UnsupportedArgumentsError(f"raises {base} to powers in a set; only positive bases have such powers")
    if base >= 1:
        return monotone(lambda t: aten.pow(base, t), x, ulps=8)
    return neg(monotone(lambda t: -aten.pow(base, t), x, ulps=8))


@rule(aten.pow.Tensor_Tensor, ulps=None)
def pow_tensor(base: Value, exponent: Value) -> Interval:
    """Of positive bases it is monotone in each argument, so that the corners have its extremes; other bases have the
    power of a whole number alone, which is even, as that of |base|, or odd, and increasing where it is positive.
    """
    (bl, bu), (el, eu) = ends(base), ends(exponent)
    whole = (el == eu) & (el == torch.floor(el))
    odd = whole & (torch.remainder(el, 2) != 0)
    al, au = ends(abs_(_as_set(base)))
    bl, bu = torch.where(whole & ~odd, al, bl), torch.where(whole & ~odd, au, bu)
    corners = [torch.pow(b, e) for b in (bl, bu) for e in (el, eu)]
    least, greatest = corners[0], corners[0]
    for corner in corners[1:]:
        least, greatest = torch.minimum(least, corner), torch.maximum(greatest, corner)
    out = enclose(least, greatest, ulps=8)
    fits = (bl > 0) | ((bl >= 0) & (el > 0)) | ((bl == bu) & (el == eu)) | (odd & ((el > 0) | (bu < 0)))
    return Interval.of(out.mid, torch.where(fits, out.rad, torch.full_like(out.rad, float("inf"))))


@rule(aten.heaviside.default, precision="exact")
def heaviside(x: Value, values: Value) -> Interval:
    """0 below 0, 1 above, ``values`` at 0."""
    x = _as_set(x)
    above = gt(x, 0)
    return where(eq(x, 0), values, Interval.of(above.mid, above.rad))


@rule(aten.special_entr.default, ulps=8)
def entr(x: Interval) -> Interval:
    """−x·log x, greatest at 1/e."""
    return range_of(torch.special.entr, x, [(1 / math.e, 1 / math.e)], ulps=8)


@rule(aten.nan_to_num.default, precision="exact")
def nan_to_num(x: Interval, *replacements: Any) -> Interval:
    """A number stays what it is; where nothing is known, nothing is."""
    infinite = x.mid.isinf() & (x.rad == 0)
    return Interval.of(torch.where(infinite, aten.nan_to_num(x.mid, *replacements), x.mid), x.rad)


@rule(aten.fmax.default, precision="exact")
def fmax(a: Value, b: Value) -> Interval:
    """As ``maximum``: a NaN is not passed over, for in a set it may be anything."""
    return maximum(a, b)


@rule(aten.fmin.default, precision="exact")
def fmin(a: Value, b: Value) -> Interval:
    return minimum(a, b)


@rule(aten.clamp.default, aten.clamp.Tensor, precision="exact")
def clamp(x: Value, min: Any = None, max: Any = None) -> Interval:
    """Non-decreasing in the argument and in both limits."""
    lows, highs = zip(*(ends(v) for v in (x, min, max)), strict=True)
    return between(torch.clamp(*lows), torch.clamp(*highs))


@rule(aten.clamp_min.default, precision="exact")
def clamp_min(x: Interval, min: float) -> Interval:
    return clamp(x, min)


@rule(aten.clamp_max.default, precision="exact")
def clamp_max(x: Interval, max: float) -> Interval:
    return clamp(x, None, max)


@rule(aten.maximum.default, precision="exact")
def maximum(a: Value, b: Value) -> Interval:
    (al, au), (bl, bu) = ends(a), ends(b)
    return between(torch.maximum(al, bl), torch.maximum(au, bu))


@rule(aten.minimum.default, precision="exact")
def minimum(a: Value, b: Value) -> Interval:
    (al, au), (bl, bu) = ends(a), ends(b)
    return between(torch.minimum(al, bl), torch.minimum(au, bu))
