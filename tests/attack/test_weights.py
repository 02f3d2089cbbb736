"""The attack on weights: it stays within gamma of each weight, and shows the explanation of the weights it returns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pyxai_bounds as xb
from pyxai_bounds import attack
from tests.attack.test_attacks import convolutional
from tests.networks import images, mlp

X, Y = images(5, shape=(6,)), torch.tensor([0, 1, 2, 3, 1])


@pytest.mark.parametrize("network", [mlp, convolutional])
@pytest.mark.parametrize("of", ["logit", "loss"])
def test_weights_stay_within_gamma_and_explain_what_is_shown(network, of: str) -> None:
    model = network()
    x, y = (X, Y) if network is mlp else (images(5, shape=(1, 8, 8)), Y)
    fn = xb.explain.gradient(model, of)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = attack.weights(fn, x, y, gamma=0.05, property=xb.MeanSquare(1e-4), steps=8, batch_size=2)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(found.x, x) and found.parameters.keys() == dict(model.named_parameters()).keys()
    for name, value in model.named_parameters():
        moved = (found.parameters[name] - value).abs()
        assert (moved <= 0.05 * value.abs() * (1 + 1e-12)).all() and moved.max() > 0
    for i in range(len(x)):
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.copy_(found.parameters[name][i])
        assert torch.allclose(found.attribution[i], fn(x[i : i + 1], y[i : i + 1])[0], atol=1e-12)
    model.load_state_dict(state)
    nominal = fn(x, y).detach()
    distance = (found.attribution - nominal).square().flatten(1).mean(1)
    assert torch.allclose(found.margin, 1e-4 - distance, atol=1e-12)
    assert (found.broken == (distance > 1e-4)).all()


def test_the_attack_nearly_attains_the_exact_worst_case_of_a_linear_model() -> None:
    """The logit gradient of a linear model is its weight: the worst is gamma·|w| in every entry."""
    model = nn.Linear(6, 4).double()
    found = attack.weights(xb.explain.gradient(model), X, Y, gamma=0.1, property=xb.MeanSquare(0.0))
    exact = (0.1 * model.weight[Y]).square().mean(1)
    assert (-found.margin <= exact * (1 + 1e-12)).all() and (-found.margin >= 0.9 * exact).all()


def test_it_moves_toward_a_target() -> None:
    fn = xb.explain.gradient(mlp())
    toward = 0.2 * torch.ones(6)
    before = (fn(X, Y) - toward).square().mean(1)
    found = attack.weights(fn, X, Y, gamma=0.1, toward=toward, tau=0.01, steps=15)
    assert (found.margin + 0.01 < before).all() and (found.broken == (found.margin <= 0)).all()
    still = attack.weights(fn, X, Y, gamma=0.0, toward=toward, tau=0.01, steps=3)
    assert torch.allclose(still.attribution, fn(X, Y), atol=1e-12)


def test_the_same_seed_gives_the_same_weights() -> None:
    fn = xb.explain.gradient(mlp())
    one, two, other = (
        attack.weights(fn, X, Y, gamma=0.1, property=xb.TopK(2), steps=4, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(one.parameters["0.weight"], two.parameters["0.weight"])
    assert not torch.equal(one.attribution, other.attribution)


@pytest.mark.parametrize("gamma", [1e-3, 1e-2])
def test_a_certificate_over_weights_is_never_broken(gamma: float) -> None:
    model = mlp((6, 12, 4))
    fn = xb.explain.gradient(model)
    box = xb.parameter_box(model, relative=gamma)
    for property in (xb.MeanSquare(1e-3), xb.TopK(2)):
        certificate = xb.certify(fn, X, Y, eps=0.0, property=property, parameters=box)
        found = attack.weights(fn, X, Y, gamma=gamma, property=property)
        assert not (certificate.holds & found.broken).any()
        assert (found.margin >= certificate.margin - 1e-9).all()


def test_bad_options() -> None:
    fn = xb.explain.gradient(mlp())
    for call, message in (
        (lambda: attack.weights(fn, X, Y, gamma=0.1), "either a property"),
        (lambda: attack.weights(fn, X, Y, gamma=1.0, property=xb.TopK(2)), r"gamma=1\.0"),
        (lambda: attack.weights(fn, X, Y, gamma=0.1, property=xb.TopK(2), steps=0), "steps=0"),
        (lambda: attack.weights(lambda x, y: x, X, Y, gamma=0.1, property=xb.TopK(2)), "cannot be found"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
