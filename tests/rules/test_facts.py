"""What rules know of a set beyond its box: true at every node of a program, carried through views, worth carrying."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

import pyxai_bounds as xb
from pyxai_bounds import rounding as rd
from pyxai_bounds.fuse import VIEWS
from pyxai_bounds.interpreter import Interpreter
from pyxai_bounds.program import captured_graph
from pyxai_bounds.rules import facts
from tests.networks import sample
from tests.rules.cases import Case, case_id, check, rand

aten = torch.ops.aten

W, V, GAIN = rand(6, 12, seed=1), rand(12, 6, seed=2), rand(6, seed=4)


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def attention(x: Tensor) -> Tensor:
    """Two heads, as libraries write them: views, transposes, a scale, a mask."""
    q, k, v = (part.unflatten(-1, (2, 2)).transpose(1, 2) for part in (norm(x) @ W).split(4, -1))
    scores = (q @ k.mT / 2**0.5).masked_fill(torch.ones(3, 3, dtype=torch.bool).triu(1), float("-inf"))
    return x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ W[:4, :6]


def by_hand(x: Tensor) -> Tensor:
    """Layer norm as some models write it."""
    variance = (x - x.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True)
    return GAIN * ((x - x.mean(-1, keepdim=True)) / torch.sqrt(variance + 1e-5))


def root_mean_square(x: Tensor) -> Tensor:
    return GAIN * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


CASES = [
    Case("norm by hand", lambda x: x + by_hand(x @ W[:, :6]) @ W @ V, rand(4, 6), eps=0.1),
    Case("root mean square", lambda x: root_mean_square(x + root_mean_square(x) @ W @ V) @ W, rand(4, 6), eps=0.02),
    Case("two linear layers", lambda x: norm(x) @ W @ V, rand(4, 6), eps=0.1),
    Case("biases", lambda x: F.linear(F.linear(norm(x), W.t(), W[0]), V.t(), V[0]), rand(4, 6), eps=0.1),
    Case("GELU and a residual", lambda x: x + F.gelu(norm(x) @ W, approximate="tanh") @ V, rand(4, 6), eps=0.1),
    Case("SiLU, scaled", lambda x: x - F.silu(norm(x) @ W) @ V * GAIN / 3.0, rand(4, 6), eps=0.1),
    Case("tanh, sigmoid, ReLU", lambda x: ((norm(x) @ W).tanh() @ V).relu().sigmoid() @ W, rand(4, 6), eps=0.1),
    Case("attention", attention, rand(2, 3, 6), eps=0.02),
    Case("windows that are padded and rolled, then joined", lambda x: norm(torch.cat([
        part @ W[:, :6] for part in F.pad(norm(x), (0, 0, 0, 1)).roll(1, 1).split(2, 1)], -1)) @ V, rand(2, 3, 6),
        eps=0.02),
    Case("attention, then a norm", lambda x: norm(attention(x)) @ W, rand(2, 3, 6), eps=0.02),
    Case("softmax, product", lambda x: x.softmax(-1) @ x.mT, rand(2, 4, 5)),
    Case("softmax, product from the left", lambda x: x @ x.softmax(1), rand(5, 5)),
    Case("safe softmax without an entry", lambda x: aten._safe_softmax(x.masked_fill(
        torch.arange(4).view(4, 1) < 1, float("-inf")), -1) @ x.mT, rand(2, 4, 5)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_autograd(case: Case) -> None:
    check(case)


class _Known(Interpreter):
    """Collects the sets that facts are known of."""

    joins_terms = False

    def run(self, *args: object, **options: object) -> object:
        self.known: dict[str, xb.Interval] = {}
        return super().run(*args, **options)  # type: ignore[arg-type]

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if facts.of(value) is not facts.NONE:
            self.known[n.name] = value  # type: ignore[assignment]
        return value


class _Values(fx.Interpreter):
    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        return super().call_function(aten.reshape.default if target in VIEWS else target, args, kwargs)

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        self.seen = {**getattr(self, "seen", {}), n.name: value}
        return value


def _nodes(fn: Callable, x: Tensor, eps: float, sound: bool) -> Iterator[tuple[str, xb.Interval, Tensor]]:
    """Sets of which something is known beyond the box, and the float64 values there at members of the box."""
    graph = captured_graph(fn, x).graph
    known = _Known(graph, None)
    box = xb.Interval.linf(x, eps)
    with torch.no_grad(), rd.use(rd.choose(sound, "real")):
        known.run(box, enable_io_processing=False)
    for seed in range(12):
        values = _Values(graph)
        with torch.no_grad():
            values.run(sample(box, seed, corners=seed % 2 == 0), enable_io_processing=False)
        for name, found in known.known.items():
            yield name, found, values.seen[name]


@pytest.mark.parametrize("sound", [False, True])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_facts_are_true_of_every_member(case: Case, sound: bool) -> None:
    """At every node, the gradient's included: rows within their norms, sums what they are said to be."""
    kinds = set()
    for eps in (0.0, 1e-6, case.eps, 10 * case.eps):
        for name, found, value in _nodes(case.explained, case.x, eps, sound):
            norm, total, convex = found.facts
            if norm is not None:
                dims = facts.joined(norm, value.shape)
                far = facts.length(value - found.mid, dims)
                assert (far <= norm * (1 + 1e-12) + 1e-13).all(), f"{name}: {(far - norm).max()} too far"
                kinds.add("norm")
            if total is not None:
                (dim,) = facts.joined(total, value.shape)
                assert ((value.sum(dim, keepdim=True) - total).abs() <= 1e-13).all(), name
                assert not convex or (value >= 0).all()
                kinds.add("total")
    assert kinds


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.reshape(2, 12).reshape(2, 3, 4), lambda x: x.view(6, 4), lambda x: x.view(2, 3, 2, 2),
        lambda x: x.view(3, 2, 4).transpose(1, 2), lambda x: x.permute(2, 0, 1), lambda x: x.mT.reshape(2, 12),
        lambda x: x[:, 1], lambda x: x[..., 1:3], lambda x: x.unsqueeze(1).expand(2, 5, 3, 4).reshape(10, 3, 4),
        lambda x: x.reshape(1, 2, 1, 3, 4).squeeze(2), lambda x: x.squeeze(-1), lambda x: x[:1].squeeze((0, 2)),
        lambda x: x[:, :1].squeeze(1), lambda x: x.view(2, 1, 3, 4, 1),
        lambda x: F.pad(x, (0, 0, 1, 2)), lambda x: F.pad(x, (1, 0, -1, 2)), lambda x: F.pad(x, (0, -1), value=2.0),
        lambda x: F.pad(x[..., :1], (1, 1)), lambda x: F.pad(x, (0, 0, 1, 0), value=3.0),
        lambda x: x.roll((1, 2), (1, 2)), lambda x: x.roll(1, 0), lambda x: x.roll(5),
        lambda x: torch.cat([x, 2 * x], 1), lambda x: torch.cat([x, x[..., :1], torch.ones(2, 3, 2)], -1),
        lambda x: torch.cat([x[:1], x[:1] - x[1:]], 0), lambda x: torch.cat([x[..., :1], x], 2),
        lambda x: x.split(1, 1)[1], lambda x: x.split([1, 3], -1)[1], lambda x: x.unbind(1)[2],
        lambda x: x.unbind(-1)[1],
    ],
)  # fmt: skip
@pytest.mark.parametrize("of", [lambda x: x.softmax(-1), norm], ids=["sums", "norms"])
def test_views_keep_what_they_can(view: Callable, of: Callable) -> None:
    """Whatever a view does to rows, what is still said of them is true."""
    for name, found, value in _nodes(lambda x: view(of(x)), rand(2, 3, 4), 0.1, False):
        norm, total, _ = found.facts
        if norm is not None:
            far = facts.length(value - found.mid, facts.joined(norm, value.shape))
            assert (far <= norm + 1e-12).all(), name
        if total is not None:
            (dim,) = facts.joined(total, value.shape)
            assert ((value.sum(dim, keepdim=True) - total).abs() < 1e-12).all(), name


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (5, 5), (40, 12), (12, 40)])
def test_the_spectral_norm_is_bounded_from_above(shape: tuple[int, int]) -> None:
    for weight in (rand(*shape), 1e-200 * rand(*shape), 1e100 * rand(*shape), torch.zeros(shape).double()):
        with rd.use(rd.Rounding.OUTWARD):
            found = facts.spectral_norm(weight)
        exact = torch.linalg.matrix_norm(weight, 2)
        assert exact <= found <= 1.25 * exact + 1e-300
    for diagonal in (torch.eye(40).double(), torch.diag(rand(40).abs())):  # the worst, and a common case
        exact = torch.linalg.matrix_norm(diagonal, 2)
        assert exact <= facts.spectral_norm(diagonal) <= 40 ** (1 / 32) * exact * (1 + 1e-9)


