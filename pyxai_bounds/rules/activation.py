"""Activations and their backward sides: the range of φ, and the gradient times the range of φ′."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyxai_bounds import ops
from pyxai_bounds import rounding as rd
from pyxai_bounds.interval import Interval
from pyxai_bounds.ops.layout import pack
from pyxai_bounds.ops.smooth import root, smooth, softplus_jump
from pyxai_bounds.rules.elementwise import clamp, clamp_max
from pyxai_bounds.rules.logic import gt, where
from pyxai_bounds.rules.registry import (
    Value,
    as_set,
    between,
    enclose,
    ends,
    evaluated,
    filled,
    mid_of,
    monotone,
    multiply,
    outward,
    plus,
    rad_of,
    range_of,
    rule,
    singleton,
)

aten = torch.ops.aten


# --- ReLU ---------------------------------------------------------------------------------------------------


@rule(aten.relu.default, precision="exact")
def relu(x: Interval) -> Interval:
    mid, rad, state = ops.interval_relu(x.mid, x.rad, int(rd.mode()))
    return Interval.of(mid, rad, state=state)


@rule(aten.threshold_backward.default, precision="exact")
def relu_backward(grad: Value, output: Value, threshold: float) -> Interval:
    """``output`` is ReLU's; its ends have the signs of the input's, so the state can be read off either."""
    if not isinstance(output, Interval):
        return multiply(grad, ~(output <= threshold))  # 1 for a NaN, as in PyTorch
    if grad.shape != output.shape:  # under vmap one of them is shared by many samples
        shape = torch.broadcast_shapes(grad.shape, output.shape)
        output = Interval.of(output.mid.expand(shape), output.rad.expand(shape))
        grad = Interval.of(mid_of(grad).expand(shape), rad_of(grad).expand(shape))
    state = output.state
    if state is None or threshold != 0:
        (lower, upper), (least, greatest) = ends(output), ends(float(threshold))
        state = pack(lower > greatest, ~(upper <= least))
    mid, rad, _ = ops.interval_relu_backward(mid_of(grad), rad_of(grad), state, int(rd.mode()))
    return Interval.of(mid, rad)


# --- other piecewise linear activations ---------------------------------------------------------------------


@rule(aten.leaky_relu.default, ulps=3)
def leaky_relu(x: Interval, negative_slope: float = 0.01) -> Interval:
    def function(t: Tensor) -> Tensor:
        return aten.leaky_relu(t, negative_slope)

    return range_of(function, x, [(0.0, 0.0)] if negative_slope < 0 else [], ulps=1)


@rule(aten.leaky_relu_backward.default, ulps=3)
def leaky_relu_backward(grad: Value, x: Value, negative_slope: float, self_is_result: bool) -> Interval:
    """φ′ is 1 above 0 and the slope at and below it."""
    lower, upper = ends(x)
    one = torch.ones_like(lower)
    at_lower = torch.where(lower > 0, one, negative_slope)
    at_upper = torch.where(upper <= 0, negative_slope, one)  # a NaN has the whole range
    if not isinstance(x, Interval):
        return multiply(grad, at_lower)
    return multiply(grad, between(torch.minimum(at_lower, at_upper), torch.maximum(at_lower, at_upper)))


@rule(aten._prelu_kernel.default, ulps=1)
def prelu(x: Value, weight: Value) -> Interval:
    """Below 0 the slope is ``weight``, of any sign; where that is a set, the two sides are summed: one of them is 0."""
    if isinstance(weight, Interval):
        x = as_set(x)
        return plus(relu(x), multiply(clamp_max(x, 0.0), weight))
    assert isinstance(x, Interval)
    return range_of(lambda t: aten._prelu_kernel(t, weight), x, [(0.0, 0.0)], ulps=1)


@rule(aten._prelu_kernel_backward.default, ulps=1)
def prelu_backward(grad: Value, x: Value, weight: Value) -> tuple[Interval, Interval]:
    """The slope is 1 above 0 and ``weight`` at and below it; the weight's gradient is grad·min(x, 0)."""
    (lower, upper), (least, greatest) = ends(x), ends(weight)
    above, below = lower > 0, upper <= 0  # a NaN is neither
    one = torch.ones_like(lower)
    slope = between(
        torch.where(above, one, torch.where(below, least, least.clamp(max=1))),
        torch.where(above, one, torch.where(below, greatest, greatest.clamp(min=1))),
    )
    of_weight = clamp_max(x, 0.0) if isinstance(x, Interval) else singleton(x.clamp(max=0))
    return multiply(grad, slope), multiply(grad, of_weight)


