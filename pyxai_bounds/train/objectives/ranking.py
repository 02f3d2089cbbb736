"""Certified ranking: what must hold for the top features to stay on top everywhere in the box, as a hinge."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyxai_bounds import explain
from pyxai_bounds.interval import Interval
from pyxai_bounds.train.objectives.adversarial import natural
from pyxai_bounds.train.objectives.shared import Clip, bounded, deployed, magnitude_ends, norms


def certified_topk(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    clip: Clip = None,
    *,
    alpha: float = 0.1,
    k: int = 5,
    margin: float = 0.01,
    pairs: Literal["worst", "all"] = "all",
    scale: Literal["linear", "log"] = "log",
    of: explain.Of = "logit",
    channels: Literal["none", "sum"] = "none",
    gamma: float = 0.0,
) -> Tensor:
    """CE + alpha · a hinge on lower(|v_top|) − upper(|v_rest|) over the box: see :func:`topk_hinge`."""
    hinge = topk_hinge(
        model, x, y, eps, clip, k=k, margin=margin, pairs=pairs, scale=scale, of=of, channels=channels, gamma=gamma
    )
    return natural(model, x, y) + alpha * hinge


def topk_hinge(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    clip: Clip = None,
    *,
    k: int = 5,
    margin: float = 0.01,
    pairs: Literal["worst", "all"] = "all",
    scale: Literal["linear", "log"] = "log",
    of: explain.Of = "logit",
    channels: Literal["none", "sum"] = "none",
    gamma: float = 0.0,
) -> Tensor:
    """How far the bounds are from certifying ``TopK(k, channels=…)`` with a margin: a scalar to minimise.

    With l_i = max(v_L, −v_U)_i for the k features on top at x and u_j = max(|v_L|, |v_U|)_j for the rest, both divided
    by ‖v(x)‖₂, a sample's hinge is max(0, margin − (l_i − u_j)) for the worst pair, or its mean over all pairs. It is 0
    only where TopK is certified, since l ≤ lower(|v|); unlike lower(|v|), l has a slope where v_L < 0 < v_U.
    scale ``"log"`` takes log(1 + 10 · hinge) of each sample, which bounds that are still enormous cannot dominate.
    Raises ValueError unless 1 ≤ k < the number of features.
    """
    if pairs not in ("worst", "all") or scale not in ("linear", "log") or channels not in ("none", "sum"):
        raise ValueError(
            f"pairs={pairs!r} must be 'worst' or 'all', scale={scale!r} 'linear' or 'log', channels={channels!r} "
            "'none' or 'sum'."
        )
    explanation = explain.gradient(model, of)
    with deployed(model):
        box = bounded(explanation, model, gamma)(Interval.linf(x, eps, clip), y)
        nominal = explanation(x, y)
    least, most = magnitude_ends(box, k, channels)
    size, _ = magnitude_ends(Interval.of(nominal.detach(), torch.zeros_like(nominal)), k, channels)
    unit = norms(nominal).clamp(min=torch.finfo(x.dtype).tiny ** 0.5).unsqueeze(1)
    order = size.argsort(1, descending=True)
    top, rest = (least / unit).gather(1, order[:, :k]), (most / unit).gather(1, order[:, k:])
    if pairs == "worst":
        hinge = F.relu(margin - top.amin(1) + rest.amax(1))
    else:
        hinge = F.relu(margin - top.unsqueeze(2) + rest.unsqueeze(1)).mean((1, 2))
    return torch.log1p(10 * hinge).mean() if scale == "log" else hinge.mean()
