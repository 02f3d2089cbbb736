"""interval_conv2d, its backward-data operator and its weight gradient as matrix products that are never laid out.

Boxes are channels-last [B, H, W, C], weights [OC, KH, KW, C / groups], as channels-last tensors of PyTorch lie
in memory; a row of the product is a pixel, and the sum runs over kernel taps and channels. Sums over one tap's
channels read neighbours in memory; FLAT is for so few channels that a block of the sum spans several taps.
As in ``interval_linear.py``, whose helpers do the work on tiles, |W| is read beside W.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .interval_linear import dual_dot, sign, store_box, tile_of
from .launch import LAUNCHES, TENSOR_CORE_TERMS, Block, Launch, is_flat, on_device, parts_of, sum_type, tile_options

_GEOMETRY = ["M", "B", "H", "W", "OH", "OW", "KH", "KW", "SH", "SW", "PH", "PW", "DH", "DW"]


OUTSIDE = tl.constexpr(-(2**30))  # a row or column of an image that is outside of it, whatever a tap adds


@triton.jit
def wide(t, WIDE: tl.constexpr):
    return t.to(tl.int64) if WIDE else t


@triton.jit
def within(t, size):
    """0 ≤ t < size, in one comparison: these kernels are bound by their integer instructions, not by the products."""
    return t.to(tl.uint32, bitcast=True) < size.to(tl.uint32, bitcast=True)


@triton.jit
def next_block(start, tap_h, tap_w, step, channels, taps_w):
    """Where the next block of the sum begins: channels run fastest, then columns. Counting spares two divisions."""
    start += step
    tap_w += (start >= channels).to(tl.int32)
    start = tl.where(start >= channels, 0, start)
    tap_h += (tap_w >= taps_w).to(tl.int32)
    tap_w = tl.where(tap_w >= taps_w, 0, tap_w)
    return start, tap_h, tap_w


@triton.jit(do_not_specialize=[*_GEOMETRY, "out_plane"])
def interval_conv2d_fwd_kernel(
    mid_ptr,  # [B, H, W, C]
    rad_ptr,  # [B, H, W, C]
    weight_ptr,  # [OC, KH, KW, CG]
    magnitude_ptr,  # |weight|, laid out as the weight
    bias_ptr,  # [OC], or anything without HAS_BIAS
    out_mid_ptr,  # [B, OH, OW, OC], M = B·OH·OW pixels
    out_rad_ptr,  # [B, OH, OW, OC]
    bits_ptr,  # [2, M·OC / 8] that the epilogue reads, or anything,
    made_ptr,  # [2, M·OC / 8] that it writes, or anything
    M,
    H,
    W,
    C,
    OH,
    OW,
    OC,
    CG,  # channels of a group: of the input,
    OG,  # of the output
    KH,
    KW,
    SH,
    SW,
    PH,
    PW,
    DH,
    DW,
    out_plane,
    HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,  # of `store_columns`; all but "none" need OG to be a multiple of 8
    FLAT: tl.constexpr,
    EVEN: tl.constexpr,  # is CG a multiple of BLOCK_K?
    WIDE: tl.constexpr,  # do places in memory need 64 bits?
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(OG, BLOCK_N), 8)
    group = tl.program_id(1)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    first_h = m // OW % OH * SH - PH
    first_w = m % OW * SW - PW
    # Of the first tap's pixel, which may lie outside: only what `inside` allows is read.
    box_row = ((wide(m // OW // OH, WIDE) * H + first_h) * W + first_w) * C + group * CG
    first_h = tl.where(m < M, first_h, OUTSIDE)
    weight_row = (group * OG + n) * (KH * KW * CG)
    acc_mid = tl.zeros((BLOCK_M, BLOCK_N), COMPUTE)
    acc_rad = tl.zeros((BLOCK_M, BLOCK_N), COMPUTE)
    blocks = tl.cdiv(CG, BLOCK_K)
    steps = tl.cdiv(KH * KW * CG, BLOCK_K) if FLAT else KH * KW * blocks
    start, tap_h, tap_w = 0, 0, 0
    for step in range(steps):
        if FLAT:
            at_k = step * BLOCK_K + k
            tap = at_k // CG
            c = at_k - tap * CG
            h = first_h[:, None] + (tap // KW * DH)[None, :]
            w = first_w[:, None] + (tap % KW * DW)[None, :]
            offset = (tap // KW * DH * W + tap % KW * DW) * C + c
            k_inside = at_k < KH * KW * CG
            inside = within(h, H) & within(w, W) & k_inside[None, :]
        else:
            c = start + k
            at_k = (tap_h * KW + tap_w) * CG + c
            offset = (tap_h * DH * W + tap_w * DW) * C + c
            k_inside = (c < CG) | EVEN
            inside = (within(first_h + tap_h * DH, H) & within(first_w + tap_w * DW, W))[:, None] & k_inside[None, :]
            start, tap_h, tap_w = next_block(start, tap_h, tap_w, BLOCK_K, CG, KW)
        box_at = box_row[:, None] + offset[None, :]
        mid = tl.load(mid_ptr + box_at, inside, 0.0)
        rad = tl.load(rad_ptr + box_at, inside, 0.0)
        weight_at = at_k[:, None] + weight_row[None, :]
        weight_inside = k_inside[:, None] & (n < OG)[None, :]
        weight = tl.load(weight_ptr + weight_at, weight_inside, 0.0)
        magnitude = tl.load(magnitude_ptr + weight_at, weight_inside, 0.0)
        acc_mid, acc_rad = dual_dot(mid, rad, weight, magnitude, acc_mid, acc_rad, PRECISION, WIDEN)
    if HAS_BIAS:
        acc_mid += tl.load(bias_ptr + group * OG + n, n < OG, 0.0).to(COMPUTE)[None, :]
    store_box(
        out_mid_ptr, out_rad_ptr, bits_ptr, made_ptr, out_plane, acc_mid, acc_rad, m.to(tl.int64) * OC + group * OG,
        m < M, tile_n * BLOCK_N, OG, EPILOGUE, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def first_tap(remainder, padding, stride, dilation, taps, tap_step):
    """The first tap that reaches the pixels ``remainder`` + stride·t, ``taps`` or more if none does."""
    first = taps
    for tap in range(tap_step):
        first = tl.where((remainder + padding - tap * dilation) % stride == 0, tap, first)
    return first


@triton.jit(do_not_specialize=[*_GEOMETRY, "TAP_STEP_H", "TAP_STEP_W", "OUT_STEP_H", "OUT_STEP_W", "out_plane"])
def interval_conv2d_bwd_kernel(
    grad_mid_ptr,  # [B, OH, OW, OC]
    grad_rad_ptr,  # [B, OH, OW, OC]
    weight_ptr,  # [CG, KH, KW, OC]: what is summed lies side by side
    magnitude_ptr,  # |weight|, laid out as the weight
    out_mid_ptr,  # [B, H, W, C]
    out_rad_ptr,  # [B, H, W, C]
    bits_ptr,  # [2, B·H·W·C / 8] that the epilogue reads, or anything,
    made_ptr,  # [2, B·H·W·C / 8] that it writes, or anything
    B,
    H,
    W,
    C,
    OH,
    OW,
    OC,
    CG,
    OG,
    KH,
    KW,
    SH,
    SW,
    PH,
    PW,
    DH,
    DW,
    TAP_STEP_H,  # stride / gcd(stride, dilation): taps that far apart reach the same pixels,
    TAP_STEP_W,
    OUT_STEP_H,  # dilation / gcd(stride, dilation): and this far apart in the output
    OUT_STEP_W,
    out_plane,
    EPILOGUE: tl.constexpr,  # of `store_columns`; all but "none" need CG to be a multiple of 8
    EVEN: tl.constexpr,  # is OG a multiple of BLOCK_K?
    WIDE: tl.constexpr,  # do places in memory need 64 bits?
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    # Pixels of one remainder modulo the stride are reached by the same taps, and those are all that is summed.
    most = B * tl.cdiv(H, SH) * tl.cdiv(W, SW)
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(most, BLOCK_M), tl.cdiv(CG, BLOCK_N), 8)
    group = tl.program_id(1) // (SH * SW)
    remainder_h = tl.program_id(1) // SW % SH
    remainder_w = tl.program_id(1) % SW
    rows = (H - remainder_h + SH - 1) // SH
    columns = (W - remainder_w + SW - 1) // SW
    M = B * rows * columns
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    image = m // tl.maximum(columns, 1) // tl.maximum(rows, 1)
    row = m // tl.maximum(columns, 1) % tl.maximum(rows, 1)
    column = m % tl.maximum(columns, 1)
    first_h = first_tap(remainder_h, PH, SH, DH, KH, TAP_STEP_H)
    first_w = first_tap(remainder_w, PW, SW, DW, KW, TAP_STEP_W)
    taps_h = tl.cdiv(tl.maximum(KH - first_h, 0), TAP_STEP_H)
    taps_w = tl.cdiv(tl.maximum(KW - first_w, 0), TAP_STEP_W)
    # The output pixel at the first tap; exact divisions.
    out_h = row + (remainder_h + PH - first_h * DH) // SH
    out_w = column + (remainder_w + PW - first_w * DW) // SW
    grad_row = ((wide(image, WIDE) * OH + out_h) * OW + out_w) * OC + group * OG
    out_h = tl.where(m < M, out_h, OUTSIDE)
    weight_row = n * (KH * KW * OC) + group * OG
    acc_mid = tl.zeros((BLOCK_M, BLOCK_N), COMPUTE)
    acc_rad = tl.zeros((BLOCK_M, BLOCK_N), COMPUTE)
    start, tap_h, tap_w = 0, 0, 0
    for _ in range(taps_h * taps_w * tl.cdiv(OG, BLOCK_K)):
        o = start + k
        o_inside = (o < OG) | EVEN
        there = within(out_h - tap_h * OUT_STEP_H, OH) & within(out_w - tap_w * OUT_STEP_W, OW)
        inside = there[:, None] & o_inside[None, :]
        grad_at = grad_row[:, None] + (o - (tap_h * OUT_STEP_H * OW + tap_w * OUT_STEP_W) * OC)[None, :]
        mid = tl.load(grad_mid_ptr + grad_at, inside, 0.0)
        rad = tl.load(grad_rad_ptr + grad_at, inside, 0.0)
        kernel = (first_h + tap_h * TAP_STEP_H) * KW + first_w + tap_w * TAP_STEP_W
        weight_at = (kernel * OC + o)[:, None] + weight_row[None, :]
        weight_inside = o_inside[:, None] & (n < CG)[None, :]
        weight = tl.load(weight_ptr + weight_at, weight_inside, 0.0)
        magnitude = tl.load(magnitude_ptr + weight_at, weight_inside, 0.0)
        acc_mid, acc_rad = dual_dot(mid, rad, weight, magnitude, acc_mid, acc_rad, PRECISION, WIDEN)
        start, tap_h, tap_w = next_block(start, tap_h, tap_w, BLOCK_K, OG, taps_w)
    pixel = (image.to(tl.int64) * H + row * SH + remainder_h) * W + column * SW + remainder_w
    store_box(
        out_mid_ptr, out_rad_ptr, bits_ptr, made_ptr, out_plane, acc_mid, acc_rad, pixel * C + group * CG, m < M,
        tile_n * BLOCK_N, CG, EPILOGUE, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*_GEOMETRY, "rows_of_part"])
def interval_conv2d_weight_kernel(
    grad_mid_ptr,  # [B, OH, OW, OC], M = B·OH·OW pixels
    grad_rad_ptr,  # [B, OH, OW, OC]
    mid_ptr,  # [B, H, W, C]
    rad_ptr,  # [B, H, W, C]
    weight_ptr,  # [OC, KH, KW, CG]
    out_ptr,  # [parts, OC, KH, KW, CG]; program_id(1) sums its part of the pixels
    M,
    H,
    W,
    C,
    OH,
    OW,
    OC,
    CG,
    OG,
    KH,
    KW,
    SH,
    SW,
    PH,
    PW,
    DH,
    DW,
    rows_of_part,
    FLAT: tl.constexpr,
    EVEN: tl.constexpr,  # are OG a multiple of BLOCK_N and CG of BLOCK_K?
    WIDE: tl.constexpr,  # do places in memory need 64 bits?
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    taps_and_channels = KH * KW * CG
    blocks = tl.cdiv(CG, BLOCK_K)
    tiles_k = tl.cdiv(taps_and_channels, BLOCK_K) if FLAT else KH * KW * blocks
    tile_n, tile_k = tile_of(tl.program_id(0), tl.cdiv(OG, BLOCK_N), tiles_k, 8)
    part = tl.program_id(1)
    group = tl.program_id(2)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if FLAT:
        at_k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
        tap = at_k // CG
        c = at_k - tap * CG
        k_inside = at_k < taps_and_channels
    else:
        tap = tile_k // blocks
        c = (tile_k - tap * blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        at_k = tap * CG + c
        k_inside = (c < CG) | EVEN
    n_inside = (n < OG) | EVEN
    tap_h = tap // KW * DH - PH
    tap_w = tap % KW * DW - PW
    acc_mid = tl.zeros((BLOCK_N, BLOCK_K), COMPUTE)
    acc_rad = tl.zeros((BLOCK_N, BLOCK_K), COMPUTE)
    stop = min(M, (part + 1) * rows_of_part)
    m = part * rows_of_part + tl.arange(0, BLOCK_M)
    column, row, image = m % OW, m // OW % OH, m // OW // OH
    for _ in range(part * rows_of_part, stop, BLOCK_M):
        first_h, first_w = row * SH, column * SW
        if FLAT:
            h = first_h[:, None] + tap_h[None, :]
            w = first_w[:, None] + tap_w[None, :]
            inside = (m < stop)[:, None] & within(h, H) & within(w, W) & k_inside[None, :]
        else:
            inside = ((m < stop) & within(first_h + tap_h, H) & within(first_w + tap_w, W))[:, None] & k_inside[None, :]
        box_row = ((wide(image, WIDE) * H + first_h) * W + first_w) * C + group * CG
        at = box_row[:, None] + ((tap_h * W + tap_w) * C + c)[None, :]
        grad_at = (wide(m, WIDE) * OC + group * OG)[:, None] + n[None, :]
        grad_inside = (m < stop)[:, None] & n_inside[None, :]
        # The pixels BLOCK_M further on, without a division.
        m += BLOCK_M
        column += BLOCK_M % OW
        row += BLOCK_M // OW % OH + (column >= OW).to(tl.int32)
        column -= tl.where(column >= OW, OW, 0)
        image += BLOCK_M // OW // OH + (row >= OH).to(tl.int32)
        row -= tl.where(row >= OH, OH, 0)
        grad_mid = tl.trans(tl.load(grad_mid_ptr + grad_at, grad_inside, 0.0))
        grad_rad = tl.trans(tl.load(grad_rad_ptr + grad_at, grad_inside, 0.0))
        mid = tl.load(mid_ptr + at, inside, 0.0)
        rad = tl.load(rad_ptr + at, inside, 0.0)
        if WIDEN:
            grad_mid, grad_rad = grad_mid.to(tl.float32), grad_rad.to(tl.float32)
            mid, rad = mid.to(tl.float32), rad.to(tl.float32)
        acc_mid = tl.dot(grad_mid, mid, acc_mid, input_precision=PRECISION, out_dtype=COMPUTE)
        acc_rad = tl.dot(grad_rad, rad, acc_rad, input_precision=PRECISION, out_dtype=COMPUTE)
    inside = n_inside[:, None] & k_inside[None, :]
    at = (group * OG + n)[:, None] * taps_and_channels + at_k[None, :]
    weight = tl.load(weight_ptr + at, inside, 0.0).to(COMPUTE)
    tl.store(out_ptr + part.to(tl.int64) * OC * taps_and_channels + at, acc_mid + sign(weight) * acc_rad, inside)


# --- launchers: boxes and weights channels-last in memory, [B, C, H, W] and [OC, C / groups, KH, KW] in shape --------


def forward_into(
    mid: Tensor,
    rad: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    out_mid: Tensor,
    out_rad: Tensor,
    epilogue: str,
    bits: Tensor | None,
    made: Tensor | None,
    block: Block,
    tf32: bool,
) -> None:
    """The convolution of the box, then an epilogue of ``store_columns`` with the bits that it reads and makes.

    Any epilogue but "none" needs OC / groups to be a multiple of 8.
    """
    if is_flat(mid.shape[1]) and groups == 1 and not block.flat:
        mid, rad, weight = (_with_more_channels(t) for t in (mid, rad, weight))
    launch = _forward(
        mid.shape, out_mid.shape, weight.shape, (*stride, *padding, *dilation), groups, bias is not None, epilogue,
        block, tf32, mid.dtype, mid.device,
    )  # fmt: skip
    with on_device(mid):
        launch(
            mid, rad, weight, weight.abs(), mid if bias is None else bias,
            out_mid, out_rad, mid if bits is None else bits, mid if made is None else made,
        )  # fmt: skip


@functools.lru_cache(LAUNCHES)
def _forward(
    box: torch.Size,
    out: torch.Size,
    weight: torch.Size,
    geometry: tuple[int, ...],
    groups: int,
    has_bias: bool,
    epilogue: str,
    block: Block,
    tf32: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Launch:
    _, C, H, W = box
    B, OC, OH, OW = out
    CG, KH, KW = weight[1:]
    M, OG = B * OH * OW, OC // groups
    return Launch(
        interval_conv2d_fwd_kernel, (triton.cdiv(M, block.m) * triton.cdiv(OG, block.n), groups),
        (M, H, W, C, OH, OW, OC, CG, OG, KH, KW, *geometry, M * OC // 8),
        HAS_BIAS=has_bias, EPILOGUE=epilogue,
        FLAT=block.flat, EVEN=CG % block.k == 0, WIDE=max(box.numel(), out.numel()) >= 2**30,
        **tile_options(block, dtype, tf32),
    )  # fmt: skip


def _with_more_channels(t: Tensor) -> Tensor:
    """Images or weights, channels-last, with zeros up to as many channels as tensor cores sum at least."""
    return F.pad(t.permute(0, 2, 3, 1), (0, TENSOR_CORE_TERMS - t.shape[1])).permute(0, 3, 1, 2)


def backward_into(
    mid: Tensor,
    rad: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    out_mid: Tensor,
    out_rad: Tensor,
    epilogue: str,
    bits: Tensor | None,
    made: Tensor | None,
    block: Block,
    tf32: bool,
) -> None:
    """The convolution's backward-data pass on the gradient box, then an epilogue as in ``forward_into``, for C."""
    launch = _backward(
        mid.shape, out_mid.shape, weight.shape, tuple(stride), tuple(padding), tuple(dilation), groups, epilogue, block,
        tf32, mid.dtype, mid.device,
    )  # fmt: skip
    weight = weight.permute(1, 2, 3, 0).contiguous()
    with on_device(mid):
        launch(
            mid, rad, weight, weight.abs(), out_mid, out_rad,
            mid if bits is None else bits, mid if made is None else made,
        )  # fmt: skip


