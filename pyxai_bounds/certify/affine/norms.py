"""Forms of norms: of a sample by what is left of their first order, and with running statistics, exactly."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pyxai_bounds.certify import lines
from pyxai_bounds.certify.affine.evaluator import Evaluator
from pyxai_bounds.certify.affine.form import Form, mapped, reshaped
from pyxai_bounds.certify.affine.functions import curved, powers
from pyxai_bounds.certify.affine.products import affine
from pyxai_bounds.certify.affine.registry import call_of, form_rule
from pyxai_bounds.interval import Interval
from pyxai_bounds.rules.registry import ends, in_float64, singleton
from pyxai_bounds.rules.standardise import Standardised, shaped

aten = torch.ops.aten

_NORMS = (aten.native_layer_norm.default, aten.native_group_norm.default)


@form_rule(*_NORMS)
def norm(run: Evaluator, n: fx.Node, result: Interval) -> Form | None:
    if n.args[1] != 0:
        return Form.box(in_float64(result))
    call = call_of(n)
    found = _standardised(run, call)
    if found is None:
        return None
    shape = run.env[call][0].shape
    first = 2 if call.target is aten.native_layer_norm.default else 1
    weight, bias = call.args[first : first + 2]
    return affine(run, reshaped(found[0], shape), weight, bias, _weight_shape(call, shape))


@form_rule(aten.native_layer_norm_backward.default, aten.native_group_norm_backward.default)
def norm_backward(run: Evaluator, n: fx.Node, result: Interval) -> Form | None:
    """(h - mean h - y·mean(h·y))/σ with h = g·w."""
    call = call_of(n)
    layer = call.target is aten.native_layer_norm_backward.default
    inverse = call.args[4] if layer else call.args[3]
    forward = inverse.args[0] if isinstance(inverse, fx.Node) and inverse.target is operator.getitem else None
    if n.args[1] != 0 or not isinstance(forward, fx.Node) or forward.target not in _NORMS or forward not in run.env:
        return None
    found = _standardised(run, forward)
    if found is None or inverse.args[1] != 2:
        return None
    normal, scale, box, known = found
    shape = run.env[call][0].shape
    weight = call.args[5] if layer else call.args[4]
    h = affine(run, run.operand(call.args[0]), weight, None, _weight_shape(call, shape))
    h = reshaped(h, normal.centre.shape)

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return _mean(a * b)

    along = run.symbols.bilinear(inner, h, normal, h.centre.shape[2], None, box)
    across = run.symbols.bilinear(torch.mul, normal, along, 1, box, symbols=False)
    return reshaped(run.symbols.product(_less_mean(h) - across, scale, None, known), shape)


def _standardised(run: Evaluator, call: fx.Node) -> tuple[Form, Form, Interval, Interval] | None:
    """N numbers standardised, M times for each sample, [rows, M, N]: y = d/√(v + eps) with d = x - mean and v the mean
    of d²; 1/√(v + eps); and what the rule knows of both.
    """
    if call not in run.normal:
        known = getattr(run.env[call][2], "state", None)
        if not isinstance(known, Standardised):
            return None
        box, scale = (shaped(t, [run.symbols.rows, -1, t.shape[1]]) for t in (known.value, known.inverse))
        x = reshaped(run.operand(call.args[0]), box.shape)
        eps = float(call.args[-1])  # type: ignore[arg-type]
        d = _less_mean(x)
        squares = run.symbols.lined(d, lines.power(powers(2.0), 2.0, *d.ends), symbols=False)
        offset = Form.box(singleton(torch.full_like(d.centre[..., :1], eps)))
        v = run.symbols.fresh(mapped(_mean, _mean, squares, terms=x.centre.shape[2]) + offset)
        least, most = ends(scale)
        lower, upper = v.ends
        lower = torch.fmax(lower, (1 - lines.LOSS) / most.square())
        upper = torch.where(least > 0, torch.fmin(upper, (1 + lines.LOSS) / least.square()), upper)
        inverse = curved(run.symbols, aten.rsqrt.default, v, lower, upper, scale)
        run.normal[call] = run.symbols.product(d, inverse, None, scale), inverse, box, scale
    return run.normal[call]


def _mean(t: Tensor) -> Tensor:
    return t.mean(2, keepdim=True)


def _less_mean(x: Form) -> Form:
    return x - mapped(_mean, _mean, x, terms=x.centre.shape[2])


def _weight_shape(call: fx.Node, shape: Sequence[int]) -> list[int]:
    """In which a norm's weight and bias spread over values of this shape."""
    if call.target in (aten.native_layer_norm.default, aten.native_layer_norm_backward.default):
        place = 1 if call.target is aten.native_layer_norm.default else 2
        return list(call.args[place])  # type: ignore[arg-type]
    return [1, -1] + [1] * (len(shape) - 2)


# --- batch norm with running statistics ------------------------------------------------------------------------------


@form_rule(aten.native_batch_norm.default)
def batch_norm(run: Evaluator, n: fx.Node, result: Interval) -> Form | None:
    call = call_of(n)
    _, weight, bias, mean, var, learns, _, eps = call.args
    if not _is_fixed(run, n, mean, var) or learns:
        return None
    x = run.forms[call.args[0]]
    x = x + Form.box(singleton(-_per_channel(run.value(mean), x)))
    return affine(run, _scaled(x, run.value(var), eps), weight, bias)


@form_rule(aten.native_batch_norm_backward.default)
def batch_norm_backward(run: Evaluator, n: fx.Node, result: Interval) -> Form | None:
    call = call_of(n)
    _, _, weight, mean, var, _, _, learns, eps, _ = call.args
    if not _is_fixed(run, n, mean, var) or learns:
        return None
    return affine(run, _scaled(run.forms[call.args[0]], run.value(var), eps), weight, None)


def _is_fixed(run: Evaluator, n: fx.Node, *statistics: Any) -> bool:
    """Are the statistics numbers, and is this the first result?"""
    return call_of(n).args[0] in run.forms and not any(map(run.is_set, statistics)) and bool(n.args[1] == 0)


def _per_channel(t: Tensor, x: Form) -> Tensor:
    return t.double().reshape(-1, *[1] * (x.centre.dim() - 2))


def _scaled(x: Form, var: Tensor, eps: float) -> Form:
    """Times 1/√(var + eps), per channel."""
    scale = (_per_channel(var, x) + eps).rsqrt()
    return mapped(lambda t: t * scale, lambda t: t * scale.abs(), x, terms=1)
