"""Max pooling of intervals: the windows of an image, and which of their elements may or must be the first maximum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

MOST = 31  # elements of a window that the bits of one int32 can tell apart


class Windows:
    """The pooling windows of an image as columns [B, C, positions, windows], padded with −∞, and back."""

    def __init__(
        self,
        x: Tensor,
        out: Sequence[int],
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> None:
        self.shape = x.shape
        self.batch, self.channels = (1, x.shape[0]) if x.dim() == 3 else x.shape[:2]
        self.kernel, self.stride, self.dilation = kernel, stride, dilation
        self.count = out[0] * out[1]
        height, width = x.shape[-2:]
        # Exactly what the windows touch, which with ceil_mode is more than the padded image, or else less.
        self.extent = [(n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(out, stride, dilation, kernel, strict=True)]
        top, left = padding
        self.pad = [left, self.extent[1] - width - left, top, self.extent[0] - height - top]

    def unfold(self, x: Tensor, outside: float = float("-inf")) -> Tensor:
        image = x.reshape(self.batch, self.channels, *self.shape[-2:])
        columns = aten.im2col(F.pad(image, self.pad, value=outside), self.kernel, self.dilation, [0, 0], self.stride)
        return columns.reshape(self.batch, self.channels, self.kernel[0] * self.kernel[1], self.count)

    def fold(self, columns: Tensor) -> Tensor:
        image = aten.col2im(columns.flatten(1, 2), self.extent, self.kernel, self.dilation, [0, 0], self.stride)
        return F.pad(image, [-p for p in self.pad]).reshape(self.shape)

    def first_maximum(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Of every element of every window: must it be the window's first maximum in row order, and may it be?"""
        # An element of −∞ can be the maximum of its window, which the padding cannot.
        least = torch.finfo(lower.dtype).min
        return first_of_greatest(*(self.unfold(end.clamp(min=least)) for end in (lower, upper)))


def first_of_greatest(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Of every position along the third dimension: must it hold the first of the greatest values, and may it?

    Element i must be iff l_i > u_j for all j before i and l_i ≥ u_j for all j after; it may be iff u_i > l_j before and
    u_i ≥ l_j after.
    """
    must = (lower > _before(upper)) & (lower >= _after(upper))
    may = ~((upper <= _before(lower)) | (upper < _after(lower)))  # true for a NaN
    return must, may


def _before(x: Tensor) -> Tensor:
    """For each position the greatest value at an earlier one (−∞ at the first)."""
    running = [torch.full_like(x[:, :, 0], float("-inf"))]
    for position in x.unbind(2)[:-1]:
        running.append(torch.maximum(running[-1], position))
    return torch.stack(running, 2)


def _after(x: Tensor) -> Tensor:
    return _before(x.flip(2)).flip(2)


def pack_positions(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """Masks [B, C, positions, windows] as int32 of the windows' shape, bit i for position i."""
    bit = torch.arange(mask.shape[2], dtype=torch.int32, device=mask.device)[:, None]
    return (mask.to(torch.int32) << bit).sum(2, dtype=torch.int32).reshape(shape)


def unpack_positions(bits: Tensor, positions: int) -> Tensor:
    """The masks [B, C, positions, windows] behind the bits [B, C, …]."""
    bit = torch.arange(positions, dtype=torch.int32, device=bits.device)[:, None]
    return ((bits.flatten(2)[:, :, None] >> bit) & 1) != 0
