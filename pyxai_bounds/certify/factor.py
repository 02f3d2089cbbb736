"""A positive factor that all entries of an explanation share, taken out: rankings, signs and angles do not see it.

The gradient of a probability p_t is p_t·(1 - p_t)·(∇z_t - Σ q_k·∇z_k), z the logits and q the softmax of those of the
other classes; the gradient of the cross entropy is -(1 - p_t) times the same vector. The factor, which moves more than
all else does, is one number for a whole sample. So for properties that ignore a scale the last softmax's backward pass,
given the gradient of one class alone, is replaced by what is left of it: e_t - q, or q - e_t. A sigmoid leaves 1.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pyxai_bounds.capture import Captured
from pyxai_bounds.certify.differences import LINEAR_AT
from pyxai_bounds.fuse import VIEWS
from pyxai_bounds.parameters import ParameterBox
from pyxai_bounds.program import captured_graph
from pyxai_bounds.rounding import without_autocast
from pyxai_bounds.rules import RULES

aten = torch.ops.aten

# Backward operators with a factor, and whose results they are given.
_FORWARD: dict[Any, Any] = {
    aten._softmax_backward_data.default: aten._softmax.default,
    aten._log_softmax_backward_data.default: aten._log_softmax.default,
    aten.sigmoid_backward.default: aten.sigmoid.default,
}
_SUMS = (aten.add.Tensor, aten.sub.Tensor, aten.cat.default, aten.stack.default)
_PASSED = (
    *(aten.abs.default, aten.relu.default, aten.amax.default, aten.mul.Scalar, aten.div.Scalar, aten.sum.default),
    *(aten.mean.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.repeat.default),
)


class Divided:
    """A captured function of a single sample without its factor: ``graph``, whose arguments :meth:`at` completes."""

    def __init__(self, whole: fx.GraphModule, node: fx.Node, arguments: Sequence[Tensor]) -> None:
        self.whole, self.node = whole, node
        value: Tensor = node.meta["val"]
        dims = whole.graph.output_node().all_input_nodes[0].meta["val"].dim()
        grad = torch.eye(value.shape[-1], dtype=value.dtype, device=arguments[0].device)[:1]
        self.graph = captured_graph(self._divided, *arguments, *_of_class(grad), grad.new_ones([1] * dims)).graph

    @classmethod
    def of(cls, captured: Captured, arguments: Sequence[Tensor], parameters: ParameterBox | None) -> Divided | None:
        """``captured``: the function of a single sample like the one in ``arguments``, [1, ...]. None where there is no
        factor, or what follows is more than a positive scale of it.
        """
        key = ("divided", None if parameters is None else frozenset(parameters.parameters()))
        if key not in captured.derived:
            try:
                node = _node_of(captured.graph, parameters)
                captured.derived[key] = None if node is None else cls(captured.graph, node, arguments)
            except Exception:  # what cannot be captured once more is bounded as it is
                captured.derived[key] = None
        return captured.derived[key]

    def _divided(self, *arguments: Tensor) -> Tensor:
        *given, others, own, spread, factor = arguments

        def direction(grad: Tensor, logits: Tensor) -> Tensor:
            return _direction(logits, others, own, spread)

        return _Replacing(self.whole, self.node, direction).run(*given)[0] * factor

    def at(self, arguments: Sequence[Tensor], nominal: Tensor) -> tuple[list[Tensor], Tensor] | None:
        """What ``graph`` takes after these arguments, the last of it the factor at these but for rounding, and what it
        then gives for ``nominal``, the explanation there, which lost more in float32: 1 - p_t cancels.

        None where it is no such product: where the gradient that the softmax is given is not that of one class.
        """
        more: list[Tensor] = []

        def direction(grad: Tensor, logits: Tensor) -> Tensor:
            if bool(grad.isfinite().all()) and int(grad.count_nonzero()) == 1:
                more.extend(_of_class(grad))
                return _direction(logits, *more)
            return grad

        with torch.no_grad(), without_autocast():
            found = _Replacing(self.whole, self.node, direction).run(*arguments)[0]
        factor = (found.double() * nominal).sum() / found.double().square().sum()
        factor = factor.to(nominal.dtype).reshape([1] * nominal.dim())
        found = found * factor
        close = (nominal - found).abs().amax() <= 0.01 * nominal.abs().amax()
        return ([*more, factor], found) if more and close and 0 < factor < torch.inf else None


class _Replacing(fx.Interpreter):
    """Runs a graph with a function of gradient and logits in the place of one backward operator."""

    def __init__(self, graph: fx.GraphModule, node: fx.Node, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.node, self.function = node, function
        self.logits: Any = node.args[1].args[0]  # type: ignore[union-attr]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        # As elsewhere, the layout may not be the one it was captured with.
        return super().call_function(aten.reshape.default if target in VIEWS else target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        if n is not self.node:
            return super().run_node(n)
        return self.function(self.env[n.args[0]], self.env[self.logits])  # type: ignore[index]


def _of_class(grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a gradient [1, K] of one class: the places of the others, ±e_t, and what spreads the others' shares."""
    order, sign = grad.abs().argsort(-1), grad.sign()
    identity = torch.eye(grad.shape[1], dtype=grad.dtype, device=grad.device)
    return order[:, :-1], sign, -sign.sum() * identity[order[:, :-1]]


