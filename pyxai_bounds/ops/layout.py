"""Memory order of a tensor and of the packed bits that belong to it.

A fused operator reads and writes dense tensors in one of two orders, contiguous or channels-last; the
first argument decides. Bits are packed in that order: a uint8 tensor [2, ceil(n / 8)] with one plane
that says "the lower end is kept" and one that says "the upper end is kept"; element i is bit i % 8 of
byte i // 8. (keep_lower, keep_upper) is 00 for dead, 01 for unstable, 11 for active.

The bits say themselves which order they are in: channels-last they have a third dimension, of size 1. Whoever
reads them brings the tensors into that order first, because the order that a kernel returns need not be
the one that tracing foresaw, and bits read in the wrong order would be wrong bounds.
"""

from __future__ import annotations

import torch
from torch import Tensor


def memory_format(t: Tensor) -> torch.memory_format:
    """Channels-last if ``t`` is laid out so and not also contiguous; contiguous otherwise."""
    if t.dim() == 4 and not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def dense(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, all dense in the memory order of the first."""
    order = memory_format(tensors[0])
    return tuple(t.contiguous(memory_format=order) for t in tensors)


def dense_like(t: Tensor) -> Tensor:
    """An uninitialised tensor of the shape, dtype and device of ``t``, dense in its memory order."""
    return torch.empty_like(t, memory_format=memory_format(t))


def state_size(t: Tensor) -> tuple[int, ...]:
    """Shape of the packed bits of ``t``: two bits per element, and a third dimension if it is channels-last."""
    size = (2, (t.numel() + 7) // 8)
    return (*size, 1) if memory_format(t) is torch.channels_last else size


def order_of(packed: Tensor) -> torch.memory_format:
    """The memory order in which bits were packed."""
    return torch.channels_last if packed.dim() == 3 else torch.contiguous_format


def in_order_of(packed: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, dense in the memory order of the bits."""
    order = order_of(packed)
    return tuple(t.contiguous(memory_format=order) for t in tensors)


def pack(keep_lower: Tensor, keep_upper: Tensor) -> Tensor:
    """Pack two bool tensors of one shape and layout, in the memory order of the first."""
    keep_lower, keep_upper = dense(keep_lower, keep_upper)
    planes = [_memory_order(plane) for plane in (keep_lower, keep_upper)]
    bits = torch.nn.functional.pad(torch.stack(planes).to(torch.uint8), (0, -planes[0].numel() % 8))
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)  # made there: a CUDA graph records no copy
    packed = (bits.reshape(2, -1, 8) << shifts).sum(-1, dtype=torch.uint8)
    return packed.reshape(state_size(keep_lower))


def unpack(packed: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """The two bool tensors behind ``packed``, in its memory order and the shape of ``like``."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    flat = packed.reshape(2, (like.numel() + 7) // 8, 1)
    bits = ((flat >> shifts) & 1).bool().reshape(2, -1)[:, : like.numel()]
    if order_of(packed) is torch.channels_last:
        n, c, h, w = like.shape
        lower, upper = (plane.reshape(n, h, w, c).permute(0, 3, 1, 2) for plane in bits)
    else:
        lower, upper = (plane.reshape(like.shape) for plane in bits)
    return lower, upper


def _memory_order(t: Tensor) -> Tensor:
    if memory_format(t) is torch.channels_last:
        t = t.permute(0, 2, 3, 1)
    return t.reshape(-1)
