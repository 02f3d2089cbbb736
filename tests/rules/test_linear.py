"""Matrix products: a set and a point (exact), two sets (Rump), biases of every kind, and their gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pyxai_bounds as xb
from tests.networks import sample
from tests.rules.cases import Case, case_id, check, rand

aten = torch.ops.aten

W = rand(4, 6, seed=1)
B = rand(4, seed=2)
M = rand(3, 4, seed=3)  # a bias in the shape of the result
LEFT = rand(5, 3, seed=4)
PAIRS = rand(2, 6, 4, seed=9)
ROWS = rand(3, 6, seed=10)
BATCH = rand(2, 4, 3, seed=5)
OFFSET = rand(2, 5, 3, seed=8)


def weight_gradient(x: Tensor) -> Tensor:
    """∂ loss / ∂ weight, a product of two sets: the layer's input and the gradient of its output."""
    with torch.enable_grad():
        weight = W.clone().requires_grad_()
        return torch.autograd.grad(torch.tanh(F.linear(x, weight, B)).sum(), weight, create_graph=True)[0]


CASES = [
    Case("linear", lambda x: F.linear(x, W, B), rand(3, 6)),
    Case("linear without bias", lambda x: F.linear(x, W), rand(3, 6)),
    Case("linear on three dimensions", lambda x: F.linear(x, W, B), rand(2, 3, 6)),
    Case("linear on a vector", lambda x: F.linear(x, W, B), rand(6)),
    Case("linear, batch 1", lambda x: F.linear(x, W, B), rand(1, 6)),
    Case("linear, one output", lambda x: F.linear(x, W[:1], B[:1]), rand(3, 6)),
    Case("linear, one input", lambda x: F.linear(x, W[:, :1], B), rand(3, 1)),
    Case("linear, set as weight", lambda x: F.linear(W, x, B[:3]), rand(3, 6)),
    Case("linear, set as weight and bias", lambda x: F.linear(W, x[:, :6], x[:, 6]), rand(3, 7)),
    Case("linear, set as bias", lambda x: F.linear(W, W[:3], x), rand(3)),
    Case("addmm, bias of the result's shape", lambda x: torch.addmm(M, x, W.t()), rand(3, 6)),
    Case("addmm with alpha and beta", lambda x: torch.addmm(M, x, W.t(), beta=-0.5, alpha=-2), rand(3, 6)),
    Case("addmm, set as bias", lambda x: torch.addmm(x, M, LEFT[:4], beta=-0.5), rand(3, 3)),
    Case("addmm, everything a set", lambda x: torch.addmm(x, x, x, beta=-0.5, alpha=-1.5), rand(3, 3), eps=0.05),
    Case("addmm, set as bias of one row", lambda x: torch.addmm(x, M, LEFT[:4]), rand(3)),
    Case("mm", lambda x: x @ W.t(), rand(3, 6)),
    Case("mm from the left", lambda x: LEFT @ x, rand(3, 6)),
    Case("mm of two sets", lambda x: x @ x.t(), rand(3, 6), eps=0.1),
    Case("bmm", lambda x: torch.bmm(x, BATCH), rand(2, 5, 4)),
    Case("bmm from the left", lambda x: torch.bmm(BATCH, x), rand(2, 3, 5)),
    Case("bmm of two sets", lambda x: torch.bmm(x, x.transpose(1, 2)), rand(2, 3, 4), eps=0.1),
    Case("matmul with broadcasting", lambda x: x @ x[0].tanh().transpose(1, 2), rand(2, 3, 5, 4), eps=0.1),
    Case("baddbmm", lambda x: torch.baddbmm(OFFSET, x, BATCH, beta=-2, alpha=-0.5), rand(2, 5, 4)),
    Case("baddbmm, everything a set", lambda x: torch.baddbmm(x, x, x, beta=-1, alpha=0.5), rand(2, 3, 3), eps=0.05),
    Case("mv", lambda x: x @ B, rand(3, 4)),
    Case("mv, set as vector", lambda x: M @ x, rand(4)),
    Case("mv of two sets", lambda x: x @ x[0], rand(4, 4), eps=0.1),
    Case("addmv", lambda x: torch.addmv(B[:3], x, B, beta=-0.5, alpha=2), rand(3, 4)),
    Case("addmv, everything a set", lambda x: torch.addmv(x[0], x, x[:, 1]), rand(3, 3), eps=0.05),
    Case("addmv, set as bias", lambda x: torch.addmv(x, M, B), rand(3)),
    Case("addr", lambda x: torch.addr(M, x, B, beta=0.5, alpha=-2), rand(3)),
    Case("addr, everything a set", lambda x: torch.addr(x, x[:, 0], x[0]), rand(3, 4), eps=0.1),
    Case("addbmm", lambda x: torch.addbmm(OFFSET[0], x, BATCH, beta=-2, alpha=0.5), rand(2, 5, 4)),
    Case("bilinear", lambda x: F.bilinear(x, M, PAIRS, B[:2]), rand(3, 6)),
    Case("bilinear, the other argument", lambda x: F.bilinear(ROWS, x, PAIRS), rand(3, 4)),
    Case("bilinear, set as weight", lambda x: F.bilinear(ROWS, M, x), rand(2, 6, 4)),
    Case("bilinear, both", lambda x: F.bilinear(x[:, :6], x[:, 6:], PAIRS), rand(3, 10), eps=0.1),
    Case("cross", lambda x: torch.linalg.cross(x, LEFT, dim=1), rand(5, 3)),
    Case("cross of two sets", lambda x: torch.linalg.cross(x, x.flip(0), dim=-1), rand(5, 3), eps=0.1),
    Case("dot", lambda x: torch.dot(x, B), rand(4)),
    Case("dot of two sets", lambda x: torch.dot(x, x.flip(0)), rand(4), eps=0.1),
    Case("einsum", lambda x: torch.einsum("bik,bjk->bij", x, x), rand(2, 3, 4), eps=0.1),
    Case("gradient of the weight", weight_gradient, rand(3, 6), eps=0.1),
    Case("second-order", lambda x: torch.tanh(F.linear(torch.tanh(F.linear(x, W, B)), M, M[:, 0])), rand(3, 6)),
]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_autograd(case: Case) -> None:
    check(case)


