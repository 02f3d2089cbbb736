"""Rearrangements: every element of the result is an element of an argument, or a constant."""

from __future__ import annotations

from typing import Any

import torch

from pyxai_bounds.interval import Interval
from pyxai_bounds.rules.registry import UnsupportedArgumentsError, Value, mid_of, positive_linear, rad_of, rule

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
    aten.scatter_add.default,
    aten.index_copy.default,
    aten.index_put.default,
    aten.select_backward.default,
    aten.slice_backward.default,
    aten.select_scatter.default,
    aten.slice_scatter.default,
    aten.unfold_backward.default,
    aten.diagonal_backward.default,
    aten.reflection_pad1d.default,
    aten.reflection_pad2d.default,
    aten.reflection_pad3d.default,
    aten.replication_pad1d.default,
    aten.replication_pad2d.default,
    aten.replication_pad3d.default,
    aten.upsample_nearest2d.default,
    aten.upsample_bilinear2d.default,
    aten.upsample_nearest2d_backward.default,
    aten.upsample_bilinear2d_backward.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.im2col.default,
    aten.col2im.default,
)
positive_linear(
    aten.reflection_pad1d_backward.default,
    aten.reflection_pad2d_backward.default,
    aten.reflection_pad3d_backward.default,
    aten.replication_pad1d_backward.default,
    aten.replication_pad2d_backward.default,
    aten.replication_pad3d_backward.default,
    shape_only=("self",),
)


@rule(aten.index_add.default)
def index_add(x: Value, dim: int, index: torch.Tensor, source: Value, *, alpha: float = 1) -> Interval:
    return Interval.of(
        aten.index_add(mid_of(x), dim, index, mid_of(source), alpha=alpha),
        aten.index_add(rad_of(x), dim, index, rad_of(source), alpha=abs(alpha)),
    )


@rule(aten.scatter.value)
def scatter_value(x: Interval, dim: int, index: torch.Tensor, value: float) -> Interval:
    return Interval.of(aten.scatter(x.mid, dim, index, value), aten.scatter(x.rad, dim, index, 0))


@rule(aten.view.default, aten.reshape.default, aten._unsafe_view.default)
def reshape(x: Interval, size: list[int]) -> Interval:
    return type(x).of(x.mid.reshape(size), x.rad.reshape(size))


@rule(aten.constant_pad_nd.default)
def constant_pad_nd(x: Interval, pad: list[int], value: float = 0) -> Interval:
    return Interval.of(aten.constant_pad_nd(x.mid, pad, value), aten.constant_pad_nd(x.rad, pad, 0))


@rule(aten._to_copy.default)
def to_copy(x: Value, **kwargs: Any) -> Interval:
    dtype = kwargs.get("dtype") or x.dtype
    if not dtype.is_floating_point:
        raise UnsupportedArgumentsError(f"converts a set to {dtype}")
    return Interval.of(aten._to_copy(mid_of(x), **kwargs), aten._to_copy(rad_of(x), **kwargs))


@rule(aten.fill.Tensor, aten.copy.default, shape_only=("self",))
def fill(x: Value, value: Interval, non_blocking: bool = False) -> Interval:
    """The value in the shape of ``x``."""
    if not x.dtype.is_floating_point:
        raise UnsupportedArgumentsError(f"writes a set into a tensor of {x.dtype}")
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
)(_never_called)
