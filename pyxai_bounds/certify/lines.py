"""Lines beside a function of one number: slope·x plus something in [least, most], for every x between two ends.

``forms`` puts them in the place of functions. All are in float64, and what is computed there is moved outward.

Source: the best line beside a convex function is parallel to its chord (Chebyshev; for affine forms Stolfi and de
Figueiredo, Self-validated numerical methods, 1997).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyxai_bounds.certify.differences import TINY
from pyxai_bounds.certify.properties import rounding_loss
from pyxai_bounds.interval import Interval

LOSS = rounding_loss(0)  # 128 u: more than a formula of a few steps loses, or a library's derivative


@dataclass(frozen=True)
class Line:
    """slope·x + [least, most] holds f(x). Elements of which nothing is known hold a NaN or an infinity."""

    slope: Tensor
    least: Tensor
    most: Tensor


@dataclass(frozen=True)
class Function:
    """What a line needs: enclosures of values, the derivative to within ``LOSS`` of itself, and where that is a slope.

    ``touch`` need not be exact: it says where a tangent is good, not whether it holds.
    """

    value: Callable[[Tensor], Interval]
    derivative: Callable[[Tensor], Tensor]
    touch: Callable[[Tensor], Tensor] | None = None


def _beside(value: Interval, slope: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of f(x) - slope·x."""
    step = slope * x
    lost = LOSS * (value.mid.abs() + value.rad + step.abs()) + TINY
    rest = value.mid - step
    return rest - value.rad - lost, rest + value.rad + lost


def _flat(f: Function, lower: Tensor, upper: Tensor, at: Tensor) -> Tensor:
    """The slope of the chord; of a set of one element, or next to one, the derivative there."""
    width = upper - lower
    chord = (f.value(upper).mid - f.value(lower).mid) / width
    narrow = width <= 1e-7 * torch.maximum(lower.abs(), upper.abs())
    return torch.where(narrow | ~chord.isfinite(), f.derivative(at), chord)