def test_a_set_times_a_point_is_exact() -> None:
    """The corner that has the signs of a row of W attains the upper end of that output."""
    box = xb.Interval.linf(rand(1, 6), 0.3)
    for fn, rows in ((lambda x: F.linear(x, W, B), W), (lambda x: (x @ W.t()) * -2, -2 * W)):
        bounds = xb.bound(fn)(box)
        for row in range(4):
            for sign, end in ((1, bounds.upper), (-1, bounds.lower)):
                corner = box.mid + sign * box.rad * rows[row].sign()
                assert torch.allclose(fn(corner)[0, row], end[0, row], atol=1e-12, rtol=0)


def test_a_product_of_two_sets_is_at_most_half_as_wide_again() -> None:
    a, b = xb.Interval.linf(rand(3, 5), 0.4), xb.Interval.linf(rand(5, 2, seed=1), 0.7)

    def fn(a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    bounds = xb.bound(fn)(a, b)
    terms = xb.bound(lambda a, b: a.unsqueeze(2) * b.unsqueeze(0))(a, b)  # exact, and so is their sum
    exact = terms.rad.sum(1)
    assert (bounds.rad >= exact - 1e-12).all() and (bounds.rad <= 1.5 * exact + 1e-12).all()
    assert (bounds.upper >= terms.upper.sum(1) - 1e-12).all() and (bounds.lower <= terms.lower.sum(1) + 1e-12).all()
    for seed in range(50):
        value = sample(a, seed, corners=True) @ sample(b, seed + 1000, corners=True)
        assert bounds.contains(value).all()


def test_nan_weights_never_give_finite_bounds() -> None:
    weight = W.clone()
    weight[1, 2] = float("nan")
    bounds = xb.bound(lambda x: F.linear(x, weight, B))(xb.Interval.linf(rand(3, 6), 0.1))
    assert not bounds.isfinite()[:, 1].any() and bounds.isfinite()[:, [0, 2, 3]].all()