@rule(aten.hardtanh.default, ulps=1)
def hardtanh(x: Interval, min_val: float = -1, max_val: float = 1) -> Interval:
    return monotone(lambda t: aten.hardtanh(t, min_val, max_val), x, ulps=0)


@rule(aten.hardtanh_backward.default, ulps=0)
def hardtanh_backward(grad: Value, x: Value, min_val: float, max_val: float) -> Interval:
    """φ′ is 1 strictly between the corners and 0 elsewhere."""
    lower, upper = ends(x)
    (min_least, min_greatest), (max_least, max_greatest) = ends(float(min_val)), ends(float(max_val))
    must = (lower > min_greatest) & (upper < max_least)
    may = ~((upper <= min_least) | (lower >= max_greatest))  # true for a NaN
    if not isinstance(x, Interval) and not outward():
        return multiply(grad, may.to(lower.dtype))
    return multiply(grad, between(must.to(lower.dtype), may.to(lower.dtype)))


@rule(aten.threshold.default, precision="exact")
def threshold(x: Interval, threshold: float, value: float) -> Interval:
    """x above the threshold, ``value`` at and below it."""
    return where(gt(x, float(threshold)), clamp(x, float(threshold)), torch.full_like(x.mid, value))


@rule(aten.hardshrink.default, ulps=0)
def hardshrink(x: Interval, lambd: float = 0.5) -> Interval:
    """x outside of [−λ, λ], 0 inside: non-decreasing in x; in λ it falls above 0 and rises below."""
    return _shrunk(aten.hardshrink, x, lambd, ulps=0)


@rule(aten.softshrink.default, ulps=1)
def softshrink(x: Interval, lambd: float = 0.5) -> Interval:
    """x moved towards 0 by λ."""
    return _shrunk(aten.softshrink, x, lambd, ulps=1)


def _shrunk(function: Callable[[Tensor, float], Tensor], x: Interval, lambd: float, ulps: float) -> Interval:
    lower, upper = ends(x)
    values = [
        [torch.where(end.isnan(), end, function(end, bound)) for bound in ends(float(lambd))] for end in (lower, upper)
    ]
    least, greatest = torch.minimum(*values[0]), torch.maximum(*values[1])
    if not ulps:
        return between(least, greatest)
    return filled(enclose(least, greatest, ulps), (least == 0) & (greatest == 0))


@rule(aten.hardshrink_backward.default, aten.softshrink_backward.default, ulps=0)
def shrink_backward(grad: Value, x: Value, lambd: float) -> Interval:
    """φ′ is 0 on [−λ, λ] and 1 outside."""
    (lower, upper), (least, greatest) = ends(x), ends(float(lambd))
    must = (lower > greatest) | (upper < -greatest)
    may = ~((lower >= -least) & (upper <= least))  # true for a NaN
    if not isinstance(x, Interval) and not outward():
        return multiply(grad, may.to(lower.dtype))
    return multiply(grad, between(must.to(lower.dtype), may.to(lower.dtype)))


@rule(aten.hardsigmoid.default, ulps=0)
def hardsigmoid(x: Interval) -> Interval:
    return evaluated(monotone(aten.hardsigmoid, x, ulps=_SIXTH_ULPS, absolute=8), 8, 8)


