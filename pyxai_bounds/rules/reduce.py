"""Reductions over dimensions."""

from __future__ import annotations

from typing import Any

import torch

from pyxai_bounds.interval import Interval
from pyxai_bounds.rules.elementwise import square
from pyxai_bounds.rules.registry import NO_VALUE, UnsupportedArgumentsError, monotone, positive_linear, range_of, rule

aten = torch.ops.aten

positive_linear(
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.mean.default,
    aten.mean.dim,
    aten.cumsum.default,
)


@rule(aten.amax.default)
def amax(x: Interval, *args: Any) -> Interval:
    return monotone(lambda t: aten.amax(t, *args), x)


@rule(aten.amin.default)
def amin(x: Interval, *args: Any) -> Interval:
    return monotone(lambda t: aten.amin(t, *args), x)


@rule(aten.max.default)
def max_of_all(x: Interval) -> Interval:
    return monotone(torch.max, x)


@rule(aten.min.default)
def min_of_all(x: Interval) -> Interval:
    return monotone(torch.min, x)


@rule(aten.max.dim)
def max_dim(x: Interval, *args: Any) -> tuple[Interval, object]:
    return monotone(lambda t: torch.max(t, *args).values, x), NO_VALUE


@rule(aten.min.dim)
def min_dim(x: Interval, *args: Any) -> tuple[Interval, object]:
    return monotone(lambda t: torch.min(t, *args).values, x), NO_VALUE


@rule(aten.logsumexp.default)
def logsumexp(x: Interval, *args: Any) -> Interval:
    return monotone(lambda t: aten.logsumexp(t, *args), x)


@rule(aten.linalg_vector_norm.default)
def vector_norm(x: Interval, ord: float = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Interval:
    """‖·‖ grows with every |component|."""
    if ord == 2:
        total = square(x)
        dims = list(range(len(x.shape))) if dim is None else dim
        total = Interval.of(total.mid.sum(dims, keepdim), total.rad.sum(dims, keepdim))
        return monotone(lambda t: t.clamp(min=0).sqrt(), total)
    if ord in (1, float("inf")):
        magnitude = range_of(torch.abs, x, [(0.0, 0.0)])
        return monotone(lambda t: aten.linalg_vector_norm(t, ord, dim, keepdim, **kwargs), magnitude)
    raise UnsupportedArgumentsError(f"is a norm of order {ord}; 1, 2 and inf are supported")
