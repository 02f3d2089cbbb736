"""Three-valued comparisons of sets, logic on them, and selection by them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pyxai_bounds as xb
from tests.networks import sample
from tests.rules.cases import Case, Direct, case_id, check, rand

aten = torch.ops.aten
X = rand(3, 4)
OTHER = rand(3, 4, seed=1)
KEEP = torch.tensor([[True, False, True, True]] * 3)

COMPARISONS = {
    "lt": (torch.lt, aten.lt),
    "le": (torch.le, aten.le),
    "gt": (torch.gt, aten.gt),
    "ge": (torch.ge, aten.ge),
    "eq": (torch.eq, aten.eq),
    "ne": (torch.ne, aten.ne),
}


def selected(condition: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.where(condition(x), 2 * x, OTHER - x)


def written(x: Tensor, place: Any, value: Any) -> Tensor:
    y = x * 2
    y[place] = value
    return y


CASES = [
    Case("any", lambda x: (x > 0.1).any(1) * x[:, 0], X),
    Case("any of all", lambda x: (x > 3).any() * x, X),
    Case("any of dimensions", lambda x: torch.any(x > 3, (0, 1)) * x, X),
    Case("all", lambda x: (x > -1).all(0, keepdim=True) * x, X),
    Case("all of all", lambda x: (x > -1).all() * x, X),
    Case("all of dimensions", lambda x: torch.all(x > -9, (0, 1)) * x, X),
    Case("xor", lambda x: ((x > 0) ^ (x > 0.5)) * x, X),
    Case("logical xor", lambda x: torch.logical_xor(x > 0, x > 0.5) * x, X),
    Case("products and sums of truth values", lambda x: ((x > 0) * (x < 1) + (x > 2)) * x, X),
    Case("a number is itself", lambda x: torch.where(x == x, x, -x), X),
    Case("infinite", lambda x: x.masked_fill(x.isinf() | ~x.isfinite(), 1.0), X),
    *(Case(f"{name} a number", selected(lambda x, fn=fn: fn(x, 0.0)), X) for name, (fn, _) in COMPARISONS.items()),
    *(Case(f"{name} a point", selected(lambda x, fn=fn: fn(x, OTHER)), X) for name, (fn, _) in COMPARISONS.items()),
    *(
        Case(f"{name} a set", selected(lambda x, fn=fn: fn(x, x.flip(1))), X)
        for name, (fn, _) in COMPARISONS.items()
    ),
    Case("point lt set", selected(lambda x: x > OTHER), X),
    Case("and", selected(lambda x: (x > 0) & (x < OTHER)), X),
    Case("and with a point", selected(lambda x: (x > 0) & KEEP), X),
    Case("or", selected(lambda x: (x > 0) | (x < OTHER)), X),
    Case("not", selected(lambda x: ~(x > 0)), X),
    Case("logical and", selected(lambda x: torch.logical_and(x, x > OTHER)), X),
    Case("logical or", selected(lambda x: torch.logical_or(x > OTHER, x)), X),
    Case("isnan", selected(lambda x: torch.isnan(x) | (x > 0)), X),
    Case("logical not", selected(lambda x: torch.logical_not(x)), X),
    Case("where, number", lambda x: torch.where(x > 0, x, -1.5), X),
    Case("where, both points", lambda x: torch.where(x > 0, OTHER, 2.0) + x, X),
    Case("masked_fill", lambda x: x.masked_fill(x > 0, -1.5), X),
    Case("masked_fill by a set", lambda x: x.masked_fill(x.t().reshape(3, 4) > 0, x[0, 0]), X),
    Case("masked_fill, point mask", lambda x: OTHER.masked_fill(KEEP, x[0, 0]), X),
    Case("written by a mask", lambda x: written(x, x < 0, -1.5), X),
    Case("written by a mask of rows", lambda x: written(x, x[:, 0] < 0, x[1, 2]), X),
    Case("written by a mask of columns", lambda x: written(x, (slice(None), x[0] < 0.2), x[1, 2]), X),
    Case("mask as a number", lambda x: x * (x > 0), X),
    Case("mask converted", lambda x: x + (x > OTHER).to(x.dtype), X),
    Case("masks counted", lambda x: x + (x > 0).sum(1, keepdim=True), X),
    Case("masks rearranged", selected(lambda x: torch.cat([(x > 0)[:, 2:], KEEP[:, :2]], 1)), X),
    Case("mask repeated and reshaped",
         selected(lambda x: (x[:, :2] > 0).reshape(3, 1, 2).repeat(1, 2, 1).view(3, 4)), X),
]  # fmt: skip

A, B = xb.Interval.linf(X, 0.3), xb.Interval.linf(OTHER, 0.3)
DIRECT = [Direct(op.Scalar, (A, 0.25)) for _, op in COMPARISONS.values()]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_autograd(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_are_exact_for_all_positions_of_two_sets(name: str) -> None:
    """Brute force over whole numbers; every result that occurs is allowed, and no other, but for equality."""
    ends = list(itertools.combinations_with_replacement(range(4), 2))
    pairs = torch.tensor(list(itertools.product(ends, ends)), dtype=torch.float64)
    a, b = (xb.Interval(pairs[:, i, 0], pairs[:, i, 1]) for i in (0, 1))
    fn = COMPARISONS[name][0]
    bounds = xb.bound(lambda a, b: fn(a, b))(a, b)
    least, greatest = torch.ones(len(pairs)).double(), torch.zeros(len(pairs)).double()
    for x, y in itertools.product(torch.arange(0, 3.25, 0.5).double(), repeat=2):
        inside = (a.contains(x)) & (b.contains(y))
        value = fn(x, y).double()
        least[inside], greatest[inside] = least[inside].clamp(max=value), greatest[inside].clamp(min=value)
    assert torch.equal(bounds.lower, least) and torch.equal(bounds.upper, greatest)


@pytest.mark.parametrize("name", COMPARISONS)
def test_nan_is_neither_certainly_true_nor_certainly_false(name: str) -> None:
    nan = xb.Interval.of(torch.full((1,), float("nan")).double(), torch.zeros(1).double())
    bounds = xb.bound(lambda x: COMPARISONS[name][0](x, 0.0))(nan)
    assert bounds.lower == 0 and bounds.upper == 1


def test_sums_and_products_of_truth_values_are_truth_values() -> None:
    for fn in (
        lambda x: (x > 0) + (x > 1),
        lambda x: (x > 0) * KEEP,
        lambda x: (x > 0).view(4, 3) + (x < 1).view(4, 3),
    ):
        bounds = xb.bound(fn)(A)
        assert bounds.lower.min() >= 0 and bounds.upper.max() <= 1
        for seed in range(10):
            assert bounds.contains(fn(sample(A, seed, corners=seed % 2 == 0)).double()).all()


@pytest.mark.parametrize("operator", [torch.bitwise_and, torch.bitwise_or])
def test_truth_values_are_not_combined_with_the_bits_of_integers(operator: Callable[..., Tensor]) -> None:
    """2 & True is 0, which is not the truth of both; logical operators take integers as truth values."""
    number = torch.full((3, 4), 2)
    with pytest.raises(xb.UnsupportedOperatorError, match="compare these with 0 first"):
        xb.bound(lambda x: x * operator(x > 0, number))(A)
    both = xb.bound(lambda x: x * torch.logical_and(x > 0, number))(A)
    assert both.contains(A.mid * torch.logical_and(A.mid > 0, number)).all()


@pytest.mark.parametrize("case", DIRECT, ids=case_id)
def test_scalar_overloads(case: Direct) -> None:
    bounds = xb.rules.RULES[case.op].function(*case.args)
    for value in (A.lower, A.mid, A.upper):
        assert bounds.contains(case.op(value, 0.25).double()).all()
    check_points = xb.rules.RULES[case.op].function(xb.Interval.point(X), 0.25)
    assert torch.equal(check_points.mid, case.op(X, 0.25).double()) and check_points.rad.max() == 0