_SIXTH = float(torch.tensor(1 / 6, device="cpu"))  # PyTorch's kernel rounds 1/6 to float32 for every dtype:
_SIXTH_ULPS = 2.0**30  # so that in float64 it loses half a unit of float32, as every operator does that uses it


@rule(aten.hardsigmoid_backward.default, ulps=4)
def hardsigmoid_backward(grad: Value, x: Value) -> Interval:
    """φ′ is 1/6 strictly between −3 and 3 and 0 elsewhere."""

    def slope(t: Tensor) -> Tensor:
        t = t.detach()  # piecewise constant; PyTorch has no derivative of its kernel
        return torch.where(t.isnan(), t, aten.hardsigmoid_backward(torch.ones_like(t), t))

    jumps = [(-3.0, 0.0), (-3.0, _SIXTH), (3.0, _SIXTH), (3.0, 0.0)]
    return _times_slope(grad, x, slope, jumps, ulps=_SIXTH_ULPS)


@rule(aten.hardswish.default, ulps=0)
def hardswish(x: Interval) -> Interval:
    return evaluated(range_of(aten.hardswish, x, [(-1.5, -0.375)], ulps=_SIXTH_ULPS, absolute=16), 8, 16)


@rule(aten.hardswish_backward.default, ulps=4)
def hardswish_backward(grad: Value, x: Value) -> Interval:
    """φ′ jumps at −3 from 0 to −1/2, rises to 3/2, and jumps at 3 to 1."""

    def slope(t: Tensor) -> Tensor:
        x = t.detach()  # PyTorch has no derivative of its kernel, which is 1/3 between the jumps
        value = torch.where(x.isnan(), x, aten.hardswish_backward(torch.ones_like(x), x))
        return value + torch.where(x.abs() < 3, (t - x) / 3, 0.0)

    jumps = [(-3.0, 0.0), (-3.0, -0.5), (3.0, 1.5), (3.0, 1.0)]
    return _times_slope(grad, x, slope, jumps, ulps=_SIXTH_ULPS, absolute=8)


# --- smooth activations: monotone between known critical points, which ops/smooth.py knows -------------------


def _range(
    x: Interval, name: str, *params: float, ulps: float, absolute: float = 0.0, increasing: bool = False
) -> Interval:
    """The range of a function of ``ops/smooth.py``; errors as in ``range_of``."""
    if not outward() and ops.has_kernels(x.mid):
        return Interval.of(*ops.interval_smooth(x.mid, x.rad, name, params))
    function = smooth(name, params)
    if increasing:
        return monotone(function.value, x, ulps=ulps, absolute=absolute)
    return range_of(function.value, x, function.critical, ulps=ulps, absolute=absolute)


@rule(aten.tanh.default, ulps=4)
def tanh(x: Interval) -> Interval:
    return _range(x, "tanh", ulps=4, increasing=True)


@rule(aten.tanh_backward.default, ulps=2)
def tanh_backward(grad: Value, output: Value) -> Interval:
    """1 − y² loses 2u where it cancels."""
    return _times(grad, output, "tanh_slope", ulps=2, absolute=4)


@rule(aten.sigmoid.default, ulps=8)
def sigmoid(x: Interval) -> Interval:
    """1/(1 + exp(−x)): three functions of 4u at most, none of which cancels."""
    return _range(x, "sigmoid", ulps=8, increasing=True)


@rule(aten.sigmoid_backward.default, ulps=2)
def sigmoid_backward(grad: Value, output: Value) -> Interval:
    """y(1 − y) loses 2u where it cancels."""
    return _times(grad, output, "sigmoid_slope", ulps=4, absolute=4)


@rule(aten.log_sigmoid_forward.default, ulps=8)
def log_sigmoid(x: Interval) -> tuple[Interval, Tensor]:
    """min(x, 0) − log1p(exp(−|x|)): two functions of 4u at most, and a sum of two numbers of one sign."""
    unused = x.mid.new_empty(0)
    return monotone(F.logsigmoid, x, ulps=16), unused


