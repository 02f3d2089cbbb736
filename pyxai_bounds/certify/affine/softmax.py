"""Forms of softmax and its logarithm, forward and backward, by what is left of their first order."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from pyxai_bounds.certify.affine.evaluator import Evaluator
from pyxai_bounds.certify.affine.form import Form, mapped, narrower, up
from pyxai_bounds.certify.affine.functions import exponential
from pyxai_bounds.certify.affine.registry import form_rule
from pyxai_bounds.interval import Interval
from pyxai_bounds.rules import RULES, facts
from pyxai_bounds.rules.registry import ends, in_float64, singleton

aten = torch.ops.aten


@form_rule(aten._log_softmax.default)
def log_softmax(run: Evaluator, n: fx.Node, result: Interval) -> Form | None:
    """log p(x) = log p(m) + y - R with y = z - Σ p(m)·z, z = x - m, and R half the variance of z under weights p at
    some point between m and x: log Σ exp is convex, and this its second derivative.
    """
    x, dim = run.operand(n.args[0]), int(n.args[1])  # type: ignore[arg-type]
    box = in_float64(run.value(n.args[0]))
    if n.meta["val"].dtype != n.args[0].meta["val"].dtype or not bool(box.isfinite().all()):  # type: ignore[union-attr]
        return None
    weights, at_mid = (
        RULES[op].function(singleton(box.mid), dim, False) for op in (aten._softmax.default, aten._log_softmax.default)
    )
    z = x + Form.box(singleton(-box.mid))

    def mean(t: Tensor) -> Tensor:
        return (t * weights.mid.abs()).sum(dim, keepdim=True)

    y = z - mapped(mean, mean, z)
    count = x.centre.shape[dim]
    size = torch.fmin(y.size, up(box.rad + mean(box.rad), count + 2))
    most = ends(RULES[aten._softmax.default].function(box, dim, False))[1]
    lower, upper = torch.fmax(y.ends[0], -size), torch.fmin(y.ends[1], size)
    spread = up(upper.amax(dim, keepdim=True) - lower.amin(dim, keepdim=True), 1)
    variance = torch.fmin(spread.square() / 4, (most * size.square()).sum(dim, keepdim=True))
    rest = up(variance / 2, count + 4)
    off = up((weights.rad * box.rad).sum(dim, keepdim=True), count + 1)
    shared = Form(-rest / 2, rest.new_empty(0, *rest.shape), torch.zeros_like(rest))
    return y + run.symbols.fresh(shared, up(rest / 2 + off, 1)) + Form.box(at_mid)


@form_rule(aten._softmax.default, aten._safe_softmax.default)
def softmax(run: Evaluator, n: fx.Node, result: Interval) -> Form | None:
    logarithm = log_softmax(run, n, result)
    if logarithm is None:
        return None
    box = in_float64(run.value(n.args[0]))
    known = RULES[aten._log_softmax.default].function(box, n.args[1], False)
    return run.symbols.fresh(narrower(exponential(run.symbols, logarithm, known, result), result))


@form_rule(aten._softmax_backward_data.default)
def softmax_backward(run: Evaluator, n: fx.Node, result: Interval) -> Form:
    """p·(g - Σ g·p); where p sums to 1, a number may be taken from g first."""
    grad, weights = (run.operand(arg) for arg in n.args[:2])
    grads, box, dim = run.value(n.args[0]), run.value(n.args[1]), int(n.args[2])  # type: ignore[arg-type]
    known = facts.of(box)
    if known.convex and known.total is not None and facts.joined(known.total, box.shape) == [dim % len(box.shape)]:
        inner = (grad.centre * box.mid.double()).sum(dim, keepdim=True)
        grad, grads = grad + Form.box(singleton(-inner)), None

    def inner_product(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dim, keepdim=True)

    mean = run.symbols.bilinear(inner_product, grad, weights, grad.centre.shape[dim], grads, box)
    return run.symbols.fresh(narrower(run.symbols.product(weights, grad - mean, box), result))


@form_rule(aten._log_softmax_backward_data.default)
def log_softmax_backward(run: Evaluator, n: fx.Node, result: Interval) -> Form:
    """g - p·Σ g."""
    grad, dim = run.operand(n.args[0]), int(n.args[2])  # type: ignore[arg-type]
    weights = exponential(run.symbols, run.operand(n.args[1]), run.value(n.args[1]))
    total = mapped(lambda t: t.sum(dim, keepdim=True), lambda t: t.sum(dim, keepdim=True), grad)
    return run.symbols.fresh(narrower(grad - run.symbols.product(weights, total), result))
