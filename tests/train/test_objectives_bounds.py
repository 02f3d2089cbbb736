"""The objectives that bounds make possible: by hand, against certify, and against samples of the box."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyxai_bounds as xb
from pyxai_bounds import explain
from pyxai_bounds.train.objectives import (
    OBJECTIVES,
    box_growth,
    certified_topk,
    explanation_width,
    ibp,
    l2,
    l2_adversarial,
    natural,
    pgd,
    r4,
    rec,
    rec_released,
    topk_hinge,
    unstable_relus,
)
from pyxai_bounds.train.objectives.curvature import explanation_distance
from pyxai_bounds.train.objectives.r4 import feature_mask, ignored_magnitude
from tests.networks import assert_encloses_samples, images, mlp, residual, sample
from tests.train.test_objectives import WIDTHS, tiny
from tests.train.test_objectives import X as TINY_X
from tests.train.test_objectives import Y as TINY_Y

X, Y = images(5, shape=(6,)), torch.tensor([0, 1, 2, 3, 1])


@pytest.mark.parametrize("width", ["squared", "relative", "log-relative"])
def test_the_other_widths_by_hand(width: str) -> None:
    v = explain.gradient(tiny())(TINY_X, TINY_Y).detach().flatten().abs()
    ratios = WIDTHS / v
    expected = {
        "squared": WIDTHS.square().mean(),
        "relative": ratios.mean(),
        "log-relative": torch.log1p(10 * ratios).mean(),
    }[width].item()
    assert explanation_width(tiny(), TINY_X, TINY_Y, 0.2, width=width).item() == pytest.approx(expected, rel=1e-12)


def test_the_relative_width_does_not_reward_a_smaller_network() -> None:
    model = mlp()
    before = {w: explanation_width(model, X, Y, 0.1, width=w).item() for w in ("l2", "relative")}
    with torch.no_grad():
        model[4].weight *= 0.1
    assert explanation_width(model, X, Y, 0.1, width="l2").item() == pytest.approx(0.1 * before["l2"], rel=1e-9)
    assert explanation_width(model, X, Y, 0.1, width="relative").item() == pytest.approx(before["relative"], rel=1e-9)


@pytest.mark.parametrize("of", ["logit", "probability", "loss"])
def test_widths_of_every_explanation_and_their_gradients(of: str) -> None:
    """The gradient of the width reaches the convolutions: the released code re-wraps their weights and loses it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5)
    ).double()  # fmt: skip
    x, y = images(2), torch.tensor([0, 4])
    for width in ("mean", "l2", "squared", "log", "relative", "log-relative"):
        model.zero_grad()
        explanation_width(model, x, y, 0.01, (0.0, 1.0), width=width, of=of).backward()
        weight = model[0].weight
        direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=weight.dtype)
        ends = []
        for step in (1e-6, -2e-6, 1e-6):
            with torch.no_grad():
                weight += step * direction
            ends.append(explanation_width(model, x, y, 0.01, (0.0, 1.0), width=width, of=of).item())
        slope = (weight.grad * direction).sum().item()
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-9) and slope != 0


@pytest.mark.parametrize("functional", ["training", "evaluation"])
def test_the_released_functionals_lie_in_their_bounds(functional: str) -> None:
    """With the released code's own backward pass, which forgets the first ReLU′, they leave them."""
    for model, x, y in ((mlp((6, 20, 4)), X, Y), (residual(), images(2), torch.tensor([1, 3]))):
        fn = explain.released_rec(model, functional)
        logits = model(x).detach()
        chosen = (logits.softmax(1) if functional == "training" else logits).gather(1, y[:, None])
        expected = (chosen - 1).reshape(-1, *[1] * (x.dim() - 1)) * explain.gradient(model)(x, y)
        assert torch.allclose(fn(x, y), expected)
        box = xb.Interval.linf(x, 0.01)
        bounds = assert_encloses_samples(fn, box, y, samples=20)
        loss = rec_released(model, x, y, 0.01, alpha=0.5, functional=functional).item()
        expected_loss = natural(model, x, y).item() + 0.5 * len(x) * bounds.width.mean().item()
        assert loss == pytest.approx(expected_loss, rel=1e-9)
    with pytest.raises(ValueError, match="choose 'training' or 'evaluation'"):
        explain.released_rec(mlp(), "test")  # type: ignore[arg-type]


