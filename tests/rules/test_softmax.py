"""Softmax, its logarithm and the losses on top of it."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pyxai_bounds as xb
from tests.networks import sample
from tests.rules.cases import Case, case_id, check, rand

aten = torch.ops.aten

TARGET = torch.tensor([2, 0, 3])
CLASS_WEIGHT = torch.tensor([0.5, 2.0, 0.0, 1.25], dtype=torch.float64)
SIGNED_WEIGHT = torch.tensor([0.5, -2.0, 3.0, -1.25], dtype=torch.float64)
MASK = torch.tensor([[False, True, False, False]] * 3)
SEED = rand(3, 4, seed=6)


def loss(x: Tensor, **options: object) -> Tensor:
    return F.cross_entropy(x, TARGET, **options)  # type: ignore[arg-type]


CASES = [
    Case("softmax", lambda x: x.softmax(1), rand(3, 4)),
    Case("softmax over dimension 0", lambda x: x.softmax(0), rand(3, 4)),
    Case("softmax of a vector", lambda x: x.softmax(0), rand(4)),
    Case("softmax over the middle", lambda x: x.softmax(-2), rand(2, 3, 2)),
    Case("softmax of one class", lambda x: x.softmax(1), rand(3, 1)),
    Case("softmax of large numbers", lambda x: (20 * x).softmax(1), rand(3, 4)),
    Case("softmax with a mask", lambda x: x.masked_fill(MASK, float("-inf")).softmax(1), rand(3, 4)),
    Case("safe softmax", lambda x: aten._safe_softmax(x, -1), rand(3, 4)),
    Case("safe softmax over dimension 0", lambda x: aten._safe_softmax(x, 0), rand(3, 4)),
    Case("scaled dot product attention", lambda x: F.scaled_dot_product_attention(x, x, x), rand(1, 3, 4), eps=0.05),
    Case("safe softmax with a mask", lambda x: aten._safe_softmax(x.masked_fill(MASK, float("-inf")), -1), rand(3, 4)),
    Case("safe softmax of nothing", lambda x: aten._safe_softmax(
        x.masked_fill(torch.tensor([[True], [False], [False]]), float("-inf")), -1), rand(3, 4)),
    Case("causal attention", lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), rand(1, 3, 4),
         eps=0.05),
    Case("attention", lambda x: (x @ x.t()).softmax(1) @ x, rand(3, 4), eps=0.05),
    Case("log-softmax", lambda x: x.log_softmax(1), rand(3, 4)),
    Case("log-softmax over dimension 0", lambda x: x.log_softmax(0), rand(3, 4)),
    Case("log-softmax of one class", lambda x: x.log_softmax(1), rand(3, 1)),
    Case("log-softmax of large numbers", lambda x: (20 * x).log_softmax(1), rand(3, 4)),
    Case("cross-entropy", lambda x: loss(x, reduction="none"), rand(3, 4)),
    Case("mean cross-entropy", loss, rand(3, 4)),
    Case("summed cross-entropy", lambda x: loss(x, reduction="sum"), rand(3, 4)),
    Case("cross-entropy, ignored class", lambda x: loss(x, ignore_index=2), rand(3, 4)),
    Case("cross-entropy, class weights", lambda x: loss(x, weight=CLASS_WEIGHT), rand(3, 4)),
    *(
        Case(f"{reduction} of cross-entropy, class weights of both signs",
             lambda x, reduction=reduction: loss(x, weight=SIGNED_WEIGHT, reduction=reduction), rand(3, 4))
        for reduction in ("none", "sum", "mean")
    ),
    Case("cross-entropy, class weights and ignored class",
         lambda x: loss(x, weight=CLASS_WEIGHT, ignore_index=2), rand(3, 4)),
    *(
        Case(f"{reduction} of cross-entropy of pixels",
             lambda x, reduction=reduction: F.cross_entropy(
                 x, TARGET.reshape(1, 3, 1), CLASS_WEIGHT, reduction=reduction), rand(1, 4, 3, 1))
        for reduction in ("none", "sum", "mean")
    ),
    Case("cross-entropy, smoothed labels", lambda x: loss(x, label_smoothing=0.1), rand(3, 4)),
    Case("negative likelihood of a vector", lambda x: F.nll_loss(x.log_softmax(0), TARGET[0]), rand(4)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_autograd(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("mask", [-1e9, -9e15, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("sound_dtype", [torch.float32, torch.float64])
def test_large_masks_cost_no_precision(mask: float, sound_dtype: torch.dtype) -> None:
    """Such numbers are rounded by more than all else is large; a row of nothing but mask is uniform."""
    x = rand(3, 4).to(sound_dtype)
    masked = torch.tensor([[False, True, False, False], [False, False, False, True], [True] * 4])

    def attend(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        p = torch.where(masked, mask, x).softmax(1)
        return torch.cat((p, torch.autograd.grad((p * SEED.to(x.dtype)).sum(), x)[0]))

    bounds = xb.bound(attend, sound=True)(xb.Interval.point(x)).detach()
    wide = attend(x.double()).detach()
    assert bounds.contains(wide).all()
    assert bounds.rad.max() < (1e-6 if sound_dtype == torch.float32 else 1e-11)
    box = xb.Interval.linf(x, 0.1)
    bounds = xb.bound(attend, sound=True)(box).detach()
    for seed in range(20):
        assert bounds.contains(attend(sample(box, seed, seed % 2 == 0).double()).detach()).all()
    assert bounds.rad.max() < 0.2


def test_softmax_bounds_are_attained_at_corners() -> None:
    box = xb.Interval.of(rand(2, 4), rand(2, 4, seed=1).abs())
    corners = torch.tensor(list(itertools.product((-1, 1), repeat=4)), dtype=torch.float64)
    points = box.mid.unsqueeze(1) + corners * box.rad.unsqueeze(1)
    for fn in (lambda x: x.softmax(-1), lambda x: x.log_softmax(-1)):
        bounds, values = xb.bound(fn)(box), fn(points)
        assert torch.allclose(bounds.lower, values.min(1).values, atol=1e-12, rtol=0)
        assert torch.allclose(bounds.upper, values.max(1).values, atol=1e-12, rtol=0)


def test_small_probabilities_keep_their_relative_precision() -> None:
    """p and log p of a hopeless class come from the others' sum, not from 1 minus something."""
    x = torch.tensor([[0.0, -50.0, 3.0]], dtype=torch.float64)
    for fn in (lambda x: x.softmax(1), lambda x: x.log_softmax(1)):
        bounds = xb.bound(fn)(xb.Interval.linf(x, 1e-6))
        assert ((bounds.mid - fn(x)).abs() <= 1e-5 * fn(x).abs() + 1e-5 * (fn(x) < 0)).all()
        assert bounds.contains(fn(x)).all()


