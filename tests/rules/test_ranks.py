"""Order statistics and their places: values, gradients, and what is selected by the place of a maximum."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pyxai_bounds as xb
from tests.rules.cases import Case, case_id, check, rand
from tests.soundness.programs import members, outside

aten = torch.ops.aten
X = rand(3, 5)

# Which of two equal elements comes first is left open, so that no point is exact where there are ties.
CASES = [
    Case("max", lambda x: x.max(1).values, X),
    Case("min, kept", lambda x: x.min(0, keepdim=True).values, X),
    Case("amax", lambda x: x.amax(1), X, kinks=False),
    Case("amin over two", lambda x: x.amin((0, 1)), X, kinks=False),
    Case("max over all", lambda x: x.max(), X, kinks=False),
    Case("median over all", lambda x: x.median(), X, kinks=False),
    Case("nanmedian over all", lambda x: x.nanmedian() + 0 * x.sum(), X, gradient=False),
    Case("kthvalue", lambda x: x.kthvalue(2, 1).values, X, kinks=False),
    Case("median", lambda x: x.median(1).values, X, kinks=False),
    Case("nanmedian", lambda x: x.nanmedian(1, keepdim=True).values, X, kinks=False),
    Case("topk", lambda x: x.topk(2, 1).values, X, kinks=False),
    Case("least of a column", lambda x: x.topk(2, 0, largest=False).values, X, kinks=False),
    Case("sort", lambda x: x.sort(1, descending=True).values, X, kinks=False),
    Case("stable sort", lambda x: x.sort(dim=0, stable=True).values, X, kinks=False),
    Case("msort", torch.msort, X, kinks=False),
    Case("cummax", lambda x: x.cummax(1).values, X, gradient=False),
    Case("cummin", lambda x: x.cummin(0).values, X, gradient=False),
    Case("the greatest logit", lambda x: x.gather(1, x.argmax(1, keepdim=True)), X),
    Case("the logit of the smallest", lambda x: (2 * x).gather(1, x.argmin(1).reshape(3, 1)), X),
    Case("another row's maximum", lambda x: x.tanh().gather(0, x.argmax(0).unsqueeze(0)), X),
    Case("marked", lambda x: torch.zeros_like(x).scatter(1, x.argmax(1, keepdim=True), 1.0) * x, X),
    Case("added to the maximum", lambda x: x.scatter_add(1, x.argmax(1, keepdim=True), x[:, :1]), X),
    Case("one-hot maximum", lambda x: x * F.one_hot(x.argmax(1), 5), X),
    Case("index of the maximum", lambda x: x[torch.arange(3), x.argmax(1)], X),
    Case("rows with their minimum", lambda x: x.tanh()[torch.tensor([2, 0, 2]), x.argmin(1)], X),
    Case("is it the maximum", lambda x: torch.where(x.argmax(1) == torch.tensor([0, 4, 9]), x[:, 0], x[:, 1]), X),
    Case("is it not the minimum", lambda x: x * (x.argmin(0, keepdim=True) != torch.arange(3).unsqueeze(1)), X),
    Case("quantile", lambda x: torch.quantile(x, 0.3, dim=1), X, kinks=False),
    Case("quantile of all", lambda x: x.quantile(0.77), X, kinks=False),
    Case("quantiles, kept", lambda x: x.quantile(torch.tensor([0.1, 0.6]).double(), 0, keepdim=True), X, kinks=False),
    *(Case(f"quantile, {kind}", lambda x, kind=kind: x.quantile(0.3, 1, interpolation=kind), X, kinks=False)
      for kind in ("lower", "higher", "midpoint", "nearest")),
    Case("nanquantile", lambda x: torch.nanquantile(x, 0.3, dim=1), X, kinks=False),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_autograd(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("fn", [lambda x: x.topk(2, 1), lambda x: x.sort(1), lambda x: x.kthvalue(3, 1)])
def test_order_statistics_are_exact(fn: Callable) -> None:
    box = xb.Interval.linf(X, 0.7)
    bounds = xb.bound(lambda x: fn(x)[0])(box)
    assert (bounds.lower - fn(box.lower)[0]).abs().max() < 1e-15
    assert (bounds.upper - fn(box.upper)[0]).abs().max() < 1e-15


def test_quantiles_of_points_are_pytorchs() -> None:
    for fn in (
        lambda x: x.quantile(0.3, 1, keepdim=True),
        lambda x: x.quantile(torch.tensor([0.0, 1.0], dtype=x.dtype)),
    ):
        bounds = xb.bound(fn)(xb.Interval.point(X))
        assert bounds.shape == fn(X).shape and (bounds.mid - fn(X)).abs().max() < 1e-14
    box = xb.Interval.linf(X, 0.2)
    bounds = xb.bound(lambda x: x.quantile(0.3, 1))(box)
    assert (bounds.lower - box.lower.quantile(0.3, 1)).abs().max() < 1e-14


@pytest.mark.parametrize("kind", ["linear", "lower", "higher", "midpoint", "nearest"])
@pytest.mark.parametrize("semantics", ["real", "float32"])
def test_quantiles_have_proofs(kind: str, semantics: str) -> None:
    """At a rank that float32 holds, against float64 without any tolerance; its gradient, too."""

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = x.quantile(0.375, 1, interpolation=kind)
            return value, torch.autograd.grad(value.exp().sum(), x)[0]

    x = X.float()
    for eps in (0.0, 1e-5, 0.3):
        box = xb.Interval.linf(x, eps)
        bounds = xb.bound(both, sound=True, semantics=semantics)(box)  # type: ignore[arg-type]
        for point in members(box, 6):
            for part, value in zip(bounds, both(point), strict=True):
                assert part.isfinite().all() and not outside(part, value).any()


@pytest.mark.parametrize("op", ["max", "kthvalue", "median", "sort"])
def test_gradients_reach_exactly_what_can_stand_there(op: str) -> None:
    """Against brute force over whole numbers without ties within a row."""
    weight = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    value = {
        "max": lambda x: x.max(1).values,
        "kthvalue": lambda x: x.kthvalue(2, 1).values,
        "median": lambda x: x.median(1).values,
        "sort": lambda x: (x.sort(1).values * weight).sum(1),
    }[op]

    def gradient(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(value(x).sum(), x)[0]

    lower = torch.tensor([[0.0, 1, 5], [0, 0, 0], [3, 0, 4], [2, 5, 0]], dtype=torch.float64)
    upper = torch.tensor([[2.0, 4, 6], [2, 3, 3], [5, 1, 4], [2, 6, 1]], dtype=torch.float64)
    least, greatest = torch.full_like(lower, 9.0), torch.full_like(lower, -9.0)
    for values in itertools.permutations(range(7), 3):
        x = torch.tensor([values] * 4, dtype=torch.float64)
        inside = ((lower <= x) & (x <= upper)).all(1)
        found = gradient(x)
        least[inside] = torch.minimum(least, found)[inside]
        greatest[inside] = torch.maximum(greatest, found)[inside]
    bounds = xb.bound(gradient)(xb.Interval(lower, upper))
    assert torch.equal(bounds.lower, least) and torch.equal(bounds.upper, greatest)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.argmax(1),
        lambda x: x.argmax(),
        lambda x: x[x.argmax(1), torch.arange(3)],
        lambda x: x.index_put((torch.arange(3), x.argmax(1)), x[:, 0]),
        lambda x: x * (x.argmax(1) > 2).unsqueeze(1),
        lambda x: x * (x.topk(2, 1).indices == 1).any(1, keepdim=True),
        lambda x: x.gather(1, x.argmax(1, keepdim=True) + 1),
        lambda x: x.t().gather(1, x.argmax(0, keepdim=True)[:, :3].t()),
    ],
)
def test_places_are_refused_where_their_value_is_needed(fn: Callable) -> None:
    with pytest.raises(xb.UnsupportedOperatorError, match=r"differ|place among all"):
        xb.bound(fn)(xb.Interval.linf(X, 2.0))


def test_the_largest_in_no_order_have_no_places() -> None:
    with pytest.raises(xb.UnsupportedOperatorError, match="sorted=False"):
        xb.bound(lambda x: x.topk(2, 1, sorted=False).values)(xb.Interval.linf(X, 0.1))
