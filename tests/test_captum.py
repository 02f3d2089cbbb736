"""Captum's methods, called unmodified: their bounds contain the attribution at sampled and attacked points."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from captum.attr import (
    DeepLift,
    FeatureAblation,
    GuidedBackprop,
    InputXGradient,
    IntegratedGradients,
    LayerGradCam,
    LayerIntegratedGradients,
    NeuronConductance,
    Saliency,
)
from torch import Tensor

import pyxai_bounds as xb
from tests.networks import SLACK, assert_encloses, assert_exact_at_zero_radius, images, residual, sample

EPS = 2e-3

# Captum says that it switches gradients on or hooks on; that is no news here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Input Tensor . did not already require gradients"),
    pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU"),
]


def methods() -> dict:
    model = residual()
    saliency, inputs = Saliency(model), InputXGradient(model)
    integrated, guided = IntegratedGradients(model), GuidedBackprop(model)
    cam, layer = LayerGradCam(model, model.conv), LayerIntegratedGradients(model, model.conv)
    neuron = NeuronConductance(model, model.conv)
    return {
        "saliency": lambda x, y: saliency.attribute(x, target=y),
        "signed saliency": lambda x, y: saliency.attribute(x, target=y, abs=False),
        "input x gradient": lambda x, y: inputs.attribute(x, target=y),
        "integrated gradients": lambda x, y: integrated.attribute(x, target=y, n_steps=6),
        "guided backprop": lambda x, y: guided.attribute(x, target=y),
        "layer grad-cam": lambda x, y: cam.attribute(x, target=y, relu_attributions=True),
        "layer integrated gradients": lambda x, y: layer.attribute(x, target=y, n_steps=3),
        "neuron conductance": lambda x, y: neuron.attribute(x, (1, 2, 2), target=y, n_steps=3),
    }


METHODS = methods()  # shared, and so are their captures


@pytest.mark.parametrize("name", METHODS)
def test_bounds_contain_sampled_and_attacked_attributions(name: str) -> None:
    """1,000 sampled points (half of them corners) and 100 attacked ones."""
    method = METHODS[name]
    x, y = images(2), torch.tensor([1, 3])
    box = xb.Interval.linf(x, EPS, clip=(0.0, 1.0))
    bounds = xb.bound(method)(box, y).detach()
    assert bounds.rad.max() > 0
    # The methods explain the samples of a batch independently: many points of the box in one call.
    for batch in range(4):
        points = [sample(box, 250 * batch + i, corners=i % 2 == 0) for i in range(250)]
        assert_all_inside(bounds, method(torch.cat(points), y.repeat(250)).detach())
    # Broken by any deviation, so the attack looks for the greatest; 50 random starts for each image.
    found = xb.attack.pgd(
        method, x.repeat(50, 1, 1, 1), y.repeat(50), eps=EPS, property=xb.Linf(tau=0.0), clip=(0.0, 1.0), steps=8
    )
    assert box.contains(found.x.unflatten(0, (50, 2))).all()
    assert found.broken.any()
    assert_all_inside(bounds, found.attribution)


def assert_all_inside(bounds: xb.Interval, values: Tensor) -> None:
    """``values`` [S·B, ...] against bounds [B, ...]; the slack is that of a single explanation."""
    values = values.unflatten(0, (-1, len(bounds)))
    norm = torch.linalg.vector_norm(values.flatten(1), dim=1).max()
    assert_encloses(bounds, values, SLACK * norm / torch.linalg.vector_norm(values))


@pytest.mark.parametrize("name", METHODS)
def test_radius_zero_reproduces_the_attribution(name: str) -> None:
    method = METHODS[name]
    assert_exact_at_zero_radius(method, images(2), torch.tensor([1, 3]))
    constant = torch.zeros(2, 3, 8, 8, dtype=torch.float64)  # a constant background ties every pooling window
    constant[0, :, 2:5, 3:6] = 0.7
    assert_exact_at_zero_radius(method, constant, torch.tensor([0, 4]))


@pytest.mark.parametrize("name", METHODS)
def test_one_image(name: str) -> None:
    method = METHODS[name]
    x = images(1)
    for y in (torch.tensor([2]), torch.tensor([4])):  # another value must not reuse the first one's graph
        assert_exact_at_zero_radius(method, x, y)
        bounds = xb.bound(method)(xb.Interval.linf(x, EPS), y)
        assert_encloses(bounds, method(sample(xb.Interval.linf(x, EPS), 1, corners=True), y).detach())


def test_groups_of_features_are_arguments() -> None:
    """Captum reads the mask's values: each of them is a capture of its own."""
    method = FeatureAblation(residual())
    x, y = images(1), torch.tensor([1])
    box = xb.Interval.linf(x, EPS)
    for groups in (2, 3):
        mask = torch.arange(8).expand(1, 3, 8, 8) % groups
        bounds = xb.bound(lambda x, y, k: method.attribute(x, target=y, feature_mask=k))(box, y, mask)
        assert_encloses(bounds, method.attribute(sample(box, 1, corners=True), target=y, feature_mask=mask).detach())


def test_the_model_is_left_as_it_was() -> None:
    model = residual()
    guided = GuidedBackprop(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    xb.bound(lambda x, y: guided.attribute(x, target=y))(xb.Interval.point(images(2)), torch.tensor([0, 1]))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._backward_hooks or module._forward_hooks for module in model.modules())


def test_gradients_reach_the_parameters_through_captum() -> None:
    model = residual()
    saliency = Saliency(model)

    def method(x: Tensor, y: Tensor) -> Tensor:
        return saliency.attribute(x, target=y, abs=False)

    bounds = xb.bound(method)(xb.Interval.linf(images(2), EPS), torch.tensor([0, 1]))
    bounds.width.square().sum().backward()
    for name, parameter in model.named_parameters():
        if name.endswith("weight"):
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_the_documented_example_runs() -> None:
    text = (Path(__file__).parents[1] / "docs" / "captum.md").read_text()
    session: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        exec(compile(block, "docs/captum.md", "exec"), session)
    attribution = session["method"].attribute(session["x"], target=session["target"]).detach()
    assert session["bounds"].contains(attribution.double()).all()


@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks")
@pytest.mark.parametrize("stride", [2, 1])
def test_deeplift_passes_max_pooling(stride: int) -> None:
    """It sends what belongs to a window to the window's maximum; windows may share one."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2, stride), torch.nn.Flatten(),
        torch.nn.Linear(2 * (2 if stride == 2 else 3) ** 2, 3),
    ).double().eval()  # fmt: skip
    method = DeepLift(model)
    x, y = images(2, shape=(1, 6, 6)), torch.tensor([0, 2])

    def explain(x: Tensor, y: Tensor) -> Tensor:
        return method.attribute(x, target=y)

    box = xb.Interval.linf(x, 1e-5)
    bounds = xb.bound(explain)(box, y).detach()
    assert bounds.isfinite().double().mean() > 0.5
    for seed in range(50):
        assert_encloses(bounds, explain(sample(box, seed, corners=seed % 2 == 0), y))
    point = xb.bound(explain)(xb.Interval.point(x), y).detach()
    assert ((point.mid - explain(x, y)).abs() <= 1e-9 + point.rad).all()
