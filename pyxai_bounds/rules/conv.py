"""Convolutions of any dimension, and their backward passes, which are bilinear in the same way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyxai_bounds import ops
from pyxai_bounds.interval import Interval
from pyxai_bounds.rules.registry import RULES, Rule, Value, bilinear, rule

aten = torch.ops.aten


@rule(aten.convolution.default)
def convolution(
    x: Value,
    weight: Value,
    bias: Value | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Interval:
    if _is_fused(x, weight, transposed) and not isinstance(bias, Interval):
        x = _in_fast_order(x)  # type: ignore[arg-type]
        args = (*(_pair(a) for a in (stride, padding, dilation)), groups)
        mid, rad, _ = ops.interval_conv2d(x.mid, x.rad, weight, bias, *args, False)
        return Interval.of(mid, rad)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return aten.convolution(a, b, None, stride, padding, dilation, transposed, output_padding, groups)

    if isinstance(x, Interval) or isinstance(weight, Interval):
        out = bilinear(product, x, weight)
    else:
        out = Interval.of(product(x, weight), torch.zeros_like(product(x, weight)))
    if bias is None:
        return out
    per_channel = [1, -1] + [1] * (out.mid.dim() - 2)
    if isinstance(bias, Interval):
        return Interval.of(out.mid + bias.mid.reshape(per_channel), out.rad + bias.rad.reshape(per_channel))
    return Interval.of(out.mid + bias.reshape(per_channel), out.rad)


def convolution_backward(
    grad: Value,
    x: Value,
    weight: Value,
    bias_sizes: list[int] | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    output_mask: list[bool],
) -> list[Any]:
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    results: list[Any] = [None, None, None]
    if output_mask[0]:
        if _is_fused(grad, weight, transposed):
            args = (*(_pair(a) for a in (stride, padding, dilation)), groups)
            results[0] = Interval.of(
                *ops.interval_conv2d_backward(grad.mid, grad.rad, weight, None, list(x.shape), *args)  # type: ignore[union-attr]
            )
        else:
            like_x = x.mid if isinstance(x, Interval) else x

            def input_grad(g: Tensor, w: Tensor) -> Tensor:
                return aten.convolution_backward(g, like_x, w, None, *geometry, [True, False, False])[0]

            results[0] = _product(input_grad, grad, weight)
    if output_mask[1]:
        like_weight = weight.mid if isinstance(weight, Interval) else weight

        def weight_grad(g: Tensor, i: Tensor) -> Tensor:
            return aten.convolution_backward(g, i, like_weight, None, *geometry, [False, True, False])[1]

        results[1] = _product(weight_grad, grad, x)
    if output_mask[2]:
        over = [0, *range(2, len(grad.shape))]
        results[2] = (
            Interval.of(grad.mid.sum(over), grad.rad.sum(over)) if isinstance(grad, Interval) else grad.sum(over)
        )
    return results


class _ConvolutionBackward(Rule):
    """The input's value matters to the weight's gradient alone, the weight's value to the input's alone."""

    def takes_sets(self, args: tuple, kwargs: dict) -> bool:
        grad, x, weight, mask = args[0], args[1], args[2], args[10]
        used = [grad] + ([weight] if mask[0] else []) + ([x] if mask[1] else [])
        return any(isinstance(arg, Interval) for arg in used)


RULES[aten.convolution_backward.default] = _ConvolutionBackward(convolution_backward, frozenset({1, 2}))


def _product(product: Any, a: Value, b: Value) -> Value:
    if isinstance(a, Interval) or isinstance(b, Interval):
        return bilinear(product, a, b)
    return product(a, b)


def _is_fused(x: Value, weight: Value, transposed: bool) -> bool:
    return isinstance(x, Interval) and isinstance(weight, Tensor) and weight.dim() == 4 and not transposed


def _in_fast_order(x: Interval) -> Interval:
    """Channels-last where oneDNN runs it about twice as fast, and on GPUs, whose kernels here know no other order.

    Every stage after keeps the order it is given.
    """
    if (x.device.type == "cuda" or x.dtype is torch.float32) and x.shape[1] > 1:
        return Interval.of(*(part.contiguous(memory_format=torch.channels_last) for part in (x.mid, x.rad)))
    return x


def _pair(values: list[int]) -> list[int]:
    return [int(v) for v in values] * (2 // len(values))
