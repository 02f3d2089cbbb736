"""Metrics against their definitions, counted one pair and one sample at a time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

import pyxai_bounds as xb
from pyxai_bounds.certify import Excluded, Unlike, metrics
from pyxai_bounds.certify.properties import kept
from pyxai_bounds.certify.targeted import corner_masks
from tests.networks import images, mlp, sample

GENERATOR = torch.Generator().manual_seed(0)
A, B = (torch.rand(7, 12, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
TIED = (4 * A).round() / 4


def test_intersection_counts_what_both_tops_hold() -> None:
    for k in (1, 3, 11):
        expected = [
            len(set(np.argsort(-a)[:k].tolist()) & set(np.argsort(-b)[:k].tolist())) / k
            for a, b in zip(A.numpy(), B.numpy(), strict=True)
        ]
        assert metrics.intersection(A, B, k).tolist() == expected
    assert (metrics.intersection(A, B, 12) == 1).all() and (metrics.intersection(A, A, 5) == 1).all()


def test_rank_correlations_are_scipys_and_kendall_counts_pairs() -> None:
    for a, b in ((A, B), (TIED, B), (TIED, TIED.flip(1))):
        rows = list(zip(a.numpy(), b.numpy(), strict=True))
        assert metrics.spearman(a, b).tolist() == pytest.approx([scipy.stats.spearmanr(*row).statistic for row in rows])
        assert metrics.pearson(a, b).tolist() == pytest.approx([np.corrcoef(*row)[0, 1] for row in rows])
    pairs = list(itertools.combinations(range(12), 2))
    counted = [
        sum(np.sign(a[i] - a[j]) * np.sign(b[i] - b[j]) for i, j in pairs) / len(pairs)
        for a, b in zip(A.numpy(), B.numpy(), strict=True)
    ]
    assert metrics.kendall(A, B).tolist() == pytest.approx(counted)
    assert metrics.kendall(A, A).tolist() == pytest.approx([1.0] * 7)
    assert metrics.spearman(A, -A).tolist() == pytest.approx([-1.0] * 7)


def test_a_constant_explanation_has_no_correlation() -> None:
    constant = torch.ones_like(A)
    for metric in (metrics.kendall, metrics.spearman, metrics.pearson):
        assert metric(A, constant).isnan().all()


def test_mean_square_saliency_and_mass_center() -> None:
    v = torch.randn(3, 2, 4, 5, generator=GENERATOR, dtype=torch.float64)
    assert metrics.mean_square(v, 0 * v).tolist() == pytest.approx(v.square().mean((1, 2, 3)).tolist())
    assert torch.equal(metrics.saliency_map(v), v.abs().sum(1).flatten(1))
    assert torch.equal(metrics.saliency_map(A), A)
    for i, (row, column) in enumerate(metrics.mass_center(v).tolist()):
        size = v[i].abs().sum(0)
        expected = [sum(size[r, c].item() * (r, c)[axis] for r in range(4) for c in range(5)) for axis in (0, 1)]
        assert [row, column] == pytest.approx([value / size.sum().item() for value in expected])
    assert metrics.mass_center(torch.zeros(1, 1, 3, 5)).tolist() == [[1.0, 2.0]]
    with pytest.raises(ValueError, match="needs images"):
        metrics.mass_center(A)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="one shape"):
        metrics.intersection(A, B[:, :3], 2)
    with pytest.raises(ValueError, match="k=0"):
        metrics.intersection(A, B, 0)


# --- thickness: defined in the paper, never computed by the released code -------------------------------------------


def test_thickness_counts_pairs_along_the_paths() -> None:
    model = mlp((6, 12, 4))
    fn, x, y = xb.explain.gradient(model, "loss"), images(4, shape=(6,)), torch.tensor([0, 1, 2, 3])
    others = x + 0.8 * torch.randn(3, *x.shape, generator=GENERATOR, dtype=x.dtype)
    for k, points in ((1, 4), (3, 7)):
        expected = []
        for b in range(4):
            ranked = fn(x, y)[b].abs().argsort(descending=True).tolist()
            held = []
            for s in range(3):
                for step in range(points):
                    t = (step + 0.5) / points
                    at = ((1 - t) * x[b] + t * others[s, b])[None]
                    score = fn(at, y[b : b + 1])[0].abs()
                    held += [float(score[i] >= score[j]) for i in ranked[:k] for j in ranked[k:]]
            expected.append(sum(held) / len(held))
        found = metrics.thickness(fn, x, y, others, k=k, points=points, batch_size=3)
        assert found.tolist() == pytest.approx(expected)
    assert found.min() < 1


def test_thickness_of_a_linear_model_and_of_what_is_certified_is_1() -> None:
    x, y = images(4, shape=(6,)), torch.tensor([0, 1, 2, 3])
    for model, eps in ((nn.Linear(6, 4).double(), 1.0), (mlp((6, 12, 4)), 0.02)):
        fn = xb.explain.gradient(model)
        box = xb.Interval.linf(x, eps)
        others = torch.stack([sample(box, seed, corners=True) for seed in range(4)])
        held = metrics.thickness(fn, x, y, others, k=2)
        certified = xb.certify(fn, x, y, eps=eps, property=xb.TopK(2)).holds
        assert certified.any() and (held[certified] == 1).all()
    with pytest.raises(ValueError, match="k=6 top features of 6"):
        metrics.thickness(fn, x, y, others, k=6)
    with pytest.raises(ValueError, match=r"others must have shape \[S, 4, 6\]"):
        metrics.thickness(fn, x, y, others[:, :2], k=2)


def test_the_radius_of_a_ranking_is_computed() -> None:
    """Also defined and never computed by the released code of R2ET: here by bisection on bounds."""
    fn = xb.explain.gradient(mlp((6, 12, 4)), "loss")
    x, y = images(4, shape=(6,)), torch.tensor([0, 1, 2, 3])
    radius = xb.certified_radius(fn, x, y, property=xb.TopK(2), max_eps=1.0)
    assert (radius > 0).all() and (radius < 1).all()
    others = torch.stack([sample(xb.Interval.linf(x, radius[:, None]), s, corners=s % 2 == 0) for s in range(8)])
    assert (metrics.thickness(fn, x, y, others, k=2) == 1).all()


# --- what bounds guarantee ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 6])
def test_certified_intersection_is_never_above_a_member_of_the_bounds(k: int) -> None:
    nominal = torch.randn(30, 6, generator=GENERATOR, dtype=torch.float64)
    rad = 0.4 * torch.rand(30, 6, generator=GENERATOR, dtype=torch.float64)
    bounds = xb.Interval(nominal - rad, nominal + rad)
    property = xb.TopK(k)
    certified = metrics.certified_intersection(property, nominal, bounds)
    least = torch.ones(30, dtype=torch.float64)
    for corner in itertools.product((0.0, 1.0), repeat=6):
        member = bounds.lower.lerp(bounds.upper, torch.tensor(corner, dtype=torch.float64))
        least = least.minimum(metrics.intersection(nominal.abs(), member.abs(), k))
    assert (certified <= least).all()
    if k < 6:  # what ranks them may be chosen entry by entry: nothing sharper is true of the bounds
        assert torch.equal(certified, least)
    holds = kept(property, property.margin(nominal, bounds))
    assert torch.equal(certified == 1, holds)
    assert k == 6 or 0 < certified.mean() < 1


def test_the_sound_norm_bound_lies_just_above_the_nearest_one() -> None:
    for dtype in (torch.float32, torch.float64):
        model, x, y = mlp().to(dtype), images(9, shape=(6,)).to(dtype), torch.arange(9) % 4
        nearest = metrics.ig_norm_bound(model, x, y, 0.05, (0.0, 1.0))
        sound = metrics.ig_norm_bound(model, x, y, 0.05, (0.0, 1.0), sound=True)
        exact = metrics.ig_norm_bound(model.double(), x.double(), y, torch.tensor(0.05, dtype=dtype), (0.0, 1.0))
        assert sound.dtype == torch.float64 and (sound >= exact).all()
        assert (sound <= nearest * (1 + 1e4 * torch.finfo(dtype).eps)).all()


def test_certified_accuracy_counts_labels_that_lead_everywhere() -> None:
    model, x = mlp((6, 20, 4)), images(40, shape=(6,))
    y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 4
    assert metrics.certified_accuracy(model, x, y, 0.0) == 39 / 40
    fractions = [metrics.certified_accuracy(model, x, y, eps, batch_size=7) for eps in (0.02, 0.1, 0.3, 1.0)]
    assert fractions == sorted(fractions, reverse=True) and 0 < fractions[1] < 39 / 40 and fractions[3] == 0
    for seed in range(10):
        assert metrics.accuracy(model, sample(xb.Interval.linf(x, 0.1), seed, corners=True), y) >= fractions[1]


def test_unlike_is_the_least_distance_of_the_box_to_any_target() -> None:
    nominal = torch.randn(5, 1, 3, 3, generator=GENERATOR, dtype=torch.float64)
    bounds = xb.Interval(nominal - 0.2, nominal + 0.3)
    targets = torch.stack([torch.zeros(1, 3, 3), torch.ones(1, 3, 3)])
    property = Unlike(targets, 0.1)
    margin = property.margin(nominal, bounds)
    for seed in range(200):
        position = torch.rand(nominal.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        member = bounds.lower.lerp(bounds.upper, position)
        for target in targets:
            assert ((member - target).square().mean((1, 2, 3)) - 0.1 >= margin - 1e-12).all()
    nearest = [t.clamp(bounds.lower, bounds.upper) for t in targets.double()]
    distances = torch.stack([(n - t).square().mean((1, 2, 3)) for n, t in zip(nearest, targets, strict=True)])
    assert torch.allclose(margin, distances.amin(0) - 0.1)
    with pytest.raises(ValueError, match="9 entries, but an explanation 4"):
        property.margin(nominal[..., :2, :2], bounds[..., :2, :2])
    with pytest.raises(ValueError, match="tau"):
        Unlike(targets, -1.0)
    with pytest.raises(ValueError, match=r"a target has 1 entries, but an explanation .* targets are \[T"):
        Unlike(targets[0, 0, 0], 0.1).margin(nominal, bounds)


def test_excluded_features_stay_out_of_the_top_for_every_member() -> None:
    nominal = torch.randn(40, 6, generator=GENERATOR, dtype=torch.float64)
    bounds = xb.Interval(nominal - 0.2, nominal + 0.2)
    for property, score in ((Excluded((0, 2), k=2), torch.abs), (Excluded((0, 2), k=2, signed=True), lambda v: v)):
        holds = kept(property, property.margin(nominal, bounds))
        worst = torch.ones(40, dtype=torch.bool)
        for corner in itertools.product((0.0, 1.0), repeat=6):
            member = score(bounds.lower.lerp(bounds.upper, torch.tensor(corner, dtype=torch.float64)))
            top = member.argsort(1, descending=True)[:, :2]
            worst &= ~((top == 0) | (top == 2)).any(1)
        assert not (holds & ~worst).any() and 0 < holds.double().mean() < 1
        # Signed ranks are monotone in every entry, so there the corners tell the whole truth.
        assert property.signed is False or torch.equal(holds, worst)
    assert (Excluded((0, 1, 2, 3, 4), k=2).margin(nominal, bounds) == -torch.inf).all()
    for make, message in (
        (lambda: Excluded(()), "name flat feature"),
        (lambda: Excluded((9,)).margin(nominal, bounds), "feature 9 of 6"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_corner_masks_are_the_unions_of_four_corners() -> None:
    masks = corner_masks(28, 28)
    assert masks.shape == (15, 28, 28) and len({tuple(m.flatten().tolist()) for m in masks}) == 15
    assert masks[-1].sum() == 4 * 64 and {int(m.sum()) for m in masks} == {64, 128, 192, 256}
    assert corner_masks(6, 6, 4)[-1].max() == 1
    with pytest.raises(ValueError, match="size=9"):
        corner_masks(8, 8, 9)


def test_metrics_of_nothing() -> None:
    nothing = torch.zeros(0, 6, dtype=torch.float64)
    assert metrics.intersection(nothing, nothing, 2).shape == (0,)
    assert metrics.kendall(nothing, nothing).shape == (0,)
    assert metrics.spearman(nothing, nothing).shape == (0,)
    fn = xb.explain.gradient(mlp())
    empty = torch.zeros(0, dtype=torch.long)
    found: Tensor = metrics.thickness(fn, nothing, empty, torch.zeros(2, 0, 6, dtype=torch.float64), k=2)
    assert found.shape == (0,)