@rule(aten.log_sigmoid_backward.default, shape_only=("buffer",), ulps=2)
def log_sigmoid_backward(grad: Value, x: Value, buffer: Tensor) -> Interval:
    """φ′ is the logistic function of −x."""
    return _times_slope(grad, x, lambda t: torch.sigmoid(-t), [], ulps=8)


@rule(aten.glu.default, ulps=8)
def glu(x: Interval, dim: int = -1) -> Interval:
    """One half of the channels times the logistic function of the other."""
    a, b = _halves(x, dim)
    return multiply(a, sigmoid(b))


@rule(aten.glu_backward.default, ulps=4)
def glu_backward(grad: Value, x: Value, dim: int) -> Interval:
    """grad·σ(b), and grad·a·σ′(b)."""
    a, b = _halves(as_set(x), dim)
    s = evaluated(sigmoid(b), 8)
    slope = _times_slope(a, s, lambda y: y * (1 - y), [(0.5, 0.25)], ulps=4, absolute=4)
    parts = multiply(grad, s), multiply(grad, slope)
    return Interval.of(torch.cat([p.mid for p in parts], dim), torch.cat([p.rad for p in parts], dim))


def _halves(x: Interval, dim: int) -> list[Interval]:
    return [Interval.of(*half) for half in zip(x.mid.chunk(2, dim), x.rad.chunk(2, dim), strict=True)]


@rule(aten.softplus.default, ulps=0)
def softplus(x: Interval, beta: float = 1, threshold: float = 20) -> Interval:
    """Increasing, but for a jump where it becomes the identity, which lies lower.

    The product beta·x is rounded before exp, which costs |beta·x| u, at most 104 u in float32 and 745 u in float64
    before exp underflows. Whether a value that close lies before or behind the jump is not known: its height is added.
    """
    jump, before = softplus_jump(beta, threshold)
    height = abs(before - jump)
    out = _range(x, "softplus", beta, threshold, ulps=1024, absolute=2 * height / rd.unit(x.dtype))
    return evaluated(out, 128, 2 * height / rd.unit(torch.float32))


@rule(aten.softplus_backward.default, ulps=2)
def softplus_backward(grad: Value, x: Value, beta: float, threshold: float) -> Interval:
    """The slope jumps to 1 by the logistic function's value at −threshold; its argument is rounded, as in the forward
    pass.
    """
    height = 2 / (1 + math.exp(min(threshold, 700.0)))
    return _times(grad, x, "softplus_slope", beta, threshold, ulps=1024, height=height)


@rule(aten.celu.default, ulps=0)
def celu(x: Interval, alpha: float = 1) -> Interval:
    return elu(x, alpha, 1, 1 / alpha)


