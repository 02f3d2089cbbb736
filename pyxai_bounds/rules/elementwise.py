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
)

aten = torch.ops.aten


def _refuse_truth(a: Any, b: Any) -> None:
    """A sum or product of two booleans is another boolean, not a number."""
    if all(isinstance(x, Truth) or (isinstance(x, Tensor) and x.dtype == torch.bool) for x in (a, b)):
        raise UnsupportedArgumentsError("adds or multiplies truth values; use | and &, or convert them with .to(dtype)")


def _scaled(x: Any, factor: float) -> Any:
    """x·factor; of numbers the exact product, of a tensor one that is not rounded where bounds are proofs."""
    if isinstance(x, Interval):
        return multiply(x, factor)
    if not outward():
        return x * factor
    if isinstance(x, Tensor):
        return multiply(Interval.point(x if x.is_floating_point() else x.double()), factor)
    return Fraction(x) * Fraction(factor) if math.isfinite(x) and math.isfinite(factor) else x * factor


@rule(aten.add.Tensor, aten.add.Scalar, precision="own", ulps=0)
def add(a: Any, b: Any, alpha: float = 1) -> Interval:
    _refuse_truth(a, b)
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
    _refuse_truth(a, b)
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
    return x if isinstance(x, Interval) else Interval.point(x)


@rule(aten.erf.default, ulps=4)
def erf(x: Interval) -> Interval:
    return monotone(torch.erf, x, ulps=4)


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
