"""Activations: their ranges and those of their slopes, PyTorch's conventions at kinks, and gradients through them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pyxai_bounds as xb
from tests.rules.cases import Case, assert_elementwise_ranges_are_exact, case_id, check, rand

aten = torch.ops.aten

PRELU = torch.tensor([0.25, 1.5, -0.3], dtype=torch.float64)

# Functions of one number, with the interval on which their range is checked.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {
    "relu": (F.relu, -2, 2),
    "relu of relu": (lambda x: F.relu(F.relu(x) - 0.5), -2, 2),
    "leaky relu": (F.leaky_relu, -2, 2),
    "leaky relu, slope 0.3": (lambda x: F.leaky_relu(x, 0.3), -2, 2),
    "leaky relu, slope -0.3": (lambda x: F.leaky_relu(x, -0.3), -2, 2),
    "leaky relu, slope 1.5": (lambda x: F.leaky_relu(x, 1.5), -2, 2),
    "leaky relu in place": (lambda x: F.leaky_relu_(x * 1, 0.2), -2, 2),
    "hardtanh": (F.hardtanh, -3, 3),
    "hardtanh, shifted": (lambda x: F.hardtanh(x, -0.5, 1.25), -3, 3),
    "relu6": (F.relu6, -3, 9),
    "tanh": (torch.tanh, -4, 4),
    "sigmoid": (torch.sigmoid, -6, 6),
    "softplus": (F.softplus, -4, 4),
    "softplus, beta 3": (lambda x: F.softplus(x, 3.0), -4, 4),
    "softplus, low threshold": (lambda x: F.softplus(x, 2.0, 1.0), -2, 3),
    "elu": (F.elu, -4, 4),
    "elu, alpha 2.5": (lambda x: F.elu(x, 2.5), -4, 4),
    "elu, alpha 0.3": (lambda x: F.elu(x, 0.3), -4, 4),
    "elu, alpha -0.7": (lambda x: F.elu(x, -0.7), -4, 4),
    "elu in place": (lambda x: F.elu_(x * 1, 1.7), -4, 4),
    "selu": (F.selu, -4, 4),
    "celu": (lambda x: F.celu(x, 0.6), -4, 4),
    "gelu": (F.gelu, -6, 6),
    "gelu, tanh": (lambda x: F.gelu(x, approximate="tanh"), -6, 6),
    "silu": (F.silu, -12, 12),
    "mish": (F.mish, -12, 12),
    "log-sigmoid": (F.logsigmoid, -12, 12),
    "prelu": (lambda x: F.prelu(x, PRELU[:1]), -2, 2),
    "prelu, slope 1.5": (lambda x: F.prelu(x, PRELU[1:2]), -2, 2),
    "prelu, slope -0.3": (lambda x: F.prelu(x, PRELU[2:]), -2, 2),
    "hardsigmoid": (F.hardsigmoid, -5, 5),
    "hardswish": (F.hardswish, -5, 5),
    "threshold": (lambda x: F.threshold(x, 0.3, -1.0), -2, 2),
    "threshold, a greater value": (lambda x: F.threshold(x, -0.3, 1.5), -2, 2),
    "hardshrink": (F.hardshrink, -2, 2),
    "softshrink": (F.softshrink, -2, 2),
    "rrelu": (lambda x: F.rrelu(x, training=False), -2, 2),
    "softsign": (F.softsign, -3, 3),
    "tanhshrink": (F.tanhshrink, -3, 3),
}
LOOSE = {"softsign", "tanhshrink"}  # compositions, whose range is enclosed


def activation_case(name: str) -> Case:
    fn, low, high = ACTIVATIONS[name]
    x = torch.linspace(low, high, 12, dtype=torch.float64).reshape(2, 6) + 0.01
    return Case(name, fn, x, eps=0.4)


CASES = [
    *(activation_case(name) for name in ACTIVATIONS),
    Case("prelu, a slope per channel", lambda x: F.prelu(x, PRELU), rand(2, 3, 4)),
    Case("glu", F.glu, rand(3, 4)),
    Case("glu over channels", lambda x: F.glu(x, 1), rand(2, 4, 3)),
]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_autograd(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name not in LOOSE])
def test_ranges_of_value_and_slope_are_exact(name: str) -> None:
    fn, low, high = ACTIVATIONS[name]
    # Where the slope of a composition is a product of slopes, its range is not exact.
    assert_elementwise_ranges_are_exact(fn, low, high)


@pytest.mark.parametrize("name", ["gelu", "gelu, tanh", "silu", "mish", "log-sigmoid", "sigmoid", "tanh", "softplus"])
def test_tails(name: str) -> None:
    """Far from 0 the slopes flatten out without bending below or above their limits."""
    fn = ACTIVATIONS[name][0]
    for low, high in ((-40.0, -6.0), (6.0, 40.0), (-40.0, 40.0)):
        assert_elementwise_ranges_are_exact(fn, low, high)


def slope(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def gradient(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(fn(x).sum(), x)[0]

    return gradient


@pytest.mark.parametrize(
    ("name", "kinks"),
    [
        ("relu", [0.0, -0.0]),
        ("leaky relu", [0.0, -0.0]),
        ("hardtanh", [-1.0, 1.0]),
        ("relu6", [0.0, 6.0]),
        ("selu", [0.0]),
        ("elu, alpha 2.5", [0.0]),
        ("softplus, low threshold", [0.5]),
        ("softplus", [20.0]),
        ("hardsigmoid", [-3.0, 3.0]),
        ("hardswish", [-3.0, 3.0]),
        ("hardshrink", [-0.5, 0.5]),
        ("softshrink", [-0.5, 0.5]),
        ("threshold", [0.3]),
    ],
)
def test_slope_at_a_kink_follows_pytorch_and_covers_both_sides_around_it(name: str, kinks: list[float]) -> None:
    gradient = slope(ACTIVATIONS[name][0])
    x = torch.tensor(kinks, dtype=torch.float64)
    point = xb.bound(gradient)(xb.Interval.point(x))
    assert (point.mid - gradient(x)).abs().max() < 1e-12 and point.rad.max() < 1e-12
    for shift in (-1e-6, 0.0, 1e-6):
        box = xb.Interval.linf(x + shift, 1e-6)
        bounds = xb.bound(gradient)(box)
        for position in torch.linspace(-1, 1, 9, dtype=torch.float64):
            value = gradient(box.mid + position * box.rad)
            assert (value >= bounds.lower - 1e-12).all() and (value <= bounds.upper + 1e-12).all()


def test_softplus_jumps_down_where_it_becomes_the_identity() -> None:
    """PyTorch's softplus is x beyond threshold / beta, which lies below its value there."""
    for threshold in (1.0, 20.0):
        x = torch.tensor([threshold], dtype=torch.float64)
        box = xb.Interval.linf(x, 1e-12)
        bounds = xb.bound(lambda t, threshold=threshold: F.softplus(t, 1.0, threshold))(box)
        assert bounds.upper >= F.softplus(x, 1.0, threshold)
        assert bounds.lower <= F.softplus(x + 1e-12, 1.0, threshold)


