"""interval_conv2d and its two gradients where input channels are few, as on an image: memory should be all that limits.

What is large is the box at the outputs. Each of its elements passes once, in 16 bytes at a time, and the sums over the
few channels and the taps cost few instructions:

* Forward and weight gradient read a copy of the image that is padded, its channels filled up to 1, 2 or 4: a row of a
  window is then one stretch of memory, read without masks. PIXELS outputs side by side, whose windows overlap, are one
  row of the product; their weights are those of one output, shifted, with zeros where its window does not reach.
* Backward-data multiplies first and gathers after. A program walks down a strip of the gradient, each row of which is
  multiplied by the weights of all taps; the sums over the taps of a column are kept from row to row, in registers, and
  once a row of the result is complete its columns are shifted against one another and added.

Sizes are constants to the compiler: there are few such layers, and divisions become multiplications. A pixel that is
not finite makes NaN of neighbouring outputs too, where a zero of the weight meets it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interval_linear import sign, store_box
from .launch import (
    LAUNCHES,
    PROGRAMS,
    TENSOR_CORE_TERMS,
    Block,
    Launch,
    dot_options,
    interpreting,
    on_device,
    parts_of,
    sum_type,
    tile_options,
)


@triton.jit(do_not_specialize=["pixels"])
def fill_up_kernel(
    mid_ptr,  # [B, H, W, C]
    rad_ptr,  # [B, H, W, C]
    out_mid_ptr,  # [B, HEIGHT, WIDTH, CHANNELS]: `pixels` of them
    out_rad_ptr,  # [B, HEIGHT, WIDTH, CHANNELS]
    pixels,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, CHANNELS)
    h = pixel // WIDTH % HEIGHT - PH
    w = pixel % WIDTH - PW
    there = (pixel < pixels) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    at = (((pixel // WIDTH // HEIGHT * H + h) * W + w) * C)[:, None] + c[None, :]
    inside = there[:, None] & (c < C)[None, :]
    out_at = pixel[:, None] * CHANNELS + c[None, :]
    out_inside = (pixel < pixels)[:, None] & (c < CHANNELS)[None, :]
    tl.store(out_mid_ptr + out_at, tl.load(mid_ptr + at, inside, 0.0), out_inside)
    tl.store(out_rad_ptr + out_at, tl.load(rad_ptr + at, inside, 0.0), out_inside)


@triton.jit
def window_start(
    row, OH: tl.constexpr, COLUMNS: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Where the windows of PIXELS outputs, row number ``row`` of the product, begin in the filled-up image."""
    line = row // COLUMNS // OH * HEIGHT + row // COLUMNS % OH * SH
    return line * (WIDTH * CHANNELS) + row % COLUMNS * (PIXELS * SW * CHANNELS)


@triton.jit
def tap_of(element, n, KW: tl.constexpr, OC: tl.constexpr, SW: tl.constexpr, DW: tl.constexpr, CHANNELS: tl.constexpr):
    """The tap at which an element of a window's row is summed for channel ``n`` of PIXELS outputs; is there one?"""
    column = element // CHANNELS - n // OC * SW
    return column // DW, (column >= 0) & (column < KW * DW) & (column % DW == 0)


