"""Elementwise arithmetic: exact ranges of one and of two sets, broadcasting, numbers, and gradients through it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pyxai_bounds as xb
from tests.networks import sample
from tests.rules.cases import Case, assert_elementwise_ranges_are_exact, case_id, check, on_positive, rand

aten = torch.ops.aten

X = rand(3, 4)
POSITIVE = X.abs() + 0.5
OTHER = rand(3, 4, seed=1)
ROW = rand(4, seed=2)
COUNTS = torch.tensor([1, -2, 3, 4])
KEEP = torch.tensor([[True, False, True, True]] * 3)
LIMIT = rand(3, 4, seed=3).abs()


CASES = [
    Case("add", lambda x: x + OTHER, X),
    Case("add, set and set", lambda x: x[:2] + x[1:], X),
    Case("add, itself", lambda x: x + x, X),
    Case("add, broadcast to the point", lambda x: x + OTHER, X[0]),
    Case("add, broadcast to the set", lambda x: x[:, :1] + x[0], X),
    Case("add, alpha", lambda x: torch.add(OTHER, x, alpha=-2.5), X),
    Case("add, number", lambda x: aten.add.Scalar(x, 2.5, -2), X),
    Case("add, integers", lambda x: x + COUNTS, X),
    Case("sub", lambda x: x - OTHER, X),
    Case("sub, from the point", lambda x: ROW - x, X),
    Case("sub, set and set", lambda x: x[:2] - x[1:], X),
    Case("sub, itself", lambda x: (x - x) + x, X),
    Case("sub, itself, alpha", lambda x: torch.sub(x, x, alpha=3), X),
    Case("sub, alpha", lambda x: torch.sub(x, OTHER, alpha=-2), X),
    Case("sub, number", lambda x: aten.sub.Scalar(x, 2.5), X),
    Case("rsub, number", lambda x: 1.5 - x, X),
    Case("rsub, alpha", lambda x: aten.rsub.Tensor(x, OTHER, alpha=3), X),
    Case("neg", lambda x: -x, X),
    Case("addcmul", lambda x: torch.addcmul(x, x[:1], OTHER, value=-2.5), X),
    Case("addcmul, itself", lambda x: torch.addcmul(OTHER, x, x), X),
    Case("addcmul, point by set", lambda x: torch.addcmul(ROW, OTHER, x), X),
    Case("addcmul, points", lambda x: torch.addcmul(x, OTHER, ROW), X),
    on_positive("addcdiv", lambda x: torch.addcdiv(x, OTHER, x, value=0.3)),
    on_positive("addcdiv, by a point", lambda x: torch.addcdiv(OTHER, x, POSITIVE)),
    Case("addcdiv, points", lambda x: torch.addcdiv(x, OTHER, POSITIVE), X),
    *(
        Case(f"{name}, {reduction}", lambda x, loss=loss, reduction=reduction: loss(x, reduction=reduction), X)
        for reduction in ("none", "sum", "mean")
        for name, loss in (
            ("mse", lambda x, **k: F.mse_loss(x, OTHER, **k)),
            ("huber", lambda x, **k: F.huber_loss(x, OTHER, delta=0.7, **k)),
            ("smooth l1", lambda x, **k: F.smooth_l1_loss(x, OTHER, beta=0.7, **k)),
            ("soft margin", lambda x, **k: F.soft_margin_loss(x, OTHER.sign(), **k)),
            ("gaussian", lambda x, **k: F.gaussian_nll_loss(x, OTHER, LIMIT, full=True, **k)),
        )
    ),
    Case("gaussian, a number", lambda x: F.gaussian_nll_loss(OTHER, x, 0.5), X),
    Case("gaussian, a set of variances", lambda x: F.gaussian_nll_loss(OTHER, X, x.exp(), eps=0.5), X),
    Case("mse of two sets", lambda x: F.mse_loss(x[:2], x[1:]), X),
    Case("mul", lambda x: x * OTHER, X),
    Case("mul, negative number", lambda x: x * -2.5, X),
    Case("mul, scalar overload", lambda x: aten.mul.Scalar(x, -2.5), X),
    Case("mul, set and set", lambda x: x[:2] * x[1:], X),
    Case("mul, broadcast sets", lambda x: x[:, :1] * x[0], X),
    Case("mul, itself", lambda x: x * x, X),
    Case("mul, mask", lambda x: x * KEEP, X),
    Case("mul, integers", lambda x: COUNTS * x, X),
    Case("div", lambda x: x / OTHER, X),
    Case("div, number", lambda x: x / -3, X),
    Case("div, scalar overload", lambda x: aten.div.Scalar(x, -3), X),
    on_positive("div, by a set", lambda x: OTHER / x),
    on_positive("div, number by a set", lambda x: 3.0 / x),
    on_positive("div, by a negative set", lambda x: OTHER / -x),
    on_positive("div, set by set", lambda x: x[:2] / x[1:]),
    on_positive("reciprocal", torch.reciprocal),
    on_positive("reciprocal of a negative set", lambda x: torch.reciprocal(-x)),
    Case("reciprocal of what contains 0", lambda x: torch.reciprocal(x) + x, X, kinks=False, finite=False),
    Case("abs", torch.abs, X),
    Case("sign", lambda x: torch.sign(x) + x, X),
    Case("sgn", lambda x: torch.sgn(x) + x, X),
    Case("sign alone", torch.sign, X),
    Case("sub, itself alone", lambda x: x - x, X),
    Case("square", torch.square, X),
    Case("clamp", lambda x: x.clamp(-0.5, 1), X),
    Case("clamp, one limit", lambda x: x.clamp(max=0.25), X),
    Case("clamp, tensors", lambda x: torch.clamp(x, -LIMIT, LIMIT), X),
    Case("clamp, limits the wrong way round", lambda x: torch.clamp(x, 1, -1), X),
    Case("clamp, set as limit", lambda x: torch.clamp(OTHER, x, x + 1), X),
    Case("clamp_min", lambda x: aten.clamp_min.default(x, 0.0), X),
    Case("clamp_max", lambda x: aten.clamp_max.default(x, 1.0), X),
    Case("clamp_min, tensor", lambda x: torch.clamp_min(x, 0.3 * x.flip(0)), X, kinks=False),
    Case("clamp_max, tensor", lambda x: torch.clamp_max(x, LIMIT), X),
    Case("cosine similarity", lambda x: F.cosine_similarity(x, OTHER, dim=0), X, eps=0.1, kinks=False),
    Case("lerp", lambda x: torch.lerp(x, OTHER, 0.3), X),
    Case("lerp by a set", lambda x: torch.lerp(OTHER, x, x.flip(0)), X),
    Case("lerp, tensors", lambda x: torch.lerp(x, x.flip(0), OTHER), X),
    Case("nan_to_num", lambda x: torch.nan_to_num(x) * 2, X),
    Case("heaviside", lambda x: torch.heaviside(x, OTHER) + x, X, gradient=False),
    Case("fmax", lambda x: torch.fmax(x, OTHER), X),
    Case("fmin", lambda x: torch.fmin(x, x.flip(0)), X),
    Case("ldexp", lambda x: torch.ldexp(x, COUNTS), X),
    Case("degrees", lambda x: torch.deg2rad(x) + torch.rad2deg(x), X),
    Case("maximum", lambda x: torch.maximum(x, OTHER), X),
    Case("maximum, set and set", lambda x: torch.maximum(x[:2], x[1:]), X),
    Case("minimum", lambda x: torch.minimum(x, OTHER), X),
    Case("minimum, set and set", lambda x: torch.minimum(x[:2], x[1:]), X),
]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_binary_cross_entropy(reduction: str) -> None:
    """It refuses numbers outside of [0, 1], NaN among them."""
    target, weight, x = LIMIT.clamp(max=1), LIMIT, X.clone()
    x[0] = torch.tensor([-20.0, 20.0, 0.0, 12.0])

    def losses(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        loss = F.binary_cross_entropy(x.sigmoid(), target.to(x.dtype), weight.to(x.dtype), reduction=reduction)
        return loss, torch.autograd.grad(loss.sum(), x)[0]

    bounded = xb.bound(losses, sound=True)
    for eps in (0.0, 0.1):
        box = xb.Interval.linf(x, eps)
        for seed in range(10 if eps else 1):
            for bounds, value in zip(bounded(box), losses(sample(box, seed, seed % 2 == 0)), strict=True):
                assert bounds.detach().contains(value.detach()).all()
                assert eps or bounds.rad.max() < 1e-6


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_autograd(case: Case) -> None:
    check(case)


RANGES: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {
    "square": (torch.square, -2, 2),
    "abs": (torch.abs, -2, 2),
    "sign": (torch.sign, -2, 2),
    "reciprocal": (torch.reciprocal, 0.3, 4),
    "negative reciprocal": (torch.reciprocal, -4, -0.3),
    "clamp": (lambda x: x.clamp(-0.5, 1), -2, 2),
}


@pytest.mark.parametrize("name", RANGES)
def test_ranges_are_exact(name: str) -> None:
    fn, low, high = RANGES[name]
    # A slope may be a product of several terms that depend on x, whose range need not be exact.
    assert_elementwise_ranges_are_exact(fn, low, high, slope=name in ("square", "abs"))


def test_the_product_of_two_sets_is_exact_for_all_signs() -> None:
    ends = list(itertools.combinations_with_replacement((-2.0, -1.0, 0.0, 0.5, 3.0), 2))
    pairs = torch.tensor(list(itertools.product(ends, ends)), dtype=torch.float64)
    a, b = (xb.Interval(pairs[:, i, 0], pairs[:, i, 1]) for i in (0, 1))
    corners = torch.stack([pairs[:, 0, i] * pairs[:, 1, j] for i in (0, 1) for j in (0, 1)])
    for name in ("reference", "native"):
        with xb.backend(name):
            product = xb.bound(lambda a, b: a * b)(a, b)
        assert torch.equal(product.lower, corners.min(0).values), name
        assert torch.equal(product.upper, corners.max(0).values), name


@pytest.mark.parametrize("limits", [(-1.0, 2.0), (0.0, 1.0), (-1.0, 0.0), (0.0, 0.0)])
def test_dividing_by_a_set_that_touches_zero_has_no_bound(limits: tuple[float, float]) -> None:
    low, high = (torch.tensor([limit], dtype=torch.float64) for limit in limits)
    for fn in (torch.reciprocal, lambda x: 1 / x, lambda x: x**-2, lambda x: x**-0.5):
        assert not xb.bound(fn)(xb.Interval(low, high)).isfinite().any()


def test_mixed_precision_promotes_as_pytorch_does() -> None:
    x = X.float()
    for fn in (lambda t: t + OTHER, lambda t: torch.relu(t * OTHER + OTHER), lambda t: torch.maximum(t, OTHER)):
        bounds = xb.bound(fn)(xb.Interval.linf(x, 0.1))
        assert bounds.mid.dtype == bounds.rad.dtype == fn(x).dtype
        assert ((bounds.lower <= fn(x) + 1e-6) & (fn(x) <= bounds.upper + 1e-6)).all()


@pytest.mark.parametrize("sound", [False, True])
def test_factors_of_two_precisions(sound: bool) -> None:
    """As in norms that take their squares in float32, whatever the model is in (T5, Llama)."""

    def fn(x: Tensor) -> Tensor:
        return x * x.float().square().mean(-1, keepdim=True).rsqrt() + x * x.float()

    box = xb.Interval.linf(X, 1e-3)
    bounds = xb.bound(fn, sound=sound)(box)
    assert bounds.dtype == torch.float64 and bounds.rad.max() < 0.1
    for seed in range(20):
        point = sample(box, seed, corners=seed % 2 == 0)
        assert bounds.contains(fn(point)).all()