def _tangent(f: Function, slope: Tensor, t: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bounds of f(t) - slope·t, and how far the tangent there moves from it between the ends, wherever t is."""
    at_t = f.derivative(t)
    tilt = (at_t - slope).abs() + LOSS * (at_t.abs() + slope.abs()) + TINY
    return *_beside(f.value(t), slope, t), tilt * torch.maximum(upper - t, t - lower) * (1 + LOSS) + TINY


def convex(f: Function, lower: Tensor, upper: Tensor) -> Line:
    """f(x) - slope·x is convex: it is greatest at an end, and nowhere below a tangent."""
    middle = lower / 2 + upper / 2
    slope = _flat(f, lower, upper, middle)
    t = middle if f.touch is None else f.touch(slope)
    least, _, fall = _tangent(f, slope, torch.where((t > lower) & (t < upper), t, middle), lower, upper)
    most = torch.maximum(_beside(f.value(lower), slope, lower)[1], _beside(f.value(upper), slope, upper)[1])
    return Line(slope, _down(least - fall), most)


def _down(t: Tensor) -> Tensor:
    return t - LOSS * t.abs() - TINY


def concave(f: Function, lower: Tensor, upper: Tensor) -> Line:
    """As of -f, which is convex."""
    touch = f.touch
    mirrored = Function(
        lambda t: _negative(f.value(t)),
        lambda t: -f.derivative(t),
        None if touch is None else lambda slope: touch(-slope),
    )
    line = convex(mirrored, lower, upper)
    return Line(-line.slope, -line.most, -line.least)


def _negative(x: Interval) -> Interval:
    return Interval.of(-x.mid, x.rad)


def sigmoidal(f: Function, lower: Tensor, upper: Tensor) -> Line:
    """Convex below 0, concave above, and odd but for a number, as its positive ``touch``."""
    assert f.touch is not None
    touch = f.touch
    below = convex(Function(f.value, f.derivative, lambda slope: -touch(slope)), lower, upper)
    above = concave(f, lower, upper)
    return _where(upper <= 0, below, _where(lower >= 0, above, _bent(f, touch, lower, upper)))


def _bent(f: Function, touch: Callable[[Tensor], Tensor], lower: Tensor, upper: Tensor) -> Line:
    """Across 0: f(x) - slope·x is greatest at 0, at the lower end, or under a tangent above 0; and so its least."""
    zero = torch.zeros_like(lower)
    slope = _flat(f, lower, upper, zero)
    t = touch(slope)
    t = torch.where(t > 0, t, zero)
    _, peak, rise = _tangent(f, slope, torch.minimum(t, upper.clamp(min=0)), zero, upper)
    trough, _, fall = _tangent(f, slope, torch.maximum(-t, lower.clamp(max=0)), lower, zero)
    at_zero = _beside(f.value(zero), slope, zero)
    least = torch.minimum(torch.minimum(trough - fall, _beside(f.value(upper), slope, upper)[0]), at_zero[0])
    most = torch.maximum(torch.maximum(peak + rise, _beside(f.value(lower), slope, lower)[1]), at_zero[1])
    return Line(slope, _down(least), -_down(-most))


def _where(chosen: Tensor, a: Line, b: Line) -> Line:
    slope, least, most = (
        torch.where(chosen, x, y) for x, y in ((a.slope, b.slope), (a.least, b.least), (a.most, b.most))
    )
    return Line(slope, least, most)


def rectified(lower: Tensor, upper: Tensor, below: float = 0.0) -> Line:
    """x where it is positive, and ``below``·x elsewhere, -1 <= below < 1: exact where the sign is known."""
    least = torch.zeros_like(lower)
    line = ((upper - below * lower) / (upper - lower)).clamp(below, 1.0)
    slope = torch.where(lower >= 0, 1.0, torch.where(upper <= 0, below, line))
    crosses = ~((lower >= 0) | (upper <= 0))
    most = torch.maximum((1 - slope) * upper, (below - slope) * lower) * (1 + LOSS) + TINY
    return Line(slope, least, torch.where(crosses, most, least))


def clamped(low: float, high: float, lower: Tensor, upper: Tensor) -> Line:
    """x, but at least ``low`` and at most ``high``: beside the chord, the rest is greatest and least where that bends,
    or at an end. Exact where it does not bend.
    """

    def rest(t: Tensor) -> tuple[Tensor, Tensor]:
        value, step = t.clamp(low, high), slope * t
        lost = LOSS * (value.abs() + step.abs()) + TINY
        return value - step - lost, value - step + lost

    flat, inside = (upper <= low) | (lower >= high), (lower >= low) & (upper <= high)
    slope = ((upper.clamp(low, high) - lower.clamp(low, high)) / (upper - lower)).clamp(0.0, 1.0)
    slope = torch.where(inside, 1.0, torch.where(flat, 0.0, slope))
    bends = (torch.maximum(lower, torch.minimum(upper, torch.full_like(lower, bend))) for bend in (low, high))
    least, most = zip(*(rest(t) for t in (lower, upper, *bends)), strict=True)
    exact = torch.where(inside, 0.0, lower.clamp(low, high))
    at_least, at_most = torch.stack(least).amin(0), torch.stack(most).amax(0)
    return Line(slope, torch.where(flat | inside, exact, at_least), torch.where(flat | inside, exact, at_most))


def power(f: Function, exponent: float, lower: Tensor, upper: Tensor) -> Line:
    """A power of x: convex if it is even and whole, else where x > 0, but concave if it lies between 0 and 1. Odd ones
    are concave where x < 0. Nothing is known elsewhere.
    """
    line = (concave if 0 < exponent < 1 else convex)(f, lower, upper)
    if exponent > 0 and exponent % 2 == 0:
        return line
    known = lower >= 0 if exponent > 1 else lower > 0
    nothing = torch.full_like(lower, torch.nan)
    line = _where(known, line, Line(nothing, nothing, nothing))
    if exponent % 2 == 1:
        line = _where(upper < 0 if exponent < 0 else upper <= 0, concave(f, lower, upper), line)
    return line
