"""Pooling. Average pooling is linear; max pooling sends its gradient to the first maximum of each window."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload

from pyxai_bounds.interval import Interval
from pyxai_bounds.rules.registry import (
    NO_VALUE,
    Value,
    between,
    ends,
    linear_map,
    mid_of,
    monotone,
    multiply,
    positive_linear,
    rule,
)

aten = torch.ops.aten


@rule(aten.max_pool2d_with_indices.default, precision="exact")
def max_pool2d(x: Interval, *geometry: Any) -> tuple[Interval, object]:
    """The indices of a set have no single value; the backward side works from the input itself."""
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
    """Each position of a window receives the gradient times 0, [0, 1] or 1.

    PyTorch sends it to the first maximum in row order. Position i must receive it iff l_i > u_j for all j before i
    and l_i ≥ u_j for all j after; it may iff u_i > l_j before and u_i ≥ l_j after.
    """
    if not isinstance(x, Interval):
        assert isinstance(grad, Interval)
        geometry = (kernel, stride, padding, dilation, ceil_mode, indices)
        return linear_map(
            lambda t: aten.max_pool2d_with_indices_backward(t, x, *geometry), grad, math.prod(_pair(kernel))
        )
    kernel, padding, dilation = (_pair(v) for v in (kernel, padding, dilation))
    stride = _pair(stride or kernel)
    windows = _Windows(x.mid, grad.shape[-2:], kernel, stride, padding, dilation)
    lower, upper = (windows.unfold(end) for end in ends(x))
    must = (lower > _before(upper)) & (lower >= _after(upper))
    may = ~((upper <= _before(lower)) | (upper < _after(lower)))  # true for a NaN
    factor = between(must.to(lower.dtype), may.to(lower.dtype))
    per_window = (windows.batch, windows.channels, 1, windows.count)
    if isinstance(grad, Interval):
        grad = Interval.of(grad.mid.reshape(per_window), grad.rad.reshape(per_window))
    else:
        grad = grad.reshape(per_window)
    parts = multiply(grad, factor)
    return linear_map(windows.fold, parts, math.prod(kernel))


class _Windows:
    """The pooling windows of an image as columns [B, C, positions, windows], padded with −∞, and back."""

    def __init__(
        self, x: Tensor, out: Any, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
    ) -> None:
        self.shape = x.shape
        self.batch, self.channels = (1, x.shape[0]) if x.dim() == 3 else x.shape[:2]
        self.kernel, self.stride, self.dilation = kernel, stride, dilation
        self.count = out[0] * out[1]
        height, width = x.shape[-2:]
        # Exactly what the windows touch, which with ceil_mode is more than the padded image, or else less.
        self.extent = [(n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(out, stride, dilation, kernel, strict=True)]
        top, left = padding
        self.pad = [left, self.extent[1] - width - left, top, self.extent[0] - height - top]

    def unfold(self, x: Tensor) -> Tensor:
        image = x.reshape(self.batch, self.channels, *self.shape[-2:])
        # An element of −∞ can be the maximum of its window, which the padding cannot.
        padded = F.pad(image.clamp(min=torch.finfo(x.dtype).min), self.pad, value=float("-inf"))
        columns = aten.im2col(padded, self.kernel, self.dilation, [0, 0], self.stride)
        return columns.reshape(self.batch, self.channels, self.kernel[0] * self.kernel[1], self.count)

    def fold(self, columns: Tensor) -> Tensor:
        image = aten.col2im(columns.flatten(1, 2), self.extent, self.kernel, self.dilation, [0, 0], self.stride)
        return F.pad(image, [-p for p in self.pad]).reshape(self.shape)


def _before(x: Tensor) -> Tensor:
    """For each position the greatest value at an earlier one (−∞ at the first)."""
    running = [torch.full_like(x[:, :, 0], float("-inf"))]
    for position in x.unbind(2)[:-1]:
        running.append(torch.maximum(running[-1], position))
    return torch.stack(running, 2)


def _after(x: Tensor) -> Tensor:
    return _before(x.flip(2)).flip(2)


def _pair(values: list[int]) -> list[int]:
    return list(values) * (2 // len(values))


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