@pytest.mark.parametrize("fn", [lambda x: x.softmax(1), lambda x: x.log_softmax(1)])
def test_second_derivatives_of_bounds(fn) -> None:
    bounded, rad = xb.bound(fn), 0.1 + rand(2, 4)

    def ends(mid: Tensor) -> tuple[Tensor, Tensor]:
        out = bounded(xb.Interval.of(mid, rad))
        return out.mid, out.rad

    assert torch.autograd.gradgradcheck(ends, SEED[:2].clone().requires_grad_())


def test_a_mask_leaves_finite_derivatives() -> None:
    mid = SEED.clone().requires_grad_()
    mask = torch.zeros_like(SEED).masked_fill(MASK, float("-inf"))
    out = xb.bound(lambda x: (x + mask).softmax(1))(xb.Interval.of(mid, torch.full_like(mid, 0.1)))
    (grad,) = torch.autograd.grad(out.upper.square().sum(), mid)
    assert grad.isfinite().all() and not grad[MASK].any() and grad[~MASK].any()


def test_a_gradient_that_is_a_set_through_a_softmax_at_a_point() -> None:
    """The other way round: p is known, what comes back to it is not."""
    p = SEED.softmax(1).detach().requires_grad_()

    def fn(g: Tensor) -> Tensor:
        with torch.enable_grad():
            logits = SEED.clone().requires_grad_()
            first = torch.autograd.grad((logits.softmax(1) * g).sum(), logits, create_graph=True)[0]
            second = torch.autograd.grad((logits.log_softmax(1) * g).sum(), logits, create_graph=True)[0]
        return first + 2 * second

    assert p.requires_grad
    check(Case("set as gradient", fn, rand(3, 4)))
    box = xb.Interval.linf(rand(3, 4), 0.3)
    bounds = xb.bound(fn)(box)
    jacobian = torch.autograd.functional.jacobian(fn, box.mid).flatten(2).flatten(0, 1)
    exact = (jacobian.abs() @ box.rad.flatten()).reshape(3, 4)
    assert (bounds.rad >= exact - 1e-12).all()  # p_j is used twice: not tight, but not too narrow
