"""How wide the bounds are along a captured graph: which layer makes them so.

The graph is run with the rules as ``program`` runs it, one operator after the other and not fused. Of each set only a
few numbers are kept: the program that computes them is traced, so that its tensors live as long as they are read.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from pyxai_bounds.capture import is_backward, layer_of, remove_unused, source_of
from pyxai_bounds.interpreter import Interpreter
from pyxai_bounds.interval import Interval
from pyxai_bounds.memory import is_view
from pyxai_bounds.parameters import ParameterBox
from pyxai_bounds.rules.complex import Complex
from pyxai_bounds.rules.registry import Indices, Truth

aten = torch.ops.aten


@dataclass(frozen=True)
class Row:
    """One operator's bounds, or those that a layer ends with, over all samples and entries.

    mid, rad: the means of |midpoint| and of the radius. width: relative, rad / mid; infinite where all midpoints are 0,
    or bounds are not finite. growth: width over the largest one among what it was computed from, in a backward pass
    among the gradients; None where there is none, or it is infinite. unstable: the share of entries whose box holds a
    kink of the operator (ReLU: either sign), or for which a choice is not known; None for operators without. unbounded:
    the share of entries without finite bounds, which makes rad and width infinite.
    """

    number: int  # of the operator, in the order of the graph
    backward: bool
    layer: str  # its path in the model; where no layer was running, the user's line
    operator: str
    shape: tuple[int, ...]
    mid: float
    rad: float
    growth: float | None
    unstable: float | None
    unbounded: float
    source: str

    @property
    def width(self) -> float:
        return _relative(self)


@dataclass(frozen=True, repr=False)
class Widths:
    """What :meth:`BoundFunction.widths` returns. ``print`` shows a table of the layers.

    operators: a row for each operator whose value is a set, but for those that only move numbers. layers: the same,
    with the operators of one call of a layer, or of one line of code, as one row, which names the one that widens most.
    """

    operators: tuple[Row, ...]
    layers: tuple[Row, ...]

    @property
    def unbounded(self) -> Row | None:
        """The first operator without finite bounds."""
        return next((row for row in self.operators if row.unbounded), None)

    def worst(self, count: int = 3) -> list[Row]:
        """The layers that widen most, the worst first: the one that loses finite bounds, then by growth."""
        rows = [row for row in self.layers if row.growth is not None and row.growth > 1 and not math.isnan(row.growth)]
        return sorted(rows, key=lambda row: -row.growth)[:count]  # type: ignore[operator]

    def __repr__(self) -> str:
        head = ("", "layer", "operator", "shape", "|mid|", "radius", "width", "growth", "unstable")
        lines: list[tuple[str, ...]] = [head]
        marked = {row.number for row in self.worst()}
        for backward, rows in groupby(self.layers, key=lambda row: row.backward):
            lines.append(("", "— backward —" if backward else "— forward —", *[""] * 7))
            lines += [_cells(row, row.number in marked) for row in rows]
        columns = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = []
        for line in lines:
            left = [cell.ljust(size) for cell, size in zip(line[:4], columns[:4], strict=True)]
            right = [cell.rjust(size) for cell, size in zip(line[4:], columns[4:], strict=True)]
            text.append("  ".join([*left, *right]).rstrip())
        text.append("width = radius / |mid|; growth = width / the largest width that went in; ▶ where it grows most")
        if (first := self.unbounded) is not None:
            text.append(
                f"First without finite bounds: {first.operator} ({first.unbounded:.1%} of it), at {first.source}"
            )
        return "\n".join(text)


def _cells(row: Row, marked: bool) -> tuple[str, ...]:
    layer = row.layer if len(row.layer) <= 56 else f"…{row.layer[-55:]}"
    growth = "" if row.growth is None else f"{row.growth:.3g}"
    unstable = "" if row.unstable is None else f"{row.unstable:.1%}"
    numbers = (f"{row.mid:.3g}", f"{row.rad:.3g}", f"{row.width:.3g}", growth, unstable)
    return ("▶" if marked else "", layer, row.operator, "×".join(map(str, row.shape)), *numbers)


class Meter:
    """The program that measures sets of certain shapes: what was traced of a :class:`Measuring` interpreter."""

    def __init__(self, measuring: Measuring, program: fx.GraphModule) -> None:
        self._nodes, self._program = measuring.nodes, program
        remove_unused(program.graph)

    def __call__(self, tensors: list[Tensor]) -> Widths:
        measured = self._program(*tensors)
        values = torch.stack(list(measured)).tolist() if measured else []
        found = {node: _Measures(*numbers) for node, numbers in zip(self._nodes, values, strict=True)}
        rows, layers = [], []
        for _, group in groupby(found, key=lambda node: source_of(node) if node.op == "call_function" else node):
            nodes = list(group)
            shown = [node for node in nodes if _is_shown(node) and not found[node].choice]
            if shown:
                rows += [_row([node], [node], found) for node in shown]
                layers.append(_row(shown, nodes, found))
        return Widths(tuple(rows), tuple(layers))


def _row(shown: list[fx.Node], nodes: list[fx.Node], found: dict[fx.Node, _Measures]) -> Row:
    """Of operators in a row, those among them that are shown."""
    last, own = shown[-1], found[shown[-1]]
    growths = {node: _growth(node, node.all_input_nodes, found) or 0 for node in shown}
    unstable = [share for node in shown if not math.isnan(share := found[node].unstable)]
    entering = [source for node in nodes for source in node.all_input_nodes if source not in nodes]
    return Row(
        number=list(found).index(last), backward=is_backward(last), layer=_layer(last),
        operator=_name(max(shown, key=growths.__getitem__)), shape=_shape(last), mid=own.mid, rad=own.rad,
        growth=_growth(last, entering, found), unstable=max(unstable, default=None),
        unbounded=own.unbounded, source=source_of(last),
    )  # fmt: skip


@dataclass(frozen=True)
class _Measures:
    mid: float
    rad: float
    unbounded: float
    unstable: float
    choice: float  # 1 for truth values

    @property
    def width(self) -> float:
        return _relative(self)


def _relative(of: Row | _Measures) -> float:
    if of.unbounded:
        return math.inf
    return of.rad / of.mid if of.mid else math.inf if of.rad else 0.0


class Measuring(Interpreter):
    """Returns a few numbers of every set that it meets, instead of the results."""

    def __init__(self, graph: fx.GraphModule, parameters: ParameterBox | None) -> None:
        super().__init__(graph, parameters)
        self.nodes: list[fx.Node] = []
        self.measured: list[Tensor] = []

    def run_flat(self, flat: tuple[Tensor, ...], kinds: list[bool]) -> list[Tensor]:
        super().run_flat(flat, kinds)
        return self.measured

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op != "output" and (value := _set_in(result)) is not None and value.mid.numel():
            self.nodes.append(n)
            self.measured.append(self._measure(n, value))
        return result

    def _measure(self, n: fx.Node, value: Interval) -> Tensor:
        mid, rad = value.mid, value.rad
        mid = mid if mid.is_floating_point() else mid.double()
        unstable = self._unstable(n)
        size = mid.abs().mean(dtype=torch.float64)
        numbers = [
            size,
            rad.mean(dtype=torch.float64),
            1 - (mid + rad).isfinite().mean(dtype=torch.float64),
            torch.full_like(size, math.nan) if unstable is None else unstable,
            torch.full_like(size, float(isinstance(value, Truth))),
        ]
        return torch.stack(numbers)

    def _unstable(self, n: fx.Node) -> Tensor | None:
        place, kinks = _KINKS.get(n.target, (0, ()))
        if n.target is aten.where.self:
            condition = self.env[n.args[0]]  # type: ignore[index]
            return (condition.rad > 0).mean(dtype=torch.float64) if isinstance(condition, Interval) else None
        if not kinks or not isinstance(n.args[place], fx.Node):
            return None
        x = self.env[n.args[place]]  # type: ignore[index]
        points = [_argument(n, kink) if isinstance(kink, int) else kink for kink in kinks]
        points = [point for point in points if isinstance(point, (int, float))]
        if not isinstance(x, Interval) or not points:
            return None
        lower, upper = x.mid - x.rad, x.mid + x.rad
        inside = torch.stack([(lower <= kink) & (upper > kink) for kink in points]).any(0)
        return inside.mean(dtype=torch.float64)


def _argument(n: fx.Node, place: int) -> Any:
    schema = n.target._schema  # type: ignore[union-attr]
    return n.args[place] if place < len(n.args) else schema.arguments[place].default_value


# Where operators bend: the argument that is compared, and with what; an integer is the place of an argument.
_KINKS: dict[Any, tuple[int, tuple[int | float, ...]]] = {
    aten.relu.default: (0, (0.0,)),
    aten.threshold_backward.default: (1, (2,)),
    aten.threshold.default: (0, (1,)),
    aten.leaky_relu.default: (0, (0.0,)),
    aten.leaky_relu_backward.default: (1, (0.0,)),
    aten._prelu_kernel.default: (0, (0.0,)),
    aten._prelu_kernel_backward.default: (1, (0.0,)),
    aten.abs.default: (0, (0.0,)),
    aten.sign.default: (0, (0.0,)),
    aten.hardtanh.default: (0, (1, 2)),
    aten.hardtanh_backward.default: (1, (2, 3)),
    aten.clamp.default: (0, (1, 2)),
    aten.clamp_min.default: (0, (1,)),
    aten.clamp_max.default: (0, (1,)),
    aten.hardswish.default: (0, (-3.0, 3.0)),
    aten.hardswish_backward.default: (1, (-3.0, 3.0)),
    aten.hardsigmoid.default: (0, (-3.0, 3.0)),
    aten.hardsigmoid_backward.default: (1, (-3.0, 3.0)),
}

# What shows the numbers that it is given, as views do.
_COPIES = (aten._unsafe_view.default, aten.clone.default, aten._to_copy.default, aten.neg.default, operator.getitem)


def _is_shown(node: fx.Node) -> bool:
    """Is it an argument, or an operator that does more than show numbers that it is given?"""
    if node.op == "call_function":
        return node.target not in _COPIES and not is_view(node)
    return node.op == "placeholder"


def _set_in(result: Any) -> Interval | None:
    """The set that an operator returns, the first of several; places have no width."""
    for leaf in pytree.tree_leaves(result):
        if isinstance(leaf, Complex):
            return leaf.real
        if isinstance(leaf, Interval) and not isinstance(leaf, Indices):
            return leaf
    return None


def _growth(node: fx.Node, given: Iterable[fx.Node], found: dict[fx.Node, _Measures]) -> float | None:
    """In a backward pass over what comes from it, the gradient, and not over the values of the forward pass."""
    sets = [source for source in given if source in found and not found[source].choice]
    before = [source for source in sets if is_backward(source) == is_backward(node)] or sets
    if not before or math.isinf(widest := max(found[source].width for source in before)):
        return None
    if widest == 0:
        return math.inf if found[node].width else None
    return found[node].width / widest


def _layer(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "input"
    if path := layer_of(node):
        return path
    place, _, code = source_of(node).removeprefix("the backward pass of ").partition(": ")
    return f"{Path(place).name}: {code}" if code else place


def _name(node: fx.Node) -> str:
    target = node.target
    return target._schema.name.split("::")[-1] if isinstance(target, torch._ops.OpOverload) else ""


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta["val"]
    first = next((v for v in value if isinstance(v, Tensor)), None) if isinstance(value, (list, tuple)) else value
    return tuple(first.shape) if isinstance(first, Tensor) else ()


__all__ = ["Measuring", "Meter", "Row", "Widths"]
