"""Bounds of parts of boxes, several at once: of the inputs at which some ReLUs are active and others are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pyxai_bounds.certify.affine.evaluator import Evaluator
from pyxai_bounds.certify.affine.form import Form, padded
from pyxai_bounds.certify.forms import Forms, joined
from pyxai_bounds.interval import Interval

aten = torch.ops.aten

# What is known of the numbers to which ReLUs are applied, by their node: 1 above 0, -1 not above 0, 0 either; int8.
Signs = Mapping[fx.Node, Tensor]


def bounded(
    forms: Forms, boxes: Sequence[Interval], points: Sequence[Sequence[Interval | Tensor]], signs: Sequence[Signs]
) -> list[Part]:
    """Parts of boxes [1, ...], by the signs that hold in them; ``points``: the other arguments of each."""
    run = _Evaluator(forms, signs)
    bounds, form = forms(boxes[0] if len(boxes) == 1 else joined(boxes), points, run)
    return [Part(run, row, boxes[row], bounds[row : row + 1], form.row(row)) for row in range(len(boxes))]


@dataclass(frozen=True)
class Part:
    """One of those that were looked at together: its bounds, and its form, [1, ...]."""

    run: _Evaluator
    row: int
    box: Interval
    bounds: Interval
    form: Form

    @property
    def is_empty(self) -> bool:
        return bool(self.run.is_empty[self.row])

    def inequalities(self) -> Form:
        """All that the part says of the symbols: each element is at least 0 for the inputs that it holds."""
        forms = [_columns(form, rows == self.row) for rows, form in self.run.inequalities.values()]
        count = max(len(form.generators) for form in forms)
        generators = torch.cat([padded(form.generators, count) for form in forms], 1)
        return Form(torch.cat([form.centre for form in forms]), generators, torch.cat([form.slack for form in forms]))

    def input(self, symbols: Tensor) -> Tensor:
        """Where symbols have these values, inside the very box."""
        box = self.box
        position = torch.zeros(box.mid.numel(), dtype=torch.float64, device=box.device)
        for made in self.run.made:
            if made.node.op == "placeholder":
                places, owned = made.places[:, self.row], made.owned[:, self.row]
                position[places[owned]] = symbols[made.first : made.first + len(places)][owned]
        x = box.mid.double() + box.rad.double() * position.reshape(box.shape)
        return x.to(box.dtype).clamp(*box.inner_ends())

    def widest(self, entries: Tensor) -> tuple[fx.Node, int] | None:
        """The ReLU by which these entries of the result vary most, as the node and the place of what it is applied to;
        None if they vary by none.
        """
        weight = self.form.generators.flatten(1)[:, entries].abs().sum(1)
        total: dict[fx.Node, Tensor] = {}
        for made in self.run.made:
            source, share = _sign_of(made.node), weight[made.first : made.first + len(made.places)]
            if source is not None and len(share):
                sums = total.setdefault(source, weight.new_zeros(source.meta["val"].numel()))
                sums.index_add_(0, made.places[: len(share), self.row], share)
        for source, sums in total.items():
            if source in self.run.signs:
                sums[self.run.signs[source].reshape(len(self.run.is_empty), -1)[self.row] != 0] = 0
        if not total:
            return None
        source = max(total, key=lambda node: total[node].amax().item())
        return (source, int(total[source].argmax())) if bool(total[source].amax() > 0) else None


def _columns(form: Form, wanted: Tensor) -> Form:
    return Form(form.centre[wanted], form.generators[:, wanted], form.slack[wanted])


@dataclass(frozen=True)
class _Made:
    """Symbols that came with a node, from the first on: the places [symbols, rows] where each is largest, and whether
    a row has it at all.
    """

    node: fx.Node
    first: int
    places: Tensor
    owned: Tensor


class _Evaluator(Evaluator):
    """Bounds what is computed in parts of boxes."""

    def __init__(self, forms: Forms, signs: Sequence[Signs]) -> None:
        rows = len(signs)
        super().__init__(forms.graph, forms.room(rows), forms.parameters, rows, forms.shared)
        nodes = dict.fromkeys(node for some in signs for node in some)
        unknown: Any = {node: torch.zeros_like(next(some[node] for some in signs if node in some)) for node in nodes}
        self.signs = {node: torch.cat([some.get(node, unknown[node]) for some in signs]) for node in nodes}
        self.is_empty = torch.zeros(rows, dtype=torch.bool)
        self.made: list[_Made] = []
        self.inequalities: dict[fx.Node, tuple[Tensor, Form]] = {}  # with the rows of the elements, all >= 0

    def run_node(self, n: fx.Node) -> Any:
        source = _gated_by(n)
        if source not in self.signs:
            return super().run_node(n)
        # The gate is decided by an argument: a number of either sign will do.
        place: Any = n.args[1]
        argument, signs = self.env[place], self.signs[source]
        known = signs != 0
        self.env[place] = Interval.of(
            torch.where(known, signs.to(argument.dtype), argument.mid), torch.where(known, 0.0, argument.rad)
        )
        try:
            return super().run_node(n)
        finally:
            self.env[place] = argument
            self._note(source)

    def ends(self, x: fx.Node) -> tuple[Tensor, Tensor]:
        lower, upper = super().ends(x)
        if x in self.signs:
            active, dead = self.signs[x] > 0, self.signs[x] < 0
            denied = active & (upper <= 0) | dead & (lower > 0)
            self.is_empty |= denied.reshape(len(self.is_empty), -1).any(1).cpu()
            lower = torch.where(active, lower.clamp(min=0), lower)
            upper = torch.where(dead, upper.clamp(max=0), upper)
            self._note(x)
        return lower, upper

    def _note(self, x: fx.Node) -> None:
        if x in self.inequalities:
            return
        form, signs = self.operand(x), self.signs[x]
        places = signs.flatten().nonzero()[:, 0]
        sign = signs.flatten()[places].double()
        self.inequalities[x] = (
            places // (signs.numel() // len(self.is_empty)),
            Form(
                form.centre.flatten()[places] * sign,
                form.generators.flatten(1)[:, places] * sign,
                form.slack.flatten()[places],
            ),
        )

    def _form(self, n: fx.Node, result: Interval) -> Form:
        before = self.symbols.count
        form = super()._form(n, result)
        if self.symbols.count > before:
            new = form.generators[before:].reshape(self.symbols.count - before, len(self.is_empty), -1).abs()
            size, places = new.max(2)
            self.made.append(_Made(n, before, places, size > 0))
        return form


def _gated_by(n: fx.Node) -> Any:
    """What a ReLU is applied to that decides the gates of this node, whose second argument says so and nothing else."""
    if len(n.args) > 1 and n.args[0] is n.args[1]:
        return None
    if n.target is aten.threshold_backward.default and n.args[2] == 0:
        return _sign_of(n.args[1]) if isinstance(n.args[1], fx.Node) and n.args[1].target is aten.relu.default else None
    return n.args[1] if n.target is aten.leaky_relu_backward.default and not n.args[3] else None


def _sign_of(n: fx.Node) -> Any:
    """Whose sign decides what this node, a ReLU or its gates, does."""
    return n.args[0] if n.target in (aten.relu.default, aten.leaky_relu.default) else _gated_by(n)
