"""Reductions: sums, means, extrema, norms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pyxai_bounds as xb
from tests.rules.cases import Case, case_id, check, rand
from tests.soundness.programs import members, outside

aten = torch.ops.aten
X = rand(3, 4)
ROWS = torch.tensor([[0, 2, 0, 1], [2, 2, 1, 1], [0, 0, 0, 2]])

CASES = [
    Case("sum", lambda x: x.sum(), X),
    Case("sum over a dimension", lambda x: x.sum(1), X),
    Case("sum, kept", lambda x: x.sum((0, -1), keepdim=True), X),
    Case("mean", lambda x: x.mean(), X),
    Case("mean over dimensions", lambda x: x.mean((0, 1), keepdim=True), X),
    Case("normalised", lambda x: F.normalize(x, dim=1), X, gradient=False),
    Case("normalised by hand", lambda x: x / (x.norm(dim=(0, 1), keepdim=True) + 1e-8), X, gradient=False),
    Case("normalised, and its gradient", lambda x: F.normalize(x, dim=0), X + 3, kinks=False),
    Case("cumsum", lambda x: x.cumsum(1), X),
    Case("amax", lambda x: x.amax(1), X, finite=False),
    Case("amax over all", lambda x: x.amax(), X, finite=False),
    Case("amin, kept", lambda x: x.amin(0, keepdim=True), X, finite=False),
    Case("amax over two", lambda x: x.amax((0, 1)), X, finite=False),
    Case("max over all", lambda x: x.max(), X, finite=False),
    Case("min over all", lambda x: x.min(), X, finite=False),
    Case("logsumexp", lambda x: x.logsumexp(1), X),
    Case("logsumexp, kept", lambda x: x.logsumexp((0, 1), keepdim=True), X),
    Case("2-norm", lambda x: torch.linalg.vector_norm(x), X, finite=False),
    Case("2-norm over a dimension", lambda x: torch.linalg.vector_norm(x, dim=1, keepdim=True), X + 3, finite=False),
    Case("1-norm", lambda x: torch.linalg.vector_norm(x, 1, dim=1), X),
    Case("∞-norm", lambda x: torch.linalg.vector_norm(x, float("inf"), dim=0), X, finite=False),
    Case("∞-norm of everything", lambda x: torch.linalg.vector_norm(x, float("inf")), X, finite=False),
    *(
        Case(f"{p}-norm", lambda x, p=p: torch.linalg.vector_norm(x, p, dim=1), X.abs() + 0.5, kinks=False)
        for p in (3, 2.5, 0.5, -1)
    ),
    Case("3-norm near 0", lambda x: torch.linalg.vector_norm(x, 3, dim=1), X, finite=False, kinks=False),
    Case("least size", lambda x: torch.linalg.vector_norm(x, float("-inf"), dim=1), X, finite=False, gradient=False),
    Case(
        "count of numbers that are not 0", lambda x: torch.linalg.vector_norm(x, 0, dim=1) + x[:, 0], X, gradient=False
    ),
    Case("count_nonzero", lambda x: torch.count_nonzero(x, 1) * x[:, 0], X, finite=False),
    Case("count_nonzero of all", lambda x: torch.count_nonzero(x, (0, 1)) * x, X, finite=False),
    Case("norm of a dimension", lambda x: aten.norm.ScalarOpt_dim(x, 2, [1]), X + 3, kinks=False),
    Case("prod", lambda x: x.prod(), X, eps=0.1),
    Case("prod over a dimension", lambda x: x.prod(1), X, eps=0.1),
    Case("prod, kept", lambda x: x.prod(0, keepdim=True), X, eps=0.1),
    Case("cumprod", lambda x: x.cumprod(1), X, eps=0.1),
    Case("cumprod, operator", lambda x: aten.cumprod.default(x, 0), X, gradient=False),
    Case("logcumsumexp", lambda x: x.logcumsumexp(1), X),
    Case("logcumsumexp, first dimension", lambda x: torch.logcumsumexp(x, 0), X),
    Case("logcumsumexp of a number", lambda x: x.sum().logcumsumexp(0), X, gradient=False),
    Case("nansum", lambda x: x.nansum(1), X),
    Case("scatter_reduce", lambda x: X.scatter_reduce(0, ROWS, x, "sum"), X),
    Case("scatter_reduce, mean", lambda x: x.scatter_reduce(0, ROWS, X, "mean"), X),
    Case("scatter_reduce, amax", lambda x: x.scatter_reduce(0, ROWS, x, "amax"), X),
    Case(
        "scatter_reduce, amin without itself", lambda x: X.scatter_reduce(0, ROWS, x * X, "amin", include_self=False), X
    ),
    Case(
        "scatter_reduce, greatest neighbours",
        lambda x: torch.full_like(x, -1e9).scatter_reduce(0, ROWS, x, "amax"),
        X,
        eps=0.1,
    ),
    Case(
        "softmax of neighbours",
        lambda x: (x - torch.full_like(x, -9.0).scatter_reduce(0, ROWS, x, "amax").gather(0, ROWS)).exp(),
        X,
        eps=0.1,
    ),
    Case("aminmax", lambda x: torch.aminmax(x, dim=1)[0] - torch.aminmax(x, dim=1)[1], X, gradient=False),
    Case(
        "deviation and mean", lambda x: torch.std_mean(x, 1)[0] + torch.std_mean(x, 1)[1], 3 * X, eps=0.05, kinks=False
    ),
    Case("distances", lambda x: torch.cdist(x, X.flip(0) + 3), X, kinks=False),
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


def test_the_norm_of_any_order_is_exact() -> None:
    box = xb.Interval.linf(X, 0.6)
    nearest, farthest = (box.mid.abs() + sign * box.rad for sign in (-1, 1))
    for order in (3, 0.5):
        bounds = xb.bound(lambda x, order=order: torch.linalg.vector_norm(x, order, dim=1))(box)
        least = torch.linalg.vector_norm(nearest.clamp(min=0), order, dim=1)
        assert torch.allclose(bounds.lower, least, atol=1e-12, rtol=0)
        assert torch.allclose(bounds.upper, torch.linalg.vector_norm(farthest, order, dim=1), atol=1e-12, rtol=0)


def test_gradients_of_logcumsumexp_have_proofs() -> None:
    """Whatever sign the gradient has that comes in."""

    def gradient(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(torch.sin(3 * x.logcumsumexp(1)).sum(), x)[0]

    for x, eps in ((X, 0.3), (X, 0.0), (100 * X, 1.0)):
        box = xb.Interval.linf(x.float(), eps)
        bounds = xb.bound(gradient, sound=True)(box)
        for point in members(box, 10):
            assert bounds.isfinite().all() and not outside(bounds, gradient(point)).any()


def test_cumulative_products_are_written_where_they_are_asked_for() -> None:
    def product(x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        torch.cumprod(x, 1, out=out)
        return out

    bounds = xb.bound(product)(xb.Interval.linf(X, 0.1))
    assert bounds.contains(X.cumprod(1)).all() and (bounds.rad > 0).all()


def test_the_largest_in_no_order_have_no_places() -> None:
    with pytest.raises(xb.UnsupportedOperatorError, match="sorted=False"):
        xb.bound(lambda x: x.topk(2, 1, sorted=False).values)(xb.Interval.linf(X, 0.1))


@pytest.mark.parametrize("sound", [False, True])
def test_normalised_rows_are_bounded_exactly_where_they_may_be_0(sound: bool) -> None:
    box = xb.Interval(torch.tensor([[-1.0, 1.0, 0.0]]).double(), torch.tensor([[2.0, 2.0, 0.0]]).double())
    around = xb.Interval.linf(torch.zeros(1, 3).double(), 0.5)
    for fn in (lambda x: F.normalize(x, dim=1), lambda x: x / (x.norm(dim=1, keepdim=True) + 1e-12)):
        bounds = xb.bound(fn, sound=sound)(box)
        expected = torch.tensor([[-(2**-0.5), 5**-0.5, 0.0], [2 / 5**0.5, 1.0, 0.0]], dtype=torch.float64)
        assert (torch.cat((bounds.lower, bounds.upper)) - expected).abs().max() < 1e-11
        near = xb.bound(fn, sound=sound)(around)
        assert (near.lower + 1).abs().max() < 1e-11 and (near.upper - 1).abs().max() < 1e-11
        for b, set_ in ((bounds, box), (near, around)):
            for x in members(set_, 100):
                assert not sound or not outside(b, fn(x)).any()
