"""Branch and bound: what affine forms leave open is decided part of the box by part of the box.

A part holds the inputs for which some ReLUs are known to be active and others not to be. There these derivatives are
numbers, and a gradient has narrower bounds; with all signs known, of a network of ReLUs, exact ones. A part is done
with when its bounds prove the property or when it holds no input, and one input at which the property fails ends the
search. ``certificate`` asks for this, sample by sample.

Source: Bunel et al., "Branch and bound for piecewise linear neural network verification", JMLR 21 (2020). There the
forward pass is divided; here a sign decides the gate of the backward pass, too.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from pyxai_bounds.certify.affine.evaluator import Evaluator
from pyxai_bounds.certify.affine.form import Form, padded
from pyxai_bounds.certify.differences import TINY, least_difference
from pyxai_bounds.certify.forms import FormRows, Forms
from pyxai_bounds.certify.properties import Property, TopK, kept, rounding_loss
from pyxai_bounds.interval import Interval
from pyxai_bounds.rounding import add_down, add_up

aten = torch.ops.aten

STEPS = 600  # of the search for an input of a part, at most
LOOK_EVERY = 20  # of these steps: is the question settled?

# What is known of the numbers to which ReLUs are applied, by their node: 1 above 0, -1 not above 0, 0 either; int8.
Signs = Mapping[fx.Node, Tensor]


@dataclass(frozen=True)
class Decision:
    """What the parts of one sample's box say together.

    margin [1]: a lower bound of the property's margin; bounds: of the explanation, [1, ...]; counterexample: an input
    of the box, [1, ...], at which the property fails, if one was found.
    """

    margin: Tensor
    bounds: Interval
    counterexample: Tensor | None


def decide(
    forms: Forms,
    arguments: Sequence[Interval | Tensor],
    property: Property,
    nominal: Tensor,
    bounds: Interval,
    fn: Callable[..., Tensor],
    most: int,
) -> Decision | None:
    """Does ``property`` hold on all of a box? Looks at up to ``most`` parts of it, at all of it first.

    ``arguments``: the box of one sample, [1, ...], and what else ``fn`` takes; ``nominal`` and ``bounds``: the sample's
    explanation, and what is known of it in the box; ``fn``: the function, to be tried at inputs. None if a part has no
    finite bounds.
    """
    search = _Search(forms, arguments, property, nominal, bounds, fn)
    try:
        search.run(most)
    except _NoBoundsError:
        return None
    return search.decision()


class _NoBoundsError(ArithmeticError):
    """A part's bounds are not finite."""


@dataclass(frozen=True)
class _Part:
    """``split``: the node and the place of the number whose sign matters most, of those that are not known."""

    signs: Signs
    margin: Tensor
    bounds: Interval
    split: tuple[fx.Node, int] | None


