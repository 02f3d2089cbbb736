"""Smooth activations and their slopes: functions that are monotone between known critical points.

Each has a name and parameters, so that an operator can be told which it is. A slope is listed as a function of what
PyTorch's backward operator is given: the argument, or the output (sigmoid, tanh, ELU in place).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten


class Smooth(NamedTuple):
    """A function, its derivative, and its critical points as (point, value); a jump lists each one-sided limit."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    critical: list[tuple[float, float]]


def smooth(name: str, params: Sequence[float] = ()) -> Smooth:
    """The function of this name; ``params`` are beta, threshold of softplus, and alpha, scale, input_scale of ELU."""
    return _FUNCTIONS[name](*params)


def extremes(
    function: Callable[[Tensor], Tensor], lower: Tensor, upper: Tensor, critical: Sequence[tuple[float, float]]
) -> tuple[Tensor, Tensor, Tensor]:
    """The least and the greatest value between two ends, and the value at the lower one.

    A set of one element takes the function's own value there, whatever the limits.
    """
    at_lower, at_upper = function(lower), function(upper)
    least, greatest = torch.minimum(at_lower, at_upper), torch.maximum(at_lower, at_upper)
    for point, value in critical:
        inside = (lower <= point) & (point <= upper) & (lower < upper)
        least = torch.where(inside, least.clamp(max=value), least)
        greatest = torch.where(inside, greatest.clamp(min=value), greatest)
    return least, greatest, at_lower


