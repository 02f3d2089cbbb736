"""R2ET: keep the ranking of the salient features, by the gaps between them and by the curvature of the loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyxai_bounds import explain
from pyxai_bounds.train.objectives.adversarial import natural
from pyxai_bounds.train.objectives.curvature import sign_curvature
from pyxai_bounds.train.objectives.shared import Clip, deployed, per_sample


def r2et(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float = 0.0,
    clip: Clip = None,
    *,
    k: int = 8,
    weight: float = 0.01,
    hessian_weight: float = 0.01,
    h: float = 1e-3,
    adaptive: bool = True,
) -> Tensor:
    """CE + w₁ · Σ_{(i, j) ∈ P} (I_(j) − I_(i)) + w₂ · Est-H, the mean over the batch; eps and clip play no part.

    I = Σ_channels |∂CE/∂x|, ranked by the current model at every step; P pairs the k-th feature with every better one
    and with the next k (:func:`ranked_pairs`). Est-H is :func:`curvature.sign_curvature` with step h; hessian_weight 0
    leaves it out: R2ET\\H. adaptive: every weight becomes |w · (CE + 1) / R| with R its own term, a constant for the
    gradient. The gaps have no lower bound: a weight that is too large, such as 1 from scratch, unlearns the task.
    Source: Chen et al., arXiv 2212.14106 (R2ET), with the pairs of the released code.
    """
    gaps = ranking_gaps(model, x, y, k=k) if weight else None
    return _assembled(model, x, y, gaps, weight, hessian_weight, h, adaptive)


def r2et_mm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float = 0.0,
    clip: Clip = None,
    *,
    k: int = 8,
    extremes: int = 8,
    weight: float = 0.01,
    hessian_weight: float = 0.01,
    h: float = 1e-3,
    adaptive: bool = True,
) -> Tensor:
    """The min–max form: CE + w₁ · (Σ of the k′ largest of the rest − Σ of the k′ smallest of the top) + w₂ · Est-H.

    k′ = ``extremes``, of each sample; the other options are those of :func:`r2et`. Source: the same, R2ET-mm.
    """
    gaps = extreme_gaps(model, x, y, k=k, extremes=extremes) if weight else None
    return _assembled(model, x, y, gaps, weight, hessian_weight, h, adaptive)


def _assembled(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    gaps: Tensor | None,
    weight: float,
    hessian_weight: float,
    h: float,
    adaptive: bool,
) -> Tensor:
    loss = entropy = natural(model, x, y)
    if gaps is not None:
        loss = loss + _weight(weight, entropy, gaps, adaptive) * gaps
    if hessian_weight:
        curvature = sign_curvature(model, x, y, h=h)
        loss = loss + _weight(hessian_weight, entropy, curvature, adaptive) * curvature
    return loss


def _weight(weight: float, entropy: Tensor, term: Tensor, adaptive: bool) -> Tensor | float:
    """w, or |w·(CE + 1)/R|: then the term counts as much as w times the cross entropy and 1, whatever its units."""
    if not adaptive:
        return weight
    size = term.detach().abs()
    scaled = abs(weight) * (entropy.detach() + 1) / size
    return torch.where(size > 0, scaled, torch.zeros_like(scaled))  # a term that vanishes needs no weight


def ranked_pairs(k: int, features: int) -> tuple[list[int], list[int]]:
    """P as ranks from 0: (better, worse). The k-th feature against every better one, and against the next k there are.

    Raises ValueError unless 1 ≤ k < features: there must be something to rank the top above.
    """
    if not 1 <= k < features:
        raise ValueError(f"k={k} top features of {features}: give 1 ≤ k < {features}.")
    following = range(k, min(2 * k, features))
    return [*range(k - 1), *[k - 1] * len(following)], [*[k - 1] * (k - 1), *following]


def ranking_gaps(model: nn.Module, x: Tensor, y: Tensor, eps: float = 0.0, clip: Clip = None, *, k: int = 8) -> Tensor:
    """R2ET\\H: the mean over the batch of Σ_{(i, j) ∈ P} (I_(j) − I_(i)); the more negative, the wider the gaps."""
    ranked = _ranked_saliency(model, x, y)
    better, worse = ranked_pairs(k, ranked.shape[1])
    return (ranked[:, worse] - ranked[:, better]).sum(1).mean()


def extreme_gaps(
    model: nn.Module, x: Tensor, y: Tensor, eps: float = 0.0, clip: Clip = None, *, k: int = 8, extremes: int = 8
) -> Tensor:
    """The mean over the batch of Σ (k′ largest of the rest) − Σ (k′ smallest of the top), as many as there are."""
    if extremes < 1:
        raise ValueError(f"extremes={extremes} must be at least 1.")
    ranked = _ranked_saliency(model, x, y)
    ranked_pairs(k, ranked.shape[1])  # checks k
    top, rest = ranked[:, :k], ranked[:, k:]
    return (rest[:, :extremes].sum(1) - top[:, -extremes:].sum(1)).mean()


def _ranked_saliency(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """I of each sample in descending order, [B, D]; differentiable, but for the ranks themselves."""
    with deployed(model):
        return per_sample(explain.saliency(model, "loss")(x, y)).sort(1, descending=True).values
