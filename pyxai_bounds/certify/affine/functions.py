"""Forms of functions of one number, by a line beside each, and of gradients times their derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pyxai_bounds.certify import lines
from pyxai_bounds.certify.affine.evaluator import Evaluator
from pyxai_bounds.certify.affine.form import Form, common_ends, narrower
from pyxai_bounds.certify.affine.registry import form_rule
from pyxai_bounds.certify.affine.symbols import Symbols
from pyxai_bounds.interpreter import applied
from pyxai_bounds.interval import Interval
from pyxai_bounds.ops.smooth import root
from pyxai_bounds.rules import RULES
from pyxai_bounds.rules.registry import in_float64, range_of, singleton

aten = torch.ops.aten


# --- functions with a line beside them -------------------------------------------------------------------------------


@form_rule(aten.relu.default, aten.leaky_relu.default, aten.abs.default)
def rectified(run: Evaluator, n: fx.Node, result: Interval) -> Form | None:
    """Leaky ReLUs, and |x|, which is -x below 0."""
    below = {aten.relu.default: 0.0, aten.abs.default: -1.0}.get(n.target)  # type: ignore[call-overload]
    if below is None:
        below = float(n.args[1]) if len(n.args) > 1 else 0.01  # type: ignore[arg-type]
    if not -1 <= below < 1:
        return None
    return run.symbols.lined(run.operand(n.args[0]), lines.rectified(*run.ends(n.args[0]), below))


_ENDLESS = {"min": -math.inf, "max": math.inf}


@form_rule(aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)
def clamped(run: Evaluator, n: fx.Node, result: Interval) -> Form | None:
    names = [argument.name.removesuffix("_val") for argument in n.target._schema.arguments]  # type: ignore[union-attr]
    usual = {"min": -1.0, "max": 1.0} if n.target is aten.hardtanh.default else {}
    given: dict[str, Any] = usual | dict(zip(names, n.args, strict=False)) | n.kwargs
    low, high = (default if given.get(end) is None else float(given[end]) for end, default in _ENDLESS.items())
    if not low < high:
        return None
    x = run.operand(n.args[0])
    return run.symbols.lined(x, lines.clamped(low, high, *run.ends(n.args[0])), result)


@form_rule(aten.elu.default, aten.softplus.default)
def convex(run: Evaluator, n: fx.Node, result: Interval) -> Form | None:
    """ELUs that are steepest above 0, and softplus, as far as PyTorch does not take x in its place."""
    x, given = run.operand(n.args[0]), [float(t) for t in n.args[1:]]  # type: ignore[arg-type]
    lower, upper = run.ends(n.args[0])
    at_points = run.at_points(n)
    if n.target is aten.softplus.default:
        beta, threshold = (*given, *(1.0, 20.0)[len(given) :])
        f = lines.Function(at_points, lambda t: (beta * t).sigmoid(), lambda slope: slope.logit() / beta)
        line = lines.convex(f, lower, upper)
        slope = torch.where(beta * upper < 0.99 * threshold, line.slope, torch.nan)
        return run.symbols.lined(x, lines.Line(slope, line.least, line.most), result) if beta > 0 else None
    alpha, scale, inner = (*given, *(1.0, 1.0, 1.0)[len(given) :])
    steep = alpha * inner
    if not (scale > 0 and inner > 0 and 0 < steep <= 1 + lines.LOSS / 16):
        return None

    def slope_at(t: Tensor) -> Tensor:
        return scale * torch.where(t < 0, steep * (inner * t).exp(), 1.0)

    f = lines.Function(at_points, slope_at, lambda slope: (slope / (scale * steep)).log() / inner)
    return run.symbols.lined(x, lines.convex(f, lower, upper), result)


def _logit(slope: Tensor) -> Tensor:
    """Where sigmoid has this slope."""
    return torch.logit((1 + (1 - 4 * slope).sqrt()) / 2)


# The kind of the line, the derivative without cancellation, and where that is a slope.
SHAPES: dict[Any, tuple[Any, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor] | None]] = {
    aten.exp.default: (lines.convex, torch.exp, torch.log),
    aten.log.default: (lines.concave, torch.reciprocal, torch.reciprocal),
    aten.sqrt.default: (lines.concave, lambda t: 0.5 / t.sqrt(), lambda slope: 0.25 / slope.square()),
    aten.rsqrt.default: (lines.convex, lambda t: -0.5 * t.rsqrt() / t, lambda slope: (-2 * slope).pow(-2 / 3)),
    aten.sigmoid.default: (lines.sigmoidal, lambda t: t.sigmoid() * (-t).sigmoid(), _logit),
    aten.tanh.default: (
        lines.sigmoidal,
        lambda t: 4 * (2 * t).sigmoid() * (-2 * t).sigmoid(),
        lambda slope: (1 - slope).sqrt().atanh(),
    ),
}


@form_rule(*SHAPES)
def function(run: Evaluator, n: fx.Node, result: Interval) -> Form:
    """One that is convex, concave, or shaped like an S."""
    x = run.operand(n.args[0])
    return curved(run.symbols, n.target, x, *run.ends(n.args[0]), result)


def curved(symbols: Symbols, op: Any, x: Form, lower: Tensor, upper: Tensor, known: Interval | None) -> Form:
    """One of ``SHAPES``, of a form between these ends."""
    shape, derivative, touch = SHAPES[op]
    f = lines.Function(lambda t: RULES[op].function(singleton(t)), derivative, touch)
    return symbols.lined(x, shape(f, lower, upper), known)


def exponential(symbols: Symbols, x: Form, box: Any, known: Interval | None = None) -> Form:
    return curved(symbols, aten.exp.default, x, *common_ends(x, box), known)


@form_rule(aten.pow.Tensor_Scalar)
def power(run: Evaluator, n: fx.Node, result: Interval) -> Form:
    x, exponent = run.operand(n.args[0]), float(n.args[1])  # type: ignore[arg-type]
    return to_power(run.symbols, x, run.value(n.args[0]), exponent, result)


def to_power(
    symbols: Symbols, x: Form, box: Any, exponent: float, known: Interval | None = None, moves: bool = True
) -> Form:
    """``moves``: what does not may be the same for all rows, and gets no symbols."""
    return symbols.lined(x, lines.power(powers(exponent), exponent, *common_ends(x, box)), known, symbols=moves)


def powers(exponent: float) -> lines.Function:
    value = RULES[aten.pow.Tensor_Scalar].function
    return lines.Function(
        lambda t: value(singleton(t), exponent),
        lambda t: exponent * t.pow(exponent - 1),
        lambda slope: (slope / exponent).pow(1 / (exponent - 1)) if exponent != 1 else slope,
    )


# --- functions by the mean value theorem, and derivatives times a gradient -------------------------------------------

# Elementwise functions, and the operator that multiplies a gradient by their derivatives.
_DERIVATIVE: dict[Any, Any] = {
    aten.gelu.default: aten.gelu_backward.default,
    aten.silu.default: aten.silu_backward.default,
}


def by_mean_value(symbols: Symbols, x: Form, box: Interval, at_mid: Interval, slopes: Interval) -> Form:
    """g(x) lies in g(m) + D·(x - m), D the derivative over the box, m its midpoint."""
    mid = box.mid.double()
    distance = Interval.of(torch.zeros_like(mid), box.rad.double())
    return symbols.product(x + Form.box(singleton(-mid)), Form.box(slopes), distance) + Form.box(at_mid)


@form_rule(*_DERIVATIVE)
def smooth(run: Evaluator, n: fx.Node, result: Interval) -> Form | None:
    args, kwargs = run.fetch_args_kwargs_from_env(n)
    box = in_float64(args[0])
    derivative = RULES[_DERIVATIVE[n.target]].function
    slopes = derivative(singleton(torch.ones_like(box.mid)), box, *args[1:], **kwargs)
    return by_mean_value(run.symbols, run.operand(n.args[0]), box, run.at_points(n)(box.mid), slopes)


def _gelu_curvature(t: Tensor) -> Tensor:
    return torch.exp(-t.square() / 2) * (2 - t.square()) / math.sqrt(2 * math.pi)


def _silu_curvature(t: Tensor) -> Tensor:
    s, rest = t.sigmoid(), (-t).sigmoid()
    return s * rest * (2 + t * (rest - s))


def _silu_third(t: float) -> float:
    s, rest = 1 / (1 + math.exp(-t)), 1 / (1 + math.exp(t))
    return 3 * (rest - s) + t * (1 - 6 * s * rest)


_LAST = root(_silu_third, 2.0, 4.0)


def _curvature(function: Callable[[Tensor], Tensor], extrema: Sequence[float]) -> Callable[[Interval], Interval]:
    values = [(at, float(function(torch.tensor(at, dtype=torch.float64)))) for at in extrema]
    return lambda x: range_of(function, x, values, ulps=64, absolute=64)


# By how much these derivatives change: φ(x)(2 - x²), and σ′(2 + x(1 - 2σ)), with all their extrema.
_CURVATURES: dict[Any, Callable[[Interval], Interval]] = {
    aten.gelu_backward.default: _curvature(_gelu_curvature, (-2.0, 0.0, 2.0)),
    aten.silu_backward.default: _curvature(_silu_curvature, (-_LAST, 0.0, _LAST)),
}


@form_rule(
    *(aten.threshold_backward.default, aten.leaky_relu_backward.default, aten.elu_backward.default),
    aten.hardtanh_backward.default,
    unread=(1,),
)
def gated(run: Evaluator, n: fx.Node, result: Interval) -> Form:
    """A derivative that leaps, times the gradient, its first argument: the derivative is what it makes of 1."""
    args, slopes = _derivative_of(run, n)
    return run.symbols.product(run.operand(n.args[0]), Form.box(slopes), args[0], slopes)


@form_rule(
    *(aten.softplus_backward.default, aten.tanh_backward.default, aten.sigmoid_backward.default),
    *_DERIVATIVE.values(),
)
def derivative(run: Evaluator, n: fx.Node, result: Interval) -> Form:
    """A continuous one."""
    args, slopes = _derivative_of(run, n)
    slope = _slope(run, n, slopes) if n.args[1] in run.forms else Form.box(slopes)
    return run.symbols.product(run.operand(n.args[0]), slope, args[0], slopes)


def _derivative_of(run: Evaluator, n: fx.Node) -> tuple[tuple[Any, ...], Interval]:
    """The arguments, and the bounds of the derivative."""
    args, kwargs = run.fetch_args_kwargs_from_env(n)
    given = args[0].mid if isinstance(args[0], Interval) else args[0]
    return args, applied(RULES[n.target], n, (singleton(torch.ones_like(given)), *args[1:]), kwargs)  # type: ignore[index]


def _slope(run: Evaluator, n: fx.Node, box: Interval) -> Form:
    """A derivative by that of the derivative; as its box where that says more."""
    x, known = run.operand(n.args[1]), run.value(n.args[1])
    if n.target in (aten.tanh_backward.default, aten.sigmoid_backward.default):
        is_tanh = n.target is aten.tanh_backward.default
        first = Form.box(singleton(torch.ones_like(x.centre))) if is_tanh else x
        found = first - to_power(run.symbols, x, known, 2.0)
    elif n.target is aten.softplus_backward.default and n.args[2] == 1:
        upper = common_ends(x, known)[1]
        found = curved(run.symbols, aten.sigmoid.default, x, *common_ends(x, known), None)
        return narrower(found, box, torch.where(upper < 0.99 * float(n.args[3]), 2.0, 0.0))  # type: ignore[arg-type]
    elif n.target in _CURVATURES and not n.kwargs:
        mid = known.mid.double()
        at_mid = RULES[n.target].function(singleton(torch.ones_like(mid)), singleton(mid))  # type: ignore[index]
        found = by_mean_value(run.symbols, x, known, at_mid, _CURVATURES[n.target](in_float64(known)))
    else:
        return Form.box(box)
    return narrower(found, box, 2.0)
