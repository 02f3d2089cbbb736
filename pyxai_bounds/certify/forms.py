"""Affine forms of single samples for ``certify``: what they may cost, the bounds they give, and rows for rankings."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from pyxai_bounds import rounding as rd
from pyxai_bounds.certify.affine import Evaluator, Form
from pyxai_bounds.certify.affine.rows import Rows
from pyxai_bounds.certify.differences import Box, behind
from pyxai_bounds.errors import UnsupportedOperatorError
from pyxai_bounds.interpreter import Interpreter
from pyxai_bounds.interval import Interval
from pyxai_bounds.parameters import ParameterBox
from pyxai_bounds.rules.registry import Product, as_set, use_product

aten = torch.ops.aten

LARGEST = 2**25  # numbers of the generators of one value, 256 MiB, unless there is a budget for more
BYTES = 32  # of memory for each of these: in float64, and of some four values at once
CHEAP = 2**28  # multiplications, of which a core does some 1e10 a second
PASSES = 16  # as many multiplications as an operator takes the time of for each number, moving it through memory
ROWS = 32  # samples, or parts of them, that are looked at together, at most
TOGETHER = 2**19  # numbers that the generators of one value of theirs hold: more would not fit into a cache
CHEAP_NODES = 150  # operators, each of which takes some 0.3 ms however small it is


class Forms:
    """A function of single samples, evaluated with affine forms; its parameters must not change, but in their box."""

    def __init__(
        self, graph: fx.GraphModule, rounding: rd.Rounding, product: Product, most: int,
        parameters: ParameterBox | None, largest: int,
    ) -> None:  # fmt: skip
        rows = Rows.of(graph) if parameters is None else None
        self.graph = graph if rows is None else rows.graph
        self.shared = None if rows is None else rows.shared
        self.own = None if rows is None else rows.own
        self.rounding, self.product, self.most, self.parameters = rounding, product, most, parameters
        self._room = largest
        placeholders = self.graph.graph.find_nodes(op="placeholder")
        self._moving, self._chosen = behind(placeholders[:1]), behind(placeholders[1:])
        self._largest = max(1, *_sizes(self._moving))
        self._symbols = 4 * placeholders[0].meta["val"].numel() if placeholders else 1
        self._constants: dict[fx.Node, Any] | None = None
        self._known: dict[int, tuple[Sequence[Any], dict[fx.Node, Any]]] = {}  # by the identity of other arguments

    @classmethod
    def of(
        cls, graph: fx.GraphModule, rounding: rd.Rounding, product: Product, cheaply: bool,
        parameters: ParameterBox | None = None, memory: int = 0,
    ) -> Forms | None:  # fmt: skip
        """``graph``: the captured function of a single sample [1, ...]. None where forms would take more than so many
        bytes of ``memory``, and more than a gigabyte, or, if they are to be cheap, too much work.
        """
        placeholders = graph.graph.find_nodes(op="placeholder")
        moving = behind(placeholders)
        sizes = _sizes(moving)
        inputs = [node.meta["val"] for node in placeholders]
        needed = 2 * sum(t.numel() for t in inputs if t.is_floating_point())
        largest = max(LARGEST, memory // BYTES)
        most = largest // max(1, *sizes)
        if cheaply:
            cheap = CHEAP // max(1, sum(map(_work, moving)) + PASSES * sum(sizes))
            if len(moving) > CHEAP_NODES or needed > cheap:
                return None
            most = min(most, 2 * cheap)  # of which most samples need a part
        if needed > most:
            wanted, given = (BYTES * numbers / 2**20 for numbers in (needed * max(sizes), largest))
            warnings.warn(
                f"The affine forms that were asked for take some {wanted:,.0f} MiB for a sample of this function, and "
                f"may take {given:,.0f}: its plain bounds are not sharpened. memory_budget=… (bytes) makes room, as "
                "far as the machine has it.",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        return cls(graph, rounding, product, most, parameters, largest)

    @property
    def at_once(self) -> int:
        """How many samples, or parts of one, are best looked at together."""
        if self.shared is None:
            return 1
        return max(1, min(ROWS, TOGETHER // (self._largest * self._symbols)))

    def one_by_one(self) -> None:
        """From now on: together they were too many."""
        self.shared = None

    def evaluator(self, rows: int = 1) -> Evaluator:
        return Evaluator(self.graph, self.room(rows), self.parameters, rows, self.shared)

    def room(self, rows: int) -> int:
        """For how many symbols there is room."""
        return self.most if rows == 1 else min(self.most, self._room // (rows * self._largest))

    def __call__(
        self, box: Interval, points: Sequence[Sequence[Interval | Tensor]], evaluator: Evaluator | None = None
    ) -> tuple[Interval, Form]:
        """The explanation [1, ...] over a box: its bounds, and its form. ``evaluator``: one that knows more.

        Of up to ``at_once`` boxes [rows, ...]. ``points``: the other arguments for each of these, [1, ...], which must
        be the same for all where ``own`` is None.
        """
        evaluator = evaluator or self.evaluator(len(box))
        with contextlib.ExitStack() as stack:
            # Without cuDNN, whose convolutions may be Fourier transforms, which lose more than sums do.
            exact = torch.no_grad(), torch.backends.cudnn.flags(enabled=False), rd.without_autocast()
            for context in (*exact, rd.ieee_arithmetic(), rd.use(self.rounding), use_product(self.product)):
                stack.enter_context(context)
            known = self._known_of(points)
            bounds = as_set(evaluator.run(box, *points[0], enable_io_processing=False, initial_env=known)[0])
        if evaluator.unsupported:
            raise UnsupportedOperatorError(list(dict.fromkeys(evaluator.unsupported)))
        self._symbols = max(1, evaluator.symbols.count)  # of boxes that are points, none
        return bounds, evaluator.operand(self.graph.graph.output_node().all_input_nodes[0])

    def _known_of(self, points: Sequence[Sequence[Interval | Tensor]]) -> dict[fx.Node, Any]:
        """What does not depend on the box, but on the other arguments, which are mostly those of the call before."""
        if self.shared is None:
            return {}
        different = {id(given): given for given in points}
        self._known = {key: self._known.get(key) or (given, self._at(given)) for key, given in different.items()}
        rows = [self._known[id(given)][1] for given in points]
        if len(points) == 1 or self.own is None:
            assert len(different) == 1, "rows meet"
            return dict(rows[0])
        known = {node: None if node in self._chosen else value for node, value in rows[0].items()}
        return known | {node: joined([row[node] for row in rows]) for node in self.own}

    def _at(self, points: Sequence[Interval | Tensor]) -> dict[fx.Node, Any]:
        """What these arguments, and none, decide."""
        run, given = Interpreter(self.graph, None), iter(points)
        run.env.update(self._constants or {})
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                run.env[node] = None if node in self._moving else next(given)
            elif node not in self._moving and node.op != "output" and node not in run.env:
                run.env[node] = run.run_node(node)
        if run.unsupported:
            raise UnsupportedOperatorError(list(dict.fromkeys(run.unsupported)))
        found = {node: value for node, value in run.env.items() if node not in self._moving}
        self._constants = {node: value for node, value in found.items() if node not in self._chosen}
        return found


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


def joined(rows: Sequence[Any]) -> Any:
    """What samples have, [1, ...] each, as rows."""
    if isinstance(rows[0], Interval):
        return Interval.of(joined([row.mid for row in rows]), joined([row.rad for row in rows]))
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))


def _sizes(nodes: set[fx.Node]) -> list[int]:
    values = pytree.tree_leaves([node.meta.get("val") for node in nodes])
    return [t.numel() for t in values if isinstance(t, Tensor)]


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
