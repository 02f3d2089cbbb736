"""Bounds of a logit's gradient in plain eager PyTorch, written by hand: the loop that the engine must beat.

It shares no code with the package, so it is also the oracle for the engine's values and parameter gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models import PreActivationBlock, ResidualBlock

# Why it looks as it does (2-core AVX-512 CPU, torch 2.13, the convolutions of `n4` at batch 32):
#
# * Backward-data is `conv_transpose2d`. As a call, it and `aten.convolution_backward` are equal channels-last (4.7 and
#   4.8 ms over the four) and nearly so contiguous (10.9 and 10.1 ms, each the faster one somewhere); but autograd of
#   `convolution_backward` is the generic double backward, 1.3 to 3.4 times slower than that of `conv_transpose2d`,
#   which in turn equals a `conv2d` plus a weight gradient called by hand.
# * Fresh memory is the price of an elementwise step: 4 MB cost 0.1 ms when the pages are mapped and 1.0 ms when they
#   are not, and glibc gives large blocks back at once. So every step overwrites its arguments and allocates one buffer.
# * Masks are stored as bool and multiply as float, through a buffer that is free at that moment: `masked_fill` and
#   `where` branch per element, which real masks mispredict, and cost 10 times as much; a factor of another dtype
#   is first copied to a new float tensor by PyTorch.
# * Halving is never carried out. The midpoint and radius of (lower, upper) are half their sum and difference; the sums
#   are passed on, and a power of two, exact, is remembered beside them and applied to biases, sums and the result.


@dataclass
class Affine:
    """A convolution or linear layer, batch norm folded in; ``magnitude`` is the absolute weight."""

    layer: nn.Conv2d | nn.Linear
    weight: Tensor
    magnitude: Tensor
    bias: Tensor | None


@dataclass
class Scale:
    """Batch norm that follows no convolution: one factor and one summand per channel."""

    scale: Tensor
    shift: Tensor


@dataclass
class Residual:
    main: list[Any]
    shortcut: list[Any]


@dataclass
class Bounds:
    """The interval (scale·mid, scale·rad), scale a power of two; ``rad`` None is a point."""

    mid: Tensor
    rad: Tensor | None
    scale: float = 1.0


def gradient_bounds(
    layers: nn.Module, mid: Tensor, rad: Tensor, target: Tensor, *, channels_last: bool = False
) -> tuple[Tensor, Tensor]:
    """Bounds of d logit[target] / d x for every x in the box (mid, rad), differentiable in the parameters.

    Shapes: mid, rad [B, ...]; target [B] integer; returns mid and rad of the gradient, shaped like the input.
    Biases get no gradient: the states of the ReLUs do not depend differentiably on anything.
    Rounding: nearest. Raises ValueError for a layer it does not know, and unless the network ends in ReLU
    (then flatten or average pool) and a linear layer.
    """
    layout = torch.channels_last if channels_last and mid.dim() == 4 else torch.contiguous_format
    *steps, last = _steps(layers)
    if not (isinstance(last, Affine) and isinstance(last.layer, nn.Linear)):
        raise ValueError(f"The network must end in a linear layer; it ends in {last!r}.")
    last_relu = -1
    for index, step in enumerate(steps):
        if isinstance(step, nn.ReLU):
            last_relu = index
    tape: list[Any] = []
    with torch.no_grad():
        box = Bounds(mid.contiguous(memory_format=layout), rad.contiguous(memory_format=layout))
        if last_relu >= 0:
            box = _forward(steps[:last_relu], box, tape)
            tape.append(_states(box)[0])
    _shapes(steps[last_relu + 1 :], box.mid.shape, tape)
    # The gradient of logit[target] at the last linear layer's input is a row of its weight: still a point.
    gradient = Bounds(last.weight.index_select(0, target), None)
    gradient = _backward(steps, tape, gradient, layout)
    if gradient.rad is None:
        return gradient.mid, torch.zeros_like(gradient.mid)
    return gradient.mid * gradient.scale, gradient.rad * gradient.scale


def _steps(module: nn.Module) -> list[Any]:
    """The network as a flat list: Affine, Scale, Residual, and the ReLU, pool and flatten modules themselves."""
    if isinstance(module, ResidualBlock):
        return [Residual(_steps(module.main), _steps(module.shortcut)), module.relu]
    if isinstance(module, PreActivationBlock):
        return [Residual(_steps(module.main), _steps(module.shortcut))]
    if isinstance(module, nn.Sequential):
        children = list(module)
        steps: list[Any] = []
        for index, child in enumerate(children):
            following = children[index + 1] if index + 1 < len(children) else None
            if isinstance(child, nn.Conv2d) and isinstance(following, nn.BatchNorm2d):
                steps.append(_folded(child, following))
            elif isinstance(child, nn.BatchNorm2d) and index > 0 and isinstance(children[index - 1], nn.Conv2d):
                continue
            else:
                steps += _steps(child)
        return steps
    if isinstance(module, nn.Conv2d | nn.Linear):
        if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
            raise ValueError(f"Only zero padding is supported, not {module!r}.")
        return [Affine(module, module.weight, module.weight.abs(), module.bias)]
    if isinstance(module, nn.BatchNorm2d):
        scale, shift = _scale_shift(module)
        return [Scale(scale[:, None, None], shift[:, None, None])]
    if isinstance(module, nn.ReLU | nn.Flatten):
        return [module]
    if isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
        return [module]
    raise ValueError(f"The eager loop does not know {module!r}.")


def _scale_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    if norm.training or norm.running_mean is None:
        raise ValueError("Batch norm must be in inference mode with running statistics: call model.eval().")
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Affine:
    """conv, then norm, as one convolution: the fold costs a pass over the weight and none over the image."""
    scale, shift = _scale_shift(norm)
    weight = conv.weight * scale[:, None, None, None]
    return Affine(conv, weight, weight.abs(), shift if conv.bias is None else conv.bias * scale + shift)


def _forward(steps: list[Any], box: Bounds, tape: list[Any]) -> Bounds:
    """Bounds of the activations; leaves on the tape what each step's backward needs. Runs without autograd."""
    for step in steps:
        mid, rad, scale = box.mid, box.rad, box.scale
        if isinstance(step, Affine):
            tape.append(mid.shape)
            bias = step.bias if step.bias is None or scale == 1.0 else step.bias / scale
            if isinstance(step.layer, nn.Linear):
                box = Bounds(F.linear(mid, step.weight, bias), F.linear(rad, step.magnitude), scale)
            else:
                rest = (step.layer.stride, step.layer.padding, step.layer.dilation, step.layer.groups)
                box = Bounds(F.conv2d(mid, step.weight, bias, *rest), F.conv2d(rad, step.magnitude, None, *rest), scale)
        elif isinstance(step, nn.ReLU):
            states, lower, upper = _states(box)
            tape.append(states)
            box = Bounds(*_sum_difference(lower.relu_(), upper.relu_(), rad), scale / 2)
        elif isinstance(step, Residual):
            main_tape: list[Any] = []
            shortcut_tape: list[Any] = []
            # Main last: every step but ReLU leaves its argument alone, and no ReLU stands first in a branch.
            shortcut = _forward(step.shortcut, box, shortcut_tape)
            box = _forward(step.main, box, main_tape)
            ratio = shortcut.scale / box.scale
            box.mid.add_(shortcut.mid, alpha=ratio)
            box.rad.add_(shortcut.rad, alpha=ratio)
            tape.append((main_tape, shortcut_tape))
        elif isinstance(step, Scale):
            tape.append(None)
            box = Bounds((mid * step.scale).add_(step.shift / scale), rad * step.scale.abs(), scale)
        else:
            tape.append(mid.shape)
            if isinstance(step, nn.Flatten):
                box = Bounds(mid.flatten(1), rad.flatten(1), scale)
            else:
                box = Bounds(mid.mean((2, 3), keepdim=True), rad.mean((2, 3), keepdim=True), scale)
    return box


