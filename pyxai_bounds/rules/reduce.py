"""Reductions over dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyxai_bounds import rounding as rd
from pyxai_bounds.interval import Interval
from pyxai_bounds.rules.elementwise import reciprocal, square
from pyxai_bounds.rules.functions import pow_
from pyxai_bounds.rules.logic import ne
from pyxai_bounds.rules.registry import (
    UnsupportedArgumentsError,
    Value,
    as_set,
    between,
    enclose,
    ends,
    evaluated,
    increasing,
    monotone,
    multiply,
    outward,
    positive_linear,
    range_of,
    rule,
    singleton,
    steep,
    total,
)

aten = torch.ops.aten


def _summed(x: Tensor, dim: Any = None, *args: Any, **kwargs: Any) -> int:
    """How many elements a reduction over these dimensions takes together; all of them if none are named."""
    if dim is None or dim == []:
        return x.numel()
    return math.prod(x.shape[d] for d in ([dim] if isinstance(dim, int) else dim))


def _listed(dim: Any, x: Interval) -> Any:
    """The dimensions that a reduction names; all of them for None."""
    return list(range(len(x.shape))) if dim is None else [dim] if isinstance(dim, int) else dim


positive_linear(
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.mean.default,
    aten.mean.dim,
    aten.cumsum.default,
    terms=_summed,
)


for extremum in (aten.amax.default, aten.amin.default, aten.max.default, aten.min.default):
    increasing(extremum)


@rule(aten.nansum.default, ulps=0)
def nansum(x: Interval, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Interval:
    """As ``sum``: a NaN is not passed over, for in a set it may be anything."""
    if dtype not in (None, x.dtype):
        raise UnsupportedArgumentsError(f"sums in {dtype}; convert the argument")
    return total(x, _listed(None if dim == [] else dim, x), keepdim)


# --- products: of disjoint elements, so that the exact product of two sets has their exact range ------------------


@rule(aten.cumprod.default, ulps=None)
def cumprod(x: Interval, dim: int, *, dtype: Any = None) -> Interval:
    """Products of the last 2, 4, 8, … elements, each of two disjoint halves."""
    out = _in_dtype(x, dtype)
    step, count = 1, x.shape[dim] if x.shape else 1
    while step < count:
        head, tail, before = (
            _narrow(out, dim, start, length) for start, length in ((0, step), (step, count - step), (0, count - step))
        )
        product = multiply(tail, before)
        out = Interval.of(torch.cat((head.mid, product.mid), dim), torch.cat((head.rad, product.rad), dim))
        step *= 2
    return out


@rule(aten.prod.dim_int, ulps=None)
def prod(x: Interval, dim: int, keepdim: bool = False, *, dtype: Any = None) -> Interval:
    out = _in_dtype(x, dtype)
    if not x.shape:
        return out
    while (count := out.shape[dim]) > 1:
        half = count // 2
        product = multiply(_narrow(out, dim, 0, half), _narrow(out, dim, half, half))
        rest = _narrow(out, dim, 2 * half, count - 2 * half)
        out = Interval.of(torch.cat((product.mid, rest.mid), dim), torch.cat((product.rad, rest.rad), dim))
    if out.shape[dim] == 0:
        shape = [1 if d == dim % len(out.shape) else n for d, n in enumerate(out.shape)]
        out = singleton(out.mid.new_ones(shape))
    return out if keepdim else Interval.of(out.mid.squeeze(dim), out.rad.squeeze(dim))


@rule(aten.prod.default, ulps=None)
def prod_of_all(x: Interval, *, dtype: Any = None) -> Interval:
    return prod(Interval.of(x.mid.reshape(-1), x.rad.reshape(-1)), 0, dtype=dtype)


def _narrow(x: Interval, dim: int, start: int, length: int) -> Interval:
    return Interval.of(x.mid.narrow(dim, start, length), x.rad.narrow(dim, start, length))


def _in_dtype(x: Interval, dtype: Any) -> Interval:
    if dtype in (None, x.dtype):
        return x
    raise UnsupportedArgumentsError(f"multiplies in {dtype}; convert the argument")


@rule(aten.logcumsumexp.default, ulps=0)
def logcumsumexp(x: Interval, dim: int) -> Interval:
    """As logsumexp, but the maximum grows along the way: each step loses a few u of 1 + the greatest |x|."""
    lower, upper = (torch.logcumsumexp(end, dim) for end in ends(x))
    count = x.shape[dim] if x.shape else 1
    size = (x.mid.detach().abs() + x.rad.detach()).clamp(max=1e300) + math.log(count)
    most = size.amax(dim, keepdim=True) if x.shape else size
    lost = (8 * count + 32) * (1 + most)
    if outward():
        lower, upper = lower - lost * rd.unit(x.dtype), upper + lost * rd.unit(x.dtype)
    out = between(lower, upper)
    return evaluated(out, 4, lost) if rd.mode() == rd.Rounding.EVALUATED else out


@rule(aten.scatter_reduce.two, ulps=0)
def scatter_reduce(
    x: Value, dim: int, index: Tensor, source: Value, reduce: str, *, include_self: bool = True
) -> Interval:
    """Sums and means are linear, extrema grow with everything; products are refused."""
    if isinstance(index, Interval) or reduce == "prod":
        raise UnsupportedArgumentsError("multiplies what it gathers" if reduce == "prod" else "uses an index in a set")

    def apply(a: Tensor, b: Tensor) -> Tensor:
        return torch.scatter_reduce(a, dim, index, b, reduce, include_self=include_self)

    a, b = as_set(x), as_set(source)
    if reduce in ("amax", "amin"):
        return between(*(apply(*pair) for pair in zip(ends(a), ends(b), strict=True)))
    if not outward():
        return Interval.of(apply(a.mid, b.mid), apply(a.rad, b.rad))
    lost = rd.errors(index.numel() + 2, a.dtype)
    return Interval.of(apply(a.mid, b.mid), apply(*(rd.widen(v.mid, v.rad, lost) for v in (a, b))))


@rule(aten.count_nonzero.default, aten.count_nonzero.dim_IntList, ulps=0)
def count_nonzero(x: Interval, dim: Any = None) -> Interval:
    """How many must be other than 0, and how many may be."""
    differs = ne(x, 0.0)
    return total(differs, _listed(dim, x))


@rule(aten.logsumexp.default, ulps=0)
def logsumexp(x: Interval, *args: Any) -> Interval:
    """max + log Σ exp(x − max): an exponential loses u|x − max| of itself, which is at most u/e, and the sum nu."""
    absolute = 4 * _summed(x.mid, *args) + 16
    return evaluated(monotone(lambda t: aten.logsumexp(t, *args), x, ulps=8, absolute=absolute), 8, absolute)


@rule(aten.linalg_vector_norm.default, ulps=0)
def vector_norm(x: Interval, ord: float = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Interval:
    """‖·‖ grows with every |component|."""
    dims = _listed(dim, x)
    if ord == 2:
        root = monotone(steep(lambda t: t.clamp(min=0).sqrt()), total(square(x), dims, keepdim), ulps=2)
        return evaluated(root, 2)
    if ord in (1, float("inf")):
        magnitude = range_of(torch.abs, x, [(0.0, 0.0)], ulps=0)
        count = _summed(x.mid, dims) if ord == 1 else 0  # the greatest one is selected, not computed
        norm = monotone(lambda t: aten.linalg_vector_norm(t, ord, dim, keepdim, **kwargs), magnitude, ulps=count)
        return evaluated(norm, count)
    if ord == 0:
        differs = ne(x, 0.0)
        return total(Interval.of(differs.mid, differs.rad), dims, keepdim)
    magnitude = range_of(torch.abs, x, [(0.0, 0.0)], ulps=0)
    if ord == -float("inf"):
        return monotone(lambda t: aten.linalg_vector_norm(t, ord, dim, keepdim, **kwargs), magnitude, ulps=0)
    if rd.mode() == rd.Rounding.EVALUATED:
        raise UnsupportedArgumentsError(f"is a norm of order {ord}; with semantics='float32' 0, 1, 2, inf and -inf are")
    # Of a row that may hold 0 the norms of negative order have 0 as their bound, and so has this.
    return _root(total(pow_(magnitude, ord), dims, keepdim), ord)


def normalised(x: Interval, dim: Any, limit: Callable[[Tensor], Tensor]) -> Interval:
    """x/limit(‖x‖₂) over rows, where ``limit`` is max(·, c) or · + c with c > 0: as F.normalize, and by hand.

    With s the sum of the other squares it is x/limit(√(x² + s)), which grows with x, and towards 0 with s. So its
    range is exact, and no wider than [−1, 1] where the norm may be 0.
    """
    dims = _listed(dim, x)
    lower, upper = ends(x)
    least, greatest = ends(square(x))
    most, fewest = greatest.sum(dims, keepdim=True), least.sum(dims, keepdim=True)
    others, least_others = most - greatest, fewest - least
    if outward():
        lost = rd.gamma(_summed(x.mid, dims) + 4, x.dtype)
        others, least_others = others + most * lost, least_others - fewest * lost
    least_others = least_others.clamp(min=0)
    root = steep(torch.sqrt)

    def value(end: Tensor, rest: Tensor) -> Tensor:
        return end / limit(root(end.square() + rest))

    at_lower = value(lower, torch.where(lower >= 0, others, least_others))
    return enclose(at_lower, value(upper, torch.where(upper >= 0, least_others, others)), ulps=32)


def _root(x: Interval, ord: float) -> Interval:
    """x^(1/ord), of x ≥ 0; 1/ord is rounded, which costs log x roundings of the result, at most 745."""
    if ord > 0:
        return monotone(steep(lambda t: aten.pow(t.clamp(min=0), 1 / ord)), x, ulps=1024)
    return reciprocal(monotone(lambda t: aten.pow(t.clamp(min=0), -1 / ord), x, ulps=1024))
