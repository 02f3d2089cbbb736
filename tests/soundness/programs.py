"""One program in two precisions: float32 to be bounded, float64 as the oracle, of the same stored numbers.

Constants are folded and rounded to float32 first, so that both programs hold the same ones; Python numbers stay the
doubles that they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

import pyxai_bounds as xb
from pyxai_bounds.program import captured_graph

aten = torch.ops.aten

VIEWS = (aten.view.default, aten._unsafe_view.default)


@dataclass
class Twins:
    """A program of one tensor and its oracle; both return a list of tensors."""

    narrow: fx.GraphModule  # float32
    wide: fx.GraphModule  # float64

    def operators(self) -> set[str]:
        """The operators that are applied to what depends on the input."""
        return {
            node.target.name()
            for node in self.wide.graph.nodes
            if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
        }


class _Values(fx.Interpreter):
    """Remembers the value of every node, and which nodes depend on the first argument."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.values: dict[fx.Node, Any] = {}
        self.varying = {next(node for node in module.graph.nodes if node.op == "placeholder")}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        if any(argument in self.varying for argument in n.all_input_nodes):
            self.varying.add(n)
        return self.values[n]


def twins(fn: Callable[..., Any], *args: Tensor) -> Twins:
    """The two programs of a function, of its first argument alone; it is captured in the dtype of its arguments."""
    captured = captured_graph(fn, *args).graph
    for node in captured.graph.nodes:
        if node.target in VIEWS:
            node.target = aten.reshape.default
    captured.recompile()
    values = _Values(captured)
    values.run(*args, enable_io_processing=False)
    return Twins(_converted(captured, values, torch.float32), _converted(captured, values, torch.float64))


def _converted(module: fx.GraphModule, values: _Values, dtype: torch.dtype) -> fx.GraphModule:
    graph, holder = fx.Graph(), nn.Module()
    new: dict[fx.Node, fx.Node] = {}

    def argument(node: fx.Node) -> fx.Node:
        if node not in new:  # a constant
            value = values.values[node].detach()
            name = f"constant_{len(new)}"
            holder.register_buffer(name, value.float().to(dtype) if value.is_floating_point() else value)
            new[node] = graph.get_attr(name)
        return new[node]

    def value(x: Any) -> Any:
        return dtype if isinstance(x, torch.dtype) and x.is_floating_point else x

    for node in module.graph.nodes:
        if node.op == "output":
            results = [r for r in pytree.tree_leaves(node.args) if isinstance(r, fx.Node)]
            graph.output([argument(r) for r in results])
        elif node in values.varying:
            if node.op == "placeholder":
                new[node] = graph.placeholder(node.name)
            else:
                args, kwargs = pytree.tree_map(value, fx.map_arg((node.args, node.kwargs), argument))
                new[node] = graph.call_function(node.target, args, kwargs)
    return fx.GraphModule(holder, graph)


def outside(bounds: xb.Interval, value: Tensor) -> Tensor:
    """Which components lie outside, compared exactly, as float64 numbers. A bound that is not finite claims nothing."""
    bounds, value = bounds.detach(), value.detach().double()
    known = bounds.isfinite() & bounds.lower.isfinite() & bounds.upper.isfinite()
    return known & ~((bounds.lower.double() <= value) & (value <= bounds.upper.double()))


def members(box: xb.Interval, count: int, seed: int = 0) -> Iterator[Tensor]:
    """The midpoint, and where there are others, corners and inner points of a float32 box: exact, in float64."""
    mid, rad = box.mid.detach().double(), box.rad.detach().double()
    yield mid
    generator = torch.Generator().manual_seed(seed)
    for i in range(count if bool(rad.any()) else 0):
        position = 2 * torch.rand(mid.shape, generator=generator, dtype=torch.float64) - 1
        yield mid + rad * (position.sign() if i % 2 == 0 else position)
