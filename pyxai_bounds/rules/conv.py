"""Convolutions of any dimension, and their backward passes, which are bilinear in the same way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyxai_bounds import ops
from pyxai_bounds import rounding as rd
from pyxai_bounds.interval import Interval
from pyxai_bounds.ops.product import conv2d_product, conv2d_product_input, conv2d_product_weight
from pyxai_bounds.rules.registry import (
    RULES,
    Rule,
    Value,
    bilinear,
    exact_bilinear,
    exact_product,
    in_float64,
    outward,
    plus,
    rule,
    singleton,
    total,
)

aten = torch.ops.aten


@rule(aten.convolution.default, precision="own", ulps=0)
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
        mid, rad, _ = ops.interval_conv2d(x.mid, x.rad, weight, bias, *args, False, int(rd.mode()))
        return Interval.of(mid, rad)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return aten.convolution(a, b, None, stride, padding, dilation, transposed, output_padding, groups)

    def exact(a: Tensor, ra: Tensor, b: Tensor, rb: Tensor) -> tuple[Tensor, Tensor]:
        return conv2d_product(a, ra, b, rb, *square, groups, True)

    square = (_pair(stride), _pair(padding), _pair(dilation))
    out = _product(
        product, x, weight, _terms(weight, transposed, groups), exact if _is_square(weight, transposed) else None
    )
    if not isinstance(out, Interval):
        out = singleton(out)
    if bias is None:
        return out
    per_channel = [1, -1] + [1] * (out.mid.dim() - 2)
    if isinstance(bias, Interval):
        return plus(out, Interval.of(bias.mid.reshape(per_channel), bias.rad.reshape(per_channel)))
    return plus(out, bias.reshape(per_channel))


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
    square = (_pair(stride), _pair(padding), _pair(dilation))
    results: list[Any] = [None, None, None]
    if output_mask[0]:
        if _is_fused(grad, weight, transposed):
            assert isinstance(grad, Interval)
            args = (list(x.shape), *(_pair(a) for a in (stride, padding, dilation)), groups, int(rd.mode()))
            results[0] = Interval.of(*ops.interval_conv2d_backward(grad.mid, grad.rad, weight, None, *args))
        else:
            like_x = x.mid if isinstance(x, Interval) else x

            def input_grad(g: Tensor, w: Tensor) -> Tensor:
                return aten.convolution_backward(g, like_x.to(g.dtype), w, None, *geometry, [True, False, False])[0]

            def exact_input(a: Tensor, ra: Tensor, b: Tensor, rb: Tensor) -> tuple[Tensor, Tensor]:
                return conv2d_product_input(a, ra, b, rb, list(x.shape), *square, groups, True)

            terms = _terms(weight, not transposed, groups)
            exact = exact_input if _is_square(weight, transposed) else None
            results[0] = _product(input_grad, grad, weight, terms + weight.shape[2:].numel(), exact)
    if output_mask[1]:
        like_weight = weight.mid if isinstance(weight, Interval) else weight

        def weight_grad(g: Tensor, i: Tensor) -> Tensor:
            like = like_weight.to(g.dtype)
            return aten.convolution_backward(g, i, like, None, *geometry, [False, True, False])[1]

        def exact_weight(a: Tensor, ra: Tensor, b: Tensor, rb: Tensor) -> tuple[Tensor, Tensor]:
            return conv2d_product_weight(a, ra, b, rb, list(weight.shape), *square, groups, True)

        exact = exact_weight if _is_square(weight, transposed) else None
        results[1] = _product(weight_grad, grad, x, grad.shape.numel() // grad.shape[1] + len(grad), exact)
    if output_mask[2]:
        over = [0, *range(2, len(grad.shape))]
        if outward():
            results[2] = total(in_float64(grad) if isinstance(grad, Interval) else singleton(grad.double()), over)
        else:
            results[2] = total(grad, over) if isinstance(grad, Interval) else grad.sum(over)
    return results


class _ConvolutionBackward(Rule):
    """The input's value matters to the weight's gradient alone, the weight's value to the input's alone."""

    def takes_sets(self, args: tuple, kwargs: dict) -> bool:
        grad, x, weight, mask = args[0], args[1], args[2], args[10]
        used = [grad] + ([weight] if mask[0] else []) + ([x] if mask[1] else [])
        return any(isinstance(arg, Interval) for arg in used)


RULES[aten.convolution_backward.default] = _ConvolutionBackward(convolution_backward, frozenset({1, 2}), "own", 0.0)


def _product(product: Any, a: Value, b: Value, terms: int, exact: Any) -> Value:
    """Rounded outward in float64, where a sum of any length loses next to nothing; ``exact`` is for two sets."""
    if outward():
        a, b = in_float64(a), in_float64(b)
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            a = singleton(a)  # a product of points rounds, too
    if exact is not None and exact_product() and isinstance(a, Interval) and isinstance(b, Interval):
        return exact_bilinear(exact, product, a, b, terms)
    if isinstance(a, Interval) or isinstance(b, Interval):
        return bilinear(product, a, b, terms)
    return product(a, b)


def _terms(weight: Value, transposed: bool, groups: int) -> int:
    """How many products an output element sums; the gradient of a convolution is a transposed one and vice versa."""
    taps = weight.shape[2:].numel()
    return (weight.shape[0] // groups if transposed else weight.shape[1]) * taps


def _is_fused(x: Value, weight: Value, transposed: bool) -> bool:
    return isinstance(x, Interval) and isinstance(weight, Tensor) and weight.dim() == 4 and not transposed


def _is_square(weight: Value, transposed: bool) -> bool:
    """Is it a two-dimensional convolution, of which there is an exact product of two sets?"""
    return len(weight.shape) == 4 and not transposed


def _in_fast_order(x: Interval) -> Interval:
    """Channels-last where oneDNN runs it about twice as fast, and on GPUs, whose kernels here know no other order.

    Every stage after keeps the order it is given.
    """
    if (x.device.type == "cuda" or x.dtype is torch.float32) and x.shape[1] > 1:
        return Interval.of(*(part.contiguous(memory_format=torch.channels_last) for part in (x.mid, x.rad)))
    return x


def _pair(values: list[int]) -> list[int]:
    return [int(v) for v in values] * (2 // len(values))
