"""The fused interval operators in plain PyTorch: any dtype, any device. This is the specification.

Every function has the name and the arguments of an operator in ``ops/__init__.py``; the other backends
must agree with it, elementwise stages to the last bit. ``mid`` decides the memory order of the results.

``rounding`` is a :class:`~pyxai_bounds.rounding.Rounding`. Rounded outward, the result contains the image of the box
in real arithmetic; the argument stands at each operator, and in full in ``docs/soundness.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyxai_bounds import rounding as rd
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


def _gate(mid: Tensor, rad: Tensor, gate: Tensor, rounding: int) -> tuple[Tensor, Tensor]:
    """``interval_gate``, rounded outward if asked for.

    Where one end e is kept, half of it is the midpoint h, and the radius must cover 0 and e: e itself was rounded once,
    and halving may underflow. Where both ends or neither is kept nothing was computed.
    """
    out_mid, out_rad = interval_gate(mid, rad, gate)
    if rounding == rd.Rounding.NEAREST:
        return out_mid, out_rad
    keep_lower, keep_upper = unpack(gate, out_mid)
    return out_mid, torch.where(keep_lower ^ keep_upper, rd.up(out_rad, underflows=True), out_rad)


def interval_relu(mid: Tensor, rad: Tensor, rounding: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """ReLU of the box. The lower end is kept where it is positive, the upper end where it is not ≤ 0.

    Said this way round, a NaN is unstable, which covers every derivative, and it stays a NaN. The signs of both ends
    are those of the real numbers, for a difference that is not 0 does not round to 0.
    """
    mid, rad = dense(mid, rad)
    state = pack(mid - rad > 0, ~(mid + rad <= 0))
    return *_gate(mid, rad, state, rounding), state


def interval_relu_backward(mid: Tensor, rad: Tensor, state: Tensor, rounding: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient box times ReLU′ ∈ {0, [0, 1], 1}; also the gate that was applied.

    dead: nothing is kept; active: both ends are; unstable: hull(0, box), so the lower end is kept where it
    is negative and the upper end where it is positive (each where it is NaN, too).
    """
    mid, rad = in_order_of(state, mid, rad)
    active, alive = unpack(state, mid)
    gate = pack(active | (alive & ~(mid - rad >= 0)), active | (alive & ~(mid + rad <= 0)))
    return *_gate(mid, rad, gate, rounding), gate


