"""Batch normalisation with running statistics: one fixed scale and shift per channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyxai_bounds import ops
from pyxai_bounds.interval import Interval
from pyxai_bounds.rules.registry import RULES, Rule, UnsupportedArgumentsError, Value, rule

aten = torch.ops.aten

_MODE = "normalises with the statistics of the batch; call model.eval(), and keep track_running_stats=True"


def _scale(weight: Tensor | None, variance: Tensor, eps: float) -> Tensor:
    inverse = torch.rsqrt(variance + eps)
    return inverse if weight is None else weight * inverse


@rule(aten.native_batch_norm.default)
def native_batch_norm(
    x: Value,
    weight: Value | None,
    bias: Value | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Interval, Tensor, Tensor]:
    if training or mean is None or variance is None:
        raise UnsupportedArgumentsError(_MODE)
    if not isinstance(x, Interval) or isinstance(weight, Interval) or isinstance(bias, Interval):
        raise UnsupportedArgumentsError("has a set for its weight or bias")
    scale = _scale(weight, variance, eps)
    shift = -mean * scale if bias is None else bias - mean * scale
    unused = x.mid.new_empty(0)  # the batch statistics, which inference does not compute
    return Interval.of(*ops.interval_scale_shift(x.mid, x.rad, scale, shift)), unused, unused


@rule(aten._native_batch_norm_legit_no_training.default)
def batch_norm_no_training(
    x: Value, weight: Value | None, bias: Value | None, mean: Tensor, variance: Tensor, momentum: float, eps: float
) -> tuple[Interval, Tensor, Tensor]:
    return native_batch_norm(x, weight, bias, mean, variance, False, momentum, eps)


def native_batch_norm_backward(
    grad: Value,
    x: Value,
    weight: Value | None,
    mean: Tensor | None,
    variance: Tensor | None,
    save_mean: Any,
    save_inverse: Any,
    train: bool,
    eps: float,
    output_mask: list[bool],
) -> tuple[Any, Any, Any]:
    if train or variance is None:
        raise UnsupportedArgumentsError(_MODE)
    if output_mask[1] or isinstance(weight, Interval) or not isinstance(grad, Interval):
        raise UnsupportedArgumentsError("is asked for the gradient of its weight, or has a set for its weight")
    over = [0, *range(2, len(grad.shape))]
    bias_grad = Interval.of(grad.mid.sum(over), grad.rad.sum(over)) if output_mask[2] else None
    scale = _scale(weight, variance, eps)
    return Interval.of(*ops.interval_scale_shift(grad.mid, grad.rad, scale, None)), None, bias_grad


class _BatchNormBackward(Rule):
    """At inference the input's value matters to the weight's gradient alone."""

    def takes_sets(self, args: tuple, kwargs: dict) -> bool:
        grad, x, weight, train, mask = args[0], args[1], args[2], args[7], args[9]
        used = [grad, weight] + ([x] if train or mask[1] else [])
        return any(isinstance(arg, Interval) for arg in used)


RULES[aten.native_batch_norm_backward.default] = _BatchNormBackward(native_batch_norm_backward, frozenset({1}))
