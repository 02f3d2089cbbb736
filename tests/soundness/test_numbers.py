"""Numbers that a dtype cannot hold, overflow, underflow, exact zeros, NaN: what random networks rarely meet."""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyxai_bounds as xb
from tests.soundness.programs import outside

pytestmark = pytest.mark.usefixtures("one_thread")

TENTH = torch.tensor(0.1, dtype=torch.float64)
SUBNORMAL = torch.tensor(1.3e-42, dtype=torch.float64)
WHOLE = torch.tensor([16777217, 16777219, 3])
KEEP = torch.tensor([True, False, True])
TWO = torch.tensor([[0.1, 0.7, 0.3]])


def t(*values: float) -> Tensor:
    return torch.tensor(values)


# A function, and a float32 point at which rounding one of its constants to float32 shows.
CONSTANTS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "times a number that is subnormal in float32": (lambda x: x * 1.3e-42, t(1e10, 1e20, 3.0)),
    "times a tensor that is subnormal in float32": (lambda x: x * SUBNORMAL, t(1e10, 1e20, 3.0)),
    "times a number that float32 calls 0": (lambda x: x * 1e-46, t(1e10, 1e20, 3.0)),
    "plus an integer beyond 2²⁴": (lambda x: x + 16777217, t(-16777216.0, 1.0, 0.0)),
    "plus a whole number beyond 2²⁴": (lambda x: x + 16777217.0, t(-16777216.0, 1.0, 0.0)),
    "plus a number that float32 calls 0": (lambda x: x + 1e-46, t(0.0, 1.0, 2.0)),
    "minus a fraction": (lambda x: x - 0.1, t(0.1, 1.0, 2.0)),
    "from a fraction": (lambda x: 0.1 - x, t(0.1, 1.0, 2.0)),
    "plus a multiple of a fraction": (lambda x: torch.ops.aten.add.Scalar(x, 0.1, 3), t(-0.3, 1.0, 2.0)),
    "plus a float64 number": (lambda x: x + TENTH, t(-0.1, 1.0, 2.0)),
    "times a float64 number": (lambda x: x * TENTH, t(-0.1, 1.0, 2.0)),
    "plus integers": (lambda x: x + WHOLE, t(-16777216.0, 1.0, 2.0)),
    "plus a multiple of integers": (lambda x: torch.add(x, WHOLE, alpha=2.5), t(-16777216.0, 1.0, 2.0)),
    "masked": (lambda x: x.masked_fill(KEEP, 0.1), t(1.0, 2.0, 3.0)),
    "padded": (lambda x: F.pad(x, (1, 1), value=0.1), t(1.0, 2.0, 3.0)),
    "scattered": (lambda x: x.scatter(0, torch.tensor([0]), 0.1), t(1.0, 2.0, 3.0)),
    "clamped": (lambda x: x.clamp(0.1, 0.7), t(0.0, 2.0, 0.3)),
    "clamped below": (lambda x: x.clamp_min(0.1), t(0.0, 2.0, 0.3)),
    "hardtanh": (lambda x: F.hardtanh(x, -0.1, 0.1), t(-1.0, 2.0, 0.03)),
    "maximum of a float64 number": (lambda x: torch.maximum(x, TENTH), t(-1.0, 2.0, 0.1)),
    "greater": (lambda x: torch.where(x > 0.1, x, -x), TWO[0]),
    "greater or equal": (lambda x: (x >= 0.7) * x, TWO[0]),
    "less": (lambda x: (x < 0.7) * x, TWO[0]),
    "less or equal": (lambda x: (x <= 0.1) * x, TWO[0]),
    "equal": (lambda x: (x == 0.1) * x, TWO[0]),
    "hardsigmoid": (F.hardsigmoid, t(-2.9999998, 2.9999998, 0.1)),
    "hardswish": (F.hardswish, t(-2.9999998, 2.9999998, 0.1)),
    "power": (lambda x: x**0.7, t(1e30, 1e-5, 2.0)),
    "times the logarithm of a fraction": (lambda x: torch.xlogy(x, 0.3), t(1e30, 1e-5, 2.0)),
    "masked by an integer": (lambda x: x.masked_fill(KEEP, 16777217), t(1.0, 2.0, 3.0)),
    "scattered integer": (lambda x: x.scatter(0, torch.tensor([0]), 16777217), t(1.0, 2.0, 3.0)),
    "clamped by an integer": (lambda x: x.clamp(max=16777217), t(0.0, 2e7, 16777216.0)),
    "compared with an integer": (lambda x: (x >= 16777217) * x, t(0.0, 2e7, 16777216.0)),
    "compared with integers": (lambda x: (x >= WHOLE) * x, t(16777216.0, 16777220.0, 3.0)),
    "times the logarithm of integers": (lambda x: torch.special.xlog1py(x, WHOLE), t(1e30, 1e-5, 2.0)),
    "maximum of integers": (lambda x: torch.maximum(x, WHOLE), t(1.0, 2e7, 3.0)),
    "joined with integers": (lambda x: torch.cat([x, WHOLE]), t(1.0, 2.0, 3.0)),
    "selected from integers": (lambda x: torch.where(KEEP, x, WHOLE), t(1.0, 2.0, 3.0)),
}


