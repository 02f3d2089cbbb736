"""Each property against brute force over the members of small boxes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pyxai_bounds as xb
from pyxai_bounds.certify.properties import kept

PROPERTIES = [
    xb.TopK(2),
    xb.TopK(2, by="signed"),
    xb.TopK(1, channels="sum"),
    xb.Sign(),
    xb.Sign(k=2),
    xb.L1(0.9),
    xb.L2(0.5),
    xb.Linf(0.3),
    xb.MeanSquare(0.03),
    xb.Cosine(0.9),
]


def boxes(count: int, rad: float) -> tuple[Tensor, xb.Interval]:
    generator = torch.Generator().manual_seed(0)
    nominal = torch.randn(count, 2, 3, generator=generator, dtype=torch.float64)
    below, above = (rad * torch.rand(count, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    return nominal, xb.Interval(nominal - below, nominal + above)


def point(t: Tensor) -> xb.Interval:
    return xb.Interval.of(t, torch.zeros_like(t))


@pytest.mark.parametrize("property", PROPERTIES, ids=str)
@pytest.mark.parametrize("rad", [0.05, 0.3])
def test_no_member_of_the_box_has_a_smaller_margin(property, rad: float) -> None:
    nominal, bounds = boxes(60, rad)
    margin = property.margin(nominal, bounds)
    certified = kept(property, margin)
    assert rad > 0.1 or certified.any(), "the test must certify something"
    worst = torch.full_like(margin, torch.inf)
    generator = torch.Generator().manual_seed(1)
    for trial in range(300):
        position = torch.rand(nominal.shape, generator=generator, dtype=torch.float64)
        position = position.round() if trial % 2 else position
        worst = worst.minimum(property.margin(nominal, point(bounds.lower.lerp(bounds.upper, position))))
    assert (worst >= margin - 1e-12).all()
    assert not (certified & ~kept(property, worst)).any()


@pytest.mark.parametrize("property", [p for p in PROPERTIES if not isinstance(p, xb.Cosine)], ids=str)
def test_the_margin_is_attained_at_a_corner(property) -> None:
    """All but the cosine's bound are exact: some corner of a small box has that very margin."""
    nominal, bounds = boxes(8, 0.05)
    worst = torch.full((8,), torch.inf, dtype=torch.float64)
    for corner in range(64):
        position = torch.tensor([(corner >> i) & 1 for i in range(6)], dtype=torch.float64).reshape(2, 3)
        worst = worst.minimum(property.margin(nominal, point(bounds.lower.lerp(bounds.upper, position))))
    assert torch.allclose(worst, property.margin(nominal, bounds), atol=1e-12)


def test_at_one_explanation_the_cosine_is_itself_and_has_a_slope() -> None:
    """An attack descends it there: a change of length breaks nothing, and where it is far away there is a way on."""
    nominal = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64).expand(5, 3)
    others = torch.tensor([[10.0, -20, 5], [0.01, -0.02, 0.005], [2.0, 1, 0], [-1.0, 3, 0], [0.9, -2, 0.4]]).double()
    others.requires_grad_()
    margin = xb.Cosine(0.3).margin(nominal, point(others))
    assert torch.allclose(margin, torch.cosine_similarity(nominal, others) - 0.3, rtol=0, atol=1e-12)
    (slope,) = torch.autograd.grad(margin.sum(), others)
    (expected,) = torch.autograd.grad(torch.cosine_similarity(nominal, others).sum(), others)
    assert torch.allclose(slope, expected)
    assert xb.Cosine(0.3).margin(nominal[:1], point(torch.zeros(1, 3).double())) == pytest.approx(-0.3)