def test_a_weighted_mean_stays_between_what_it_weighs() -> None:
    """Scores of which nothing is known: p·v lies in the hull of v, and of equal rows it is that row."""
    scores = xb.Interval.linf(rand(2, 4, 5), 50.0)
    values = xb.Interval.of(100 + rand(2, 5, 3), 0.1 * rand(2, 5, 3, seed=1).abs())
    bounds = xb.bound(lambda s, v: s.softmax(-1) @ v)(scores, values)
    assert (bounds.lower >= values.lower.amin(1, keepdim=True) - 1e-9).all()
    assert (bounds.upper <= values.upper.amax(1, keepdim=True) + 1e-9).all()
    same = xb.Interval.point(rand(2, 1, 3).expand(2, 5, 3))
    assert xb.bound(lambda s, v: s.softmax(-1) @ v)(scores, same).rad.max() < 1e-12


def test_a_shift_of_the_values_does_not_widen_their_mean() -> None:
    """Rump's product alone would be as wide as the shift."""
    scores, values = xb.Interval.linf(rand(4, 5), 0.1), xb.Interval.linf(rand(5, 3), 0.1)
    bounded = xb.bound(lambda s, v: s.softmax(-1) @ v)
    bounds, shifted = bounded(scores, values), bounded(scores, xb.Interval.of(values.mid + 1e6, values.rad))
    assert torch.allclose(bounds.rad, shifted.rad, atol=1e-8)
    assert torch.allclose(bounds.mid + 1e6, shifted.mid, rtol=0, atol=1e-8)


