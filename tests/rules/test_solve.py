"""Systems of linear equations, inverses, Cholesky's factors: of points and sets, their gradients, and where none is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.linalg import cholesky, inv, lstsq, lu_factor, lu_solve, pinv, solve, solve_triangular

import pyxai_bounds as xb
from tests.networks import sample
from tests.rules.cases import Case, case_id, check, rand
from tests.soundness.programs import outside

A = rand(4, 4, seed=2) + 3 * torch.eye(4)
RIGHT = rand(4, 2, seed=3)
TALL = rand(6, 3, seed=4)
POSITIVE = A @ A.mT


def near_identity(x: Tensor) -> Tensor:
    return 0.3 * x.tanh() + 2 * torch.eye(x.shape[-1], dtype=x.dtype)


def positive(x: Tensor) -> Tensor:
    return x @ x.mT + 2 * torch.eye(x.shape[-2], dtype=x.dtype)


CASES = [
    Case("solve", lambda x: solve(A, x), rand(4, 3)),
    Case("solve, one vector", lambda x: solve(A, x), rand(4)),
    Case("solve, a vector for each matrix", lambda x: solve(A.expand(3, 4, 4), x), rand(3, 4)),
    Case("solve from the right", lambda x: solve(A, x, left=False), rand(3, 4)),
    Case("solve, a set as matrix", lambda x: solve(near_identity(x), RIGHT), rand(4, 4), eps=0.1),
    Case("solve, everything a set", lambda x: solve(near_identity(x), x[..., :2]), rand(2, 3, 3), eps=0.05),
    Case("lu_solve", lambda x: lu_solve(*lu_factor(A), x), rand(4, 2)),
    Case("lu_solve from the right, transposed", lambda x: lu_solve(*lu_factor(A), x, left=False, adjoint=True),
         rand(2, 4)),
    Case("factors of a set", lambda x: lu_solve(*lu_factor(near_identity(x)), RIGHT),
         rand(4, 4), eps=0.1, gradient=False),
    Case("inverse", lambda x: inv(near_identity(x)), rand(2, 3, 3), eps=0.1),
    Case("triangular", lambda x: solve_triangular(near_identity(x), RIGHT[:3], upper=True), rand(3, 3), eps=0.1),
    Case("unit triangular", lambda x: solve_triangular(x, 2 * x, upper=False, left=False, unitriangular=True),
         0.3 * rand(3, 3), eps=0.05),
    Case("pseudo-inverse", lambda x: pinv(TALL + 0.1 * x), rand(6, 3), eps=0.1, nan=False),
    Case("pseudo-inverse, wide", lambda x: pinv((TALL + 0.1 * x).mT, rtol=1e-3), rand(6, 3), eps=0.1, nan=False),
    Case("pseudo-inverse, symmetric", lambda x: pinv(near_identity(x), atol=0.1, hermitian=True),
         rand(3, 3), eps=0.1, nan=False),
    Case("least squares", lambda x: lstsq(TALL, x).solution, rand(6, 2), nan=False),
    Case("least squares, a set as matrix", lambda x: lstsq(TALL + 0.1 * x, x[:, 0]).solution,
         rand(6, 3), eps=0.1, nan=False),
    Case("Cholesky", lambda x: cholesky(positive(x)), rand(2, 3, 3), eps=0.02, nan=False),
    Case("Cholesky, upper", lambda x: cholesky(positive(x), upper=True), rand(3, 2), eps=0.02, nan=False),
    Case("cholesky_solve", lambda x: torch.cholesky_solve(x, cholesky(POSITIVE)), rand(4, 2)),
    Case("cholesky_solve, upper", lambda x: torch.cholesky_solve(x, cholesky(POSITIVE, upper=True), upper=True),
         rand(4, 2)),
    Case("cholesky_solve, a set as factor", lambda x: torch.cholesky_solve(RIGHT, cholesky(positive(x))),
         rand(4, 4), eps=0.005, nan=False),
    Case("cholesky_inverse", lambda x: torch.cholesky_inverse(near_identity(x)), rand(3, 3), eps=0.05),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_autograd(case: Case) -> None:
    check(case)


HILBERT = 1 / (torch.arange(3).double().unsqueeze(1) + torch.arange(3) + 1)  # its condition number is 524
PROOFS: dict[str, Callable[[Tensor], Tensor]] = {
    "solve": lambda x: solve(A.to(x.dtype), x),
    "inverse of a sum": lambda x: inv(A.to(x.dtype) + x @ x.mT) @ x,
    "least squares": lambda x: lstsq(TALL.to(x.dtype)[:4], x).solution,
    "pseudo-inverse": lambda x: pinv(x[:, :2] + 3 * torch.eye(4, 2, dtype=x.dtype)),
    "LIME": lambda x: solve(TALL.to(x.dtype).mT @ TALL.to(x.dtype), TALL.to(x.dtype)[:4].mT @ x.tanh()),
    "Gaussian process": lambda x: torch.cholesky_solve(x, cholesky(POSITIVE.to(x.dtype) + 0.1 * x @ x.mT)),
    "factors": lambda x: lu_solve(*lu_factor(A.to(x.dtype)), x),
    "Hilbert": lambda x: solve(HILBERT.float().to(x.dtype), x[:3]),
    "normal": lambda x: torch.distributions.MultivariateNormal(
        x[:, 0], covariance_matrix=POSITIVE.to(x.dtype)
    ).log_prob(x.mT[:2]),
}  # fmt: skip


@pytest.mark.parametrize("name", PROOFS)
@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-2])
def test_proofs_hold_and_are_narrow(name: str, eps: float) -> None:
    fn = PROOFS[name]

    def explained(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        value = fn(x)
        return value, torch.autograd.grad((0.1 * value).tanh().sum(), x)[0]

    for seed in range(5):
        box = xb.Interval.linf(0.5 * rand(4, 4, seed=seed).float(), eps)
        sound, nearest = xb.bound(explained, sound=True)(box), xb.bound(explained)(box)
        for s, n in zip(sound, nearest, strict=True):
            assert s.isfinite().all()
            assert (s.rad <= 1.2 * n.rad + 1e-4 * s.mid.abs().max()).all()
        for draw in range(20):
            for s, value in zip(
                sound, explained(sample(box.to(torch.float64), draw, corners=draw % 2 == 0)), strict=True
            ):
                assert not outside(s, value.detach()).any()


def test_a_fixed_matrix_is_bounded_exactly() -> None:
    box = xb.Interval.linf(rand(4, 2), 0.3)
    bounds = xb.bound(lambda x: solve(A, x))(box)
    assert (bounds.mid - solve(A, box.mid)).abs().max() < 1e-14
    assert (bounds.rad - inv(A).abs() @ box.rad).abs().max() < 1e-14


@pytest.mark.parametrize("sound", [False, True])
def test_a_set_that_may_hold_a_singular_matrix_has_no_bound(sound: bool) -> None:
    box = xb.Interval.linf(torch.eye(2), 0.6)
    for fn in (inv, lambda x: solve(x, torch.ones(2, 1)), pinv, cholesky):
        bounds = xb.bound(fn, sound=sound)(box)
        assert not bounds.isfinite().tril().any()
    singular = torch.ones(2, 2)
    for fn in (lambda x: solve(singular, x), lambda x: lstsq(singular, x).solution, lambda x: pinv(singular) @ x):
        assert not xb.bound(fn, sound=True)(box).isfinite().any()


def test_singular_values_that_a_pseudo_inverse_may_drop_leave_no_bound() -> None:
    near = torch.diag(torch.tensor([1.0, 1e-3]))
    box = xb.Interval.linf(near, 1e-5)
    assert xb.bound(pinv)(box).isfinite().all()
    assert not xb.bound(lambda x: pinv(x, rtol=1e-2))(box).isfinite().any()
    assert not xb.bound(lambda x: pinv(x, atol=1e-2))(box).isfinite().any()


def test_factors_are_no_numbers() -> None:
    with pytest.raises(xb.UnsupportedOperatorError, match="the factors of a matrix in a set; solve with the matrix"):
        xb.bound(lambda x: lu_factor(x).LU * 2)(xb.Interval.linf(A, 0.01))
