"""Reductions over dimensions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from pyxai_bounds.interval import Interval
from pyxai_bounds.rules.elementwise import square
from pyxai_bounds.rules.registry import (
    NO_VALUE,
    UnsupportedArgumentsError,
    evaluated,
    monotone,
    positive_linear,
    range_of,
    rule,
    total,
)

aten = torch.ops.aten


def _summed(x: Tensor, dim: Any = None, *args: Any, **kwargs: Any) -> int:
    """How many elements a reduction over these dimensions takes together; all of them if none are named."""
    if dim is None or dim == []:
        return x.numel()
    return math.prod(x.shape[d] for d in ([dim] if isinstance(dim, int) else dim))


positive_linear(
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.mean.default,
    aten.mean.dim,
    aten.cumsum.default,
    terms=_summed,
)


@rule(aten.amax.default, precision="exact")
def amax(x: Interval, *args: Any) -> Interval:
    return monotone(lambda t: aten.amax(t, *args), x, ulps=0)


@rule(aten.amin.default, precision="exact")
def amin(x: Interval, *args: Any) -> Interval:
    return monotone(lambda t: aten.amin(t, *args), x, ulps=0)


@rule(aten.max.default, precision="exact")
def max_of_all(x: Interval) -> Interval:
    return monotone(torch.max, x, ulps=0)


@rule(aten.min.default, precision="exact")
def min_of_all(x: Interval) -> Interval:
    return monotone(torch.min, x, ulps=0)


@rule(aten.max.dim, precision="exact")
def max_dim(x: Interval, *args: Any) -> tuple[Interval, object]:
    return monotone(lambda t: torch.max(t, *args).values, x, ulps=0), NO_VALUE


@rule(aten.min.dim, precision="exact")
def min_dim(x: Interval, *args: Any) -> tuple[Interval, object]:
    return monotone(lambda t: torch.min(t, *args).values, x, ulps=0), NO_VALUE


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

        return monotone(values, x, ulps=0), NO_VALUE


for _op in (
    aten.topk.default, aten.sort.default, aten.sort.stable, aten.kthvalue.default, aten.median.dim
):  # fmt: skip
    _register_ranked(_op)


@rule(aten.logsumexp.default, ulps=0)
def logsumexp(x: Interval, *args: Any) -> Interval:
    """max + log Σ exp(x − max): an exponential loses u|x − max| of itself, which is at most u/e, and the sum nu."""
    absolute = 4 * _summed(x.mid, *args) + 16
    return evaluated(monotone(lambda t: aten.logsumexp(t, *args), x, ulps=8, absolute=absolute), 8, absolute)


@rule(aten.linalg_vector_norm.default, ulps=0)
def vector_norm(x: Interval, ord: float = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Interval:
    """‖·‖ grows with every |component|."""
    dims = list(range(len(x.shape))) if dim is None else [dim] if isinstance(dim, int) else dim
    if ord == 2:
        root = monotone(lambda t: t.clamp(min=0).sqrt(), total(square(x), dims, keepdim), ulps=2)
        return evaluated(root, 2)
    if ord in (1, float("inf")):
        magnitude = range_of(torch.abs, x, [(0.0, 0.0)], ulps=0)
        count = _summed(x.mid, dims) if ord == 1 else 0  # the greatest one is selected, not computed
        norm = monotone(lambda t: aten.linalg_vector_norm(t, ord, dim, keepdim, **kwargs), magnitude, ulps=count)
        return evaluated(norm, count)
    raise UnsupportedArgumentsError(f"is a norm of order {ord}; 1, 2 and inf are supported")
