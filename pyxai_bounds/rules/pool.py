"""Pooling. Average pooling is linear; max pooling sends its gradient to the first maximum of each window."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload

import pyxai_bounds.rules.shape  # noqa: F401  the rule for gathering at points, which this file extends
from pyxai_bounds import ops
from pyxai_bounds.interval import Interval
from pyxai_bounds.ops.windows import MOST, Windows, first_of_greatest
from pyxai_bounds.rules.registry import (
    RULES,
    Indices,
    UnsupportedArgumentsError,
    Value,
    as_set,
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
        out = Interval.of(*ops.interval_max_pool2d(x.mid, x.rad, *pairs, ceil_mode))
    else:
        out = monotone(lambda t: aten.max_pool2d_with_indices(t, *geometry)[0], x, ulps=0)
    return out, Indices(windows=(x, _places(x, out.shape, 2, *geometry)))


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
    return _many(values, 2)


# --- windows of any number of dimensions and of unequal sizes --------------------------------------------------


class Places:
    """The windows of a pool as places in the flattened image: [positions, windows], and one past the end outside of it.

    ``first`` and ``last`` say for each dimension where its windows begin and end (exclusively), ``step`` how far apart
    their places are. Places are in row order, which is the order in which PyTorch looks for the first maximum.
    """

    def __init__(
        self,
        size: Sequence[int],
        first: Sequence[list[int]],
        last: Sequence[list[int]],
        step: Sequence[int],
        device: Any,
    ) -> None:
        self.size, self.out = list(size), [len(f) for f in first]
        self.whole = math.prod(size)
        dims = len(size)
        place = torch.zeros([1] * (2 * dims), dtype=torch.int64, device=device)
        outside = torch.zeros([1] * (2 * dims), dtype=torch.bool, device=device)
        for d, (n, begins, ends_, s) in enumerate(zip(size, first, last, step, strict=True)):
            most = max(-(-(e - b) // s) for b, e in zip(begins, ends_, strict=True))
            rows = [
                [b + k * s if b + k * s < e and 0 <= b + k * s < n else -1 for b, e in zip(begins, ends_, strict=True)]
                for k in range(most)
            ]
            shape = [1] * (2 * dims)
            shape[d], shape[dims + d] = most, len(begins)
            at = torch.tensor(rows, dtype=torch.int64, device=device).reshape(shape)
            place, outside = place * n + at, outside | (at < 0)
        self.index = torch.where(outside, self.whole, place).flatten(dims).flatten(0, dims - 1)

    def unfold(self, x: Tensor, outside: float) -> Tensor:
        """The elements of every window, [rows, positions, windows]."""
        rows = F.pad(x.reshape(-1, self.whole), (0, 1), value=outside)
        return rows.index_select(1, self.index.flatten()).reshape(-1, *self.index.shape)

    def fold(self, columns: Tensor) -> Tensor:
        """The sum of what the windows hold for every element of the image, [rows, elements]."""
        rows = columns.new_zeros(len(columns), self.whole + 1)
        return rows.index_add(1, self.index.flatten(), columns.flatten(1))[:, : self.whole]

    def first_maximum(self, x: Interval) -> tuple[Tensor, Tensor]:
        """Must an element be the first maximum of its window, and may it be? As ``Windows.first_maximum``."""
        # An element of −∞ can be the maximum of its window, which the padding cannot.
        least = torch.finfo(x.dtype).min
        lower, upper = (self.unfold(end.clamp(min=least), -math.inf).unsqueeze(1) for end in ends(x))
        must, may = first_of_greatest(lower, upper)
        return must.squeeze(1), may.squeeze(1)


def _places(
    x: Value, out: Sequence[int], dims: int, kernel: list[int], stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False,
) -> Callable[[], Places]:  # fmt: skip
    """The windows of an ordinary pool, made when they are asked for."""

    def make() -> Places:
        kernels, steps, pads, strides = (_many(v, dims) for v in (kernel, dilation, padding, stride or kernel))
        first = [[o * s - p for o in range(n)] for n, s, p in zip(out[-dims:], strides, pads, strict=True)]
        last = [[b + d * (k - 1) + 1 for b in begins] for begins, k, d in zip(first, kernels, steps, strict=True)]
        return Places(x.shape[-dims:], first, last, steps, x.device)

    return make


def _adaptive_places(x: Value, out: Sequence[int]) -> Places:
    """Window o of m over n elements reaches from ⌊on/m⌋ to ⌈(o + 1)n/m⌉."""
    dims = len(out)
    size = x.shape[-dims:]
    first = [[o * n // m for o in range(m)] for n, m in zip(size, out, strict=True)]
    last = [[-(-(o + 1) * n // m) for o in range(m)] for n, m in zip(size, out, strict=True)]
    return Places(size, first, last, [1] * dims, x.device)


@rule(aten.max_pool3d_with_indices.default, precision="exact")
def max_pool3d(x: Interval, *geometry: Any) -> tuple[Interval, object]:
    # [C, D, H, W] may lie channels-last, which this operator refuses.
    out = monotone(lambda t: aten.max_pool3d_with_indices(t.contiguous(), *geometry)[0], x, ulps=0)
    return out, Indices(windows=(x, _places(x, out.shape, 3, *geometry)))


@rule(aten.max_pool3d_with_indices_backward.default, shape_only=("indices",), ulps=0)
def max_pool3d_backward(grad: Value, x: Value, *geometry: Any) -> Interval:
    *geometry, indices = geometry  # type: ignore[assignment]
    if not isinstance(x, Interval):
        backward = aten.max_pool3d_with_indices_backward
        return linear_map(lambda t: backward(t, x, *geometry, indices), as_set(grad), math.prod(_many(geometry[0], 3)))
    return _to_first_maxima(grad, x, _places(x, grad.shape, 3, *geometry)())


@rule(aten.adaptive_max_pool2d.default, precision="exact")
def adaptive_max_pool2d(x: Interval, size: list[int]) -> tuple[Interval, object]:
    out = monotone(lambda t: aten.adaptive_max_pool2d(t, size)[0], x, ulps=0)
    return out, Indices(windows=(x, lambda: _adaptive_places(x, size)))


@rule(aten.adaptive_max_pool3d.default, precision="exact")
def adaptive_max_pool3d(x: Interval, size: list[int]) -> tuple[Interval, object]:
    out = monotone(lambda t: aten.adaptive_max_pool3d(t.contiguous(), size)[0], x, ulps=0)
    return out, Indices(windows=(x, lambda: _adaptive_places(x, size)))


@rule(aten.adaptive_max_pool2d_backward.default, shape_only=("indices",), ulps=0)
def adaptive_max_pool2d_backward(grad: Value, x: Value, indices: Any) -> Interval:
    return _adaptive_backward(aten.adaptive_max_pool2d_backward, grad, x, indices, 2)


@rule(aten.adaptive_max_pool3d_backward.default, shape_only=("indices",), ulps=0)
def adaptive_max_pool3d_backward(grad: Value, x: Value, indices: Any) -> Interval:
    return _adaptive_backward(aten.adaptive_max_pool3d_backward, grad, x, indices, 3)


def _adaptive_backward(backward: Any, grad: Value, x: Value, indices: Any, dims: int) -> Interval:
    if not isinstance(x, Interval):
        return linear_map(lambda t: backward(t, x, indices), as_set(grad), grad.shape[-dims:].numel())
    return _to_first_maxima(grad, x, _adaptive_places(x, grad.shape[-dims:]))


def _to_first_maxima(grad: Value, x: Interval, places: Places) -> Interval:
    must, may = places.first_maximum(x)
    rows = _as_rows(grad, places)
    parts = multiply(rows, between(must.to(x.dtype), may.to(x.dtype)))
    out = linear_map(places.fold, parts, len(places.index))
    return Interval.of(out.mid.reshape(x.shape), out.rad.reshape(x.shape))


def _as_rows(x: Value, places: Places) -> Value:
    """One number per window, to meet all of the window's elements: [rows, 1, windows]."""
    shape = (-1, 1, places.index.shape[1])
    return Interval.of(x.mid.reshape(shape), x.rad.reshape(shape)) if isinstance(x, Interval) else x.reshape(shape)