@rule(aten.elu.default, ulps=0)
def elu(x: Interval, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Interval:
    absolute = 8 * abs(alpha * scale)  # what exp(t) − 1 may lose
    out = _range(x, "elu", alpha, scale, input_scale, ulps=16, absolute=absolute)
    return evaluated(out, 16, absolute)


@rule(aten.elu_backward.default, ulps=2)
def elu_backward(grad: Value, alpha: float, scale: float, input_scale: float, is_result: bool, x: Value) -> Interval:
    """With ``is_result`` the slope is read off φ as scale·α + y."""
    name = "elu_slope_of_output" if is_result else "elu_slope"
    absolute = 8 * abs(alpha * scale) * (1 + abs(input_scale))
    return _times(grad, x, name, alpha, scale, input_scale, ulps=16, absolute=absolute)


# What GELU, SiLU and their slopes lose: a few u of themselves, and of 1 + |x| where the Gaussian or logistic function
# has not yet saturated (|x| < 9 or 20 in float32, 40 in float64); where it has, it is 0 or 1 exactly and so is the
# truth, but for less than underflow. Their products x·φ cancel nowhere else.
_SMOOTH = 256.0


@rule(aten.gelu.default, ulps=0)
def gelu(x: Interval, *, approximate: str = "none") -> Interval:
    name = "gelu" if approximate == "none" else "gelu_tanh"
    return evaluated(_range(x, name, ulps=16, absolute=_SMOOTH), 16, _SMOOTH)


@rule(aten.gelu_backward.default, ulps=2)
def gelu_backward(grad: Value, x: Value, *, approximate: str = "none") -> Interval:
    name = "gelu_slope" if approximate == "none" else "gelu_tanh_slope"
    return _times(grad, x, name, ulps=16, absolute=_SMOOTH)


@rule(aten.silu.default, ulps=0)
def silu(x: Interval) -> Interval:
    return evaluated(_range(x, "silu", ulps=16, absolute=_SMOOTH), 16, _SMOOTH)


@rule(aten.silu_backward.default, ulps=2)
def silu_backward(grad: Value, x: Value) -> Interval:
    return _times(grad, x, "silu_slope", ulps=16, absolute=_SMOOTH)


def _times(
    grad: Value, x: Value, name: str, *params: float, ulps: float, absolute: float = 0, height: float = 0
) -> Any:
    """The gradient times a slope of ``ops/smooth.py``; errors as in ``_times_slope``."""
    if not outward() and isinstance(x, Interval) and grad.shape == x.shape and ops.has_kernels(x.mid):
        return Interval.of(*ops.interval_smooth_backward(mid_of(grad), rad_of(grad), x.mid, x.rad, name, params))
    function = smooth(name, params)
    return _times_slope(grad, x, function.value, function.critical, ulps=ulps, absolute=absolute, height=height)


def _mish_slope_value(x: float) -> float:
    inner = math.tanh(math.log1p(math.exp(x)))
    return inner + x * (1 - inner * inner) / (1 + math.exp(-x))


def _mish_curvature(x: float, h: float = 1e-4) -> float:
    return _mish_slope_value(x + h) - _mish_slope_value(x - h)


_MISH_MINIMUM = root(_mish_slope_value, -1.5, -1.0)
_MISH_LEAST = _MISH_MINIMUM * math.tanh(math.log1p(math.exp(_MISH_MINIMUM)))


@rule(aten.mish.default, ulps=0)
def mish(x: Interval) -> Interval:
    """x·tanh(log(1 + exp x))."""
    return evaluated(range_of(aten.mish, x, [(_MISH_MINIMUM, _MISH_LEAST)], ulps=16, absolute=_SMOOTH), 16, _SMOOTH)


_MISH_BENDS = [(end, _mish_slope_value(end)) for end in (root(_mish_curvature, -3, -2), root(_mish_curvature, 1, 2))]


@rule(aten.mish_backward.default, ulps=2)
def mish_backward(grad: Value, x: Value) -> Interval:
    """φ′ = t + x(1 − t²)σ(x) with t = tanh(log(1 + exp x)), between its two extrema and flat beyond."""

    def slope(x: Tensor) -> Tensor:
        inner = torch.tanh(torch.log1p(torch.exp(x)))
        return inner + x * (1 - inner * inner) * torch.sigmoid(x)

    return _times_slope(grad, x, slope, _MISH_BENDS, ulps=16, absolute=_SMOOTH)


def _times_slope(
    grad: Value,
    x: Value,
    slope: Callable[[Tensor], Tensor],
    critical: list[tuple[float, float]],
    *,
    ulps: float,
    absolute: float = 0.0,
    height: float = 0.0,
) -> Interval:
    """The gradient times φ′, which is computed to within ``ulps`` u of itself plus ``absolute`` u plus ``height``."""
    if not outward():
        return multiply(grad, range_of(slope, x, critical, ulps=0) if isinstance(x, Interval) else slope(x))
    x = as_set(x)
    factor = range_of(slope, x, critical, ulps=ulps, absolute=absolute + height / rd.unit(x.dtype))
    float32 = rd.unit(torch.float32)
    return multiply(grad, evaluated(factor, min(ulps, 128), absolute + height / float32))
