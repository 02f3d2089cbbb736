"""interval_max_pool2d, its backward operator and the adjoint of that: one pass over the windows or the image each.

Images are [B, H, W, C] in memory; a contiguous [B, C, H, W] is B·C images of one channel. What decides who gets a
gradient is found once per window, running over its elements from the front and from the back, and kept as bits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ends import gated, relu_backward_keeps
from .interval_mul import product_of_ends
from .launch import EXACT, LAUNCHES, Launch, compute_type, interpreting, on_device

_GEOMETRY = ["B", "H", "W", "C", "OH", "OW", "KH", "KW", "SH", "SW", "PH", "PW", "DH", "DW"]


@triton.jit
def place(H, W, C, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Element numbers of this program in [., H, W, C], and what they are made of: image, row, column, channel."""
    start = tl.program_id(0)
    if WIDE:
        start = start.to(tl.int64)
    at = start * BLOCK + tl.arange(0, BLOCK)
    pixel = at // C
    return at, pixel // W // H, pixel // W % H, pixel % W, at % C


@triton.jit
def greater(a, b):
    return tl.maximum(a, b, tl.PropagateNan.ALL)


@triton.jit
def finite(end, there, COMPUTE: tl.constexpr):
    """An element of −∞ can be the maximum of its window, the padding cannot."""
    if tl.float64 == COMPUTE:
        least = -1.7976931348623157e308
    else:
        least = -3.4028234663852886e38
    return tl.where(there & (end < least), least, end)


@triton.jit
def ends_at(mid_ptr, rad_ptr, image, h, w, c, H, W, C, inside, COMPUTE: tl.constexpr):
    """Both ends of the element at a pixel, and whether there is one; −∞ where there is not."""
    there = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    at = ((image * H + h) * W + w) * C + c
    mid = tl.load(mid_ptr + at, there, 0.0).to(COMPUTE)
    rad = tl.load(rad_ptr + at, there, 0.0).to(COMPUTE)
    nothing = float("-inf")
    return tl.where(there, mid - rad, nothing), tl.where(there, mid + rad, nothing), there


