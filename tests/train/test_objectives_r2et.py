"""R2ET: pair sets against brute force over each sample, the Hessian estimators against the exact Hessian."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pyxai_bounds as xb
from pyxai_bounds import data
from pyxai_bounds.train import fit
from pyxai_bounds.train.objectives import (
    est_h,
    extreme_gaps,
    hessian,
    hessian_norm,
    largest_curvature,
    natural,
    r2et,
    r2et_mm,
    ranking_gaps,
    sign_curvature,
    ssr,
)
from tests.networks import images, mlp

TABLE, LABELS = images(5, shape=(6,)), torch.tensor([0, 1, 2, 3, 1])
IMAGES = images(4, shape=(2, 3, 3))


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 4)
    ).double()


def smooth_network(features: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(features, 9), nn.Softplus(2.0), nn.Linear(9, 7), nn.Softplus(2.0), nn.Linear(7, 4)
    ).double()


CASES = [("table", mlp, TABLE, LABELS), ("images", convolutional, IMAGES, LABELS[:4])]


def saliency(model: nn.Module, x: Tensor, y: Tensor) -> list[list[float]]:
    """I of each sample, on its own: Σ over channels of |∂CE/∂x|."""
    rows = []
    for i in range(len(x)):
        at = x[i : i + 1].clone().requires_grad_()
        gradient = torch.autograd.grad(F.cross_entropy(model(at), y[i : i + 1]), at)[0].abs()[0]
        rows.append((gradient.sum(0) if gradient.dim() == 3 else gradient).flatten().tolist())
    return rows


def pairs(saliencies: list[float], k: int) -> list[tuple[int, int]]:
    """P by its definition: of all pairs of features, those where one is the k-th, or follows it by at most k ranks."""
    rank = {feature: r for r, feature in enumerate(sorted(range(len(saliencies)), key=lambda f: -saliencies[f]), 1)}
    return [
        (i, j)
        for i, j in itertools.permutations(rank, 2)
        if (rank[j] == k and rank[i] < k) or (rank[i] == k and k < rank[j] <= 2 * k)
    ]


@pytest.mark.parametrize(("name", "network", "x", "y"), CASES, ids=[case[0] for case in CASES])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_the_pairs_are_those_of_a_brute_force_construction(name, network, x: Tensor, y: Tensor, k: int) -> None:
    model = network()
    expected = 0.0
    for row in saliency(model, x, y):
        expected += sum(row[j] - row[i] for i, j in pairs(row, k))
    assert expected < 0
    assert ranking_gaps(model, x, y, k=k).item() == pytest.approx(expected / len(x), rel=1e-10)
    loss = r2et(model, x, y, k=k, weight=0.3, hessian_weight=0.0, adaptive=False)
    assert loss.item() == pytest.approx(natural(model, x, y).item() + 0.3 * expected / len(x), rel=1e-10)


@pytest.mark.parametrize(("name", "network", "x", "y"), CASES, ids=[case[0] for case in CASES])
@pytest.mark.parametrize(("k", "extremes"), [(1, 1), (3, 2), (4, 9)])
def test_the_extremes_are_those_of_each_sample(name, network, x: Tensor, y: Tensor, k: int, extremes: int) -> None:
    """The released min–max form gathers from a sorted tensor and slices the batch: its pairs mix up the samples."""
    model = network()
    expected = []
    for row in saliency(model, x, y):
        ranked = sorted(row, reverse=True)
        top, rest = ranked[:k], ranked[k:]
        expected.append(sum(rest[:extremes]) - sum(top[-extremes:]))
    assert extreme_gaps(model, x, y, k=k, extremes=extremes).item() == pytest.approx(sum(expected) / len(x), rel=1e-10)
    for i in range(len(x)):
        one = extreme_gaps(model, x[i : i + 1], y[i : i + 1], k=k, extremes=extremes)
        assert one.item() == pytest.approx(expected[i], rel=1e-10)
    loss = r2et_mm(model, x, y, k=k, extremes=extremes, weight=0.3, hessian_weight=0.0, adaptive=False)
    assert loss.item() == pytest.approx(natural(model, x, y).item() + 0.3 * sum(expected) / len(x), rel=1e-10)


def test_descending_the_gaps_widens_them() -> None:
    for term in (ranking_gaps, extreme_gaps):
        model = smooth_network()
        before = term(model, TABLE, LABELS, k=2)
        before.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 1e-3 * parameter.grad
        assert term(model, TABLE, LABELS, k=2) < before


def test_adaptive_weights() -> None:
    """w ← |w (CE + 1) / R|, a constant: the term then has the size w (CE + 1), and its own gradient's direction."""
    model = smooth_network()
    entropy = natural(model, TABLE, LABELS)
    gaps = ranking_gaps(model, TABLE, LABELS, k=2)
    loss = r2et(model, TABLE, LABELS, k=2, weight=0.5, hessian_weight=0.0, adaptive=True)
    assert gaps < 0
    assert loss.item() == pytest.approx(entropy.item() - 0.5 * (entropy.item() + 1), rel=1e-10)
    w = abs(0.5 * (entropy.item() + 1) / gaps.item())
    expected = torch.autograd.grad(entropy + w * gaps, model[0].weight)[0]
    assert torch.allclose(torch.autograd.grad(loss, model[0].weight)[0], expected)
    both = r2et(model, TABLE, LABELS, k=2, weight=0.5, hessian_weight=0.25, adaptive=True)
    assert both.item() == pytest.approx(loss.item() + 0.25 * (entropy.item() + 1), rel=1e-10)