def test_a_shift_of_the_gradient_does_not_widen_that_of_the_scores() -> None:
    p = xb.Interval.linf(rand(4, 5), 0.1)

    def backward(x: Tensor, g: Tensor) -> Tensor:
        return aten._softmax_backward_data(g, x.softmax(-1), -1, x.dtype)

    g = xb.Interval.linf(rand(4, 5, seed=1), 0.1)
    bounds, shifted = (xb.bound(backward)(p, xb.Interval.of(g.mid + by, g.rad)) for by in (0, 1e6))
    assert torch.allclose(bounds.rad, shifted.rad, atol=1e-8)
    wide = xb.bound(backward)(xb.Interval.linf(rand(4, 5), 50.0), g)
    spread = g.upper.amax(1, keepdim=True) - g.lower.amin(1, keepdim=True)
    assert (wide.rad <= spread / 4 + 1e-12).all()  # p(1 − p) ≤ 1/4


def test_norms_pay_behind_wide_layers() -> None:
    """Two layers of 64 features behind a norm: a box alone is wider by about half of √64 for the second one."""
    first, second = rand(64, 64, seed=1) / 8, rand(64, 64, seed=2) / 8
    box = xb.Interval.linf(rand(4, 64), 1e-3)
    bounds = xb.bound(lambda x: norm(x) @ first @ second)(box)
    rows = xb.bound(norm)(box)
    assert bounds.rad.mean() < 0.5 * (rows.rad @ first.abs() @ second.abs()).mean()


