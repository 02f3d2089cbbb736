"""Robust Attribution Regularization: the integrated gradients of the loss between an input and its neighbours.

As published, against the worst neighbour that projected gradient steps find; and certified, against a bound on all.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from pyxai_bounds import explain
from pyxai_bounds.certify.metrics import ig_norm_bound
from pyxai_bounds.train.objectives.adversarial import worst_case_cross_entropy
from pyxai_bounds.train.objectives.shared import Clip, Reduction, bounded, deployed, per_sample, reduced, sign_ascent

Size = Literal["l1", "sum"]


def ig_norm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    clip: Clip = None,
    *,
    weight: float = 1.0,
    m: int = 50,
    approx_factor: int = 5,
    steps: int = 40,
    step_size: float = 0.0,
    random_start: bool = True,
    size: Size = "l1",
    reduction: Reduction = "sum",
) -> Tensor:
    """IG-NORM: Σ_b CE(f(x_b), y_b) + λ · max_{x′} size(IG(x_b, x′)), λ = ``weight``.

    IG is the right Riemann sum of ∂CE/∂x with m steps from x to x′. x′ is found by ``steps`` sign steps of
    ``step_size`` (in the units of x, 0 for 2.5·eps / steps) on IG with m / approx_factor steps, from a random start
    (at x itself, where IG is 0, the L1 norm shows no way); it is a constant for the gradient in the parameters.
    size ``"l1"`` is ‖IG‖₁. ``"sum"`` is Σ_i IG_i, which completeness makes CE(f(x′)) − CE(f(x)) exactly: with weight 1
    the objective is then adversarial training. The published sums over the batch are ``reduction="sum"``.
    Source: Chen et al., NeurIPS 2019, arXiv 1905.09957 (IG-NORM).
    """
    inner = _inner_steps(m, approx_factor)
    with deployed(model):
        worst = sign_ascent(
            lambda at: _size(model, x, at, y, size, inner).sum(),
            x, eps, clip, steps=steps, step_size=step_size, random_start=random_start,
        )  # fmt: skip
        sizes = _size(model, x, worst, y, size, m)
    return reduced(F.cross_entropy(model(x), y, reduction="none") + weight * sizes, reduction)


def ig_sum_norm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    clip: Clip = None,
    *,
    weight: float = 0.1,
    m: int = 50,
    approx_factor: int = 5,
    steps: int = 40,
    step_size: float = 0.0,
    random_start: bool = True,
    size: Size = "l1",
    reduction: Reduction = "sum",
) -> Tensor:
    """IG-SUM-NORM: max_{x′} [Σ_b CE(f(x′_b), y_b) + β · size(IG(x_b, x′_b))], β = ``weight``.

    The options are those of :func:`ig_norm`. Source: the same (IG-SUM-NORM).
    """
    inner = _inner_steps(m, approx_factor)
    with deployed(model):
        worst = sign_ascent(
            lambda at: F.cross_entropy(model(at), y, reduction="sum")
            + weight * _size(model, x, at, y, size, inner).sum(),
            x, eps, clip, steps=steps, step_size=step_size, random_start=random_start,
        )  # fmt: skip
        sizes = _size(model, x, worst, y, size, m)
    return reduced(F.cross_entropy(model(worst), y, reduction="none") + weight * sizes, reduction)


def certified_ig_norm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    clip: Clip = None,
    *,
    weight: float = 1.0,
    gamma: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """CE(f(x), y) + λ · an upper bound on max_{x′} ‖IG(x, x′)‖₁ over the whole box, λ = ``weight``.

    The path from x to x′ lies in the box, so |IG_i| ≤ |x′_i − x_i| · max(|v_L|, |v_U|)_i with [v_L, v_U] the bounds of
    the loss gradient: no search, and no neighbour that a search could miss. It holds for every m.
    """
    with deployed(model):
        bound_on_norm = ig_norm_bound(
            model, x, y, eps, clip, bounds=bounded(explain.gradient(model, "loss"), model, gamma)
        )
    return reduced(F.cross_entropy(model(x), y, reduction="none") + weight * bound_on_norm, reduction)


def certified_ig_sum_norm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    clip: Clip = None,
    *,
    weight: float = 0.1,
    gamma: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """The worst-case cross entropy of the box + β · the bound of :func:`certified_ig_norm`: above every IG-SUM-NORM."""
    with deployed(model):
        bound_on_norm = ig_norm_bound(
            model, x, y, eps, clip, bounds=bounded(explain.gradient(model, "loss"), model, gamma)
        )
    worst = worst_case_cross_entropy(model, x, y, eps, clip, gamma=gamma)
    return reduced(worst + weight * bound_on_norm, reduction)


def _inner_steps(m: int, approx_factor: int) -> int:
    if m < 1 or not 1 <= approx_factor <= m:
        raise ValueError(f"IG needs m ≥ 1 and 1 ≤ approx_factor ≤ m, got m={m} and approx_factor={approx_factor}.")
    return m // approx_factor


def _size(model: nn.Module, x: Tensor, other: Tensor, y: Tensor, size: Size, m: int) -> Tensor:
    """The size of IG(x, other) of each sample, [B]."""
    if size == "sum":
        return F.cross_entropy(model(other), y, reduction="none") - F.cross_entropy(model(x), y, reduction="none")
    if size != "l1":
        raise ValueError(f"size={size!r} is unknown; choose 'l1' or 'sum'.")
    return per_sample(explain.integrated_gradients(model, "loss", steps=m)(other, y, x)).abs().sum(1)
