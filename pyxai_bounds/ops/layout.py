"""Memory order of a tensor and of the packed bits that belong to it.

A fused operator reads and writes dense tensors in one of two orders, contiguous or channels-last; the
first argument decides. Bits are packed in that order: a uint8 tensor [2, ceil(n / 8)] with one plane
that says "the lower end is kept" and one that says "the upper end is kept"; element i is bit i % 8 of
byte i // 8. (keep_lower, keep_upper) is 00 for dead, 01 for unstable, 11 for active.
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


def state_size(t: Tensor) -> tuple[int, int]:
    """Shape of the packed bits of ``t``: two bits per element."""
    return 2, (t.numel() + 7) // 8


def pack(keep_lower: Tensor, keep_upper: Tensor) -> Tensor:
    """Pack two bool tensors of one shape and layout, in the memory order of the first."""
    planes = [_memory_order(plane) for plane in dense(keep_lower, keep_upper)]
    bits = torch.nn.functional.pad(torch.stack(planes).to(torch.uint8), (0, -planes[0].numel() % 8))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    return (bits.reshape(2, -1, 8) * weights).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """The two bool tensors behind ``packed``, in the shape and memory order of ``like``."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = ((packed.unsqueeze(-1) >> shifts) & 1).bool().reshape(2, -1)[:, : like.numel()]
    if memory_format(like) is torch.channels_last:
        n, c, h, w = like.shape
        lower, upper = (plane.reshape(n, h, w, c).permute(0, 3, 1, 2) for plane in bits)
    else:
        lower, upper = (plane.reshape(like.shape) for plane in bits)
    return lower, upper


def _memory_order(t: Tensor) -> Tensor:
    if memory_format(t) is torch.channels_last:
        t = t.permute(0, 2, 3, 1)
    return t.reshape(-1)
