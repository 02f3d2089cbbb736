"""Random networks with random explanations: enclosure, exactness, monotonicity, backends, gradients of the bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pyxai_bounds as xb
from pyxai_bounds import ops
from tests.networks import Branches, assert_encloses, assert_exact_at_zero_radius, images, sample

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 4
ACTIVATIONS = [nn.ReLU, nn.LeakyReLU, nn.Hardtanh, lambda: nn.ReLU(inplace=True), nn.ReLU6]


@st.composite
def layer(draw: st.DrawFn, channels: int) -> tuple[nn.Module, int]:
    """A layer on [B, channels, H, W] that keeps images of at least 4×4 larger than 1×1, and its output channels."""
    kind = draw(st.sampled_from(["conv", "conv", "activation", "activation", "norm", "max", "average", "branches"]))
    if kind == "conv":
        groups = draw(st.sampled_from([1, 1, channels]))
        out = channels if groups > 1 else draw(st.integers(1, 4))
        kernel, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        padding = dilation * (kernel // 2) + draw(st.integers(0, 1))
        stride = draw(st.integers(1, 2))
        bias = draw(st.booleans())
        return nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, bias), out
    if kind == "activation":
        return draw(st.sampled_from(ACTIVATIONS))(), channels
    if kind == "norm":
        return nn.BatchNorm2d(channels, affine=draw(st.booleans())), channels
    if kind == "max":
        return nn.MaxPool2d(
            draw(st.integers(2, 3)), draw(st.integers(1, 2)), 1, ceil_mode=draw(st.booleans())
        ), channels
    if kind == "average":
        return nn.AvgPool2d(3, draw(st.integers(1, 2)), 1, count_include_pad=draw(st.booleans())), channels
    if draw(st.booleans()):
        inner = [nn.Conv2d(channels, channels, 3, padding=1), draw(st.sampled_from(ACTIVATIONS))()]
        return Branches(nn.Sequential(*inner), nn.Identity(), concatenate=False), channels
    other = draw(st.integers(1, 2))
    return Branches(nn.Conv2d(channels, other, 3, padding=1), nn.Identity(), concatenate=True), channels + other


@st.composite
def network(draw: st.DrawFn) -> nn.Module:
    channels = 2
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(2, 5))):
        module, channels = draw(layer(channels))
        layers.append(module)
    torch.manual_seed(draw(st.integers(0, 99)))
    body = nn.Sequential(*layers)
    features = body.eval()(torch.zeros(1, 2, 6, 6)).numel()
    model = nn.Sequential(body, nn.Flatten(), nn.Linear(features, 6), nn.ReLU(), nn.Linear(6, CLASSES)).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5)
    return model


EXPLANATIONS: dict[str, Callable[[nn.Module], Callable]] = {
    "logit": lambda m: xb.explain.gradient(m),
    "probability": lambda m: xb.explain.gradient(m, of="probability"),
    "loss": lambda m: xb.explain.gradient(m, of="loss"),
    "gradient × input": lambda m: xb.explain.gradient_x_input(m),
    "integrated gradients": lambda m: xb.explain.integrated_gradients(m, steps=3),
    "smoothgrad": lambda m: xb.explain.smoothgrad(m, of="probability"),
}


@settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    network(), st.sampled_from(sorted(EXPLANATIONS)), st.sampled_from([1e-3, 0.02, 0.3]), st.booleans(), st.booleans()
)
def test_random_networks(model: nn.Module, kind: str, eps: float, channels_last: bool, ties: bool) -> None:
    x = images(2, shape=(2, 6, 6))
    if ties:
        x = (2 * x).round() / 2  # equal neighbours, zeros: kinks everywhere
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    args: list[Tensor] = [torch.tensor([1, 3])]
    if kind == "smoothgrad":
        args.append(0.1 * images(3, seed=5, shape=(2, 2, 6, 6)))
    fn = EXPLANATIONS[kind](model)
    box = xb.Interval.linf(x, eps)
    bounds = xb.bound(fn)(box, *args)
    for seed in range(10):
        assert_encloses(bounds.detach(), fn(sample(box, seed, corners=seed % 2 == 0), *args).detach())
    assert_exact_at_zero_radius(fn, x, *args, tolerance=1e-11)
    sub_box = xb.Interval.linf(sample(xb.Interval.linf(x, eps / 2), 7, corners=True), eps / 2)
    assert_inside(xb.bound(fn)(sub_box, *args), bounds)
    with torch.no_grad():
        assert_same(xb.bound(fn)(box, *args), bounds, 0.0)
    if "native" in ops.available():
        with xb.backend("reference"):
            reference = xb.bound(fn)(box, *args)
        with xb.backend("native"):
            assert_same(xb.bound(fn)(box, *args), reference, 1e-12)


def assert_inside(inner: xb.Interval, outer: xb.Interval) -> None:
    margin = 1e-12 * (outer.mid.abs() + outer.rad).max()
    assert (inner.lower >= outer.lower - margin).all() and (inner.upper <= outer.upper + margin).all()


def assert_same(a: xb.Interval, b: xb.Interval, tolerance: float) -> None:
    scale = (b.mid.abs() + b.rad).max()
    assert (a.mid - b.mid).abs().max() <= tolerance * scale and (a.rad - b.rad).abs().max() <= tolerance * scale


# --- gradients of the bounds against finite differences --------------------------------------------------------


def small(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers).double().eval()


def batch_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    nn.init.uniform_(norm.weight, -1.5, 1.5)
    nn.init.normal_(norm.running_mean, std=0.3)
    return norm


TRAINED: dict[str, Callable[[], nn.Sequential]] = {
    "linear": lambda: small(nn.Flatten(), nn.Linear(50, 7), nn.ReLU(), nn.Linear(7, CLASSES)),
    "conv": lambda: small(nn.Conv2d(2, 3, 3, 2, 1), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2, CLASSES)),
    "batch norm": lambda: small(
        nn.Conv2d(2, 3, 3), batch_norm(3), nn.ReLU(), batch_norm(3), nn.Flatten(), nn.Linear(27, CLASSES)
    ),
    "pools": lambda: small(
        nn.Conv2d(2, 3, 2), nn.MaxPool2d(2, 1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(3, CLASSES)
    ),
    "leaky relu": lambda: small(nn.Conv2d(2, 3, 2), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(48, CLASSES)),
    "gelu": lambda: small(nn.Conv2d(2, 3, 2), nn.GELU(), nn.Flatten(), nn.Linear(48, CLASSES)),
    "silu, tanh": lambda: small(nn.Conv2d(2, 3, 2), nn.SiLU(), nn.Flatten(), nn.Linear(48, 5), nn.Tanh(),
                                nn.Linear(5, CLASSES)),
}  # fmt: skip


@pytest.mark.parametrize("of", ["logit", "probability", "loss"])
@pytest.mark.parametrize("name", TRAINED)
def test_gradients_of_the_bounds(name: str, of: Any) -> None:
    """A weighted sum of all midpoints and radii, differentiated in the parameters and in the box."""
    torch.manual_seed(1)
    model = TRAINED[name]()
    x, rad = images(2, shape=(2, 5, 5)), torch.full((2, 2, 5, 5), 0.03, dtype=torch.float64)
    target = torch.tensor([1, 3])
    fn = xb.bound(xb.explain.gradient(model, of=of))
    weights = images(2, seed=8, shape=(2, 2, 5, 5)) - 0.3

    def score(x: Tensor, rad: Tensor) -> Tensor:
        bounds = fn(xb.Interval.of(x, rad), target)
        return (weights[0] * bounds.mid + weights[1] * bounds.rad).sum()

    variables = [x.requires_grad_(), rad.requires_grad_(), *model.parameters()]
    grads = torch.autograd.grad(score(x, rad), variables, allow_unused=True, materialize_grads=True)
    assert any(grad.abs().max() > 1e-4 for grad in grads[2:])
    step = 1e-6
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        directions = [torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in variables]
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                for v, d in zip(variables, directions, strict=True):
                    v.add_(d, alpha=sign * step)
                values.append(score(x, rad))
                for v, d in zip(variables, directions, strict=True):
                    v.sub_(d, alpha=sign * step)
        difference = (values[0] - values[1]) / (2 * step)
        expected = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
        assert abs(difference - expected) <= 1e-5 * max(1.0, abs(expected)), (float(difference), float(expected))
