"""Softmax, its logarithm, the losses on top of it, and their backward sides."""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyxai_bounds import rounding as rd
from pyxai_bounds.interval import Interval
from pyxai_bounds.rules import facts
from pyxai_bounds.rules.registry import (
    UnsupportedArgumentsError,
    Value,
    between,
    enclose,
    ends,
    evaluated,
    linear_map,
    mid_of,
    minus,
    multiply,
    outward,
    rad_of,
    range_of,
    rule,
    settle,
    singleton,
    total,
    within,
)

aten = torch.ops.aten


def _log_odds(lower: Tensor, upper: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Bounds of x_j − log Σ_{k≠j} exp x_k, the logit of p_j: least where x_j is least and all others greatest."""
    least, greatest = lower - _log_sum_of_others(upper, dim), upper - _log_sum_of_others(lower, dim)
    if outward():
        # Each of the sum's steps loses a few u of 1 + its value, which lies within log n of the greatest |x|.
        count = lower.shape[dim]
        lost = (_size(lower, upper, dim) + (2 + math.log(count))) * ((8 * count + 40) * rd.unit(lower.dtype))
        least, greatest = least - lost, greatest + lost
    return least, greatest


def _size(lower: Tensor, upper: Tensor, dim: int) -> Tensor:
    """The greatest |x| along the dimension, but for ends at −∞, which are left out of the sum."""
    sizes = (torch.where(end == float("-inf"), 0.0, end.detach().abs()) for end in (lower, upper))
    return torch.maximum(*sizes).amax(dim, keepdim=True)


def _terms(x: Interval, dim: int) -> tuple[Tensor, Tensor]:
    """The ends of the terms of softmax; for proofs less the greatest lower one, and without what hardly counts.

    A lowered end only lowers what it bounds from below, a raised one raises it. Masks write −1e9, or the least number
    there is, whose rounding is no trifle.
    """
    lower, upper = ends(x)
    if not outward():
        return lower, upper
    top = lower.detach().amax(dim, keepdim=True)
    top = torch.where(top == float("-inf"), 0.0, top)
    lower, upper = lower - top, upper - top
    return torch.where(lower < -_NEGLIGIBLE, float("-inf"), lower), upper.clamp(min=-_NEGLIGIBLE)


_NEGLIGIBLE = 800.0  # exp(−800) is 0 in float64


def _log_sum_of_others(x: Tensor, dim: int) -> Tensor:
    """log Σ_{k≠j} exp x_k for every j, without the cancellation of subtracting j from the whole."""
    x = torch.where(x == float("-inf"), float("-inf"), x)  # where a mask is, sums have the derivative NaN
    return _log_add(_log_sum_before(x, dim), _log_sum_before(x.flip(dim), dim).flip(dim))


def _log_add(a: Tensor, b: Tensor) -> Tensor:
    """log(exp a + exp b). Of ``torch.logaddexp`` the second derivative is NaN where one of them is −∞."""
    less, greater = torch.minimum(a, b), torch.maximum(a, b)
    nothing = less == float("-inf")
    gap = torch.where(nothing, 0.0, less - greater)
    return torch.where(nothing, greater, greater + torch.log1p(torch.exp(gap)))


def _log_sum_before(x: Tensor, dim: int) -> Tensor:
    first = torch.full_like(x.narrow(dim, 0, 1), float("-inf"))
    return torch.cat((first, torch.logcumsumexp(x.narrow(dim, 0, x.shape[dim] - 1), dim)), dim)


@rule(aten._softmax.default, ulps=0)
def softmax(x: Interval, dim: int, half_to_float: bool) -> Interval:
    """Evaluated as exp(x − max)/Σ: the difference loses u of itself, which exp makes a relative error, the sum nu."""
    terms = _terms(x, dim)
    lower, upper = _log_odds(*terms, dim)
    out = enclose(torch.sigmoid(lower), torch.sigmoid(upper), ulps=8)
    one = torch.ones_like(out.mid.narrow(dim, 0, 1).detach())
    return _rows_sum_to(one, evaluated(out, 4 * _size(*terms, dim) + (x.shape[dim] + 16)), dim, convex=True)


def _rows_sum_to(sums: Tensor, x: Interval, dim: int, convex: bool) -> Interval:
    """Attach what the real function's values sum to, unless a value may be anything."""
    if x.shape[dim] < 2:
        return x
    unknown = x.mid.isnan().any(dim, keepdim=True)
    return facts.attach(x, total=facts.wide(torch.where(unknown, math.nan, sums)), convex=convex)


@rule(aten._safe_softmax.default, ulps=0)
def safe_softmax(x: Interval, dim: int, dtype: torch.dtype | None = None) -> Interval:
    """Softmax, but 0 where a mask leaves nothing: all of them points at −∞."""
    masked = ((x.mid == float("-inf")) & (x.rad == 0)).all(dim, keepdim=True)
    some = softmax(Interval.of(torch.where(masked, 0.0, x.mid), x.rad), dim, False)
    out = Interval.of(torch.where(masked, 0.0, some.mid), torch.where(masked, 0.0, some.rad))
    return _rows_sum_to((~masked).to(out.dtype), out, dim, convex=True)


@rule(aten._log_softmax.default, ulps=0)
def log_softmax(x: Interval, dim: int, half_to_float: bool) -> Interval:
    """Evaluated as x − max − log Σ exp(x − max): each term loses a few u of |x|, the sum nu."""
    lower, upper = _log_odds(*ends(x), dim)
    out = enclose(F.logsigmoid(lower), F.logsigmoid(upper), ulps=8)
    return evaluated(out, 4, 4 * _size(*ends(x), dim) + (4 * x.shape[dim] + 32))


@rule(aten._softmax_backward_data.default, ulps=0)
def softmax_backward(grad: Value, output: Value, dim: int, input_dtype: torch.dtype) -> Interval:
    """p_j·(g_j − Σ_k g_k p_k), written as g_j·p_j(1 − p_j) − p_j·Σ_{k≠j} g_k p_k to use p_j's own range once.

    Where Σ p = 1 it does not change if a number is taken from all g: from their mean weighted by p, which leaves small
    ones beside probabilities that move. And Σ_{k≠j} g_k p_k/(1 − p_j) lies among the g_k of the others, as a mean does.
    """
    if not isinstance(output, Interval):
        weighted = multiply(grad, output)
        return multiply(minus(grad, total(weighted, [dim], keepdim=True)), output)
    known = facts.of(output)
    convex = (
        known.convex
        and known.total is not None
        and facts.joined(known.total, output.shape) == [dim % len(output.shape)]
    )
    if convex:
        weights = output.mid / output.mid.sum(dim, keepdim=True).clamp(min=0.5)
        centre = (mid_of(grad) * weights).sum(dim, keepdim=True)
        grad = (
            minus(singleton(grad) if outward() and not isinstance(grad, Interval) else grad, centre)
            if isinstance(grad, Interval) or outward()
            else grad - centre
        )
    spread = range_of(lambda p: p * (1 - p), output, [(0.5, 0.25)], ulps=4, absolute=4)
    own = multiply(grad, spread)
    terms = multiply(grad, output)
    summed = total(terms, [dim], keepdim=True)
    others = minus(summed, Interval.of(terms.mid, -terms.rad))  # the sum without j has the radius without j's
    others = Interval.of(others.mid, others.rad.clamp(min=0))
    if outward():
        lost = (summed.mid.abs() + summed.rad + terms.mid.abs() + terms.rad) * (8 * rd.unit(terms.dtype))
        others = Interval.of(others.mid, others.rad + lost)
    out = minus(own, multiply(output, others))
    if convex:
        least, greatest = _of_others(grad, dim)
        out = within(out, *ends(multiply(spread, minus(grad, between(least, greatest)))))
        out = _rows_sum_to(torch.zeros_like(out.mid.narrow(dim, 0, 1).detach()), out, dim, convex=False)
    if rd.mode() == rd.Rounding.EVALUATED:
        # What p·(g − Σ g p) loses in float32, whatever the form in which its range was found here.
        grad_size = mid_of(grad).abs() + rad_of(grad)
        output_size = output.mid.abs() + output.rad
        reach = output_size * (grad_size + (grad_size * output_size).sum(dim, keepdim=True))
        out = settle(out.mid, out.rad + reach * ((output.shape[dim] + 16) * rd.unit(torch.float32)))
    return out


def _of_others(x: Value, dim: int) -> tuple[Tensor, Tensor]:
    """The least and the greatest number of the other entries, for each entry."""
    lower, upper = ends(x)
    two = lower.topk(2, dim, largest=False).values, upper.topk(2, dim).values
    least, greatest = ([pair.narrow(dim, i, 1) for i in (0, 1)] for pair in two)
    return torch.where(lower == least[0], least[1], least[0]), torch.where(
        upper == greatest[0], greatest[1], greatest[0]
    )


@rule(aten._log_softmax_backward_data.default, ulps=0)
def log_softmax_backward(grad: Value, output: Value, dim: int, input_dtype: torch.dtype) -> Interval:
    """g_j − p_j·Σ_k g_k."""
    if isinstance(output, Interval) or outward():
        lower, upper = ends(output)
        probability: Value = evaluated(enclose(torch.exp(lower), torch.exp(upper), ulps=4), 4)
    else:
        probability = torch.exp(output)
    summed = total(grad, [dim], keepdim=True) if isinstance(grad, Interval) else grad.sum(dim, keepdim=True)
    if outward() and not isinstance(summed, Interval):
        summed = total(singleton(mid_of(grad)), [dim], keepdim=True)
    return minus(grad, multiply(probability, summed))


class Reduction(IntEnum):
    """ATen's numbers for what a loss does with its samples."""

    NONE = 0
    MEAN = 1
    SUM = 2


@rule(aten.nll_loss_forward.default, ulps=0)
def nll_loss(
    x: Interval, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
) -> tuple[Interval, Tensor]:
    """Linear with coefficients ≤ 0, so the radius is what minus the operator makes of it.

    Class weights may have any sign: their absolute values weigh the radii, the mean's divisor stays what it is.
    """
    if isinstance(weight, Interval):
        raise UnsupportedArgumentsError("has a set for its class weights")
    if weight is not None and outward() and reduction == Reduction.MEAN:
        raise UnsupportedArgumentsError("divides by the sum of its class weights; use reduction='sum' or 'none'")
    mid, count = aten.nll_loss_forward(x.mid, target, weight, reduction, ignore_index)
    lost = rd.errors(target.numel() + 2, x.dtype)
    rad = rd.widen(x.mid, x.rad, lost) if outward() else x.rad
    if weight is None:
        return Interval.of(mid, -aten.nll_loss_forward(rad, target, None, reduction, ignore_index)[0]), count
    summed = Reduction.NONE if reduction == Reduction.NONE else Reduction.SUM
    rad = -aten.nll_loss_forward(rad, target, rd.magnitude(weight, lost), summed, ignore_index)[0]
    return Interval.of(mid, rad / count.abs() if reduction == Reduction.MEAN else rad), count


@rule(aten.nll_loss_backward.default, shape_only=("self",), ulps=2)
def nll_loss_backward(grad: Interval, x: Value, *args: Any) -> Interval:
    """One product with the class weight, one quotient by the number of samples."""
    like = mid_of(x).to(grad.dtype)
    out = linear_map(lambda t: aten.nll_loss_backward(t, like, *args), grad, 4)
    return Interval.of(out.mid, out.rad.abs())
