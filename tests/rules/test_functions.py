"""Elementwise functions: exact ranges of themselves and of some slopes, domains, and gradients through them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pyxai_bounds as xb
from tests.rules.cases import Case, assert_elementwise_ranges_are_exact, case_id, check, on_positive, rand

X = rand(3, 4)
OTHER = rand(3, 4, seed=1)


CASES = [
    Case("sin", torch.sin, 3 * X),
    Case("cos", torch.cos, 3 * X),
    Case("atan", torch.atan, X),
    Case("exp2", torch.exp2, X),
    on_positive("log2", torch.log2),
    on_positive("log10", torch.log10),
    Case("pow 2", lambda x: x**2, X),
    Case("pow 3", lambda x: x**3, X),
    Case("pow 4", lambda x: x**4, X),
    Case("pow 1", lambda x: x**1.0, X),
    on_positive("pow -1", lambda x: x**-1),
    on_positive("pow 0.5", lambda x: x**0.5),
    on_positive("pow -0.5", lambda x: x**-0.5),
    on_positive("pow 1.5", lambda x: x**1.5),
    on_positive("pow -2", lambda x: x**-2),
    on_positive("sqrt", torch.sqrt),
    on_positive("rsqrt", torch.rsqrt),
    Case("exp", torch.exp, X),
    Case("expm1", torch.expm1, X),
    on_positive("log", torch.log),
    on_positive("log1p", torch.log1p),
    Case("erf", torch.erf, X),
    *(Case(name, getattr(torch, name), X) for name in ("erfc", "sinh", "cosh", "asinh")),
    *(
        Case(name, getattr(torch, name), X.tanh() * 0.5, eps=0.2, kinks=False)
        for name in ("asin", "acos", "atanh", "erfinv")
    ),
    Case("tan", torch.tan, X.tanh() * 0.8),
    Case("tan over a pole", torch.tan, X, eps=1.0, kinks=False, finite=False),
    Case("acosh", torch.acosh, X.abs() + 1.5, kinks=False),
    Case("logit", torch.logit, X.sigmoid() * 0.6 + 0.2, eps=0.1, kinks=False),
    Case("logit, eps", lambda x: torch.logit(x, eps=0.2), X.sigmoid(), eps=0.1),
    Case("hypot", lambda x: torch.hypot(x, OTHER), X, kinks=False, finite=False),
    Case("atan2", lambda x: torch.atan2(OTHER, x.abs() + 0.5), X),
    Case("atan2, on the left", lambda x: torch.atan2(x, x.flip(0)), 3 * X, kinks=False, finite=False),
    Case("logaddexp", lambda x: torch.logaddexp(x, OTHER), X),
    Case("logaddexp2", lambda x: torch.logaddexp2(x, x.flip(0)), X),
    on_positive("lgamma", lambda x: torch.lgamma(2 * x)),
    on_positive("digamma", torch.digamma),
    Case("polygamma", lambda x: torch.polygamma(1, x), X.abs() + 0.5, gradient=False, kinks=False),
    on_positive("xlogy", lambda x: torch.xlogy(OTHER, x)),
    on_positive("xlogy, set and set", lambda x: torch.xlogy(x, x.flip(0))),
    on_positive("xlogy, numbers", lambda x: torch.xlogy(2.0, x) + torch.xlogy(x, 0.3)),
    on_positive("xlog1py", lambda x: torch.special.xlog1py(OTHER, x)),
    on_positive("entropy", torch.special.entr),
    Case("number to a power", lambda x: torch.pow(0.3, x) + torch.pow(2.5, x), X),
    on_positive("power, sets", lambda x: torch.pow(x, x.flip(0))),
    Case(
        "power, whole numbers in a tensor", lambda x: torch.pow(x, torch.tensor([2.0, 3.0, 1.0, 4.0])), X, kinks=False
    ),
]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_autograd(case: Case) -> None:
    check(case)


RANGES: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {
    "cosh": (torch.cosh, -2, 2),
    "erfc": (torch.erfc, -2, 2),
    "acos": (torch.acos, -0.9, 0.9),
    "logit": (torch.logit, 0.1, 0.9),
    "entropy": (torch.special.entr, 0.05, 2),
    "number to a power": (lambda x: torch.pow(0.3, x), -2, 2),
    "tan": (torch.tan, -1.4, 1.4),
    "pow 2": (lambda x: x**2, -2, 2),
    "pow 3": (lambda x: x**3, -2, 2),
    "pow 4": (lambda x: x**4, -2, 2),
    "pow 1.5": (lambda x: x**1.5, 0.1, 2),
    "pow -2": (lambda x: x**-2, 0.5, 2),
    "sqrt": (torch.sqrt, 0.1, 4),
    "rsqrt": (torch.rsqrt, 0.3, 4),
    "exp": (torch.exp, -2, 2),
    "log": (torch.log, 0.2, 3),
    "log1p": (torch.log1p, -0.8, 3),
    "expm1": (torch.expm1, -2, 2),
    "erf": (torch.erf, -3, 3),
}


@pytest.mark.parametrize("name", RANGES)
def test_ranges_are_exact(name: str) -> None:
    fn, low, high = RANGES[name]
    # A slope may be a product of several terms that depend on x, whose range need not be exact.
    assert_elementwise_ranges_are_exact(fn, low, high, slope=name in ("exp", "log"))


@pytest.mark.parametrize("fn", [torch.sqrt, torch.log, torch.rsqrt, lambda x: x**0.5, lambda x: x**1.5])
def test_outside_the_domain_there_is_no_bound(fn: Callable[[Tensor], Tensor]) -> None:
    box = xb.Interval.linf(torch.tensor([0.5], dtype=torch.float64), 1.0)
    assert not xb.bound(fn)(box).isfinite().any()


@pytest.mark.parametrize("fn", [torch.sin, torch.cos])
def test_the_range_of_a_wave_is_exact(fn: Callable[[Tensor], Tensor]) -> None:
    assert_elementwise_ranges_are_exact(fn, -9, 9)
    whole = xb.bound(fn)(xb.Interval.linf(torch.zeros(1, dtype=torch.float64), 1e12))
    assert whole.lower.item() == -1 and whole.upper.item() == 1
    for point in (1e12, -3e15):
        bounds = xb.bound(fn, sound=True)(xb.Interval.point(torch.tensor([point], dtype=torch.float64)))
        assert bounds.contains(fn(torch.tensor([point], dtype=torch.float64))).all() and bounds.rad.item() < 1e-14


@pytest.mark.parametrize("fn", [torch.lgamma, torch.digamma, lambda x: torch.polygamma(1, x)])
def test_the_gamma_function_is_bounded_on_positive_numbers_alone(fn: Callable[[Tensor], Tensor]) -> None:
    bounds = xb.bound(fn)(xb.Interval.linf(torch.tensor([-1.5, 0.05, 0.2, 1.0, 30.0]), 0.1))
    assert bounds.isfinite().tolist() == [False, False, True, True, True]


@pytest.mark.parametrize(
    "fn",
    [
        torch.sqrt,
        lambda x: x**0.3,
        lambda x: x.norm(dim=1),
        lambda x: x.norm(3, dim=1),
        lambda x: torch.hypot(x, 2 * x),
        lambda x: x.std(1),
        lambda x: F.lp_pool1d(x, 2, 2),
    ],
)
def test_gradients_of_bounds_are_finite_where_roots_start(fn: Callable[[Tensor], Tensor]) -> None:
    """Their slope is infinite there, the slope of an end that is 0 is 0."""
    weight = torch.ones(4, 4, dtype=torch.float64, requires_grad=True)
    bounds = xb.bound(lambda x: fn(F.relu(x @ weight)))(xb.Interval(torch.full_like(X, -1.0), torch.full_like(X, 0.5)))
    bounds.width.sum().backward()
    assert bounds.isfinite().all() and weight.grad is not None and weight.grad.isfinite().all()


def test_a_division_by_0_does_not_spoil_the_gradients_of_other_bounds() -> None:
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    bounds = xb.bound(lambda x: 1 / (x * weight))(xb.Interval.linf(torch.tensor([0.0, 1.0, 2.0]).double(), 0.1))
    bounds.rad[1:].sum().backward()
    assert bounds.isfinite().tolist() == [False, True, True] and weight.grad.isfinite().all()


def test_the_angle_of_a_zero_whose_sign_nobody_knows() -> None:
    """In real arithmetic it is π on the left; floating point may have come to a −0, whose angle is −π."""

    def angle(x: torch.Tensor) -> torch.Tensor:
        return torch.atan2(F.relu(x - 2) * x, x * 0 - 1)

    x = torch.tensor([0.5, -0.5, 0.0])
    box = xb.Interval.linf(x, 0.25)
    real = xb.bound(angle, sound=True)(box)
    assert ((real.lower.double() <= math.pi) & (real.upper.double() >= math.pi)).all()
    evaluated = xb.bound(angle, sound=True, semantics="float32")(box)
    for values in (x, x + 0.25, x - 0.25):
        assert evaluated.contains(angle(values)).all()
    assert (evaluated.upper.double() >= math.pi).all()
