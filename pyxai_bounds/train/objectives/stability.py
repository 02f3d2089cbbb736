"""What keeps the bounds of deep networks narrow: stable ReLUs, and boxes that do not grow from layer to layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyxai_bounds.certify.metrics import relu_inputs
from pyxai_bounds.interval import Interval
from pyxai_bounds.train.objectives.adversarial import natural
from pyxai_bounds.train.objectives.shared import Clip, bounded, deployed


def relu_stability(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    clip: Clip = None,
    *,
    alpha: float = 0.1,
    gamma: float = 0.0,
) -> Tensor:
    """CE + alpha · mean over ReLUs of −tanh(1 + l·u), [l, u] the bounds of their inputs: see :func:`unstable_relus`."""
    return natural(model, x, y) + alpha * unstable_relus(model, x, y, eps, clip, gamma=gamma)


def unstable_relus(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, clip: Clip = None, *, gamma: float = 0.0
) -> Tensor:
    """The mean over samples and ReLUs of −tanh(1 + l·u).

    −1 where a ReLU keeps its sign with room to spare (l·u ≫ 0), 1 where its input is far on both sides of 0.
    Where bounds are enormous the tanh is flat: start when they are not, or with :func:`box_growth`.
    0 for a network without ReLUs. Source: Xiao et al., "Training for faster adversarial robustness verification via
    inducing ReLU stability", ICLR 2019.
    """
    with deployed(model):
        boxes = bounded(relu_inputs(model), model, gamma)(Interval.linf(x, eps, clip))
    if not boxes:
        return x.new_zeros(())
    # l·u = mid² − rad²
    total = sum((-torch.tanh(1 + box.mid.square() - box.rad.square())).sum() for box in boxes)
    return total / sum(box.mid.numel() for box in boxes)


def tightness(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    clip: Clip = None,
    *,
    alpha: float = 0.5,
    tolerance: float = 0.5,
) -> Tensor:
    """CE + alpha · the penalty on boxes that grow from the input to the ReLUs: see :func:`box_growth`."""
    return natural(model, x, y) + alpha * box_growth(model, x, y, eps, clip, tolerance=tolerance)


def box_growth(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, clip: Clip = None, *, tolerance: float = 0.5
) -> Tensor:
    """mean over ReLU layers i of max(0, τ − r₀ / r_i) / τ, r₀ the mean radius of the input box and r_i of their inputs.

    0 while no layer's box is more than 1/τ as wide as the input's, 1 where bounds explode; τ = ``tolerance``.
    0 for a network without ReLUs. Source: Shi et al., "Fast certified robust training with short warmup", NeurIPS 2021
    (bound tightness).
    """
    if not 0 < tolerance <= 1:
        raise ValueError(f"tolerance={tolerance} must lie in (0, 1].")
    box = Interval.linf(x, eps, clip)
    with deployed(model):
        inner = bounded(relu_inputs(model), model)(box)
    if not inner:
        return x.new_zeros(())
    radii = torch.stack([layer.rad.mean() for layer in inner])
    ratios = box.rad.mean() / radii.clamp(min=torch.finfo(x.dtype).tiny)
    return F.relu(tolerance - torch.where(radii > 0, ratios, 1.0)).mean() / tolerance
