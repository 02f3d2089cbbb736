"""The fused interval operators in plain PyTorch: any dtype, any device. This is the specification.

Every function has the name and the arguments of an operator in ``ops/__init__.py``; the other backends
must agree with it, elementwise stages to the last bit. ``mid`` decides the memory order of the results.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyxai_bounds.ops.layout import dense, in_order_of, memory_format, pack, unpack

aten = torch.ops.aten


def supports(mid: Tensor) -> bool:
    return True


def interval_gate(mid: Tensor, rad: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Keep or zero each end point: lower′ = a·lower, upper′ = b·upper with the bits (a, b) of ``gate``.

    This one linear map, which is its own adjoint, is the derivative of ReLU and of ReLU′ on intervals.
    """
    mid, rad = in_order_of(gate, mid, rad)
    keep_lower, keep_upper = unpack(gate, mid)
    zero = torch.zeros((), dtype=mid.dtype, device=mid.device)
    lower = torch.where(keep_lower, mid - rad, zero)
    upper = torch.where(keep_upper, mid + rad, zero)
    both = keep_lower & keep_upper  # nothing to compute, and nothing to round
    return torch.where(both, mid, (lower + upper) * 0.5), torch.where(both, rad, (upper - lower) * 0.5)


def interval_relu(mid: Tensor, rad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ReLU of the box. The lower end is kept where it is positive, the upper end where it is not ≤ 0.

    Said this way round, a NaN is unstable, which covers every derivative, and it stays a NaN.
    """
    mid, rad = dense(mid, rad)
    state = pack(mid - rad > 0, ~(mid + rad <= 0))
    return *interval_gate(mid, rad, state), state


def interval_relu_backward(mid: Tensor, rad: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient box times ReLU′ ∈ {0, [0, 1], 1}; also the gate that was applied.

    dead: nothing is kept; active: both ends are; unstable: hull(0, box), so the lower end is kept where it
    is negative and the upper end where it is positive (each where it is NaN, too).
    """
    mid, rad = in_order_of(state, mid, rad)
    active, alive = unpack(state, mid)
    gate = pack(active | (alive & ~(mid - rad >= 0)), active | (alive & ~(mid + rad <= 0)))
    return *interval_gate(mid, rad, gate), gate


def interval_linear(
    mid: Tensor, rad: Tensor, weight: Tensor, bias: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Image of the box under x ↦ x·Wᵀ + b, then ReLU if asked for."""
    out_mid = torch.nn.functional.linear(mid, weight, bias)
    out_rad = torch.nn.functional.linear(rad, weight.abs())
    return _maybe_relu(out_mid, out_rad, relu)


def interval_linear_backward(mid: Tensor, rad: Tensor, weight: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """ReLU′ on the gradient box if a state is given, then its image under g ↦ g·W."""
    if state is not None:
        mid, rad, _ = interval_relu_backward(mid, rad, state)
    return mid @ weight, rad @ weight.abs()


def interval_linear_weight(grad_mid: Tensor, grad_rad: Tensor, mid: Tensor, rad: Tensor, weight: Tensor) -> Tensor:
    """Gradient of ``interval_linear`` in the weight: gradᵀ·mid + sign(W) ⊙ (grad_radᵀ·rad)."""
    return grad_mid.t() @ mid + weight.sign() * (grad_rad.t() @ rad)


def interval_conv2d(
    mid: Tensor,
    rad: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Image of the box under a two-dimensional convolution, then ReLU if asked for."""
    mid, rad = dense(mid, rad)
    order = memory_format(mid)
    args = (stride, padding, dilation, groups)
    out_mid = torch.conv2d(mid, weight, bias, *args).contiguous(memory_format=order)
    out_rad = torch.conv2d(rad, weight.abs(), None, *args).contiguous(memory_format=order)
    return _maybe_relu(out_mid, out_rad, relu)


def interval_conv2d_backward(
    mid: Tensor,
    rad: Tensor,
    weight: Tensor,
    state: Tensor | None,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """ReLU′ on the gradient box if a state is given, then the convolution's backward-data pass."""
    mid, rad = dense(mid, rad)
    if state is not None:
        mid, rad, _ = interval_relu_backward(mid, rad, state)
    order = memory_format(mid)
    args = (input_size, stride, padding, dilation, groups)
    return (
        conv2d_input(mid, weight, *args).contiguous(memory_format=order),
        conv2d_input(rad, weight.abs(), *args).contiguous(memory_format=order),
    )


def interval_conv2d_weight(
    grad_mid: Tensor,
    grad_rad: Tensor,
    mid: Tensor,
    rad: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Gradient of ``interval_conv2d`` in the weight: the convolution's at midpoints, plus sign(W) ⊙ its at radii."""
    args = (stride, padding, dilation, groups)
    grad = conv2d_weight(grad_mid, mid, weight, *args) + weight.sign() * conv2d_weight(grad_rad, rad, weight, *args)
    return grad.contiguous(memory_format=memory_format(weight))


def interval_scale_shift(mid: Tensor, rad: Tensor, scale: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """x ↦ x·scale + shift, one scale and shift per channel (dimension 1)."""
    mid, rad = dense(mid, rad)
    per_channel = [1, -1] + [1] * (mid.dim() - 2)
    scale = scale.reshape(per_channel)
    out = mid * scale
    return out if shift is None else out + shift.reshape(per_channel), rad * scale.abs()


def interval_mul(a_mid: Tensor, a_rad: Tensor, b_mid: Tensor, b_rad: Tensor) -> tuple[Tensor, Tensor]:
    """Elementwise product of two boxes of one shape: the least and the greatest end-point product."""
    a_mid, a_rad, b_mid, b_rad = dense(a_mid, a_rad, b_mid, b_rad)
    a_lower, a_upper, b_lower, b_upper = a_mid - a_rad, a_mid + a_rad, b_mid - b_rad, b_mid + b_rad
    ll, lu, ul, uu = a_lower * b_lower, a_lower * b_upper, a_upper * b_lower, a_upper * b_upper
    lower = torch.minimum(torch.minimum(ll, lu), torch.minimum(ul, uu))
    upper = torch.maximum(torch.maximum(ll, lu), torch.maximum(ul, uu))
    return (lower + upper) * 0.5, (upper - lower) * 0.5


def conv2d_input(
    grad: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The backward-data pass of a two-dimensional convolution, at one tensor."""
    # The transposed convolution, not aten.convolution_backward: that one first copies an input of which it needs the
    # shape alone. Certifying the benchmarks' N4 took 1.5 times as long with it (2 cores, channels-last, float32).
    leftover = [
        size - ((out - 1) * s - 2 * p + d * (k - 1) + 1)
        for size, out, s, p, d, k in zip(
            input_size[2:], grad.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True
        )
    ]
    return torch.conv_transpose2d(grad, weight, None, stride, padding, leftover, groups, dilation)


def conv2d_weight(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The weight gradient of a two-dimensional convolution, at one tensor."""
    mask = [False, True, False]
    return aten.convolution_backward(grad, input, weight, None, stride, padding, dilation, False, [0, 0], groups, mask)[
        1
    ]


def _maybe_relu(mid: Tensor, rad: Tensor, relu: bool) -> tuple[Tensor, Tensor, Tensor]:
    if relu:
        return interval_relu(mid, rad)
    return mid, rad, mid.new_empty(0, dtype=torch.uint8)
