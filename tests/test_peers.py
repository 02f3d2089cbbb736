"""The engine against the other libraries that bound gradients: the same numbers. Skipped where they are not installed.

``bench/peers/__init__.py`` says how to install them.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyxai_bounds as xb
from bench import models
from bench.peers import agt, auto_lirpa
from tests.networks import images

EPS = 0.05


def installed(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


with_lirpa, with_agt = installed("auto_LiRPA"), installed("abstract_gradient_training")


def small_mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 10))


NETWORKS = {"mlp": (small_mlp, (12,)), "n4": (lambda: models.n4(pixels=8), (3, 8, 8))}


def case(name: str, batch: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, Tensor, Tensor]:
    make, shape = NETWORKS[name]
    return make().to(dtype), images(batch, shape=shape).to(dtype), torch.arange(batch) % 10


def assert_same(ends: tuple[Tensor, Tensor], bounds: xb.Interval, relative: float) -> None:
    """Ends that agree to within ``relative`` of the radius, in the 2-norm."""
    lower, upper = bounds.mid - bounds.rad, bounds.mid + bounds.rad
    assert bounds.rad.min() > 0
    for found, true in zip(ends, (lower, upper), strict=True):
        assert found.shape == true.shape
        assert (found - true).norm() <= relative * bounds.rad.norm()


@with_lirpa
@pytest.mark.parametrize("any_label", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_auto_lirpa_bounds_the_same_gradient(name: str, any_label: bool) -> None:
    model, x, target = case(name, 1)
    ends = auto_lirpa.gradient_bounds(model, x, EPS, target, any_label=any_label)()
    assert_same(ends, xb.bound(xb.explain.gradient(model))(xb.Interval.linf(x, EPS), target), 1e-5)


@with_lirpa
def test_auto_lirpa_takes_a_batch_of_labels_and_refuses_what_crashes_in_it() -> None:
    model, x, target = case("mlp", 3)
    ends = auto_lirpa.any_label(model, x, EPS, target)()
    assert_same(ends, xb.bound(xb.explain.gradient(model))(xb.Interval.linf(x, EPS), target), 1e-5)
    with pytest.raises(NotImplementedError, match="one image at a time"):
        auto_lirpa.gradient_bounds(model, x, EPS, target)
    with pytest.raises(NotImplementedError, match="one image at a time"):
        auto_lirpa.any_label(*case("n4", 2)[:2], EPS, target)


@with_agt
@pytest.mark.parametrize("name", NETWORKS)
def test_agt_bounds_the_same_gradient_and_trains_alike(name: str) -> None:
    model, x, target = case(name, 3)
    lower, upper = agt.gradient_bounds(model, x, EPS, target)()
    bounds = xb.bound(xb.explain.gradient(model))(xb.Interval.linf(x, EPS), target)
    assert_same((lower, upper), bounds, 1e-5)
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    theirs = torch.autograd.grad((upper - lower).square().mean(), weights)
    ours = torch.autograd.grad(bounds.width.square().mean(), weights)
    for a, b in zip(theirs, ours, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


@with_agt
def test_agt_says_what_it_does_not_take() -> None:
    with pytest.raises(NotImplementedError, match="not BatchNorm2d"):
        agt.gradient_bounds(models.residual(width=4), torch.zeros(1, 3, 8, 8), EPS, torch.tensor([0]))


def boxes(*shapes: tuple[int, ...], radius: float, dtype: torch.dtype) -> list[xb.Interval]:
    generator = torch.Generator().manual_seed(0)
    return [
        xb.Interval.of(
            torch.randn(shape, generator=generator, dtype=dtype),
            radius * torch.rand(shape, generator=generator, dtype=dtype),
        )
        for shape in shapes
    ]


def ends_of(*sets: xb.Interval) -> list[Tensor]:
    return [end for box in sets for end in (box.mid - box.rad, box.mid + box.rad)]


def strided(x: Tensor, kernel: Tensor) -> Tensor:
    return F.conv2d(x, kernel, stride=2, padding=1)


@with_agt
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("radius", [0.1, 1.0, 3.0])
def test_products_of_sets_are_as_wide_as_agts(radius: float, dtype: torch.dtype) -> None:
    """Rump's and the exact matrix product, and Rump's convolution: every width, up to rounding. It has no exact
    convolution: ours must not be wider than its only one."""
    from abstract_gradient_training import interval_arithmetic as theirs

    tolerance = 16 * torch.finfo(dtype).eps

    def assert_as_wide(ours: xb.Interval, ends: tuple[Tensor, Tensor]) -> None:
        width = ends[1] - ends[0]
        assert ((2 * ours.rad - width).abs() <= tolerance * width).all()

    a, b = boxes((32, 48), (48, 40), radius=radius, dtype=dtype)
    for product in ("rump", "exact"):
        ours = xb.bound(torch.matmul, product=product)(a, b)
        assert_as_wide(ours, theirs.propagate_matmul(*ends_of(a, b), product))
    x, kernel = boxes((2, 3, 9, 9), (5, 3, 3, 3), radius=radius, dtype=dtype)
    ends = theirs.propagate_conv2d(*ends_of(x, kernel), stride=2, padding=1)
    assert_as_wide(xb.bound(strided, product="rump")(x, kernel), ends)
    exact = xb.bound(strided, product="exact")(x, kernel).rad
    assert (2 * exact <= (1 + tolerance) * (ends[1] - ends[0])).all() and exact.mean() < (ends[1] - ends[0]).mean() / 2


@with_agt
def test_a_box_of_weights_is_bounded_as_agt_bounds_it() -> None:
    """The whole gradient, input and every weight moving: both by Rump's product."""
    model, x, target = case("n4", 2, torch.float64)
    gamma = 1e-4
    bounds = xb.bound(xb.explain.gradient(model), parameters=xb.parameter_box(model, absolute=gamma))(
        xb.Interval.linf(x, EPS), target
    )
    assert_same(agt.gradient_bounds(model, x, EPS, target, gamma=gamma)(), bounds, 1e-9)
