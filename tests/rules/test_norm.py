"""Batch normalisation with running statistics: 1-d, 2-d, 3-d, with and without affine parameters."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyxai_bounds as xb
from tests.rules.cases import Case, case_id, check, rand

aten = torch.ops.aten

MEAN, SCALE, SHIFT = rand(3, seed=1), rand(3, seed=2), rand(3, seed=3)
VARIANCE = rand(3, seed=4).square() + 0.1
WEIGHT = rand(3, 3, 3, 3, seed=5)
VOLUME = rand(1, 3, 2, 3, 2)


def batch_norm(x: Tensor) -> Tensor:
    return F.batch_norm(x, MEAN, VARIANCE, SCALE, SHIFT)


def module(dimensions: int, affine: bool) -> nn.Module:
    """A module whose parameters need gradients, as in a network."""
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dimensions]
    norm = kind(3, affine=affine).double().eval()
    norm.running_mean.copy_(MEAN)
    norm.running_var.copy_(VARIANCE)
    if affine:
        norm.weight.data.copy_(SCALE)
        norm.bias.data.copy_(SHIFT)
    return norm


CASES = [
    Case("functional", batch_norm, rand(2, 3, 4, 5)),
    Case("no affine", lambda x: F.batch_norm(x, MEAN, VARIANCE), rand(2, 3, 4, 5)),
    Case("scale without shift", lambda x: F.batch_norm(x, MEAN, VARIANCE, SCALE), rand(2, 3, 4, 5)),
    Case("shift without scale", lambda x: F.batch_norm(x, MEAN, VARIANCE, None, SHIFT), rand(2, 3, 4, 5)),
    Case("large eps", lambda x: F.batch_norm(x, MEAN, VARIANCE, SCALE, SHIFT, eps=0.5), rand(2, 3, 4, 5)),
    Case("matrix", batch_norm, rand(4, 3)),
    Case("1d", batch_norm, rand(2, 3, 5)),
    Case("3d", batch_norm, VOLUME),
    Case("channels-last", batch_norm, rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)),
    Case("channels-last 3d", batch_norm, VOLUME.contiguous(memory_format=torch.channels_last_3d)),
    Case("permuted", lambda x: batch_norm(x.permute(0, 3, 1, 2)), rand(2, 4, 5, 3)),
    Case("after a convolution", lambda x: batch_norm(F.conv2d(x, WEIGHT, SHIFT)), rand(2, 3, 4, 5)),
    Case("between convolutions", lambda x: F.conv2d(batch_norm(F.conv2d(x, WEIGHT)), WEIGHT), rand(1, 3, 6, 6)),
    Case("after a linear layer", lambda x: batch_norm(F.linear(x, WEIGHT[0, 0], SHIFT)), rand(4, 3)),
    Case("then ReLU", lambda x: F.relu(batch_norm(F.conv2d(x, WEIGHT))), rand(2, 3, 4, 5)),
    Case("without the training flag", lambda x: aten._native_batch_norm_legit_no_training(
        x, SCALE, SHIFT, MEAN, VARIANCE, 0.1, 1e-5)[0], rand(2, 3, 4, 5)),
    *(
        Case(f"module {dimensions}d, affine={affine}", module(dimensions, affine), rand(2, 3, *[3] * dimensions))
        for dimensions in (1, 2, 3)
        for affine in (True, False)
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_autograd(case: Case) -> None:
    check(case)


def test_bounds_are_exact() -> None:
    """One factor per channel: the ends of the box become the ends of the image."""
    box = xb.Interval.linf(rand(2, 3, 4, 5), 0.3)
    bounds = xb.bound(batch_norm)(box)
    ends = torch.stack((batch_norm(box.lower), batch_norm(box.upper)))
    assert torch.allclose(bounds.lower, ends.min(0).values, atol=1e-12, rtol=0)
    assert torch.allclose(bounds.upper, ends.max(0).values, atol=1e-12, rtol=0)


@pytest.mark.parametrize("argument", range(4))
def test_nan_in_the_parameters_never_gives_finite_bounds(argument: int) -> None:
    parameters = [MEAN.clone(), VARIANCE.clone(), SCALE.clone(), SHIFT.clone()]
    parameters[argument][1] = float("nan")
    bounds = xb.bound(lambda x: F.batch_norm(x, *parameters))(xb.Interval.linf(rand(2, 3, 4), 0.1))
    assert not bounds.isfinite()[:, 1].any() and bounds.isfinite()[:, [0, 2]].all()


def test_a_gradient_of_the_weight_is_refused_not_guessed() -> None:
    norm = module(2, True)

    def fn(x: Tensor) -> Tensor:
        return torch.autograd.grad(norm(x).tanh().sum(), norm.weight, create_graph=True)[0]

    with pytest.raises(xb.UnsupportedOperatorError, match="gradient of its weight"):
        xb.bound(fn)(xb.Interval.linf(rand(2, 3, 4, 5), 0.1))
