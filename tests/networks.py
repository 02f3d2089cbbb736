"""Small networks that several test modules bound, and the assertions they share."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

import pyxai_bounds as xb

# Bounds are rounded to nearest for now: how far outside a true value may lie, relative to the norm of the explanation.
SLACK = 1e-9


class Residual(nn.Module):
    """Batch norm, max pool, in-place ReLU, a residual addition and dropout: what ordinary networks are made of."""

    def __init__(self, channels: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.relu2 = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(channels * 16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.norm1(self.stem(x))))
        x = self.relu2(self.norm2(self.conv(x)) + x)
        return self.head(self.dropout(x.flatten(1)))


class Branches(nn.Module):
    """Two paths from one image, added or concatenated."""

    def __init__(self, left: nn.Module, right: nn.Module, concatenate: bool) -> None:
        super().__init__()
        self.left, self.right, self.concatenate = left, right, concatenate

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x), self.right(x)
        return torch.cat([left, right], 1) if self.concatenate else left + right


def residual(seed: int = 0) -> Residual:
    """A residual network in eval mode with batch-norm statistics and affine parameters that are not trivial."""
    torch.manual_seed(seed)
    model = Residual().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model


def images(count: int = 3, seed: int = 0, shape: tuple[int, ...] = (3, 8, 8)) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp(sizes: tuple[int, ...] = (6, 9, 7, 4), seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def sample(box: xb.Interval, seed: int, corners: bool) -> Tensor:
    """A point of the box: anywhere, or a corner."""
    position = torch.rand(box.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return box.mid + box.rad * ((2 * position - 1).sign() if corners else 2 * position - 1)


def assert_encloses(bounds: xb.Interval, value: Tensor, slack: float = SLACK) -> None:
    """Every component lies between its bounds, but for ``slack`` times the norm of the value."""
    margin = slack * torch.linalg.vector_norm(value).clamp(min=1e-300)
    outside = (value < bounds.lower - margin) | (value > bounds.upper + margin)
    assert not outside.any(), (
        f"{int(outside.sum())} of {outside.numel()} components lie outside, by up to "
        f"{float(torch.maximum(bounds.lower - value, value - bounds.upper).max()):.3g} (norm {float(value.norm()):.3g})"
    )


def assert_encloses_samples(
    fn: Callable[..., Tensor], box: xb.Interval, *args: Tensor, samples: int = 40, slack: float = SLACK
) -> xb.Interval:
    """The bounds of ``fn`` over the box contain what it returns at sampled points and corners."""
    bounds = xb.bound(fn)(box, *args)
    for seed in range(samples):
        assert_encloses(bounds, fn(sample(box, seed, corners=seed % 2 == 0), *args).detach(), slack)
    return bounds


def assert_exact_at_zero_radius(fn: Callable[..., Tensor], x: Tensor, *args: Tensor, tolerance: float = 1e-12) -> None:
    """A box of radius 0 gives back the function's value, and no width."""
    bounds = xb.bound(fn)(xb.Interval.point(x), *args)
    value = fn(x, *args).detach()
    scale = value.abs().max().clamp(min=1e-300)
    assert (bounds.mid - value).abs().max() <= tolerance * scale
    assert bounds.rad.max() <= tolerance * scale
