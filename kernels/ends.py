"""What ReLU and ReLU′ do to the two ends of an interval, and how the decisions are packed: shared by all kernels.

The specification is ``pyxai_bounds/ops/reference.py`` (states, gate) and ``layout.py`` (packed bits).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def relu_keeps(mid, rad):
    """Which ends ReLU keeps: the lower where it is positive, the upper where it is not ≤ 0, so a NaN is unstable."""
    return mid - rad > 0.0, (mid + rad <= 0.0) == 0


@triton.jit
def relu_backward_keeps(mid, rad, active, alive):
    """Which ends of a gradient box ReLU′ keeps, by the state of the ReLU."""
    keep_lower = active | (alive & ((mid - rad >= 0.0) == 0))
    keep_upper = active | (alive & ((mid + rad <= 0.0) == 0))
    return keep_lower, keep_upper


@triton.jit
def gated(mid, rad, keep_lower, keep_upper):
    """The box with each end kept or zeroed. Where both are kept there is nothing to compute, and nothing to round."""
    lower = tl.where(keep_lower, mid - rad, 0.0)
    upper = tl.where(keep_upper, mid + rad, 0.0)
    both = keep_lower & keep_upper
    return tl.where(both, mid, (lower + upper) * 0.5), tl.where(both, rad, (upper - lower) * 0.5)


@triton.jit
def rectified(mid, rad, keep_lower, keep_upper):
    """``gated`` by ``relu_keeps`` of this box, where no radius is negative: then a lower end > 0 keeps both ends."""
    half = tl.where(keep_upper, (mid + rad) * 0.5, 0.0)
    return tl.where(keep_lower, mid, half), tl.where(keep_lower, rad, half)


@triton.jit
def bits_of(packed, bit):
    """Bit number ``bit`` of each byte, as a mask; the two are broadcast."""
    return ((packed.to(tl.int32) >> bit) & 1) != 0


@triton.jit
def bytes_of(keep, bit, AXIS: tl.constexpr):
    """Eight masks along ``AXIS`` to one byte; ``bit`` (0 … 7, broadcast) is the place of each."""
    return tl.sum(keep.to(tl.int32) << bit, AXIS).to(tl.uint8)