def test_the_defaults_leave_the_task_learnt() -> None:
    """The gaps have no lower bound: with a weight of 1, the accuracy of this network falls to that of guessing."""
    digits = data.load("digits")
    torch.manual_seed(0)
    for objective in (r2et, r2et_mm):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        fit(model, digits.train_x, digits.train_y, objective, epochs=15, lr=2e-3)
        with torch.no_grad():
            assert (model(digits.test_x).argmax(1) == digits.test_y).double().mean() > 0.85


def test_more_top_features_than_there_are() -> None:
    for call in (lambda: r2et(mlp(), TABLE, LABELS, k=6), lambda: r2et_mm(mlp(), TABLE, LABELS, k=9)):
        with pytest.raises(ValueError, match="top features of 6: give 1 ≤ k < 6"):
            call()


# --- curvature ------------------------------------------------------------------------------------------------


def exact_hessians(model: nn.Module, x: Tensor, y: Tensor, of: str = "loss") -> list[Tensor]:
    """By PyTorch, of one sample after the other, as D × D matrices."""

    def score(at: Tensor, label: Tensor) -> Tensor:
        logits = model(at[None])
        if of == "loss":
            return F.cross_entropy(logits, label)
        return (logits if of == "logit" else logits.softmax(1))[0, label[0]]

    found = [torch.autograd.functional.hessian(lambda at, i=i: score(at, y[i : i + 1]), x[i]) for i in range(len(x))]
    return [h.reshape(x[0].numel(), x[0].numel()) for h in found]


@pytest.mark.parametrize("of", ["loss", "logit", "probability"])
def test_the_exact_hessian_norm(of: str) -> None:
    model = smooth_network()
    expected = torch.stack([h.square().sum() for h in exact_hessians(model, TABLE, LABELS, of)]).mean().item()
    assert hessian_norm(model, TABLE, LABELS, method="exact", of=of).item() == pytest.approx(expected, rel=1e-10)
    image_model = nn.Sequential(nn.Flatten(), smooth_network(18))
    expected = torch.stack([h.square().sum() for h in exact_hessians(image_model, IMAGES, LABELS, of)]).mean().item()
    assert hessian_norm(image_model, IMAGES, LABELS[:4], method="exact", of=of).item() == pytest.approx(expected)


def test_hutchinson_is_unbiased_over_all_sign_vectors_and_close_with_many_samples(monkeypatch) -> None:
    model = smooth_network()
    exact = hessian_norm(model, TABLE, LABELS, method="exact").item()
    torch.manual_seed(0)
    assert hessian_norm(model, TABLE, LABELS, samples=400).item() == pytest.approx(exact, rel=0.1)
    torch.manual_seed(0)
    assert hessian_norm(model, TABLE, LABELS, samples=1).item() != pytest.approx(exact, rel=1e-3)
    signs = iter([torch.tensor(s, dtype=TABLE.dtype).expand_as(TABLE) for s in itertools.product((-1, 1), repeat=6)])
    monkeypatch.setattr("pyxai_bounds.train.objectives.curvature._signs", lambda x: next(signs))
    assert hessian_norm(model, TABLE, LABELS, samples=64).item() == pytest.approx(exact, rel=1e-10)


def test_finite_differences_approach_hutchinson_in_the_same_directions() -> None:
    model = smooth_network()
    torch.manual_seed(0)
    expected = hessian_norm(model, TABLE, LABELS, samples=3).item()
    errors = []
    for h in (1e-2, 1e-4):
        torch.manual_seed(0)
        found = hessian_norm(model, TABLE, LABELS, samples=3, method="finite-difference", h=h).item()
        errors.append(abs(found / expected - 1))
    assert errors[1] < 1e-3 and errors[1] < errors[0] / 10