def _states(box: Bounds) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """((alive, active), lower, upper) of a box, which is overwritten: a pre-activation has no other reader."""
    lower = box.mid - box.rad
    upper = box.mid.add_(box.rad)
    return (upper > 0, lower > 0), lower, upper


def _shapes(steps: list[Any], shape: torch.Size, tape: list[Any]) -> None:
    """What the steps after the last ReLU leave on the tape: past it, only shapes matter."""
    for step in steps:
        tape.append(shape)
        if isinstance(step, nn.Flatten):
            shape = torch.Size((shape[0], shape[1:].numel()))
        elif isinstance(step, nn.AdaptiveAvgPool2d):
            shape = torch.Size((*shape[:2], 1, 1))
        else:
            raise ValueError(f"Only flatten and average pool may stand between the last ReLU and the end, not {step}.")


def _backward(steps: list[Any], tape: list[Any], gradient: Bounds, layout: torch.memory_format) -> Bounds:
    """The chain rule on intervals, from the output of ``steps`` to their input."""
    for step, saved in zip(reversed(steps), reversed(tape), strict=True):
        mid, rad, scale = gradient.mid, gradient.rad, gradient.scale
        if isinstance(step, nn.ReLU):
            gradient = Bounds(*_switch(mid, rad, *saved), scale / 2)
        elif isinstance(step, Residual):
            main = _backward(step.main, saved[0], gradient, layout)
            gradient = _add(main, _backward(step.shortcut, saved[1], gradient, layout))
        elif isinstance(step, Affine):
            transposed = _linear_transposed if isinstance(step.layer, nn.Linear) else _conv_transposed
            gradient = Bounds(
                transposed(mid, step.weight, step.layer, saved),
                None if rad is None else transposed(rad, step.magnitude, step.layer, saved),
                scale,
            )
        elif isinstance(step, Scale):
            gradient = Bounds(mid * step.scale, None if rad is None else rad * step.scale.abs(), scale)
        else:
            spread = _unflattened if isinstance(step, nn.Flatten) else _unpooled
            gradient = Bounds(
                spread(mid, saved, layout), None if rad is None else spread(rad, saved, layout), scale
            )  # fmt: skip
    return gradient