@functools.lru_cache(LAUNCHES)
def _backward(
    box: torch.Size,
    out: torch.Size,
    weight: torch.Size,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    epilogue: str,
    block: Block,
    tf32: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Launch:
    B, OC, OH, OW = box
    _, C, H, W = out
    CG, KH, KW = weight[1:]
    OG = OC // groups
    common = [math.gcd(s, d) for s, d in zip(stride, dilation, strict=True)]
    tap_steps = [s // g for s, g in zip(stride, common, strict=True)]
    out_steps = [d // g for d, g in zip(dilation, common, strict=True)]
    most = B * triton.cdiv(H, stride[0]) * triton.cdiv(W, stride[1])
    grid = (triton.cdiv(most, block.m) * triton.cdiv(CG, block.n), groups * stride[0] * stride[1])
    return Launch(
        interval_conv2d_bwd_kernel, grid,
        (B, H, W, C, OH, OW, OC, CG, OG, KH, KW, *stride, *padding, *dilation, *tap_steps, *out_steps,
         out.numel() // 8),
        EPILOGUE=epilogue, EVEN=OG % block.k == 0, WIDE=box.numel() >= 2**30,
        **tile_options(block, dtype, tf32),
    )  # fmt: skip


def weight_gradient(
    grad_mid: Tensor,
    grad_rad: Tensor,
    mid: Tensor,
    rad: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    block: Block,
    tf32: bool,
) -> Tensor:
    """The gradient of the weight, channels-last: the convolution's at midpoints, plus sign(weight) ⊙ its at radii."""
    launch, parts = _weight_gradient(
        grad_mid.shape, mid.shape, weight.shape, (*stride, *padding, *dilation), groups, block, tf32, weight.dtype,
        weight.device,
    )  # fmt: skip
    OC, CG, KH, KW = weight.shape
    dtype = weight.dtype if parts == 1 else sum_type(weight.dtype)
    out = torch.empty(parts, OC, KH, KW, CG, dtype=dtype, device=weight.device)
    with on_device(mid):
        launch(grad_mid, grad_rad, mid, rad, weight, out)
    summed = out[0] if parts == 1 else out.sum(0).to(weight.dtype)
    return summed.permute(0, 3, 1, 2)


@functools.lru_cache(LAUNCHES)
def _weight_gradient(
    grad: torch.Size,
    box: torch.Size,
    weight: torch.Size,
    geometry: tuple[int, ...],
    groups: int,
    block: Block,
    tf32: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Launch, int]:
    """The launch, and of how many parts the sum is."""
    _, C, H, W = box
    B, OC, OH, OW = grad
    CG, KH, KW = weight[1:]
    M, OG = B * OH * OW, OC // groups
    tiles_k = triton.cdiv(KH * KW * CG, block.k) if is_flat(CG) else KH * KW * triton.cdiv(CG, block.k)
    tiles = triton.cdiv(OG, block.n) * tiles_k
    parts, rows = parts_of(M, tiles * groups, block.m)
    launch = Launch(
        interval_conv2d_weight_kernel, (tiles, parts, groups),
        (M, H, W, C, OH, OW, OC, CG, OG, KH, KW, *geometry, rows),
        FLAT=is_flat(CG), EVEN=OG % block.n == 0 and CG % block.k == 0,
        WIDE=max(box.numel(), grad.numel()) >= 2**30,
        **tile_options(block, dtype, tf32),
    )  # fmt: skip
    return launch, parts
