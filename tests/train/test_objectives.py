"""Objectives: the loss by hand on a network small enough for that, and its gradient by finite differences."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyxai_bounds.train import explanation_width, linear_ramp, natural, rec


def tiny() -> nn.Sequential:
    """f(x) = V relu(w x + b), one input, two hidden units, two classes."""
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0], [-1.0]]))
        model[0].bias.copy_(torch.tensor([0.0, 3.0]))
        model[2].weight.copy_(torch.tensor([[1.0, 4.0], [0.5, -3.0]]))
        model[2].bias.zero_()
    return model


X = torch.tensor([[0.1], [1.0]], dtype=torch.float64)
Y = torch.tensor([0, 1])
# At eps 0.2: unit 0 has input 2x, in [-0.2, 0.6] (unstable) for x = 0.1 and positive for x = 1; unit 1 is active.
# d f_y / d x = Σ_h V[y, h] · relu' · w[h]: sample 0 is [0, 1]·1·2 + 4·(-1), width 2; sample 1 is a point, width 0.
WIDTHS = torch.tensor([2.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize(("width", "expected"), [("mean", 1.0), ("l2", 1.0), ("log", math.log(1 + 10 * 2.0) / 2)])
def test_rec_is_cross_entropy_plus_alpha_times_the_width(width, expected):
    model = tiny()
    assert explanation_width(model, X, Y, 0.2, width=width).item() == pytest.approx(expected, rel=1e-12)
    loss = rec(model, X, Y, 0.2, alpha=0.7, width=width)
    assert loss.item() == pytest.approx(F.cross_entropy(model(X), Y).item() + 0.7 * expected, rel=1e-12)


def test_the_clip_range_narrows_the_box():
    # Clipped at 0 the input of unit 0 is [0, 0.6]; relu'(0) = 0, so it stays unstable. Clipped at 0.05 it does not.
    assert explanation_width(tiny(), X, Y, 0.2, clip=(0.0, 2.0)).item() > 0
    assert explanation_width(tiny(), X, Y, 0.2, clip=(0.05, 2.0)).item() == 0


def test_a_linear_network_has_nothing_to_narrow():
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 3))
    x, y = torch.rand(4, 6), torch.tensor([0, 1, 2, 0])
    for width in ("mean", "l2", "log"):
        assert torch.equal(rec(model, x, y, 0.1, width=width), natural(model, x, y))


@pytest.mark.parametrize("width", ["mean", "l2", "log"])
def test_the_gradient_is_that_of_finite_differences(width):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    x, y = torch.rand(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 1])

    def loss() -> torch.Tensor:
        return rec(model, x, y, 0.05, (0.0, 1.0), alpha=1.0, width=width)

    loss().backward()
    for weight in (model[0].weight, model[2].weight):
        direction = torch.randn_like(weight)
        with torch.no_grad():
            weight += 1e-6 * direction
            above = loss()
            weight -= 2e-6 * direction
            below = loss()
            weight += 1e-6 * direction
        slope = (weight.grad * direction).sum().item()
        assert slope == pytest.approx(((above - below) / 2e-6).item(), rel=1e-5, abs=1e-8)


def test_an_unknown_width_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"width='max'.*mean, l2, log"):
        rec(tiny(), X, Y, 0.1, width="max")


def test_the_ramp_is_a_line_that_stops():
    assert [linear_ramp(step, 4, 0.8) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    assert linear_ramp(0, 0, 0.5) == 0.5
