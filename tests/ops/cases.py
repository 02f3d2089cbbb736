"""Boxes to try the fused operators on, and what "equal to the last bit" means."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from pyxai_bounds.ops import native

needs_native = pytest.mark.skipif(not native.available(), reason=native.why_not_available())
LEVELS = native._native.levels() if native._native is not None else ["portable"]
DTYPES = [torch.float32, torch.float64]
# Around every group of packed bits and every register: 8 and 16 elements; 65539 is enough for two threads.
SIZES = [0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 65539]


def contiguous(t: Tensor) -> Tensor:
    return t.contiguous()


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def strided(t: Tensor) -> Tensor:
    """The same values, every other element of a longer last dimension."""
    return torch.stack((t, torch.full_like(t, 7.0)), -1).flatten(-2)[..., ::2] if t.dim() else t


def transposed(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


LAYOUTS: list[Callable[[Tensor], Tensor]] = [contiguous, channels_last, strided, transposed]
# Four dimensions, odd sizes, empty batch, size-1 dimensions, more channels than a register has lanes.
SHAPES = [(2, 3, 5, 7), (1, 1, 1, 1), (0, 3, 4, 4), (3, 1, 4, 5), (2, 19, 1, 1), (1, 37, 3, 2), (5, 4, 1, 3)]


def box(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A random box of which about every third end point or so is dead, unstable or active."""
    generator = torch.Generator().manual_seed(seed)
    mid = torch.randn(shape, generator=generator, dtype=torch.float64)
    rad = torch.rand(shape, generator=generator, dtype=torch.float64)
    return mid.to(dtype), rad.to(dtype)


def nasty_box(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A random box with end points at 0, signed zeros, points, subnormals, infinities and NaN sprinkled in."""
    mid, rad = box(*shape, dtype=dtype, seed=seed)
    infinity, nan, tiny = float("inf"), float("nan"), torch.finfo(dtype).smallest_normal / 4
    special = [
        (0.0, 0.0), (-0.0, 0.0), (-0.0, 0.5), (0.5, 0.5), (-0.5, 0.5), (0.5, 0.0), (-0.5, 0.0), (tiny, tiny),
        (tiny, 0.0), (-tiny, 2 * tiny), (infinity, 1.0), (-infinity, 1.0), (0.0, infinity), (infinity, infinity),
        (nan, 1.0), (1.0, nan), (nan, nan), (-1.0, nan), (0.0, nan), (torch.finfo(dtype).max, 1.0),
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(seed + 1)
    choice = torch.randint(0, 3 * len(special), shape, generator=generator)
    for k, (special_mid, special_rad) in enumerate(special):
        mid[choice == k] = special_mid
        rad[choice == k] = special_rad
    return mid, rad


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().requires_grad_() for t in tensors)


def assert_identical(actual: Tensor, expected: Tensor) -> None:
    """Equal to the last bit, the sign of zero included; a NaN equals every NaN. Memory order agrees too."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert actual.stride() == expected.stride() or actual.numel() == 0
    if actual.dtype.is_floating_point:
        assert torch.equal(actual.isnan(), expected.isnan())
        actual, expected = (
            t.nan_to_num(nan=0.0, posinf=float("inf"), neginf=-float("inf")) for t in (actual, expected)
        )
        assert torch.equal(actual.signbit(), expected.signbit())
    assert torch.equal(actual, expected)


def assert_identical_up_to_zero_sign(actual: Tensor, expected: Tensor) -> None:
    """As above, but −0 equals +0."""
    assert_identical(actual + 0.0, expected + 0.0)


def assert_encloses(mid: Tensor, rad: Tensor, points: Tensor) -> None:
    """The box holds the points, up to the float64 rounding of either (bounds here are rounded to nearest)."""
    slack = 1e-12 * (1 + mid.abs() + rad)
    assert (points >= mid - rad - slack).all() and (points <= mid + rad + slack).all()


def assert_contains(mid: Tensor, rad: Tensor, points: Tensor) -> None:
    """The float32 box holds the float64 points, without any slack."""
    assert (points >= mid.double() - rad.double()).all() and (points <= mid.double() + rad.double()).all()


def assert_sums_agree(actual: Tensor, expected: Tensor, magnitudes: Tensor, terms: int) -> None:
    """A sum in the dtype and one in float64, in whatever orders: they differ by γ of the sum of magnitudes at most."""
    gamma = (terms + 2) * torch.finfo(actual.dtype).eps
    assert actual.shape == expected.shape
    assert ((actual.double() - expected).abs() <= gamma * magnitudes).all()


def samples(mid: Tensor, rad: Tensor, count: int = 20, seed: int = 0) -> Iterator[Tensor]:
    """Points of the box: corners and inner points by turns."""
    generator = torch.Generator().manual_seed(seed)
    for k in range(count):
        t = 2 * torch.rand(mid.shape, generator=generator, dtype=mid.dtype) - 1
        yield mid + rad * (t.sign() if k % 2 else t)


@contextmanager
def level(name: str) -> Iterator[None]:
    """Run the native kernels at one instruction-set level, on two threads where there is enough to do."""
    assert native._native is not None
    before = native._native.level(), torch.get_num_threads()
    native._native.set_level(name)
    torch.set_num_threads(2)
    try:
        yield
    finally:
        native._native.set_level(before[0])
        torch.set_num_threads(before[1])
