"""Batch normalisation with running statistics: one fixed scale and shift per channel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyxai_bounds import ops
from pyxai_bounds import rounding as rd
from pyxai_bounds.interval import Interval
from pyxai_bounds.rules.registry import (
    RULES,
    Rule,
    UnsupportedArgumentsError,
    Value,
    as_set,
    enclose,
    evaluated,
    in_float64,
    mid_of,
    minus,
    multiply,
    narrow,
    outward,
    plus,
    rule,
    singleton,
    total,
)
from pyxai_bounds.rules.standardise import BATCH_STATISTICS, instance_norm, instance_norm_backward

aten = torch.ops.aten


def _inverse(variance: Value, eps: float) -> Value:
    """1/√(variance + eps): one sum, one reciprocal root."""
    if isinstance(variance, Interval):
        raise UnsupportedArgumentsError("has running statistics that the program computes; compute them outside")
    if not outward():
        return torch.rsqrt(variance + eps)
    root = torch.rsqrt(variance.double() + eps)
    return enclose(root, root, ulps=8)


def _scale_shift(x: Interval, scale: Value, shift: Value | None) -> Interval:
    """x·scale + shift per channel; scale and shift are computed in float64 where they must be enclosed."""
    if isinstance(scale, Interval):
        scale = narrow(scale, x.dtype)
    if isinstance(shift, Interval):
        shift = narrow(shift, x.dtype)
    rads = [part.rad if isinstance(part, Interval) else None for part in (scale, shift)]
    args = (mid_of(scale), mid_of(shift), *rads, int(rd.mode()))
    return Interval.of(*ops.interval_scale_shift(x.mid, x.rad, *args))


def _times(a: Value, b: Value | None) -> Value:
    if b is None:
        return a
    return multiply(a, b) if isinstance(a, Interval) or isinstance(b, Interval) else b * a


def _per_channel(x: Interval, dims: int) -> Interval:
    shape = [1, -1] + [1] * (dims - 2)
    return Interval.of(x.mid.reshape(shape), x.rad.reshape(shape))


@rule(aten.native_batch_norm.default, precision="own", ulps=0)
def native_batch_norm(
    x: Value,
    weight: Value | None,
    bias: Value | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Interval, Value, Value]:
    if training:
        return instance_norm(x, weight, bias, eps)
    if mean is None or variance is None:
        raise UnsupportedArgumentsError(BATCH_STATISTICS)
    if not isinstance(x, Interval):
        x = singleton(x)
    inverse = _inverse(variance, eps)
    exact: Callable[[Any], Any] = in_float64 if outward() else lambda t: t
    offset = _times(inverse, exact(mean))  # mean / √(variance + eps)
    if isinstance(offset, Interval):
        offset = evaluated(offset, 12)  # float32 loses that much of it, also where the bias cancels it afterwards
    if isinstance(weight, Interval):
        # Normalise first: the weight then meets (x − mean) once, and not x and the mean apart.
        normal = _scale_shift(x, inverse, minus(0.0, offset) if isinstance(offset, Interval) else -offset)
        out = multiply(normal, _per_channel(weight, len(x.shape)))
        if bias is not None:
            out = plus(out, _per_channel(as_set(bias), len(x.shape)))
    else:
        scale, offset = _times(inverse, exact(weight)), _times(offset, exact(weight))
        if isinstance(offset, Interval) or isinstance(bias, Interval):
            shift: Value = minus(0.0 if bias is None else exact(bias), offset)
        else:
            shift = -offset if bias is None else bias - offset
        out = _scale_shift(x, scale, shift)
    unused = x.mid.new_empty(0)  # the batch statistics, which inference does not compute
    return out, unused, unused


@rule(aten._native_batch_norm_legit_no_training.default, precision="own", ulps=0)
def batch_norm_no_training(
    x: Value, weight: Value | None, bias: Value | None, mean: Tensor, variance: Tensor, momentum: float, eps: float
) -> tuple[Interval, Value, Value]:
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
    if train:
        return instance_norm_backward(grad, x, weight, save_mean, save_inverse, output_mask)
    if variance is None:
        raise UnsupportedArgumentsError(BATCH_STATISTICS)
    if not isinstance(grad, Interval):
        grad = singleton(grad)
    weight_grad = _weight_gradient(grad, x, mean, variance, eps) if output_mask[1] else None
    bias_grad = total(grad, [0, *range(2, len(grad.shape))]) if output_mask[2] else None
    inverse = _inverse(variance, eps)
    if isinstance(weight, Interval):
        out = multiply(_scale_shift(grad, inverse, None), _per_channel(weight, len(grad.shape)))
    else:
        out = _scale_shift(grad, _times(inverse, in_float64(weight) if outward() else weight), None)
    return out, weight_grad, bias_grad


def _weight_gradient(grad: Interval, x: Value, mean: Tensor | None, variance: Tensor, eps: float) -> Interval:
    """The sum of grad·(x − mean)/√(variance + eps) over all that a channel's weight scales."""
    dims = len(x.shape)
    scale = _per_channel(as_set(_inverse(variance, eps)), dims)
    if outward():
        grad, x = in_float64(grad), in_float64(x)
    offset = torch.zeros_like(variance) if mean is None else mean
    normal = multiply(minus(as_set(x), _per_channel(as_set(offset.to(x.dtype)), dims)), scale)
    return total(multiply(grad, normal), [0, *range(2, dims)])


class _BatchNormBackward(Rule):
    """At inference the input's value matters to the weight's gradient alone."""

    def takes_sets(self, args: tuple, kwargs: dict) -> bool:
        grad, x, weight, train, mask = args[0], args[1], args[2], args[7], args[9]
        used = [grad, weight] + ([x] if train or mask[1] else [])
        return any(isinstance(arg, Interval) for arg in used)


RULES[aten.native_batch_norm_backward.default] = _BatchNormBackward(
    native_batch_norm_backward, frozenset({1}), "own", 0.0
)
