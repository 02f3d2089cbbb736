"""An affine form of one value, and all arithmetic with forms that adds no symbols. What rounding loses is slack."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyxai_bounds.certify.differences import TINY
from pyxai_bounds.certify.properties import rounding_loss
from pyxai_bounds.interval import Interval
from pyxai_bounds.rules import facts
from pyxai_bounds.rules.registry import ends, in_float64
from pyxai_bounds.rules.standardise import Standardised

BLOCK = 2**17  # numbers that fit into a cache of 1 MiB


@dataclass(frozen=True)
class Form:
    """{centre + Σ ξₖ·generators[k] + e: |ξ| ≤ 1, |e| ≤ slack}, in float64; generators [K, ...].

    Symbols are numbered throughout a program: a form with fewer generators than another does not depend on the rest.
    """

    centre: Tensor
    generators: Tensor
    slack: Tensor

    @classmethod
    def box(cls, x: Interval) -> Form:
        return cls(x.mid.double(), x.mid.double().new_empty(0, *x.shape), x.rad.double())

    def row(self, place: int) -> Form:
        """Of several samples' values one's, [1, ...]."""
        one = slice(place, place + 1)
        return Form(self.centre[one], self.generators[:, one], self.slack[one])

    @functools.cached_property
    def reach(self) -> Tensor:
        """The greatest distance from the centre, rounded up."""
        return up(_magnitudes(self.generators) + self.slack, len(self.generators) + 1)

    @functools.cached_property
    def size(self) -> Tensor:
        """The greatest magnitude, rounded up."""
        return up(self.centre.abs() + self.reach, 1)

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        reach = up(self.reach + rounding_loss(1) * self.centre.abs(), 2)
        return self.centre - reach, self.centre + reach

    def __add__(self, other: Form) -> Form:
        """With broadcasting."""
        count, centre = max(len(self.generators), len(other.generators)), self.centre + other.centre
        some = [spread(x, count, centre.shape) for x in (self, other) if len(x.generators)]
        generators = total(some, centre).expand(count, *centre.shape)
        slack = self.slack + other.slack + rounding_loss(2) * (self.size + other.size)
        return Form(centre, generators, up(slack, 4))

    def __neg__(self) -> Form:
        return Form(-self.centre, -self.generators, self.slack)

    def __sub__(self, other: Form) -> Form:
        return self + -other


def _magnitudes(generators: Tensor) -> Tensor:
    """Σ |generators[k]|: block by block, since memory for all of them costs several times as much as the sums."""
    if generators.numel() <= BLOCK or generators.is_cuda:
        return generators.abs().sum(0)  # many times as fast as a norm
    total = generators.new_zeros(generators.shape[1:])
    for block in generators.split(max(1, BLOCK // generators[0].numel())):
        total += block.abs().sum(0)
    return total


def up(t: Tensor, terms: int) -> Tensor:
    """At least what a sum of so many terms ≥ 0 is, that was computed in float64."""
    return t * (1 + rounding_loss(terms)) + TINY


def halves(least: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """The middle of [least, most], and how far from it its ends lie, rounded up; 0 where they are one number."""
    centre = least / 2 + most / 2
    centre = torch.where(least == most, least, centre)
    half = torch.maximum(most - centre, centre - least)
    return centre, torch.where(half == 0, half, up(half, 1))


# --- linear functions of a form --------------------------------------------------------------------------------------


def mapped(
    function: Callable[[Tensor], Tensor],
    magnitude: Callable[[Tensor], Tensor],
    x: Form,
    added: Tensor | None = None,
    terms: int | None = None,
    at_once: int | None = None,
) -> Form:
    """A linear function of a form, and what it loses; ``magnitude``: with the magnitudes of its coefficients.

    Each result is a sum of at most so many ``terms``, by default as many as ``x`` has numbers, and each coefficient
    within a few u. ``at_once``: of how many generators it is best computed together; by default of all.
    """
    centre = function(x.centre)
    if added is not None:
        centre = centre + added
    generators = each(function, x.generators, centre, at_once)
    return Form(centre, generators, lost(magnitude, x, centre, terms or x.centre.numel()))


def lost(magnitude: Callable[[Tensor], Tensor], x: Form, centre: Tensor, terms: int) -> Tensor:
    """The slack of such a function with this centre."""
    slack = magnitude(up(x.slack + rounding_loss(terms) * x.size, 2)).abs()
    return up(slack, terms) + rounding_loss(2) * centre.abs()


def each(function: Callable[[Tensor], Tensor], generators: Tensor, like: Tensor, at_once: int | None = None) -> Tensor:
    """Of every generator, the result, which is shaped as another one."""
    count = len(generators)
    if not count:
        return like.new_empty(0, *like.shape)
    if at_once is None or count <= at_once:
        return torch.func.vmap(function)(generators)
    out = like.new_empty(count, *like.shape)
    for block, results in zip(generators.split(at_once), out.split(at_once), strict=True):
        results.copy_(torch.func.vmap(function)(block))
    return out


def moved(move: Callable[[Tensor], Tensor], x: Form) -> Form:
    """What only moves numbers, and rounds none."""
    centre = move(x.centre)
    return Form(centre, each(move, x.generators, centre), move(x.slack))


def reshaped(x: Form, shape: Sequence[int]) -> Form:
    sizes = list(shape)
    return moved(lambda t: t.reshape(sizes), x)


def scattered(x: Form, columns: Tensor, like: Form) -> Form:
    """Rows as long as another's, 0 but for these columns."""
    centre, slack = (torch.zeros_like(like.centre).index_copy(1, columns, t) for t in (x.centre, x.slack))
    generators = x.generators.new_zeros(len(x.generators), *centre.shape)
    generators[:, :, columns] = x.generators
    return Form(centre, generators, slack)


