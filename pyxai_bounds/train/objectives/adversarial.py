"""Cross entropy at the data, at adversarial inputs, and at the worst logits of a box."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyxai_bounds.interval import Interval
from pyxai_bounds.train.objectives.shared import Clip, Reduction, bounded, deployed, sign_ascent


def natural(model: nn.Module, x: Tensor, y: Tensor, eps: float = 0.0, clip: Clip = None) -> Tensor:
    """Mean cross entropy, the same at every eps."""
    return F.cross_entropy(model(x), y)


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    clip: Clip = None,
    *,
    steps: int = 7,
    step_size: float = 0.0,
    random_start: bool = True,
    reduction: Reduction = "mean",
) -> Tensor:
    """Adversarial training: CE(f(x′), y) with x′ found by projected sign steps on the cross entropy.

    step_size in the units of x, 0 for 2.5·eps / steps; reduction over the batch.
    Source: Madry et al., ICLR 2018, equation 2.1.
    """
    worst = adversarial_input(model, x, y, eps, clip, steps=steps, step_size=step_size, random_start=random_start)
    return F.cross_entropy(model(worst), y, reduction=reduction)


def adversarial_input(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    clip: Clip = None,
    *,
    steps: int = 7,
    step_size: float = 0.0,
    random_start: bool = True,
) -> Tensor:
    """The x′ of :func:`pgd`, detached."""
    with deployed(model):
        return sign_ascent(
            lambda at: F.cross_entropy(model(at), y, reduction="sum"),
            x, eps, clip, steps=steps, step_size=step_size, random_start=random_start,
        )  # fmt: skip


def ibp(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    clip: Clip = None,
    *,
    kappa: float = 0.5,
    gamma: float = 0.0,
) -> Tensor:
    """κ·CE(f(x), y) + (1 − κ)·CE(ẑ, y), with ẑ the worst logits of the box: lower for y, upper for the others.

    gamma: relative radius of the parameters, in the box as well. With kappa=0 and the width of the explanation beside
    it (``by_name("ibp + 0.1 * width")``) it is the "IBP + REC" of arXiv 2212.08507.
    Source: Gowal et al., "Scalable verified training for provably robust image classification", ICCV 2019.
    """
    if not 0 <= kappa <= 1:
        raise ValueError(f"kappa={kappa} weighs the natural loss against the worst case: it must lie in [0, 1].")
    worst = worst_case_cross_entropy(model, x, y, eps, clip, gamma=gamma).mean()
    return worst if kappa == 0 else kappa * natural(model, x, y) + (1 - kappa) * worst


def worst_case_cross_entropy(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, clip: Clip = None, *, gamma: float = 0.0
) -> Tensor:
    """An upper bound on each sample's cross entropy over its box, [B]."""
    with deployed(model):
        logits = bounded(model, model, gamma)(Interval.linf(x, eps, clip))
    label = F.one_hot(y.long(), logits.shape[1]).bool()
    return F.cross_entropy(torch.where(label, logits.mid - logits.rad, logits.mid + logits.rad), y, reduction="none")
