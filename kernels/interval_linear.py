"""interval_linear, its backward-data operator and its weight gradient: two products from one pass over the weight.

|W| comes from memory like W: tensor cores then find all their factors in shared memory, where asynchronous copies have
put them. Taking |W| in registers instead saves those bytes but makes the cores wait for registers at every step: on an
H200 the products took twice as long, and with ReLU′ applied to tiles of the box on their way, four times.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ends import gated, rectified, relu_backward_keeps, relu_keeps
from .launch import LAUNCHES, Block, Launch, on_device, parts_of, sum_type, tile_options


@triton.jit
def tile_of(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile. GROUP rows are walked column by column, so that neighbours find their weight in L2."""
    width = GROUP * tiles_n
    first = program // width * GROUP
    rows = min(tiles_m - first, GROUP)
    return first + program % width % rows, program % width // rows


@triton.jit
def dual_dot(mid, rad, w, magnitude, acc_mid, acc_rad, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """acc_mid + mid·w and acc_rad + rad·magnitude. WIDEN is for the interpreter, which multiplies no bfloat16."""
    if WIDEN:
        mid, rad = mid.to(tl.float32), rad.to(tl.float32)
        w, magnitude = w.to(tl.float32), magnitude.to(tl.float32)
    acc_mid = tl.dot(mid, w, acc_mid, input_precision=PRECISION, out_dtype=acc_mid.dtype)
    acc_rad = tl.dot(rad, magnitude, acc_rad, input_precision=PRECISION, out_dtype=acc_rad.dtype)
    return acc_mid, acc_rad


@triton.jit
def store_columns(
    out_mid_ptr, out_rad_ptr, bits_ptr, made_ptr, plane, mid, rad, row, row_inside, first_n, N,
    EPILOGUE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write what becomes of mid, rad [BLOCK_M, BLOCK_N] to columns first_n … of N, rows beginning at ``row``.

    EPILOGUE: "none"; "relu" writes the state; "relu_backward" reads a state and writes the gate; "gate" reads a gate.
    Eight neighbours of a row are a byte, so that all but "none" need N and the beginnings of rows to be multiples of 8.
    """
    n = first_n + tl.arange(0, BLOCK_N)
    if EPILOGUE != "none":
        bit = tl.arange(0, 8)[None, None, :]
        octet = first_n // 8 + tl.arange(0, BLOCK_N // 8)
        byte = (row // 8)[:, None] + octet[None, :]
        byte_inside = row_inside[:, None] & (octet < N // 8)[None, :]
        # Both planes in one number: neighbours that share a byte are in other threads, and meet once instead of twice.
        if EPILOGUE == "relu":
            keep_lower, keep_upper = relu_keeps(mid, rad)
        else:
            both = tl.load(bits_ptr + byte, byte_inside, 0).to(tl.int16)
            both |= tl.load(bits_ptr + plane + byte, byte_inside, 0).to(tl.int16) << 8
            spread = tl.broadcast_to(both[:, :, None], (BLOCK_M, BLOCK_N // 8, 8)) >> bit.to(tl.int16)
            spread = tl.reshape(spread, (BLOCK_M, BLOCK_N))
            keep_lower, keep_upper = (spread & 1) != 0, (spread & 256) != 0
        if EPILOGUE == "relu_backward":
            keep_lower, keep_upper = relu_backward_keeps(mid, rad, keep_lower, keep_upper)
        if EPILOGUE == "relu":
            mid, rad = rectified(mid, rad, keep_lower, keep_upper)
        else:
            mid, rad = gated(mid, rad, keep_lower, keep_upper)
        if EPILOGUE != "gate":
            one = (1 << (n % 8))[None, :]
            keep = tl.where(keep_lower, one, 0) | tl.where(keep_upper, one << 8, 0)
            packed = tl.sum(tl.reshape(keep, (BLOCK_M, BLOCK_N // 8, 8)), 2)
            tl.store(made_ptr + byte, (packed & 255).to(tl.uint8), byte_inside)
            tl.store(made_ptr + plane + byte, (packed >> 8).to(tl.uint8), byte_inside)
    at = row[:, None] + n[None, :]
    inside = row_inside[:, None] & (n < N)[None, :]
    tl.store(out_mid_ptr + at, mid, inside)
    tl.store(out_rad_ptr + at, rad, inside)


@triton.jit
def halves(t, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of t [ROWS, COLUMNS]; of an accumulator, a matter of names of registers."""
    return tl.split(tl.permute(tl.reshape(t, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def store_box(
    out_mid_ptr, out_rad_ptr, bits_ptr, made_ptr, plane, mid, rad, row, row_inside, first_n, N,
    EPILOGUE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write a tile as ``store_columns`` does; large ones half by half, or their accumulators would spill here."""
    if BLOCK_M * BLOCK_N >= 128 * 64:
        left_mid, right_mid = halves(mid, BLOCK_M, BLOCK_N)
        left_rad, right_rad = halves(rad, BLOCK_M, BLOCK_N)
        store_columns(
            out_mid_ptr, out_rad_ptr, bits_ptr, made_ptr, plane, left_mid, left_rad, row, row_inside,
            first_n, N, EPILOGUE, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
        store_columns(
            out_mid_ptr, out_rad_ptr, bits_ptr, made_ptr, plane, right_mid, right_rad, row, row_inside,
            first_n + BLOCK_N // 2, N, EPILOGUE, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
    else:
        store_columns(
            out_mid_ptr, out_rad_ptr, bits_ptr, made_ptr, plane, mid, rad, row, row_inside,
            first_n, N, EPILOGUE, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "out_plane"])
def interval_linear_kernel(
    mid_ptr,  # [M, K]
    rad_ptr,  # [M, K]
    weight_ptr,  # [N, K], any strides: transposed for the backward-data operator
    magnitude_ptr,  # |weight|, laid out as the weight
    bias_ptr,  # [N], or anything without HAS_BIAS
    out_mid_ptr,  # [M, N]
    out_rad_ptr,  # [M, N]
    out_state_ptr,  # [2, M·N / 8], or anything without "relu"
    M,
    N,
    K,
    weight_stride_n,
    weight_stride_k,
    out_plane,
    HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,  # "none" or "relu", of `store_columns`
    EVEN: tl.constexpr,  # is K a multiple of BLOCK_K?
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
    box_at = (m.to(tl.int64) * K)[:, None] + k[None, :]
    weight_at = k[:, None].to(tl.int64) * weight_stride_k + (n.to(tl.int64) * weight_stride_n)[None, :]
    acc_mid = tl.zeros((BLOCK_M, BLOCK_N), COMPUTE)
    acc_rad = tl.zeros((BLOCK_M, BLOCK_N), COMPUTE)
    for start in range(0, K, BLOCK_K):
        k_inside = (start + k < K) | EVEN
        box_inside = (m < M)[:, None] & k_inside[None, :]
        mid = tl.load(mid_ptr + box_at, box_inside, 0.0)
        rad = tl.load(rad_ptr + box_at, box_inside, 0.0)
        weight_inside = k_inside[:, None] & (n < N)[None, :]
        w = tl.load(weight_ptr + weight_at, weight_inside, 0.0)
        magnitude = tl.load(magnitude_ptr + weight_at, weight_inside, 0.0)
        acc_mid, acc_rad = dual_dot(mid, rad, w, magnitude, acc_mid, acc_rad, PRECISION, WIDEN)
        mid_ptr += BLOCK_K
        rad_ptr += BLOCK_K
        weight_ptr += BLOCK_K * weight_stride_k
        magnitude_ptr += BLOCK_K * weight_stride_k
    if HAS_BIAS:
        acc_mid += tl.load(bias_ptr + n, n < N, 0.0).to(COMPUTE)[None, :]
    store_box(
        out_mid_ptr, out_rad_ptr, out_state_ptr, out_state_ptr, out_plane, acc_mid, acc_rad, m.to(tl.int64) * N, m < M,
        tile_n * BLOCK_N, N, EPILOGUE, BLOCK_M, BLOCK_N,
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
    m = part * rows_of_part + tl.arange(0, BLOCK_M)
    grad_at = m[:, None].to(tl.int64) * N + n[None, :]
    at = m[:, None].to(tl.int64) * K + k[None, :]
    for _ in range(part * rows_of_part, stop, BLOCK_M):
        grad_inside = (m < stop)[:, None] & (n < N)[None, :]
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
        m += BLOCK_M
        grad_mid_ptr += BLOCK_M * N
        grad_rad_ptr += BLOCK_M * N
        mid_ptr += BLOCK_M * K
        rad_ptr += BLOCK_M * K
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
    out_mid: Tensor,  # [M, N]
    out_rad: Tensor,
    out_state: Tensor | None,
    block: Block,
    tf32: bool,
) -> None:
    """(mid, rad)·weightᵀ + bias; then ReLU if a state is given, which needs N to be a multiple of 8."""
    magnitude = weight.abs()
    if magnitude.stride() != weight.stride():  # of an expanded weight
        weight, magnitude = weight.contiguous(), magnitude.contiguous()
    launch = _box_product(
        mid.shape, weight.shape, weight.stride(), bias is not None, out_state is not None, block, tf32, mid.dtype,
        mid.device,
    )  # fmt: skip
    with on_device(mid):
        launch(
            mid, rad, weight, magnitude, mid if bias is None else bias, out_mid, out_rad,
            mid if out_state is None else out_state,
        )  # fmt: skip


@functools.lru_cache(LAUNCHES)
def _box_product(
    box: torch.Size,
    weight: torch.Size,
    weight_stride: tuple[int, ...],
    has_bias: bool,
    relu: bool,
    block: Block,
    tf32: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Launch:
    (M, K), N = box, weight[0]
    return Launch(
        interval_linear_kernel, (triton.cdiv(M, block.m) * triton.cdiv(N, block.n),),
        (M, N, K, *weight_stride, M * N // 8),
        HAS_BIAS=has_bias, EPILOGUE="relu" if relu else "none", EVEN=K % block.k == 0,
        **tile_options(block, dtype, tf32),
    )  # fmt: skip


def weight_gradient(
    grad_mid: Tensor, grad_rad: Tensor, mid: Tensor, rad: Tensor, weight: Tensor, block: Block, tf32: bool
) -> Tensor:
    """gradᵀ·mid + sign(weight) ⊙ (grad_radᵀ·rad): [M, N], [M, K] → [N, K]. All contiguous but the weight."""
    launch, parts = _weight_gradient(
        grad_mid.shape, mid.shape[1], weight.stride(), block, tf32, weight.dtype, weight.device
    )
    dtype = weight.dtype if parts == 1 else sum_type(weight.dtype)
    out = torch.empty(parts, *weight.shape, dtype=dtype, device=weight.device)
    with on_device(mid):
        launch(grad_mid, grad_rad, mid, rad, weight, out)
    return out[0] if parts == 1 else out.sum(0).to(weight.dtype)


@functools.lru_cache(LAUNCHES)
def _weight_gradient(
    grad: torch.Size,
    K: int,
    weight_stride: tuple[int, ...],
    block: Block,
    tf32: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Launch, int]:
    """The launch, and of how many parts the sum is."""
    M, N = grad
    tiles = triton.cdiv(N, block.n) * triton.cdiv(K, block.k)
    parts, rows = parts_of(M, tiles, block.m)
    launch = Launch(
        interval_linear_weight_kernel, (tiles, parts), (M, N, K, *weight_stride, rows),
        **tile_options(block, dtype, tf32),
    )  # fmt: skip
    return launch, parts
