"""Convolutions of every geometry, their gradients in the input and in the weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pyxai_bounds as xb
from tests.rules.cases import Case, case_id, check, rand

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def conv(*weight: int, bias: bool = True, pad: list[int] | None = None, **geometry: Any) -> Callable[[Tensor], Tensor]:
    w = rand(*weight, seed=1)
    b = rand(weight[0], seed=2) if bias else None

    def fn(x: Tensor) -> Tensor:
        return CONV[len(weight) - 2](x if pad is None else F.pad(x, pad), w, b, **geometry)

    return fn


def transposed(*weight: int, bias: bool = True, **geometry: Any) -> Callable[[Tensor], Tensor]:
    w = rand(*weight, seed=1)
    b = rand(weight[1] * geometry.get("groups", 1), seed=2) if bias else None
    return lambda x: TRANSPOSED[len(weight) - 2](x, w, b, **geometry)


def weight_gradient(
    *weight: int, operator: Callable = F.conv2d, nonlinear: bool = True, **geometry: Any
) -> Callable[[Tensor], Tensor]:
    """∂ loss / ∂ weight and ∂ loss / ∂ bias, as one vector."""
    outer = torch.tanh if nonlinear else torch.positive
    start = rand(*weight, seed=1)
    start_bias = rand(weight[0], seed=2)

    def fn(x: Tensor) -> Tensor:
        with torch.enable_grad():
            w, b = start.clone().requires_grad_(), start_bias.clone().requires_grad_()
            loss = outer(operator(x, w, b, **geometry)).sum()
            grads = torch.autograd.grad(loss, (w, b), create_graph=True)
        return torch.cat([grad.flatten() for grad in grads])

    return fn


LAST = torch.channels_last
IMAGE = rand(2, 4, 6, 5)
WEIGHT = rand(3, 4, 3, 3, seed=1)
BIAS = rand(3, seed=2)
BACK = rand(4, 3, 3, 3, seed=3)

CASES = [
    Case("2d", conv(3, 4, 3, 3), IMAGE),
    Case("2d, no bias", conv(3, 4, 3, 3, bias=False), IMAGE),
    Case("stride", conv(3, 4, 3, 3, stride=2, padding=1), IMAGE),
    Case("stride that leaves a rest", conv(3, 4, 2, 3, stride=(3, 2)), IMAGE),
    Case("rectangular", conv(3, 4, 1, 3, padding=(0, 1), stride=(1, 2)), IMAGE),
    Case("asymmetric padding", conv(3, 4, 3, 3, pad=[2, 0, 1, 3], stride=2), IMAGE),
    Case("padding same", conv(3, 4, 3, 5, padding="same", dilation=2), IMAGE),
    Case("dilation", conv(3, 4, 2, 2, dilation=(3, 2), padding=2), IMAGE),
    Case("groups", conv(6, 2, 3, 3, groups=2, padding=1), IMAGE),
    Case("depthwise", conv(8, 1, 3, 3, groups=4, stride=2), IMAGE),
    Case("1×1", conv(3, 4, 1, 1), IMAGE),
    Case("batch 1", conv(3, 4, 3, 3, padding=1), IMAGE[:1]),
    Case("one channel, one pixel", conv(3, 1, 3, 3, padding=1), rand(1, 1, 1, 1)),
    Case("unbatched", conv(3, 4, 3, 3), IMAGE[0]),
    Case("channels-last", conv(3, 4, 3, 3, padding=1), IMAGE.contiguous(memory_format=LAST)),
    Case("channels-last, size-1 dimensions", conv(3, 4, 1, 3), rand(2, 4, 1, 5).contiguous(memory_format=LAST)),
    Case("channels-last, strided", conv(4, 2, 3, 3, stride=2, groups=2), IMAGE.contiguous(memory_format=LAST)),
    Case("not contiguous", lambda x: F.conv2d(x.permute(3, 0, 1, 2), WEIGHT), rand(4, 6, 5, 2)),
    Case("1d", conv(3, 4, 3, stride=2, padding=1, dilation=2), rand(2, 4, 9)),
    Case("1d, groups", conv(4, 2, 3, groups=2), rand(2, 4, 7)),
    Case("3d", conv(3, 2, 2, 3, 2, stride=(1, 2, 1), padding=1), rand(2, 2, 3, 4, 3)),
    Case("transposed", transposed(4, 3, 3, 3), IMAGE),
    Case(
        "transposed, everything",
        transposed(4, 3, 3, 2, stride=(2, 3), padding=1, output_padding=(1, 2), dilation=(1, 2), groups=2),
        IMAGE,
    ),
    Case("transposed, channels-last", transposed(4, 3, 3, 3, stride=2), IMAGE.contiguous(memory_format=LAST)),
    Case("transposed, then ReLU, channels-last", lambda x: F.relu(F.conv_transpose2d(x, BACK, stride=2)),
         IMAGE.contiguous(memory_format=LAST)),
    Case("transposed 1d", transposed(4, 3, 3, stride=2, output_padding=1), rand(2, 4, 5)),
    Case("transposed 3d", transposed(2, 3, 2, 2, 2, stride=2), rand(1, 2, 2, 3, 2)),
    Case("set as weight", lambda x: F.conv2d(IMAGE, x, BIAS, padding=1), rand(3, 4, 3, 3)),
    Case("set as bias", lambda x: F.conv2d(IMAGE, WEIGHT, x), rand(3)),
    Case("set as weight, groups", lambda x: F.conv2d(IMAGE, x, groups=2, stride=2), rand(4, 2, 3, 3)),
    Case("set as weight, transposed", lambda x: F.conv_transpose2d(IMAGE, x, stride=2), rand(4, 2, 2, 2)),
    Case("two sets", lambda x: F.conv2d(x, x[:, :, :3, :2].tanh(), x[:, 0, 0, 0]), IMAGE, eps=0.05),
    Case("two sets 1d", lambda x: F.conv1d(x, x[:, :, :3].tanh()), rand(2, 4, 7), eps=0.05),
    Case("weight gradient", weight_gradient(3, 4, 3, 3, stride=2, padding=1), IMAGE, eps=0.05),
    Case("weight gradient of a linear loss", weight_gradient(3, 4, 3, 3, nonlinear=False), IMAGE),
    Case("weight gradient, groups, dilation", weight_gradient(4, 2, 2, 2, groups=2, dilation=2), IMAGE, eps=0.05),
    Case("weight gradient 1d", weight_gradient(3, 4, 3, operator=F.conv1d), rand(2, 4, 7), eps=0.05),
    Case("weight gradient 3d", weight_gradient(2, 2, 2, 2, 2, operator=F.conv3d), rand(1, 2, 3, 3, 2), eps=0.05),
    Case("weight gradient, transposed", weight_gradient(4, 4, 2, 3, operator=F.conv_transpose2d, stride=2), IMAGE,
         eps=0.05),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_autograd(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("index", [2, 5, 7, 8, 18, 20, 22])
def test_convolution_with_a_point_weight_is_exact(index: int) -> None:
    """For every output there is a corner that attains its bound: the signs of the output's gradient."""
    case = CASES[index]
    box = xb.Interval.linf(case.x, case.eps)
    bounds = xb.bound(case.fn)(box)
    x = case.x.clone().requires_grad_()
    for element in (0, bounds.mid.numel() // 2, bounds.mid.numel() - 1):
        (signs,) = torch.autograd.grad(case.fn(x).flatten()[element], x)
        corner = case.x + case.eps * signs.sign()
        assert torch.allclose(case.fn(corner).flatten()[element], bounds.upper.flatten()[element], atol=1e-11)


def test_only_the_gradient_of_a_last_layer_is_a_set_where_the_input_is() -> None:
    """The input of a convolution has no say in the gradient of a linear functional of its output."""

    layer = conv(3, 4, 3, 3)

    def gradient(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(layer(x).sum(), x)[0]

    bounds = xb.bound(gradient)(xb.Interval.linf(IMAGE, 1.0))
    assert bounds.rad.max() == 0 and torch.allclose(bounds.mid, gradient(IMAGE))


def test_nan_weights_never_give_finite_bounds() -> None:
    weight = rand(3, 4, 3, 3)
    weight[1, 0, 0, 0] = float("nan")
    bounds = xb.bound(lambda x: F.conv2d(x, weight))(xb.Interval.linf(IMAGE, 0.1))
    assert not bounds.isfinite()[:, 1].any() and bounds.isfinite()[:, [0, 2]].all()
