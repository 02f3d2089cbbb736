"""interval_smooth, interval_smooth_backward and their adjoints: ranges of smooth activations and of their slopes.

One elementwise kernel each, made for each function of ``pyxai_bounds/ops/smooth.py``, in float32. exp is the device's
fast one; tanh, expm1 and log1p are built on it so that nothing cancels: within about 1e-6 of the value, or 1e-7.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interval_mul import product_of_ends
from .launch import EXACT, LAUNCHES, Launch, flat, flat_offsets, on_device

GROUPS = 128  # eight elements to a thread: with sixteen the adjoint of a slope spills


@triton.jit
def logistic(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def expm1(x):
    """exp(x) − 1; its series where that would cancel."""
    near = tl.where(tl.abs(x) < 0.5, x, 0.0)
    series = 1.0 / 40320.0 + near * (1.0 / 362880.0)
    series = 1.0 / 5040.0 + near * series
    series = 1.0 / 720.0 + near * series
    series = 1.0 / 120.0 + near * series
    series = 1.0 / 24.0 + near * series
    series = 1.0 / 6.0 + near * series
    series = 0.5 + near * series
    return tl.where(tl.abs(x) < 0.5, near + near * near * series, tl.exp(x) - 1.0)


@triton.jit
def tanh(x):
    e = expm1(-2.0 * tl.abs(x))
    size = -e / (2.0 + e)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def log1p_below_1(x):
    """log(1 + x) for 0 ≤ x ≤ 1: 2·artanh(s) with s = x / (2 + x) ≤ 1/3."""
    s = x / (2.0 + x)
    q = s * s
    series = 1.0 / 15.0 + q * (1.0 / 17.0)
    series = 1.0 / 13.0 + q * series
    series = 1.0 / 11.0 + q * series
    series = 1.0 / 9.0 + q * series
    series = 1.0 / 7.0 + q * series
    series = 1.0 / 5.0 + q * series
    series = 1.0 / 3.0 + q * series
    return 2.0 * s + 2.0 * s * (q * series)


@triton.jit
def gelu_slope(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit
def gelu_tanh_parts(x):
    """tanh of the approximation's argument, and the derivative of the argument."""
    return tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)), 0.7978845608028654 * (1.0 + 0.134145 * x * x)


@triton.jit
def value(x, a, b, c, NAME: tl.constexpr):
    """The function of that name; a, b, c are its parameters."""
    if NAME == "sigmoid":
        y = logistic(x)
    elif NAME == "sigmoid_slope":
        y = x * (1.0 - x)
    elif NAME == "tanh":
        y = tanh(x)
    elif NAME == "tanh_slope":
        y = 1.0 - x * x
    elif NAME == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_slope":
        y = gelu_slope(x)
    elif NAME == "gelu_tanh":
        inner, _ = gelu_tanh_parts(x)
        y = 0.5 * x * (1.0 + inner)
    elif NAME == "gelu_tanh_slope":
        inner, rise = gelu_tanh_parts(x)
        y = 0.5 * (1.0 + inner) + 0.5 * x * (1.0 - inner * inner) * rise
    elif NAME == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif NAME == "silu_slope":
        s = logistic(x)
        y = s * (1.0 + x * (1.0 - s))
    elif NAME == "softplus":
        t = x * a
        size = tl.abs(t)
        y = tl.where(t > b, x, (0.5 * (t + size) + log1p_below_1(tl.exp(-size))) / a)
    elif NAME == "softplus_slope":
        y = tl.where(x * a > b, 1.0, logistic(x * a))
    elif NAME == "elu":
        y = tl.where(x > 0.0, x * b, expm1(x * c) * (a * b))
    elif NAME == "elu_slope":
        y = tl.where(x > 0.0, b, a * b * c * tl.exp(x * c))
    else:
        tl.static_assert(NAME == "elu_slope_of_output")
        y = tl.where(x > 0.0, b, (x + a * b) * c)
    return y