def extremes_adjoint(
    function: Smooth, lower: Tensor, upper: Tensor, least_grad: Tensor, greatest_grad: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of ``extremes`` in both ends: to the end that was taken, halved where both give the same."""
    at_lower, at_upper = function.value(lower), function.value(upper)
    least, greatest = torch.minimum(at_lower, at_upper), torch.maximum(at_lower, at_upper)
    for point, value in function.critical:
        inside = (lower <= point) & (point <= upper) & (lower < upper)
        least_grad = torch.where(inside & (least > value), 0.0, least_grad)
        greatest_grad = torch.where(inside & (greatest < value), 0.0, greatest_grad)
    rises, equal = at_lower < at_upper, at_lower == at_upper
    mean = (least_grad + greatest_grad) * 0.5
    to_lower = torch.where(equal, mean, torch.where(rises, least_grad, greatest_grad))
    to_upper = torch.where(equal, mean, torch.where(rises, greatest_grad, least_grad))
    return to_lower * function.slope(lower), to_upper * function.slope(upper)


# --- the functions ------------------------------------------------------------------------------------------


def root(function: Callable[[float], float], a: float, b: float) -> float:
    """The zero of a function that changes sign on [a, b], by bisection to the last bit."""
    negative_left = function(a) < 0
    while a < (middle := (a + b) / 2) < b:
        a, b = (middle, b) if (function(middle) < 0) == negative_left else (a, middle)
    return a


_SQRT2 = math.sqrt(2)
_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)


def _gelu_slope_value(x: float) -> float:
    return 0.5 * (1 + math.erf(x / _SQRT2)) + x * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _gelu_slope(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / _SQRT2)) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gelu_bend(x: Tensor) -> Tensor:
    return (2 - x * x) * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gelu_tanh_slope_value(x: float) -> float:
    inner = math.tanh(_SQRT_2_OVER_PI * (x + 0.044715 * x**3))
    return 0.5 * (1 + inner) + 0.5 * x * (1 - inner**2) * _SQRT_2_OVER_PI * (1 + 3 * 0.044715 * x * x)


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    inner = torch.tanh(_SQRT_2_OVER_PI * (x + 0.044715 * x * x * x))
    return 0.5 * (1 + inner) + 0.5 * x * (1 - inner * inner) * _SQRT_2_OVER_PI * (1 + 3 * 0.044715 * x * x)


def _gelu_tanh_bend(x: Tensor) -> Tensor:
    inner = torch.tanh(_SQRT_2_OVER_PI * (x + 0.044715 * x * x * x))
    rise = _SQRT_2_OVER_PI * (1 + 3 * 0.044715 * x * x)
    return (1 - inner * inner) * (rise + x * (3 * 0.044715 * _SQRT_2_OVER_PI * x - inner * rise * rise))


def _gelu_tanh_curvature(x: float, h: float = 1e-4) -> float:
    return _gelu_tanh_slope_value(x + h) - _gelu_tanh_slope_value(x - h)


# GELU falls to one minimum left of 0 and rises from there; its slope has extrema at ±√2 (φ″ = (2 − x²)·density).
_GELU_MINIMUM = root(_gelu_slope_value, -1.0, -0.5)
_GELU_LEAST = 0.5 * _GELU_MINIMUM * (1 + math.erf(_GELU_MINIMUM / _SQRT2))
_GELU_TANH_MINIMUM = root(_gelu_tanh_slope_value, -1.0, -0.5)
_GELU_TANH_LEAST = (
    0.5
    * _GELU_TANH_MINIMUM
    * (1 + math.tanh(_SQRT_2_OVER_PI * (_GELU_TANH_MINIMUM + 0.044715 * _GELU_TANH_MINIMUM**3)))
)
# The approximation's slope flattens out where tanh saturates; its further bends lie below rounding error.
_GELU_TANH_BEND = root(_gelu_tanh_curvature, 1.0, 2.0)


def _silu_slope_value(x: float) -> float:
    s = 1 / (1 + math.exp(-x))
    return s * (1 + x * (1 - s))


def _silu_curvature(x: float) -> float:
    """The sign of SiLU″ = s(1 − s)(2 + x(1 − 2s))."""
    return 2 + x * (1 - 2 / (1 + math.exp(-x)))


_SILU_MINIMUM = root(_silu_slope_value, -2.0, -1.0)
_SILU_LEAST = _SILU_MINIMUM / (1 + math.exp(-_SILU_MINIMUM))
_SILU_BEND = root(_silu_curvature, 2.0, 3.0)


def _silu_slope(t: Tensor) -> Tensor:
    s = torch.sigmoid(t)
    return s * (1 + t * (1 - s))


def _silu_bend(t: Tensor) -> Tensor:
    s = torch.sigmoid(t)
    return s * (1 - s) * (2 + t * (1 - 2 * s))


def softplus_jump(beta: float, threshold: float) -> tuple[float, float]:
    """Where softplus becomes the identity, and the greater value that it had before."""
    return threshold / beta, (max(threshold, 0.0) + math.log1p(math.exp(-abs(threshold)))) / beta


def _softplus(beta: float, threshold: float) -> Smooth:
    jump, before = softplus_jump(beta, threshold)
    slope = _softplus_slope(beta, threshold).value
    return Smooth(lambda t: aten.softplus(t, beta, threshold), slope, [(jump, before), (jump, jump)])


def _softplus_slope(beta: float, threshold: float) -> Smooth:
    def slope(t: Tensor) -> Tensor:
        return torch.where(t * beta > threshold, 1.0, torch.sigmoid(t * beta))

    def bend(t: Tensor) -> Tensor:
        s = torch.sigmoid(t * beta)
        return torch.where(t * beta > threshold, 0.0, beta * s * (1 - s))

    return Smooth(slope, bend, [])


def _elu(alpha: float, scale: float, input_scale: float) -> Smooth:
    critical = [] if alpha * input_scale >= 0 and scale >= 0 else [(0.0, 0.0)]
    slope = _elu_slope(alpha, scale, input_scale).value
    return Smooth(lambda t: aten.elu(t, alpha, scale, input_scale), slope, critical)


def _elu_slope(alpha: float, scale: float, input_scale: float) -> Smooth:
    """It jumps after 0 from scale·alpha·input_scale to scale."""
    at_zero = alpha * scale * input_scale

    def slope(t: Tensor) -> Tensor:
        return torch.where(t > 0, scale, alpha * scale * input_scale * torch.exp(t * input_scale))

    def bend(t: Tensor) -> Tensor:
        return torch.where(t > 0, 0.0, at_zero * input_scale * torch.exp(t * input_scale))

    return Smooth(slope, bend, [(0.0, at_zero)])


def _elu_slope_of_output(alpha: float, scale: float, input_scale: float) -> Smooth:
    def slope(t: Tensor) -> Tensor:
        return torch.where(t > 0, scale, (t + alpha * scale) * input_scale)

    def bend(t: Tensor) -> Tensor:
        return torch.where(t > 0, 0.0, torch.full_like(t, input_scale))

    return Smooth(slope, bend, [(0.0, alpha * scale * input_scale)])


def _sigmoid_slope(t: Tensor) -> Tensor:
    s = torch.sigmoid(t)
    return s * (1 - s)


def _tanh_slope(t: Tensor) -> Tensor:
    y = torch.tanh(t)
    return 1 - y * y


_FUNCTIONS: dict[str, Callable[..., Smooth]] = {
    "sigmoid": lambda: Smooth(torch.sigmoid, _sigmoid_slope, []),
    "sigmoid_slope": lambda: Smooth(lambda y: y * (1 - y), lambda y: 1 - 2 * y, [(0.5, 0.25)]),
    "tanh": lambda: Smooth(torch.tanh, _tanh_slope, []),
    "tanh_slope": lambda: Smooth(lambda y: 1 - y * y, lambda y: -2 * y, [(0.0, 1.0)]),
    "gelu": lambda: Smooth(lambda t: aten.gelu(t, approximate="none"), _gelu_slope, [(_GELU_MINIMUM, _GELU_LEAST)]),
    "gelu_slope": lambda: Smooth(_gelu_slope, _gelu_bend, [(end, _gelu_slope_value(end)) for end in (-_SQRT2, _SQRT2)]),
    "gelu_tanh": lambda: Smooth(
        lambda t: aten.gelu(t, approximate="tanh"), _gelu_tanh_slope, [(_GELU_TANH_MINIMUM, _GELU_TANH_LEAST)]
    ),
    "gelu_tanh_slope": lambda: Smooth(
        _gelu_tanh_slope,
        _gelu_tanh_bend,
        [(end, _gelu_tanh_slope_value(end)) for end in (-_GELU_TANH_BEND, _GELU_TANH_BEND)],
    ),
    "silu": lambda: Smooth(aten.silu, _silu_slope, [(_SILU_MINIMUM, _SILU_LEAST)]),
    "silu_slope": lambda: Smooth(
        _silu_slope, _silu_bend, [(end, _silu_slope_value(end)) for end in (-_SILU_BEND, _SILU_BEND)]
    ),
    "softplus": _softplus,
    "softplus_slope": _softplus_slope,
    "elu": _elu,
    "elu_slope": _elu_slope,
    "elu_slope_of_output": _elu_slope_of_output,
}
