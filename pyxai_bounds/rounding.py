"""Directed rounding of a single addition, in plain PyTorch.

The error of a floating-point sum is itself a floating-point number (Knuth's TwoSum), so its sign
tells whether the rounded sum lies above or below the true one. Stepping to the neighbour only
then gives exactly the IEEE directed roundings, without touching the processor's rounding mode.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _two_sum_error(a: Tensor, b: Tensor, total: Tensor) -> Tensor:
    """The exact value of ``a + b - total``, where ``total`` is the sum rounded to nearest."""
    b_part = total - a
    a_part = total - b_part
    return (a - a_part) + (b - b_part)


def _add(a: Tensor, b: Tensor, direction: float) -> Tensor:
    total = a + b
    with torch.no_grad():
        error = _two_sum_error(a, b, total)
        # A NaN error means that an operand or the sum is infinite; there is nothing to correct.
        missed = error > 0 if direction > 0 else error < 0
        if not missed.any():
            return total
        neighbour = torch.nextafter(total, torch.full_like(total, direction))
        step = torch.where(missed, neighbour - total, torch.zeros_like(total))
    # neighbour - total is exact, and so is adding it back: this keeps the sum differentiable.
    return total + step


def add_up(a: Tensor, b: Tensor) -> Tensor:
    """``a + b`` rounded towards +∞; differentiable as ``a + b``."""
    return _add(a, b, math.inf)


def add_down(a: Tensor, b: Tensor) -> Tensor:
    """``a + b`` rounded towards −∞; differentiable as ``a + b``."""
    return _add(a, b, -math.inf)


def scalar_up(value: float, dtype: torch.dtype) -> float:
    """The smallest number of ``dtype`` that is at least ``value``."""
    rounded = torch.tensor(value, dtype=dtype)
    if rounded.item() < value:
        rounded = torch.nextafter(rounded, torch.full_like(rounded, math.inf))
    return float(rounded.item())
