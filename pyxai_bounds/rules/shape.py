"""Rearrangements: every element of the result is an element of an argument, or a constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree

from pyxai_bounds import rounding as rd
from pyxai_bounds.interval import Interval
from pyxai_bounds.rules.registry import (
    UnsupportedArgumentsError,
    Value,
    linear_map,
    mid_of,
    multiply,
    narrow,
    outward,
    positive_linear,
    rad_of,
    rule,
    settle,
)

aten = torch.ops.aten

positive_linear(
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.expand.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default,
    aten.embedding.default,
    aten.unbind.int,
    aten.cat.default,
    aten.stack.default,
    aten.repeat.default,
    aten.flip.default,
    aten.roll.default,
    aten.unfold.default,
    aten.diagonal.default,
    aten.tril.default,
    aten.triu.default,
    aten.gather.default,
    aten.index_select.default,
    aten.index.Tensor,
    aten.scatter.src,
    aten.index_copy.default,
    aten.select_backward.default,
    aten.slice_backward.default,
    aten.select_scatter.default,
    aten.slice_scatter.default,
    aten.diagonal_backward.default,
    aten.reflection_pad1d.default,
    aten.reflection_pad2d.default,
    aten.reflection_pad3d.default,
    aten.replication_pad1d.default,
    aten.replication_pad2d.default,
    aten.replication_pad3d.default,
    aten.upsample_nearest2d.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.im2col.default,
)
positive_linear(
    aten.reflection_pad1d_backward.default,
    aten.reflection_pad2d_backward.default,
    aten.reflection_pad3d_backward.default,
    aten.replication_pad1d_backward.default,
    aten.replication_pad2d_backward.default,
    aten.replication_pad3d_backward.default,
    shape_only=("self",),
    terms=lambda grad, *_: grad.numel(),
)


def _all_elements(*args: Any, **kwargs: Any) -> int:
    """Each element of a result may sum all elements of the arguments: more than it does, which costs nothing in
    float64.
    """
    return sum(leaf.numel() for leaf in pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor))


positive_linear(
    aten.scatter_add.default,
    aten.index_put.default,
    aten.unfold_backward.default,
    aten.upsample_nearest2d_backward.default,
    aten.col2im.default,
    terms=_all_elements,
)


@rule(aten.index_add.default, ulps=0)
def index_add(x: Value, dim: int, index: torch.Tensor, source: Value, *, alpha: float = 1) -> Interval:
    x, source = _as_set(x), _as_set(source)
    source = source if alpha == 1 else multiply(source, alpha)
    if not outward():
        return Interval.of(aten.index_add(x.mid, dim, index, source.mid), aten.index_add(x.rad, dim, index, source.rad))
    lost = rd.errors(index.numel() + 1, x.dtype)
    rads = [rd.widen(part.mid, part.rad, lost) for part in (x, source)]
    return Interval.of(aten.index_add(x.mid, dim, index, source.mid), aten.index_add(rads[0], dim, index, rads[1]))


def _as_set(x: Value) -> Interval:
    return x if isinstance(x, Interval) else Interval.point(x)


@rule(aten.upsample_bilinear2d.default, ulps=0)
def upsample_bilinear(x: Interval, *args: Any) -> Interval:
    return _resized(lambda t: aten.upsample_bilinear2d(t, *args), x, 4)


@rule(aten.upsample_bilinear2d_backward.default, ulps=0)
def upsample_bilinear_backward(grad: Interval, *args: Any) -> Interval:
    """As many gradients may meet in one element as there are."""
    return _resized(lambda t: aten.upsample_bilinear2d_backward(t, *args), grad, grad.shape[-2:].numel())


def _resized(function: Callable[[torch.Tensor], torch.Tensor], x: Interval, terms: int) -> Interval:
    """Weighted averages. A weight is a coordinate's fractional part, and off by a few u times the coordinate itself."""
    out = linear_map(function, x, terms)
    if not outward():
        return out
    unit = rd.unit(x.dtype if rd.mode() == rd.Rounding.OUTWARD else torch.float32)
    coordinate = max(*x.shape[-2:], *out.shape[-2:])
    reach = (x.mid.abs() + x.rad).amax((-2, -1), keepdim=True)
    return settle(out.mid, out.rad + reach * (16 * terms * coordinate * unit))


@rule(aten.scatter.value, precision="exact")
def scatter_value(x: Interval, dim: int, index: torch.Tensor, value: float) -> Interval:
    return Interval.of(aten.scatter(x.mid, dim, index, value), aten.scatter(x.rad, dim, index, 0))


@rule(aten.view.default, aten.reshape.default, aten._unsafe_view.default, precision="exact")
def reshape(x: Interval, size: list[int]) -> Interval:
    return type(x).of(x.mid.reshape(size), x.rad.reshape(size))


@rule(aten.constant_pad_nd.default, precision="exact")
def constant_pad_nd(x: Interval, pad: list[int], value: float = 0) -> Interval:
    return Interval.of(aten.constant_pad_nd(x.mid, pad, value), aten.constant_pad_nd(x.rad, pad, 0))


@rule(aten._to_copy.default, precision="own", ulps=1)
def to_copy(x: Value, **kwargs: Any) -> Interval:
    dtype = kwargs.get("dtype") or x.dtype
    if not dtype.is_floating_point:
        raise UnsupportedArgumentsError(f"converts a set to {dtype}")
    if outward() and isinstance(x, Interval):
        x = narrow(x, dtype)
    return Interval.of(aten._to_copy(mid_of(x), **kwargs), aten._to_copy(rad_of(x), **kwargs))


@rule(aten.fill.Tensor, aten.copy.default, shape_only=("self",), precision="own", ulps=1)
def fill(x: Value, value: Interval, non_blocking: bool = False) -> Interval:
    """The value in the shape of ``x``."""
    if not x.dtype.is_floating_point:
        raise UnsupportedArgumentsError(f"writes a set into a tensor of {x.dtype}")
    if outward():
        value = narrow(value, x.dtype)
    return Interval.of(value.mid.to(x.dtype).expand(x.shape), value.rad.to(x.dtype).expand(x.shape))


def _never_called(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("an operator that uses shapes alone runs at points")


# Only the shape of the argument matters: a set in, a point out.
rule(
    aten.fill.Scalar,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.empty_like.default,
    aten.full_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_empty.default,
    aten.new_full.default,
    aten.new_empty_strided.default,
    shape_only=("self",),
    precision="exact",
)(_never_called)
