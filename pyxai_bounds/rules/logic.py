"""Comparisons of sets: three-valued truth, and what is selected by it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyxai_bounds.interval import Interval
from pyxai_bounds.rules.registry import Truth, UnsupportedArgumentsError, Value, between, ends, mid_of, rad_of, rule

aten = torch.ops.aten


def truth(must: Tensor, may: Tensor, *operands: Any) -> Interval:
    """True where it must be, unknown where it only may be; in the dtype of the sets that were compared."""
    dtype = next(x.dtype for x in operands if isinstance(x, Interval))
    lower, upper = must.to(dtype), may.to(dtype)
    return Truth.of((lower + upper) * 0.5, (upper - lower) * 0.5)


def _must_and_may(x: Value) -> tuple[Tensor, Tensor]:
    """Is it true, that is other than 0, everywhere in the set, and is it anywhere? A NaN may be, and need not be."""
    lower, upper = ends(x)
    return (lower > 0) | (upper < 0), ~((lower == 0) & (upper == 0))


@rule(aten.lt.Tensor, aten.lt.Scalar, precision="exact")
def lt(a: Any, b: Any) -> Interval:
    (al, au), (bl, bu) = ends(a), ends(b)
    return truth(au < bl, ~(al >= bu), a, b)


@rule(aten.le.Tensor, aten.le.Scalar, precision="exact")
def le(a: Any, b: Any) -> Interval:
    (al, au), (bl, bu) = ends(a), ends(b)
    return truth(au <= bl, ~(al > bu), a, b)


@rule(aten.gt.Tensor, aten.gt.Scalar, precision="exact")
def gt(a: Any, b: Any) -> Interval:
    (al, au), (bl, bu) = ends(a), ends(b)
    return truth(al > bu, ~(au <= bl), a, b)


@rule(aten.ge.Tensor, aten.ge.Scalar, precision="exact")
def ge(a: Any, b: Any) -> Interval:
    (al, au), (bl, bu) = ends(a), ends(b)
    return truth(al >= bu, ~(au < bl), a, b)


@rule(aten.eq.Tensor, aten.eq.Scalar, precision="exact")
def eq(a: Any, b: Any) -> Interval:
    """Only points are known to be equal, and a number to itself."""
    if a is b:
        known = ~a.mid.isnan() & a.rad.isfinite()
        return truth(known, torch.ones_like(known), a)
    (al, au), (bl, bu) = ends(a), ends(b)
    return truth((al == bu) & (au == bl), ~((au < bl) | (al > bu)), a, b)


@rule(aten.ne.Tensor, aten.ne.Scalar, precision="exact")
def ne(a: Any, b: Any) -> Interval:
    return logical_not(eq(a, b))


@rule(aten.isnan.default, aten.isinf.default, precision="exact")
def isnan(x: Interval) -> Interval:
    """Only where nothing finite is known may there be a NaN or an infinity."""
    may = ~x.isfinite()
    return truth(torch.zeros_like(may), may, x)


@rule(aten.logical_not.default, aten.bitwise_not.default, precision="exact")
def logical_not(x: Interval) -> Interval:
    must, may = _must_and_may(x)
    return truth(~may, ~must, x)


@rule(aten.logical_and.default, precision="exact")
def logical_and(a: Value, b: Value) -> Interval:
    (must, may), (b_must, b_may) = _must_and_may(a), _must_and_may(b)
    return truth(must & b_must, may & b_may, a, b)


@rule(aten.logical_or.default, precision="exact")
def logical_or(a: Value, b: Value) -> Interval:
    (must, may), (b_must, b_may) = _must_and_may(a), _must_and_may(b)
    return truth(must | b_must, may | b_may, a, b)


@rule(aten.logical_xor.default, precision="exact")
def logical_xor(a: Value, b: Value) -> Interval:
    (must, may), (b_must, b_may) = _must_and_may(a), _must_and_may(b)
    return truth((must & ~b_may) | (~may & b_must), ~((must & b_must) | (~may & ~b_may)), a, b)


@rule(aten.any.default, aten.any.dim, aten.any.dims, precision="exact")
def any_(x: Interval, *args: Any, **kwargs: Any) -> Interval:
    must, may = _must_and_may(x)
    return truth(torch.any(must, *args, **kwargs), torch.any(may, *args, **kwargs), x)


@rule(aten.all.default, aten.all.dim, aten.all.dims, precision="exact")
def all_(x: Interval, *args: Any, **kwargs: Any) -> Interval:
    must, may = _must_and_may(x)
    return truth(torch.all(must, *args, **kwargs), torch.all(may, *args, **kwargs), x)


@rule(aten.bitwise_and.Tensor, precision="exact")
def bitwise_and(a: Value, b: Value) -> Interval:
    return logical_and(_only_truth(a), _only_truth(b))


@rule(aten.bitwise_or.Tensor, precision="exact")
def bitwise_or(a: Value, b: Value) -> Interval:
    return logical_or(_only_truth(a), _only_truth(b))


@rule(aten.bitwise_xor.Tensor, precision="exact")
def bitwise_xor(a: Value, b: Value) -> Interval:
    return logical_xor(_only_truth(a), _only_truth(b))


def _only_truth(x: Value) -> Value:
    """A truth value and an integer have bits in common, or not: 2 & True is 0."""
    if isinstance(x, Tensor) and x.dtype != torch.bool:
        raise UnsupportedArgumentsError(f"combines truth values with the bits of {x.dtype}; compare these with 0 first")
    return x


@rule(aten.where.self, precision="exact")
def where(condition: Value, a: Any, b: Any) -> Interval:
    """One branch where the condition is known, the hull of both where it is not."""
    mids = mid_of(a), mid_of(b)
    rads = rad_of(a), rad_of(b)
    if isinstance(a, Truth) or isinstance(b, Truth):
        raise UnsupportedArgumentsError("selects between truth values")
    if not isinstance(condition, Interval):
        return Interval.of(torch.where(condition, *mids), torch.where(condition, *rads))
    must, may = _must_and_may(condition)
    (al, au), (bl, bu) = ends(a), ends(b)
    dtype = torch.result_type(*mids)
    if not dtype.is_floating_point:
        raise UnsupportedArgumentsError(f"selects between points of {dtype} by a set")
    hull = between(torch.minimum(al.to(dtype), bl.to(dtype)), torch.maximum(au.to(dtype), bu.to(dtype)))
    return Interval.of(
        torch.where(must, mids[0], torch.where(may, hull.mid, mids[1])),
        torch.where(must, rads[0], torch.where(may, hull.rad, rads[1])),
    )


@rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor, precision="exact")
def masked_fill(x: Value, mask: Value, value: Any) -> Interval:
    like = mid_of(x)
    if not isinstance(value, Interval):
        value = torch.full_like(like, value) if not isinstance(value, Tensor) else value.to(like.dtype)
    return where(mask, value, x)
