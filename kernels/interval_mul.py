"""interval_mul: the elementwise product of two boxes, from its four end-point products, in one pass."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LAUNCHES, Launch, elementwise, flat_offsets, on_device


@triton.jit
def _least(a, b):
    return tl.minimum(a, b, tl.PropagateNan.ALL)


@triton.jit
def _greatest(a, b):
    return tl.maximum(a, b, tl.PropagateNan.ALL)


@triton.jit
def product_of_ends(a_lower, a_upper, b_lower, b_upper):
    """Midpoint and radius between the least and the greatest of the four products."""
    ll, lu, ul, uu = a_lower * b_lower, a_lower * b_upper, a_upper * b_lower, a_upper * b_upper
    lower = _least(_least(ll, lu), _least(ul, uu))
    upper = _greatest(_greatest(ll, lu), _greatest(ul, uu))
    return (lower + upper) * 0.5, (upper - lower) * 0.5


@triton.jit
def interval_mul_kernel(
    a_mid_ptr,  # [n]
    a_rad_ptr,  # [n]
    b_mid_ptr,  # [n]
    b_rad_ptr,  # [n]
    out_mid_ptr,  # [n]
    out_rad_ptr,  # [n]
    n,
    GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    _, at = flat_offsets(GROUPS, WIDE)
    inside = at < n
    a_mid = tl.load(a_mid_ptr + at, inside, 0.0).to(COMPUTE)
    a_rad = tl.load(a_rad_ptr + at, inside, 0.0).to(COMPUTE)
    b_mid = tl.load(b_mid_ptr + at, inside, 0.0).to(COMPUTE)
    b_rad = tl.load(b_rad_ptr + at, inside, 0.0).to(COMPUTE)
    mid, rad = product_of_ends(a_mid - a_rad, a_mid + a_rad, b_mid - b_rad, b_mid + b_rad)
    tl.store(out_mid_ptr + at, mid, inside)
    tl.store(out_rad_ptr + at, rad, inside)


def mul_into(a_mid: Tensor, a_rad: Tensor, b_mid: Tensor, b_rad: Tensor, out_mid: Tensor, out_rad: Tensor) -> None:
    """All tensors dense in one memory order."""
    launch = _mul(a_mid.numel(), a_mid.dtype, a_mid.device)
    with on_device(a_mid):
        launch(a_mid, a_rad, b_mid, b_rad, out_mid, out_rad)


@functools.lru_cache(LAUNCHES)
def _mul(n: int, dtype: torch.dtype, device: torch.device) -> Launch:
    return elementwise(interval_mul_kernel, n, dtype, (n,))
