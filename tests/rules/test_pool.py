"""Pooling of every geometry; which position of a window a max pool's gradient may and must reach."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pyxai_bounds as xb
from tests.networks import sample
from tests.rules.cases import Case, case_id, check, rand

IMAGE = rand(2, 3, 7, 6)
LAST = IMAGE.contiguous(memory_format=torch.channels_last)


VOLUME = rand(1, 2, 3, 4, 3)
PLACES = F.max_pool2d(IMAGE, 2, return_indices=True)[1]
DEEP_PLACES = F.max_pool3d(VOLUME, 2, return_indices=True)[1]


def max_pool(*args: Any, **kwargs: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: F.max_pool2d(x, *args, **kwargs)


def avg_pool(*args: Any, **kwargs: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: F.avg_pool2d(x, *args, **kwargs)


CASES = [
    Case("max", max_pool(2), IMAGE),
    Case("max, overlapping", max_pool(3, 1), IMAGE),
    Case("max, stride beyond the kernel", max_pool(2, 3), IMAGE),
    Case("max, padding", max_pool(3, 2, 1), IMAGE),
    Case("max, rectangular", max_pool((3, 2), (2, 1), (1, 0)), IMAGE),
    Case("max, dilation", max_pool(2, 1, 1, dilation=(3, 2)), IMAGE),
    Case("max, ceil mode", max_pool(2, 2, ceil_mode=True), IMAGE),
    Case("max, ceil mode and padding", max_pool(3, 2, 1, ceil_mode=True), rand(1, 2, 6, 8)),
    Case("max, ceil mode, stride beyond the image", max_pool(2, 5, ceil_mode=True), IMAGE),
    Case("max, one row", max_pool((1, 3)), IMAGE),
    Case("max, 1×1", max_pool(1), IMAGE),
    Case("max, global", max_pool((7, 6)), IMAGE),
    Case("max, unbatched", max_pool(3, 2, 1), IMAGE[0]),
    Case("max, channels-last", max_pool(3, 2, 1), LAST),
    Case("max, channels-last, one channel", max_pool(3, 2, 1), LAST[:, :1]),
    Case("max, padded by -∞", lambda x: F.max_pool2d(F.pad(x, (1, 0, 1, 0), value=float("-inf")), 2), IMAGE),
    Case("max after ReLU", lambda x: F.max_pool2d(F.relu(x), 3, 2, 1), IMAGE),
    Case("max of max", lambda x: F.max_pool2d(F.max_pool2d(x, 2, 1), 2, 1), IMAGE),
    Case("max 1d", lambda x: F.max_pool1d(x, 3, 2, 1), rand(2, 3, 9)),
    Case("max 3d", lambda x: F.max_pool3d(x, 2, 1, 1), VOLUME),
    Case("max 3d, dilation", lambda x: F.max_pool3d(x, (1, 2, 2), (2, 1, 1), dilation=(1, 2, 1)), VOLUME),
    Case("max 3d, ceil mode", lambda x: F.max_pool3d(x, 2, ceil_mode=True), VOLUME),
    Case("max 3d, unbatched", lambda x: F.max_pool3d(x, 2), VOLUME[0]),
    Case("adaptive max", lambda x: F.adaptive_max_pool2d(x, (3, 4)), IMAGE),
    Case("adaptive max, equal windows", lambda x: F.adaptive_max_pool2d(x, (7, 2)), IMAGE),
    Case("adaptive max, larger than the image", lambda x: F.adaptive_max_pool2d(x, (9, 4)), IMAGE),
    Case("adaptive max 1d", lambda x: F.adaptive_max_pool1d(x, 4), rand(2, 3, 9)),
    Case("adaptive max 3d", lambda x: F.adaptive_max_pool3d(x, (2, 3, 2)), VOLUME),
    Case(
        "max unpool, points for places", lambda x: F.max_unpool2d(x, PLACES, 2, output_size=(7, 6)), IMAGE[..., :3, :3]
    ),
    Case(
        "max unpool 3d, points for places",
        lambda x: F.max_unpool3d(x, DEEP_PLACES, 2, output_size=(3, 4, 3)),
        VOLUME[..., :1, :2, :1],
    ),
    Case(
        "max unpool of a pool",
        lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2, output_size=(7, 6)),
        IMAGE,
        gradient=False,
    ),
    Case(
        "max unpool 1d of a pool",
        lambda x: F.max_unpool1d(*F.max_pool1d(x, 2, return_indices=True), 2, output_size=(9,)),
        rand(2, 3, 9),
        gradient=False,
    ),
    Case(
        "max unpool 3d of a pool",
        lambda x: F.max_unpool3d(*F.max_pool3d(x, 2, return_indices=True), 2, output_size=(3, 4, 3)),
        VOLUME,
        gradient=False,
    ),
    Case("average", avg_pool(2), IMAGE),
    Case("average, padding", avg_pool(3, 2, 1), IMAGE),
    Case("average, padding not counted", avg_pool(3, 2, 1, count_include_pad=False), IMAGE),
    Case("average, ceil mode", avg_pool((2, 3), 2, (1, 0), ceil_mode=True), IMAGE),
    Case("average, ceil mode, padding not counted", avg_pool(3, 2, 1, ceil_mode=True, count_include_pad=False), IMAGE),
    Case("average, divisor", avg_pool(2, divisor_override=3), IMAGE),
    Case("average, negative divisor", avg_pool(2, divisor_override=-3), IMAGE),
    Case("average, channels-last", avg_pool(3, 2, 1), LAST),
    Case("average 1d", lambda x: F.avg_pool1d(x, 3, 2, 1), rand(2, 3, 9)),
    Case("average 3d", lambda x: F.avg_pool3d(x, 2, 1, 1), rand(1, 2, 3, 4, 3)),
    Case("adaptive average", lambda x: F.adaptive_avg_pool2d(x, (3, 4)), IMAGE),
    Case("adaptive average, larger than the image", lambda x: F.adaptive_avg_pool2d(x, (9, 4)), IMAGE),
    Case("adaptive average, global", lambda x: F.adaptive_avg_pool2d(x, 1), IMAGE),
    Case("adaptive average, global, channels-last", lambda x: F.adaptive_avg_pool2d(F.relu(x), 1), LAST),
    Case("adaptive average, channels-last", lambda x: F.adaptive_avg_pool2d(x, (2, 5)), LAST),
    Case("adaptive average 1d", lambda x: F.adaptive_avg_pool1d(x, 4), rand(2, 3, 9)),
    Case("adaptive average 3d", lambda x: F.adaptive_avg_pool3d(x, (2, 3, 2)), rand(1, 2, 3, 4, 3)),
]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_autograd(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("levels", [2, 3])
@pytest.mark.parametrize("kernel", [(1, 3), (2, 2)])
def test_max_pool_gradient_reaches_exactly_the_positions_that_can_be_the_first_maximum(
    kernel: tuple[int, int], levels: int
) -> None:
    """Against brute force: every position takes every whole value of its interval, ties included."""
    height, width = kernel
    ends = list(itertools.combinations_with_replacement(range(levels), 2))
    windows = list(itertools.product(ends, repeat=height * width))
    if len(windows) > 400:
        windows = windows[:: len(windows) // 400]
    lower, upper = (
        torch.tensor([[e[i] for e in w] for w in windows], dtype=torch.float64).reshape(-1, 1, height, width)
        for i in (0, 1)
    )

    def gradient(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(F.max_pool2d(x, kernel).sum(), x)[0]

    least, greatest = torch.ones_like(lower), torch.zeros_like(lower)
    for values in itertools.product(range(levels), repeat=height * width):
        x = torch.tensor(values, dtype=torch.float64).reshape(1, 1, height, width).expand_as(lower)
        inside = ((lower <= x) & (x <= upper)).flatten(1).all(1)
        reached = gradient(x)
        least[inside] = torch.minimum(least, reached)[inside]
        greatest[inside] = torch.maximum(greatest, reached)[inside]
    bounds = xb.bound(gradient)(xb.Interval(lower, upper))
    assert torch.equal(bounds.lower, least) and torch.equal(bounds.upper, greatest)


def test_constant_background_stays_exact() -> None:
    """Ties of points go to the first position of each window, whatever the padding."""

    def gradient(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(F.max_pool2d(x, 3, 2, 1).sum(), x)[0]

    x = torch.full((1, 2, 7, 6), -1.5, dtype=torch.float64)
    bounds = xb.bound(gradient)(xb.Interval.point(x))
    assert bounds.rad.max() == 0 and torch.equal(bounds.mid, gradient(x))


def pooled_gradient(x: Tensor) -> Tensor:
    """The gradient of the pooled sum with respect to an image of -∞."""
    image = (x - float("inf")).detach()
    with torch.enable_grad():
        image.requires_grad_()
        return torch.autograd.grad(F.max_pool2d(image, 2, padding=1).sum(), image)[0]


def test_a_window_of_minus_infinity_sends_its_gradient_to_its_first_position() -> None:
    x = rand(1, 1, 4, 4)
    bounds = xb.bound(pooled_gradient)(xb.Interval.linf(x, 0.1))
    assert torch.equal(bounds.mid, pooled_gradient(x)) and bounds.rad.max() == 0


def test_the_indices_of_a_set_cannot_be_used() -> None:
    """They have no single value: nothing may be computed from them as if they had."""
    x = IMAGE[:1, :1]
    flat = torch.arange(84, dtype=torch.float64).reshape(42, 2)
    zero = torch.zeros(1, dtype=torch.int64)

    def fn(x: Tensor) -> Tensor:
        _, indices = F.max_pool2d(x, 2, return_indices=True)
        return x.sum() + flat[indices, zero]

    with pytest.raises(xb.UnsupportedOperatorError, match="indices that differ"):
        xb.bound(fn)(xb.Interval.linf(x, 0.1))


@pytest.mark.parametrize("geometry", [(2, 2, 0), (3, 2, 1)])
def test_numbers_that_are_spread_over_the_maxima_of_a_set(geometry: tuple[int, int, int]) -> None:
    """Captum's DeepLift: what belongs to a window goes to its first maximum; windows may share one."""
    kernel, stride, padding = geometry
    box = xb.Interval.linf(IMAGE, 0.4)
    numbers = F.max_pool2d(rand(2, 3, 7, 6, seed=1), kernel, stride, padding)
    spread = xb.Interval.linf(numbers, 0.1)

    def unpooled(x: Tensor, v: Tensor) -> Tensor:
        _, places = F.max_pool2d(x, kernel, stride, padding, return_indices=True)
        return F.max_unpool2d(v, places, kernel, stride, padding, output_size=x.shape[-2:])

    bounds = xb.bound(unpooled)(box, spread)
    for seed in range(40):
        corners = seed % 2 == 0
        value = unpooled(sample(box, seed, corners=corners), sample(spread, seed + 1000, corners=corners))
        assert bounds.contains(value).all()
    point = xb.bound(unpooled)(xb.Interval.point(IMAGE), numbers)
    assert point.contains(unpooled(IMAGE, numbers)).all()
    if stride == kernel:  # no element belongs to two windows
        assert torch.equal(point.mid, unpooled(IMAGE, numbers)) and point.rad.max() == 0


def test_maxima_are_not_spread_over_an_image_of_another_size() -> None:
    def fn(x: Tensor) -> Tensor:
        return F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2, output_size=(7, 7))

    with pytest.raises(xb.UnsupportedOperatorError, match="spreads maxima"):
        xb.bound(fn)(xb.Interval.linf(IMAGE, 0.1))