def test_the_cosine_of_bounds_is_at_least_what_deviations_alone_say() -> None:
    nominal, bounds = boxes(200, 1.5)
    v, d = nominal.flatten(1), torch.maximum(bounds.upper - nominal, nominal - bounds.lower).flatten(1)
    numerator = v.square().sum(1) - (v.abs() * d).sum(1)
    known = torch.where(numerator >= 0, numerator / (v.norm(dim=1) * (v.abs() + d).norm(dim=1)), -1.0)
    ratio = d.norm(dim=1) / v.norm(dim=1)
    known = known.maximum(torch.where(ratio < 1, (1 - ratio.square()).clamp(min=0).sqrt(), -1.0))
    assert (xb.Cosine(0.0).margin(nominal, bounds) >= known - 1e-12).all() and (known > 0).any() and (known < 0).any()


def test_top_k_by_hand() -> None:
    nominal = torch.tensor([[3.0, -2.0, 1.0, 0.5]])
    bounds = xb.Interval(torch.tensor([[2.5, -2.2, 0.9, -0.6]]), torch.tensor([[3.5, -1.8, 1.1, 0.7]]))
    assert xb.TopK(2).margin(nominal, bounds).item() == pytest.approx(1.8 - 1.1)
    assert xb.TopK(1, by="signed").margin(nominal, bounds).item() == pytest.approx(2.5 - 1.1)
    assert xb.TopK(3).margin(nominal, bounds).item() == pytest.approx(0.9 - 0.7)
    assert xb.TopK(4).margin(nominal, bounds).item() == float("inf")
    assert xb.TopK(9).margin(nominal, bounds).item() == float("inf")
    tie = torch.tensor([[1.0, 1.0, 0.0]])
    assert not kept(xb.TopK(1), xb.TopK(1).margin(tie, point(tie))).any()


def test_a_zero_keeps_no_sign() -> None:
    nominal = torch.tensor([[1.0, 0.0]])
    assert not kept(xb.Sign(), xb.Sign().margin(nominal, point(nominal))).any()
    assert kept(xb.Sign(k=1), xb.Sign(k=1).margin(nominal, point(nominal))).all()


def test_bad_options_are_refused() -> None:
    for make, message in (
        (lambda: xb.TopK(0), "k must be at least 1, got 0"),
        (lambda: xb.TopK(1, by="size"), "choose 'abs' or 'signed'"),
        (lambda: xb.TopK(1, channels="max"), "choose 'none' or 'sum'"),
        (lambda: xb.Sign(0), "k must be at least 1"),
        (lambda: xb.L2(-1.0), "tau must be ≥ 0"),
        (lambda: xb.L2(float("nan")), "tau must be ≥ 0"),
        (lambda: xb.Cosine(1.5), "must lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    flat = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"shape \[B, C, \.\.\.\]"):
        xb.TopK(1, channels="sum").margin(flat, point(flat))


@pytest.mark.parametrize("kind", [xb.L1, xb.L2, xb.Linf, xb.MeanSquare])
def test_deviations_whose_squares_underflow_are_no_zeros(kind: type) -> None:
    still, moved = (
        xb.Interval.of(torch.zeros(1, 3).double(), torch.full((1, 3), rad, dtype=torch.float64))
        for rad in (0.0, 1e-170)
    )
    assert kind(0.0).margin(still.mid, still) == 0 and kind(0.0).margin(moved.mid, moved) < 0


@pytest.mark.parametrize("scale", [1e-200, 1e-161, 1e-155, 1e155, 1e200])
def test_cosines_where_squares_underflow_or_overflow(scale: float) -> None:
    """The cosine does not depend on the explanation's unit."""
    v = torch.tensor([[2.0, 1.0], [1.0, -1.0], [3.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    rad = torch.tensor([[1.5, 1.5], [0.05, 0.05], [0.5, 0.0], [0.0, 1.0]], dtype=torch.float64)
    usual, scaled = (xb.Cosine(0.9).margin(v * by, xb.Interval.of(v * by, rad * by)) for by in (1.0, scale))
    assert usual[3].isnan() and torch.allclose(scaled, usual, rtol=0, atol=1e-12, equal_nan=True)
    assert (scaled > 0).tolist() == [False, True, True, False]
