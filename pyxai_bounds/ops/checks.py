"""What the backends check of their arguments: a kernel that is given an address cannot check anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyxai_bounds.ops.layout import dense, state_size


def boxes(mid: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The tensors, dense in the memory order of the first.

    Raises ValueError if one of them differs from the first in shape, dtype or device.
    """
    for other in others:
        if other.shape != mid.shape or other.dtype is not mid.dtype or other.device != mid.device:
            raise ValueError(
                f"Midpoints and radii must agree in shape, dtype and device: {describe(mid)} and {describe(other)}."
            )
    return dense(mid, *others)


def bits_of(packed: Tensor, mid: Tensor, size: tuple[int, ...] | None = None) -> Tensor:
    """The packed bits, contiguous; ``size`` is ``state_size(mid)``, if the caller knows it.

    Raises ValueError if they cannot belong to ``mid``.
    """
    if packed.shape != (size or state_size(mid)) or packed.dtype is not torch.uint8 or packed.device != mid.device:
        raise ValueError(
            f"The packed bits of {describe(mid)} are uint8 {list(state_size(mid))} on the same device, "
            f"not {describe(packed)}; pass the state or gate that belongs to this tensor."
        )
    return packed.contiguous()


def per_channel(name: str, values: Tensor, mid: Tensor) -> Tensor:
    """The values, contiguous. Raises ValueError unless there is one for each channel of ``mid``."""
    if values.numel() != mid.shape[1] or values.dtype is not mid.dtype or values.device != mid.device:
        raise ValueError(
            f"{name} needs one {mid.dtype} value for each of the {mid.shape[1]} channels of {describe(mid)}, "
            f"not {describe(values)}."
        )
    return values.contiguous()


def describe(t: Tensor) -> str:
    return f"{t.dtype} {list(t.shape)} on {t.device}"


def output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Height and width of what a convolution makes of an image of this height and width."""
    sides = zip(size, kernel, stride, padding, dilation, strict=True)
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides]


def matmul_sizes(a: Tensor, b: Tensor) -> tuple[int, int, int, int]:
    """B (1 for plain matrices), m, k and n of a product [B, m, k] × [B, k, n]."""
    return a.shape[0] if a.dim() == 3 else 1, a.shape[-2], a.shape[-1], b.shape[-1]
