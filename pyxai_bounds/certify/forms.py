"""Affine forms of single samples for ``certify``: what they may cost, the bounds they give, and rows for rankings."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from pyxai_bounds import rounding as rd
from pyxai_bounds.certify.affine import Evaluator, Form
from pyxai_bounds.certify.differences import Box, behind
from pyxai_bounds.errors import UnsupportedOperatorError
from pyxai_bounds.interval import Interval
from pyxai_bounds.parameters import ParameterBox
from pyxai_bounds.rules.registry import Product, as_set, use_product

aten = torch.ops.aten

LARGEST = 2**25  # numbers of the generators of one value, 256 MiB
CHEAP = 2**28  # multiplications, of which a core does some 1e10 a second
PASSES = 16  # as many multiplications as an operator takes the time of for each number, moving it through memory
CHEAP_NODES = 150  # operators, each of which takes some 0.3 ms however small it is


class Forms:
    """A function of single samples, evaluated with affine forms; its parameters must not change, but in their box."""

    def __init__(
        self, graph: fx.GraphModule, rounding: rd.Rounding, product: Product, most: int, parameters: ParameterBox | None
    ) -> None:
        self.graph, self.rounding, self.product, self.most = graph, rounding, product, most
        self.parameters = parameters

    @classmethod
    def of(
        cls, graph: fx.GraphModule, rounding: rd.Rounding, product: Product, cheaply: bool,
        parameters: ParameterBox | None = None,
    ) -> Forms | None:  # fmt: skip
        """``graph``: the captured function of a single sample [1, ...]. None where forms would take too much memory
        (or, if they are to be cheap, work).
        """
        placeholders = graph.graph.find_nodes(op="placeholder")
        moving = behind(placeholders)
        values = [t for t in pytree.tree_leaves([node.meta.get("val") for node in moving]) if isinstance(t, Tensor)]
        most = LARGEST // max(1, *(t.numel() for t in values))
        if cheaply:
            if len(moving) > CHEAP_NODES:
                return None
            work = sum(map(_work, moving)) + PASSES * sum(t.numel() for t in values)
            most = min(most, CHEAP // max(1, work))
        inputs = [node.meta["val"] for node in placeholders]
        fits = 2 * sum(t.numel() for t in inputs if t.is_floating_point()) <= most
        return cls(graph, rounding, product, most, parameters) if fits else None

    def __call__(
        self, arguments: Sequence[Interval | Tensor], evaluator: Evaluator | None = None
    ) -> tuple[Interval, Form]:
        """The explanation [1, ...] over a box: its bounds, and its form. ``evaluator``: one that knows more."""
        evaluator = evaluator or Evaluator(self.graph, self.most, self.parameters)
        with contextlib.ExitStack() as stack:
            # Without cuDNN, whose convolutions may be Fourier transforms, which lose more than sums do.
            exact = torch.no_grad(), torch.backends.cudnn.flags(enabled=False), rd.without_autocast()
            for context in (*exact, rd.ieee_arithmetic(), rd.use(self.rounding), use_product(self.product)):
                stack.enter_context(context)
            bounds = as_set(evaluator.run(*arguments, enable_io_processing=False)[0])
        if evaluator.unsupported:
            raise UnsupportedOperatorError(list(dict.fromkeys(evaluator.unsupported)))
        return bounds, evaluator.operand(self.graph.graph.output_node().all_input_nodes[0])


class FormRows:
    """A form as rows, one for each element, by which the box of its symbols is multiplied, and a 1 the centre."""

    at_once: int | None = None

    def __init__(self, form: Form) -> None:
        symbols = len(form.generators)
        self.numbers = symbols + 1
        self._form = form
        ones, zero = form.slack.new_ones(symbols), form.slack.new_zeros(1)
        self.box = Box(torch.cat([0 * ones, zero + 1]), torch.cat([ones, zero]))

    def rows(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        generators = self._form.generators.flatten(1)[:, entries].T
        centre, slack = (t.flatten()[entries, None] for t in (self._form.centre, self._form.slack))
        return torch.cat([generators, centre], 1), torch.cat([torch.zeros_like(generators), slack], 1)


def _work(node: fx.Node) -> int:
    """Multiplications of a product or a convolution, by its weight: each number of it counts for each place."""
    shapes = {arg: arg.meta["val"].shape for arg in node.all_input_nodes if isinstance(arg.meta.get("val"), Tensor)}
    if node.target is aten.convolution.default:
        return shapes[node.args[1]].numel() * node.meta["val"].shape[2:].numel()  # type: ignore[index]
    if node.target is aten.convolution_backward.default:
        return shapes[node.args[2]].numel() * shapes[node.args[0]][2:].numel()  # type: ignore[index]
    if node.target in (aten.mm.default, aten.bmm.default, aten.addmm.default):
        return node.meta["val"].numel() * shapes[node.args[-1]][-2]  # type: ignore[index]
    return 0
