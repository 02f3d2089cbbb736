"""Branch and bound: what affine forms leave open is decided part of the box by part of the box.

A part holds the inputs for which some ReLUs are known to be active and others not to be. There these derivatives are
numbers, and a gradient has narrower bounds; with all signs known, of a network of ReLUs, exact ones. A part is done
with when its bounds prove the property or when it holds no input, and one input at which the property fails ends the
search. ``certificate`` asks for this; samples are looked at together, and so are parts of one (``parts``).

Source: Bunel et al., "Branch and bound for piecewise linear neural network verification", JMLR 21 (2020). There the
forward pass is divided; here a sign decides the gate of the backward pass, too.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from pyxai_bounds.certify.affine.form import Form
from pyxai_bounds.certify.differences import TINY, least_difference
from pyxai_bounds.certify.forms import FormRows, Forms
from pyxai_bounds.certify.parts import Part, Signs, bounded
from pyxai_bounds.certify.properties import Property, TopK, kept, rounding_loss
from pyxai_bounds.interval import Interval

_log = logging.getLogger(__name__)

STEPS = 600  # of the search for an input of a part, at most
LOOK_EVERY = 20  # of these steps: is the question settled?


@dataclass(frozen=True)
class Decision:
    """What the parts of one sample's box say together.

    margin [1]: a lower bound of the property's margin; bounds: of the explanation, [1, ...]; counterexample: an input
    of the box, [1, ...], at which the property fails, if one was found.
    """

    margin: Tensor
    bounds: Interval
    counterexample: Tensor | None


def run(searches: Sequence[Search], tell: Callable[[float], None]) -> None:
    """Carry them out, those with one function together; where all rows read the arguments beside the box, those
    with the same ones.
    """
    groups: dict[Any, list[Search]] = {}
    same: dict[Any, Sequence[Interval | Tensor]] = {}
    for search in searches:
        values = tuple((t.dtype, t.shape, _bits(t)) for t in search.points)
        search.points = same.setdefault(values, search.points)
        read = id(search.points) if search.forms.own is None else None
        groups.setdefault((id(search.forms), read), []).append(search)
    done = 0
    for group in groups.values():
        active = group
        while active:
            _advance(active)
            active = [search for search in active if not search.is_done]
            tell((done + len(group) - len(active)) / len(searches))
        done += len(group)


def _bits(t: Any) -> bytes:
    """Not its numbers: -0 equals 0, and functions may tell them apart."""
    return t.cpu().flatten().view(torch.uint8).numpy().tobytes()


def _advance(searches: Sequence[Search]) -> None:
    """Look at as many parts as are best looked at together, the first searches' first."""
    forms = searches[0].forms
    asked: list[tuple[Search, Ask]] = []
    for search in searches:
        room = forms.at_once - len(asked)
        if asked and room < 2:
            break
        asked += [(search, ask) for ask in search.asks(max(1, room // (2 * len(searches))))]
    while asked:
        now = [(search, ask) for search, ask in asked[: forms.at_once] if search.counterexample is None]
        asked = asked[forms.at_once :]
        if not now:
            continue
        try:
            boxes = [search.box for search, _ in now]
            found = bounded(forms, boxes, [search.points for search, _ in now], [ask.signs for _, ask in now])
        except Exception:  # what vmap cannot do, or memory does not hold
            _log.debug("Forms of %d parts failed.", len(now), exc_info=True)
            if len(now) == 1:
                for search in searches:
                    search.fail()
                return
            forms.one_by_one()
            asked = now + asked
            continue
        for (search, ask), part in zip(now, found, strict=True):
            try:
                search.look(ask, part)
            except Exception:  # what the function says of a single input
                _log.debug("A part's bounds could not be used.", exc_info=True)
                search.fail()


@dataclass(frozen=True)
class Ask:
    """A part that is to be looked at, and the one of which it is one of two."""

    signs: Signs
    around: _Known | None


@dataclass(frozen=True)
class _Known:
    """``split``: the node and the place of the number whose sign matters most, of those that are not known."""

    signs: Signs
    margin: Tensor
    bounds: Interval
    split: tuple[fx.Node, int] | None


class Search:
    """Does ``property`` hold on all of a box? To be looked for, beside others, by :func:`run`, in up to ``most`` parts
    that together hold the box, all of it first.

    ``arguments``: the box of one sample, [1, ...], and what else ``fn`` takes; ``nominal`` and ``bounds``: the sample's
    explanation, and what is known of it in the box; ``fn``: the function, to be tried at inputs.
    """

    def __init__(
        self, forms: Forms, arguments: Sequence[Interval | Tensor], property: Property, nominal: Tensor,
        bounds: Interval, fn: Callable[..., Tensor], most: int,
    ) -> None:  # fmt: skip
        self.forms, self.property, self.fn = forms, property, fn
        self.box: Any = arguments[0]
        self.points: Sequence[Interval | Tensor] = tuple(arguments[1:])
        self.nominal, self.bounds = nominal, bounds
        self.counterexample: Tensor | None = None
        self.is_done = self.is_endless = self.failed = False
        self._left = (most - 1) // 2  # parts that may still be divided
        self._parts: list[tuple[float, int, _Known]] = []  # a heap, the worst first
        self._whole: _Known | None = None
        self._count = itertools.count()

    def asks(self, most: int) -> list[Ask]:
        """The halves of up to so many parts, the worst; of the whole first that itself."""
        if self._whole is None:
            return [Ask({}, None)]
        found: list[Ask] = []
        while self._parts and self._left and len(found) < 2 * most:
            part = self._parts[0][2]
            if part.split is None or kept(self.property, part.margin):
                break
            heapq.heappop(self._parts)
            found += [Ask(_with(part.signs, *part.split, sign), part) for sign in (1, -1)]
            self._left -= 1
        self.is_done = not found
        return found

    def fail(self) -> None:
        """Its forms cannot be computed."""
        self.is_done = self.failed = True

    def decision(self) -> Decision | None:
        """None if a part has no finite bounds."""
        if self.failed or self.is_endless or self._whole is None:
            return None
        if self.counterexample is not None:  # not all parts were looked at
            return Decision(self._whole.margin, self._whole.bounds, self.counterexample)
        parts = [part for *_, part in self._parts]
        if not parts:  # none would hold an input, and one of them holds the sample: then nothing can be believed
            return None
        lower = torch.stack([part.bounds.lower for part in parts]).amin(0)
        upper = torch.stack([part.bounds.upper for part in parts]).amax(0)
        return Decision(parts[0].margin, _narrower(self.bounds, Interval(lower, upper)), self.counterexample)

    def look(self, ask: Ask, part: Part) -> None:
        """Keep what is known of a part, unless it is empty."""
        if self.is_done:
            return
        if not bool(part.bounds.isfinite().all()):
            self.is_done = self.is_endless = True
            return
        symbols = None
        if ask.signs:
            symbols = None if part.is_empty else _solved(part.inequalities())
            if symbols is None:
                return
        around = ask.around
        bounds = _narrower(self.bounds if around is None else around.bounds, part.bounds)
        margin = self._margin(bounds)
        if isinstance(self.property, TopK) and not kept(self.property, margin):
            rows = FormRows(part.form)
            found = least_difference(self.property, self.nominal, bounds, rows, rows.box)
            margin = margin.clamp(min=found)
        if around is not None:  # new lines beside functions may lie worse
            margin = margin.maximum(around.margin)
        split = None
        if not kept(self.property, margin):
            if symbols is not None:
                self._try(part.input(symbols))
            split = part.widest(self._contested(bounds))
        known = _Known(ask.signs, margin, bounds, split)
        self._whole = self._whole or known
        heapq.heappush(self._parts, (margin.item(), next(self._count), known))

    def _margin(self, bounds: Interval) -> Tensor:
        found = self.property.margin(self.nominal, bounds)
        if found.shape != (1,):  # a property that knows its batch says nothing of one sample
            return bounds.mid.new_full((1,), -math.inf)
        return torch.where(found.isnan(), -math.inf, found)

    def _try(self, x: Tensor) -> None:
        value = self.fn(x, *self.points)
        margin = self._margin(Interval.of(value, torch.zeros_like(value)))
        if bool((margin < 0) & margin.isfinite()):
            self.counterexample, self.is_done = x, True

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