_gather = RULES[aten.gather.default].function


@rule(aten.gather.default, precision="exact")
def gather(x: Value, dim: int, index: Any, **options: Any) -> Any:
    """What stands at the maxima of windows, of any tensor in the shape of the pool's input with its image flattened: a
    max pool's forward derivative, and that of its gradient.
    """
    if not isinstance(index, Indices) or index.viewed is None:
        return _gather(x, dim, index, **options)
    found, places = index.windows()
    windows, rows = places.index.shape[1], list(x.shape[:-1])
    seen, last = (index.expanded or index.viewed)[:-1], index.viewed[-1]
    whole = math.prod(index.viewed[:-1]) == found.mid.numel() // places.whole
    if dim % len(x.shape) != len(rows) or seen != rows or x.shape[-1] != places.whole or not whole:
        raise UnsupportedArgumentsError(index.why)
    if last not in (windows, -1) or (index.expanded and index.expanded[-1] != windows):
        raise UnsupportedArgumentsError(index.why)
    each = places.index.shape
    may = places.first_maximum(found)[1].reshape(*index.viewed[:-1], *each).expand(*rows, *each)
    lower, upper = (places.unfold(end, 0.0).reshape(*rows, *each) for end in ends(x))
    return between(torch.where(may, lower, math.inf).amin(-2), torch.where(may, upper, -math.inf).amax(-2))


