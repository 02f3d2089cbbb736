"""Pooling. Average pooling is linear; max pooling sends its gradient to the first maximum of each window."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch._ops import OpOverload

from pyxai_bounds import ops
from pyxai_bounds.interval import Interval
from pyxai_bounds.ops.windows import MOST, Windows
from pyxai_bounds.rules.registry import (
    NO_VALUE,
    Value,
    between,
    ends,
    linear_map,
    mid_of,
    monotone,
    multiply,
    outward,
    positive_linear,
    rad_of,
    rule,
)

aten = torch.ops.aten


@rule(aten.max_pool2d_with_indices.default, precision="exact")
def max_pool2d(x: Interval, *geometry: Any) -> tuple[Interval, object]:
    """The indices of a set have no single value; the backward side works from the input itself."""
    if _is_fused(x, geometry[0]):
        defaults: list[Any] = [None, [], 0, 1, False]
        kernel, stride, padding, dilation, ceil_mode = [*geometry, *defaults[len(geometry) :]]
        pairs = (_pair(v) for v in (kernel, stride or kernel, padding, dilation))
        return Interval.of(*ops.interval_max_pool2d(x.mid, x.rad, *pairs, ceil_mode)), NO_VALUE
    return monotone(lambda t: aten.max_pool2d_with_indices(t, *geometry)[0], x, ulps=0), NO_VALUE


@rule(aten.max_pool2d_with_indices_backward.default, shape_only=("indices",), precision="own", ulps=0)
def max_pool2d_backward(
    grad: Value,
    x: Value,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    indices: Any,
) -> Interval:
    """Each position of a window receives the gradient times 0, [0, 1] or 1: PyTorch sends it to the first maximum."""
    if not isinstance(x, Interval):
        assert isinstance(grad, Interval)
        args = (kernel, stride, padding, dilation, ceil_mode, indices)
        return linear_map(lambda t: aten.max_pool2d_with_indices_backward(t, x, *args), grad, math.prod(_pair(kernel)))
    kernel, padding, dilation = (_pair(v) for v in (kernel, padding, dilation))
    stride = _pair(stride or kernel)
    if _is_fused(x, kernel) and grad.shape[:-2] == x.shape[:-2]:
        geometry = (kernel, stride, padding, dilation)
        bits = ops.interval_first_maximum(x.mid, x.rad, grad.shape[-2:], *geometry)
        size = x.shape[-2:]
        return Interval.of(*ops.interval_max_pool2d_backward(mid_of(grad), rad_of(grad), *bits, size, *geometry))
    windows = Windows(x.mid, grad.shape[-2:], kernel, stride, padding, dilation)
    must, may = windows.first_maximum(*ends(x))
    factor = between(must.to(x.dtype), may.to(x.dtype))
    per_window = (windows.batch, windows.channels, 1, windows.count)
    if isinstance(grad, Interval):
        grad = Interval.of(grad.mid.reshape(per_window), grad.rad.reshape(per_window))
    else:
        grad = grad.reshape(per_window)
    parts = multiply(grad, factor)
    return linear_map(windows.fold, parts, math.prod(kernel))


def _is_fused(x: Interval, kernel: list[int]) -> bool:
    """Is this a case of the fused operators, and are there kernels for them?"""
    return x.mid.dim() == 4 and math.prod(_pair(kernel)) <= MOST and not outward() and ops.has_kernels(x.mid)


def _pair(values: list[int] | int) -> list[int]:
    values = [values] if isinstance(values, int) else list(values)
    return values * (2 // len(values))


positive_linear(
    aten._adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool3d.default,
    terms=lambda x, size: math.prod(x.shape[-len(size) :]),
)
positive_linear(
    aten._adaptive_avg_pool2d_backward.default,
    aten._adaptive_avg_pool3d_backward.default,
    shape_only=("self",),
    terms=lambda grad, x: math.prod(grad.shape[1:]),
)


def _average(operator: OpOverload) -> None:
    """Average pools are linear; all coefficients have the sign of ``divisor_override``, which may be negative."""
    backward = "backward" in operator.name()

    def apply(x: Interval, *args: Any) -> Interval:
        points = [mid_of(arg) for arg in args]
        kernel = args[1] if backward else args[0]
        out = linear_map(lambda t: operator(t, *points), x, math.prod(kernel) ** (1 if len(kernel) > 1 else 3))
        return Interval.of(out.mid, out.rad.abs())

    rule(operator, shape_only=("self",) if backward else (), ulps=0)(apply)


for _operator in (
    aten.avg_pool2d.default,
    aten.avg_pool2d_backward.default,
    aten.avg_pool3d.default,
    aten.avg_pool3d_backward.default,
):
    _average(_operator)