@pytest.mark.parametrize("sound", [False, True])
@pytest.mark.parametrize(
    "moved",
    [
        lambda x: F.pad(x, (0, 0, 0, 2))[:, :3], lambda x: x.roll(1, 1).roll(-1, 1), lambda x: x.split(2, 1)[0],
        lambda x: x.unbind(1)[0], lambda x: torch.cat([x, x], 1),
    ],
    ids=["pad", "roll", "split", "unbind", "cat"],
)  # fmt: skip
def test_lengths_survive_what_moves_rows(moved: Callable, sound: bool) -> None:
    """The windows of a Swin transformer are padded and rolled before the linear layers that need the length."""
    wide, narrow = rand(24, 48, seed=5), rand(48, 24, seed=6)
    box = xb.Interval.linf(rand(2, 3, 24), 1e-4)
    of = xb.bound(lambda x: moved((norm(x @ wide) @ narrow) @ wide), sound=sound)(box)
    through = xb.bound(lambda x: moved(norm(x @ wide) @ narrow) @ wide, sound=sound)(box)
    assert through.rad.mean() < 1.001 * of.rad.mean()


def test_float32_evaluations_do_without() -> None:
    graph = captured_graph(lambda x: x.softmax(-1), rand(2, 3).float()).graph
    known = _Known(graph, None)
    with rd.use(rd.choose(True, "float32")):
        known.run(xb.Interval.linf(rand(2, 3).float(), 0.1), enable_io_processing=False)
    assert not known.known


def test_slopes_and_curvatures_are_no_greater_than_assumed() -> None:
    x = torch.linspace(-12, 12, 200001, dtype=torch.float64).requires_grad_()
    functions: dict[Any, list[Callable[[Tensor], Tensor]]] = {
        aten.gelu.default: [F.gelu, lambda x: F.gelu(x, approximate="tanh")], aten.silu.default: [F.silu],
        aten.tanh.default: [torch.tanh], aten.sigmoid.default: [torch.sigmoid], aten.relu.default: [F.relu],
    }  # fmt: skip
    assert functions.keys() == facts._SLOPES.keys()
    curved = {aten.gelu.default: aten.gelu_backward.default, aten.silu.default: aten.silu_backward.default}
    for op, variants in functions.items():
        for fn in variants:
            (slope,) = torch.autograd.grad(fn(x).sum(), x, create_graph=True)
            assert slope.abs().max() <= facts._SLOPES[op]
            if op in curved:
                (curvature,) = torch.autograd.grad(slope.sum(), x)
                assert slope.abs().max() <= facts._CURVATURES[curved[op]][0]
                assert curvature.abs().max() <= facts._CURVATURES[curved[op]][1]


@pytest.mark.parametrize(("n", "dtype"), [(2048, torch.float32), (2048, torch.bfloat16), (64, torch.float16)])
def test_the_spectral_norm_of_a_flat_spectrum_does_not_underflow(n: int, dtype: torch.dtype) -> None:
    """Its trace is n times its greatest eigenvalue, and n⁻⁸ is less than narrow dtypes hold."""
    found = float(facts.spectral_norm(torch.eye(n, dtype=dtype)))
    assert 0.99 <= found <= 1.01 * n ** (1 / 32)


def test_norms_are_kept_from_underflow_behind_wide_layers() -> None:
    """Orthogonal layers of 1024 features in float32: what a member does, the bounds contain."""
    box = xb.Interval.linf(rand(1, 1024).float(), 0.1)
    permuted = torch.eye(1024).flip(0)
    bounds = xb.bound(lambda x: norm(x) @ permuted @ permuted @ permuted)(box)
    value = norm(sample(box, 0, corners=True)) @ permuted.double()
    assert (bounds.rad > 1e-3).all() and (value - bounds.mid).abs().le(bounds.rad * (1 + 1e-5) + 1e-6).all()