def interval_linear(
    mid: Tensor, rad: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, rounding: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Image of the box under x ↦ x·Wᵀ + b, then ReLU if asked for."""
    linear = torch.nn.functional.linear
    if rounding == rd.Rounding.NEAREST:
        out_mid, out_rad = linear(mid, weight, bias), linear(rad, weight.abs())
    else:
        # In float64 a product of two float32 numbers is exact and a sum of n of them loses next to nothing; in float32
        # the midpoint would lose γ_n |x|, which for n = 4096 is more than the radius of many a box.
        wide = torch.float64
        out_mid = linear(mid.to(wide), weight.to(wide), None if bias is None else bias.to(wide)).to(mid.dtype)
        errors = rd.errors(weight.shape[1], mid.dtype, rounding, computed=wide)
        out_rad = linear(rd.widen(mid, rad, errors), rd.magnitude(weight, errors), rd.bias_error(bias, errors))
        out_rad = _or_nan(out_rad, out_mid)
    return _maybe_relu(out_mid, out_rad, relu, rounding)


def interval_linear_backward(
    mid: Tensor, rad: Tensor, weight: Tensor, state: Tensor | None, rounding: int = 0
) -> tuple[Tensor, Tensor]:
    """ReLU′ on the gradient box if a state is given, then its image under g ↦ g·W."""
    if state is not None:
        mid, rad, _ = interval_relu_backward(mid, rad, state, rounding)
    if rounding == rd.Rounding.NEAREST:
        return mid @ weight, rad @ weight.abs()
    return interval_linear(mid, rad, weight.t(), None, False, rounding)[:2]


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
    rounding: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Image of the box under a two-dimensional convolution, then ReLU if asked for."""
    mid, rad = dense(mid, rad)
    order = memory_format(mid)
    args = (stride, padding, dilation, groups)
    if rounding == rd.Rounding.NEAREST:
        out_mid = torch.conv2d(mid, weight, bias, *args)
        out_rad = torch.conv2d(rad, weight.abs(), None, *args)
    else:

        def convolve(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            return torch.conv2d(x, w, b, *args)

        out_mid, out_rad = _blocked(convolve, mid, rad, weight, bias, 1, groups, rounding)
    out_mid, out_rad = out_mid.contiguous(memory_format=order), out_rad.contiguous(memory_format=order)
    return _maybe_relu(out_mid, out_rad, relu, rounding)


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
    rounding: int = 0,
) -> tuple[Tensor, Tensor]:
    """ReLU′ on the gradient box if a state is given, then the convolution's backward-data pass."""
    mid, rad = dense(mid, rad)
    if state is not None:
        mid, rad, _ = interval_relu_backward(mid, rad, state, rounding)
    order = memory_format(mid)
    args = (input_size, stride, padding, dilation, groups)
    if rounding == rd.Rounding.NEAREST:
        out_mid, out_rad = conv2d_input(mid, weight, *args), conv2d_input(rad, weight.abs(), *args)
    else:

        def convolve(x: Tensor, w: Tensor, _: Tensor | None) -> Tensor:
            return conv2d_input(x, w, *args)

        out_mid, out_rad = _blocked(convolve, mid, rad, weight, None, 0, groups, rounding)
    return out_mid.contiguous(memory_format=order), out_rad.contiguous(memory_format=order)


BLOCK = 160  # terms that a convolution sums in one go when it is rounded outward


def _blocked(
    convolve: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    mid: Tensor,
    rad: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dim: int,
    groups: int,
    rounding: int,
) -> tuple[Tensor, Tensor]:
    """A convolution, forward or backward, rounded outward; ``dim`` is the dimension of the weight that it sums over.

    The library's order of summation is unknown, so n terms cost γ_n. Blocks of b terms, of which the n/b sums are added
    up afterwards, cost γ_{b + n/b} only, for the price of one more pass over the output per block.
    """
    taps = weight.shape[2] * weight.shape[3]
    channels = weight.shape[dim]
    terms = channels // (groups if dim == 0 else 1) * taps
    if weight.device.type != "cpu":
        # cuDNN may choose Winograd or Fourier transforms for float32, which no bound here covers, but not for float64.
        wide = torch.float64
        errors = rd.errors(terms, mid.dtype, rounding, computed=wide)
        out_mid = convolve(mid.to(wide), weight.to(wide), None if bias is None else bias.to(wide)).to(mid.dtype)
        widened, share = rd.widen(mid, rad, errors), rd.bias_error(bias, errors)
        out_rad = convolve(
            widened.to(wide), rd.magnitude(weight, errors).to(wide), None if share is None else share.to(wide)
        )
        return out_mid, _or_nan(rd.narrow_up(out_rad, mid.dtype), out_mid)
    size = max(1, BLOCK // taps) if groups == 1 and rounding == rd.Rounding.OUTWARD else channels
    starts = range(0, channels, size)
    if len(starts) == 1:
        out_mid = convolve(mid, weight, bias)
    else:
        out_mid = convolve(mid[:, :size], weight.narrow(dim, 0, size), bias)
        for start in starts[1:]:
            length = min(size, channels - start)
            out_mid += convolve(mid[:, start : start + length], weight.narrow(dim, start, length), None)
    errors = rd.errors(terms, mid.dtype, rounding, summed=min(terms, size * taps) + len(starts))
    out_rad = convolve(rd.widen(mid, rad, errors), rd.magnitude(weight, errors), rd.bias_error(bias, errors))
    return out_mid, _or_nan(out_rad, out_mid)


def _or_nan(rad: Tensor, mid: Tensor) -> Tensor:
    """The radius; NaN where the midpoint is not finite. There a partial sum has overflowed and says nothing of the real
    number, so that ReLU must not call it active or dead.
    """
    return torch.addcmul(rad, mid, torch.zeros((), dtype=mid.dtype, device=mid.device))


def interval_scale_shift(
    mid: Tensor,
    rad: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    scale_rad: Tensor | None = None,
    shift_rad: Tensor | None = None,
    rounding: int = 0,
) -> tuple[Tensor, Tensor]:
    """x ↦ x·scale + shift, one scale and shift per channel (dimension 1); either may be a box itself.

    Two boxes meet in Rump's product. Rounded outward, the product and the sum lose u of their results each.
    """
    mid, rad = dense(mid, rad)
    per_channel = [1, -1] + [1] * (mid.dim() - 2)
    scale = scale.reshape(per_channel)
    product = mid * scale
    out = product if shift is None else product + shift.reshape(per_channel)
    out_rad = rad * scale.abs()
    if scale_rad is not None:
        out_rad = out_rad + scale_rad.reshape(per_channel) * (mid.abs() + rad)
    if shift_rad is not None:
        out_rad = out_rad + shift_rad.reshape(per_channel)
    if rounding == rd.Rounding.NEAREST:
        return out, out_rad
    u = rd.unit(mid.dtype)
    lost = product.abs() if shift is None else product.abs() + out.abs()
    lost = u * lost
    tiny = rd.tiny(mid.dtype)
    if rounding == rd.Rounding.EVALUATED:
        # Whatever the algebra: at most 12 roundings in float32 of x·s, mean·s and the shift, at any x and s in their
        # boxes; where mean·s and the bias cancel in the shift, what they lose is in its radius.
        reach = (product.abs() + out_rad) * 2
        reach = reach if shift is None else reach + shift.abs().reshape(per_channel)
        lost = lost + 12 * rd.unit(torch.float32) * reach
        tiny = rd.tiny(torch.float32)
    out_rad = (out_rad + lost) * (1 + 16 * u)
    some = (mid != 0) | (rad != 0)
    if shift is not None:
        some = some | (out != 0)
    return out, _or_nan(out_rad + some * (4 * tiny), out)


def interval_mul(
    a_mid: Tensor, a_rad: Tensor, b_mid: Tensor, b_rad: Tensor, rounding: int = 0
) -> tuple[Tensor, Tensor]:
    """Elementwise product of two boxes of one shape: the least and the greatest end-point product.

    Rounded outward: ends, products, and the way back to midpoint and radius lose at most 8u of the greatest product.
    """
    a_mid, a_rad, b_mid, b_rad = dense(a_mid, a_rad, b_mid, b_rad)
    a_lower, a_upper, b_lower, b_upper = a_mid - a_rad, a_mid + a_rad, b_mid - b_rad, b_mid + b_rad
    ll, lu, ul, uu = a_lower * b_lower, a_lower * b_upper, a_upper * b_lower, a_upper * b_upper
    lower = torch.minimum(torch.minimum(ll, lu), torch.minimum(ul, uu))
    upper = torch.maximum(torch.maximum(ll, lu), torch.maximum(ul, uu))
    mid, rad = (lower + upper) * 0.5, (upper - lower) * 0.5
    if rounding == rd.Rounding.NEAREST:
        return mid, rad
    u = rd.unit(mid.dtype)
    reach = (a_mid.abs() + a_rad) * (b_mid.abs() + b_rad)
    some = ((a_mid != 0) | (a_rad != 0)) & ((b_mid != 0) | (b_rad != 0))
    lost, tiny = 8 * u, rd.tiny(mid.dtype)
    if rounding == rd.Rounding.EVALUATED:
        lost, tiny = lost + 2 * rd.unit(torch.float32), rd.tiny(torch.float32)
    return mid, (rad + lost * reach) * (1 + 16 * u) + some * (4 * tiny)


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


def _maybe_relu(mid: Tensor, rad: Tensor, relu: bool, rounding: int) -> tuple[Tensor, Tensor, Tensor]:
    if relu:
        return interval_relu(mid, rad, rounding)
    return mid, rad, mid.new_empty(0, dtype=torch.uint8)
