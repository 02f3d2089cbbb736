"""The objective of the recipes that train deep networks certifiably: ranking, width and stability from one bound."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyxai_bounds import explain
from pyxai_bounds.certify.metrics import relu_inputs
from pyxai_bounds.interval import Interval
from pyxai_bounds.program import bound
from pyxai_bounds.train.objectives.adversarial import natural
from pyxai_bounds.train.objectives.shared import Clip, deployed, magnitude_ends, norms, per_sample


def separated_topk(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    clip: Clip = None,
    *,
    k: int = 5,
    hinge: float = 0.3,
    margin: float = 0.02,
    width: float = 0.05,
    stability: float = 0.5,
    reach: float = 2.0,
    of: explain.Of = "logit",
) -> Tensor:
    """CE + hinge · top-k separation + width · log-width + stability · ReLUs near their kink, over the box around x.

    The explanation's bounds and those of the ReLUs' inputs come from one bound, whose forward pass they share:
    :func:`separation` keeps the k largest features apart from the rest, the width is ``rec``'s ``"log"``, and
    :func:`instability` is what tells the layers *before* a ReLU to keep it stable: the explanation's bounds do not
    depend differentiably on the states of the ReLUs.
    Shapes: x [B, ...] in ``clip`` if given, y [B] integer; eps the input radius in the units of x; returns a scalar.
    Raises ValueError unless 1 ≤ k < the number of features, and what ``bound`` raises.
    """
    with deployed(model):
        # A lambda over the model and an option alone is the same function at each step, captured once.
        both = bound(lambda x, y: (explain.gradient(model, of)(x, y), relu_inputs(model)(x)))
        box, kinks = both(Interval.linf(x, eps, clip), y)
    widths = torch.log1p(10 * norms(box.width)).mean()
    return (
        natural(model, x, y)
        + hinge * separation(box, k, margin)
        + width * widths
        + stability * instability(kinks, reach)
    )


def separation(box: Interval, k: int, margin: float) -> Tensor:
    """How far an explanation's bounds are from keeping its k largest entries the largest: a scalar to minimise.

    A threshold t halfway between the k-th and the next largest |mid| of a sample must lie below l = |mid| − rad of the
    k largest and above u = |mid| + rad of the others, by ``margin``·‖mid‖₂. What is missing, in units of ‖mid‖₂, is
    summed over features and averaged over samples: Σ_top max(0, margin + t − l) + Σ_rest max(0, margin + u − t). It is
    0 only where the k largest of mid are certified to stay so. t and ‖mid‖₂ count as constants, so that no sample is
    improved by making its explanation large. Unlike in the worst pair alone, every feature in the way has a slope.
    """
    least, most = magnitude_ends(box, k)
    size = per_sample(box.mid.detach()).abs()
    largest = size.topk(k + 1, dim=1)
    threshold = (largest.values[:, k - 1 : k] + largest.values[:, k : k + 1]) / 2
    unit = norms(size).unsqueeze(1) + 1e-6
    top = torch.zeros_like(size, dtype=torch.bool).scatter(1, largest.indices[:, :k], True)
    missing = torch.where(top, threshold - least, most - threshold) / unit
    return F.relu(margin + missing).sum(1).mean()


def instability(boxes: list[Interval], reach: float) -> Tensor:
    """Mean over layers of the mean of max(0, 1 − |mid| / (reach · rad)) over what ReLUs are applied to.

    A ReLU is stable where |mid| > rad; it costs nothing from |mid| = reach · rad on, whatever the scale of its layer,
    and its slope both moves mid away from the kink and narrows rad. Raises ValueError for a network without ReLUs.
    """
    if not boxes:
        raise ValueError("The network has no ReLU whose stability could be trained; use rec.")
    return torch.stack([F.relu(1 - box.mid.abs() / (reach * box.rad + 1e-6)).mean() for box in boxes]).mean()
