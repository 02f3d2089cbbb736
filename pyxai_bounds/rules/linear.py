"""Matrix products. One with a point factor is exact; its midpoint and radius share the point."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyxai_bounds import ops
from pyxai_bounds.interval import Interval
from pyxai_bounds.rules.registry import Value, bilinear, mid_of, multiply, rad_of, rule

aten = torch.ops.aten


def matmul(a: Value, b: Value, bias: Tensor | None = None) -> Interval:
    """a @ b + bias for matrices, at least one of them a set."""
    if isinstance(a, Interval) and not isinstance(b, Interval):
        mid, rad, _ = ops.interval_linear(a.mid, a.rad, b.t(), bias, False)
        return Interval.of(mid, rad)
    out = bilinear(torch.mm, a, b)
    return out if bias is None else Interval.of(out.mid + bias, out.rad)


@rule(aten.mm.default)
def mm(a: Value, b: Value) -> Interval:
    return matmul(a, b)


@rule(aten.addmm.default)
def addmm(bias: Value, a: Value, b: Value, *, beta: float = 1, alpha: float = 1) -> Interval:
    has_set = isinstance(a, Interval) or isinstance(b, Interval)
    if has_set and beta == 1 and alpha == 1 and isinstance(bias, Tensor) and bias.dim() == 1:
        return matmul(a, b, bias)
    return _add_product(bias, a, b, torch.mm, beta, alpha)


@rule(aten.bmm.default)
def bmm(a: Value, b: Value) -> Interval:
    return bilinear(torch.bmm, a, b)


@rule(aten.baddbmm.default)
def baddbmm(bias: Value, a: Value, b: Value, *, beta: float = 1, alpha: float = 1) -> Interval:
    return _add_product(bias, a, b, torch.bmm, beta, alpha)


@rule(aten.mv.default)
def mv(a: Value, b: Value) -> Interval:
    return bilinear(torch.mv, a, b)


@rule(aten.dot.default)
def dot(a: Value, b: Value) -> Interval:
    return bilinear(torch.dot, a, b)


def _add_product(bias: Value, a: Value, b: Value, product: Any, beta: float, alpha: float) -> Interval:
    if isinstance(a, Interval) or isinstance(b, Interval):
        out: Value = multiply(bilinear(product, a, b), alpha)
    else:
        out = product(a, b) * alpha
    return Interval.of(mid_of(out) + beta * mid_of(bias), rad_of(out) + abs(beta) * rad_of(bias))
