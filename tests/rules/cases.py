"""What every test of a rule does: bound a small function that uses the operator, and its gradient, against autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._ops import OpOverload

import pyxai_bounds as xb
from pyxai_bounds.program import captured_graph
from pyxai_bounds.rules import RULES
from tests.networks import SLACK, sample

aten = torch.ops.aten
# The files of rules: pyxai_bounds/rules/NAME.py with tests/rules/test_NAME.py, whose CASES use them.
MODULES = (
    "linear",
    "conv",
    "activation",
    "pool",
    "norm",
    "elementwise",
    "functions",
    "remainder",
    "logic",
    "ranks",
    "reduce",
    "shape",
    "softmax",
    "solve",
    "complex",
)


def rand(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float64 numbers, the same ones on every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass
class Case:
    """A function of one tensor that uses an operator, and the box to bound it on."""

    name: str
    fn: Callable[[Tensor], Tensor]
    x: Tensor
    eps: float = 0.3
    gradient: bool = True  # bound the gradient of a nonlinear scalar of the result, too
    kinks: bool = True  # is the function defined at zeros, ones and whole numbers?
    finite: bool = True  # must the bounds be finite?
    nan: bool = True  # does the function return at NaN at all? Some of LAPACK's do not

    def __str__(self) -> str:
        return self.name

    def explained(self, x: Tensor) -> tuple[Tensor, ...]:
        """The value, and the gradient of Σ weight · tanh(value)."""
        if not self.gradient:
            return (self.fn(x),)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = self.fn(x)
            score = (weights(value.shape) * torch.tanh(value)).sum()
            return value, torch.autograd.grad(score, x)[0]


def on_positive(name: str, fn: Callable[[Tensor], Tensor]) -> Case:
    """A function that is defined on positive numbers alone."""
    return Case(name, fn, rand(3, 4).abs() + 0.5, kinks=False)


def weights(shape: Any) -> Tensor:
    """Fixed factors of both signs, never 0."""
    count = torch.Size(shape).numel()
    return torch.linspace(-1.3, 1.7, count + 1, dtype=torch.float64)[:count].reshape(shape)


def case_id(case: Any) -> str:
    return str(case)


# --- assertions ----------------------------------------------------------------------------------------------


def assert_encloses(bounds: xb.Interval, value: Tensor) -> None:
    """Every component lies between its bounds, but for rounding; a bound that is not finite encloses everything."""
    value = value.detach()
    assert bounds.shape == value.shape and bounds.dtype == value.dtype
    known = bounds.isfinite()
    if not known.any():
        return
    scale = torch.linalg.vector_norm(value[known]) + 1e-3 * bounds.rad[known].max()
    margin = SLACK * scale.nan_to_num(nan=0.0) + 1e-15
    inside = (value >= bounds.lower - margin) & (value <= bounds.upper + margin)
    wrong = known & ~inside
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} components lie outside, first at {wrong.nonzero()[0].tolist()}: "
        f"{value[wrong][0].item()} not in [{bounds.lower[wrong][0].item()}, {bounds.upper[wrong][0].item()}]"
    )


def assert_monotone_in_eps(inner: xb.Interval, outer: xb.Interval) -> None:
    """The bounds of a sub-box lie inside the bounds of the box."""
    known = outer.isfinite()
    assert inner.isfinite()[known].all()
    assert (outer.rad >= 0)[known].all() and (inner.rad >= 0)[known].all()
    margin = 1e-12 * (outer.mid.abs() + outer.rad)[known].max().clamp(min=1e-3) if known.any() else 0
    assert (inner.lower >= outer.lower - margin)[known].all() and (inner.upper <= outer.upper + margin)[known].all()


def assert_exact_at_zero_radius(case: Case, x: Tensor) -> None:
    """A box of radius 0 gives back the function's value, and no width: autograd's conventions at kinks included."""
    for bounds, value in zip(xb.bound(case.explained)(xb.Interval.point(x)), case.explained(x), strict=True):
        value = value.detach()
        tolerance = 1e-12 * value.abs().max().clamp(min=1e-2)
        assert bounds.dtype == value.dtype
        assert (bounds.mid - value).abs().max() <= tolerance, f"off by {(bounds.mid - value).abs().max():.3g}"
        assert bounds.rad.max() <= tolerance, f"a point has the radius {bounds.rad.max():.3g}"


def assert_nan_is_not_hidden(case: Case) -> None:
    """An element that is NaN may be anything: where bounds stay finite, they hold whatever stands in its place."""
    chosen = torch.zeros_like(case.x, dtype=torch.bool)
    chosen[tuple(size // 2 for size in case.x.shape)] = True
    unknown = case.x.masked_fill(chosen, float("nan"))
    for replacement in (float("nan"), -3.0, 5.0):
        filled = case.x.masked_fill(chosen, replacement)
        box = xb.Interval.of(unknown, torch.zeros_like(unknown))
        for bounds, value in zip(xb.bound(case.explained)(box), case.explained(filled), strict=True):
            assert_encloses(bounds.detach(), value)
            assert not (value.isnan() & bounds.isfinite()).any()


def check(case: Case) -> None:
    """Enclosure at samples and corners, exactness at radius 0, monotonicity in eps, NaN."""
    kinks = [case.x.round(), torch.zeros_like(case.x), torch.ones_like(case.x)] if case.kinks else []
    bounded = xb.bound(case.explained)
    for x in (case.x, *kinks):
        assert_exact_at_zero_radius(case, x)
    for x in (case.x, *kinks[:2]):
        box = xb.Interval.linf(x, case.eps)
        outer = [bounds.detach() for bounds in bounded(box)]
        if case.finite:
            assert all(bounds.isfinite().all() for bounds in outer)
        for seed in range(10):
            for bounds, value in zip(outer, case.explained(sample(box, seed, corners=seed % 2 == 0)), strict=True):
                assert_encloses(bounds, value)
        shifted = xb.Interval.linf(sample(xb.Interval.linf(x, case.eps / 2), 99, corners=True), case.eps / 2)
        for inner, bounds in zip(bounded(shifted), outer, strict=True):
            assert_monotone_in_eps(inner.detach(), bounds)
    if case.nan:
        assert_nan_is_not_hidden(case)


# --- tightness -----------------------------------------------------------------------------------------------


def intervals(low: float, high: float, count: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Mid-points and radii of intervals inside [low, high]: wide and narrow ones, anywhere, and the whole."""
    ends = torch.rand(2, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ends = low + (high - low) * ends
    ends[1, count // 2 :] = ends[0, count // 2 :] + 0.02 * (high - ends[0, count // 2 :])
    ends[:, 0] = torch.tensor([low, high])
    lower, upper = ends.min(0).values, ends.max(0).values
    return (lower + upper) / 2, (upper - lower) / 2


def assert_elementwise_ranges_are_exact(
    fn: Callable[[Tensor], Tensor], low: float = -4.0, high: float = 4.0, tolerance: float = 1e-3, slope: bool = True
) -> None:
    """The bounds of φ and φ′ over many intervals equal their densely sampled ranges."""

    def both(x: Tensor) -> tuple[Tensor, ...]:
        if not slope:
            return (fn(x),)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = fn(x)
            return value, torch.autograd.grad(value.sum(), x)[0]

    mid, rad = intervals(low, high)
    positions = torch.linspace(-1, 1, 4001, dtype=torch.float64).unsqueeze(1)
    dense = both((mid + positions * rad).flatten())
    for name, bounds, values in zip(("φ", "φ′"), xb.bound(both)(xb.Interval.of(mid, rad)), dense, strict=False):
        values = values.detach().reshape(4001, -1)
        least, greatest = values.min(0).values, values.max(0).values
        scale = (greatest - least).max().clamp(min=1)
        assert (bounds.lower <= least + 1e-12 * scale).all(), f"{name}: the lower bound is too high"
        assert (bounds.upper >= greatest - 1e-12 * scale).all(), f"{name}: the upper bound is too low"
        assert (bounds.lower >= least - tolerance * scale).all(), f"{name}: the lower bound is too low"
        assert (bounds.upper <= greatest + tolerance * scale).all(), f"{name}: the upper bound is too high"


# --- rules that no captured graph reaches --------------------------------------------------------------------


@dataclass
class Direct:
    """A call of a rule itself, for operators that tracing decomposes or that a composite hides."""

    op: OpOverload
    args: tuple  # with Intervals
    kwargs: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return self.op.name()


def check_direct(case: Direct) -> None:
    """The rule's bounds contain the operator's value at samples; a rule that uses shapes alone takes no set."""
    rule = RULES[case.op]
    args, kwargs = case.args, case.kwargs
    if not rule.takes_sets(args, kwargs):
        used = [arg for i, arg in enumerate(args) if i not in rule.shape_only]
        assert not any(isinstance(arg, xb.Interval) for arg in pytree.tree_leaves(used))
        return
    bounds = pytree.tree_leaves(rule.function(*args, **kwargs))
    for seed in range(10):
        point = pytree.tree_map_only(xb.Interval, lambda s, seed=seed: sample(s, seed, corners=seed % 2 == 0), args)
        for b, value in zip(bounds, pytree.tree_leaves(case.op(*point, **kwargs)), strict=True):
            if isinstance(b, xb.Interval):
                assert_encloses(b, value)
    point = pytree.tree_map_only(xb.Interval, lambda s: s.mid, args)
    exact = pytree.tree_map_only(xb.Interval, lambda s: xb.Interval.point(s.mid), args)
    for b, value in zip(
        pytree.tree_leaves(rule.function(*exact, **kwargs)), pytree.tree_leaves(case.op(*point, **kwargs)), strict=True
    ):
        if isinstance(b, xb.Interval):
            assert (b.mid - value).abs().max() <= 1e-12 and b.rad.max() <= 1e-12


# --- coverage ------------------------------------------------------------------------------------------------


def operators_on_sets(case: Case) -> set[Any]:
    """The operators of the captured graph that see a value which depends on the box."""
    graph: fx.GraphModule = captured_graph(case.explained, case.x).graph
    sets: set[fx.Node] = set()
    operators = set()
    for node in graph.graph.nodes:
        if node.op == "placeholder" or any(argument in sets for argument in node.all_input_nodes):
            sets.add(node)
            operators.add(node.target)
    return operators
