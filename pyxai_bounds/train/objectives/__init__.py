"""Training objectives: losses of (model, x, y, eps), most of them differentiable through bounds of the explanation.

An objective is called as ``objective(model, x, y, eps, clip=None, **options)`` and returns a scalar. Shapes: x [B, ...]
inside ``clip`` if given, y [B] integer; eps ≥ 0 in the units of x. Every option is a keyword with a default and a plain
type. Random draws come from the global generator, explanations and bounds from the network as it is deployed (batch
norm with running statistics, no dropout), in whatever mode it trains. ``TERMS`` are what objectives add to the cross
entropy, with the same arguments; ``weighted`` adds objectives and terms up.

Two baselines of the field are no losses: weight decay is an option of the optimiser, and softplus(beta) a change of the
model (:func:`pyxai_bounds.train.transform.softplus`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from pyxai_bounds.train.objectives.adversarial import ibp, natural, pgd
from pyxai_bounds.train.objectives.curvature import (
    est_h,
    hessian,
    hessian_norm,
    l2,
    l2_adversarial,
    largest_curvature,
    sign_curvature,
    ssr,
)
from pyxai_bounds.train.objectives.r2et import extreme_gaps, r2et, r2et_mm, ranking_gaps
from pyxai_bounds.train.objectives.r4 import r4
from pyxai_bounds.train.objectives.ranking import certified_topk, topk_hinge
from pyxai_bounds.train.objectives.rar import certified_ig_norm, certified_ig_sum_norm, ig_norm, ig_sum_norm
from pyxai_bounds.train.objectives.rec import Width, explanation_width, rec, rec_released
from pyxai_bounds.train.objectives.separated import separated_topk
from pyxai_bounds.train.objectives.stability import box_growth, relu_stability, tightness, unstable_relus

Objective = Callable[..., Tensor]

OBJECTIVES: dict[str, Objective] = {
    "natural": natural,
    "rec": rec,
    "rec-released": rec_released,
    "ibp": ibp,
    "ig-norm": ig_norm,
    "ig-sum-norm": ig_sum_norm,
    "certified-ig-norm": certified_ig_norm,
    "certified-ig-sum-norm": certified_ig_sum_norm,
    "r2et": r2et,
    "r2et-mm": r2et_mm,
    "certified-topk": certified_topk,
    "separated-topk": separated_topk,
    "r4": r4,
    "pgd": pgd,
    "l2": l2,
    "l2-adversarial": l2_adversarial,
    "hessian": hessian,
    "est-h": est_h,
    "ssr": ssr,
    "relu-stability": relu_stability,
    "tightness": tightness,
}

WITHOUT_EPS = frozenset({"natural", "r2et", "r2et-mm", "hessian", "est-h", "ssr"})  # eps plays no part in them

TERMS: dict[str, Objective] = {
    "width": explanation_width,
    "topk-hinge": topk_hinge,
    "ranking-gaps": ranking_gaps,
    "extreme-gaps": extreme_gaps,
    "hessian-norm": hessian_norm,
    "sign-curvature": sign_curvature,
    "largest-curvature": largest_curvature,
    "unstable-relus": unstable_relus,
    "box-growth": box_growth,
}


def weighted(weights: Mapping[Any, float]) -> Objective:
    """The objective Σ weight · part, each part a name of ``OBJECTIVES`` or ``TERMS`` or a function of your own.

    ``weighted({"natural": 1.0, "width": 0.1, "unstable-relus": 0.01})``; options by ``functools.partial`` as the key.
    Raises ValueError for an unknown name or no parts.
    """
    if not weights:
        raise ValueError("weighted() needs at least one objective.")
    parts = [(_known(part) if isinstance(part, str) else part, weight) for part, weight in weights.items()]

    def objective(
        model: nn.Module, x: Tensor, y: Tensor, eps: float, clip: tuple[float, float] | None = None
    ) -> Tensor:
        terms = [weight * part(model, x, y, eps, clip) for part, weight in parts if weight]
        total = terms[0] if terms else x.new_zeros(())
        for term in terms[1:]:
            total = total + term
        return total

    return objective


def by_name(text: str) -> Objective:
    """The objective of a name, or of a sum such as ``"natural + 0.1 * width + 0.01 * unstable-relus"``.

    Raises ValueError for an unknown name, a weight that is no number, and a term that stands alone: without a cross
    entropy in the sum nothing is learnt.
    """
    if text in OBJECTIVES:
        return OBJECTIVES[text]
    weights: dict[str, float] = {}
    for part in text.split("+"):
        factor, star, name = part.rpartition("*")
        try:
            weight = float(factor) if star else 1.0
        except ValueError:
            raise ValueError(f"{part.strip()!r} in the objective {text!r}: write weight * name.") from None
        weights[name.strip()] = weights.get(name.strip(), 0.0) + weight
    for name in weights:
        _known(name)
    if not weights.keys() & OBJECTIVES.keys():
        raise ValueError(f"The objective {text!r} has no cross entropy: add 'natural + ' to it.")
    return weighted({_known(name): weight for name, weight in weights.items()})


def _known(name: str) -> Objective:
    known = OBJECTIVES | TERMS
    if name not in known:
        raise ValueError(f"There is no objective {name!r}; choose from {', '.join(known)}.")
    return known[name]


__all__ = [
    "OBJECTIVES",
    "TERMS",
    "WITHOUT_EPS",
    "Objective",
    "Width",
    "by_name",
    "certified_ig_norm",
    "certified_ig_sum_norm",
    "certified_topk",
    "est_h",
    "explanation_width",
    "hessian",
    "ibp",
    "ig_norm",
    "ig_sum_norm",
    "l2",
    "l2_adversarial",
    "natural",
    "pgd",
    "r2et",
    "r2et_mm",
    "r4",
    "rec",
    "rec_released",
    "relu_stability",
    "separated_topk",
    "ssr",
    "tightness",
    "weighted",
]
