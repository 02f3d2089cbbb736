"""interval_scale_shift: mid·scale + shift and rad·|scale|, one scale and shift per channel, in one pass."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LAUNCHES, Launch, elementwise, flat_offsets, on_device


@triton.jit
def interval_scale_shift_kernel(
    mid_ptr,  # [n]
    rad_ptr,  # [n]
    scale_ptr,  # [channels]
    shift_ptr,  # [channels], or anything without HAS_SHIFT
    out_mid_ptr,  # [n]
    out_rad_ptr,  # [n]
    n,
    channels,
    inner,  # elements of one channel that stand side by side: 1 if channels are last
    HAS_SHIFT: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    _, at = flat_offsets(GROUPS, WIDE)
    inside = at < n
    channel = at // inner % channels
    scale = tl.load(scale_ptr + channel, inside, 0.0).to(COMPUTE)
    mid = tl.load(mid_ptr + at, inside, 0.0).to(COMPUTE) * scale
    if HAS_SHIFT:
        mid += tl.load(shift_ptr + channel, inside, 0.0).to(COMPUTE)
    tl.store(out_mid_ptr + at, mid, inside)
    tl.store(out_rad_ptr + at, tl.load(rad_ptr + at, inside, 0.0).to(COMPUTE) * tl.abs(scale), inside)


def scale_shift_into(
    mid: Tensor, rad: Tensor, scale: Tensor, shift: Tensor | None, inner: int, out_mid: Tensor, out_rad: Tensor
) -> None:
    """All tensors dense in one memory order; scale and shift contiguous."""
    launch = _scale_shift(mid.numel(), mid.shape[1], inner, shift is not None, mid.dtype, mid.device)
    with on_device(mid):
        launch(mid, rad, scale, scale if shift is None else shift, out_mid, out_rad)


@functools.lru_cache(LAUNCHES)
def _scale_shift(
    n: int, channels: int, inner: int, has_shift: bool, dtype: torch.dtype, device: torch.device
) -> Launch:
    return elementwise(interval_scale_shift_kernel, n, dtype, (n, channels, inner), HAS_SHIFT=has_shift)
