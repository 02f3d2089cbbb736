"""Reductions: sums, means, extrema, norms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import pyxai_bounds as xb
from tests.rules.cases import Case, case_id, check, rand

aten = torch.ops.aten
X = rand(3, 4)

CASES = [
    Case("sum", lambda x: x.sum(), X),
    Case("sum over a dimension", lambda x: x.sum(1), X),
    Case("sum, kept", lambda x: x.sum((0, -1), keepdim=True), X),
    Case("mean", lambda x: x.mean(), X),
    Case("mean over dimensions", lambda x: x.mean((0, 1), keepdim=True), X),
    Case("cumsum", lambda x: x.cumsum(1), X),
    Case("amax", lambda x: x.amax(1), X, finite=False),
    Case("amax over all", lambda x: x.amax(), X, finite=False),
    Case("amin, kept", lambda x: x.amin(0, keepdim=True), X, finite=False),
    Case("amax over two", lambda x: x.amax((0, 1)), X, finite=False),
    Case("max over a dimension", lambda x: x.max(1).values, X, gradient=False),
    Case("min over a dimension", lambda x: x.min(0, keepdim=True).values, X, gradient=False),
    Case("max over all", lambda x: x.max(), X, finite=False),
    Case("min over all", lambda x: x.min(), X, finite=False),
    Case("logsumexp", lambda x: x.logsumexp(1), X),
    Case("logsumexp, kept", lambda x: x.logsumexp((0, 1), keepdim=True), X),
    Case("topk", lambda x: x.topk(2, 1).values, X, gradient=False),
    Case("least of a column", lambda x: x.topk(1, 0, largest=False).values, X, gradient=False),
    Case("sort", lambda x: x.sort(1, descending=True).values, X, gradient=False),
    Case("stable sort", lambda x: x.sort(dim=0, stable=True).values, X, gradient=False),
    Case("kthvalue", lambda x: x.kthvalue(2, 1).values, X, gradient=False),
    Case("median", lambda x: x.median(1).values, X, gradient=False),
    Case("2-norm", lambda x: torch.linalg.vector_norm(x), X, finite=False),
    Case("2-norm over a dimension", lambda x: torch.linalg.vector_norm(x, dim=1, keepdim=True), X + 3, finite=False),
    Case("1-norm", lambda x: torch.linalg.vector_norm(x, 1, dim=1), X),
    Case("∞-norm", lambda x: torch.linalg.vector_norm(x, float("inf"), dim=0), X, finite=False),
    Case("∞-norm of everything", lambda x: torch.linalg.vector_norm(x, float("inf")), X, finite=False),
    Case("distance", lambda x: (x - X.flip(0)).norm(dim=1), X, finite=False, kinks=False),
]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_autograd(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("order", [1, 2, float("inf")])
def test_norms_are_exact(order: float) -> None:
    """The least norm is that of the point nearest to 0, the greatest that of the corner farthest from it."""
    box = xb.Interval.linf(X, 0.6)

    def norm(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, order, dim=1)

    bounds = xb.bound(norm)(box)
    nearest = box.mid.sign() * (box.mid.abs() - box.rad).clamp(min=0)
    farthest = box.mid.sign() * (box.mid.abs() + box.rad)
    assert torch.allclose(bounds.lower, norm(nearest), atol=1e-12, rtol=0)
    assert torch.allclose(bounds.upper, norm(farthest), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["sum over a dimension", "mean", "amax", "amin, kept", "logsumexp"])
def test_bounds_are_attained_at_the_ends(name: str) -> None:
    fn = next(case.fn for case in CASES if case.name == name)
    box = xb.Interval.linf(X, 0.6)
    bounds = xb.bound(fn)(box)
    assert torch.allclose(bounds.lower, fn(box.lower), atol=1e-12, rtol=0)
    assert torch.allclose(bounds.upper, fn(box.upper), atol=1e-12, rtol=0)


@pytest.mark.parametrize("order", [0, 3, -1, float("-inf")])
def test_other_norms_are_refused(order: float) -> None:
    with pytest.raises(xb.UnsupportedOperatorError, match="norm of order"):
        xb.bound(lambda x: torch.linalg.vector_norm(x, order))(xb.Interval.linf(X, 0.1))


def test_the_gradient_of_max_over_a_dimension_is_refused_where_the_place_of_the_maximum_is_needed() -> None:
    def gradient(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(x.max(1).values.sum(), x)[0]

    with pytest.raises(xb.UnsupportedOperatorError, match="indices that differ"):
        xb.bound(gradient)(xb.Interval.linf(X, 0.1))


@pytest.mark.parametrize("fn", [lambda x: x.topk(2, 1), lambda x: x.sort(1), lambda x: x.kthvalue(3, 1)])
def test_order_statistics_are_exact_and_their_places_are_refused(fn: Callable) -> None:
    box = xb.Interval.linf(X, 0.7)
    bounds = xb.bound(lambda x: fn(x)[0])(box)
    assert (bounds.lower - fn(box.lower)[0]).abs().max() < 1e-15
    assert (bounds.upper - fn(box.upper)[0]).abs().max() < 1e-15
    with pytest.raises(xb.UnsupportedOperatorError, match="indices that differ"):
        xb.bound(lambda x: x.gather(1, fn(x)[1].reshape(3, -1)))(box)


def test_the_largest_in_no_order_have_no_places() -> None:
    with pytest.raises(xb.UnsupportedOperatorError, match="sorted=False"):
        xb.bound(lambda x: x.topk(2, 1, sorted=False).values)(xb.Interval.linf(X, 0.1))
