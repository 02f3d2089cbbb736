"""Elementwise arithmetic, and what selects between numbers."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from pyxai_bounds import rounding as rd
from pyxai_bounds.interval import Interval
from pyxai_bounds.rules.logic import eq, gt, logical_and, logical_or, where
from pyxai_bounds.rules.registry import (
    Truth,
    Value,
    as_set,
    between,
    enclose,
    ends,
    evaluated,
    filled,
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


@rule(aten.neg.default, aten._neg_view.default, precision="exact")
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
    touches = ~((lower > 0) | (upper < 0))
    lower, upper = (torch.where(touches, 1.0, end) for end in (lower, upper))  # or gradients would be NaN there
    out = enclose(1 / upper, 1 / lower, ulps=1)
    return filled(out, touches, rad=math.inf)


@rule(aten.abs.default, precision="exact")
def abs_(x: Interval) -> Interval:
    return range_of(torch.abs, x, [(0.0, 0.0)], ulps=0)


@rule(aten.sign.default, aten.sgn.default, precision="exact")
def sign(x: Interval) -> Interval:
    return monotone(lambda t: torch.where(t.isnan(), t, torch.sign(t)), x, ulps=0)


def square(x: Interval) -> Interval:
    return evaluated(range_of(torch.square, x, [(0.0, 0.0)], ulps=2), 2)


@rule(aten.addcmul.default, ulps=2)
def addcmul(x: Value, a: Value, b: Value, *, value: float = 1) -> Interval:
    return plus(x, _scaled(square(as_set(a)) if a is b else multiply(as_set(a), b), value))


@rule(aten.addcdiv.default, ulps=4)
def addcdiv(x: Value, a: Value, b: Value, *, value: float = 1) -> Interval:
    return plus(x, _scaled(div(as_set(a), b), value))


@rule(aten.lerp.Scalar, aten.lerp.Tensor, ulps=4)
def lerp(a: Value, b: Value, weight: Any) -> Interval:
    """a + w(b − a) = (1 − w)a + wb: the first uses w once, the second a and b."""
    if not isinstance(weight, Tensor | Interval):
        weight = torch.as_tensor(weight, dtype=a.dtype, device=a.device)
    known = weight if isinstance(weight, Interval) or not outward() else singleton(weight)
    apart = plus(
        multiply(as_set(a), minus(1.0, known) if isinstance(known, Interval) else 1.0 - known),
        multiply(as_set(b), known),
    )
    if not isinstance(weight, Interval):
        return apart
    return within(plus(a, multiply(minus(as_set(b), a), weight)), *ends(apart))


# --- selection -----------------------------------------------------------------------------------------------


@rule(aten.clamp.default, aten.clamp.Tensor, precision="exact")
def clamp(x: Value, min: Any = None, max: Any = None) -> Interval:
    """Non-decreasing in the argument and in both limits."""
    lows, highs = zip(*(ends(v) for v in (x, min, max)), strict=True)
    return between(torch.clamp(*lows), torch.clamp(*highs))


@rule(aten.clamp_min.default, aten.clamp_min.Tensor, precision="exact")
def clamp_min(x: Value, min: Any) -> Interval:
    return clamp(x, min)


@rule(aten.clamp_max.default, aten.clamp_max.Tensor, precision="exact")
def clamp_max(x: Value, max: Any) -> Interval:
    return clamp(x, None, max)


@rule(aten.maximum.default, precision="exact")
def maximum(a: Value, b: Value) -> Interval:
    (al, au), (bl, bu) = ends(a), ends(b)
    return between(torch.maximum(al, bl), torch.maximum(au, bu))


@rule(aten.minimum.default, precision="exact")
def minimum(a: Value, b: Value) -> Interval:
    (al, au), (bl, bu) = ends(a), ends(b)
    return between(torch.minimum(al, bl), torch.minimum(au, bu))


@rule(aten.fmax.default, precision="exact")
def fmax(a: Value, b: Value) -> Interval:
    """As ``maximum``: a NaN is not passed over, for in a set it may be anything."""
    return maximum(a, b)


@rule(aten.fmin.default, precision="exact")
def fmin(a: Value, b: Value) -> Interval:
    return minimum(a, b)


@rule(aten.heaviside.default, precision="exact")
def heaviside(x: Value, values: Value) -> Interval:
    """0 below 0, 1 above, ``values`` at 0."""
    x = as_set(x)
    above = gt(x, 0)
    return where(eq(x, 0), values, Interval.of(above.mid, above.rad))


@rule(aten.nan_to_num.default, precision="exact")
def nan_to_num(x: Interval, *replacements: Any) -> Interval:
    """A number stays what it is; where nothing is known, nothing is."""
    infinite = x.mid.isinf() & (x.rad == 0)
    return Interval.of(torch.where(infinite, aten.nan_to_num(x.mid, *replacements), x.mid), x.rad)