def padded(generators: Tensor, count: int) -> Tensor:
    """With zeros for symbols that it does not depend on."""
    missing = count - len(generators)
    return torch.cat([generators, generators.new_zeros(missing, *generators.shape[1:])]) if missing else generators


def spread(x: Form, count: int, shape: torch.Size) -> Tensor:
    """Generators for so many symbols, of an element of which a larger tensor is made by broadcasting."""
    missing = [1] * (len(shape) - x.centre.dim())
    return padded(x.generators, count).reshape(count, *missing, *x.centre.shape)


def total(terms: Sequence[Tensor], like: Tensor) -> Tensor:
    """The sum of generators, of which there may be none, of elements like this one."""
    return sum(terms[1:], terms[0]) if terms else like.new_empty(0, *like.shape)


# --- a form and an Interval that hold the same value ----------------------------------------------------------------


def narrower(x: Form, box: Interval, times: float | Tensor = 1.1) -> Form:
    """Element by element the box, where the form reaches so many times as far: what varies by symbols may cancel."""
    mid, rad = box.mid.double(), box.rad.double()
    worse = times * rad < x.reach
    return Form(torch.where(worse, mid, x.centre), x.generators * ~worse, torch.where(worse, rad, x.slack))


def magnitude(x: Form, box: Any) -> Tensor:
    """The greatest magnitude, by the form and by its box."""
    if isinstance(box, Interval):
        box = up(box.mid.double().abs() + box.rad.double(), 1)
    return x.size if box is None else torch.fmin(x.size, box.double().abs())


def common_ends(x: Form, box: Any) -> tuple[Tensor, Tensor]:
    """The ends of a form, and those that are known besides."""
    lower, upper = x.ends
    if not isinstance(box, Interval):
        return lower, upper
    least, greatest = ends(in_float64(box))
    lower, upper = torch.fmax(lower, least), torch.fmin(upper, greatest)
    meet = lower <= upper
    return torch.where(meet, lower, least), torch.where(meet, upper, greatest)


def within(x: Interval, form: Form) -> Interval:
    """The set cut down to the ends of a form, where these are narrower."""
    if isinstance(x.state, Standardised):
        return x
    (lower, upper), (least, greatest) = form.ends, ends(in_float64(x))
    lower, upper = torch.fmax(lower, least), torch.fmin(upper, greatest)
    # What is known besides may be about this midpoint.
    mid = x.mid if x.facts is not None else (lower / 2 + upper / 2).to(x.dtype)
    exact = mid.double()
    steps = torch.finfo(x.dtype)
    rad = torch.maximum(upper - exact, exact - lower) * (1 + 2 * steps.eps) + 2 * steps.smallest_normal * steps.eps
    rad = rad.to(x.dtype)
    better = (lower <= upper) & (rad < x.rad)
    return facts.kept(Interval.of(torch.where(better, mid, x.mid), torch.where(better, rad, x.rad)), x)