@triton.jit
def slope(x, a, b, c, NAME: tl.constexpr):
    """The derivative of the function of that name."""
    if NAME == "sigmoid":
        s = logistic(x)
        y = s * (1.0 - s)
    elif NAME == "sigmoid_slope":
        y = 1.0 - 2.0 * x
    elif NAME == "tanh":
        t = tanh(x)
        y = 1.0 - t * t
    elif NAME == "tanh_slope":
        y = -2.0 * x
    elif NAME == "gelu":
        y = gelu_slope(x)
    elif NAME == "gelu_slope":
        y = (2.0 - x * x) * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif NAME == "gelu_tanh":
        y = value(x, a, b, c, "gelu_tanh_slope")
    elif NAME == "gelu_tanh_slope":
        inner, rise = gelu_tanh_parts(x)
        y = (1.0 - inner * inner) * (rise + x * (0.10703222440890037 * x - inner * rise * rise))
    elif NAME == "silu":
        y = value(x, a, b, c, "silu_slope")
    elif NAME == "silu_slope":
        s = logistic(x)
        y = s * (1.0 - s) * (2.0 + x * (1.0 - 2.0 * s))
    elif NAME == "softplus":
        y = value(x, a, b, c, "softplus_slope")
    elif NAME == "softplus_slope":
        s = logistic(x * a)
        y = tl.where(x * a > b, 0.0, a * s * (1.0 - s))
    elif NAME == "elu":
        y = value(x, a, b, c, "elu_slope")
    elif NAME == "elu_slope":
        y = tl.where(x > 0.0, 0.0, a * b * c * c * tl.exp(x * c))
    else:
        tl.static_assert(NAME == "elu_slope_of_output")
        y = tl.where(x > 0.0, 0.0, c)
    return y


@triton.jit
def extremes(lower, upper, p0, v0, p1, v1, a, b, c, NAME: tl.constexpr, CRITICAL: tl.constexpr):
    """Least and greatest value between two ends."""
    at_lower, at_upper = value(lower, a, b, c, NAME), value(upper, a, b, c, NAME)
    least = tl.minimum(at_lower, at_upper, tl.PropagateNan.ALL)
    greatest = tl.maximum(at_lower, at_upper, tl.PropagateNan.ALL)
    if CRITICAL > 0:
        inside = (lower <= p0) & (p0 <= upper) & (lower < upper)
        least = tl.where(inside & (least > v0), v0, least)
        greatest = tl.where(inside & (greatest < v0), v0, greatest)
    if CRITICAL > 1:
        inside = (lower <= p1) & (p1 <= upper) & (lower < upper)
        least = tl.where(inside & (least > v1), v1, least)
        greatest = tl.where(inside & (greatest < v1), v1, greatest)
    return least, greatest


@triton.jit
def extremes_adjoint(
    lower, upper, least_grad, greatest_grad, p0, v0, p1, v1, a, b, c, NAME: tl.constexpr, CRITICAL: tl.constexpr
):
    """The gradients in both ends: to the end that was taken, halved where both give the same."""
    at_lower, at_upper = value(lower, a, b, c, NAME), value(upper, a, b, c, NAME)
    least, greatest = tl.minimum(at_lower, at_upper), tl.maximum(at_lower, at_upper)
    if CRITICAL > 0:
        inside = (lower <= p0) & (p0 <= upper) & (lower < upper)
        least_grad = tl.where(inside & (least > v0), 0.0, least_grad)
        greatest_grad = tl.where(inside & (greatest < v0), 0.0, greatest_grad)
    if CRITICAL > 1:
        inside = (lower <= p1) & (p1 <= upper) & (lower < upper)
        least_grad = tl.where(inside & (least > v1), 0.0, least_grad)
        greatest_grad = tl.where(inside & (greatest < v1), 0.0, greatest_grad)
    mean = (least_grad + greatest_grad) * 0.5
    rises, equal = at_lower < at_upper, at_lower == at_upper
    to_lower = tl.where(equal, mean, tl.where(rises, least_grad, greatest_grad))
    to_upper = tl.where(equal, mean, tl.where(rises, greatest_grad, least_grad))
    return to_lower * slope(lower, a, b, c, NAME), to_upper * slope(upper, a, b, c, NAME)


