"""RAR: the loss by hand, the case that is adversarial training, and the certified bound above every search."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pyxai_bounds as xb
from pyxai_bounds.certify.metrics import ig_norm_bound
from pyxai_bounds.train.objectives import (
    OBJECTIVES,
    certified_ig_norm,
    certified_ig_sum_norm,
    ig_norm,
    ig_sum_norm,
    pgd,
)
from pyxai_bounds.train.objectives.shared import sign_ascent
from tests.networks import images, mlp, residual, sample

X, Y = images(5, shape=(6,)), torch.tensor([0, 1, 2, 3, 1])


def riemann(model: nn.Module, x: Tensor, other: Tensor, y: Tensor, m: int) -> Tensor:
    """IG of the loss from x to other by its definition, one step and one sample after the other."""
    rows = []
    for i in range(len(x)):
        total = torch.zeros_like(x[i])
        for k in range(1, m + 1):
            at = (x[i] + k / m * (other[i] - x[i])).detach().requires_grad_()
            total += torch.autograd.grad(F.cross_entropy(model(at[None]), y[i : i + 1]), at)[0]
        rows.append((other[i] - x[i]) / m * total)
    return torch.stack(rows)


def drawn(x: Tensor, eps: float, clip: tuple[float, float]) -> Tensor:
    """The random start: the first draw of the global generator."""
    return (x + eps * (2 * torch.rand_like(x) - 1)).clamp(*clip)


def test_ig_norm_is_the_sum_over_the_batch_of_both_terms() -> None:
    model = mlp()
    torch.manual_seed(3)
    other = drawn(X, 0.1, (0.0, 1.0))
    norms = riemann(model, X, other, Y, 7).abs().sum(1)
    natural = F.cross_entropy(model(X), Y, reduction="none").detach()
    there = F.cross_entropy(model(other), Y, reduction="none").detach()
    options = {"m": 7, "approx_factor": 3, "steps": 0, "weight": 0.4}
    for objective, expected in ((ig_norm, natural + 0.4 * norms), (ig_sum_norm, there + 0.4 * norms)):
        for reduction in ("sum", "mean"):
            torch.manual_seed(3)
            loss = objective(model, X, Y, 0.1, (0.0, 1.0), reduction=reduction, **options)
            assert loss.item() == pytest.approx(getattr(expected, reduction)().item(), rel=1e-10)
    torch.manual_seed(3)
    assert ig_norm(model, X, Y, 0.1, (0.0, 1.0), **options).item() == pytest.approx(
        (natural + 0.4 * norms).sum().item()
    )


def test_the_inner_search_takes_fewer_integration_steps_and_gives_the_parameters_no_gradient() -> None:
    seen = []

    class Recording(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Tensor:
            seen.append((len(x), x.requires_grad))
            return self.net(x)

    model = Recording()
    ig_norm(model, X, Y, 0.1, (0.0, 1.0), m=50, approx_factor=5, steps=3)
    assert [size for size, _ in seen] == [5 * 10] * 3 + [5 * 50, 5]
    assert all(p.grad is None for p in model.parameters())


def test_sign_steps_climb_and_stay_inside() -> None:
    model = mlp((6, 30, 4))
    for clip in (None, (0.0, 1.0)):
        box = xb.Interval.linf(X, 0.2, clip)
        for score in (
            lambda at: F.cross_entropy(model(at), Y, reduction="sum"),
            lambda at: xb.explain.integrated_gradients(model, "loss", steps=5)(at, Y, X).abs().sum(),
        ):
            torch.manual_seed(0)
            start = sign_ascent(score, X, 0.2, clip, steps=0, step_size=0.0)
            torch.manual_seed(0)
            end = sign_ascent(score, X, 0.2, clip, steps=10, step_size=0.0)
            assert score(end) > score(start) and not end.requires_grad
            assert box.contains(end).all() and box.contains(start).all()
    still = sign_ascent(lambda at: at.detach().sum(), X, 0.2, None, steps=3, step_size=0.0, random_start=False)
    assert torch.equal(still, X)


def trained(objective, updates: int, model: nn.Module, **options) -> nn.Module:
    model = copy.deepcopy(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    torch.manual_seed(7)
    for _ in range(updates):
        optimiser.zero_grad()
        objective(model, X, Y, 0.1, (0.0, 1.0), **options).backward()
        optimiser.step()
    return model


def test_size_sum_with_weight_1_is_adversarial_training_step_for_step() -> None:
    start = mlp((6, 20, 20, 4))
    inner = {"steps": 7, "step_size": 0.03, "reduction": "sum"}
    for updates in range(1, 6):
        adversarial = trained(pgd, updates, start, **inner)
        ours = trained(ig_norm, updates, start, size="sum", weight=1.0, **inner)
        for a, b in zip(adversarial.parameters(), ours.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-12)
    natural = trained(lambda *args, **_: OBJECTIVES["natural"](*args) * len(X), 5, start)
    assert not torch.allclose(natural[0].weight, ours[0].weight, atol=1e-3), "the inner search must matter"


def test_completeness_makes_the_riemann_sum_converge_to_what_size_sum_uses() -> None:
    model = mlp((6, 20, 20, 4))
    other = (X + 0.2 * torch.randn(X.shape, generator=torch.Generator().manual_seed(0), dtype=X.dtype)).detach()
    exact = F.cross_entropy(model(other), Y, reduction="none") - F.cross_entropy(model(X), Y, reduction="none")
    errors = [
        (xb.explain.integrated_gradients(model, "loss", steps=m)(other, Y, X).sum(1) - exact).abs().max().item()
        for m in (10, 100, 1000)
    ]
    assert errors[2] < 1e-3 and errors[1] < errors[0] / 4 and errors[2] < errors[1] / 4


@pytest.mark.parametrize("network", ["mlp", "residual", "softplus"])
@pytest.mark.parametrize("clip", [None, (0.0, 1.0)])
def test_no_search_finds_a_larger_norm_than_is_certified(network: str, clip) -> None:
    model = {"mlp": mlp, "residual": residual, "softplus": lambda: nn.Sequential(mlp(), nn.Softplus(3.0))}[network]()
    x, y = (images(3), torch.tensor([0, 4, 2])) if network == "residual" else (X, Y)
    x = x.clone()
    x.flatten(1)[:, 0] = 0.0  # at an end of the clip range, where half of the ball is cut off
    for eps in (0.003, 0.05):
        certified = ig_norm_bound(model, x, y, eps, clip)
        for m in (1, 5, 50):
            found = xb.attack.ig_norm(model, x, y, eps=eps, clip=clip, m=m, steps=10, step_size=eps / 4, restarts=2)
            assert (-found.margin <= certified * (1 + 1e-9)).all()
            assert torch.allclose(riemann(model, x, found.x, y, m), found.attribution, atol=1e-10)
            assert (found.margin < 0).all()
        box = xb.Interval.linf(x, eps, clip)
        for seed in range(10):
            other = sample(box, seed, corners=True)
            norms = xb.explain.integrated_gradients(model, "loss", steps=5)(other, y, x).flatten(1).abs().sum(1)
            assert (norms <= certified * (1 + 1e-9)).all()


def test_the_certified_objectives_lie_above_the_searched_ones() -> None:
    model = mlp((6, 20, 20, 4))
    for searched, certified in ((ig_norm, certified_ig_norm), (ig_sum_norm, certified_ig_sum_norm)):
        below = searched(model, X, Y, 0.05, (0.0, 1.0), weight=0.7, steps=20, reduction="mean").item()
        above = certified(model, X, Y, 0.05, (0.0, 1.0), weight=0.7).item()
        assert below <= above
    at_zero = certified_ig_norm(model, X, Y, 0.0, weight=0.7).item()
    assert at_zero == pytest.approx(F.cross_entropy(model(X), Y).item())


def test_the_certified_bound_is_attained_by_a_linear_model_of_one_feature() -> None:
    """Cross entropy of logits (w·x, 0) is monotone in x, so its slope is largest at an end of the box."""
    model = nn.Linear(1, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0], [0.0]]))
        model.bias.zero_()
    x, y = torch.tensor([[0.2]], dtype=torch.float64), torch.tensor([0])
    # |∂CE/∂x| = 3(1 − p), largest at the lower end; clipped at 0 it is x = 0, and |x′ − x| is largest at the upper end.
    slope = 3 * (1 - torch.sigmoid(torch.tensor(0.0, dtype=torch.float64)))
    assert ig_norm_bound(model, x, y, 0.5, (0.0, 1.0)).item() == pytest.approx(0.5 * slope.item(), rel=1e-6)
    assert ig_norm_bound(model, x, y, 0.5, (0.0, 0.3)).item() == pytest.approx(0.2 * slope.item(), rel=1e-6)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="1 ≤ approx_factor ≤ m"):
        ig_norm(mlp(), X, Y, 0.1, m=4, approx_factor=5)
    with pytest.raises(ValueError, match="size='l2' is unknown"):
        ig_norm(mlp(), X, Y, 0.1, size="l2")
    with pytest.raises(ValueError, match="reduction='max' is unknown"):
        certified_ig_norm(mlp(), X, Y, 0.1, reduction="max")
    with pytest.raises(ValueError, match="steps ≥ 0 and step_size ≥ 0"):
        pgd(mlp(), X, Y, 0.1, step_size=-1.0)
    with pytest.raises(ValueError, match="lies outside clip"):
        pgd(mlp(), X + 1, Y, 0.1, (0.0, 1.0))
    with pytest.raises(ValueError, match=r"gamma=1\.5"):
        certified_ig_norm(mlp(), X, Y, 0.1, gamma=1.5)
