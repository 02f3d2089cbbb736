"""The fused interval operators in plain PyTorch: any dtype, any device. This is the specification.

Every function has the name and the arguments of an operator in ``ops/__init__.py``; the other backends
must agree with it, elementwise stages to the last bit. ``mid`` decides the memory order of the results.

``rounding`` is a :class:`~pyxai_bounds.rounding.Rounding`. Rounded outward, the result contains the image of the box
in real arithmetic; the argument stands at each operator, and in full in ``docs/soundness.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyxai_bounds import rounding as rd
from pyxai_bounds.errors import capturing
from pyxai_bounds.ops.layout import dense, in_order_of, memory_format, pack, unpack
from pyxai_bounds.ops.smooth import extremes, extremes_adjoint, smooth
from pyxai_bounds.ops.windows import Windows, pack_positions, unpack_positions

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
    mid: Tensor, rad: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, rounding: int = 0, stages: Any = rd
) -> tuple[Tensor, Tensor, Tensor]:
    """Image of the box under x ↦ x·Wᵀ + b, then ReLU if asked for. ``stages`` has the backend's widen and magnitude."""
    linear = torch.nn.functional.linear
    if rounding == rd.Rounding.NEAREST:
        out_mid, out_rad = linear(mid, weight, bias), linear(rad, weight.abs())
    else:
        # In float64 a product of two float32 numbers is exact and a sum of n of them loses next to nothing; in float32
        # the midpoint would lose γ_n |x|, which for n = 4096 is more than the radius of many a box.
        wide = torch.float64
        out_mid = linear(mid.to(wide), weight.to(wide), None if bias is None else bias.to(wide)).to(mid.dtype)
        errors = rd.errors(weight.shape[1], mid.dtype, rounding, computed=wide)
        out_rad = linear(stages.widen(mid, rad, errors), stages.magnitude(weight, errors), rd.bias_error(bias, errors))
        out_rad = _or_nan(out_rad, out_mid)
    return _maybe_relu(out_mid, out_rad, relu, rounding)


def interval_linear_backward(
    mid: Tensor, rad: Tensor, weight: Tensor, state: Tensor | None, rounding: int = 0, stages: Any = rd
) -> tuple[Tensor, Tensor]:
    """ReLU′ on the gradient box if a state is given, then its image under g ↦ g·W."""
    if state is not None:
        mid, rad, _ = interval_relu_backward(mid, rad, state, rounding)
    if rounding == rd.Rounding.NEAREST:
        return mid @ weight, rad @ weight.abs()
    return interval_linear(mid, rad, weight.t(), None, False, rounding, stages)[:2]


def interval_linear_weight(
    grad_mid: Tensor | None, grad_rad: Tensor | None, mid: Tensor | None, rad: Tensor | None, weight: Tensor
) -> Tensor:
    """Gradient of ``interval_linear`` in the weight: gradᵀ·mid + sign(W) ⊙ (grad_radᵀ·rad).

    A product with a factor that is None, which stands for zeros, is left out.
    """
    of_mid = None if grad_mid is None or mid is None else grad_mid.t() @ mid
    of_rad = None if grad_rad is None or rad is None else grad_rad.t() @ rad
    return signed_sum(of_mid, of_rad, weight)


def signed_sum(of_mid: Tensor | None, of_rad: Tensor | None, weight: Tensor) -> Tensor:
    """of_mid + sign(weight) ⊙ of_rad, which are two parts of a gradient; None stands for zeros."""
    if of_rad is None:
        return torch.zeros_like(weight) if of_mid is None else of_mid
    signed = weight.sign() * of_rad
    return signed if of_mid is None else of_mid + signed


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
    stages: Any = rd,
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

        out_mid, out_rad = _blocked(convolve, mid, rad, weight, bias, 1, groups, rounding, stages)
    out_mid, out_rad = out_mid.contiguous(memory_format=order), out_rad.contiguous(memory_format=order)
    return _maybe_relu(out_mid, out_rad, relu, rounding)


