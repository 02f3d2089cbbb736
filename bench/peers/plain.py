"""Bounds of a logit's gradient as a practitioner writes them down: plain eager PyTorch, correct, without a trick.

This is the "eager loop" that the engine's figures are multiples of. It does what the published REC code does in spirit:
contiguous tensors, midpoint and radius through the layers with W and |W|, ReLU on the end points, autograd recording
all of it. ``bench/eager.py`` is the same mathematics as fast as eager PyTorch allows, and shares no code with it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models import PreActivationBlock, ResidualBlock

Tape = list[Any]  # what the backward pass of each layer needs, in the order of the forward pass


def gradient_bounds(model: nn.Sequential, mid: Tensor, rad: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Midpoint and radius of d logit[target] / d x over the box (mid, rad), differentiable in the parameters.

    Shapes: mid, rad [B, ...]; target [B] integer; returns two tensors shaped like the input.
    Rounding: nearest. Raises ValueError for a layer it does not know, and unless the network ends in a linear layer.
    """
    *layers, last = model
    if not isinstance(last, nn.Linear):
        raise ValueError(f"The network must end in a linear layer; it ends in {last!r}.")
    tape: Tape = []
    for layer in layers:
        mid, rad = forward(layer, mid, rad, tape)
    mid = last.weight[target]
    rad = torch.zeros_like(mid)
    for layer in reversed(layers):
        mid, rad = backward(layer, mid, rad, tape)
    return mid, rad


def forward(layer: nn.Module, mid: Tensor, rad: Tensor, tape: Tape) -> tuple[Tensor, Tensor]:
    """The layer's image of the box; leaves on the tape what ``backward`` takes off again."""
    if isinstance(layer, nn.Sequential):
        for child in layer:
            mid, rad = forward(child, mid, rad, tape)
        return mid, rad
    if isinstance(layer, ResidualBlock | PreActivationBlock):
        main = forward(layer.main, mid, rad, tape)
        shortcut = forward(layer.shortcut, mid, rad, tape)
        mid, rad = main[0] + shortcut[0], main[1] + shortcut[1]
        return forward(layer.relu, mid, rad, tape) if isinstance(layer, ResidualBlock) else (mid, rad)
    if isinstance(layer, nn.ReLU):
        lower, upper = mid - rad, mid + rad
        tape.append((upper > 0, lower > 0))
        lower, upper = lower.clamp(min=0), upper.clamp(min=0)
        return (upper + lower) / 2, (upper - lower) / 2
    tape.append(mid.shape)
    if isinstance(layer, nn.Linear):
        return F.linear(mid, layer.weight, layer.bias), F.linear(rad, layer.weight.abs())
    if isinstance(layer, nn.Conv2d):
        rest = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return F.conv2d(mid, layer.weight, layer.bias, *rest), F.conv2d(rad, layer.weight.abs(), None, *rest)
    if isinstance(layer, nn.BatchNorm2d):
        scale, shift = scale_shift(layer)
        return mid * scale + shift, rad * scale.abs()
    if isinstance(layer, nn.Flatten):
        return mid.flatten(1), rad.flatten(1)
    if isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size == 1:
        return mid.mean((2, 3), keepdim=True), rad.mean((2, 3), keepdim=True)
    raise ValueError(f"The plain loop does not know {layer!r}.")


def backward(layer: nn.Module, mid: Tensor, rad: Tensor, tape: Tape) -> tuple[Tensor, Tensor]:
    """Bounds of the gradient in the layer's input, from those in its output."""
    if isinstance(layer, nn.Sequential):
        for child in reversed(layer):
            mid, rad = backward(child, mid, rad, tape)
        return mid, rad
    if isinstance(layer, ResidualBlock | PreActivationBlock):
        if isinstance(layer, ResidualBlock):
            mid, rad = backward(layer.relu, mid, rad, tape)
        shortcut = backward(layer.shortcut, mid, rad, tape)
        main = backward(layer.main, mid, rad, tape)
        return main[0] + shortcut[0], main[1] + shortcut[1]
    saved = tape.pop()
    if isinstance(layer, nn.ReLU):
        alive, active = saved
        lower, upper = mid - rad, mid + rad
        # Active: as it is. Unstable: the hull with 0. Dead: 0.
        lower = torch.where(active, lower, torch.where(alive, lower.clamp(max=0), 0.0))
        upper = torch.where(active, upper, torch.where(alive, upper.clamp(min=0), 0.0))
        return (upper + lower) / 2, (upper - lower) / 2
    if isinstance(layer, nn.Linear):
        return mid @ layer.weight, rad @ layer.weight.abs()
    if isinstance(layer, nn.Conv2d):
        return transposed(layer, mid, layer.weight, saved), transposed(layer, rad, layer.weight.abs(), saved)
    if isinstance(layer, nn.BatchNorm2d):
        scale, _ = scale_shift(layer)
        return mid * scale, rad * scale.abs()
    if isinstance(layer, nn.Flatten):
        return mid.reshape(saved), rad.reshape(saved)
    pixels = saved[2:].numel()  # average pool: `forward` has refused every other layer
    return (mid / pixels).expand(saved), (rad / pixels).expand(saved)


def transposed(layer: nn.Conv2d, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
    """The convolution's backward pass; ``output_padding`` is what its stride cut off an input of this shape."""
    sizes = zip(
        shape[2:], gradient.shape[2:], layer.stride, layer.padding, layer.dilation, layer.kernel_size, strict=True
    )
    cut = [
        size - ((out - 1) * stride - 2 * int(padding) + dilation * (kernel - 1) + 1)
        for size, out, stride, padding, dilation, kernel in sizes
    ]
    rest = (layer.stride, layer.padding, cut, layer.groups, layer.dilation)
    return F.conv_transpose2d(gradient, weight, None, *rest)


def scale_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Batch norm at inference as one factor and one summand per channel, [C, 1, 1]."""
    if norm.training or norm.running_mean is None or norm.running_var is None:
        raise ValueError("Batch norm must be in inference mode with running statistics: call model.eval().")
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale[:, None, None], (norm.bias - norm.running_mean * scale)[:, None, None]
