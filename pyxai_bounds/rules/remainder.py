"""Rounding to whole numbers, and remainders: the places of the steps are exact where the argument is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyxai_bounds import rounding as rd
from pyxai_bounds.interval import Interval
from pyxai_bounds.rules.elementwise import div
from pyxai_bounds.rules.registry import (
    between,
    ends,
    increasing,
    minus,
    multiply,
    outward,
    rule,
    singleton,
)

aten = torch.ops.aten


floor = increasing(aten.floor.default)
round_ = increasing(aten.round.default)
trunc = increasing(aten.trunc.default)
increasing(aten.ceil.default)


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
        """Exact below 2⁵⁰: PyTorch's floor starts from the exact remainder, its trunc from a rounded quotient, so that
        1 by 0.1 is 10 in float64, where in real arithmetic it is 9.
        """
        if rounding_mode == "trunc" and not outward():
            return torch.div(t, b, rounding_mode="trunc")
        floored = torch.div(t, b, rounding_mode="floor")
        if rounding_mode == "floor":
            return floored
        return torch.where(floored < 0, -torch.div(-t, b, rounding_mode="floor"), floored)

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