@triton.jit(do_not_specialize=_GEOMETRY)
def interval_max_pool2d_fwd_kernel(
    mid_ptr,  # [B, H, W, C]
    rad_ptr,  # [B, H, W, C]
    out_mid_ptr,  # [B, OH, OW, C]
    out_rad_ptr,  # [B, OH, OW, C]
    B,
    H,
    W,
    C,
    OH,
    OW,
    KH,
    KW,
    SH,
    SW,
    PH,
    PW,
    DH,
    DW,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    at, image, row, column, c = place(OH, OW, C, BLOCK, WIDE)
    inside = image < B
    lower = tl.full((BLOCK,), float("-inf"), COMPUTE)
    upper = tl.full((BLOCK,), float("-inf"), COMPUTE)
    for tap in range(KH * KW):
        h = row * SH - PH + tap // KW * DH
        w = column * SW - PW + tap % KW * DW
        low, up, _ = ends_at(mid_ptr, rad_ptr, image, h, w, c, H, W, C, inside, COMPUTE)
        lower, upper = greater(lower, low), greater(upper, up)
    tl.store(out_mid_ptr + at, (lower + upper) * 0.5, inside)
    tl.store(out_rad_ptr + at, (upper - lower) * 0.5, inside)


@triton.jit(do_not_specialize=_GEOMETRY)
def first_maximum_kernel(
    mid_ptr,  # [B, H, W, C]
    rad_ptr,  # [B, H, W, C]
    must_ptr,  # [B, OH, OW, C], a bit for each element of the window
    may_ptr,  # [B, OH, OW, C]
    B,
    H,
    W,
    C,
    OH,
    OW,
    KH,
    KW,
    SH,
    SW,
    PH,
    PW,
    DH,
    DW,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    at, image, row, column, c = place(OH, OW, C, BLOCK, WIDE)
    inside = image < B
    must = tl.zeros((BLOCK,), tl.int32)
    may = tl.zeros((BLOCK,), tl.int32)
    nothing = tl.full((BLOCK,), float("-inf"), COMPUTE)
    lower, upper = nothing, nothing
    for tap in range(KH * KW):
        h = row * SH - PH + tap // KW * DH
        w = column * SW - PW + tap % KW * DW
        low, up, there = ends_at(mid_ptr, rad_ptr, image, h, w, c, H, W, C, inside, COMPUTE)
        low, up = finite(low, there, COMPUTE), finite(up, there, COMPUTE)
        must |= ((low > upper) & there).to(tl.int32) << tap
        may |= (((up <= lower) == 0) & there).to(tl.int32) << tap
        lower, upper = greater(lower, low), greater(upper, up)
    lower, upper = nothing, nothing
    not_must = tl.zeros((BLOCK,), tl.int32)
    not_may = tl.zeros((BLOCK,), tl.int32)
    for step in range(KH * KW):
        tap = KH * KW - 1 - step
        h = row * SH - PH + tap // KW * DH
        w = column * SW - PW + tap % KW * DW
        low, up, there = ends_at(mid_ptr, rad_ptr, image, h, w, c, H, W, C, inside, COMPUTE)
        low, up = finite(low, there, COMPUTE), finite(up, there, COMPUTE)
        not_must |= ((low >= upper) == 0).to(tl.int32) << tap
        not_may |= (up < lower).to(tl.int32) << tap
        lower, upper = greater(lower, low), greater(upper, up)
    tl.store(must_ptr + at, must & ~not_must, inside)
    tl.store(may_ptr + at, may & ~not_may, inside)


@triton.jit(do_not_specialize=_GEOMETRY)
def interval_max_pool2d_bwd_kernel(
    grad_mid_ptr,  # [B, OH, OW, C]
    grad_rad_ptr,  # [B, OH, OW, C]
    must_ptr,  # [B, OH, OW, C]
    may_ptr,  # [B, OH, OW, C]
    out_mid_ptr,  # [B, H, W, C]
    out_rad_ptr,  # [B, H, W, C]
    B,
    H,
    W,
    C,
    OH,
    OW,
    KH,
    KW,
    SH,
    SW,
    PH,
    PW,
    DH,
    DW,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    at, image, h, w, c = place(H, W, C, BLOCK, WIDE)
    inside = image < B
    out_mid = tl.zeros((BLOCK,), COMPUTE)
    out_rad = tl.zeros((BLOCK,), COMPUTE)
    for tap in range(KH * KW):
        top = h + PH - tap // KW * DH
        left = w + PW - tap % KW * DW
        row, column = top // SH, left // SW
        there = inside & (top >= 0) & (left >= 0) & (top % SH == 0) & (left % SW == 0) & (row < OH) & (column < OW)
        window = ((image * OH + row) * OW + column) * C + c
        mid = tl.load(grad_mid_ptr + window, there, 0.0).to(COMPUTE)
        rad = tl.load(grad_rad_ptr + window, there, 0.0).to(COMPUTE)
        least = ((tl.load(must_ptr + window, there, 0) >> tap) & 1).to(COMPUTE)
        most = ((tl.load(may_ptr + window, there, 0) >> tap) & 1).to(COMPUTE)
        mid, rad = product_of_ends(mid - rad, mid + rad, least, most)
        out_mid += mid
        out_rad += rad
    tl.store(out_mid_ptr + at, out_mid, inside)
    tl.store(out_rad_ptr + at, out_rad, inside)


@triton.jit(do_not_specialize=_GEOMETRY)
def interval_max_pool2d_gather_kernel(
    mid_ptr,  # [B, H, W, C]
    rad_ptr,  # [B, H, W, C]
    grad_mid_ptr,  # [B, OH, OW, C]
    grad_rad_ptr,  # [B, OH, OW, C]
    must_ptr,  # [B, OH, OW, C]
    may_ptr,  # [B, OH, OW, C]
    out_mid_ptr,  # [B, OH, OW, C]
    out_rad_ptr,  # [B, OH, OW, C]
    B,
    H,
    W,
    C,
    OH,
    OW,
    KH,
    KW,
    SH,
    SW,
    PH,
    PW,
    DH,
    DW,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    at, image, row, column, c = place(OH, OW, C, BLOCK, WIDE)
    inside = image < B
    grad_mid = tl.load(grad_mid_ptr + at, inside, 0.0).to(COMPUTE)
    grad_rad = tl.load(grad_rad_ptr + at, inside, 0.0).to(COMPUTE)
    must = tl.load(must_ptr + at, inside, 0)
    may = tl.load(may_ptr + at, inside, 0)
    out_mid = tl.zeros((BLOCK,), COMPUTE)
    out_rad = tl.zeros((BLOCK,), COMPUTE)
    for tap in range(KH * KW):
        h = row * SH - PH + tap // KW * DH
        w = column * SW - PW + tap % KW * DW
        there = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        element = ((image * H + h) * W + w) * C + c
        mid = tl.load(mid_ptr + element, there, 0.0).to(COMPUTE)
        rad = tl.load(rad_ptr + element, there, 0.0).to(COMPUTE)
        sure, possible = ((must >> tap) & 1) != 0, ((may >> tap) & 1) != 0
        keep_lower, keep_upper = relu_backward_keeps(grad_mid, grad_rad, sure, possible)
        mid, rad = gated(mid, rad, keep_lower, keep_upper)
        out_mid += mid
        out_rad += rad
    tl.store(out_mid_ptr + at, out_mid, inside)
    tl.store(out_rad_ptr + at, out_rad, inside)


# --- launchers: all tensors dense in one memory order, [B, C, H, W] in shape ----------------------------------------


def _launch(
    kernel: str,
    tensors: Sequence[Tensor],
    image: Tensor,
    window: Tensor,
    over: Tensor,
    geometry: Sequence[Sequence[int]],
) -> None:
    """One program for every so many elements of ``over``."""
    is_plain = image.is_contiguous() and window.is_contiguous()
    sizes = tuple(n for pair in geometry for n in pair)
    launch = _remembered(kernel, image.shape, window.shape, over.numel(), is_plain, sizes, image.dtype, image.device)
    with on_device(image):
        launch(*tensors)


@functools.lru_cache(LAUNCHES)
def _remembered(
    kernel: str,
    image: torch.Size,
    window: torch.Size,
    over: int,
    is_plain: bool,
    geometry: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Launch:
    batch, channels, height, width = image
    if is_plain:
        batch, channels = batch * channels, 1
    block = 16384 if interpreting() else 512
    n = max(image.numel(), window.numel())
    return Launch(
        globals()[kernel], (triton.cdiv(over, block),), (batch, height, width, channels, *window[2:], *geometry),
        BLOCK=block, WIDE=n + block >= 2**31, COMPUTE=compute_type(dtype), **EXACT,
    )  # fmt: skip


def max_pool_into(
    mid: Tensor, rad: Tensor, geometry: Sequence[Sequence[int]], out_mid: Tensor, out_rad: Tensor
) -> None:
    _launch("interval_max_pool2d_fwd_kernel", (mid, rad, out_mid, out_rad), mid, out_mid, out_mid, geometry)


def first_maximum_into(mid: Tensor, rad: Tensor, geometry: Sequence[Sequence[int]], must: Tensor, may: Tensor) -> None:
    _launch("first_maximum_kernel", (mid, rad, must, may), mid, must, must, geometry)


def max_pool_backward_into(
    mid: Tensor,
    rad: Tensor,
    must: Tensor,
    may: Tensor,
    geometry: Sequence[Sequence[int]],
    out_mid: Tensor,
    out_rad: Tensor,
) -> None:
    _launch("interval_max_pool2d_bwd_kernel", (mid, rad, must, may, out_mid, out_rad), out_mid, must, out_mid, geometry)


def max_pool_gather_into(
    mid: Tensor,
    rad: Tensor,
    grad_mid: Tensor,
    grad_rad: Tensor,
    must: Tensor,
    may: Tensor,
    geometry: Sequence[Sequence[int]],
    out_mid: Tensor,
    out_rad: Tensor,
) -> None:
    tensors = (mid, rad, grad_mid, grad_rad, must, may, out_mid, out_rad)
    _launch("interval_max_pool2d_gather_kernel", tensors, mid, must, must, geometry)