@pytest.mark.parametrize("shape", [(6,), (2, 3, 3)])
def test_est_h_divides_by_the_square_root_of_the_number_of_features_there_are(shape: tuple[int, ...]) -> None:
    """The released code divides by 3072, whatever the data: right for CIFAR-10 with a square root at most."""
    x = images(4, shape=shape)
    y, features = LABELS[:4], x[0].numel()
    model = nn.Sequential(nn.Flatten(), smooth_network(features))
    signs = xb.explain.gradient(model, "loss")(x, y).sign().flatten(1).detach()
    products = [h @ s / features**0.5 for h, s in zip(exact_hessians(model, x, y), signs, strict=True)]
    expected = torch.stack([product.norm() for product in products]).mean().item()
    errors = [abs(sign_curvature(model, x, y, h=h).item() / expected - 1) for h in (1e-1, 1e-5)]
    assert errors[1] < 1e-4 and errors[1] < errors[0]
    loss = est_h(model, x, y, alpha=0.5, h=1e-5).item()
    assert loss == pytest.approx(natural(model, x, y).item() + 0.5 * expected, rel=1e-4)


@pytest.mark.parametrize("network", [smooth_network, mlp])
def test_ssr_penalises_the_largest_eigenvalue(network) -> None:
    model = network()
    largest = [torch.linalg.eigvalsh(h)[-1] for h in exact_hessians(model, TABLE, LABELS)]
    if network is mlp:  # piecewise linear: the Hessian is Jᵀ (diag p − p pᵀ) J
        for x, value in zip(TABLE, largest, strict=True):
            jacobian = torch.autograd.functional.jacobian(lambda at: model(at[None])[0], x)
            p = model(x[None])[0].softmax(0)
            assert torch.linalg.eigvalsh(jacobian.T @ (p.diag() - p.outer(p)) @ jacobian)[-1].item() == pytest.approx(
                value.item(), rel=1e-9
            )
    else:
        largest = [torch.linalg.eigvalsh(h).abs().max() for h in exact_hessians(model, TABLE, LABELS)]
    torch.manual_seed(0)
    found = largest_curvature(model, TABLE, LABELS, iterations=300).item()
    assert found == pytest.approx(torch.stack(largest).mean().item(), rel=1e-6)
    assert largest_curvature(model, TABLE, LABELS, iterations=1).item() < found
    torch.manual_seed(0)
    loss = ssr(model, TABLE, LABELS, alpha=2.0, iterations=300).item()
    assert loss == pytest.approx(natural(model, TABLE, LABELS).item() + 2 * found, rel=1e-9)


@pytest.mark.parametrize("term", [hessian_norm, sign_curvature, largest_curvature])
def test_the_gradient_of_a_curvature_is_that_of_finite_differences(term) -> None:
    model = mlp() if term is largest_curvature else smooth_network()  # one with a gap between its eigenvalues
    options = {"method": "exact"} if term is hessian_norm else {}
    options |= {"iterations": 300} if term is largest_curvature else {}

    def value() -> Tensor:
        torch.manual_seed(0)
        return term(model, TABLE, LABELS, **options)

    value().backward()
    weight = model[0].weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=weight.dtype)
    ends = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            weight += step * direction
        ends.append(value().item())
    assert (weight.grad * direction).sum().item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-3, abs=1e-7)


def test_a_relu_networks_logit_has_no_curvature() -> None:
    for method in ("hutchinson", "exact", "finite-difference"):
        assert hessian_norm(mlp(), TABLE, LABELS, method=method, of="logit", h=1e-9).item() < 1e-9
    assert hessian(mlp(), TABLE, LABELS, alpha=1.0).item() > natural(mlp(), TABLE, LABELS).item()


def test_bad_options() -> None:
    model = smooth_network()
    for call, message in (
        (lambda: hessian_norm(model, TABLE, LABELS, method="guess"), "method='guess'"),
        (lambda: hessian_norm(model, TABLE, LABELS, samples=0), "samples=0"),
        (lambda: sign_curvature(model, TABLE, LABELS, h=0.0), "h=0.0"),
        (lambda: largest_curvature(model, TABLE, LABELS, iterations=0), "iterations=0"),
        (lambda: extreme_gaps(model, TABLE, LABELS, extremes=0, k=2), "extremes=0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
