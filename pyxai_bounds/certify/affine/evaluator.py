"""The interpreter with a form beside each Interval: rules for forms where there are some, boxes elsewhere."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pyxai_bounds.certify.affine.form import Form, common_ends, within
from pyxai_bounds.certify.affine.registry import RULES, call_of
from pyxai_bounds.certify.affine.symbols import Symbols
from pyxai_bounds.certify.differences import behind
from pyxai_bounds.interpreter import Interpreter
from pyxai_bounds.interval import Interval
from pyxai_bounds.parameters import ParameterBox
from pyxai_bounds.rules import RULES as INTERVAL_RULES
from pyxai_bounds.rules.registry import Indices, singleton


class Evaluator(Interpreter):
    """Runs a captured graph on Intervals, and on forms where it can, which cut the Intervals down.

    ``rows``: of how many samples, which such a graph must keep apart; ``shared``: see :class:`.rows.Rows`.
    """

    joins_terms = False  # each term has a form of its own

    def __init__(
        self, graph: fx.GraphModule, most: int, parameters: ParameterBox | None, rows: int = 1,
        shared: Mapping[fx.Node, Sequence[fx.Node]] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(graph, parameters)
        self.symbols = Symbols(most, rows, _dtype(graph.graph))
        self.shared = {} if shared is None or rows == 1 else shared
        self.forms: dict[fx.Node, Form] = {}
        self.normal: dict[fx.Node, tuple[Form, Form, Interval, Interval]] = {}  # of a norm, before weight and bias
        self.moving: set[fx.Node] = set()  # what depends on an argument that is a set
        self.done = _last_uses(graph.graph)

    def run_node(self, n: fx.Node) -> Any:
        # Rules for one of several results read the arguments once more.
        for_one = {arg: self.env[arg] for arg in self.shared.get(call_of(n), ())}
        self.env.update((arg, _repeated(value, self.symbols.rows)) for arg, value in for_one.items())
        try:
            return self._with_form(n)
        finally:
            self.env.update(for_one)

    def _with_form(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "placeholder" and isinstance(result, Interval):
            self.moving |= behind([n])
        # Rounded to nearest, sets of integers are held by integers.
        if n in self.moving and type(result) is Interval and result.dtype.is_floating_point:
            form = self._form(n, result)
            if not _moves(n):  # the set is as it was cut before
                result = within(result, form)
            self.forms[n] = form
        for node in self.done.get(n, ()):
            self.forms.pop(node, None)
        return result

    def _form(self, n: fx.Node, result: Interval) -> Form:
        call = call_of(n)
        rule, sources, found = RULES.get(call.target), call.all_input_nodes, None
        places = any(isinstance(self.env.get(source), Indices) for source in sources)
        if rule is not None and (rule.takes_places or not places) and any(source in self.forms for source in sources):
            found = rule.function(self, n, result)
        if found is not None and (_moves(n) or bool((found.centre + found.reach).isfinite().all())):
            return found
        return self.symbols.fresh(Form.box(result), however_small=n.op == "placeholder")

    # --- what rules ask for --------------------------------------------------------------------------------------

    def operand(self, x: Any) -> Form:
        """What an argument varies by; a box, where that is not known."""
        if isinstance(x, fx.Node):
            if x in self.forms:
                return self.forms[x]
            x = self.env[x]
        box = x if isinstance(x, Interval) else singleton(torch.as_tensor(x, dtype=torch.float64))
        # Numbers, and tensors without dimensions, may lie elsewhere.
        device = next((form.centre.device for form in self.forms.values()), box.device)
        return Form.box(Interval.of(box.mid.to(device), box.rad.to(device)))

    def ends(self, x: Any) -> tuple[Tensor, Tensor]:
        """The ends of an argument, by its form and by its Interval."""
        return common_ends(self.operand(x), self.value(x))

    def value(self, x: Any) -> Any:
        """The Interval or point of an argument; None of a number."""
        return self.env[x] if isinstance(x, fx.Node) else None

    def is_set(self, x: Any) -> bool:
        """Also a number that is not known exactly, or a weight that moves."""
        return isinstance(x, fx.Node) and isinstance(self.env.get(x), Interval)

    def at_points(self, n: fx.Node) -> Callable[[Tensor], Interval]:
        """Enclosures of a function's values at points, in float64."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return lambda t: INTERVAL_RULES[n.target].function(singleton(t), *args[1:], **kwargs)  # type: ignore[index]


def _repeated(x: Interval | Tensor, rows: int) -> Interval | Tensor:
    """Of one sample [1, ...], or the same for all, for so many."""
    if isinstance(x, Interval):
        return Interval.of(_repeated(x.mid, rows), _repeated(x.rad, rows))  # type: ignore[arg-type]
    return x.repeat(rows, *[1] * (x.dim() - 1))


def _dtype(graph: fx.Graph) -> torch.dtype:
    """Of the box, its first argument, and so of what is computed from it."""
    first = next(iter(graph.find_nodes(op="placeholder")), None)
    return torch.float64 if first is None else first.meta["val"].dtype


def _moves(n: fx.Node) -> bool:
    rule = RULES.get(n.target)
    return rule is not None and rule.moves


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Whose forms nobody reads after a node; those of operators with several results are read with these."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op != "output":
            last[node] = node
            places = RULES[node.target].unread if node.target in RULES else ()
            read = [arg for place, arg in enumerate(node.args) if place not in places]
            unread = [node.args[place] for place in places if node.args[place] not in read]
            for source in set(node.all_input_nodes) - set(unread):
                last[source] = node
                if node.target is operator.getitem:
                    last.update(dict.fromkeys(source.all_input_nodes, node))
    found: dict[fx.Node, list[fx.Node]] = {}
    kept = set(graph.output_node().all_input_nodes)
    for source, node in last.items():
        if source not in kept:
            found.setdefault(node, []).append(source)
    return found
