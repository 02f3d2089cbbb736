"""Matrix products. One with a point factor is exact; its midpoint and radius share the point."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyxai_bounds import ops
from pyxai_bounds import rounding as rd
from pyxai_bounds.interval import Interval
from pyxai_bounds.rules import facts
from pyxai_bounds.rules.registry import (
    Value,
    as_set,
    bilinear,
    ends,
    exact_bilinear,
    exact_product,
    in_float64,
    mid_of,
    minus,
    multiply,
    outward,
    plus,
    rad_of,
    rule,
    singleton,
    total,
    within,
)

aten = torch.ops.aten


def matmul(a: Value, b: Value, bias: Tensor | None = None) -> Interval:
    """a @ b + bias for matrices, at least one of them a set."""
    if isinstance(a, Interval) and not isinstance(b, Interval):
        mid, rad, _ = ops.interval_linear(a.mid, a.rad, b.t(), bias, False, int(rd.mode()))
        return _rows_through(Interval.of(mid, rad), a, b, bias)
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


@rule(aten.addmv.default, ulps=0, set_first="mat")
def addmv(bias: Value, a: Value, b: Value, *, beta: float = 1, alpha: float = 1) -> Interval:
    return _add_product(bias, a, b, torch.mv, beta, alpha)


@rule(aten.dot.default, ulps=0)
def dot(a: Value, b: Value) -> Interval:
    return _product(torch.dot, a, b)


@rule(aten._trilinear.default, ulps=2)
def trilinear(
    a: Value, b: Value, c: Value, expand_a: list[int], expand_b: list[int], expand_c: list[int], summed: list[int],
    unroll_dim: int = 1,
) -> Interval:  # fmt: skip
    """Σ a·b·c, nn.Bilinear's and its gradients': products of points first, so that a set meets one coefficient."""
    factors = []
    for factor, dims in ((a, expand_a), (b, expand_b), (c, expand_c)):
        box = as_set(factor)
        parts = [box.mid, box.rad]
        for dim in dims:
            parts = [part.unsqueeze(dim) for part in parts]
        factors.append(Interval.of(*parts) if isinstance(factor, Interval) or outward() else parts[0])
    factors.sort(key=lambda factor: isinstance(factor, Interval))
    first, second, third = factors
    pair = first * second if isinstance(first, Tensor) and isinstance(second, Tensor) else multiply(first, second)
    return total(multiply(pair, third), summed)


def _product(product: Any, a: Value, b: Value) -> Interval:
    """Rounded outward in float64, where a sum of any length loses next to nothing."""
    if outward():
        a, b = in_float64(a), in_float64(b)
    if len(a.shape) == len(b.shape) > 1 and not facts.of(a) is facts.of(b) is facts.NONE:
        return _product_of_rows(product, a, b)
    return _product_of_boxes(product, a, b)


def _product_of_boxes(product: Any, a: Value, b: Value) -> Interval:
    if exact_product() and isinstance(a, Interval) and isinstance(b, Interval):
        return _exact_product(product, a, b)
    return bilinear(product, a, b, a.shape[-1])


def _rows_through(out: Interval, a: Interval, weight: Tensor, bias: Tensor | None) -> Interval:
    """a @ weight + bias, where rows of a lie within a norm ρ of their midpoints: entries move by ‖w‖₂ρ, rows by ‖W‖₂ρ.

    Where bounds are proofs, a second product in float64 says how far the midpoints lie from those that this is true of.
    """
    norm = facts.of(a).norm
    if norm is None or facts.joined(norm, a.shape) != [1] or 0 in out.shape:
        return out
    w = facts.wide(weight)
    columns = facts.length(w, [0])
    reach = norm * columns
    off = torch.zeros_like(reach)
    if outward():
        shift = facts.wide(torch.zeros_like(w[0]) if bias is None else bias)
        lost = rd.gamma(len(w) + 8, torch.float64)
        size = facts.length(facts.wide(a.mid), [1]) * columns + shift.abs()
        off = ((facts.wide(out.mid) - (facts.wide(a.mid) @ w + shift)).abs() + lost * size).detach()
    out = _no_farther(out, facts.above(reach + off))
    return facts.with_norm(out, facts.above(norm * facts.spectral_norm(weight) + facts.length(off, [1])))


def _no_farther(x: Interval, reach: Tensor) -> Interval:
    """The set with a radius of no more than ``reach``."""
    reach = rd.narrow_up(reach, x.dtype) if outward() and x.dtype != reach.dtype else reach
    return Interval.of(x.mid, torch.where(reach < x.rad, reach, x.rad))


def _joins(fact: Tensor | None, x: Value, dim: int) -> bool:
    """Does the fact join this one dimension, counted from the end?"""
    return fact is not None and facts.joined(fact, x.shape) == [len(x.shape) + dim]


def _transposed(x: Value) -> Any:
    if not isinstance(x, Interval):
        return x.mT
    out = Interval.of(x.mid.mT, x.rad.mT)
    norm, total, convex = facts.of(x)
    return facts.attach(out, norm=None if norm is None else norm.mT, total=None if total is None else total.mT,
                        convex=convex)  # fmt: skip


def _product_of_rows(product: Any, a: Value, b: Value) -> Interval:
    """Matrices, of whose rows or columns more is known than their boxes."""
    if _joins(facts.of(b).total, b, -2) or _joins(facts.of(a).norm, a, -2):
        return _transposed(_rows_in(product, _transposed(b), _transposed(a)))
    return _rows_in(product, a, b)


def _rows_in(product: Any, a: Value, b: Value) -> Interval:
    """Where the rows of a sum to t, p·v = t·c + p·(v − c) for any c, of which the mean of v's midpoints is a good one:
    the radius then holds the differences of v, and not v. Where no p is negative p·v lies between the least and the
    greatest v, too.

    Where both factors lie within norms of their midpoints, |Δ(a·b)| ≤ ‖a‖ρ_b + ρ_a(‖b‖ + ρ_b) by Cauchy and Schwarz.
    """
    known = facts.of(a)
    if _joins(known.total, a, -1):
        centre = mid_of(b).mean(-2, keepdim=True)
        shift = known.total * centre
        centred = (
            minus(b if isinstance(b, Interval) or not outward() else singleton(b), centre)
            if isinstance(b, Interval) or outward()
            else b - centre
        )
        out = plus(_product_of_boxes(product, a, centred), shift)
    else:
        centred, shift, out = b, 0.0, _product_of_boxes(product, a, b)
    norm = _norm_of_sums(product, a, b, centred, shift, out)
    if _joins(known.total, a, -1):
        if known.convex:
            lower, upper = ends(b)
            before, out = (
                out,
                within(out, known.total * lower.amin(-2, keepdim=True), known.total * upper.amax(-2, keepdim=True)),
            )
            norm = None if norm is None else facts.above(norm + facts.length(out.mid - before.mid, [norm.dim() - 1]))
    elif not exact_product():
        out = _no_farther(out, _by_norms(a, b)) if _joins(known.norm, a, -1) or _joins(facts.of(b).norm, b, -2) else out
    return facts.with_norm(out, norm)


def _by_norms(a: Value, b: Value) -> Tensor:
    dims = [len(a.shape) - 1], [len(a.shape) - 2]
    a_norm, b_norm = (facts.norm_over(x, d) for x, d in zip((a, b), dims, strict=True))
    a_size, b_size = (facts.length(mid_of(x), d) for x, d in zip((a, b), dims, strict=True))
    reach = a_size * b_norm + a_norm * (b_size + b_norm)
    if outward():
        reach = reach + a_size * b_size * rd.gamma(a.shape[-1] + 8, torch.float64)
    return facts.above(reach)


def _norm_of_sums(product: Any, a: Value, b: Value, centred: Value, shift: Any, out: Interval) -> Tensor | None:
    """How far Σ_j a_ij b_j lies from its midpoint, where rows b_j lie within a norm of theirs: with a = m ± r,
    Σ_j (|m_ij| + r_ij)ρ_j, where a is convex no more than the greatest ρ, and Σ_j r_ij‖b_j − c‖.
    """
    last, known, rows = len(b.shape) - 1, facts.of(a), facts.of(b).norm
    if rows is None or not _joins(rows, b, -1):
        return None
    size = mid_of(a).abs() + rad_of(a)
    moved = product(size, rows)
    if known.convex and known.total is not None and _joins(known.total, a, -1):
        most = known.total * rows.amax(-2, keepdim=True)
        moved = torch.where(most < moved, most, moved)
    lengths = facts.length(mid_of(centred), [last])
    norm = moved + product(rad_of(a), lengths)
    if not outward():
        return (
            norm
            if not exact_product()
            else norm + facts.length(out.mid - product(mid_of(a), mid_of(centred)) - shift, [last])
        )
    lost = rd.gamma(3 * a.shape[-1] + 32, torch.float64)
    off = out.mid - (product(mid_of(a), mid_of(centred)) + shift)
    far = facts.length(off, [last]) + lost * (product(size, lengths) + facts.length(shift + 0 * off, [last]))
    return facts.above(norm * (1 + lost) + far)


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
            a = singleton(a)
    if isinstance(a, Interval) or isinstance(b, Interval):
        return plus(
            multiply(_product(product, a, b), alpha),
            multiply(bias, beta) if isinstance(bias, Interval) else _scaled(bias, beta),
        )
    return plus(product(a, b) * alpha, multiply(bias, beta))


def _scaled(bias: Tensor, beta: float) -> Value:
    if beta == 1:
        return bias
    return multiply(singleton(bias), beta) if outward() else bias * beta
