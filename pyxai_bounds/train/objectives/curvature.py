"""Baselines that smooth the explanation: its curvature, or how far it moves between neighbours."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from pyxai_bounds import attack, explain
from pyxai_bounds.train.objectives.adversarial import natural
from pyxai_bounds.train.objectives.shared import Clip, deployed, norms, per_sample, sign_ascent

HessianMethod = Literal["hutchinson", "finite-difference", "exact"]


def l2(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    clip: Clip = None,
    *,
    alpha: float = 0.1,
    of: explain.Of = "logit",
) -> Tensor:
    """CE + alpha · mean_b ‖v(x) − v(x + u)‖²₂ with u uniform in the box of radius eps, drawn anew at every step.

    Source: a baseline of Wicker et al., ICLR 2023 (arXiv 2212.08507).
    """
    other = x + eps * (2 * torch.rand_like(x) - 1)
    other = other if clip is None else other.clamp(*clip)
    return natural(model, x, y) + alpha * explanation_distance(model, x, other, y, of=of)


def l2_adversarial(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    clip: Clip = None,
    *,
    alpha: float = 0.1,
    of: explain.Of = "logit",
    steps: int = 10,
    step_size: float = 0.0,
    beta: float = 5.0,
) -> Tensor:
    """CE + alpha · mean_b max_u ‖v(x) − v(x + u)‖²₂: the maximum by ``steps`` ascending sign steps from a random start.

    The steps follow the smooth twin of the explanation, softplus(beta) for ReLU, since a ReLU network's own is
    piecewise constant; the penalty is that of the network itself. step_size in the units of x, 0 for 2.5·eps / steps.
    Source: a baseline of Wicker et al., ICLR 2023 (arXiv 2212.08507).
    """
    explanation = explain.gradient(model, of)
    with deployed(model):
        twin = attack.smooth(explanation, x, y, beta=beta)
        nominal = twin(x, y).detach()
        worst = sign_ascent(
            lambda at: (twin(at, y) - nominal).square().sum(), x, eps, clip, steps=steps, step_size=step_size
        )
    return natural(model, x, y) + alpha * explanation_distance(model, x, worst, y, of=of)


def explanation_distance(model: nn.Module, x: Tensor, other: Tensor, y: Tensor, *, of: explain.Of = "logit") -> Tensor:
    """mean_b ‖v(x) − v(x′)‖²₂, differentiable in the parameters through both explanations."""
    with deployed(model):
        v = explain.gradient(model, of)
        return per_sample(v(x, y) - v(other, y)).square().sum(1).mean()


def hessian(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float = 0.0,
    clip: Clip = None,
    *,
    alpha: float = 0.1,
    method: HessianMethod = "hutchinson",
    of: explain.Of = "loss",
    samples: int = 1,
    h: float = 1e-3,
) -> Tensor:
    """CE + alpha · mean_b ‖H_b‖²_F with H the Hessian of the score in x; eps and clip play no part.

    See :func:`hessian_norm` for the methods. A ReLU network's logit has no curvature almost everywhere: explain the
    loss or the probability, or train with softplus (``train.transform.softplus``).
    Source: a baseline of Wicker et al., ICLR 2023 (arXiv 2212.08507), and of Chen et al., arXiv 2212.14106 (Exact-H).
    """
    return natural(model, x, y) + alpha * hessian_norm(model, x, y, method=method, of=of, samples=samples, h=h)


def hessian_norm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float = 0.0,
    clip: Clip = None,
    *,
    method: HessianMethod = "hutchinson",
    of: explain.Of = "loss",
    samples: int = 1,
    h: float = 1e-3,
) -> Tensor:
    """mean_b ‖H_b‖²_F, estimated or exact, differentiable in the parameters.

    ``hutchinson``         E ‖Hu‖² over ``samples`` random sign vectors u: unbiased, since E uuᵀ = 1
    ``finite-difference``  the same with Hu ≈ (v(x + h·u) − v(x)) / h, which needs no third derivative of the network
    ``exact``              D Hessian–vector products, one per feature: for small D
    """
    if samples < 1 or not h > 0:
        raise ValueError(f"The Hessian needs samples ≥ 1 and h > 0, got samples={samples} and h={h}.")
    if method not in ("hutchinson", "finite-difference", "exact"):
        raise ValueError(f"method={method!r} is unknown; choose 'hutchinson', 'finite-difference' or 'exact'.")
    v = explain.gradient(model, of)
    with deployed(model), torch.enable_grad():  # in a validation without gradients, too, v must be differentiable in x
        if method == "finite-difference":
            here = v(x, y)
            directions = [_signs(x) for _ in range(samples)]
            products = [(v(x + h * u, y) - here) / h for u in directions]
        else:
            x = x.detach().requires_grad_()
            here = v(x, y)
            directions = [_signs(x) for _ in range(samples)] if method == "hutchinson" else _basis(x)
            products = [_product(here, x, u) for u in directions]
    squares = torch.stack([per_sample(product).square().sum(1) for product in products])
    return (squares.sum(0) if method == "exact" else squares.mean(0)).mean()


def est_h(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float = 0.0,
    clip: Clip = None,
    *,
    alpha: float = 1.0,
    h: float = 1e-3,
) -> Tensor:
    """CE + alpha · Est-H, R2ET's baseline without its ranking term; eps and clip play no part.

    Source: Chen et al., arXiv 2212.14106 (Est-H), after Moosavi-Dezfooli et al., CVPR 2019 (CURE).
    """
    return natural(model, x, y) + alpha * sign_curvature(model, x, y, h=h)


def sign_curvature(
    model: nn.Module, x: Tensor, y: Tensor, eps: float = 0.0, clip: Clip = None, *, h: float = 1e-3
) -> Tensor:
    """Est-H: mean_b ‖(g(x + h·s/√D) − g(x)) / h‖₂ ≈ ‖H s/√D‖₂, with g = ∂CE/∂x, s = sign(g) and D the features of x."""
    if not h > 0:
        raise ValueError(f"h={h} must be positive.")
    g = explain.gradient(model, "loss")
    with deployed(model):
        here = g(x, y)
        direction = here.detach().sign() / max(x[0].numel(), 1) ** 0.5
        return (norms(g(x + h * direction, y) - here) / h).mean()


def ssr(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float = 0.0,
    clip: Clip = None,
    *,
    alpha: float = 0.3,
    iterations: int = 10,
) -> Tensor:
    """Smooth surface regularisation: CE + alpha · mean_b of the largest eigenvalue of ∂²CE/∂x²; eps, clip: no part.

    By ``iterations`` of the power method on Hessian–vector products from a random start; the eigenvector is a constant
    for the gradient. The cross entropy of a ReLU network has the Hessian Jᵀ(diag p − ppᵀ)J, which has no negative
    eigenvalue; of a smooth network's eigenvalues it is the largest by magnitude.
    Source: Wang et al., "Smoothed geometry for robust attribution", NeurIPS 2020.
    """
    return natural(model, x, y) + alpha * largest_curvature(model, x, y, iterations=iterations)


def largest_curvature(
    model: nn.Module, x: Tensor, y: Tensor, eps: float = 0.0, clip: Clip = None, *, iterations: int = 10
) -> Tensor:
    """mean_b ‖Hu‖₂ for the unit vector u that the power method finds: from below, the largest |eigenvalue| of H."""
    if iterations < 1:
        raise ValueError(f"iterations={iterations}: the power method needs at least one.")
    with deployed(model), torch.enable_grad():
        x = x.detach().requires_grad_()
        slope = explain.gradient(model, "loss")(x, y)
        u = _unit(torch.randn_like(x))
        for _ in range(iterations):
            u = _unit(_product(slope, x, u, create_graph=False))
        return norms(_product(slope, x, u)).mean()


def _product(gradient: Tensor, x: Tensor, u: Tensor, create_graph: bool = True) -> Tensor:
    """Hu of every sample, where ``gradient`` is differentiable in x; zero where it does not depend on x."""
    if not gradient.requires_grad:
        return torch.zeros_like(x)
    product = torch.autograd.grad(gradient, x, u, create_graph=create_graph, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(x) if product is None else product


def _unit(t: Tensor) -> Tensor:
    length = norms(t.detach()).clamp(min=torch.finfo(t.dtype).tiny)
    return t.detach() / length.reshape(-1, *[1] * (t.dim() - 1))


def _signs(x: Tensor) -> Tensor:
    return 2 * torch.randint_like(x, 2).detach() - 1


def _basis(x: Tensor) -> list[Tensor]:
    """The unit vectors of one sample, each for the whole batch."""
    unit = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device)
    return [row.reshape(x.shape[1:]).expand_as(x) for row in unit]