@triton.jit
def ends_of_least(ll, lu, ul, uu, a_lower, a_upper, b_lower, b_upper):
    """Of the least of four products, the first in this order: its ends, and −1 or 1 for a lower or an upper one."""
    best, a_end, b_end = ll, a_lower, b_lower
    a_side, b_side = tl.full(ll.shape, -1.0, ll.dtype), tl.full(ll.shape, -1.0, ll.dtype)
    less = lu < best
    best, b_end, b_side = tl.where(less, lu, best), tl.where(less, b_upper, b_end), tl.where(less, 1.0, b_side)
    less = ul < best
    best, a_end, b_end = tl.where(less, ul, best), tl.where(less, a_upper, a_end), tl.where(less, b_lower, b_end)
    a_side, b_side = tl.where(less, 1.0, a_side), tl.where(less, -1.0, b_side)
    less = uu < best
    a_end, b_end = tl.where(less, a_upper, a_end), tl.where(less, b_upper, b_end)
    return a_end, tl.where(less, 1.0, a_side), b_end, tl.where(less, 1.0, b_side)


@triton.jit
def interval_smooth_kernel(
    mid_ptr,  # [n]
    rad_ptr,  # [n]
    out_mid_ptr,  # [n]
    out_rad_ptr,  # [n]
    n,
    p0,
    v0,
    p1,
    v1,
    a,
    b,
    c,
    NAME: tl.constexpr,
    CRITICAL: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
):
    _, at = flat_offsets(GROUPS, WIDE)
    inside = at < n
    mid = tl.load(mid_ptr + at, inside, 0.0).to(tl.float32)
    rad = tl.load(rad_ptr + at, inside, 0.0).to(tl.float32)
    least, greatest = extremes(mid - rad, mid + rad, p0, v0, p1, v1, a, b, c, NAME, CRITICAL)
    tl.store(out_mid_ptr + at, (least + greatest) * 0.5, inside)
    tl.store(out_rad_ptr + at, (greatest - least) * 0.5, inside)


@triton.jit
def interval_smooth_backward_kernel(
    grad_mid_ptr,  # [n]
    grad_rad_ptr,  # [n]
    mid_ptr,  # [n]
    rad_ptr,  # [n]
    out_mid_ptr,  # [n]
    out_rad_ptr,  # [n]
    n,
    p0,
    v0,
    p1,
    v1,
    a,
    b,
    c,
    NAME: tl.constexpr,
    CRITICAL: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
):
    _, at = flat_offsets(GROUPS, WIDE)
    inside = at < n
    grad_mid = tl.load(grad_mid_ptr + at, inside, 0.0).to(tl.float32)
    grad_rad = tl.load(grad_rad_ptr + at, inside, 0.0).to(tl.float32)
    mid = tl.load(mid_ptr + at, inside, 0.0).to(tl.float32)
    rad = tl.load(rad_ptr + at, inside, 0.0).to(tl.float32)
    least, greatest = extremes(mid - rad, mid + rad, p0, v0, p1, v1, a, b, c, NAME, CRITICAL)
    out_mid, out_rad = product_of_ends(grad_mid - grad_rad, grad_mid + grad_rad, least, greatest)
    tl.store(out_mid_ptr + at, out_mid, inside)
    tl.store(out_rad_ptr + at, out_rad, inside)


@triton.jit
def interval_smooth_adjoint_kernel(
    mid_grad_ptr,  # [n]
    rad_grad_ptr,  # [n]
    mid_ptr,  # [n]
    rad_ptr,  # [n]
    out_mid_ptr,  # [n]
    out_rad_ptr,  # [n]
    n,
    p0,
    v0,
    p1,
    v1,
    a,
    b,
    c,
    NAME: tl.constexpr,
    CRITICAL: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
):
    _, at = flat_offsets(GROUPS, WIDE)
    inside = at < n
    mid_grad = tl.load(mid_grad_ptr + at, inside, 0.0).to(tl.float32)
    rad_grad = tl.load(rad_grad_ptr + at, inside, 0.0).to(tl.float32)
    mid = tl.load(mid_ptr + at, inside, 0.0).to(tl.float32)
    rad = tl.load(rad_ptr + at, inside, 0.0).to(tl.float32)
    to_lower, to_upper = extremes_adjoint(
        mid - rad, mid + rad, (mid_grad - rad_grad) * 0.5, (mid_grad + rad_grad) * 0.5, p0, v0, p1, v1, a, b, c,
        NAME, CRITICAL,
    )  # fmt: skip
    tl.store(out_mid_ptr + at, to_lower + to_upper, inside)
    tl.store(out_rad_ptr + at, to_upper - to_lower, inside)