@pytest.mark.parametrize("eps", [0.0, 1e-7])
@pytest.mark.parametrize("semantics", ["real", "float32"])
@pytest.mark.parametrize("name", CONSTANTS)
def test_python_numbers_are_the_doubles_that_they_are(name: str, semantics: str, eps: float) -> None:
    fn, x = CONSTANTS[name]
    bounds = xb.bound(fn, sound=True, semantics=semantics)(xb.Interval.linf(x, eps))  # type: ignore[arg-type]
    assert bounds.dtype == torch.float32
    assert bounds.isfinite().all() and not outside(bounds, fn(x.double())).any()
    if semantics == "float32":
        assert not outside(bounds, fn(x)).any()


def test_parameters_clamped_or_compared_at_points() -> None:
    """A point that is rounded by a constant becomes an enclosure."""
    weight = t(0.05, 0.1, 3.0)
    for fn in (lambda x: x * weight.to(x.dtype).clamp(0.1, 0.7), lambda x: x * (weight.to(x.dtype) > 0.1)):
        bounds = xb.bound(fn, sound=True)(xb.Interval.point(t(1.0, 1.0, 1.0)))
        assert not outside(bounds, fn(torch.ones(3, dtype=torch.float64))).any()


# --- overflow ------------------------------------------------------------------------------------------------

HUGE = t(3e38, 3e38, -3.4e38, -3.4e38)
OVERFLOWING: dict[str, Callable[[Tensor], Tensor]] = {
    "conv": lambda x: F.conv2d(x.reshape(1, 4, 1, 1), torch.ones(1, 4, 1, 1, dtype=x.dtype)),
    "linear": lambda x: F.linear(x.reshape(1, 4), torch.ones(1, 4, dtype=x.dtype)),
    "average": lambda x: F.avg_pool2d(x.reshape(1, 1, 1, 4), (1, 4), divisor_override=1),
    "sum": lambda x: x.sum(),
    "additions": lambda x: x[0] + x[1] + x[2] + x[3],
    "batch norm": lambda x: F.batch_norm(
        x.reshape(4, 1), torch.zeros(1, dtype=x.dtype), torch.full((1,), 1e-4, dtype=x.dtype)
    ).sum(),
}