VECTORS: list[tuple[Callable, tuple[int, ...]]] = [
    (lambda x: x.softmax(-1) @ V[:6, 0], (4, 6)), (lambda x: norm(x) @ V[:6, 0], (4, 6)),
    (lambda x: V[:, :6] @ x.softmax(-1), (6,)), (lambda x: V[:, :6] @ norm(x), (6,)),
    (lambda x: x.softmax(-1) @ V[0], (6,)), (lambda x: norm(x) @ norm(x), (6,)),
    (lambda x: norm(x.t()).t() @ V[:6, 0], (4, 6)), (lambda x: norm(x) @ norm(x)[0], (4, 6)),
]  # fmt: skip


@pytest.mark.parametrize("sound", [False, True])
@pytest.mark.parametrize(("fn", "shape"), VECTORS)
def test_products_with_vectors(fn: Callable, shape: tuple[int, ...], sound: bool) -> None:
    box = xb.Interval.linf(rand(*shape), 0.1)
    bounds = xb.bound(fn, sound=sound)(box)
    for seed in range(4):
        value = fn(sample(box, seed, corners=True))
        assert bounds.rad.shape == bounds.mid.shape == value.shape
        assert (value - bounds.mid).abs().le(bounds.rad + 1e-12).all()


@pytest.mark.parametrize("sound", [False, True])
def test_rows_of_which_nothing_is_left(sound: bool) -> None:
    box = xb.Interval.linf(rand(4, 6), 0.1)
    assert xb.bound(lambda x: norm(x) @ W[:, :0], sound=sound)(box).shape == (4, 0)
    assert xb.bound(lambda x: norm(x)[:, :0].relu() * 2.0 + 1.0, sound=sound)(box).shape == (4, 0)


@pytest.mark.parametrize("sound", [False, True])
@pytest.mark.parametrize("constant", [False, True], ids=["rows", "constant rows"])
@pytest.mark.parametrize("zero", [False, True], ids=["weights", "zero weights"])
def test_derivatives_are_finite_where_lengths_are_0(sound: bool, constant: bool, zero: bool) -> None:
    """Padding, layers that start at 0, radius 0: a root has no derivative at 0, which a chosen branch must not hide."""

    def gradient(x: Tensor, w: Tensor) -> Tensor:
        x = x if x.requires_grad else x.requires_grad_()
        return torch.autograd.grad((F.gelu(norm(x) @ w) @ w.mT).softmax(-1)[:, 0].sum(), x, create_graph=True)[0]

    weight = (torch.zeros_like(W) if zero else W.clone()).requires_grad_()
    for eps in (0.0, 1e-3):
        mid = (torch.ones(3, 6).double() if constant else rand(3, 6)).requires_grad_()
        rad = torch.full_like(mid, eps).requires_grad_()
        for fn in (lambda x, w: norm(x) @ w @ w.mT, gradient):
            bounds = xb.bound(fn, sound=sound)(xb.Interval.of(mid, rad), weight)
            slopes = torch.autograd.grad(bounds.rad.sum() + bounds.mid.sum(), (mid, rad, weight), allow_unused=True)
            assert all(slope is None or slope.isfinite().all() for slope in slopes)


def test_probabilities_sum_over_the_dimension_of_their_backward_side_or_nothing_follows() -> None:
    def backward(x: Tensor, g: Tensor) -> Tensor:
        return aten._softmax_backward_data(g, x.softmax(0), 1, x.dtype)

    box, g = xb.Interval.linf(rand(4, 5), 0.1), rand(4, 5, seed=1)
    bounds = xb.bound(backward, sound=True)(box, g)
    for seed in range(4):
        value = backward(sample(box, seed, corners=True), g)
        assert bounds.contains(value).all()