@triton.jit
def interval_smooth_backward_adjoint_kernel(
    mid_grad_ptr,  # [n]
    rad_grad_ptr,  # [n]
    grad_mid_ptr,  # [n]
    grad_rad_ptr,  # [n]
    mid_ptr,  # [n]
    rad_ptr,  # [n]
    out_grad_mid_ptr,  # [n]
    out_grad_rad_ptr,  # [n]
    out_mid_ptr,  # [n]
    out_rad_ptr,  # [n]
    n,
    p0,
    v0,
    p1,
    v1,
    a,
    b,
    c,
    NAME: tl.constexpr,
    CRITICAL: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
):
    _, at = flat_offsets(GROUPS, WIDE)
    inside = at < n
    mid_grad = tl.load(mid_grad_ptr + at, inside, 0.0).to(tl.float32)
    rad_grad = tl.load(rad_grad_ptr + at, inside, 0.0).to(tl.float32)
    grad_mid = tl.load(grad_mid_ptr + at, inside, 0.0).to(tl.float32)
    grad_rad = tl.load(grad_rad_ptr + at, inside, 0.0).to(tl.float32)
    mid = tl.load(mid_ptr + at, inside, 0.0).to(tl.float32)
    rad = tl.load(rad_ptr + at, inside, 0.0).to(tl.float32)
    lower, upper = grad_mid - grad_rad, grad_mid + grad_rad
    least, greatest = extremes(mid - rad, mid + rad, p0, v0, p1, v1, a, b, c, NAME, CRITICAL)
    ll, lu, ul, uu = lower * least, lower * greatest, upper * least, upper * greatest
    g1, side1, f1, of1 = ends_of_least(ll, lu, ul, uu, lower, upper, least, greatest)
    g2, side2, f2, of2 = ends_of_least(-ll, -lu, -ul, -uu, lower, upper, least, greatest)
    down, up = (mid_grad - rad_grad) * 0.5, (mid_grad + rad_grad) * 0.5
    tl.store(out_grad_mid_ptr + at, down * f1 + up * f2, inside)
    tl.store(out_grad_rad_ptr + at, down * f1 * side1 + up * f2 * side2, inside)
    zero = tl.zeros(down.shape, tl.float32)
    least_grad = tl.where(of1 < 0.0, down * g1, zero) + tl.where(of2 < 0.0, up * g2, zero)
    greatest_grad = tl.where(of1 > 0.0, down * g1, zero) + tl.where(of2 > 0.0, up * g2, zero)
    to_lower, to_upper = extremes_adjoint(
        mid - rad, mid + rad, least_grad, greatest_grad, p0, v0, p1, v1, a, b, c, NAME, CRITICAL
    )
    tl.store(out_mid_ptr + at, to_lower + to_upper, inside)
    tl.store(out_rad_ptr + at, to_upper - to_lower, inside)


# --- the launcher: all tensors dense in one memory order, results last -----------------------------------------------


def launch(
    op: str,
    tensors: Sequence[Tensor],
    name: str,
    params: Sequence[float],
    critical: Sequence[tuple[float, float]],
) -> None:
    first = tensors[0]
    run = _launch(op, first.numel(), name, tuple(params), tuple(critical), first.dtype, first.device)
    with on_device(first):
        run(*tensors)


@functools.lru_cache(LAUNCHES)
def _launch(
    op: str,
    n: int,
    name: str,
    params: tuple[float, ...],
    critical: tuple[tuple[float, float], ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Launch:
    points = [float(n) for pair in critical for n in pair] + [0.0] * (4 - 2 * len(critical))
    numbers = [float(n) for n in params] + [0.0] * (3 - len(params))
    grid, block = flat(n, GROUPS)
    kernel = globals()[f"{op}_kernel"]
    return Launch(kernel, grid, (n, *points, *numbers), NAME=name, CRITICAL=len(critical), **block, **EXACT)