@pytest.mark.parametrize("eps", [0.0, 1.0])
@pytest.mark.parametrize("name", OVERFLOWING)
def test_a_partial_sum_that_overflows_decides_nothing(name: str, eps: float) -> None:
    """The sum is negative, so ReLU is dead; a partial sum of +∞ must not make it active."""

    def gradient(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(OVERFLOWING[name](x).relu().sum(), x)[0]

    bounds = xb.bound(gradient, sound=True)(xb.Interval.linf(HUGE, eps))
    assert not outside(bounds, gradient(HUGE.double())).any()


def test_large_values_stay_apart() -> None:
    """Halving their sum would make both infinite, and equal."""
    x = t(2e38, 2.5e38)

    def gradient(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(F.max_pool2d(x.clamp(-3.3e38, 3.3e38).reshape(1, 1, 1, 2), (1, 2)).sum(), x)[0]

    for eps in (0.0, 1.0):
        box = xb.Interval.linf(x, eps)
        assert not outside(xb.bound(gradient, sound=True)(box), gradient(x.double())).any()
        clamped = xb.bound(lambda t: t.clamp(-3e38, 3e38), sound=True)(box)
        assert clamped.isfinite().all() and not outside(clamped, x).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nothing_is_finite_that_a_nan_or_infinity_reaches(value: float) -> None:
    layer = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        layer[0].weight[1, 1] = value
        layer[2].weight.fill_(1.0)
    for fn in (layer, lambda x: xb.explain.gradient(layer)(x, torch.tensor([1]))):
        bounds = xb.bound(fn, sound=True)(xb.Interval.linf(torch.ones(1, 3), 0.1))
        assert not bounds.isfinite().all()


# --- underflow and exact zeros ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-19, 1e-25, 1e-38, 1e-44])
@pytest.mark.parametrize("semantics", ["real", "float32"])
def test_products_that_underflow(scale: float, semantics: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 4, generator=generator) * scale
    weight = torch.randn(3, 3, 3, 3, generator=generator) * 1e-20
    batch = torch.randn(2, 4, 5, generator=generator) * 1e-20
    for fn in (
        lambda x: F.conv2d(x, weight.to(x.dtype)),
        lambda x: F.linear(x[:, 0, 0, :3], weight[:, :, 0, 0].to(x.dtype)),
        lambda x: torch.bmm(x[:, 0], batch.to(x.dtype)),
        lambda x: x[:, 0] * x[:, 1],
        lambda x: x * 1e-7 / 3,
        lambda x: x.mean((2, 3)),
        lambda x: F.conv1d(x[:, :, 0], weight[..., 0].to(x.dtype)),
        lambda x: F.batch_norm(x, weight[0, 0, 0].to(x.dtype), weight[1, 0, 0].to(x.dtype).abs()),
        lambda x: torch.linalg.vector_norm(x, dim=1),
    ):
        for eps in (0.0, scale / 100):
            bounds = xb.bound(fn, sound=True, semantics=semantics)(xb.Interval.linf(x, eps))  # type: ignore[arg-type]
            assert bounds.isfinite().all() and not outside(bounds, fn(x.double())).any()
            if semantics == "float32":
                assert not outside(bounds, fn(x)).any()


def test_zeros_stay_exact() -> None:
    """Black images in networks without biases: outputs and features are 0 ± 0, whatever is summed."""
    torch.manual_seed(0)
    for activation in (nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.ELU, nn.Hardtanh):
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, bias=False), activation(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 3, bias=False),
            nn.AvgPool2d(2, 1), activation(), nn.Flatten(), nn.Linear(3, 5, bias=False),
        )  # fmt: skip
        bounds = xb.bound(model, sound=True)(xb.Interval.point(torch.zeros(2, 2, 8, 8)))
        assert (bounds.mid == 0).all() and (bounds.rad == 0).all(), activation


def test_dead_and_untouched_inputs_have_gradient_zero() -> None:
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.bias.fill_(-100.0)
        layer.weight[:, 2] = 0.0
    head = nn.Linear(3, 2)
    bounds = xb.bound(xb.explain.gradient(nn.Sequential(layer, nn.ReLU(), head)), sound=True)(
        xb.Interval.linf(torch.rand(5, 4), 0.1), torch.zeros(5, dtype=torch.long)
    )
    assert (bounds.mid == 0).all() and (bounds.rad == 0).all()
    with torch.no_grad():
        layer.bias.fill_(0.3)
    bounds = xb.bound(xb.explain.gradient(nn.Sequential(layer, nn.ReLU(), head)), sound=True)(
        xb.Interval.linf(torch.rand(5, 4), 0.1), torch.zeros(5, dtype=torch.long)
    )
    assert (bounds.mid[:, 2] == 0).all() and (bounds.rad[:, 2] == 0).all() and (bounds.rad[:, 1] > 0).any()


def test_masked_softmax() -> None:
    mask = torch.tensor([True, False, False])
    bounds = xb.bound(lambda x: x.masked_fill(mask, float("-inf")).softmax(0), sound=True)(
        xb.Interval.linf(t(1.0, 2.0, 3.0), 0.1)
    )
    assert bounds.isfinite().all() and bounds.width[0] < 1e-30
    assert bounds.contains(torch.softmax(t(-float("inf"), 2.0, 3.0), 0)).all()


