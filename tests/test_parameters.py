"""Boxes of parameters: what is in them, and that bounds over them hold for every network inside."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import pyxai_bounds as xb
from pyxai_bounds import rounding as rd
from tests.networks import images, mlp, residual, sample


def cnn() -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)).double()


NETWORKS = {"mlp": (mlp, (6,)), "cnn": (cnn, (3, 8, 8)), "residual": (residual, (3, 8, 8))}
KINDS = ["output", "logit", "probability"]


def moved(model: nn.Module, relative: float, absolute: float, direction: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """The model with every parameter moved by direction ∈ [−1, 1] times its radius."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.add_((relative * parameter.abs() + absolute) * direction(name, parameter))
    return other


def random_direction(seed: int, corners: bool) -> Callable[[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def direction(_: str, parameter: Tensor) -> Tensor:
        position = 2 * torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype) - 1
        return position.sign() if corners else position

    return direction


def explained(kind: str, model: nn.Module, y: Tensor) -> Callable[[Tensor], Tensor]:
    if kind == "output":
        return lambda x: model(x)
    return lambda x: xb.explain.gradient(model, of=kind)(x, y)  # type: ignore[arg-type]


@pytest.mark.parametrize("product", ["rump", "exact"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_sampled_and_attacked_weights_stay_inside(name: str, kind: str, product: str) -> None:
    """Rounded outward, with no tolerance: random weights, corners, and the sign attack on one component."""
    make, shape = NETWORKS[name]
    model, x, y = make(), images(2, shape=shape), torch.tensor([0, 3])
    box = xb.Interval.linf(x, 1e-3)
    for relative, absolute in [(0.01, 0.0), (0.0, 1e-3), (0.02, 1e-3)][0 if name == "mlp" else 2 :]:
        parameters = xb.parameter_box(model, relative=relative, absolute=absolute)
        bounds = xb.bound(explained(kind, model, y), sound=True, parameters=parameters, product=product)(box)
        assert bounds.isfinite().all()
        directions = [random_direction(seed, corners=seed % 2 == 0) for seed in range(10)]
        for attacked in range(4):  # the corner that raises or lowers one component fastest
            component = explained(kind, model, y)(x).flatten()[attacked]
            grads = torch.autograd.grad(component, list(model.parameters()), allow_unused=True)
            signs = {
                n: torch.zeros_like(p) if g is None else g.sign() * (-1) ** attacked
                for (n, p), g in zip(model.named_parameters(), grads, strict=True)
            }
            directions.append(lambda n, _, signs=signs: signs[n])
        for seed, direction in enumerate(directions):
            # A hair inside: the moved weights are rounded themselves.
            other = moved(model, relative * (1 - 1e-12), absolute * (1 - 1e-12), direction)
            point = sample(xb.Interval.of(box.mid, box.rad * (1 - 1e-12)), seed, corners=True)
            value = explained(kind, other, y)(point).detach()
            slack = 1e-12 * value.abs().max()  # float64 values against float64 bounds: the value is rounded, too
            assert (bounds.lower <= value + slack).all() and (value - slack <= bounds.upper).all()


def test_relative_mode_reaches_exactly_gamma_times_theta() -> None:
    """Not gamma/2, and biases by the same rule: the radius of one linear layer is Σ gamma |w||x| + gamma |b|."""
    model, x = mlp((6, 4)), images(3, shape=(6,))
    bounds = xb.bound(model, parameters=xb.parameter_box(model, relative=0.1))(x)
    layer = model[0]
    assert torch.allclose(bounds.rad, 0.1 * (x.abs() @ layer.weight.abs().t() + layer.bias.abs()), rtol=1e-12, atol=0)
    corner = moved(
        model, 0.1, 0.0, lambda name, p: torch.ones_like(p) if name == "0.bias" else x[0].sign().expand_as(p)
    )
    reached = corner(x)[0]
    assert torch.allclose(reached, bounds.upper[0].detach(), rtol=1e-12, atol=0)
    only_absolute = xb.bound(model, parameters=xb.parameter_box(model, absolute=0.5))(x)
    assert torch.allclose(only_absolute.rad, 0.5 * (x.abs().sum(1, keepdim=True) + 1).expand(3, 4), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["mlp", "cnn", "residual"])
def test_exact_is_nowhere_wider_than_rump(name: str) -> None:
    make, shape = NETWORKS[name]
    model, box = make(), xb.Interval.linf(images(2, shape=shape), 0.05)
    y = torch.tensor([0, 3])
    parameters = xb.parameter_box(model, relative=0.5, absolute=0.02)
    for kind in KINDS[:2]:
        rump, exact = (
            xb.bound(explained(kind, model, y), parameters=parameters, product=product)(box)
            for product in ("rump", "exact")
        )
        assert (exact.rad <= rump.rad * (1 + 1e-12)).all()
        assert exact.rad.sum() < 0.999 * rump.rad.sum()


def test_exact_equals_the_four_products_of_end_points() -> None:
    """One convolution, every product of an input and a weight bounded by itself; Rump's is the formula of AGT."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3, stride=2, padding=1).double()
    box = xb.Interval.linf(images(2), 0.3)
    parameters = xb.parameter_box(layer, relative=0.2, absolute=0.1)
    rads = [0.2 * p.detach().abs() + 0.1 for p in (layer.weight, layer.bias)]

    def columns(x: Tensor) -> Tensor:
        return torch.nn.functional.unfold(x, 3, padding=1, stride=2).unsqueeze(1)  # [B, 1, k, L]

    def rows(w: Tensor) -> Tensor:
        return w.reshape(1, 4, 27, 1)

    x_ends = [columns(box.mid - box.rad), columns(box.mid + box.rad)]
    w_ends = [rows(layer.weight.detach() - rads[0]), rows(layer.weight.detach() + rads[0])]
    products = torch.stack([x * w for x in x_ends for w in w_ends])
    bias = layer.bias.detach().reshape(1, 4, 1)
    lower = products.amin(0).sum(2) + bias - rads[1].reshape(1, 4, 1)
    upper = products.amax(0).sum(2) + bias + rads[1].reshape(1, 4, 1)
    exact = xb.bound(layer, parameters=parameters, product="exact")(box).detach()
    assert torch.allclose((exact.mid - exact.rad).flatten(2), lower, rtol=1e-12, atol=1e-12)
    assert torch.allclose((exact.mid + exact.rad).flatten(2), upper, rtol=1e-12, atol=1e-12)

    conv = torch.nn.functional.conv2d
    weight = layer.weight.detach()
    rump = conv(box.mid.abs(), rads[0], stride=2, padding=1) + conv(
        box.rad, weight.abs() + rads[0], stride=2, padding=1
    )
    found = xb.bound(layer, parameters=parameters)(box).detach()
    assert torch.allclose(found.rad, rump + rads[1].reshape(1, 4, 1, 1), rtol=1e-12, atol=0)


def test_the_box_moves_with_the_parameters_and_passes_gradients_to_them() -> None:
    model, x = mlp((6, 4)), images(2, shape=(6,))
    bounded = xb.bound(model, parameters=xb.parameter_box(model, relative=0.1))
    before = bounded(x)
    before.rad.sum().backward()
    weight = model[0].weight
    assert torch.allclose(weight.grad, 0.1 * weight.sign() * x.abs().sum(0), rtol=1e-12, atol=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert torch.allclose(bounded(x).rad, 2 * before.rad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("product", ["rump", "exact"])
def test_gradients_in_the_parameters_agree_with_finite_differences(product: str) -> None:
    model = cnn()
    x, y = images(2), torch.tensor([0, 3])
    parameters = xb.parameter_box(model, relative=0.05)
    bounded = xb.bound(explained("logit", model, y), parameters=parameters, product=product)

    def width() -> Tensor:
        return bounded(xb.Interval.linf(x, 1e-3)).rad.sum()

    width().backward()
    weight = model[2].weight
    index = (1, 0, 1, 1)
    h = 1e-6
    with torch.no_grad():
        weight[index] += h
        above = width()
        weight[index] -= 2 * h
        below = width()
        weight[index] += h
    assert weight.grad[index].item() == pytest.approx(((above - below) / (2 * h)).item(), rel=1e-5)


def test_proofs_never_shrink_the_box() -> None:
    """Factors and summands that float32 cannot hold, compared with rational numbers."""
    model = nn.Linear(5, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([1e8, -3.3e37, 0.0, 1e-40, 0.7]))
    for relative, absolute in [(1.9e-45, 0.0), (1e-50, 1e-50), (0.1, 0.3), (1e-3, 1e-44), (0.0, 1e-7)]:
        box = xb.parameter_box(model, relative=relative, absolute=absolute)
        with rd.use(rd.Rounding.OUTWARD):
            found = box.interval(model.weight)
        for weight, rad in zip(model.weight[0].tolist(), found.rad[0].tolist(), strict=True):
            assert Fraction(relative) * abs(Fraction(weight)) + Fraction(absolute) <= Fraction(rad)
            assert rad <= (relative * abs(weight) + absolute) * (1 + 1e-6) + 4 * rd.tiny(torch.float32)


def test_what_is_in_the_box() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.norm = nn.BatchNorm1d(2)
            self.scale = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.layer(x)) * self.scale

    model = Scaled().eval()
    usual = xb.parameter_box(model, relative=0.1)
    assert set(usual.parameters()) == {"layer.weight", "layer.bias", "norm.weight", "norm.bias"}
    assert set(xb.parameter_box(model, exclude="*.bias").parameters()) == {"layer.weight", "norm.weight"}
    assert set(xb.parameter_box(model, include=["scale", "layer.*"]).parameters()) == {
        "scale", "layer.weight", "layer.bias",
    }  # fmt: skip
    x = torch.randn(4, 3)
    scale = xb.bound(model, parameters=xb.parameter_box(model, include="scale", absolute=0.5))(x)
    assert torch.allclose(scale.rad, 0.5 * model.norm(model.layer(x)).abs())
    assert "4 tensors" in repr(usual)


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_parameters_of_which_a_weight_is_made_are_in_the_box(norm: Callable) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)).double().eval()
    box = xb.parameter_box(model, relative=0.02)
    assert set(box.parameters()) == {name for name, _ in model.named_parameters()}
    x = torch.randn(2, 3, dtype=torch.float64)
    bounds = xb.bound(model, parameters=box, sound=True)(x)
    for seed in range(20):
        assert bounds.contains(moved(model, 0.02, 0.0, random_direction(seed, corners=True))(x)).all()
    fixed = xb.bound(model, parameters=xb.parameter_box(model, relative=0.02, exclude="*parametrizations*"))(x)
    assert (fixed.width < bounds.width).all()


def test_bad_boxes_are_refused() -> None:
    model, other = mlp(), mlp()
    with pytest.raises(ValueError, match="relative must be finite and ≥ 0"):
        xb.parameter_box(model, relative=-1.0)
    with pytest.raises(ValueError, match="no parameter is called 'fc'"):
        xb.parameter_box(model, include="fc")
    with pytest.raises(ValueError, match="holds no parameter"):
        xb.parameter_box(nn.ReLU())
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        xb.parameter_box(model.parameters())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="uses none of the parameters in the box"):
        xb.bound(model, parameters=xb.parameter_box(other))(images(2, shape=(6,)))
    with pytest.raises(ValueError, match="product='best' is unknown"):
        xb.bound(model, product="best")  # type: ignore[arg-type]


def test_a_box_does_not_keep_its_model_alive() -> None:
    model = mlp()
    box = xb.parameter_box(model, relative=0.1)
    xb.bound(model, parameters=box)(images(2, shape=(6,)))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    with pytest.raises(ReferenceError, match="no longer exists"):
        box.parameters()


def test_certificates_over_parameter_boxes() -> None:
    model, x, y = mlp(), images(7, shape=(6,)), torch.arange(7) % 4
    fn = xb.explain.gradient(model)
    alone = xb.certify(fn, x, y, eps=1e-3, property=xb.TopK(2))
    small = xb.certify(fn, x, y, eps=1e-3, property=xb.TopK(2), parameters=xb.parameter_box(model, relative=1e-3))
    large = xb.certify(fn, x, y, eps=1e-3, property=xb.TopK(2), parameters=xb.parameter_box(model, relative=0.5))
    assert (small.margin <= alone.margin).all() and (large.margin < small.margin).all()
    assert small.holds.any() and not large.holds.any()