def _direction(logits: Tensor, others: Tensor, own: Tensor, spread: Tensor) -> Tensor:
    """±(e_t - q); of a single number, ±1. Each argument has a row for each sample."""
    if not spread.shape[1]:
        return own.reshape(logits.shape)
    return own + torch.bmm(logits.gather(-1, others).softmax(-1).unsqueeze(1), spread).squeeze(1)


def _node_of(graph: fx.GraphModule, parameters: ParameterBox | None) -> fx.Node | None:
    """The backward operator whose factor the result has, where the gradient that it is given does not move."""
    boxed = set() if parameters is None else {id(p) for p in parameters.parameters().values()}
    moving = set(graph.graph.find_nodes(op="placeholder")[:1])
    for n in graph.graph.nodes:
        moves = n.op == "get_attr" and id(getattr(graph, str(n.target))) in boxed
        if moves or (n.op == "call_function" and not moving.isdisjoint(_sources(n))):
            moving.add(n)
        if _has_factor(n) and n.args[0] not in moving and _scales(graph.graph, n):
            return n
    return None


def _sources(n: fx.Node) -> list[fx.Node]:
    """What a node's value depends on, and not only its shape."""
    call: Any = n.args[0] if n.target is operator.getitem else n
    if call.target is aten.nll_loss_forward.default and call is not n and n.args[1] == 1:  # the weight of all targets
        return [arg for arg in call.args[1:] if isinstance(arg, fx.Node)]
    rule = RULES.get(n.target)  # type: ignore[call-overload]
    read = [arg for i, arg in enumerate(n.args) if rule is None or i not in rule.shape_only]
    nodes: list[fx.Node] = []
    fx.map_arg((read, dict(n.kwargs)), nodes.append)
    return nodes


def _has_factor(node: fx.Node) -> bool:
    """Is it the backward pass of the softmax of a single row, or of the sigmoid of a single number?"""
    forward, value = _FORWARD.get(node.target), node.args[1] if len(node.args) > 1 else None
    if forward is None or not isinstance(value, fx.Node) or value.target is not forward:
        return False
    shape = node.meta["val"].shape
    if value.target is aten.sigmoid.default:
        return shape == (1, 1)
    rows = len(shape) == 2 and shape[0] == 1 and shape[1] > 1
    return rows and node.args[2] in (1, -1) and value.args[1] in (1, -1) and not value.args[2]


def _scales(graph: fx.Graph, node: fx.Node) -> bool:
    """Is the result multiplied by a positive number where the node's is?"""
    scaled = {node}
    for n in graph.nodes:
        if n.op != "output" and not scaled.isdisjoint(n.all_input_nodes):
            if not _is_scaled(n, scaled):
                return False
            scaled.add(n)
    return scaled.issuperset(graph.output_node().all_input_nodes)


def _is_scaled(n: fx.Node, scaled: set[fx.Node]) -> bool:
    """Is this, too, multiplied by a positive number where these are?"""
    target: Any = n.target
    if target is operator.getitem:
        return True
    value = n.meta["val"]
    if isinstance(value, Tensor) and not value.is_floating_point():  # cut down to integers
        return False
    if target in _SUMS:
        terms: Any = n.args[0] if isinstance(n.args[0], (list, tuple)) else n.args[:2]
        return scaled.issuperset(terms)
    places = [i for i, arg in enumerate(n.args) if isinstance(arg, fx.Node) and arg in scaled]
    if len(places) != 1 or scaled.intersection(n.all_input_nodes) != {n.args[places[0]]}:
        return False
    if target is aten.convolution.default and n.args[2] is not None:
        return False
    # What PyTorch calls backward is linear in the gradient, its first argument.
    first = target in _PASSED or "_backward" in target.name()
    return places[0] in ((0,) if first else LINEAR_AT.get(target, ()))
