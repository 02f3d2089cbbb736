"""Rounding to whole numbers, and remainders: exact ranges, and gradients through them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.rules.cases import Case, assert_elementwise_ranges_are_exact, case_id, check, rand

aten = torch.ops.aten

X = rand(3, 4)
OTHER = rand(3, 4, seed=1)


CASES = [
    *(Case(name, getattr(torch, name), X) for name in ("floor", "ceil", "round", "trunc")),
    Case("frac", torch.frac, 2 * X),
    Case("round, decimals", lambda x: x.round(decimals=1), X, kinks=False),
    Case("round, negative decimals", lambda x: x.round(decimals=-1), 10 * X, kinks=False),
    Case("remainder", lambda x: torch.remainder(x, 0.7), X, kinks=False),
    Case("remainder, negative", lambda x: torch.remainder(x, -1.5), 2 * X, kinks=False),
    Case("remainder, tensor", lambda x: torch.remainder(x, OTHER), X, kinks=False),
    Case("remainder by a set", lambda x: torch.remainder(OTHER, x.abs() + 2), X, kinks=False),
    Case("remainder of a number", lambda x: torch.remainder(1.3, x.abs() + 2), X, gradient=False, kinks=False),
    Case("fmod", lambda x: torch.fmod(x, 0.7), X, kinks=False),
    Case("fmod, tensor", lambda x: torch.fmod(x, OTHER), X, kinks=False),
    Case("fmod by a set", lambda x: torch.fmod(OTHER, x.abs() + 2), X, kinks=False),
    Case("floor_divide", lambda x: torch.floor_divide(x, 0.7), X, gradient=False, kinks=False),
    Case("floor_divide by a set", lambda x: torch.floor_divide(OTHER, x.abs() + 2), X, gradient=False, kinks=False),
    Case("floor_divide by a scalar", lambda x: aten.floor_divide.Scalar(x, 0.7), X, gradient=False, kinks=False),
    Case("division, trunc", lambda x: torch.div(x, -0.3, rounding_mode="trunc"), X, kinks=False),
    Case("division, trunc, of whole numbers", lambda x: torch.div(x, 0.1, rounding_mode="trunc"), X),
    Case("division, scalar overload", lambda x: aten.div.Scalar_mode(x, 0.3, rounding_mode="floor"), X, kinks=False),
]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_autograd(case: Case) -> None:
    check(case)


RANGES: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {
    "floor": (torch.floor, -2.5, 2.5),
    "round": (torch.round, -2.5, 2.5),
    "trunc": (torch.trunc, -2.5, 2.5),
    "frac": (torch.frac, -2.5, 2.5),
    "remainder": (lambda x: torch.remainder(x, 0.7), -2, 2),
    "remainder, negative": (lambda x: torch.remainder(x, -0.7), -2, 2),
    "fmod": (lambda x: torch.fmod(x, 0.7), -2, 2),
}


@pytest.mark.parametrize("name", RANGES)
def test_ranges_are_exact(name: str) -> None:
    fn, low, high = RANGES[name]
    assert_elementwise_ranges_are_exact(fn, low, high, slope=False)
