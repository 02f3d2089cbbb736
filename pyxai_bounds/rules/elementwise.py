"""Elementwise arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyxai_bounds.interval import Interval
from pyxai_bounds.rules.registry import (
    Truth,
    UnsupportedArgumentsError,
    Value,
    between,
    ends,
    mid_of,
    monotone,
    multiply,
    range_of,
    rule,
)

aten = torch.ops.aten


def _add(a: Any, b: Any, factor: float) -> Interval:
    mid = mid_of(a) + factor * mid_of(b) if factor not in (1, -1) else _plus(mid_of(a), mid_of(b), factor)
    rads = [r for r in (_radius(a, 1), _radius(b, abs(factor))) if r is not None]
    rad = rads[0] if len(rads) == 1 else rads[0] + rads[1]
    return Interval.of(mid, rad.expand_as(mid).to(mid.dtype))


def _refuse_truth(a: Any, b: Any) -> None:
    """A sum or product of two booleans is another boolean, not a number."""
    if all(isinstance(x, Truth) or (isinstance(x, Tensor) and x.dtype == torch.bool) for x in (a, b)):
        raise UnsupportedArgumentsError("adds or multiplies truth values; use | and &, or convert them with .to(dtype)")


def _plus(a: Any, b: Any, sign: float) -> Tensor:
    return a + b if sign == 1 else a - b


def _radius(x: Any, factor: float) -> Tensor | None:
    if not isinstance(x, Interval):
        return None
    return x.rad if factor == 1 else x.rad * factor


@rule(aten.add.Tensor, aten.add.Scalar)
def add(a: Any, b: Any, alpha: float = 1) -> Interval:
    _refuse_truth(a, b)
    return _add(a, b, alpha)


@rule(aten.sub.Tensor, aten.sub.Scalar)
def sub(a: Any, b: Any, alpha: float = 1) -> Interval:
    if a is b and alpha == 1:
        return Interval.of(a.mid - a.mid, a.rad - a.rad)  # 0, or NaN where nothing is known
    return _add(a, b, -alpha)


@rule(aten.rsub.Scalar, aten.rsub.Tensor)
def rsub(a: Any, b: Any, alpha: float = 1) -> Interval:
    return _add(b, a, -alpha)


@rule(aten.neg.default)
def neg(x: Interval) -> Interval:
    return Interval.of(-x.mid, x.rad)


@rule(aten.mul.Tensor, aten.mul.Scalar)
def mul(a: Any, b: Any) -> Interval:
    _refuse_truth(a, b)
    return square(a) if a is b else multiply(a, b)


@rule(aten.div.Tensor, aten.div.Scalar)
def div(a: Any, b: Any) -> Interval:
    if isinstance(b, Interval):
        return multiply(a, reciprocal(b))
    return Interval.of(a.mid / b, a.rad / abs(b))


@rule(aten.reciprocal.default)
def reciprocal(x: Interval) -> Interval:
    """Decreasing on either side of 0; a set that touches 0 has no bound, which is (0, ∞)."""
    lower, upper = ends(x)
    out = between(1 / upper, 1 / lower)
    touches = ~((lower > 0) | (upper < 0))
    unbounded = torch.full_like(lower, float("inf"))
    return Interval.of(torch.where(touches, 0.0, out.mid), torch.where(touches, unbounded, out.rad))


@rule(aten.abs.default)
def abs_(x: Interval) -> Interval:
    return range_of(torch.abs, x, [(0.0, 0.0)])


@rule(aten.sign.default, aten.sgn.default)
def sign(x: Interval) -> Interval:
    return monotone(lambda t: torch.where(t.isnan(), t, torch.sign(t)), x)


def square(x: Interval) -> Interval:
    return range_of(torch.square, x, [(0.0, 0.0)])


@rule(aten.pow.Tensor_Scalar)
def pow_(x: Interval, exponent: float) -> Interval:
    """Negative powers are reciprocals; where a root meets a negative number the result is NaN, which has no bound."""
    if exponent < 0:
        return reciprocal(pow_(x, -exponent))
    if exponent == 0:
        return Interval.of(torch.ones_like(x.mid), torch.zeros_like(x.rad))
    return range_of(lambda t: aten.pow(t, exponent), x, [(0.0, 0.0)] if exponent % 2 == 0 else [])


@rule(aten.sqrt.default)
def sqrt(x: Interval) -> Interval:
    return monotone(torch.sqrt, x)


@rule(aten.rsqrt.default)
def rsqrt(x: Interval) -> Interval:
    lower, upper = ends(x)
    return between(torch.rsqrt(upper), torch.rsqrt(lower))


@rule(aten.exp.default)
def exp(x: Interval) -> Interval:
    return monotone(torch.exp, x)


@rule(aten.expm1.default)
def expm1(x: Interval) -> Interval:
    return monotone(torch.expm1, x)


@rule(aten.log.default)
def log(x: Interval) -> Interval:
    return monotone(torch.log, x)


@rule(aten.log1p.default)
def log1p(x: Interval) -> Interval:
    return monotone(torch.log1p, x)


@rule(aten.erf.default)
def erf(x: Interval) -> Interval:
    return monotone(torch.erf, x)


@rule(aten.clamp.default, aten.clamp.Tensor)
def clamp(x: Value, min: Any = None, max: Any = None) -> Interval:
    """Non-decreasing in the argument and in both limits."""
    lows, highs = zip(*(ends(v) if isinstance(v, (Tensor, Interval)) else (v, v) for v in (x, min, max)), strict=True)
    return between(torch.clamp(*lows), torch.clamp(*highs))


@rule(aten.clamp_min.default)
def clamp_min(x: Interval, min: float) -> Interval:
    return clamp(x, min)


@rule(aten.clamp_max.default)
def clamp_max(x: Interval, max: float) -> Interval:
    return clamp(x, None, max)


@rule(aten.maximum.default)
def maximum(a: Value, b: Value) -> Interval:
    (al, au), (bl, bu) = ends(a), ends(b)
    return between(torch.maximum(al, bl), torch.maximum(au, bu))


@rule(aten.minimum.default)
def minimum(a: Value, b: Value) -> Interval:
    (al, au), (bl, bu) = ends(a), ends(b)
    return between(torch.minimum(al, bl), torch.minimum(au, bu))
