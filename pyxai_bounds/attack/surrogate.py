"""A smooth twin of a captured program: ReLU and its like become softplus, on the way forward and on the way back.

The gradient explanation of a ReLU network is piecewise constant in the input, so its own gradient is zero almost
everywhere and says nothing about where to go. Only attacks use the twin; what they find is judged by the program.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import get_decompositions

from pyxai_bounds.fuse import VIEWS
from pyxai_bounds.program import captured_graph

aten = torch.ops.aten

# Operators without a derivative, in the parts that have one; who asks for derivatives that can be differentiated
# (create_graph=True) captures other operators than who does not, as Captum does not.
_IN_PARTS = get_decompositions(
    [
        aten.silu_backward.default, aten.mish_backward.default, aten.logit_backward.default,
        aten.native_group_norm_backward.default, aten.slice_scatter.default,
    ]
) | {aten.copy.default: lambda held, new, *_: new.to(held).expand_as(held)}  # fmt: skip


def smooth(fn: Callable[..., Tensor], *args: Any, beta: float = 100.0) -> Callable[..., Tensor]:
    """``fn`` at arguments of this kind with every ReLU replaced by softplus(beta·x)/beta; differentiable in them.

    So are leaky and parametric ReLU, ReLU6 and hard sigmoid, which are sums of ReLUs.
    Source: Dombrowski et al., "Explanations can be manipulated and geometry is to blame", 2019, section 4.
    """
    captured = captured_graph(fn, *args)
    key = ("smooth", beta)
    if key not in captured.derived:
        captured.derived[key] = smooth_graph(captured.graph, beta)
    twin = captured.derived[key]
    return lambda *tensors: twin(*tensors)[0]


def smooth_graph(program: fx.GraphModule, beta: float) -> fx.GraphModule:
    """A copy of a captured graph with its ReLUs replaced, as :func:`smooth` does, which can be differentiated."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in VIEWS:  # derivatives of the twin need not have the layout that was captured
            node.target = aten.reshape.default
        node.target = _IN_PARTS.get(node.target, node.target)
        with graph.inserting_before(node):
            new = _replacement(graph, node, beta)
        if new is not None:
            node.replace_all_uses_with(new)
    return fx.GraphModule(program, graph)


def _replacement(graph: fx.Graph, node: fx.Node, beta: float) -> fx.Node | None:
    values: tuple[Any, ...] = node.args

    def call(target: Any, *args: Any) -> fx.Node:
        return graph.call_function(target, args)

    def smoothed(x: Any, kink: Any = 0) -> fx.Node:
        return call(aten.softplus.default, call(aten.sub.Tensor, x, kink) if kink else x, beta)

    def slope(x: Any, kink: Any = 0) -> fx.Node:
        return call(aten.sigmoid.default, call(aten.mul.Tensor, call(aten.sub.Tensor, x, kink) if kink else x, beta))

    def bent(x: Any, negative: Any) -> fx.Node:
        """Leaky ReLU: ReLU(x) − negative·ReLU(−x)."""
        below = call(aten.mul.Tensor, smoothed(call(aten.neg.default, x)), negative)
        return call(aten.sub.Tensor, smoothed(x), below)

    def bent_slope(x: Any, negative: Any) -> fx.Node:
        below = call(aten.mul.Tensor, slope(call(aten.neg.default, x)), negative)
        return call(aten.add.Tensor, slope(x), below)

    if node.target is aten.relu.default:
        relu = smoothed(values[0])
        relu.meta["relu_input"] = values[0]
        return relu
    if node.target is aten.threshold_backward.default and "relu_input" in getattr(values[1], "meta", {}):
        return call(aten.mul.Tensor, values[0], slope(values[1].meta["relu_input"]))
    if node.target is aten.leaky_relu.default:
        return bent(values[0], values[1] if len(values) > 1 else 0.01)
    if node.target is aten._prelu_kernel.default:
        return bent(values[0], values[1])
    if node.target is aten.leaky_relu_backward.default and not values[3]:
        return call(aten.mul.Tensor, values[0], bent_slope(values[1], values[2]))
    if node.target is operator.getitem and values[1] == 0 and values[0].target is aten._prelu_kernel_backward.default:
        grad, x, negative = values[0].args
        return call(aten.mul.Tensor, grad, bent_slope(x, negative))
    if node.target is aten.hardtanh.default:
        x, limits = values[0], values[1:]
        lower, upper = limits + (-1.0, 1.0)[len(limits) :]
        if math.isinf(upper - lower):
            return None
        return call(aten.add.Tensor, call(aten.sub.Tensor, smoothed(x, lower), smoothed(x, upper)), lower)
    if node.target is aten.hardtanh_backward.default:
        grad, x, lower, upper = values
        if math.isinf(upper - lower):
            return None
        return call(aten.mul.Tensor, grad, call(aten.sub.Tensor, slope(x, lower), slope(x, upper)))
    if node.target is aten.hardsigmoid.default:
        return call(aten.div.Tensor, call(aten.sub.Tensor, smoothed(values[0], -3), smoothed(values[0], 3)), 6)
    if node.target is aten.hardsigmoid_backward.default:
        inner = call(aten.sub.Tensor, slope(values[1], -3), slope(values[1], 3))
        return call(aten.mul.Tensor, values[0], call(aten.div.Tensor, inner, 6))
    return None