def _linear_transposed(gradient: Tensor, weight: Tensor, layer: nn.Linear, shape: torch.Size) -> Tensor:
    return gradient @ weight


def _conv_transposed(gradient: Tensor, weight: Tensor, layer: nn.Conv2d, shape: torch.Size) -> Tensor:
    missing = [
        size - ((out - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1)
        for size, out, stride, padding, dilation, kernel in zip(
            shape[2:], gradient.shape[2:], layer.stride, layer.padding, layer.dilation, layer.kernel_size, strict=True
        )
    ]
    return F.conv_transpose2d(
        gradient, weight, None, layer.stride, layer.padding, missing, layer.groups, layer.dilation
    )


def _unflattened(gradient: Tensor, shape: torch.Size, layout: torch.memory_format) -> Tensor:
    # A copy even where a view would do, since ReLU' overwrites it.
    return gradient.view(shape).clone(memory_format=layout if len(shape) == 4 else torch.contiguous_format)


def _unpooled(gradient: Tensor, shape: torch.Size, layout: torch.memory_format) -> Tensor:
    return (gradient / shape[2:].numel()).expand(shape).contiguous(memory_format=layout)


def _add(a: Bounds, b: Bounds) -> Bounds:
    """a + b; overwrites a, whose producer (a convolution's backward, or ReLU') does not keep its output."""
    ratio = b.scale / a.scale
    rad = a.rad
    if b.rad is not None:
        rad = b.rad * ratio if rad is None else rad.add_(b.rad, alpha=ratio)
    return Bounds(a.mid.add_(b.mid, alpha=ratio), rad, a.scale)


def _switch(mid: Tensor, rad: Tensor | None, alive: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Twice the midpoint and radius of the gradient times ReLU': dead 0, active as it is, unstable hull(0, ·)."""
    if rad is None or torch.compiler.is_compiling():  # Dynamo cannot trace `_Switch`, and fuses these lines as well
        lower, upper = (mid, mid) if rad is None else (mid - rad, mid + rad)
        lower = lower * _kept(lower.detach() < 0, alive, active)
        upper = upper * _kept(upper.detach() > 0, alive, active)
        return lower + upper, upper - lower
    return _Switch.apply(mid, rad, alive, active)


def _kept(outward: Tensor, alive: Tensor, active: Tensor) -> Tensor:
    """Where an end of the interval survives: it points away from 0 and the unit is alive, or the unit is active."""
    return outward.logical_and_(alive).logical_or_(active)


class _Switch(torch.autograd.Function):
    """Multiplication of both ends by 0 or 1, in place. The map is symmetric, so that its backward is itself;
    autograd's own would negate and accumulate in four passes more."""

    @staticmethod
    def forward(ctx: Any, mid: Tensor, rad: Tensor, alive: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        ctx.mark_dirty(mid, rad)
        ctx.set_materialize_grads(False)
        lower, upper = mid - rad, mid.add_(rad)
        keep_lower, keep_upper = _kept(lower < 0, alive, active), _kept(upper > 0, alive, active)
        ctx.save_for_backward(keep_lower, keep_upper)
        lower.mul_(rad.copy_(keep_lower))
        upper.mul_(rad.copy_(keep_upper))
        return _sum_difference(lower, upper, rad)

    @staticmethod
    def backward(ctx: Any, mid: Tensor | None, rad: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        if mid is None and rad is None:
            return None, None, None, None
        keep_lower, keep_upper = ctx.saved_tensors
        if mid is None:  # a loss on widths alone: only the radius of the first layer's gradient reaches it
            lower, upper = torch.neg(rad), rad.clone()
        elif rad is None:
            lower, upper = mid.clone(), mid.clone()
        else:
            lower, upper = mid - rad, mid + rad
        scratch = torch.empty_like(lower)
        lower.mul_(scratch.copy_(keep_lower))
        upper.mul_(scratch.copy_(keep_upper))
        return *_sum_difference(lower, upper, scratch), None, None


def _sum_difference(lower: Tensor, upper: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """(upper + lower, upper − lower), written into ``upper`` and ``scratch``."""
    if torch.compiler.is_compiling():  # Dynamo refuses `out=` on channels-last tensors, and plans memory itself
        return upper + lower, upper - lower
    torch.sub(upper, lower, out=scratch)
    return upper.add_(lower), scratch
