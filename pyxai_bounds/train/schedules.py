"""Schedules: how the radius of the box grows while a network trains."""

from __future__ import annotations


def linear_ramp(step: int, steps: int, end: float) -> float:
    """The value at ``step`` (from 0) of a straight line that reaches ``end`` after ``steps`` steps and stays there.

    The first step is already above 0, for a box of radius 0 teaches nothing. With steps = 0 it is ``end`` throughout.
    """
    return end if step >= steps else end * (step + 1) / steps
