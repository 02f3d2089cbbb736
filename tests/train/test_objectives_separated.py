"""The recipes' objective: its parts by hand, what zero means, and its slope by finite differences."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyxai_bounds import Interval, TopK, certify, explain
from pyxai_bounds.train.objectives.separated import instability, separated_topk, separation


def box(lower, upper):
    return Interval(torch.tensor([lower], dtype=torch.float64), torch.tensor([upper], dtype=torch.float64))


def test_what_is_missing_by_hand():
    # |mid| 4, 3, 1, 0; rad 0.5, 1, 1.5, 0. Top 2: threshold (3 + 1)/2 = 2, norm √26.
    # In the way with margin m = 0.1·√26 ≈ 0.5099: top l = 3.5, 2 → m; rest u = 2.5, 0 → 0.5 + m.
    found = separation(box([3.5, -4.0, -0.5, 0.0], [4.5, -2.0, 2.5, 0.0]), k=2, margin=0.1)
    assert found.item() == pytest.approx((0.5 + 2 * 0.1 * 26**0.5) / 26**0.5, rel=1e-6)


def test_it_is_zero_only_where_the_top_features_are_certified():
    torch.manual_seed(0)
    seen = set()
    for scale in (0.01, 0.1, 1.0):
        mid, rad = torch.randn(60, 8), scale * torch.rand(60, 8)
        for i in range(60):
            one = Interval.of(mid[i : i + 1], rad[i : i + 1])
            zero = separation(one, k=3, margin=0.0).item() == 0
            certified = TopK(3).margin(one.mid, one).item() > 0
            seen.add((zero, certified))
            assert certified or not zero
    assert {(True, True), (False, False)} <= seen


@pytest.mark.parametrize("k", [0, 4, 9])
def test_there_must_be_features_to_separate(k):
    with pytest.raises(ValueError, match=rf"k={k} top features of 4: give 1 ≤ k < 4"):
        separation(box([0.0] * 4, [1.0] * 4), k=k, margin=0.0)


def test_instability_by_hand():
    # |mid| / (2 rad): 0 → 1, 1/2 → 1/2, 1 → 0, 3 → 0; the second layer is stable.
    layers = [
        Interval.of(torch.tensor([[0.0, 1.0, -2.0, 6.0]]), torch.ones(1, 4)),
        Interval.of(torch.full((1, 2), 5.0), torch.full((1, 2), 0.1)),
    ]
    assert instability(layers, reach=2.0).item() == pytest.approx(1.5 / 4 / 2, rel=1e-5)
    with pytest.raises(ValueError, match="no ReLU"):
        instability([], reach=2.0)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 3)).double()


def test_the_parts_are_those_of_separate_bounds():
    from pyxai_bounds import bound
    from pyxai_bounds.certify.metrics import relu_inputs
    from pyxai_bounds.train.objectives import explanation_width

    model = network()
    x, y = torch.rand(5, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
    inside = Interval.linf(x, 0.03, (0.0, 1.0))
    expected = F.cross_entropy(model(x), y)
    expected += 0.2 * separation(bound(explain.gradient(model))(inside, y), 2, 0.01)
    expected += 0.3 * explanation_width(model, x, y, 0.03, (0.0, 1.0), width="log")
    expected += 0.4 * instability(bound(relu_inputs(model))(inside), 3.0)
    loss = separated_topk(model, x, y, 0.03, (0.0, 1.0), k=2, hinge=0.2, margin=0.01, width=0.3, stability=0.4, reach=3)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)


def test_biases_learn_from_stability_alone():
    """The explanation's bounds have no slope in a bias; it is stability that moves units away from their kink."""
    model = network()
    x, y = torch.rand(5, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
    slopes = {}
    for weight in (0.0, 0.5):
        loss = separated_topk(model, x, y, 0.2, k=2, stability=weight) - F.cross_entropy(model(x), y)
        slopes[weight] = torch.autograd.grad(loss, model[0].bias)[0]
    assert slopes[0.0].abs().max() < 1e-12 < slopes[0.5].abs().max()


def test_the_gradient_is_that_of_finite_differences():
    """Of the stability term, whose reference values are not held constant; the others are rec's and by hand above."""
    model = network()
    x, y = torch.rand(4, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 1])

    def loss():
        return separated_topk(model, x, y, 0.05, k=2, hinge=0.0, width=0.2, stability=0.7)

    slope = torch.autograd.grad(loss(), model[2].weight)[0]
    with torch.no_grad():
        for i, j in ((0, 0), (3, 5), (8, 2)):
            model[2].weight[i, j] += 1e-6
            above = loss()
            model[2].weight[i, j] -= 2e-6
            below = loss()
            model[2].weight[i, j] += 1e-6
            assert slope[i, j].item() == pytest.approx((above - below).item() / 2e-6, rel=1e-4, abs=1e-7)


def test_a_few_steps_certify_more():
    model = network().float()
    x, y = torch.rand(40, 6), torch.arange(40) % 3
    options = {"eps": 0.05, "property": TopK(2), "clip": (0.0, 1.0)}
    before = certify(explain.gradient(model), x, y, **options).holds.sum()
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimiser.zero_grad()
        separated_topk(model, x, y, 0.05, (0.0, 1.0), k=2, hinge=1.0).backward()
        optimiser.step()
    assert certify(explain.gradient(model), x, y, **options).holds.sum() > before + 10


def test_batch_norm_is_that_of_the_deployed_network():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2))
    x, y = torch.rand(4, 1, 5, 5), torch.tensor([0, 1, 0, 1])
    separated_topk(model, x, y, 0.01).backward()
    assert model.training and model[1].training