@triton.jit(do_not_specialize=["M", "tiles_of_program", "out_plane"])
def interval_conv2d_image_fwd_kernel(
    mid_ptr,  # [B, HEIGHT, WIDTH, CHANNELS], filled up
    rad_ptr,  # [B, HEIGHT, WIDTH, CHANNELS]
    weight_ptr,  # [OC, KH, KW, C]
    bias_ptr,  # [OC], or anything without HAS_BIAS
    out_mid_ptr,  # [B, OH, OW, OC], also [M, PIXELS·OC]
    out_rad_ptr,  # [B, OH, OW, OC]
    bits_ptr,  # [2, B·OH·OW·OC / 8] that EPILOGUE reads, or anything
    made_ptr,  # the same that it makes
    M,
    tiles_of_program,
    out_plane,
    C: tl.constexpr,
    OC: tl.constexpr,
    OH: tl.constexpr,
    COLUMNS: tl.constexpr,  # OW / PIXELS
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    SPAN: tl.constexpr,  # elements of a window's row
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,  # of store_columns; any but "none" needs OC to be a multiple of 8
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # a multiple of SPAN
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    tile_n = tl.program_id(0)  # the first axis: neighbours in memory are written at about the same time
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    kh = k // SPAN
    c = (k % CHANNELS)[:, None]
    tap, reached = tap_of((k % SPAN)[:, None], n[None, :], KW, OC, SW, DW, CHANNELS)
    reached &= (c < C) & (n < PIXELS * OC)[None, :]
    ROWS: tl.constexpr = BLOCK_K // SPAN  # of the kernel, in one block of the sum
    weights = ()
    magnitudes = ()
    for row in tl.static_range(0, KH, ROWS):
        weight_at = (((n % OC)[None, :] * KH + (kh + row)[:, None]) * KW + tap) * C + c
        weight = tl.load(weight_ptr + weight_at, reached & (kh + row < KH)[:, None], 0.0)
        if WIDEN:
            weight = weight.to(tl.float32)
        weights += (weight,)
        magnitudes += (tl.abs(weight),)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + n % OC).to(COMPUTE)[None, :]
    first = tl.program_id(1) * tiles_of_program
    for tile in range(first, min(first + tiles_of_program, tl.cdiv(M, BLOCK_M))):
        m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        start = window_start(tl.minimum(m, M - 1), OH, COLUMNS, SH, SW, CHANNELS, PIXELS, HEIGHT, WIDTH)
        acc_mid = tl.zeros((BLOCK_M, BLOCK_N), COMPUTE)
        acc_rad = tl.zeros((BLOCK_M, BLOCK_N), COMPUTE)
        for row in tl.static_range(0, KH, ROWS):
            at = start[:, None] + ((row + kh) * (DH * WIDTH * CHANNELS) + k % SPAN)[None, :]
            inside = (row + kh < KH)[None, :]
            mid = tl.load(mid_ptr + at, inside, 0.0)
            rad = tl.load(rad_ptr + at, inside, 0.0)
            if WIDEN:
                mid, rad = mid.to(tl.float32), rad.to(tl.float32)
            acc_mid = tl.dot(mid, weights[row // ROWS], acc_mid, input_precision=PRECISION, out_dtype=COMPUTE)
            acc_rad = tl.dot(rad, magnitudes[row // ROWS], acc_rad, input_precision=PRECISION, out_dtype=COMPUTE)
        if HAS_BIAS:
            acc_mid += bias
        store_box(
            out_mid_ptr, out_rad_ptr, bits_ptr, made_ptr, out_plane, acc_mid, acc_rad,
            m.to(tl.int64) * (PIXELS * OC), m < M, tile_n * BLOCK_N, PIXELS * OC, EPILOGUE, BLOCK_M, BLOCK_N,
        )  # fmt: skip


NOWHERE = tl.constexpr(2**20)  # a lane that no strip has, whatever a tap adds


@triton.jit
def gathered(
    sums, lane, phase, KW: tl.constexpr, SW: tl.constexpr, PW: tl.constexpr, DW: tl.constexpr, CHANNELS: tl.constexpr,
    TAPS: tl.constexpr, LANES: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Σ over taps of sums [BLOCK_M, TAPS·CHANNELS], each from the column that it reaches: [BLOCK_M, CHANNELS]."""
    n = tl.arange(0, TAPS * CHANNELS)
    # In pixels of the image; + SW·KW·DW because remainders of negative numbers are nobody's friend.
    reach = phase + PW + SW * KW * DW - n // CHANNELS * DW
    shift = reach // SW - KW * DW
    other = lane[:, None] + shift[None, :]
    inside = (other >= 0) & (other < LANES) & ((reach % SW == 0) & (n // CHANNELS < KW))[None, :]
    index = tl.where(inside, tl.arange(0, BLOCK_M)[:, None] + shift[None, :], 0)
    found = tl.where(inside, tl.gather(sums, index, 0), 0.0)
    return tl.sum(tl.reshape(found, (BLOCK_M, TAPS, CHANNELS)), 1)


@triton.jit(do_not_specialize=["strips", "steps_of_part"])
def interval_conv2d_image_bwd_kernel(
    grad_mid_ptr,  # [B, OH, OW, OC]
    grad_rad_ptr,  # [B, OH, OW, OC]
    weight_ptr,  # [OC, KH, KW, C]
    out_mid_ptr,  # [B, H, W, C]
    out_rad_ptr,  # [B, H, W, C]
    strips,  # B·STRIPS
    steps_of_part,  # rows of the gradient after each of which a program writes results; program_id(1) is its part
    C: tl.constexpr,
    OC: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,  # of a row of the kernel, with zeros
    LANES: tl.constexpr,  # columns of the gradient that a strip holds,
    LEFT: tl.constexpr,  # the first of which that it computes results for,
    USED: tl.constexpr,  # and how many
    STRIPS: tl.constexpr,  # of an image
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,  # OC or more
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    m = tl.arange(0, BLOCK_M)
    lane = tl.where(m < BLOCK_M // LANES * LANES, m % LANES, NOWHERE)
    strip = tl.program_id(0) * (BLOCK_M // LANES) + m // LANES
    there = (lane < LANES) & (strip < strips)
    image = strip // STRIPS
    column = strip % STRIPS * USED - LEFT + lane
    o = tl.arange(0, BLOCK_K)
    n = tl.arange(0, TAPS * CHANNELS)
    tap, c = n // CHANNELS, n % CHANNELS
    weight_inside = (o < OC)[:, None] & ((tap < KW) & (c < C))[None, :]
    weights = ()
    magnitudes = ()
    for kh in tl.static_range(KH):
        weight_at = (o * (KH * KW * C))[:, None] + ((kh * KW + tap) * C + c)[None, :]
        weight = tl.load(weight_ptr + weight_at, weight_inside, 0.0)
        if WIDEN:
            weight = weight.to(tl.float32)
        weights += (weight,)
        magnitudes += (tl.abs(weight),)
    # Of the results' rows r·SH - PH + 0, 1, … that row r of the gradient adds to, the first SH are then complete.
    OPEN: tl.constexpr = max((KH - 1) * DH + 1, SH)
    sums_mid = ()
    sums_rad = ()
    for _ in tl.static_range(OPEN):
        sums_mid += (tl.zeros((BLOCK_M, TAPS * CHANNELS), COMPUTE),)
        sums_rad += (tl.zeros((BLOCK_M, TAPS * CHANNELS), COMPUTE),)
    grad_row = ((image.to(tl.int64) * OH * OW + column) * OC)[:, None] + o[None, :]
    grad_inside = (there & (column >= 0) & (column < OW))[:, None] & (o < OC)[None, :]
    out_c = tl.arange(0, CHANNELS)
    out_row = (image.to(tl.int64) * H * W + column * SW) * C
    out_there = there & (lane >= LEFT) & (lane < LEFT + USED)
    first = PH // SH + tl.program_id(1) * steps_of_part
    for row in range(max(first - (KH - 1) * DH // SH, 0), min(first + steps_of_part, (H - 1 + PH) // SH + 1)):
        rows = row + tl.zeros((BLOCK_M,), tl.int32)
        inside = grad_inside & (rows < OH)[:, None]
        mid = tl.load(grad_mid_ptr + row * (OW * OC) + grad_row, inside, 0.0)
        rad = tl.load(grad_rad_ptr + row * (OW * OC) + grad_row, inside, 0.0)
        if WIDEN:
            mid, rad = mid.to(tl.float32), rad.to(tl.float32)
        new_mid = ()
        new_rad = ()
        for i in tl.static_range(OPEN):
            if i % DH == 0 and i // DH < KH:
                mids = tl.dot(mid, weights[i // DH], sums_mid[i], input_precision=PRECISION, out_dtype=COMPUTE)
                rads = tl.dot(rad, magnitudes[i // DH], sums_rad[i], input_precision=PRECISION, out_dtype=COMPUTE)
                new_mid += (mids,)
                new_rad += (rads,)
            else:
                new_mid += (sums_mid[i],)
                new_rad += (sums_rad[i],)
        for i in tl.static_range(SH):
            h = rows * SH - PH + i
            row_inside = out_there & (rows >= first) & (h >= 0) & (h < H)
            for phase in tl.static_range(SW):
                out_mid = gathered(new_mid[i], lane, phase, KW, SW, PW, DW, CHANNELS, TAPS, LANES, BLOCK_M)
                out_rad = gathered(new_rad[i], lane, phase, KW, SW, PW, DW, CHANNELS, TAPS, LANES, BLOCK_M)
                at = (out_row + (h * W + phase) * C)[:, None] + out_c[None, :]
                out_inside = row_inside & (column * SW + phase < W)
                tl.store(out_mid_ptr + at, out_mid, out_inside[:, None] & (out_c < C)[None, :])
                tl.store(out_rad_ptr + at, out_rad, out_inside[:, None] & (out_c < C)[None, :])
        sums_mid = ()
        sums_rad = ()
        for i in tl.static_range(OPEN):
            if i + SH < OPEN:
                sums_mid += (new_mid[i + SH],)
                sums_rad += (new_rad[i + SH],)
            else:
                sums_mid += (tl.zeros((BLOCK_M, TAPS * CHANNELS), COMPUTE),)
                sums_rad += (tl.zeros((BLOCK_M, TAPS * CHANNELS), COMPUTE),)


@triton.jit(do_not_specialize=["M", "rows_of_part"])
def interval_conv2d_image_weight_kernel(
    grad_mid_ptr,  # [B, OH, OW, OC], also [M, PIXELS·OC]
    grad_rad_ptr,  # [B, OH, OW, OC]
    mid_ptr,  # [B, HEIGHT, WIDTH, CHANNELS], filled up
    rad_ptr,  # [B, HEIGHT, WIDTH, CHANNELS]
    weight_ptr,  # [OC, KH, KW, C]
    out_ptr,  # [parts, PIXELS, OC, KH, KW, C]; program_id(1) sums its part of the rows
    M,
    rows_of_part,
    C: tl.constexpr,
    OC: tl.constexpr,
    OH: tl.constexpr,
    COLUMNS: tl.constexpr,  # OW / PIXELS
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    SPAN: tl.constexpr,  # elements of a window's row
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    TILES_K: tl.constexpr = (KH * SPAN + BLOCK_K - 1) // BLOCK_K
    n = tl.program_id(0) // TILES_K * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(0) % TILES_K * BLOCK_K + tl.arange(0, BLOCK_K)
    part = tl.program_id(1)
    kh = k // SPAN
    offset = kh * (DH * WIDTH * CHANNELS) + k % SPAN
    acc_mid = tl.zeros((BLOCK_N, BLOCK_K), COMPUTE)
    acc_rad = tl.zeros((BLOCK_N, BLOCK_K), COMPUTE)
    stop = min(M, (part + 1) * rows_of_part)
    for first in range(part * rows_of_part, stop, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        at = window_start(m, OH, COLUMNS, SH, SW, CHANNELS, PIXELS, HEIGHT, WIDTH)[:, None] + offset[None, :]
        inside = (m < stop)[:, None] & (kh < KH)[None, :]
        grad_at = m[:, None].to(tl.int64) * (PIXELS * OC) + n[None, :]
        grad_inside = (m < stop)[:, None] & (n < PIXELS * OC)[None, :]
        grad_mid = tl.trans(tl.load(grad_mid_ptr + grad_at, grad_inside, 0.0))
        grad_rad = tl.trans(tl.load(grad_rad_ptr + grad_at, grad_inside, 0.0))
        mid = tl.load(mid_ptr + at, inside, 0.0)
        rad = tl.load(rad_ptr + at, inside, 0.0)
        if WIDEN:
            grad_mid, grad_rad = grad_mid.to(tl.float32), grad_rad.to(tl.float32)
            mid, rad = mid.to(tl.float32), rad.to(tl.float32)
        acc_mid = tl.dot(grad_mid, mid, acc_mid, input_precision=PRECISION, out_dtype=COMPUTE)
        acc_rad = tl.dot(grad_rad, rad, acc_rad, input_precision=PRECISION, out_dtype=COMPUTE)
    tap, reached = tap_of((k % SPAN)[None, :], n[:, None], KW, OC, SW, DW, CHANNELS)
    c = (k % CHANNELS)[None, :]
    at = (((n % OC)[:, None] * KH + kh[None, :]) * KW + tap) * C + c
    inside = reached & (c < C) & (kh < KH)[None, :] & (n < PIXELS * OC)[:, None]
    weight = tl.load(weight_ptr + at, inside, 0.0).to(COMPUTE)
    place = (part * PIXELS + n // OC).to(tl.int64)[:, None]
    tl.store(out_ptr + place * (OC * KH * KW * C) + at, acc_mid + sign(weight) * acc_rad, inside)


# --- launchers: as in interval_conv2d.py, of one group ---------------------------------------------------------------

FORWARD_PROGRAMS = 2 * PROGRAMS  # fewer would read the weights less often, but not all end at the same time
LONGEST_LOAD = 16  # bytes of one instruction
MOST_CHANNELS = 4
FARTHEST_TAP = 6  # pixels of a window beyond its first, in each direction: what is open at once is in registers
MOST_PADDING = 16  # pixels; a strip must be wider
MOST_SUMMED = 128  # channels of the gradient, in one tile
MOST_SUMS = 256  # of a column of the gradient, and as many of radii: these are the registers


def image_blocks(
    op: str,  # "forward", "backward" or "weight"
    size: Sequence[int],  # of the layer's input, [B, C, H, W]
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    tf32: bool,
) -> list[Block]:
    """Candidates of these kernels, the default first; none for a layer that is not theirs."""
    OC, C, *kernel = weight.shape
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if groups > 1 or C > MOST_CHANNELS or max(stride) > 2 or max(reach) > FARTHEST_TAP or max(padding) > MOST_PADDING:
        return []
    pixels = math.prod(n + 2 * p + 32 for n, p in zip(size[2:], padding, strict=True))
    if max(size[0] * pixels * MOST_CHANNELS, pixels * OC) >= 2**31 or weight.dtype is torch.float64:
        return []
    cores = weight.dtype is not torch.float32 or tf32
    blocks = {"forward": _forward_blocks, "backward": _backward_blocks, "weight": _weight_blocks}[op](
        OC, triton.next_power_of_2(C), kernel, max(reach[0] + 1, stride[0]), cores, weight.element_size() == 2
    )
    return [block._replace(image=True) for block in blocks]


def _forward_blocks(OC: int, C: int, kernel: list[int], open_rows: int, cores: bool, short: bool) -> list[Block]:
    if interpreting():
        return [Block(64, 32, 32, 4, 1)]
    many_taps = kernel[0] * kernel[1] > 16  # of all pixels on their way, all must find place in shared memory
    if not cores:
        return [Block(64, 64, 16, 8, 1 if many_taps else 3)]
    if many_taps:
        return [Block(64, 64, 16, 4, 2 if short else 1)]
    return [Block(64, 64, 16, 4, 3), Block(64, 64, 64, 4, 3), Block(128, 64, 16, 8, 3)]


def _backward_blocks(OC: int, C: int, kernel: list[int], open_rows: int, cores: bool, short: bool) -> list[Block]:
    k = max(TENSOR_CORE_TERMS, triton.next_power_of_2(OC))
    n = max(TENSOR_CORE_TERMS, C * triton.next_power_of_2(kernel[1]))
    if k > MOST_SUMMED or n * open_rows > MOST_SUMS:
        return []
    warps = 4 if n * open_rows <= 64 and cores else 8
    if interpreting() or not cores:
        return [Block(64, n, k, warps, 3)]
    return [Block(64, n, k, warps, 4), Block(64, n, k, warps, 3)]


def _weight_blocks(OC: int, C: int, kernel: list[int], open_rows: int, cores: bool, short: bool) -> list[Block]:
    if interpreting():
        return [Block(64, 32, 32, 4, 1)]
    if not cores:
        return [Block(16, 64, 64, 8, 3)]
    if not short:
        return [Block(32, 64, 64, 8, 3), Block(32, 64, 64, 4, 1)]
    return [Block(32, 128, 64, 8, 3), Block(32, 128, 64, 8, 4), Block(64, 64, 64, 4, 3)]


def window_sizes(
    weight: Sequence[int], dtype: torch.dtype, size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> dict[str, int]:
    """How the windows of outputs of this size, [OH, OW], lie in the filled-up image: constants of the kernels."""
    OC, C, KH, KW = weight
    (OH, OW), (SH, SW), (DH, DW) = size, stride, dilation
    channels = triton.next_power_of_2(C)
    aligned = max(1, LONGEST_LOAD // (channels * dtype.itemsize))  # pixels
    pixels = 1
    while OW % (2 * pixels) == 0 and 2 * pixels * SW <= aligned:
        pixels *= 2
    span = max(TENSOR_CORE_TERMS, triton.next_power_of_2(((pixels - 1) * SW + (KW - 1) * DW + 1) * channels))
    return {
        "C": C, "OC": OC, "OH": OH, "COLUMNS": OW // pixels, "KH": KH, "KW": KW, "SH": SH, "SW": SW, "DH": DH, "DW": DW,
        "CHANNELS": channels, "PIXELS": pixels, "SPAN": span,
        "HEIGHT": (OH - 1) * SH + (KH - 1) * DH + 1,
        "WIDTH": triton.cdiv((OW - pixels) * SW + span // channels, aligned) * aligned,
    }  # fmt: skip


class _Windows(NamedTuple):
    """What a kernel on the filled-up image needs: how the box is filled up, the launch, and of how many parts a sum."""

    filled_up: tuple[int, ...]
    fill_up: Launch
    launch: Launch
    parts: int

    def fill(self, mid: Tensor, rad: Tensor) -> tuple[Tensor, Tensor]:
        """The box [B, C, H, W] as [B, HEIGHT, WIDTH, CHANNELS], zeros around and between."""
        out_mid = mid.new_empty(self.filled_up)
        out_rad = torch.empty_like(out_mid)
        self.fill_up(mid, rad, out_mid, out_rad)
        return out_mid, out_rad


def _fill_up(box: torch.Size, padding: Sequence[int], sizes: dict[str, int]) -> tuple[tuple[int, ...], Launch]:
    B, C, H, W = box
    HEIGHT, WIDTH, CHANNELS = sizes["HEIGHT"], sizes["WIDTH"], sizes["CHANNELS"]
    pixels = B * HEIGHT * WIDTH
    block = 8192 if interpreting() else 512  # a program of the interpreter costs milliseconds, whatever its size
    launch = Launch(
        fill_up_kernel, (triton.cdiv(pixels, block),), (pixels,),
        C=C, H=H, W=W, PH=padding[0], PW=padding[1], HEIGHT=HEIGHT, WIDTH=WIDTH, CHANNELS=CHANNELS, BLOCK=block,
    )  # fmt: skip
    return (B, HEIGHT, WIDTH, CHANNELS), launch


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
    """The convolution of the box, then an epilogue of ``store_columns``; any but "none" needs OC % 8 to be 0."""
    windows = _forward(
        mid.shape, out_mid.shape, weight.shape, tuple(stride), tuple(padding), tuple(dilation), bias is not None,
        epilogue, block, tf32, mid.dtype, mid.device,
    )  # fmt: skip
    with on_device(mid):
        mid, rad = windows.fill(mid, rad)
        windows.launch(
            mid, rad, weight, mid if bias is None else bias,
            out_mid, out_rad, mid if bits is None else bits, mid if made is None else made,
        )  # fmt: skip


@functools.lru_cache(LAUNCHES)
def _forward(
    box: torch.Size,
    out: torch.Size,
    weight: torch.Size,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    has_bias: bool,
    epilogue: str,
    block: Block,
    tf32: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> _Windows:
    sizes = window_sizes(weight, dtype, out[2:], stride, dilation)
    N = sizes["PIXELS"] * sizes["OC"]
    M = out.numel() // N
    tiles = triton.cdiv(M, block.m)
    columns = triton.cdiv(N, block.n)
    tiles_of_program = triton.cdiv(tiles * columns, FORWARD_PROGRAMS)
    launch = Launch(
        interval_conv2d_image_fwd_kernel, (columns, triton.cdiv(tiles, tiles_of_program)),
        (M, tiles_of_program, M * N // 8), **sizes, HAS_BIAS=has_bias, EPILOGUE=epilogue,
        **tile_options(block._replace(k=max(block.k, sizes["SPAN"])), dtype, tf32),
    )  # fmt: skip
    return _Windows(*_fill_up(box, padding, sizes), launch, 1)


def strip_sizes(
    weight: Sequence[int],  # its shape, as in ``window_sizes``
    size: Sequence[int],  # of the image, [H, W],
    grad_size: Sequence[int],  # and of the gradient, [OH, OW]
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    block: Block,
) -> dict[str, int]:
    """How tiles of ``block.m`` columns of the gradient cover the image: constants of the kernel.

    Lane j computes the columns of the image from stride · j on, for which it needs the sums of its neighbours.
    """
    OC, C, KH, KW = weight
    channels = triton.next_power_of_2(C)
    (H, W), (OH, OW), (SH, SW), (PH, PW), (DH, DW) = size, grad_size, stride, padding, dilation
    lanes = used = triton.cdiv(W, SW)
    left, strips = 0, 1
    if max(lanes, OW) <= block.m:  # whole rows, and nothing beyond them
        lanes = max(lanes, OW)
    else:
        left = max(0, triton.cdiv((KW - 1) * DW - PW, SW))
        lanes, used = block.m, block.m - left - (SW - 1 + PW) // SW
        strips = triton.cdiv(triton.cdiv(W, SW), used)
    return {
        "C": C, "OC": OC, "H": H, "W": W, "OH": OH, "OW": OW, "KH": KH, "KW": KW,
        "SH": SH, "SW": SW, "PH": PH, "PW": PW, "DH": DH, "DW": DW,
        "CHANNELS": channels, "TAPS": block.n // channels,
        "LANES": lanes, "LEFT": left, "USED": used, "STRIPS": strips,
    }  # fmt: skip


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
    """The convolution's backward-data pass on the gradient box. So few channels make no byte: epilogue is "none"."""
    assert epilogue == "none", epilogue
    launch = _backward(
        mid.shape, out_mid.shape, weight.shape, tuple(stride), tuple(padding), tuple(dilation), block, tf32, mid.dtype,
        mid.device,
    )  # fmt: skip
    with on_device(mid):
        launch(mid, rad, weight, out_mid, out_rad)


@functools.lru_cache(LAUNCHES)
def _backward(
    box: torch.Size,
    out: torch.Size,
    weight: torch.Size,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    block: Block,
    tf32: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Launch:
    sizes = strip_sizes(weight, out[2:], box[2:], stride, padding, dilation, block)
    strips = box[0] * sizes["STRIPS"]
    tiles = triton.cdiv(strips, block.m // sizes["LANES"])
    steps = (sizes["H"] - 1 + padding[0]) // stride[0] + 1 - padding[0] // stride[0]
    # Each part of an image begins with the rows that the part above ends with: as few parts as fill the device.
    steps_of_part = triton.cdiv(steps, max(1, PROGRAMS // 2 // tiles))
    return Launch(
        interval_conv2d_image_bwd_kernel, (tiles, triton.cdiv(steps, steps_of_part)), (strips, steps_of_part), **sizes,
        BLOCK_M=block.m, BLOCK_K=block.k, num_warps=block.warps, num_stages=block.stages, **dot_options(dtype, tf32),
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
    windows = _weight_gradient(
        grad_mid.shape, mid.shape, weight.shape, tuple(stride), tuple(padding), tuple(dilation), block, tf32, mid.dtype,
        mid.device,
    )  # fmt: skip
    OC, C, KH, KW = weight.shape
    out = torch.empty(windows.parts, OC, KH, KW, C, dtype=sum_type(weight.dtype), device=weight.device)
    with on_device(mid):
        windows.launch(grad_mid, grad_rad, *windows.fill(mid, rad), weight, out)
    return out.sum(0).to(weight.dtype).permute(0, 3, 1, 2)


@functools.lru_cache(LAUNCHES)
def _weight_gradient(
    grad: torch.Size,
    box: torch.Size,
    weight: torch.Size,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    block: Block,
    tf32: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> _Windows:
    sizes = window_sizes(weight, dtype, grad[2:], stride, dilation)
    N = sizes["PIXELS"] * weight[0]
    M = grad.numel() // N
    tiles = triton.cdiv(N, block.n) * triton.cdiv(weight[2] * sizes["SPAN"], block.k)
    parts, rows = parts_of(M, tiles, block.m)
    launch = Launch(
        interval_conv2d_image_weight_kernel, (tiles, parts), (M, rows), **sizes,
        **tile_options(block, dtype, tf32),
    )  # fmt: skip
    return _Windows(*_fill_up(box, padding, sizes), launch, parts * sizes["PIXELS"])
