"""A smooth twin of a captured program: ReLU becomes softplus, on the way forward and on the way back.

The gradient explanation of a ReLU network is piecewise constant in the input, so its own gradient is zero almost
everywhere and says nothing about where to go. Only attacks use the twin; what they find is judged by the program.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from pyxai_bounds.fuse import VIEWS
from pyxai_bounds.program import captured_graph

aten = torch.ops.aten


def smooth(fn: Callable[..., Tensor], *args: Any, beta: float = 100.0) -> Callable[..., Tensor]:
    """``fn`` at arguments of this kind with every ReLU replaced by softplus(beta·x)/beta; differentiable in them.

    Source: Dombrowski et al., "Explanations can be manipulated and geometry is to blame", 2019, section 4.
    """
    captured = captured_graph(fn, *args)
    key = ("smooth", beta)
    if key not in captured.derived:
        captured.derived[key] = smooth_graph(captured.graph, beta)
    twin = captured.derived[key]
    return lambda *tensors: twin(*tensors)[0]


def smooth_graph(program: fx.GraphModule, beta: float) -> fx.GraphModule:
    """A copy of a captured graph with its ReLUs replaced, as :func:`smooth` does."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in VIEWS:  # derivatives of the twin need not have the layout that was captured
            node.target = aten.reshape.default
        with graph.inserting_before(node):
            new = _replacement(graph, node, beta)
        if new is not None:
            node.replace_all_uses_with(new)
    return fx.GraphModule(program, graph)


def _replacement(graph: fx.Graph, node: fx.Node, beta: float) -> fx.Node | None:
    def call(target: Any, *args: Any) -> fx.Node:
        return graph.call_function(target, args)

    def slope(x: Any) -> fx.Node:
        return call(aten.sigmoid.default, call(aten.mul.Tensor, x, beta))

    if node.target is aten.relu.default:
        smoothed = call(aten.softplus.default, node.args[0], beta)
        smoothed.meta["relu_input"] = node.args[0]
        return smoothed
    if node.target is aten.threshold_backward.default and "relu_input" in getattr(node.args[1], "meta", {}):
        return call(aten.mul.Tensor, node.args[0], slope(node.args[1].meta["relu_input"]))  # type: ignore[union-attr]
    if node.target is aten.leaky_relu.default:
        x, negative = node.args[0], node.args[1] if len(node.args) > 1 else 0.01
        bent = call(aten.mul.Tensor, call(aten.softplus.default, x, beta), 1 - negative)  # type: ignore[operator]
        return call(aten.add.Tensor, bent, call(aten.mul.Tensor, x, negative))
    if node.target is aten.leaky_relu_backward.default and not node.args[3]:
        grad, x, negative = node.args[:3]
        bent = call(aten.mul.Tensor, slope(x), 1 - negative)  # type: ignore[operator]
        return call(aten.mul.Tensor, grad, call(aten.add.Tensor, bent, negative))
    return None
