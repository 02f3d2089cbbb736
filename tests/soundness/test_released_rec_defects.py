"""What was wrong in the code released with REC (Wicker et al., ICLR 2023), one test each that these bounds pass."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import pyxai_bounds as xb
from tests.soundness.programs import outside

pytestmark = pytest.mark.usefixtures("one_thread")


def _violations(model: nn.Module, x: Tensor, eps: float, samples: int) -> int:
    target = torch.zeros(len(x), dtype=torch.long)
    gradient = xb.explain.gradient(model)
    box = xb.Interval.linf(x, eps)
    bounds = xb.bound(gradient, sound=True)(box, target)
    assert (bounds.width > 0).any(), "the box must straddle some ReLU, or the test is blind"
    oracle = xb.explain.gradient(_double(model))
    generator = torch.Generator().manual_seed(0)
    found = 0
    for _ in range(samples):
        position = 2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1
        found += int(outside(bounds, oracle(box.mid.double() + box.rad.double() * position, target)).any())
    return found


def _double(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def test_the_first_hidden_layers_relu_derivative_is_applied() -> None:
    """The released bounds left it out: with one hidden layer, none of 2000 true gradients lay inside."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.rand(2000, 8)
    assert _violations(model, x, 0.05, samples=1) == 0
    # Without that derivative the explanation would be one and the same matrix for every input.
    linear = model[2].weight[0] @ model[0].weight
    true = xb.explain.gradient(model)(x, torch.zeros(2000, dtype=torch.long))
    assert ((true - linear).abs().amax(1) > 1e-3).all()


def test_max_pooling_is_bounded() -> None:
    """The released bounds warned that theirs were not valid."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 3))
    assert _violations(model, torch.rand(8, 1, 8, 8), 0.03, samples=50) == 0
    assert _violations(model, (2 * torch.rand(8, 1, 8, 8)).round() / 2, 0.03, samples=50) == 0


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, nn.Softplus, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU])
def test_no_activation_is_taken_for_relu_on_the_way_back(activation: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), activation(), nn.Linear(12, 3))
    assert _violations(model, 2 * torch.randn(100, 6), 0.05, samples=20) == 0


def test_the_gradient_of_the_bounds_reaches_convolution_weights() -> None:
    """The released code wrapped the weights anew, which cut them off."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    for sound in (False, True):
        model.zero_grad()
        bounds = xb.bound(xb.explain.gradient(model), sound=sound)(
            xb.Interval.linf(torch.rand(4, 1, 8, 8), 0.05), torch.zeros(4, dtype=torch.long)
        )
        bounds.width.sum().backward()
        for layer in (model[0], model[2], model[5]):
            assert layer.weight.grad is not None and layer.weight.grad.abs().max() > 0


@pytest.mark.skipif(not hasattr(xb, "parameter_box"), reason="boxes of parameters do not exist yet")
@pytest.mark.parametrize("layer", [nn.Linear(3, 2), nn.Conv2d(3, 2, 1)])
def test_the_radius_of_parameters_is_gamma_and_relative_for_biases_too(layer: nn.Module) -> None:
    """|θ′ − θ| ≤ gamma·|θ|: the released radius was gamma / 2, and absolute for biases."""
    gamma = 0.1
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5)
        layer.bias.copy_(torch.tensor([10.0, 0.01]))
    x = torch.ones(1, 3) if isinstance(layer, nn.Linear) else torch.ones(1, 3, 1, 1)
    bounds = xb.bound(layer, parameters=xb.parameter_box(layer, relative=gamma), sound=True)(x)
    weight, bias = layer.weight.detach().double().flatten(1), layer.bias.detach().double()
    reach = gamma * (weight.sum(1) + bias)
    value = (weight.sum(1) + bias).reshape(bounds.shape)
    # Attained at the corners of the box, and hardly exceeded.
    assert (bounds.upper.double() >= value + reach.reshape(bounds.shape)).all()
    assert (bounds.lower.double() <= value - reach.reshape(bounds.shape)).all()
    assert torch.allclose(bounds.rad.double().flatten(), reach, rtol=1e-5)
