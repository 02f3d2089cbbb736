"""float64 bounds against exact rational arithmetic: small networks of linear, conv, batch norm, ReLU, average pool."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pyxai_bounds as xb

pytestmark = pytest.mark.usefixtures("one_thread")


def exact(t: Tensor) -> np.ndarray:
    """The numbers of a tensor as rationals."""
    return np.vectorize(Fraction, otypes=[object])(t.detach().double().numpy())


def relu(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, Fraction(0))


def conv(x: np.ndarray, w: np.ndarray, padding: int) -> np.ndarray:
    """[C, H, W] * [O, C, k, k] → [O, H′, W′]."""
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)), constant_values=Fraction(0))
    k = w.shape[-1]
    rows, columns = x.shape[1] - k + 1, x.shape[2] - k + 1
    out = [[[(x[:, i : i + k, j : j + k] * f).sum() for j in range(columns)] for i in range(rows)] for f in w]
    return np.array(out, dtype=object)


class Exact:
    """A network conv–[batch norm]–ReLU–average pool–linear–ReLU–linear, its output and its gradient, as rationals."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.first, self.last = nn.Linear(12, 5), nn.Linear(5, 3)
        self.model = nn.Sequential(
            self.conv, nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), self.first, nn.ReLU(), self.last
        ).double()  # fmt: skip

    def forward(self, x: np.ndarray) -> tuple[np.ndarray, Any]:
        before = conv(x, exact(self.conv.weight), 1) + exact(self.conv.bias)[:, None, None]
        image = relu(before)
        pooled = (image[:, ::2, ::2] + image[:, 1::2, ::2] + image[:, ::2, 1::2] + image[:, 1::2, 1::2]) / 4
        hidden = exact(self.first.weight) @ pooled.flatten() + exact(self.first.bias)
        return exact(self.last.weight) @ relu(hidden) + exact(self.last.bias), (before, hidden)

    def gradient(self, x: np.ndarray, target: int) -> np.ndarray:
        before, hidden = self.forward(x)[1]
        grad = exact(self.last.weight)[target] * (hidden > 0)
        grad = (grad @ exact(self.first.weight)).reshape(3, 2, 2) / 4
        grad = grad.repeat(2, 1).repeat(2, 2) * (before > 0)
        flipped = exact(self.conv.weight)[:, :, ::-1, ::-1].transpose(1, 0, 2, 3)
        return conv(grad, flipped, 1)


def assert_encloses(bounds: xb.Interval, value: np.ndarray) -> None:
    lower, upper = exact(bounds.lower), exact(bounds.upper)
    assert ((lower <= value) & (value <= upper)).all()


@pytest.mark.parametrize("seed", range(3))
def test_rational_arithmetic(seed: int) -> None:
    net = Exact(seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, 2, 4, 4, generator=generator, dtype=torch.float64)
    for eps in (0.0, 1e-15, 1e-6, 1e-2):
        box = xb.Interval.linf(x, eps)
        output = xb.bound(net.model, sound=True)(box)
        gradient = xb.bound(xb.explain.gradient(net.model), sound=True)(box, torch.tensor([1]))
        for corner in (0, 1) if eps else (0,):
            signs = torch.randn(x.shape, generator=generator, dtype=torch.float64).sign() * corner
            point = exact(box.mid[0]) + exact(box.rad[0]) * exact(signs[0])
            assert_encloses(output[0], net.forward(point)[0])
            assert_encloses(gradient[0], net.gradient(point, 1))
    nearest = xb.bound(net.model)(xb.Interval.point(x))
    value = net.forward(exact(x[0]))[0]
    assert not ((exact(nearest.lower[0]) <= value) & (value <= exact(nearest.upper[0]))).all()


MPMATH = {
    "tanh": mpmath.tanh, "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)), "exp": mpmath.exp, "expm1": mpmath.expm1,
    "erf": mpmath.erf, "log1p": mpmath.log1p, "sqrt": mpmath.sqrt,
    "gelu": lambda x: x * mpmath.ncdf(x), "silu": lambda x: x / (1 + mpmath.exp(-x)),
    "softplus": lambda x: mpmath.log1p(mpmath.exp(x)),
}  # fmt: skip


@pytest.mark.parametrize("name", MPMATH)
def test_transcendental_functions_in_float64(name: str) -> None:
    """Small, middling and large arguments, at points and in tiny boxes; mpmath with 60 digits."""
    fn = getattr(torch.nn.functional, name, None) or getattr(torch, name)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, generator=generator, dtype=torch.float64) * torch.logspace(-12, 1.3, 200, dtype=torch.float64)
    x = x.abs() if name in ("log1p", "sqrt") else x.clamp(max=19.0)
    with mpmath.workdps(60):
        values = [MPMATH[name](mpmath.mpf(float(v))) for v in x]
        for eps in (0.0, 1e-18):
            bounds = xb.bound(fn, sound=True)(xb.Interval.linf(x, eps if name != "sqrt" else 0.0))
            for lower, value, upper in zip(bounds.lower, values, bounds.upper, strict=True):
                assert mpmath.mpf(float(lower)) <= value <= mpmath.mpf(float(upper))
