"""Attacks on what an explanation ranks highest: those of RAR (after Ghorbani et al.) and those of R2ET.

All take ``fn(x, target)`` as ``certify`` does, stay in the box and in clip, and return an :class:`Attack`. Saliency
means |explanation|, summed over the channels of images. Where ``model`` is given, the label that it gives to x is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from pyxai_bounds.attack.search import Attack, Guide, Judge, Keep, Model, Search, search
from pyxai_bounds.certify.metrics import intersection, kendall, mass_center, saliency_map, spearman
from pyxai_bounds.certify.properties import flat

Fn = Callable[..., Tensor]
Clip = tuple[float, float] | None
Measure = Literal["intersection", "kendall", "spearman"]


def topk(
    fn: Fn,
    x: Tensor,
    target: Tensor | None = None,
    *,
    eps: float | Tensor,
    k: int,
    clip: Clip = None,
    model: Model | None = None,
    measure: Measure = "intersection",
    measured_k: int | None = None,
    steps: int = 100,
    step_size: float = 0.01,
    restarts: int = 1,
    **how: Any,
) -> Attack:
    """Drain the k most salient features: minimise their share of the saliency, by sign steps from x.

    Margin: the ``measure`` between the saliency of x and of x′, of the program itself: ``"intersection"`` of the top
    ``measured_k`` (k if None), or the ``"kendall"`` or ``"spearman"`` correlation. Broken: it is below 1.
    Other options are those of :class:`search.Search`.
    Source: Ghorbani et al., AAAI 2019 (top-k attack), as used by RAR, arXiv 1905.09957.
    """

    def guide(attribution: Tensor, nominal: Tensor) -> Tensor:
        top = saliency_map(nominal).topk(min(k, saliency_map(nominal).shape[1]), 1).indices
        size = _saliency(attribution)
        return size.gather(1, top).sum(1) / size.sum(1).clamp(min=torch.finfo(size.dtype).tiny)

    judge = _measured(measure, k if measured_k is None else measured_k)
    return _attack(fn, x, target, eps, clip, model, guide, judge, steps, step_size, restarts, **how)


def center(
    fn: Fn,
    x: Tensor,
    target: Tensor | None = None,
    *,
    eps: float | Tensor,
    clip: Clip = None,
    model: Model | None = None,
    steps: int = 100,
    step_size: float = 0.01,
    restarts: int = 2,
    **how: Any,
) -> Attack:
    """Move the centre of mass of an image's saliency as far as possible, by sign steps.

    Margin: minus the distance moved, in pixels. Broken: it moved by more than one pixel. The first start is x, where
    the distance has next to no slope; the second is random.
    Source: Ghorbani et al., AAAI 2019 (mass-center attack), as used by RAR.
    """

    def moved(attribution: Tensor, nominal: Tensor) -> Tensor:
        return -(mass_center(attribution) - mass_center(nominal)).square().sum(1)

    def distance(attribution: Tensor, nominal: Tensor) -> Tensor:
        return -(-moved(attribution, nominal)).sqrt()

    return _attack(fn, x, target, eps, clip, model, moved, distance, steps, step_size, restarts, broken_at=-1.0, **how)


def region(
    fn: Fn,
    x: Tensor,
    target: Tensor | None = None,
    *,
    mask: Tensor,
    eps: float | Tensor,
    clip: Clip = None,
    model: Model | None = None,
    steps: int = 100,
    step_size: float = 0.01,
    restarts: int = 1,
    **how: Any,
) -> Attack:
    """Draw the saliency into a region: maximise the share of it inside ``mask``, by sign steps from x.

    mask: bool or a non-negative map, in the shape of the saliency of one sample (an image's without its channels).
    Margin: 1 − that share. Broken: the region holds more than half of the saliency.
    Source: Ghorbani et al., AAAI 2019 (targeted attack), as used by RAR.
    """
    weight = mask.to(x).reshape(1, -1)

    def share(attribution: Tensor, nominal: Tensor) -> Tensor:
        size = _saliency(attribution)
        if size.shape[1] != weight.shape[1]:
            raise ValueError(f"mask has {weight.shape[1]} entries, but the saliency of a sample has {size.shape[1]}.")
        return 1 - (size * weight).sum(1) / size.sum(1).clamp(min=torch.finfo(size.dtype).tiny)

    return _attack(fn, x, target, eps, clip, model, share, share, steps, step_size, restarts, broken_at=0.5, **how)


def random(
    fn: Fn,
    x: Tensor,
    target: Tensor | None = None,
    *,
    eps: float | Tensor,
    k: int,
    clip: Clip = None,
    model: Model | None = None,
    measure: Measure = "intersection",
    steps: int = 100,
    step_size: float = 0.01,
    restarts: int = 1,
    **how: Any,
) -> Attack:
    """Walk in random signs and keep the point where the ``measure`` is lowest: what an attack must beat.

    Margin and broken are those of :func:`topk`. Source: RAR's random attack, after Ghorbani et al., AAAI 2019.
    """
    judge = _measured(measure, k)
    return _attack(fn, x, target, eps, clip, model, judge, judge, steps, step_size, restarts, move="random", **how)


def er(
    fn: Fn,
    x: Tensor,
    target: Tensor | None = None,
    *,
    eps: float | Tensor,
    k: int,
    clip: Clip = None,
    model: Model | None = None,
    steps: int = 100,
    step_size: float = 5e-3,
    restarts: int = 1,
    **how: Any,
) -> Attack:
    """R2ET's ERAttack: minimise Σ_{(i, j)} I_i − I_j over pairs of a better feature i and a worse one j, ranked at x.

    The pairs are those of the released code, the k-th feature against every better one and the next k. Steps of length
    step_size (L2, per sample) along the normalised gradient. Margin: P@k, the share of the top k that stays; broken
    below 1. ``keep="stop"`` and ``keep="hinge"`` are the paper's early stop and its label-keeping variant.
    Source: Chen et al., arXiv 2212.14106 (ERAttack).
    """

    def guide(attribution: Tensor, nominal: Tensor) -> Tensor:
        ranks = saliency_map(nominal).argsort(1, descending=True)
        size = _saliency(attribution).gather(1, ranks)
        # Σ over the pairs (i, k-th), i < k, and (k-th, j), k < j ≤ 2k: in the sums the k-th feature nearly cancels.
        best, kth, following = size[:, : k - 1], size[:, k - 1 : k], size[:, k : 2 * k]
        return (best - kth).sum(1) + (kth - following).sum(1)

    if not 1 <= k < saliency_map(x[:1]).shape[1]:
        raise ValueError(f"k={k} must be at least 1 and less than the number of features.")
    judge = _measured("intersection", k)
    return _attack(fn, x, target, eps, clip, model, guide, judge, steps, step_size, restarts, move="normalised", **how)


def mse(
    fn: Fn,
    x: Tensor,
    target: Tensor | None = None,
    *,
    eps: float | Tensor,
    clip: Clip = None,
    model: Model | None = None,
    steps: int = 100,
    step_size: float = 5e-3,
    restarts: int = 1,
    **how: Any,
) -> Attack:
    """R2ET's MSE attack: *maximise* ‖v − v₀‖² by normalised gradient steps from a random start (at x it has no slope).

    Margin: −mean_j (v_j − v₀_j)², measured on the program; broken below 0. ``keep`` as for :func:`er`.
    Source: Chen et al., arXiv 2212.14106 (MSE attack).
    """
    return _attack(
        fn, x, target, eps, clip, model, unlike, unlike, steps, step_size, restarts,
        **{"move": "normalised", "start": "random", "broken_at": 0.0, **how},
    )  # fmt: skip


def unlike(attribution: Tensor, nominal: Tensor) -> Tensor:
    """−mean_j (v_j − v₀_j)² of each sample, [B]: what is descended to get away from the nominal explanation."""
    return -flat(attribution - nominal).square().mean(1)


def _saliency(attribution: Tensor) -> Tensor:
    """As :func:`metrics.saliency_map`, differentiable."""
    size = attribution.abs()
    return flat(size.sum(1) if size.dim() > 2 else size)


def _measured(measure: Measure, k: int) -> Judge:
    if k < 1:
        raise ValueError(f"k={k} must be at least 1.")
    if measure not in ("intersection", "kendall", "spearman"):
        raise ValueError(f"measure={measure!r} is unknown; choose 'intersection', 'kendall' or 'spearman'.")

    def judge(attribution: Tensor, nominal: Tensor) -> Tensor:
        there, here = saliency_map(attribution), saliency_map(nominal)
        if measure == "intersection":
            return intersection(here, there, k)
        return (kendall if measure == "kendall" else spearman)(here, there)

    return judge


def _attack(
    fn: Fn,
    x: Tensor,
    target: Tensor | None,
    eps: float | Tensor,
    clip: Clip,
    model: Model | None,
    guide: Guide,
    judge: Judge,
    steps: int,
    step_size: float,
    restarts: int,
    broken_at: float = 1.0,
    keep: Keep | None = None,
    **how: Any,
) -> Attack:
    """``keep=None`` keeps the label, by judging, where there is a model to tell it."""
    keep = keep or ("ignore" if model is None else "judge")
    return search(
        fn, x, target, eps=eps, clip=clip, model=model, guide=lambda _: guide, judge=lambda _: judge,
        broken=lambda margin: margin < broken_at,
        how=Search(steps=steps, step_size=step_size, restarts=restarts, keep=keep, **how),
    )  # fmt: skip