# --- points that round -----------------------------------------------------------------------------------------


def test_points_beside_a_set_round_too() -> None:
    """A convolution of points with a set as bias; the gradients of the input and the bias where only the weight's
    depends on the set.
    """
    generator = torch.Generator().manual_seed(0)
    image, weight, seed = (torch.randn(*s, generator=generator) for s in ((2, 4, 6, 6), (3, 4, 3, 3), (2, 3, 4, 4)))

    def biased(b: Tensor) -> Tensor:
        return F.conv2d(image.to(b.dtype), weight.to(b.dtype), b)

    def gradients(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            w = weight.to(x.dtype).requires_grad_()
            b = torch.zeros(3, dtype=x.dtype).requires_grad_()
            loss = (F.conv2d(x, w, b) * seed.to(x.dtype)).sum()
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [x, w, b])])

    for fn, x in ((biased, t(0.1, 0.2, 0.3)), (gradients, image)):
        bounds = xb.bound(fn, sound=True)(xb.Interval.point(x))
        assert bounds.dtype == torch.float32 and not outside(bounds, fn(x.double())).any()
        assert outside(xb.bound(fn)(xb.Interval.point(x)), fn(x.double())).any()


# --- norms: squares underflow long before the numbers do ----------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-150, 1e-157, 1e-160, 1e-162, 1e-170, 1e-200])
@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_statistics_whose_squares_underflow(scale: float, eps: float) -> None:
    """float64 bounds against mpmath: standard deviation, layer norm without a constant, and its gradient."""
    numbers = [1.1, 2.3, 4.7, -0.1]
    x = torch.tensor([numbers], dtype=torch.float64) * scale
    exact = [mpmath.mpf(v) for v in x[0].tolist()]
    mean = mpmath.fsum(exact) / 4
    squares = mpmath.fsum([(v - mean) ** 2 for v in exact])
    box = xb.Interval.linf(x, eps * scale)
    deviation = xb.bound(lambda t: t.std(1), sound=True)(box)
    assert deviation.lower.item() <= mpmath.sqrt(squares / 3) <= deviation.upper.item()
    normal = xb.bound(lambda t: F.layer_norm(t, (4,), eps=0.0), sound=True)(box)
    for i, v in enumerate(exact):
        value = (v - mean) / mpmath.sqrt(squares / 4)
        assert not normal.isfinite()[0, i] or normal.lower[0, i].item() <= value <= normal.upper[0, i].item()


@pytest.mark.parametrize("scale", [1.0, 1e-140, 1e-165, 1e-170, 1e-300])
def test_gradients_of_a_norm_whose_squares_underflow(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, seed = (torch.randn(1, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    seed = seed * scale

    def gradient(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad((F.layer_norm(x, (8,)) * seed).sum(), x)[0]

    row, g = ([mpmath.mpf(v) for v in t[0].tolist()] for t in (x, seed))
    mean = mpmath.fsum(row) / 8
    sigma = mpmath.sqrt(mpmath.fsum([(v - mean) ** 2 for v in row]) / 8 + mpmath.mpf(1e-5))
    y = [(v - mean) / sigma for v in row]
    along = mpmath.fsum([a * b for a, b in zip(g, y, strict=True)]) / 8
    truth = [(a - mpmath.fsum(g) / 8 - b * along) / sigma for a, b in zip(g, y, strict=True)]
    for radius in (0.0, 0.1):
        bounds = xb.bound(gradient, sound=True)(xb.Interval.linf(x, radius))
        for i, value in enumerate(truth):
            assert bounds.lower[0, i].item() <= value <= bounds.upper[0, i].item()


def test_small_gradients_of_a_norm_in_float32() -> None:
    """Rounded to nearest, too: a gradient of 1e-27 is no 0."""

    def gradient(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(torch.sigmoid(F.layer_norm(x, (4,)) - 60).sum(), x)[0]

    x = torch.tensor([[0.3, -1.0, 2.0, 0.7]])
    bounds = xb.bound(gradient)(xb.Interval.linf(x, 1e-3))
    truth = gradient(x.double())
    assert truth.abs().max() > 1e-28
    assert ((bounds.lower.double() <= truth) & (truth <= bounds.upper.double())).all()
