"""interval_linear, its backward-data operator and its weight gradient: two products from one pass over the weight.

The kernels compute transposed tiles, weight · boxᵀ: the weight is then the operand that tensor cores take from
registers, where |W| costs one instruction, and the box's midpoint and radius are the ones they take from shared memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ends import bits_of, bytes_of, gated, relu_backward_keeps, relu_keeps
from .launch import Block, dot_options, on_device, parts_of, sum_type


@triton.jit
def tile_of(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile. GROUP rows are walked column by column, so that neighbours find their weight in L2."""
    width = GROUP * tiles_n
    first = program // width * GROUP
    rows = min(tiles_m - first, GROUP)
    return first + program % width % rows, program % width // rows


@triton.jit
def dual_dot(w, mid, rad, acc_mid, acc_rad, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """acc_mid + w·midᵀ and acc_rad + |w|·radᵀ. WIDEN is for the interpreter, which multiplies no bfloat16."""
    if WIDEN:
        w, mid, rad = w.to(tl.float32), mid.to(tl.float32), rad.to(tl.float32)
    acc_mid = tl.dot(w, tl.trans(mid), acc_mid, input_precision=PRECISION, out_dtype=acc_mid.dtype)
    acc_rad = tl.dot(tl.abs(w), tl.trans(rad), acc_rad, input_precision=PRECISION, out_dtype=acc_rad.dtype)
    return acc_mid, acc_rad


@triton.jit
def store_rows(
    out_mid_ptr, out_rad_ptr, state_ptr, plane, mid, rad, first_m, M, row_length, first_column, tile_n, N,
    RELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write results mid, rad [BLOCK_N, BLOCK_M] (transposed) to rows first_m … of length row_length, at first_column.

    With RELU, of what they become, and its state too: eight neighbours of a row to a byte.
    """
    m = first_m + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row = m.to(tl.int64) * row_length + first_column
    mid, rad = tl.trans(mid), tl.trans(rad)
    if RELU:
        keep_lower, keep_upper = relu_keeps(mid, rad)
        mid, rad = gated(mid, rad, keep_lower, keep_upper)
        bit = tl.arange(0, 8)[None, None, :]
        octet = tile_n * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
        byte = (row // 8)[:, None] + octet[None, :]
        inside = (m < M)[:, None] & (octet < N // 8)[None, :]
        lower = bytes_of(tl.reshape(keep_lower, (BLOCK_M, BLOCK_N // 8, 8)), bit, 2)
        upper = bytes_of(tl.reshape(keep_upper, (BLOCK_M, BLOCK_N // 8, 8)), bit, 2)
        tl.store(state_ptr + byte, lower, inside)
        tl.store(state_ptr + plane + byte, upper, inside)
    at = row[:, None] + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out_mid_ptr + at, mid, inside)
    tl.store(out_rad_ptr + at, rad, inside)


@triton.jit
def halves(t, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of t [ROWS, COLUMNS]; of an accumulator, a matter of names of registers."""
    return tl.split(tl.permute(tl.reshape(t, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def store_box(
    out_mid_ptr, out_rad_ptr, state_ptr, plane, acc_mid, acc_rad, tile_m, M, row_length, first_column, tile_n, N,
    RELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write a tile as ``store_rows`` does; large ones half by half, or their accumulators would spill here."""
    if BLOCK_M * BLOCK_N >= 128 * 128:
        left_mid, right_mid = halves(acc_mid, BLOCK_N, BLOCK_M)
        left_rad, right_rad = halves(acc_rad, BLOCK_N, BLOCK_M)
        first_m = tile_m * BLOCK_M
        store_rows(
            out_mid_ptr, out_rad_ptr, state_ptr, plane, left_mid, left_rad, first_m, M, row_length, first_column,
            tile_n, N, RELU, BLOCK_M // 2, BLOCK_N,
        )  # fmt: skip
        store_rows(
            out_mid_ptr, out_rad_ptr, state_ptr, plane, right_mid, right_rad, first_m + BLOCK_M // 2, M, row_length,
            first_column, tile_n, N, RELU, BLOCK_M // 2, BLOCK_N,
        )  # fmt: skip
    else:
        store_rows(
            out_mid_ptr, out_rad_ptr, state_ptr, plane, acc_mid, acc_rad, tile_m * BLOCK_M, M, row_length,
            first_column, tile_n, N, RELU, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit
def relu_backward_of_tile(
    mid, rad, state_ptr, plane, row_start, column, row_inside, COMPUTE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ReLU′ on a tile [ROWS, COLUMNS] of a gradient box whose element (r, c) is number row_start[r] + column + c.

    Rows start at whole bytes of the state, each of which is loaded once.
    """
    groups = column // 8 + tl.arange(0, COLUMNS // 8)
    byte = (row_start // 8)[:, None] + groups[None, :]
    there = row_inside[:, None] & (byte < plane)
    bit = tl.arange(0, 8)[None, None, :]
    active = bits_of(tl.load(state_ptr + byte, there, 0)[:, :, None], bit)
    alive = bits_of(tl.load(state_ptr + plane + byte, there, 0)[:, :, None], bit)
    active, alive = tl.reshape(active, (ROWS, COLUMNS)), tl.reshape(alive, (ROWS, COLUMNS))
    wide_mid, wide_rad = mid.to(COMPUTE), rad.to(COMPUTE)
    keep_lower, keep_upper = relu_backward_keeps(wide_mid, wide_rad, active, alive)
    wide_mid, wide_rad = gated(wide_mid, wide_rad, keep_lower, keep_upper)
    return wide_mid.to(mid.dtype), wide_rad.to(rad.dtype)


@triton.jit(do_not_specialize=["M", "in_plane", "out_plane"])
def interval_linear_kernel(
    mid_ptr,  # [M, K]
    rad_ptr,  # [M, K]
    weight_ptr,  # [N, K], any strides: transposed for the backward-data operator
    bias_ptr,  # [N], or anything without HAS_BIAS
    in_state_ptr,  # [2, ceil(M·K / 8)], or anything without GATED: ReLU′ on the argument
    out_mid_ptr,  # [M, N]
    out_rad_ptr,  # [M, N]
    out_state_ptr,  # [2, M·N / 8], or anything without RELU
    M,
    N,
    K,
    weight_stride_n,
    weight_stride_k,
    in_plane,
    out_plane,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,  # needs K to be a multiple of 8
    RELU: tl.constexpr,  # needs N to be a multiple of 8
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), 8)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    box_row = m.to(tl.int64) * K
    weight_row = n.to(tl.int64) * weight_stride_n
    acc_mid = tl.zeros((BLOCK_N, BLOCK_M), COMPUTE)
    acc_rad = tl.zeros((BLOCK_N, BLOCK_M), COMPUTE)
    for start in range(0, K, BLOCK_K):
        at_k = start + k
        box_at = box_row[:, None] + at_k[None, :]
        box_inside = (m < M)[:, None] & (at_k < K)[None, :]
        mid = tl.load(mid_ptr + box_at, box_inside, 0.0)
        rad = tl.load(rad_ptr + box_at, box_inside, 0.0)
        if GATED:
            mid, rad = relu_backward_of_tile(
                mid, rad, in_state_ptr, in_plane, box_row, start, m < M, COMPUTE, BLOCK_M, BLOCK_K
            )
        weight_at = weight_row[:, None] + at_k[None, :].to(tl.int64) * weight_stride_k
        w = tl.load(weight_ptr + weight_at, (n < N)[:, None] & (at_k < K)[None, :], 0.0)
        acc_mid, acc_rad = dual_dot(w, mid, rad, acc_mid, acc_rad, PRECISION, WIDEN)
    if HAS_BIAS:
        acc_mid += tl.load(bias_ptr + n, n < N, 0.0).to(COMPUTE)[:, None]
    store_box(
        out_mid_ptr, out_rad_ptr, out_state_ptr, out_plane, acc_mid, acc_rad, tile_m, M, N, 0, tile_n, N,
        RELU, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def sign(w):
    return (w > 0.0).to(w.dtype) - (w < 0.0).to(w.dtype)


@triton.jit(do_not_specialize=["M", "rows_of_part"])
def interval_linear_weight_kernel(
    grad_mid_ptr,  # [M, N]
    grad_rad_ptr,  # [M, N]
    mid_ptr,  # [M, K]
    rad_ptr,  # [M, K]
    weight_ptr,  # [N, K], any strides
    out_ptr,  # [parts, N, K]; program_id(1) sums its part of the M rows
    M,
    N,
    K,
    weight_stride_n,
    weight_stride_k,
    rows_of_part,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    tile_n, tile_k = tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K), 8)
    part = tl.program_id(1)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    acc_mid = tl.zeros((BLOCK_N, BLOCK_K), COMPUTE)
    acc_rad = tl.zeros((BLOCK_N, BLOCK_K), COMPUTE)
    stop = min(M, (part + 1) * rows_of_part)
    for start in range(part * rows_of_part, stop, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        grad_at = m[:, None].to(tl.int64) * N + n[None, :]
        grad_inside = (m < stop)[:, None] & (n < N)[None, :]
        at = m[:, None].to(tl.int64) * K + k[None, :]
        inside = (m < stop)[:, None] & (k < K)[None, :]
        grad_mid = tl.trans(tl.load(grad_mid_ptr + grad_at, grad_inside, 0.0))
        grad_rad = tl.trans(tl.load(grad_rad_ptr + grad_at, grad_inside, 0.0))
        mid = tl.load(mid_ptr + at, inside, 0.0)
        rad = tl.load(rad_ptr + at, inside, 0.0)
        if WIDEN:
            grad_mid, grad_rad = grad_mid.to(tl.float32), grad_rad.to(tl.float32)
            mid, rad = mid.to(tl.float32), rad.to(tl.float32)
        acc_mid = tl.dot(grad_mid, mid, acc_mid, input_precision=PRECISION, out_dtype=COMPUTE)
        acc_rad = tl.dot(grad_rad, rad, acc_rad, input_precision=PRECISION, out_dtype=COMPUTE)
    inside = (n < N)[:, None] & (k < K)[None, :]
    weight_at = n[:, None].to(tl.int64) * weight_stride_n + k[None, :].to(tl.int64) * weight_stride_k
    w = tl.load(weight_ptr + weight_at, inside, 0.0).to(COMPUTE)
    out_at = (part.to(tl.int64) * N + n[:, None]) * K + k[None, :]
    tl.store(out_ptr + out_at, acc_mid + sign(w) * acc_rad, inside)


# --- launchers ----------------------------------------------------------------------------------------------------


def box_product_into(
    mid: Tensor,  # [M, K], contiguous like all but the weight
    rad: Tensor,
    weight: Tensor,  # [N, K], any strides
    bias: Tensor | None,
    in_state: Tensor | None,
    out_mid: Tensor,  # [M, N]
    out_rad: Tensor,
    out_state: Tensor | None,
    block: Block,
    tf32: bool,
) -> None:
    """(mid, rad)·weightᵀ + bias; ReLU′ by ``in_state`` before and ReLU after, where a state is given.

    ``in_state`` needs K and ``out_state`` N to be a multiple of 8: a byte must not belong to two rows.
    """
    (M, K), N = mid.shape, weight.shape[0]
    grid = (triton.cdiv(M, block.m) * triton.cdiv(N, block.n),)
    with on_device(mid):
        interval_linear_kernel[grid](
            mid, rad, weight, mid if bias is None else bias, mid if in_state is None else in_state,
            out_mid, out_rad, mid if out_state is None else out_state,
            M, N, K, *weight.stride(), (M * K + 7) // 8, M * N // 8,
            HAS_BIAS=bias is not None, GATED=in_state is not None, RELU=out_state is not None,
            BLOCK_M=block.m, BLOCK_N=block.n, BLOCK_K=block.k, num_warps=block.warps, num_stages=block.stages,
            **dot_options(mid, tf32),
        )  # fmt: skip


def weight_gradient(
    grad_mid: Tensor, grad_rad: Tensor, mid: Tensor, rad: Tensor, weight: Tensor, block: Block, tf32: bool
) -> Tensor:
    """gradᵀ·mid + sign(weight) ⊙ (grad_radᵀ·rad): [M, N], [M, K] → [N, K]. All contiguous but the weight."""
    (M, N), K = grad_mid.shape, mid.shape[1]
    tiles = triton.cdiv(N, block.n) * triton.cdiv(K, block.k)
    parts, rows = parts_of(M, tiles, block.m)
    out = torch.empty(parts, N, K, dtype=weight.dtype if parts == 1 else sum_type(weight), device=weight.device)
    with on_device(mid):
        interval_linear_weight_kernel[(tiles, parts)](
            grad_mid, grad_rad, mid, rad, weight, out, M, N, K, *weight.stride(), rows,
            BLOCK_M=block.m, BLOCK_N=block.n, BLOCK_K=block.k, num_warps=block.warps, num_stages=block.stages,
            **dot_options(mid, tf32),
        )  # fmt: skip
    return out[0] if parts == 1 else out.sum(0).to(weight.dtype)
