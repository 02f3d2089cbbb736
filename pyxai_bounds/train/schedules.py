"""Schedules: how a radius or a weight grows while a network trains, and how the learning rate moves.

Each is a function of the step alone, so that a run that continues needs to remember nothing but its step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Ramp = Literal["constant", "linear", "smooth"]
Rate = Literal["constant", "cosine", "steps"]


def ramp(kind: Ramp, step: int, steps: int, end: float) -> float:
    """The value at ``step`` (from 0) of a ramp that reaches ``end`` after ``steps`` steps and stays there.

    ``constant`` is ``end`` throughout, as are all with steps = 0; the others are :func:`linear_ramp` and
    :func:`smooth_ramp`. Raises ValueError for another kind.
    """
    if kind == "constant":
        return end
    if kind == "linear":
        return linear_ramp(step, steps, end)
    if kind == "smooth":
        return smooth_ramp(step, steps, end)
    raise ValueError(f"There is no ramp {kind!r}; choose constant, linear or smooth.")


def linear_ramp(step: int, steps: int, end: float) -> float:
    """The value at ``step`` (from 0) of a straight line that reaches ``end`` after ``steps`` steps and stays there.

    The first step is already above 0, for a box of radius 0 teaches nothing. With steps = 0 it is ``end`` throughout.
    """
    return end if step >= steps else end * (step + 1) / steps


def smooth_ramp(step: int, steps: int, end: float, bend: float = 0.25, power: float = 4.0) -> float:
    """As :func:`linear_ramp`, but it starts as slowly as t^power and goes straight from t = ``bend`` on.

    With t the share of the steps done, it is a·t^p up to the bend and its tangent behind it; a is what lets the tangent
    reach 1 at t = 1, a·(bᵖ + p·bᵖ⁻¹·(1 − b)) = 1. The radius then grows slowest where certified training is most
    fragile. Source: the smoothed schedule of auto_LiRPA (Xu et al., NeurIPS 2020), whose defaults these are.
    """
    if step >= steps:
        return end
    t = (step + 1) / steps
    a = 1 / (bend**power + power * bend ** (power - 1) * (1 - bend))
    if t < bend:
        return end * a * t**power
    return min(end, end * a * (bend**power + power * bend ** (power - 1) * (t - bend)))


def learning_rate(
    kind: Rate, step: int, steps: int, lr: float, at: Sequence[tuple[int, float]] = (), warmup: int = 0
) -> float:
    """The learning rate of ``step`` (from 0) among ``steps``.

    ``constant``  lr
    ``cosine``    lr · (1 + cos(π·step/steps)) / 2
    ``steps``     lr up to the first step in ``at``, pairs of (step, rate from there on)
    In the first ``warmup`` steps it also grows linearly from lr / warmup. Raises ValueError for another kind.
    """
    if kind == "cosine":
        rate = lr * (1 + math.cos(math.pi * step / steps)) / 2
    elif kind == "steps":
        rate = next((value for start, value in sorted(at, reverse=True) if step >= start), lr)
    elif kind == "constant":
        rate = lr
    else:
        raise ValueError(f"There is no learning rate schedule {kind!r}; choose constant, cosine or steps.")
    return rate * min(1.0, (step + 1) / warmup) if warmup else rate
