"""Forms of products and quotients of two sets: elementwise, of matrices, convolutions; of one set they are linear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pyxai_bounds.certify.affine.evaluator import Evaluator
from pyxai_bounds.certify.affine.form import Form, mapped, reshaped
from pyxai_bounds.certify.affine.functions import to_power
from pyxai_bounds.certify.affine.linear import linear
from pyxai_bounds.certify.affine.registry import call_of, form_rule
from pyxai_bounds.interval import Interval

aten = torch.ops.aten


@form_rule(aten.mul.Tensor, aten.mul.Scalar)
def multiplied(run: Evaluator, n: fx.Node, result: Interval) -> Form | None:
    if not all(run.is_set(arg) for arg in n.args):
        return linear(run, n, result)
    if n.args[0] is n.args[1]:
        return to_power(run.symbols, run.operand(n.args[0]), run.value(n.args[0]), 2.0, result)
    x, y = (run.operand(arg) for arg in n.args)
    return run.symbols.product(x, y, *(run.value(arg) for arg in n.args))


@form_rule(aten.div.Tensor, aten.div.Scalar)
def divided(run: Evaluator, n: fx.Node, result: Interval) -> Form | None:
    if not run.is_set(n.args[1]) or len(n.args) > 2 or n.kwargs:
        return linear(run, n, result)
    x, y = (run.operand(arg) for arg in n.args[:2])
    inverse = to_power(run.symbols, y, run.value(n.args[1]), -1.0, moves=n.args[1] in run.forms)
    return run.symbols.product(x, inverse, run.value(n.args[0]))


@form_rule(aten.mm.default, aten.bmm.default, aten.addmm.default)
def matrix_product(run: Evaluator, n: fx.Node, result: Interval) -> Form | None:
    """Of two sets, or with a bias that is one."""
    *bias, a, b = n.args
    if not (run.is_set(a) and run.is_set(b)) and not any(map(run.is_set, bias)):
        return linear(run, n, result)
    if n.kwargs:
        return None
    x, y = run.operand(a), run.operand(b)
    product: Any = torch.bmm if n.target is aten.bmm.default else torch.mm
    found = run.symbols.bilinear(product, x, y, x.centre.shape[-1], run.value(a), run.value(b))
    return run.symbols.fresh(found + run.operand(bias[0])) if bias else found


@form_rule(aten.convolution.default)
def convolution(run: Evaluator, n: fx.Node, result: Interval) -> Form | None:
    if not run.is_set(n.args[1]) and not run.is_set(n.args[2]):
        return linear(run, n, result)
    x, weight, options = run.operand(n.args[0]), run.operand(n.args[1]), n.args[3:]

    def product(a: Tensor, b: Tensor) -> Tensor:
        return aten.convolution.default(a, b, None, *options)

    terms = weight.centre.numel()
    found = run.symbols.bilinear(product, x, weight, terms, *(run.value(arg) for arg in n.args[:2]))
    return affine(run, found, None, n.args[2])


@form_rule(aten.convolution_backward.default)
def convolution_backward(run: Evaluator, n: fx.Node, result: Interval) -> Form | None:
    """The gradient of the input."""
    call = call_of(n)
    if n.args[1] != 0 or call.args[0] not in run.forms:
        return None
    grad, weight = run.forms[call.args[0]], run.value(call.args[2])
    nothing, options = torch.empty(1, dtype=torch.float64, device=grad.centre.device), call.args[4:10]
    shape, mask = result.shape, [True, False, False]

    def product(grad: Tensor, weight: Tensor) -> Tensor:
        return aten.convolution_backward.default(grad, nothing.expand(shape), weight, None, *options, mask)[0]

    if isinstance(weight, Interval):
        moving = run.operand(call.args[2])
        terms = moving.centre.numel()
        return run.symbols.bilinear(product, grad, moving, terms, run.value(call.args[0]), weight)
    weight = weight.double()
    size = weight.abs()
    terms = grad.centre.numel() // run.symbols.rows
    return mapped(lambda t: product(t, weight), lambda t: product(t, size), grad, terms=terms)


def affine(run: Evaluator, x: Form, weight: Any, bias: Any, shape: Sequence[int] | None = None) -> Form:
    """Times a weight, plus a bias, of these shapes, by default per channel."""
    shape = shape or [-1] + [1] * (x.centre.dim() - 2)
    weight, bias = (None if t is None else reshaped(run.operand(t), shape) for t in (weight, bias))
    if weight is not None:
        x = run.symbols.product(x, weight)
    return x if bias is None else run.symbols.fresh(x + bias)