def test_relu_states_survive_reshapes_layouts_and_several_readers() -> None:
    """The packed state belongs to one tensor in one memory order; everything else reads the signs again."""
    x = rand(2, 8, 3, 5)
    for layout in (torch.contiguous_format, torch.channels_last):
        for name, fn in {
            "plain": F.relu,
            "permuted": lambda t: F.relu(t.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * 2,
            "flattened in place": lambda t: F.relu_(t.clone().flatten(1)).reshape(t.shape),
            "sliced": lambda t: F.relu(t[:, ::2, :, 1:]),
            "view relu_": lambda t: F.relu_(t.clone()[:, 2:]),
            "twice": lambda t: F.relu(t) * F.relu(t.transpose(1, 2)).transpose(1, 2),
            "transposed gradient": lambda t: F.relu(t).transpose(1, 3),
        }.items():
            check(Case(name, fn, x.contiguous(memory_format=layout), eps=0.5))


def test_a_point_in_the_backward_pass_keeps_the_gradient_of_pytorch_at_nan() -> None:
    """A set times the slope at a point: a NaN among the points must not become a slope of 0."""
    grad = xb.Interval.linf(torch.ones(1, dtype=torch.float64), 0.1)
    nan = torch.full((1,), float("nan"), dtype=torch.float64)
    for op, args in (
        (aten.threshold_backward.default, (nan, 0)),
        (aten.hardtanh_backward.default, (nan, -1.0, 1.0)),
        (aten.leaky_relu_backward.default, (nan, 0.1, False)),
        (aten.sigmoid_backward.default, (nan,)),
        (aten.gelu_backward.default, (nan,)),
    ):
        bounds = xb.rules.RULES[op].function(grad, *args)
        value = op(grad.mid, *args)
        assert not bounds.isfinite() or bounds.contains(value), op.name()


def test_a_box_of_prelus_slopes() -> None:
    """With a parameter box the slope is a set: the ends of x and of the slope give the range."""
    layer = torch.nn.PReLU(3).double()
    layer.weight.data.copy_(PRELU)
    box = xb.Interval.linf(rand(2, 3, 4), 0.2)
    bounds = xb.bound(layer, parameters=xb.parameter_box(layer, absolute=0.1, include="*"))(box)
    corners = torch.stack([F.prelu(x, PRELU + w) for x in (box.lower, box.upper) for w in (-0.1, 0.1)])
    stable = (box.lower > 0) | (box.upper <= 0)
    for found, exact in ((bounds.lower, corners.min(0).values), (bounds.upper, corners.max(0).values)):
        assert ((found - exact).abs() < 1e-12)[stable].all()
    assert (bounds.lower <= corners + 1e-12).all() and (bounds.upper >= corners - 1e-12).all()

    def slope(x: Tensor) -> Tensor:
        return torch.autograd.grad(layer(x.requires_grad_()).sum(), x)[0]

    gradient = xb.bound(slope, parameters=xb.parameter_box(layer, absolute=0.1, include="*"))(box)
    for sign, found in ((-1, gradient.lower), (1, gradient.upper)):
        exact = torch.where(box.mid > 0, 1.0, PRELU.view(3, 1) + sign * 0.1)
        assert ((found - exact).abs() < 1e-12)[stable].all()
