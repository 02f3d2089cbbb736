"""Systems of linear equations, inverses and Cholesky factors: found approximately, then enclosed by what is left over.

None of the methods that PyTorch solves by is followed. An approximate inverse R of the midpoint comes from a library,
without any claim; that I − R·A is small over the whole set then proves that every A in it can be inverted, and how far
solutions lie from the approximate one (Rump, "Verification methods", Acta Numerica 19, 2010, section 10). Where that
cannot be shown, the result has no bound.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyxai_bounds import rounding as rd
from pyxai_bounds.interval import Interval
from pyxai_bounds.rules.registry import (
    Indices,
    Value,
    as_set,
    bilinear,
    filled,
    mid_of,
    minus,
    outward,
    plus,
    rule,
    singleton,
)

aten = torch.ops.aten


class Factors(Indices):
    """The factors of matrices, which have no numbers here: who solves with them is given the matrices."""

    __slots__ = ("matrix",)
    why = "uses the factors of a matrix in a set; solve with the matrix itself"

    def __init__(self, matrix: Value) -> None:
        super().__init__()
        self.matrix = matrix


def solve(a: Value, b: Value) -> Interval:
    """All solutions x of A·x = b, for matrices A [..., n, n] and b [..., n, k], either of them a set.

    With R ≈ A⁻¹, x̃ = R·b and G = I − R·A the error e = x − x̃ satisfies e = R·(b − A·x̃) + G·e for every A and b. Let
    d be the first term: where ‖G‖∞ = g < 1, A is no singular matrix, ‖e‖∞ ≤ ‖d‖∞ / (1 − g), and so |e − d| ≤
    Σ|G|·‖e‖∞. To first order in the radii d is all that x can do.
    """
    n = a.shape[-1]
    inverse = torch.linalg.inv_ex(mid_of(a)).inverse
    if not outward() and not isinstance(a, Interval):
        return _product(inverse, as_set(b))
    guess = inverse @ mid_of(b)
    first = _product(inverse, minus(as_set(b), _product(as_set(a), guess)))
    left_over = minus(singleton(_identity(n, guess)), _product(inverse, as_set(a)))
    rows = _above(_reach(left_over).sum(-1, keepdim=True), n)
    most = rows.amax(-2, keepdim=True)
    error = _above(_reach(first).amax(-2, keepdim=True) / (1 - most), 4)
    out = plus(guess, Interval.of(first.mid, _above(first.rad + rows * error, 4)))
    return filled(out, (~(most < 1)).expand_as(out.mid), rad=math.inf)


def _product(a: Value, b: Value) -> Interval:
    return bilinear(torch.matmul, a, b, a.shape[-1])


def _reach(x: Interval) -> Tensor:
    return x.mid.abs() + x.rad


def _above(x: Tensor, n: int) -> Tensor:
    """No less than what was computed with so many roundings and no negative numbers."""
    return rd.up(x * (1 + 2 * (n + 4) * rd.unit(x.dtype)), underflows=True) if outward() else x


def _identity(n: int, like: Tensor) -> Tensor:
    return torch.eye(n, dtype=like.dtype, device=like.device)


def _moved(x: Value, move: Any) -> Any:
    """A rearrangement, or a product with powers of two, applied to midpoint and radius."""
    return Interval.of(move(x.mid), move(x.rad)) if isinstance(x, Interval) else move(x)


def _transposed(x: Value) -> Any:
    return _moved(x, lambda t: t.mT)


def _triangle(x: Value, upper: bool, unit: bool = False) -> Any:
    """That half of a matrix, with its diagonal or with ones on it."""
    half = _moved(x, lambda t: (t.triu if upper else t.tril)((1 if upper else -1) * unit))
    return _shifted(half, _identity(x.shape[-1], mid_of(x))) if unit else half


def _shifted(x: Value, by: Tensor) -> Any:
    """x + by, where one of them is 0."""
    return Interval.of(x.mid + by, x.rad) if isinstance(x, Interval) else x + by


@rule(aten._linalg_solve_ex.default)
def linalg_solve(
    a: Value, b: Value, *, left: bool = True, check_errors: bool = False
) -> tuple[Interval, Factors, Factors, Factors]:
    vector = len(b.shape) == 1 or (len(a.shape) - 1 == len(b.shape) and b.shape == a.shape[:-1])
    if vector:
        b = _moved(b, lambda t: t.unsqueeze(-1))
    x = solve(a, b) if left or vector else _transposed(solve(_transposed(a), _transposed(b)))
    factors = Factors(a)
    return (_moved(x, lambda t: t.squeeze(-1)) if vector else x), factors, factors, factors


@rule(aten.linalg_lu_factor_ex.default)
def lu_factor(a: Value, *, pivot: bool = True, check_errors: bool = False) -> tuple[Factors, Factors, Factors]:
    factors = Factors(a)
    return factors, factors, factors


@rule(aten.linalg_lu_solve.default, set_first="B")
def lu_solve(factors: Any, pivots: Any, b: Value, *, left: bool = True, adjoint: bool = False) -> Interval:
    """Of a matrix whose factors are points they are taken as they are."""
    if not left:
        return _transposed(lu_solve(factors, pivots, _transposed(b), adjoint=not adjoint))
    if isinstance(factors, Factors):
        return solve(_transposed(factors.matrix) if adjoint else factors.matrix, b)
    order, lower, upper = torch.lu_unpack(factors, pivots)
    if adjoint:
        x = solve(lower.mT, solve(upper.mT, b))
        return _moved(x, lambda t: order @ t)
    return solve(upper, solve(lower, _moved(b, lambda t: order.mT @ t)))


@rule(aten.linalg_inv_ex.default)
def inverse(a: Value, *, check_errors: bool = False) -> tuple[Interval, Factors]:
    return solve(a, _identity(a.shape[-1], mid_of(a)).expand(a.shape)), Factors(a)


@rule(aten.linalg_solve_triangular.default)
def solve_triangular(a: Value, b: Value, *, upper: bool, left: bool = True, unitriangular: bool = False) -> Interval:
    """Only one half of the matrix is looked at."""
    a = _triangle(a, upper, unitriangular)
    return solve(a, b) if left else _transposed(solve(_transposed(a), _transposed(b)))


# --- the least squares -------------------------------------------------------------------------------------------


@rule(aten.linalg_pinv.atol_rtol_tensor)
def pinv(a: Value, *, atol: Tensor | None = None, rtol: Tensor | None = None, hermitian: bool = False) -> Interval:
    """Of matrices of full rank: X in [[αI, A], [Aᵀ, 0]]·[[Y], [X]] = [[I], [0]], whose condition is that of A where α
    is about its least singular value.

    The real pseudo-inverse drops singular values up to max(atol, rtol·σ_max). None is dropped if ‖A⁺‖·max(atol,
    rtol·‖A‖) < 1 in the Frobenius norm, because 1/σ_min ≤ ‖A⁺‖; without that there is no bound.
    """
    if hermitian:
        a = _symmetric(a)
    m, n = a.shape[-2:]
    if m < n:
        return _transposed(pinv(_transposed(a), atol=atol, rtol=rtol))
    centre = mid_of(a).detach()
    least = torch.linalg.inv_ex(centre.mT @ centre).inverse.diagonal(dim1=-2, dim2=-1).sum(-1).rsqrt()
    alpha = torch.where((least > 0) & least.isfinite(), least, 1.0)[..., None, None]
    ones = torch.diag(torch.cat((torch.ones(m), torch.zeros(n)))).to(centre)
    system = _shifted(_moved(a, _bordered), alpha * ones)
    x = _moved(solve(system, ones[:, :m].expand(*system.shape[:-1], m)), lambda t: t[..., m:, :])
    if rtol is None:
        rtol = torch.full((), max(m, n) * torch.finfo(torch.float32).eps, dtype=x.dtype, device=x.mid.device)
    limit = _size(as_set(a)) * rtol
    limit = limit if atol is None else torch.maximum(limit, atol.to(x.dtype))
    dropped = ~(_above(_size(x) * limit, 8) < 1)
    return filled(x, dropped[..., None, None].expand_as(x.mid), rad=math.inf)


def _bordered(t: Tensor) -> Tensor:
    """[[0, A], [Aᵀ, 0]]"""
    m, n = t.shape[-2:]
    above = torch.cat((t.new_zeros((*t.shape[:-2], m, m)), t), -1)
    below = torch.cat((t.mT, t.new_zeros((*t.shape[:-2], n, n))), -1)
    return torch.cat((above, below), -2)


def _size(x: Interval) -> Tensor:
    """No less than the Frobenius norms of the matrices in a set; squares may underflow."""
    count = x.shape[-1] * x.shape[-2]
    size = torch.linalg.vector_norm(_reach(x), dim=(-2, -1))
    return _above(size + count * rd.floor(x.dtype) if outward() else size, count + 4)


# --- Cholesky's factors ------------------------------------------------------------------------------------------


def _symmetric(a: Value) -> Any:
    """What is known by its lower half."""
    return _moved(a, lambda t: t.tril() + t.tril(-1).mT)


def cholesky_factor(a: Value) -> Interval:
    """L with L·Lᵀ = A, for symmetric A [..., n, n] of which the lower half is looked at.

    With V ≈ L⁻¹, lower triangular, V·A·Vᵀ = I + E and L = V⁻¹(I + F), where I + F is the factor of I + E, so that E =
    F + Fᵀ + F·Fᵀ. Let Φ keep the half below the diagonal, and half of the diagonal; then F = Φ(E − F·Fᵀ), and ‖Φ(S)‖ ≤
    ‖S‖/√2 for symmetric S in the Frobenius norm. So f = ‖F‖ and e = ‖E‖ satisfy f ≤ (e + f²)/√2. Along t·E, 0 ≤ t ≤ 1,
    f starts at 0 and moves continuously, so that for e < 1/2 it stays below the smaller root, which is at most √2·e.
    Hence |F − Φ(E)| ≤ 2e², element by element.
    """
    a = _symmetric(a)
    n = a.shape[-1]
    factor = torch.linalg.cholesky_ex(mid_of(a)).L
    inverse = torch.linalg.inv_ex(factor).inverse.tril()
    scaled = _product(_product(inverse, as_set(a)), inverse.mT)
    moved = minus(scaled, _identity(n, inverse))
    size = _size(moved)[..., None, None]
    half = torch.ones_like(inverse).tril() - _identity(n, inverse) * 0.5
    first = Interval.of(moved.mid * half, moved.rad * half)
    change = Interval.of(first.mid, _above(first.rad + 2 * size * size * (half != 0), 8))
    out = _triangle(solve(inverse, plus(change, _identity(n, inverse))), upper=False)
    unknown = ~((size < 0.5) & (inverse.diagonal(dim1=-2, dim2=-1) > 0).all(-1)[..., None, None])
    return filled(out, unknown & (half != 0), rad=math.inf)


@rule(aten.linalg_cholesky_ex.default)
def cholesky_ex(a: Value, *, upper: bool = False, check_errors: bool = False) -> tuple[Interval, Factors]:
    return _transposed(cholesky_factor(_transposed(a))) if upper else cholesky_factor(a), Factors(a)


@rule(aten.cholesky_solve.default)
def cholesky_solve(b: Value, factor: Value, upper: bool = False) -> Interval:
    """L·Lᵀ·x = b, or Uᵀ·U·x = b."""
    lower = _triangle(_transposed(factor) if upper else factor, upper=False)
    return solve(_transposed(lower), solve(lower, b))


@rule(aten.cholesky_inverse.default)
def cholesky_inverse(factor: Value, upper: bool = False) -> Interval:
    return cholesky_solve(_identity(factor.shape[-1], mid_of(factor)).expand(factor.shape), factor, upper)