def interval_conv2d_gate(
    mid: Tensor,
    rad: Tensor,
    weight: Tensor,
    gate: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """A convolution of the box without a bias, then ``interval_gate``: what becomes of the gradient of a gated box."""
    return interval_gate(*interval_conv2d(mid, rad, weight, None, stride, padding, dilation, groups, False)[:2], gate)


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
    stages: Any = rd,
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

        out_mid, out_rad = _blocked(convolve, mid, rad, weight, None, 0, groups, rounding, stages)
    return out_mid.contiguous(memory_format=order), out_rad.contiguous(memory_format=order)


def interval_conv2d_backward_relu(
    mid: Tensor,
    rad: Tensor,
    weight: Tensor,
    state: Tensor | None,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution's backward-data pass, then ReLU′ if a state is given: the box, and the gate that was applied."""
    out = interval_conv2d_backward(mid, rad, weight, None, input_size, stride, padding, dilation, groups)
    if state is None:
        return *out, mid.new_empty(0, dtype=torch.uint8)
    return interval_relu_backward(*out, state)


def interval_conv2d_weight(
    grad_mid: Tensor | None,
    grad_rad: Tensor | None,
    mid: Tensor | None,
    rad: Tensor | None,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    signed_sum: Callable[..., Tensor] = signed_sum,
) -> Tensor:
    """Gradient of ``interval_conv2d`` in the weight: the convolution's at midpoints, plus sign(W) ⊙ its at radii.

    A part with a factor that is None, which stands for zeros, is left out.
    """
    args = (weight, stride, padding, dilation, groups)
    of_mid = None if grad_mid is None or mid is None else conv2d_weight(grad_mid, mid, *args)
    of_rad = None if grad_rad is None or rad is None else conv2d_weight(grad_rad, rad, *args)
    return signed_sum(of_mid, of_rad, weight).contiguous(memory_format=memory_format(weight))


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
    stages: Any,
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
        widened, share = stages.widen(mid, rad, errors), rd.bias_error(bias, errors)
        out_rad = convolve(
            widened.to(wide), stages.magnitude(weight, errors).to(wide), None if share is None else share.to(wide)
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
    out_rad = convolve(stages.widen(mid, rad, errors), stages.magnitude(weight, errors), rd.bias_error(bias, errors))
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
    evaluated, least = scale_shift_losses(mid.dtype, rounding)
    lost = product.abs() if shift is None else product.abs() + out.abs()
    lost = u * lost
    if rounding == rd.Rounding.EVALUATED:
        reach = (product.abs() + out_rad) * 2
        lost = lost + evaluated * (reach if shift is None else reach + shift.abs().reshape(per_channel))
    out_rad = (out_rad + lost) * (1 + 16 * u)
    some = (mid != 0) | (rad != 0)
    if shift is not None:
        some = some | (out != 0)
    return out, _or_nan(out_rad + some.to(mid.dtype) * least, out)


def scale_shift_losses(dtype: torch.dtype, rounding: int) -> tuple[float, float]:
    """Of what x·s + t reaches, what float32 evaluations of it lose; and what underflow may.

    Whatever the algebra: at most 12 roundings in float32 of x·s, mean·s and the shift, at any x and s in their boxes;
    where mean·s and the bias cancel in the shift, what they lose is in its radius.
    """
    if rounding == rd.Rounding.NEAREST:
        return 0.0, 0.0
    if rounding == rd.Rounding.OUTWARD:
        return 0.0, 4 * rd.tiny(dtype)
    return 12 * rd.unit(torch.float32), 4 * rd.tiny(torch.float32)


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
    reach = (a_mid.abs() + a_rad) * (b_mid.abs() + b_rad)
    some = ((a_mid != 0) | (a_rad != 0)) & ((b_mid != 0) | (b_rad != 0))
    lost, least = mul_losses(mid.dtype, rounding)
    return mid, (rad + lost * reach) * (1 + 16 * rd.unit(mid.dtype)) + some.to(mid.dtype) * least


def mul_losses(dtype: torch.dtype, rounding: int) -> tuple[float, float]:
    """Of the greatest product, what ends, products and the way back lose; and what underflow may."""
    lost = 8 * rd.unit(dtype)
    if rounding == rd.Rounding.NEAREST:
        return 0.0, 0.0
    if rounding == rd.Rounding.OUTWARD:
        return lost, 4 * rd.tiny(dtype)
    return lost + 2 * rd.unit(torch.float32), 4 * rd.tiny(torch.float32)


def interval_mul_adjoint(
    mid_grad: Tensor, rad_grad: Tensor, a_mid: Tensor, a_rad: Tensor, b_mid: Tensor, b_rad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of ``interval_mul`` in its arguments.

    Each end of the product is one of four end-point products; the gradient flows to the two ends it took.
    """
    a = torch.stack((a_mid - a_rad, a_mid - a_rad, a_mid + a_rad, a_mid + a_rad))
    b = torch.stack((b_mid - b_rad, b_mid + b_rad, b_mid - b_rad, b_mid + b_rad))
    products = a * b
    a_grads = []
    b_grads = []
    for chosen, end_grad in (
        (products.argmin(0, keepdim=True), (mid_grad - rad_grad) * 0.5),
        (products.argmax(0, keepdim=True), (mid_grad + rad_grad) * 0.5),
    ):
        a_end = torch.where(chosen >= 2, 1.0, -1.0).to(a.dtype).squeeze(0)  # +1: the upper end of a
        b_end = torch.where(chosen % 2 == 1, 1.0, -1.0).to(a.dtype).squeeze(0)
        a_grads.append((end_grad * b.gather(0, chosen).squeeze(0), a_end))
        b_grads.append((end_grad * a.gather(0, chosen).squeeze(0), b_end))
    (a0, s0), (a1, s1) = a_grads
    (b0, t0), (b1, t1) = b_grads
    return a0 + a1, a0 * s0 + a1 * s1, b0 + b1, b0 * t0 + b1 * t1


def interval_smooth(mid: Tensor, rad: Tensor, name: str, params: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The range of a function of ``smooth.py`` on the box."""
    mid, rad = dense(mid, rad)
    function = smooth(name, params)
    least, greatest, _ = extremes(function.value, mid - rad, mid + rad, function.critical)
    return (least + greatest) * 0.5, (greatest - least) * 0.5


def interval_smooth_adjoint(
    mid_grad: Tensor, rad_grad: Tensor, mid: Tensor, rad: Tensor, name: str, params: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The gradients of ``interval_smooth`` in mid and rad."""
    mid_grad, rad_grad, mid, rad = dense(mid_grad, rad_grad, mid, rad)
    to_ends = (mid_grad - rad_grad) * 0.5, (mid_grad + rad_grad) * 0.5
    to_lower, to_upper = extremes_adjoint(smooth(name, params), mid - rad, mid + rad, *to_ends)
    return to_lower + to_upper, to_upper - to_lower


def interval_smooth_backward(
    grad_mid: Tensor, grad_rad: Tensor, mid: Tensor, rad: Tensor, name: str, params: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The gradient box times the range of a slope of ``smooth.py`` on the box (mid, rad)."""
    grad_mid, grad_rad, mid, rad = dense(grad_mid, grad_rad, mid, rad)
    return interval_mul(grad_mid, grad_rad, *interval_smooth(mid, rad, name, params))


def interval_smooth_backward_adjoint(
    mid_grad: Tensor,
    rad_grad: Tensor,
    grad_mid: Tensor,
    grad_rad: Tensor,
    mid: Tensor,
    rad: Tensor,
    name: str,
    params: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of ``interval_smooth_backward`` in grad_mid, grad_rad, mid and rad."""
    mid_grad, rad_grad, grad_mid, grad_rad, mid, rad = dense(mid_grad, rad_grad, grad_mid, grad_rad, mid, rad)
    factor = interval_smooth(mid, rad, name, params)
    of_grad_mid, of_grad_rad, *of_factor = interval_mul_adjoint(mid_grad, rad_grad, grad_mid, grad_rad, *factor)
    of_mid, of_rad = interval_smooth_adjoint(of_factor[0], of_factor[1], mid, rad, name, params)
    return of_grad_mid, of_grad_rad, of_mid, of_rad


def interval_max_pool2d(
    mid: Tensor,
    rad: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    """The greatest lower and the greatest upper end of each window of an image [B, C, H, W]."""
    mid, rad = dense(mid, rad)
    order = memory_format(mid)
    lower, upper = (
        aten.max_pool2d_with_indices(end, kernel, stride, padding, dilation, ceil_mode)[0].contiguous(
            memory_format=order
        )
        for end in (mid - rad, mid + rad)
    )
    return (lower + upper) * 0.5, (upper - lower) * 0.5


def interval_first_maximum(
    mid: Tensor,
    rad: Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Which elements of each of the ``size`` windows must be its first maximum, and which may be: int32 [B, C, *size],
    a bit for each element in row order. (The bits of elements outside of the image mean nothing.)
    """
    mid, rad = dense(mid, rad)
    windows = Windows(mid, size, kernel, stride, padding, dilation)
    masks = windows.first_maximum(mid - rad, mid + rad)
    shape, order = (*mid.shape[:2], *size), memory_format(mid)
    must, may = (pack_positions(mask, shape).contiguous(memory_format=order) for mask in masks)
    return must, may


def interval_max_pool2d_backward(
    mid: Tensor,
    rad: Tensor,
    must: Tensor,
    may: Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Sends the gradient box of each window to every element of an image of the last two dimensions ``size``, times 1
    where it must be the first maximum, times [0, 1] where it may be.
    """
    must, may, mid, rad = dense(must, may, mid, rad)
    windows = Windows(mid.new_empty((*mid.shape[:2], *size)), mid.shape[2:], kernel, stride, padding, dilation)
    positions = kernel[0] * kernel[1]
    least, most = (unpack_positions(bits, positions).to(mid.dtype) for bits in (must, may))
    box_mid, box_rad = (t.flatten(2)[:, :, None].expand(least.shape) for t in (mid, rad))
    parts = interval_mul(box_mid, box_rad, (least + most) * 0.5, (most - least) * 0.5)
    out_mid, out_rad = (windows.fold(part).contiguous(memory_format=memory_format(must)) for part in parts)
    return out_mid, out_rad


def interval_max_pool2d_gather(
    mid: Tensor,
    rad: Tensor,
    grad_mid: Tensor,
    grad_rad: Tensor,
    must: Tensor,
    may: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The adjoint of ``interval_max_pool2d_backward`` in the gradient box (grad_mid, grad_rad): for each window, of
    what comes back to its elements the ends are summed that the box was sent with.
    """
    grad_mid, grad_rad = dense(grad_mid, grad_rad)
    order = memory_format(grad_mid)
    windows = Windows(mid, grad_mid.shape[2:], kernel, stride, padding, dilation)
    columns = [windows.unfold(t, 0.0) for t in (mid, rad)]
    box_mid, box_rad = (t.flatten(2)[:, :, None] for t in (grad_mid, grad_rad))
    sure, possible = (unpack_positions(bits, columns[0].shape[2]) for bits in (must, may))
    keep_lower = sure | (possible & ~(box_mid - box_rad >= 0))
    keep_upper = sure | (possible & ~(box_mid + box_rad <= 0))
    zero = mid.new_zeros(())
    lower = torch.where(keep_lower, columns[0] - columns[1], zero)
    upper = torch.where(keep_upper, columns[0] + columns[1], zero)
    both = keep_lower & keep_upper
    kept = torch.where(both, columns[0], (lower + upper) * 0.5), torch.where(both, columns[1], (upper - lower) * 0.5)
    out = (part.sum(2).reshape(grad_mid.shape).contiguous(memory_format=order) for part in kept)
    return (*out,)  # type: ignore[return-value]


def interval_matmul(a_mid: Tensor, a_rad: Tensor, b_mid: Tensor, b_rad: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """Matrix product of two boxes: ``exact`` sums the exact range of every product of two entries, else Rump's form.

    Shapes: a_mid, a_rad [m, k] and b_mid, b_rad [k, n], or [B, m, k] and [B, k, n]; returns mid, rad [(B,) m, n].
    One floating dtype and device. Radii must be ≥ 0. Raises ValueError if shapes, dtypes or devices disagree.

    Of a ± r and b ± s, with u = |a|, v = |b|, q = min(v, s), w = max(v, s), and δ = min(u·s, r·v, r·s) = min(u·s, r·q):

        Rump    mid = a·b                        rad = u·s + r·(v + s)
        exact   mid = a·b + sign(a)·sign(b)·δ    rad = u·s + r·(v + s) − δ = max(u·s, r·q) + r·w

    (for a, b ≥ 0 the greatest product is (u + r)(v + s) and the least u·v − T + 2δ with T = u·s + r·v + r·s; the other
    signs follow by symmetry). The radius is a sum of non-negative terms: nothing cancels, and it is never negative.
    Where a does not straddle 0 (u ≥ r in all entries), δ = r·q: matrix products suffice, and likewise for b. A factor
    without radius gives Rump's result to the last bit.

    A-priori error. Let E = (|a| + r)·(|b| + s), the product of the magnitudes, in real arithmetic, ϵ the unit roundoff,
    η the smallest positive number, γ_j = jϵ/(1 − jϵ). Without overflow or flush-to-zero, for every backend and order,

        |mid' − mid| ≤ γ_{2k+2} M + 2kη,    |rad' − rad| ≤ γ_{2k+2} R + 2kη,    M + R = E,

    with M = Σ(u·v + δ) and R = Σ(u·s + r·v + r·s − δ), with 0 for δ in Rump's form: γ_{2k+2} E + 4kη covers both errors
    together. For each result is a sum of at most 2k products of factors that are not rounded (q and w are selections)
    or once (v + s), so each product meets at most 1 + 1 + (2k − 1) + 1 roundings: of its factor, its own, of the sums
    in any order, of the join of two partial sums. The lesser and the greater of two values with relative errors of at
    most ϵ have one of at most ϵ. Underflow errs in products alone, by at most η in each.

    Any entry that is NaN or infinite makes the midpoints or the radii that it takes part in NaN or infinite.
    Source: Rump, "Fast and parallel interval arithmetic", BIT 39 (1999); the exact form is derived above.
    """
    check_matmul(a_mid, a_rad, b_mid, b_rad)
    box = (a_mid, a_rad, b_mid, b_rad)
    if not exact:
        return a_mid @ b_mid, a_mid.abs() @ b_rad + a_rad @ (b_mid.abs() + b_rad)
    if capturing(a_mid):
        return _matmul_by_terms(*box)  # which is right for all, but slower for some
    return matmul_with_a_point(*box) or matmul_of_definite(*box) or _matmul_by_terms(*box)


def matmul_with_a_point(a_mid: Tensor, a_rad: Tensor, b_mid: Tensor, b_rad: Tensor) -> tuple[Tensor, Tensor] | None:
    """The exact product where one factor has no radius at all; None otherwise."""
    if not b_rad.any():
        return a_mid @ b_mid, a_rad @ b_mid.abs()
    if not a_rad.any():
        return a_mid @ b_mid, a_mid.abs() @ b_rad
    return None


def matmul_of_definite(a_mid: Tensor, a_rad: Tensor, b_mid: Tensor, b_rad: Tensor) -> tuple[Tensor, Tensor] | None:
    """The exact product by four matrix products where no entry of one factor straddles 0; None otherwise."""
    if (a_rad > a_mid.abs()).any():
        if (b_rad > b_mid.abs()).any():
            return None
        mid, rad = _matmul_of_definite_a(b_mid.mT, b_rad.mT, a_mid.mT, a_rad.mT)
        return mid.mT.contiguous(), rad.mT.contiguous()
    return _matmul_of_definite_a(a_mid, a_rad, b_mid, b_rad)


def _matmul_of_definite_a(a: Tensor, r: Tensor, b: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    v = b.abs()
    mid = a @ b + r.copysign(a) @ torch.minimum(v, s).copysign(b)
    return mid, a.abs() @ s + r @ torch.maximum(v, s)


def _matmul_by_terms(a: Tensor, r: Tensor, b: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    v = b.abs()
    signed_s, q = s.copysign(b), torch.minimum(v, s)
    mid, rad = a @ b, r @ torch.maximum(v, s)
    for k in _terms(a, b):
        us = a[..., k, None] * signed_s[..., None, k, :]
        rq = r[..., k, None] * q[..., None, k, :]
        mid = mid + torch.minimum(us.abs(), rq).copysign(us).sum(-2)
        rad = rad + torch.maximum(us.abs(), rq).sum(-2)
    return mid, rad


def _terms(a: Tensor, b: Tensor) -> list[slice]:
    """Slices of k: as many terms at a time as make a temporary of a quarter million elements, but at least four."""
    step = max(4, 2**18 // max(1, a[..., 0].numel() * b.shape[-1])) if a.shape[-1] else 1
    return [slice(k, k + step) for k in range(0, a.shape[-1], step)]


def interval_matmul_backward(
    mid_grad: Tensor, rad_grad: Tensor, a_mid: Tensor, a_rad: Tensor, b_mid: Tensor, b_rad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the exact product in a_mid, a_rad, b_mid, b_rad, from those of its results.

    With g = mid_grad, h = rad_grad, t = sign(a)·sign(b)·g, and (e, f) = (t, h) for the pairs of which u·s is the least
    of u·s, r·v, r·s, else (h, t):

        sign(a)·∂a = Σ_j t·v + e·s        sign(b)·∂b = Σ_i t·u + (f if v < s else h)·r
        ∂r = Σ_j h·w + f·q                ∂s = Σ_i e·u + (h if v < s else f)·r

    At ties the product has kinks, and this is the derivative on one side: an entry that touches 0 or has no radius
    counts as not straddling 0, u·s = r·v goes to r·v, and a zero has the sign of its sign bit.
    """
    check_matmul(a_mid, a_rad, b_mid, b_rad)
    args = (mid_grad, rad_grad, a_mid, a_rad, b_mid, b_rad)
    if capturing(a_mid):
        return _matmul_by_terms_backward(*args)
    if not (a_rad > a_mid.abs()).any():
        return _matmul_of_definite_a_backward(*args)
    if not (b_rad > b_mid.abs()).any():
        b_and_a = _matmul_of_definite_a_backward(*(t.mT for t in (mid_grad, rad_grad, b_mid, b_rad, a_mid, a_rad)))
        b_grad, b_rad_grad, a_grad, a_rad_grad = (t.mT.contiguous() for t in b_and_a)
        return a_grad, a_rad_grad, b_grad, b_rad_grad
    return _matmul_by_terms_backward(*args)


def _matmul_of_definite_a_backward(
    g: Tensor, h: Tensor, a: Tensor, r: Tensor, b: Tensor, s: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    v, a_sign, b_sign = b.abs(), torch.ones_like(a).copysign(a), torch.ones_like(b).copysign(b)
    q_grad, w_grad = r.copysign(a).mT @ g, r.mT @ h
    return (
        g @ b.mT + a_sign * (h @ s.mT),
        a_sign * (g @ torch.minimum(v, s).copysign(b).mT) + h @ torch.maximum(v, s).mT,
        a.mT @ g + torch.where(v < s, q_grad, b_sign * w_grad),
        a.abs().mT @ h + torch.where(v < s, w_grad, b_sign * q_grad),
    )


def _matmul_by_terms_backward(
    g: Tensor, h: Tensor, a: Tensor, r: Tensor, b: Tensor, s: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (a, r, b, s)]
    g, h = g[..., None, :], h[..., None, :]
    for k in _terms(a, b):
        ak, rk = a[..., k, None], r[..., k, None]
        bk, sk = b[..., None, k, :], s[..., None, k, :]
        u, v = ak.abs(), bk.abs()
        a_sign, b_sign = torch.ones_like(ak).copysign(ak), torch.ones_like(bk).copysign(bk)
        q, w = torch.minimum(v, sk), torch.maximum(v, sk)
        t = g * (a_sign * b_sign)
        # Where b does not straddle 0, u·s < r·s is u < r, and is still right where s is 0.
        us_least = torch.where(v < sk, u * sk < rk * v, u < rk)
        e, f = torch.where(us_least, t, h), torch.where(us_least, h, t)
        grads[0][..., k] = (a_sign * (t * v + e * sk)).sum(-1)
        grads[1][..., k] = (h * w + f * q).sum(-1)
        grads[2][..., k, :] = (b_sign * (t * u + torch.where(v < sk, f, h) * rk)).sum(-3)
        grads[3][..., k, :] = (e * u + torch.where(v < sk, h, f) * rk).sum(-3)
    return grads[0], grads[1], grads[2], grads[3]


def check_matmul(a_mid: Tensor, a_rad: Tensor, b_mid: Tensor, b_rad: Tensor) -> None:
    """Raise ValueError unless the boxes can be multiplied as matrices."""
    a, b = a_mid.shape, b_mid.shape
    if a_rad.shape != a or b_rad.shape != b:
        raise ValueError(
            f"A midpoint and its radius must have one shape: {list(a)} and {list(a_rad.shape)} for a, "
            f"{list(b)} and {list(b_rad.shape)} for b."
        )
    if len(a) not in (2, 3) or len(a) != len(b) or a[:-2] != b[:-2] or a[-1] != b[-2]:
        raise ValueError(
            f"Boxes of shape {list(a)} and {list(b)} cannot be multiplied: give [m, k] and [k, n], or a batch of "
            "each, [B, m, k] and [B, k, n]."
        )
    for t in (a_rad, b_mid, b_rad):
        if t.dtype != a_mid.dtype or t.device != a_mid.device:
            raise ValueError(
                f"Midpoints and radii must agree in dtype and device: {a_mid.dtype} on {a_mid.device} and {t.dtype} on "
                f"{t.device}; convert one of them with .to(...)."
            )


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
    if tuple(weight.shape[2:]) == (1, 1) and not any(padding) and input.device.type == "cpu":
        # Only the pixels that count: with strides oneDNN (PyTorch 2.13, AVX2, channels-last) writes past its memory.
        down, across = stride
        input, stride = input[:, :, ::down, ::across], [1, 1]
    mask = [False, True, False]
    return aten.convolution_backward(grad, input, weight, None, stride, padding, dilation, False, [0, 0], groups, mask)[
        1
    ]


def _maybe_relu(mid: Tensor, rad: Tensor, relu: bool, rounding: int) -> tuple[Tensor, Tensor, Tensor]:
    if relu:
        return interval_relu(mid, rad, rounding)
    return mid, rad, mid.new_empty(0, dtype=torch.uint8)
