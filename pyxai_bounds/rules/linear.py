"""Matrix products. One with a point factor is exact; its midpoint and radius share the point."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyxai_bounds import ops
from pyxai_bounds import rounding as rd
from pyxai_bounds.interval import Interval
from pyxai_bounds.rules.registry import (
    Value,
    bilinear,
    exact_bilinear,
    exact_product,
    in_float64,
    multiply,
    outward,
    plus,
    rule,
)

aten = torch.ops.aten


def matmul(a: Value, b: Value, bias: Tensor | None = None) -> Interval:
    """a @ b + bias for matrices, at least one of them a set."""
    if isinstance(a, Interval) and not isinstance(b, Interval):
        mid, rad, _ = ops.interval_linear(a.mid, a.rad, b.t(), bias, False, int(rd.mode()))
        return Interval.of(mid, rad)
    out = _product(torch.mm, a, b)
    return out if bias is None else plus(out, in_float64(bias) if outward() else bias)


@rule(aten.mm.default, precision="own", ulps=0)
def mm(a: Value, b: Value) -> Interval:
    return matmul(a, b)


@rule(aten.addmm.default, precision="own", ulps=0, set_first="mat1")
def addmm(bias: Value, a: Value, b: Value, *, beta: float = 1, alpha: float = 1) -> Interval:
    has_set = isinstance(a, Interval) or isinstance(b, Interval)
    if has_set and beta == 1 and alpha == 1 and isinstance(bias, Tensor) and bias.dim() == 1:
        return matmul(a, b, bias)
    return _add_product(bias, a, b, torch.mm, beta, alpha)


@rule(aten.bmm.default, ulps=0)
def bmm(a: Value, b: Value) -> Interval:
    return _product(torch.bmm, a, b)


@rule(aten.baddbmm.default, ulps=0, set_first="batch1")
def baddbmm(bias: Value, a: Value, b: Value, *, beta: float = 1, alpha: float = 1) -> Interval:
    return _add_product(bias, a, b, torch.bmm, beta, alpha)


@rule(aten.mv.default, ulps=0)
def mv(a: Value, b: Value) -> Interval:
    return _product(torch.mv, a, b)


@rule(aten.dot.default, ulps=0)
def dot(a: Value, b: Value) -> Interval:
    return _product(torch.dot, a, b)


def _product(product: Any, a: Value, b: Value) -> Interval:
    """Rounded outward in float64, where a sum of any length loses next to nothing."""
    if outward():
        a, b = in_float64(a), in_float64(b)
    if exact_product() and isinstance(a, Interval) and isinstance(b, Interval):
        return _exact_product(product, a, b)
    return bilinear(product, a, b, a.shape[-1])


def _exact_product(product: Any, a: Interval, b: Interval) -> Interval:
    """Vectors become matrices of one row or column."""
    row, column = a.mid.dim() == 1, b.mid.dim() == 1

    def exact(*parts: Tensor) -> tuple[Tensor, Tensor]:
        left = [t.unsqueeze(0) if row else t for t in parts[:2]]
        right = [t.unsqueeze(1) if column else t for t in parts[2:]]
        mid, rad = ops.interval_matmul(*left, *right, True)
        shape = mid.shape[: mid.dim() - column][row:]
        return mid.reshape(shape), rad.reshape(shape)

    return exact_bilinear(exact, product, a, b, a.shape[-1])


def _add_product(bias: Value, a: Value, b: Value, product: Any, beta: float, alpha: float) -> Interval:
    if outward():
        bias = in_float64(bias)
        if not isinstance(a, Interval) and not isinstance(b, Interval):
            a = Interval.point(a)
    if isinstance(a, Interval) or isinstance(b, Interval):
        return plus(
            multiply(_product(product, a, b), alpha),
            multiply(bias, beta) if isinstance(bias, Interval) else _scaled(bias, beta),
        )
    return plus(product(a, b) * alpha, multiply(bias, beta))


def _scaled(bias: Tensor, beta: float) -> Value:
    if beta == 1:
        return bias
    return multiply(Interval.point(bias), beta) if outward() else bias * beta
