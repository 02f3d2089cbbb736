"""What several objectives need: the network as it is deployed, bounds over a parameter box, steps to a worst input."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from pyxai_bounds.errors import capturing
from pyxai_bounds.identity import modules_of
from pyxai_bounds.interval import Clip, Interval
from pyxai_bounds.parameters import parameter_box
from pyxai_bounds.program import BoundFunction, bound

Reduction = Literal["mean", "sum"]


@contextlib.contextmanager
def deployed(model: Callable[..., Any]) -> Iterator[None]:
    """Inside, the model runs as it will be used: batch norm with its running statistics, no dropout.

    Explanations and bounds are those of the deployed network, whatever the mode that it trains in; and the steps of an
    inner search must not move running statistics. ``model`` is a module, or a function: then all modules that it
    refers to. Afterwards each is in the mode that it was in.
    """
    training = [module for module in modules_of(model) if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def bounded(fn: Callable[..., Any], model: Callable[..., Any], gamma: float = 0.0) -> BoundFunction:
    """``bound(fn)``, over all parameters of ``model`` within gamma·|θ| of what they are if gamma > 0."""
    if not 0 <= gamma < 1:
        raise ValueError(f"gamma={gamma} is the relative radius of the parameters: it must lie in [0, 1).")
    if gamma == 0:
        return bound(fn)
    return bound(fn, parameters=parameter_box(cast(nn.Module, model), relative=gamma))  # which refuses others


def per_sample(t: Tensor) -> Tensor:
    """[B, ...] as [B, D]."""
    return t.reshape(len(t), -1) if t.numel() else t.reshape(len(t), 0)


def magnitude_ends(box: Interval, k: int, channels: Literal["none", "sum"] = "none") -> tuple[Tensor, Tensor]:
    """max(v_L, −v_U) ≤ |v| and max(|v_L|, |v_U|) ≥ |v| of each feature, [B, D], of which k are to rank highest.

    They are |mid| − rad and |mid| + rad; unlike the greatest lower bound of |v|, the first has a slope where
    v_L < 0 < v_U. ``"sum"`` adds up an image's channels. Raises ValueError unless 1 ≤ k < D.
    """
    least, most = box.mid.abs() - box.rad, box.mid.abs() + box.rad
    if channels == "sum" and box.mid.dim() > 2:
        least, most = least.sum(1), most.sum(1)
    least, most = per_sample(least), per_sample(most)
    if not 1 <= k < least.shape[1]:
        raise ValueError(f"k={k} top features of {least.shape[1]}: give 1 ≤ k < {least.shape[1]}.")
    return least, most


def reduced(values: Tensor, reduction: Reduction) -> Tensor:
    """Mean or sum over the batch of one number per sample, [B] → []."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r} is unknown; choose 'mean' or 'sum'.")
    return values.mean() if reduction == "mean" else values.sum()


def norms(t: Tensor) -> Tensor:
    """‖t_b‖₂ of each sample, [B]; its gradient at 0 is 0."""
    return torch.linalg.vector_norm(per_sample(t), dim=1)


def sign_ascent(
    score: Callable[[Tensor], Tensor],
    x: Tensor,
    eps: float,
    clip: Clip,
    *,
    steps: int,
    step_size: float,
    random_start: bool = True,
) -> Tensor:
    """An input x′ in the box that makes ``score(x′)`` (a scalar, summed over the batch) large: the result is detached.

    ``steps`` steps of ``step_size`` (0: 2.5·eps / steps) along the sign of the gradient, each followed by a return to
    the Linf ball and to ``clip``, from a uniform random point of it or from x. No gradient reaches the parameters.
    Source: Madry et al., "Towards deep learning models resistant to adversarial attacks", ICLR 2018, section 2.1.
    """
    if steps < 0 or step_size < 0:
        raise ValueError(f"The inner search needs steps ≥ 0 and step_size ≥ 0, got {steps} and {step_size}.")
    box = Interval.linf(x, eps, clip)  # checks eps, x and clip
    low, high = (-torch.inf, torch.inf) if clip is None else clip
    lower, upper = (x - eps).clamp(min=low), (x + eps).clamp(max=high)
    length = step_size or 2.5 * eps / max(steps, 1)
    at = (x + eps * (2 * torch.rand_like(x) - 1)).clamp(lower, upper) if random_start else x
    for _ in range(steps if capturing(x) or bool((box.rad > 0).any()) else 0):
        at = at.detach().requires_grad_()
        with torch.enable_grad():
            value = score(at)
        slope = torch.autograd.grad(value, at, allow_unused=True)[0] if value.requires_grad else None
        if slope is None:
            break  # the score depends on nothing that could be moved
        at = (at.detach() + length * slope.sign()).clamp(lower, upper)
    return at.detach()