def test_bounds_hold_for_an_activation_that_is_no_relu() -> None:
    """The released code treats every activation as a ReLU on the way back."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Softplus(3.0), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    assert_encloses_samples(explain.gradient(model), xb.Interval.linf(X, 0.2), Y)
    assert explanation_width(model, X, Y, 0.2, width="mean").item() > 0


# --- ibp --------------------------------------------------------------------------------------------------------


def test_the_worst_logits_lie_above_every_adversary() -> None:
    model = mlp((6, 20, 20, 4))
    worst = ibp(model, X, Y, 0.05, (0.0, 1.0), kappa=0.0).item()
    torch.manual_seed(0)
    assert natural(model, X, Y) < pgd(model, X, Y, 0.05, (0.0, 1.0), steps=20) < worst
    box = xb.Interval.linf(X, 0.05, (0.0, 1.0))
    for seed in range(20):
        assert natural(model, sample(box, seed, corners=True), Y) < worst
    mixed = ibp(model, X, Y, 0.05, (0.0, 1.0), kappa=0.3).item()
    assert mixed == pytest.approx(0.3 * natural(model, X, Y).item() + 0.7 * worst)
    assert ibp(model, X, Y, 0.0).item() == pytest.approx(natural(model, X, Y).item())
    with pytest.raises(ValueError, match="kappa=2"):
        ibp(model, X, Y, 0.1, kappa=2)


def test_ibp_of_a_linear_model_is_exact() -> None:
    model = nn.Linear(6, 2).double()
    # One logit falls by eps‖w‖₁ while the other rises: interval bounds let each do its worst.
    size = model.weight.abs().sum(1)
    logits = model(X).detach()
    y = Y % 2
    worst = logits.clone()
    for i, label in enumerate(y):
        worst[i, label] -= 0.1 * size[label]
        worst[i, 1 - label] += 0.1 * size[1 - label]
    assert ibp(model, X, y, 0.1, kappa=0.0).item() == pytest.approx(F.cross_entropy(worst, y).item(), rel=1e-9)


# --- certified top-k --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return residual()


@pytest.mark.parametrize("channels", ["none", "sum"])
@pytest.mark.parametrize("pairs", ["worst", "all"])
def test_no_hinge_means_certified(network: nn.Module, pairs: str, channels: str) -> None:
    """A hinge of 0 with margin 0 certifies; where no bound straddles 0 the two say the same."""
    model, x, y = network, images(3), torch.tensor([0, 4, 2])
    verdicts = []
    for eps in (0.0, 1e-6, 1e-5, 1e-4, 1e-3):
        for i in range(3):
            one = x[i : i + 1], y[i : i + 1]
            hinge = topk_hinge(model, *one, eps, k=3, margin=0.0, pairs=pairs, channels=channels, scale="linear").item()
            holds = xb.certify(
                explain.gradient(model), *one, eps=eps, property=xb.TopK(3, channels=channels)
            ).holds.item()
            assert hinge > 0 or holds
            verdicts.append((hinge == 0, holds))
    assert {(True, True), (False, False)} <= set(verdicts)


def test_the_hinge_by_hand_and_its_log() -> None:
    model = nn.Sequential(nn.Linear(3, 2)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, -2.0, 2.0], [0.0, 0.0, 0.0]]))
    x, y = torch.zeros(1, 3, dtype=torch.float64), torch.tensor([0])
    norm = math.sqrt(17)
    for pairs, expected in (("worst", 0.5 - 1 / norm), ("all", 0.5 - 1 / norm)):
        found = topk_hinge(model, x, y, 0.1, k=1, margin=0.5, pairs=pairs, scale="linear").item()
        assert found == pytest.approx(expected, rel=1e-12)
        assert topk_hinge(model, x, y, 0.1, k=1, margin=0.5, pairs=pairs).item() == pytest.approx(
            math.log1p(10 * expected)
        )
    # k = 2: two pairs with the third feature, one of them a tie.
    all_pairs = topk_hinge(model, x, y, 0.1, k=2, margin=0.5, scale="linear").item()
    assert all_pairs == pytest.approx((0.5 + (0.5 - 1 / norm)) / 2, rel=1e-12)
    loss = certified_topk(model, x, y, 0.1, k=2, margin=0.5, scale="linear", alpha=0.2).item()
    assert loss == pytest.approx(natural(model, x, y).item() + 0.2 * all_pairs, rel=1e-12)


def test_the_hinge_has_a_slope_where_a_bound_straddles_zero() -> None:
    model = mlp((6, 20, 4))
    hinge = topk_hinge(model, X, Y, 0.5, k=2)
    bounds = xb.bound(explain.gradient(model))(xb.Interval.linf(X, 0.5), Y)
    assert ((bounds.lower < 0) & (bounds.upper > 0)).all()
    hinge.backward()
    assert model[0].weight.grad.abs().max() > 0


def test_training_on_the_hinge_certifies() -> None:
    model = mlp((6, 20, 4))
    property = xb.TopK(2)
    before = xb.certify(explain.gradient(model), X, Y, eps=0.05, property=property).margin.mean()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimiser.zero_grad()
        certified_topk(model, X, Y, 0.05, k=2, alpha=1.0, margin=0.05).backward()
        optimiser.step()
    after = xb.certify(explain.gradient(model), X, Y, eps=0.05, property=property)
    assert after.margin.mean() > before and after.holds.all()


# --- R4 -----------------------------------------------------------------------------------------------------------


def test_r4_bounds_what_the_ignored_features_can_do() -> None:
    model = mlp()
    mask = torch.tensor([True, False, False, True, True, False])
    bounds = xb.bound(explain.gradient(model))(xb.Interval.linf(X, 0.1), Y)
    expected = (bounds.lower.abs() + bounds.upper.abs()).detach()
    straddles = (bounds.lower < 0) & (bounds.upper > 0)
    expected = torch.where(straddles, expected.clamp(min=0), expected)
    at_zero = explain.gradient(model)(X, Y).abs()[:, mask].sum(1).mean().item()
    assert ignored_magnitude(model, X, Y, 0.0, mask=mask).item() == pytest.approx(2 * at_zero)
    found = ignored_magnitude(model, X, Y, 0.1, mask=mask).item()
    assert found == pytest.approx(expected[:, mask].sum(1).mean().item())
    loss = r4(model, X, Y, 0.1, ignore="0,3:5", alpha=0.5).item()
    assert loss == pytest.approx(natural(model, X, Y).item() + 0.5 * found)
    one_each = torch.eye(6, dtype=torch.bool)[:5]
    assert ignored_magnitude(model, X, Y, 0.1, mask=one_each).item() == pytest.approx(
        expected[one_each].sum().item() / 5
    )


def test_training_with_r4_makes_a_model_that_provably_ignores() -> None:
    model = mlp((6, 20, 4))
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-2)
    before = ignored_magnitude(model, X, Y, 0.1, mask=feature_mask("0:2", torch.Size([6]))).item()
    for _ in range(150):
        optimiser.zero_grad()
        r4(model, X, Y, 0.1, ignore="0:2", alpha=1.0).backward()
        optimiser.step()
    after = ignored_magnitude(model, X, Y, 0.1, mask=feature_mask("0:2", torch.Size([6]))).item()
    assert after < before / 10


def test_masks_by_name() -> None:
    mask = feature_mask(" 1, 4:6 ", torch.Size([2, 4]))
    assert mask.flatten().nonzero().flatten().tolist() == [1, 4, 5] and mask.shape == (2, 4)
    for text, message in (
        ("", "names no feature"),
        ("9", "lies outside the 8"),
        ("x", "neither an index"),
        ("3:3", "3:3"),
    ):
        with pytest.raises(ValueError, match=message):
            feature_mask(text, torch.Size([8]))
    with pytest.raises(ValueError, match="mask must be bool"):
        ignored_magnitude(mlp(), X, Y, 0.1, mask=torch.ones(6))


# --- stability ------------------------------------------------------------------------------------------------------


def test_relu_stability_by_hand() -> None:
    # tiny() at 0.1 ± 0.2: inputs of the units are [-0.2, 0.6] and [2.7, 3.1]; at 1 ± 0.2: [1.6, 2.4] and [1.8, 2.2].
    products = torch.tensor([-0.2 * 0.6, 2.7 * 3.1, 1.6 * 2.4, 1.8 * 2.2], dtype=torch.float64)
    expected = -torch.tanh(1 + products).mean().item()
    assert unstable_relus(tiny(), TINY_X, TINY_Y, 0.2).item() == pytest.approx(expected, rel=1e-12)
    linear = nn.Linear(1, 2).double()
    assert unstable_relus(linear, TINY_X, TINY_Y, 0.2).item() == 0 == box_growth(linear, TINY_X, TINY_Y, 0.2).item()


def test_box_growth_by_hand() -> None:
    # One layer with ReLUs: radii 0.4 and 0.2 of inputs of radius 0.2, ratio 2/3.
    assert box_growth(tiny(), TINY_X, TINY_Y, 0.2, tolerance=0.5).item() == 0
    assert box_growth(tiny(), TINY_X, TINY_Y, 0.2, tolerance=1.0).item() == pytest.approx(1 - 2 / 3, rel=1e-12)
    assert box_growth(tiny(), TINY_X, TINY_Y, 0.0, tolerance=1.0).item() == 0
    with pytest.raises(ValueError, match="tolerance=0"):
        box_growth(tiny(), TINY_X, TINY_Y, 0.2, tolerance=0)


@pytest.mark.parametrize("name", ["relu-stability", "tightness"])
def test_training_for_stability_leaves_fewer_unstable_relus(name: str) -> None:
    from pyxai_bounds.certify.metrics import unstable_relu_fraction

    fractions = {}
    for objective in ("natural", name):
        model = mlp((6, 20, 20, 4))
        optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
        options = {} if objective == "natural" else {"alpha": 2.0}
        for _ in range(100):
            optimiser.zero_grad()
            OBJECTIVES[objective](model, X, Y, 0.1, **options).backward()
            optimiser.step()
        fractions[objective] = unstable_relu_fraction(model, X, 0.1)
    assert fractions[name] < fractions["natural"]


# --- L2 -------------------------------------------------------------------------------------------------------------


def test_l2_compares_with_a_random_neighbour_inside_the_box() -> None:
    model = mlp()
    torch.manual_seed(4)
    loss = l2(model, X, Y, 0.3, (0.0, 1.0), alpha=0.5).item()
    torch.manual_seed(4)
    other = (X + 0.3 * (2 * torch.rand_like(X) - 1)).clamp(0, 1)
    v = explain.gradient(model)
    distance = (v(X, Y) - v(other, Y)).square().sum(1).mean().item()
    assert distance > 0 and loss == pytest.approx(natural(model, X, Y).item() + 0.5 * distance)


def test_the_adversarial_l2_ascends() -> None:
    """One of the released attacks descends: its penalty would lie below that of a random neighbour."""
    model = mlp((6, 40, 40, 4))

    def penalty(objective, seed: int, **options: int) -> float:
        torch.manual_seed(seed)
        return (objective(model, X, Y, 0.2, (0.0, 1.0), alpha=1.0, **options) - natural(model, X, Y)).item()

    adversarial = [penalty(l2_adversarial, seed) for seed in range(5)]
    at_random = [penalty(l2, seed) for seed in range(5)]
    assert min(adversarial) > max(at_random)


def test_the_distance_is_differentiable_through_both_explanations() -> None:
    model = mlp()
    explanation_distance(model, X, X.flip(0).contiguous(), Y).backward()
    assert model[0].weight.grad.abs().max() > 0 and model[4].weight.grad.abs().max() > 0


# --- parameter boxes ------------------------------------------------------------------------------------------------


def test_gamma_is_the_whole_relative_radius() -> None:
    """The released code uses gamma / 2 where gamma is claimed, and an absolute box for biases."""
    model = nn.Linear(6, 4).double()
    gamma = 0.1
    found = explanation_width(model, X, Y, 0.0, width="mean", gamma=gamma).item()
    expected = 2 * gamma * model.weight[Y].abs().mean().item()
    assert found == pytest.approx(expected, rel=1e-9)
    assert rec(model, X, Y, 0.0, gamma=gamma).isfinite()


def test_gamma_must_be_a_fraction() -> None:
    with pytest.raises(ValueError, match="gamma=-1"):
        rec(mlp(), X, Y, 0.1, gamma=-1)
