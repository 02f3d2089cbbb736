"""Softmax, its logarithm, the losses on top of it, and their backward sides."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyxai_bounds.interval import Interval
from pyxai_bounds.rules.registry import (
    UnsupportedArgumentsError,
    Value,
    between,
    ends,
    mid_of,
    multiply,
    rad_of,
    range_of,
    rule,
)

aten = torch.ops.aten


def _log_odds(x: Interval, dim: int) -> tuple[Tensor, Tensor]:
    """Bounds of x_j − log Σ_{k≠j} exp x_k, the logit of p_j: least where x_j is least and all others greatest."""
    lower, upper = ends(x)
    return lower - _log_sum_of_others(upper, dim), upper - _log_sum_of_others(lower, dim)


def _log_sum_of_others(x: Tensor, dim: int) -> Tensor:
    """log Σ_{k≠j} exp x_k for every j, without the cancellation of subtracting j from the whole."""
    return torch.logaddexp(_log_sum_before(x, dim), _log_sum_before(x.flip(dim), dim).flip(dim))


def _log_sum_before(x: Tensor, dim: int) -> Tensor:
    first = torch.full_like(x.narrow(dim, 0, 1), float("-inf"))
    return torch.cat((first, torch.logcumsumexp(x.narrow(dim, 0, x.shape[dim] - 1), dim)), dim)


@rule(aten._softmax.default)
def softmax(x: Interval, dim: int, half_to_float: bool) -> Interval:
    lower, upper = _log_odds(x, dim)
    return between(torch.sigmoid(lower), torch.sigmoid(upper))


@rule(aten._log_softmax.default)
def log_softmax(x: Interval, dim: int, half_to_float: bool) -> Interval:
    lower, upper = _log_odds(x, dim)
    return between(F.logsigmoid(lower), F.logsigmoid(upper))


@rule(aten._softmax_backward_data.default)
def softmax_backward(grad: Value, output: Value, dim: int, input_dtype: torch.dtype) -> Interval:
    """p_j·(g_j − Σ_k g_k p_k), written as g_j·p_j(1 − p_j) − p_j·Σ_{k≠j} g_k p_k to use p_j's own range once."""
    if not isinstance(output, Interval):
        weighted = multiply(grad, output)
        total = Interval.of(weighted.mid.sum(dim, keepdim=True), weighted.rad.sum(dim, keepdim=True))
        return multiply(Interval.of(mid_of(grad) - total.mid, rad_of(grad) + total.rad), output)
    own = multiply(grad, range_of(lambda p: p * (1 - p), output, [(0.5, 0.25)]))
    terms = multiply(grad, output)
    others = Interval.of(
        terms.mid.sum(dim, keepdim=True) - terms.mid,
        (terms.rad.sum(dim, keepdim=True) - terms.rad).clamp(min=0),
    )
    cross = multiply(output, others)
    return Interval.of(own.mid - cross.mid, own.rad + cross.rad)


@rule(aten._log_softmax_backward_data.default)
def log_softmax_backward(grad: Value, output: Value, dim: int, input_dtype: torch.dtype) -> Interval:
    """g_j − p_j·Σ_k g_k."""
    if isinstance(output, Interval):
        lower, upper = ends(output)
        probability: Value = between(torch.exp(lower), torch.exp(upper))
    else:
        probability = torch.exp(output)
    total = Interval.of(mid_of(grad).sum(dim, keepdim=True), rad_of(grad).sum(dim, keepdim=True))
    product = multiply(probability, total if isinstance(grad, Interval) else total.mid)
    return Interval.of(mid_of(grad) - product.mid, rad_of(grad) + product.rad)


class Reduction(IntEnum):
    """ATen's numbers for what a loss does with its samples."""

    NONE = 0
    MEAN = 1
    SUM = 2


@rule(aten.nll_loss_forward.default)
def nll_loss(
    x: Interval, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
) -> tuple[Interval, Tensor]:
    """Linear with coefficients ≤ 0, so the radius is what minus the operator makes of it.

    Class weights may have any sign: their absolute values weigh the radii, the mean's divisor stays what it is.
    """
    if isinstance(weight, Interval):
        raise UnsupportedArgumentsError("has a set for its class weights")
    mid, total = aten.nll_loss_forward(x.mid, target, weight, reduction, ignore_index)
    if weight is None:
        rad = -aten.nll_loss_forward(x.rad, target, None, reduction, ignore_index)[0]
        return Interval.of(mid, rad), total
    summed = Reduction.NONE if reduction == Reduction.NONE else Reduction.SUM
    rad = -aten.nll_loss_forward(x.rad, target, weight.abs(), summed, ignore_index)[0]
    return Interval.of(mid, rad / total.abs() if reduction == Reduction.MEAN else rad), total


@rule(aten.nll_loss_backward.default, shape_only=("self",))
def nll_loss_backward(grad: Interval, x: Value, *args: Any) -> Interval:
    like = mid_of(x)
    return Interval.of(
        aten.nll_loss_backward(grad.mid, like, *args), aten.nll_loss_backward(grad.rad, like, *args).abs()
    )
