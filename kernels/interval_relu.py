"""interval_relu, interval_relu_backward and interval_gate: one pass over memory each, bits packed on the way."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ends import bits_of, bytes_of, gated, relu_backward_keeps, relu_keeps
from .launch import LAUNCHES, Launch, bytes_for, elementwise, flat_offsets, on_device


@triton.jit
def interval_relu_fwd_kernel(
    mid_ptr,  # [n]
    rad_ptr,  # [n]
    out_mid_ptr,  # [n]
    out_rad_ptr,  # [n]
    state_ptr,  # [2, ceil(n / 8)]
    bias_ptr,  # [C], added to the midpoint before; or anything without HAS_BIAS
    n,
    C,
    HAS_BIAS: tl.constexpr,  # needs rows of C elements, and C to be a multiple of 8
    GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    groups, at = flat_offsets(GROUPS, WIDE)
    bit = tl.arange(0, 8)[None, :]
    size = bytes_for(n)
    inside = at < n
    mid = tl.load(mid_ptr + at, inside, 0.0).to(COMPUTE)
    rad = tl.load(rad_ptr + at, inside, 0.0).to(COMPUTE)
    if HAS_BIAS:
        channel = (groups % (C // 8) * 8)[:, None] + bit
        mid += tl.load(bias_ptr + channel, inside, 0.0).to(COMPUTE)
    keep_lower, keep_upper = relu_keeps(mid, rad)
    out_mid, out_rad = gated(mid, rad, keep_lower, keep_upper)
    tl.store(out_mid_ptr + at, out_mid, inside)
    tl.store(out_rad_ptr + at, out_rad, inside)
    tl.store(state_ptr + groups, bytes_of(keep_lower, bit, 1), groups < size)
    tl.store(state_ptr + size + groups, bytes_of(keep_upper, bit, 1), groups < size)


@triton.jit
def interval_relu_bwd_kernel(
    mid_ptr,  # [n]
    rad_ptr,  # [n]
    state_ptr,  # [2, ceil(n / 8)]
    out_mid_ptr,  # [n]
    out_rad_ptr,  # [n]
    gate_ptr,  # [2, ceil(n / 8)], or anything without WRITE_GATE
    n,
    WRITE_GATE: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    groups, at = flat_offsets(GROUPS, WIDE)
    bit = tl.arange(0, 8)[None, :]
    size = bytes_for(n)
    inside = at < n
    mid = tl.load(mid_ptr + at, inside, 0.0).to(COMPUTE)
    rad = tl.load(rad_ptr + at, inside, 0.0).to(COMPUTE)
    active = bits_of(tl.load(state_ptr + groups, groups < size, 0)[:, None], bit)
    alive = bits_of(tl.load(state_ptr + size + groups, groups < size, 0)[:, None], bit)
    keep_lower, keep_upper = relu_backward_keeps(mid, rad, active, alive)
    out_mid, out_rad = gated(mid, rad, keep_lower, keep_upper)
    tl.store(out_mid_ptr + at, out_mid, inside)
    tl.store(out_rad_ptr + at, out_rad, inside)
    if WRITE_GATE:
        # The bits past the end are 0, whatever the state's are.
        tl.store(gate_ptr + groups, bytes_of(keep_lower & inside, bit, 1), groups < size)
        tl.store(gate_ptr + size + groups, bytes_of(keep_upper & inside, bit, 1), groups < size)


@triton.jit
def interval_gate_kernel(
    mid_ptr,  # [n]
    rad_ptr,  # [n]
    gate_ptr,  # [2, ceil(n / 8)]
    out_mid_ptr,  # [n]
    out_rad_ptr,  # [n]
    n,
    GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    groups, at = flat_offsets(GROUPS, WIDE)
    bit = tl.arange(0, 8)[None, :]
    size = bytes_for(n)
    inside = at < n
    mid = tl.load(mid_ptr + at, inside, 0.0).to(COMPUTE)
    rad = tl.load(rad_ptr + at, inside, 0.0).to(COMPUTE)
    keep_lower = bits_of(tl.load(gate_ptr + groups, groups < size, 0)[:, None], bit)
    keep_upper = bits_of(tl.load(gate_ptr + size + groups, groups < size, 0)[:, None], bit)
    out_mid, out_rad = gated(mid, rad, keep_lower, keep_upper)
    tl.store(out_mid_ptr + at, out_mid, inside)
    tl.store(out_rad_ptr + at, out_rad, inside)


# --- launchers: all tensors dense in one memory order; results may be the arguments ------------------------------


def relu_into(
    mid: Tensor, rad: Tensor, out_mid: Tensor, out_rad: Tensor, state: Tensor, bias: Tensor | None = None
) -> None:
    """With a bias, of (mid + bias, rad): one value for each element of a row in memory, a multiple of 8 of them."""
    launch = _relu(mid.numel(), 0 if bias is None else bias.numel(), mid.dtype, mid.device)
    with on_device(mid):
        launch(mid, rad, out_mid, out_rad, state, mid if bias is None else bias)


@functools.lru_cache(LAUNCHES)
def _relu(n: int, channels: int, dtype: torch.dtype, device: torch.device) -> Launch:
    return elementwise(interval_relu_fwd_kernel, n, dtype, (n, channels), HAS_BIAS=channels > 0)


def relu_backward_into(
    mid: Tensor, rad: Tensor, state: Tensor, out_mid: Tensor, out_rad: Tensor, gate: Tensor | None
) -> None:
    """The gate that was applied is written where it is asked for."""
    launch = _relu_backward(mid.numel(), gate is not None, mid.dtype, mid.device)
    with on_device(mid):
        launch(mid, rad, state, out_mid, out_rad, state if gate is None else gate)


@functools.lru_cache(LAUNCHES)
def _relu_backward(n: int, writes_gate: bool, dtype: torch.dtype, device: torch.device) -> Launch:
    return elementwise(interval_relu_bwd_kernel, n, dtype, (n,), WRITE_GATE=writes_gate)


def gate_into(mid: Tensor, rad: Tensor, gate: Tensor, out_mid: Tensor, out_rad: Tensor) -> None:
    launch = _gate(mid.numel(), mid.dtype, mid.device)
    with on_device(mid):
        launch(mid, rad, gate, out_mid, out_rad)


@functools.lru_cache(LAUNCHES)
def _gate(n: int, dtype: torch.dtype, device: torch.device) -> Launch:
    return elementwise(interval_gate_kernel, n, dtype, (n,))