@rule(aten.max_unpool2d.default, precision="exact")
def max_unpool2d(x: Value, indices: Any, size: list[int]) -> Interval:
    return _unpool(lambda t: aten.max_unpool2d(t, indices, size), x, indices, size)


@rule(aten.max_unpool3d.default, precision="exact")
def max_unpool3d(x: Value, indices: Any, size: list[int], stride: list[int], padding: list[int]) -> Interval:
    return _unpool(lambda t: aten.max_unpool3d(t.contiguous(), indices, size, stride, padding), x, indices, size)


def _unpool(function: Callable[[Tensor], Tensor], x: Value, indices: Any, size: list[int]) -> Interval:
    """Each number goes to where its window has its first maximum, the rest is 0.

    Where an element may be the maximum of several windows, one of their numbers stands there in the end: which one,
    PyTorch leaves open.
    """
    if not isinstance(indices, Indices):
        assert isinstance(x, Interval)
        return Interval.of(function(x.mid), function(x.rad))
    if indices.viewed not in (None, list(x.shape)):
        raise UnsupportedArgumentsError(indices.why)
    found, places = indices.windows()
    if [n for n in size if n > 1] != [n for n in places.size if n > 1]:  # in one dimension PyTorch adds another
        raise UnsupportedArgumentsError(
            f"spreads maxima over {list(size)} that were found in an image of {places.size}"
        )
    must, may = places.first_maximum(found)
    lower, upper = ends(_as_rows(x, places))
    shape = (*found.shape[: -len(size)], *size)
    index = places.index.flatten().expand(len(may), -1)

    def hull(value: Tensor, worst: float, reduce: str) -> Tensor:
        """The extreme of what may come to an element; of 0, too, unless something must."""
        chosen = torch.where(may, value, worst).flatten(1)
        reached = torch.zeros(len(may), places.whole + 1, dtype=value.dtype, device=value.device)
        sure = reached.scatter_reduce(1, index, must.to(value.dtype).flatten(1), "amax")
        start = torch.where(sure > 0, worst, 0.0).to(value.dtype)
        return start.scatter_reduce(1, index, chosen, reduce)[:, : places.whole].reshape(shape)

    return between(hull(lower, math.inf, "amin"), hull(upper, -math.inf, "amax"))


def _many(values: list[int] | int, dims: int) -> list[int]:
    values = [values] if isinstance(values, int) else list(values)
    return values * (dims // len(values))


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
