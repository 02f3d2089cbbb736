"""Order statistics and their places: maxima along a dimension, sorted values, what is selected by their indices."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from pyxai_bounds.interval import Interval
from pyxai_bounds.rules import logic, shape  # noqa: F401  the rules for points, which this file extends
from pyxai_bounds.rules.registry import (
    RULES,
    Indices,
    Ranks,
    UnsupportedArgumentsError,
    Value,
    as_set,
    between,
    ends,
    monotone,
    plus,
    rule,
    within,
)

aten = torch.ops.aten


def _first_of_greatest(x: Interval, dim: int, sign: int) -> tuple[Tensor, Tensor]:
    """Must an element be the first maximum (of −x: minimum), and may it be? ``ops.windows.first_of_greatest``, but in
    a few operators however long the dimension is. [..., elements, 1].
    """
    lower, upper = (end.movedim(dim, -1).clamp(min=torch.finfo(x.dtype).min) for end in _signed_ends(x, sign))
    must = (lower > _before(upper)) & (lower >= _before(upper.flip(-1)).flip(-1))
    may = ~((upper <= _before(lower)) | (upper < _before(lower.flip(-1)).flip(-1)))  # true for a NaN
    return must.unsqueeze(-1), may.unsqueeze(-1)


def _before(x: Tensor) -> Tensor:
    """For each element the greatest one before it."""
    first = torch.full_like(x[..., :1], -math.inf)
    return torch.cat((first, x.cummax(-1).values[..., :-1]), -1)


def _signed_ends(x: Interval, sign: int) -> tuple[Tensor, Tensor]:
    lower, upper = ends(x)
    return (lower, upper) if sign > 0 else (-upper, -lower)


def _at_ranks(x: Interval, dim: int, ranks: range, sign: int) -> tuple[Tensor, Tensor]:
    """Must an element, and may it, stand at each of these places of the sorted row? [..., elements, ranks].

    At least those stand before it that are surely less, and after it those that are surely greater; which one of two
    equal elements comes first is left open.
    """
    lower, upper = (end.movedim(dim, -1) for end in _signed_ends(x, sign))
    before = (upper.unsqueeze(-2) < lower.unsqueeze(-1)).sum(-1, keepdim=True)
    after = (lower.unsqueeze(-2) > upper.unsqueeze(-1)).sum(-1, keepdim=True)
    last = lower.shape[-1] - 1 - after
    rank = torch.arange(ranks.start, ranks.stop, device=lower.device)
    return (before == rank) & (last == rank), (before <= rank) & (rank <= last)


def _extremum(op: OpOverload, reduce: Callable, sign: int) -> None:
    @rule(op, precision="exact")
    def extremum(x: Interval, dim: int, keepdim: bool = False) -> tuple[Interval, Interval]:
        values = monotone(lambda t: reduce(t, dim, keepdim), x, ulps=0)
        return values, _ranks(x, dim, keepdim, lambda: _first_of_greatest(x, dim, sign), reduce)


def _place_of_extremum(op: OpOverload, reduce: Callable, sign: int) -> None:
    @rule(op, precision="exact")
    def place(x: Interval, dim: int | None = None, keepdim: bool = False) -> Interval:
        if dim is None:
            raise UnsupportedArgumentsError("finds a place among all elements; name the dimension")
        return _ranks(x, dim, keepdim, lambda: _first_of_greatest(x, dim, sign), reduce)


def _ranks(x: Interval, dim: int, kept: bool, chosen: Callable, reduce: Callable) -> Indices:
    dim = dim % max(len(x.shape), 1)
    if not x.shape:
        return Indices()
    return Indices(ranks=Ranks(x, dim, kept, chosen, lambda: monotone(lambda t: reduce(t, dim, True), x, ulps=0)))


for _op, _place, _reduce, _sign in (
    (aten.max.dim, aten.argmax.default, torch.amax, 1), (aten.min.dim, aten.argmin.default, torch.amin, -1)
):  # fmt: skip
    _extremum(_op, _reduce, _sign)
    _place_of_extremum(_place, _reduce, _sign)


def _register_ranked(op: OpOverload) -> None:
    """Order statistics: the k-th largest of many grows with each of them; which one it is has no single value."""
    names = [argument.name for argument in op._schema.arguments]

    @rule(op, precision="exact")
    def ranked(x: Interval, *args: Any, **kwargs: Any) -> tuple[Interval, object]:
        given = dict(zip(names[1:], args, strict=False)) | kwargs
        dim = given.get("dim", -1)
        if not given.get("sorted", True):
            raise UnsupportedArgumentsError("returns its values in no order (sorted=False), so that none has a place")

        def values(t: Tensor) -> Tensor:
            found = op(t, *args, **kwargs)[0]
            unknown = t.isnan().any(dim, keepdim=found.dim() == t.dim())  # PyTorch would rank a NaN above all numbers
            return torch.where(unknown, torch.nan, found)

        out = monotone(values, x, ulps=0)
        if not x.shape:
            return out, Indices()
        count = x.shape[dim]
        descending = given.get("descending", given.get("largest", True) if "topk" in op.name() else False)
        if "k" in given and "kthvalue" in op.name():
            ranks = range(given["k"] - 1, given["k"])
        elif "median" in op.name():
            ranks = range((count - 1) // 2, (count - 1) // 2 + 1)
        else:
            ranks = range(given.get("k", count))
        kept = len(out.shape) == len(x.shape)
        place = Ranks(
            x, dim % len(x.shape), kept, lambda: _at_ranks(x, dim, ranks, -1 if descending else 1),
            lambda: out if kept else Interval.of(out.mid.unsqueeze(dim), out.rad.unsqueeze(dim)),
        )  # fmt: skip
        return out, Indices(ranks=place)


for _op in (
    aten.topk.default, aten.sort.default, aten.sort.stable, aten.kthvalue.default, aten.median.dim, aten.nanmedian.dim
):  # fmt: skip
    _register_ranked(_op)


@rule(aten.median.default, aten.nanmedian.default, precision="exact")
def median_of_all(x: Interval) -> Interval:
    return monotone(lambda t: torch.where(t.isnan().any(), torch.nan, torch.median(t)), x, ulps=0)


@rule(aten.cummax.default, precision="exact")
def cummax(x: Interval, dim: int) -> tuple[Interval, object]:
    return monotone(lambda t: torch.cummax(t, dim).values, x, ulps=0), Indices()


@rule(aten.cummin.default, precision="exact")
def cummin(x: Interval, dim: int) -> tuple[Interval, object]:
    return monotone(lambda t: torch.cummin(t, dim).values, x, ulps=0), Indices()


# --- what is selected, or where to ------------------------------------------------------------------------------


def _gather(x: Value, dim: int, ranks: Ranks) -> Interval:
    """Of each rank what stands at the places that may have it; of the set itself no more than its sorted values."""
    _check_shape(x.shape, ranks, dim)
    _, may = ranks.chosen()
    lower, upper = (end.movedim(dim, -1).unsqueeze(-1) for end in ends(x))
    least, greatest = torch.where(may, lower, math.inf).amin(-2), torch.where(may, upper, -math.inf).amax(-2)
    out = between(least.movedim(-1, dim), greatest.movedim(-1, dim))
    if isinstance(x, Interval) and x.mid is ranks.found.mid and x.rad is ranks.found.rad:
        return within(out, *ends(ranks.values()))
    return out


def _scatter(x: Value, dim: int, ranks: Ranks, source: Value) -> Interval:
    """Where something must arrive what may; elsewhere that, or what stood there."""
    _check_shape(x.shape, ranks, dim)
    must, may = ranks.chosen()
    if source.shape[dim] != may.shape[-1]:
        raise UnsupportedArgumentsError("uses more indices, or fewer, than it has numbers for them")
    (before, at_most), (lower, upper) = (
        [end.movedim(dim, -1) for end in ends(x)], [end.movedim(dim, -1).unsqueeze(-2) for end in ends(source)]
    )  # fmt: skip
    sure = must.any(-1) if may.shape[-1] < may.shape[-2] else torch.ones_like(must[..., 0])  # all places are given
    least, greatest = torch.where(may, lower, math.inf).amin(-1), torch.where(may, upper, -math.inf).amax(-1)
    least = torch.where(sure, least, torch.minimum(least, before))
    greatest = torch.where(sure, greatest, torch.maximum(greatest, at_most))
    return between(least.movedim(-1, dim), greatest.movedim(-1, dim))


def _scatter_add(x: Value, dim: int, ranks: Ranks, source: Value) -> Interval:
    return plus(x, _scatter(torch.zeros_like(x.mid if isinstance(x, Interval) else x), dim, ranks, source))


def _scatter_number(x: Value, dim: int, ranks: Ranks, value: float) -> Interval:
    like = x.mid if isinstance(x, Interval) else x
    if not like.is_floating_point():
        raise UnsupportedArgumentsError(f"writes into a tensor of {like.dtype} at indices that differ within a set")
    return _scatter(x, dim, ranks, torch.full_like(ranks.values().mid, value, dtype=like.dtype))


def _check_shape(given: torch.Size, ranks: Ranks, dim: int) -> None:
    if given != ranks.found.shape or dim % len(given) != ranks.dim or not ranks.kept:
        raise UnsupportedArgumentsError("uses indices that differ within a set, and not on rows of their own")


def _with_places(op: OpOverload, by_ranks: Callable, ulps: float | None) -> None:
    plain = RULES[op]

    @rule(op, precision=plain.precision, ulps=ulps)
    def selected(x: Value, dim: int, index: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(index, Indices) and index.ranks is not None:
            return by_ranks(x, dim, index.ranks, *args)
        return plain.function(x, dim, index, *args, **kwargs)


def _rows_of(x: Value, indices: Any) -> tuple[Tensor, Ranks]:
    """Of x[rows, places]: the rows, and the places of maxima along the second dimension, one for each of them."""
    rows, places = indices if len(indices) == 2 else (None, None)
    ranks = places.ranks if isinstance(places, Indices) else None
    if not isinstance(rows, Tensor) or rows.dtype != torch.int64 or ranks is None or ranks.kept:
        raise UnsupportedArgumentsError("uses indices that differ within a set; use gather(1, index)")
    found = ranks.found.shape
    if len(x.shape) != 2 or ranks.dim != 1 or list(found) != [*rows.shape, x.shape[1]]:
        raise UnsupportedArgumentsError("uses indices that differ within a set, and not on rows of their own")
    return rows, replace(ranks, kept=True)


_index, _index_put = (RULES[op].function for op in (aten.index.Tensor, aten.index_put.default))


@rule(aten.index.Tensor, precision="exact")
def index(x: Value, indices: Any) -> Any:
    if not any(isinstance(place, Indices) for place in indices):
        return _index(x, indices)
    rows, ranks = _rows_of(x, indices)
    out = _gather(_index(as_set(x), [rows]), 1, ranks)
    return Interval.of(out.mid.squeeze(1), out.rad.squeeze(1))


@rule(aten.index_put.default, ulps=0)
def index_put(x: Value, indices: Any, values: Value, accumulate: bool = False) -> Any:
    if not any(isinstance(place, Indices) for place in indices):
        return _index_put(x, indices, values, accumulate)
    rows, ranks = _rows_of(x, indices)
    if not accumulate:
        raise UnsupportedArgumentsError("writes at indices that differ within a set; use scatter")
    values = as_set(values)
    column = Interval.of(*(part.expand(rows.shape).unsqueeze(1) for part in (values.mid, values.rad)))
    zeros = torch.zeros_like(ranks.found.mid, dtype=column.dtype)
    return _index_put(x, [rows], _scatter(zeros, 1, ranks, column), True)


_eq = RULES[aten.eq.Tensor].function


@rule(aten.eq.Tensor, aten.eq.Scalar, precision="exact")
def eq(a: Any, b: Any) -> Interval:
    """Is the place of a maximum the one that is given? True where the element there must be the maximum, open where it
    may be.
    """
    if not isinstance(a, Indices):
        a, b = b, a
    if not isinstance(a, Indices) or isinstance(b, Indices) or a.ranks is None:
        return _eq(a, b)
    ranks, rows = a.ranks, a.ranks.found.shape
    must, may = (t.movedim(-2, ranks.dim) for t in ranks.chosen())
    if must.shape[-1] != 1:
        raise UnsupportedArgumentsError(a.why)
    joined = [n for d, n in enumerate(rows) if d != ranks.dim]
    place = torch.as_tensor(b, device=must.device)
    if not ranks.kept:
        place = place.expand(joined).unsqueeze(ranks.dim)
    elif place.dim() == len(rows) or place.dim() == 1 == len(rows) - ranks.dim:
        place = place.expand([n if d != ranks.dim else place.shape[d - len(rows)] for d, n in enumerate(rows)])
    else:
        raise UnsupportedArgumentsError(a.why)
    inside = (place >= 0) & (place < rows[ranks.dim])
    chosen = place.clamp(0, rows[ranks.dim] - 1).long()
    known = [inside & t.squeeze(-1).gather(ranks.dim, chosen) for t in (must, may)]
    return logic.truth(*(known if ranks.kept else [t.squeeze(ranks.dim) for t in known]), ranks.found)


@rule(aten.ne.Tensor, aten.ne.Scalar, precision="exact")
def ne(a: Any, b: Any) -> Interval:
    return logic.logical_not(eq(a, b))


_with_places(aten.gather.default, _gather, 0)
_with_places(aten.scatter.src, _scatter, 0)
_with_places(aten.scatter.value, _scatter_number, 0)
_with_places(aten.scatter_add.default, _scatter_add, 0)