class _Search:
    """Parts of one box that together hold all of it."""

    def __init__(
        self, forms: Forms, arguments: Sequence[Interval | Tensor], property: Property, nominal: Tensor,
        bounds: Interval, fn: Callable[..., Tensor],
    ) -> None:  # fmt: skip
        self.forms, self.arguments, self.property, self.fn = forms, arguments, property, fn
        self.nominal, self.bounds = nominal, bounds
        self.parts: list[tuple[float, int, _Part]] = []  # a heap, the worst first
        self.whole: _Part | None = None
        self.counterexample: Tensor | None = None
        self._count = itertools.count()

    def run(self, most: int) -> None:
        self._look({})
        for _ in range((most - 1) // 2):
            if not self.parts or self.counterexample is not None:
                return
            part = self.parts[0][2]
            if part.split is None or kept(self.property, part.margin):
                return
            heapq.heappop(self.parts)
            for sign in (1, -1):
                self._look(_with(part.signs, *part.split, sign), part)

    def decision(self) -> Decision | None:
        if self.counterexample is not None:  # not all parts were looked at
            assert self.whole is not None
            return Decision(self.whole.margin, self.whole.bounds, self.counterexample)
        parts = [part for *_, part in self.parts]
        if not parts:  # none would hold an input, and one of them holds the sample: then nothing can be believed
            return None
        lower = torch.stack([part.bounds.lower for part in parts]).amin(0)
        upper = torch.stack([part.bounds.upper for part in parts]).amax(0)
        return Decision(parts[0].margin, _narrower(self.bounds, Interval(lower, upper)), self.counterexample)

    def _look(self, signs: Signs, around: _Part | None = None) -> None:
        """Bounds one part of another one, and keeps it unless it is empty."""
        if self.counterexample is not None:
            return
        evaluator = _Evaluator(self.forms, signs)
        bounds, form = self.forms(self.arguments, evaluator)
        if not bool(bounds.isfinite().all()):
            raise _NoBoundsError
        symbols = None
        if signs:
            if evaluator.is_empty:
                return
            inequalities = evaluator.inequalities()
            symbols = _solved(inequalities)
            if symbols is None:
                return
        bounds = _narrower(self.bounds if around is None else around.bounds, bounds)
        margin = self._margin(bounds)
        if isinstance(self.property, TopK) and not kept(self.property, margin):
            rows = FormRows(form)
            found = least_difference(self.property, self.nominal, bounds, rows, rows.box)
            margin = margin.clamp(min=found)
        if around is not None:  # new lines beside functions may lie worse
            margin = margin.maximum(around.margin)
        split = None
        if not kept(self.property, margin):
            if symbols is not None:
                self._try(evaluator.input(self.arguments[0], symbols))  # type: ignore[arg-type]
            split = evaluator.widest(form, self._contested(bounds))
        part = _Part(signs, margin, bounds, split)
        self.whole = self.whole or part
        heapq.heappush(self.parts, (margin.item(), next(self._count), part))

    def _margin(self, bounds: Interval) -> Tensor:
        found = self.property.margin(self.nominal, bounds)
        if found.shape != (1,):  # a property that knows its batch says nothing of one sample
            return bounds.mid.new_full((1,), -math.inf)
        return torch.where(found.isnan(), -math.inf, found)

    def _try(self, x: Tensor) -> None:
        value = self.fn(x, *self.arguments[1:])
        margin = self._margin(Interval.of(value, torch.zeros_like(value)))
        if bool((margin < 0) & margin.isfinite()):
            self.counterexample = x

    def _contested(self, bounds: Interval) -> Tensor:
        """Entries whose bounds keep the property from being proved."""
        if not isinstance(self.property, TopK):
            return torch.ones(self.nominal.numel(), dtype=torch.bool, device=self.nominal.device)
        lower, upper = (t[0] for t in self.property.scores(bounds))
        top = self.property.top(self.nominal)[0]
        open_ = torch.where(top, lower <= upper[~top].amax(), upper >= lower[top].amin())
        return open_.repeat(self.nominal.numel() // len(open_))


def _with(signs: Signs, node: fx.Node, place: int, sign: int) -> Signs:
    known: Any = node.meta["val"]
    new = signs[node].clone() if node in signs else torch.zeros(known.shape, dtype=torch.int8, device=known.device)
    new.view(-1)[place] = sign
    return {**signs, node: new}


def _narrower(x: Interval, y: Interval) -> Interval:
    """Of two sets of the same value, element by element the narrower one."""
    better = y.rad < x.rad
    return Interval.of(torch.where(better, y.mid, x.mid), torch.where(better, y.rad, x.rad))


# --- one part --------------------------------------------------------------------------------------------------


class _Evaluator(Evaluator):
    """Bounds what is computed in one part of a box."""

    def __init__(self, forms: Forms, signs: Signs) -> None:
        super().__init__(forms.graph, forms.most, forms.parameters)
        self.signs = signs
        self.is_empty = False
        self._made: list[tuple[fx.Node, int, Tensor]] = []  # node, its first symbol, the places of its symbols
        self._inequalities: dict[fx.Node, Form] = {}  # all >= 0

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
            self.is_empty |= bool((active & (upper <= 0) | dead & (lower > 0)).any())
            lower = torch.where(active, lower.clamp(min=0), lower)
            upper = torch.where(dead, upper.clamp(max=0), upper)
            self._note(x)
        return lower, upper

    def _note(self, x: fx.Node) -> None:
        if x not in self._inequalities:
            form, signs = self.operand(x), self.signs[x].flatten()
            places = signs.nonzero()[:, 0]
            sign = signs[places].double()
            self._inequalities[x] = Form(
                form.centre.flatten()[places] * sign,
                form.generators.flatten(1)[:, places] * sign,
                form.slack.flatten()[places],
            )

    def _form(self, n: fx.Node, result: Interval) -> Form:
        before = self.symbols.count
        form = super()._form(n, result)
        if self.symbols.count > before:
            self._made.append((n, before, form.generators[before:].flatten(1).abs().argmax(1)))
        return form

    def inequalities(self) -> Form:
        """All that the part says of the symbols: each element is at least 0 for the inputs that it holds."""
        forms = self._inequalities.values()
        generators = [padded(form.generators, self.symbols.count) for form in forms]
        return Form(
            torch.cat([form.centre for form in forms]),
            torch.cat(generators, 1),
            torch.cat([form.slack for form in forms]),
        )

    def input(self, box: Interval, symbols: Tensor) -> Tensor:
        """Where symbols have these values, inside the very box."""
        position = torch.zeros(box.mid.numel(), dtype=torch.float64, device=box.device)
        for n, first, places in self._made:
            if n.op == "placeholder":
                position[places] = symbols[first : first + len(places)]
        x = box.mid.double() + box.rad.double() * position.reshape(box.shape)
        return x.to(box.dtype).clamp(add_up(box.mid, -box.rad), add_down(box.mid, box.rad))

    def widest(self, form: Form, entries: Tensor) -> tuple[fx.Node, int] | None:
        """The ReLU by which these entries of the result vary most, as the node and the place of what it is applied to;
        None if they vary by none.
        """
        weight = form.generators.flatten(1)[:, entries].abs().sum(1)
        total: dict[fx.Node, Tensor] = {}
        for n, first, places in self._made:
            source, share = _sign_of(n), weight[first : first + len(places)]
            if source is not None and len(share):
                sums = total.setdefault(source, weight.new_zeros(source.meta["val"].numel()))
                sums.index_add_(0, places[: len(share)], share)
        for source, sums in total.items():
            if source in self.signs:
                sums[self.signs[source].flatten() != 0] = 0
        if not total:
            return None
        source = max(total, key=lambda node: total[node].amax().item())
        return (source, int(total[source].argmax())) if bool(total[source].amax() > 0) else None


def _gated_by(n: fx.Node) -> Any:
    """What a ReLU is applied to that decides the gates of this node, whose second argument says so."""
    if n.target is aten.threshold_backward.default and n.args[2] == 0:
        return _sign_of(n.args[1]) if isinstance(n.args[1], fx.Node) and n.args[1].target is aten.relu.default else None
    return n.args[1] if n.target is aten.leaky_relu_backward.default and not n.args[3] else None


def _sign_of(n: fx.Node) -> Any:
    """Whose sign decides what this node, a ReLU or its gates, does."""
    return n.args[0] if n.target in (aten.relu.default, aten.leaky_relu.default) else _gated_by(n)


# --- does a part hold an input? --------------------------------------------------------------------------------


def _solved(rows: Form) -> Tensor | None:
    """Symbols [K] at which each row is at least 0, or nearly; None where it is proved that there are none.

    There are none where some weights λ >= 0 make λ·(centre + slack) + Σₖ |λ·generatorₖ| < 0: the greatest value that
    λ·rows takes. Rows and weights play against each other, as matrix games are played by the extragradient method
    (Nemirovski, Prox-method, SIAM J. Optim. 15, 2004): weights by their logarithms, symbols inside [-1, 1].
    """
    generators, centre, slack = (t.cpu().numpy() for t in (rows.generators, rows.centre, rows.slack))
    scale = np.abs(generators).sum(0) + np.abs(centre) + slack
    scale[scale == 0] = 1.0
    a, b = generators / scale, (centre + slack) / scale
    symbols, weights = np.zeros(len(a)), np.full(len(b), 1 / len(b))
    mean_symbols, mean_weights = symbols.copy(), 0 * weights
    norm, size = max(np.linalg.norm(a, 2), 1e-300), np.sqrt(max(len(a), 1))
    far, near = 0.5 * size / norm, 2 / (size * norm)

    def moved(at_symbols: np.ndarray, at_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        value = at_symbols @ a + b
        new = weights * np.exp(-near * (value - value.min()))
        return np.clip(symbols + far * (a @ at_weights), -1, 1), new / new.sum()

    for step in range(1, STEPS + 1):
        ahead = moved(symbols, weights)
        symbols, weights = moved(*ahead)
        mean_symbols += ahead[0]
        mean_weights += ahead[1]
        if step % LOOK_EVERY == 0:
            for some in (weights, mean_weights / step):
                if _is_impossible(rows, some / scale):
                    return None
            for point in (symbols, mean_symbols / step):
                if (point @ generators + centre).min() >= 0:
                    return torch.from_numpy(point).to(rows.centre)
    return torch.from_numpy(mean_symbols / STEPS).to(rows.centre)


def _is_impossible(rows: Form, weights: np.ndarray) -> bool:
    """Is this sum of rows, with these weights >= 0, below 0 whatever the symbols are? Proved in float64."""
    some = torch.from_numpy(weights).to(rows.centre)
    greatest = some @ (rows.centre + rows.slack) + (rows.generators @ some).abs().sum()
    size = some @ (rows.centre.abs() + rows.slack + rows.generators.abs().sum(0))
    return bool(greatest + rounding_loss(rows.generators.numel() + len(some)) * size + TINY < 0)
