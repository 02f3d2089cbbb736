"""Rearrangements: every element of the result is an element of an argument, or a constant."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch._ops import OpOverload

from pyxai_bounds import rounding as rd
from pyxai_bounds.interval import Interval
from pyxai_bounds.rules.logic import ne
from pyxai_bounds.rules.registry import (
    Indices,
    Truth,
    UnsupportedArgumentsError,
    Value,
    as_set,
    ends,
    filled,
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
from pyxai_bounds.rules.remainder import trunc

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
    aten.upsample_nearest1d.default,
    aten.upsample_nearest2d.default,
    aten.upsample_nearest3d.default,
    aten._upsample_nearest_exact1d.default,
    aten._upsample_nearest_exact2d.default,
    aten._upsample_nearest_exact3d.default,
    aten.take.default,
    aten.diag_embed.default,
    aten.diagonal_copy.default,
    aten.diagonal_scatter.default,
    aten.rot90.default,
    aten.block_diag.default,
    aten.channel_shuffle.default,
    aten.masked_scatter.default,
    aten.masked_scatter_backward.default,
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
    aten.put.default,
    aten.trace.default,
    aten.embedding_dense_backward.default,
    aten.upsample_nearest1d_backward.default,
    aten.upsample_nearest2d_backward.default,
    aten.upsample_nearest3d_backward.default,
    aten._upsample_nearest_exact1d_backward.default,
    aten._upsample_nearest_exact2d_backward.default,
    aten._upsample_nearest_exact3d_backward.default,
    aten.col2im.default,
    terms=_all_elements,
)


@rule(aten.index_add.default, ulps=0)
def index_add(x: Value, dim: int, index: torch.Tensor, source: Value, *, alpha: float = 1) -> Interval:
    x, source = as_set(x), as_set(source)
    source = source if alpha == 1 else multiply(source, alpha)
    if not outward():
        return Interval.of(aten.index_add(x.mid, dim, index, source.mid), aten.index_add(x.rad, dim, index, source.rad))
    lost = rd.errors(index.numel() + 1, x.dtype)
    rads = [rd.widen(part.mid, part.rad, lost) for part in (x, source)]
    return Interval.of(aten.index_add(x.mid, dim, index, source.mid), aten.index_add(rads[0], dim, index, rads[1]))


# --- resampling: fixed weighted sums, whose weights PyTorch computes -------------------------------------------


def _register_average(forward: OpOverload, backward: OpOverload, dims: int) -> None:
    """Interpolation by weights ≥ 0."""

    @rule(forward, ulps=0)
    def resample(x: Interval, *args: Any) -> Interval:
        return _resized(lambda t: forward(t, *args), x, dims, 2**dims * _support(x.shape[-dims:], args[0], forward))

    @rule(backward, ulps=0)
    def resample_backward(grad: Interval, *args: Any) -> Interval:
        """As many gradients may meet in one element as there are."""
        return _resized(lambda t: backward(t, *args), grad, dims, grad.shape[-dims:].numel())


def _support(size: Sequence[int], out: Sequence[int], op: OpOverload) -> int:
    """With antialiasing a weight's support grows by how much the image shrinks, in either dimension."""
    if not op.name().split(".")[0].endswith("_aa"):
        return 1
    return math.prod(-(-n // m) + 1 for n, m in zip(size, out, strict=True))


for _forward, _backward, _dims in (
    (aten.upsample_linear1d, aten.upsample_linear1d_backward, 1),
    (aten.upsample_bilinear2d, aten.upsample_bilinear2d_backward, 2),
    (aten.upsample_trilinear3d, aten.upsample_trilinear3d_backward, 3),
    (aten._upsample_bilinear2d_aa, aten._upsample_bilinear2d_aa_backward, 2),
):
    _register_average(_forward.default, _backward.default, _dims)


def _resized(function: Callable[[torch.Tensor], torch.Tensor], x: Interval, dims: int, terms: int) -> Interval:
    """Weighted averages. A weight is a coordinate's fractional part, and off by a few u times the coordinate itself."""
    return _with_rounded_weights(linear_map(function, x, terms), x, dims, terms)


def _with_rounded_weights(out: Interval, x: Interval, dims: int, terms: int) -> Interval:
    if not outward():
        return out
    unit = rd.unit(x.dtype if rd.mode() == rd.Rounding.OUTWARD else torch.float32)
    coordinate = max(*x.shape[-dims:], *out.shape[-dims:])
    reach = (x.mid.abs() + x.rad).amax(tuple(range(-dims, 0)), keepdim=True)
    return settle(out.mid, out.rad + reach * (16 * terms * coordinate * unit))


def _register_bicubic(forward: OpOverload, backward: OpOverload) -> None:
    """Weights of both signs, which are products of one for the row and one for the column."""

    def matrix(n: int, m: int, like: torch.Tensor, align: bool, scale: float | None) -> torch.Tensor:
        """|weights| of m numbers made from n, as the operator makes a column of them. [m, n]"""
        unit = torch.eye(n, dtype=like.dtype, device=like.device).reshape(1, n, n, 1)
        return forward(unit, [m, 1], align, scale, None).reshape(n, m).t().abs()

    def bound(function: Callable[[torch.Tensor], torch.Tensor], x: Interval, weights: list[torch.Tensor]) -> Interval:
        rows, columns = weights
        if not outward():
            return Interval.of(function(x.mid), rows @ x.rad @ columns.t())
        terms = x.shape[-1] * x.shape[-2]
        rad = rd.widen(x.mid, x.rad, rd.errors(terms + 16, x.dtype))
        return _with_rounded_weights(Interval.of(function(x.mid), rows @ rad @ columns.t()), x, 2, 4 * terms + 64)

    @rule(forward, ulps=0)
    def bicubic(x: Interval, size: list[int], align: bool, *scales: float | None) -> Interval:
        given = (*scales, None, None)
        weights = [matrix(n, m, x.mid, align, s) for n, m, s in zip(x.shape[-2:], size, given, strict=False)]
        return bound(lambda t: forward(t, size, align, *scales), x, weights)

    @rule(backward, ulps=0)
    def bicubic_backward(
        grad: Interval, size: list[int], input_size: list[int], align: bool, *scales: float | None
    ) -> Interval:
        given = (*scales, None, None)
        weights = [matrix(n, m, grad.mid, align, s).t() for n, m, s in zip(input_size[-2:], size, given, strict=False)]
        return bound(lambda t: backward(t, size, input_size, align, *scales), grad, weights)


def _register_sampler(forward: OpOverload, backward: OpOverload, dims: int) -> None:
    """Values of an image between its elements, at the places of a grid: weights ≥ 0, unless it is bicubic."""

    @rule(forward, ulps=None)
    def sample(x: Value, grid: Value, mode: int, padding: int, align: bool) -> Interval:
        _check_sampler(mode)
        at, image = mid_of(grid), as_set(x)
        out = _sampled(lambda t: forward(t, at, mode, padding, align), image, image, at, dims)
        if not isinstance(grid, Interval):
            return out
        if mode != _LINEAR:
            raise UnsupportedArgumentsError("reads the nearest element at places in a set; use mode='bilinear'")
        return settle(out.mid, out.rad + _moved(image, grid, padding, align), 0)

    @rule(backward, ulps=None)
    def sample_backward(
        grad: Value, x: Value, grid: Value, mode: int, padding: int, align: bool, mask: list[bool]
    ) -> tuple[Interval, None]:
        """Of the image; the grid's gradient jumps at every element of it."""
        _check_sampler(mode)
        if mask[1] or isinstance(grid, Interval):
            raise UnsupportedArgumentsError(
                "is asked for a gradient through its grid; keep the grid a point, or detach it"
            )
        like = mid_of(x).to(grad.dtype)
        return _sampled(
            lambda t: backward(t, like, grid, mode, padding, align, mask)[0], as_set(grad), as_set(x), grid, dims
        ), None


_LINEAR, _NEAREST = 0, 1  # ATen's numbers for the modes of grid_sample


def _check_sampler(mode: int) -> None:
    if mode not in (_LINEAR, _NEAREST):
        raise UnsupportedArgumentsError("has weights of both signs; use mode='bilinear'")
    if mode == _NEAREST and outward():
        raise UnsupportedArgumentsError("rounds places to the nearest element; use mode='bilinear', or sound=False")


def _sampled(
    function: Callable[[torch.Tensor], torch.Tensor], x: Interval, image: Interval, grid: torch.Tensor, dims: int
) -> Interval:
    """Linear in x. A place is computed from the grid's number g, and off by a few u times (1 + |g|)·size."""
    terms = x.shape[-dims:].numel()
    out = linear_map(function, x, terms)
    if not outward():
        return out
    reach = (x.mid.abs() + x.rad).amax(tuple(range(-dims, 0)), keepdim=True)
    far = 2 + grid.abs().amax()
    return settle(out.mid, out.rad + reach * far * (16 * 2**dims * terms * max(image.shape[-dims:]) * rd.unit(x.dtype)))


def _moved(image: Interval, grid: Interval, padding: int, align: bool) -> torch.Tensor:
    """How much the value may change while the place moves: along each axis no faster than the greatest difference of
    neighbours, among them the zeros around the image if these are its padding.
    """
    dims = len(grid.shape) - 2
    moved: Any = 0.0
    for axis in range(dims):  # the grid's numbers are in the order x, y, z; the image's dimensions in the opposite one
        dim = -1 - axis
        pad = [0] * (2 * axis) + [1, 1] if padding == 0 else []
        mid, rad = (F.pad(part, pad) if pad else part for part in (image.mid, image.rad))
        count = mid.shape[dim] - 1
        near, far = ([part.narrow(dim, start, count) for part in (mid, rad)] for start in (0, 1))
        step = (near[0] - far[0]).abs() + near[1] + far[1]
        steepest = step.amax(tuple(range(-dims, 0))) if count else torch.zeros_like(mid.amax(tuple(range(-dims, 0))))
        size = image.shape[dim] if not align else image.shape[dim] - 1
        distance = grid.rad[..., axis] * (size / 2)
        moved = moved + steepest.reshape(*steepest.shape, *[1] * dims) * distance.unsqueeze(1)
    return moved * (1 + 64 * rd.unit(grid.dtype)) + rd.tiny(grid.dtype) * (moved > 0) if outward() else moved


_register_sampler(aten.grid_sampler_2d.default, aten.grid_sampler_2d_backward.default, 2)
_register_sampler(aten.grid_sampler_3d.default, aten.grid_sampler_3d_backward.default, 3)
_register_bicubic(aten.upsample_bicubic2d.default, aten.upsample_bicubic2d_backward.default)


@rule(aten.scatter.value, precision="exact")
def scatter_value(x: Interval, dim: int, index: torch.Tensor, value: float) -> Interval:
    if isinstance(index, Interval):
        raise UnsupportedArgumentsError("with an index that depends on the box")
    return Interval.of(aten.scatter(x.mid, dim, index, value), aten.scatter(x.rad, dim, index, 0))


@rule(aten.index_fill.int_Scalar, precision="exact")
def index_fill(x: Interval, dim: int, index: torch.Tensor, value: float) -> Interval:
    return Interval.of(x.mid.index_fill(dim, index, value), x.rad.index_fill(dim, index, 0))


@rule(aten.index_fill.int_Tensor, precision="exact")
def index_fill_tensor(x: Value, dim: int, index: torch.Tensor, value: Value) -> Interval:
    return Interval.of(mid_of(x).index_fill(dim, index, mid_of(value)), rad_of(x).index_fill(dim, index, rad_of(value)))


@rule(aten.view.default, aten.reshape.default, aten._unsafe_view.default, precision="exact")
def reshape(x: Interval, size: list[int]) -> Interval:
    if isinstance(x, Indices):
        return x.reshaped(aten.reshape.default, size)
    return type(x).of(x.mid.reshape(size), x.rad.reshape(size))


@rule(aten.constant_pad_nd.default, precision="exact")
def constant_pad_nd(x: Interval, pad: list[int], value: float = 0) -> Interval:
    return Interval.of(aten.constant_pad_nd(x.mid, pad, value), aten.constant_pad_nd(x.rad, pad, 0))


_WHOLE = {torch.int32: 2.0**31, torch.int64: 2.0**63}


@rule(aten._to_copy.default, precision="own", ulps=1)
def to_copy(x: Value, **kwargs: Any) -> Interval:
    """Of whole numbers and truth values the set keeps its own dtype, in which they are exact."""
    dtype = kwargs.get("dtype") or x.dtype
    if dtype == torch.bool:
        return ne(as_set(x), 0)
    if dtype in _WHOLE and isinstance(x, Truth):
        return Interval.of(x.mid, x.rad)
    if dtype in _WHOLE:
        whole, most = trunc(as_set(x)), _WHOLE[dtype]
        lower, upper = ends(whole)
        held = (lower > -most) & (upper < most)  # beyond, numbers wrap around
        return filled(whole, ~held, rad=math.inf)
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
