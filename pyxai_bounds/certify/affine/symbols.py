"""The symbols of one evaluation: what may vary besides the input gets symbols of its own, as long as there is room.

So lines beside functions and products of two forms, of which something is left that no symbol so far explains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyxai_bounds.certify.affine.form import Form, each, halves, lost, magnitude, padded, spread, total, up
from pyxai_bounds.certify.lines import Line
from pyxai_bounds.certify.properties import rounding_loss
from pyxai_bounds.interval import Interval
from pyxai_bounds.rules.registry import ends, in_float64

NEGLIGIBLE = 8  # units of rounding of a value's size: what rounding adds gets no symbols
LEAST = 1e-9  # in any dtype


class Symbols:
    """So many of at most ``most`` there are.

    Values of ``rows`` samples, [rows, ...], have symbols by the same numbers, each row for whatever varies in it: what
    belongs to two rows is never added. ``dtype``: in which Intervals are rounded.
    """

    def __init__(self, most: int, rows: int = 1, dtype: torch.dtype = torch.float64) -> None:
        self.most, self.rows, self.count = most, rows, 0
        self.negligible = max(NEGLIGIBLE * torch.finfo(dtype).eps, LEAST)

    def fresh(
        self, form: Form, amounts: Tensor | None = None, however_small: bool = False, times: Tensor | None = None
    ) -> Form:
        """``form`` + [-amounts, amounts], each of which becomes a symbol of its own where there is room for it.

        Without amounts it is the slack that does. Amounts that rounding alone may have made become slack, unless all
        are wanted ``however_small`` they are. ``times``: by what the generators, and these alone, have yet to be
        multiplied, element by element.
        """
        if amounts is None:
            form, amounts = Form(form.centre, form.generators, torch.zeros_like(form.slack)), form.slack
        assert self.rows == 1 or len(amounts) % self.rows == 0, "rows meet"
        flat, centre = amounts.reshape(self.rows, -1), form.centre.reshape(self.rows, -1)
        if not flat.numel():
            return form
        least = 0.0 if however_small else self.negligible
        wanted = flat > least * (centre.abs() + flat).amax(1, keepdim=True)
        room = self.most - self.count
        if room < flat.shape[1] and int(wanted.sum(1).amax()) > room:
            largest = torch.zeros_like(wanted).scatter(1, flat.masked_fill(~wanted, 0.0).topk(room, 1).indices, True)
            wanted = wanted & largest
        row, place = wanted.nonzero(as_tuple=True)
        number = wanted.cumsum(1)[row, place] - 1
        added = int(number.amax()) + 1 if len(number) else 0
        left = up(form.slack + flat.masked_fill(wanted, 0.0).reshape(amounts.shape), 1)
        if not added and times is None:
            return Form(form.centre, form.generators, left)
        known = len(form.generators)
        generators = form.generators.new_empty(self.count + added if added else known, *amounts.shape)
        if times is None:
            generators[:known] = form.generators
        else:
            torch.mul(form.generators, times, out=generators[:known])
        generators[known:] = 0
        if added:
            generators[self.count :].view(added, self.rows, -1)[number, row, place] = flat[row, place]
        self.count += added
        return Form(form.centre, generators, left)

    def shared(self, form: Form, amounts: Tensor, dim: int) -> Form:
        """``form`` + ξ·amounts, a symbol for all along a dimension, not that of rows; slack if there is no room."""
        along = amounts.movedim(dim, 0)
        some = along.reshape(len(along), self.rows, -1)
        wanted = some.abs().amax(0) != 0
        added = int(wanted.sum(1).amax()) if wanted.numel() else 0
        if self.count + added > self.most:
            return Form(form.centre, form.generators, up(form.slack + amounts.abs(), 1))
        if not added:
            return form
        row, place = wanted.nonzero(as_tuple=True)
        new = some.new_zeros(added, *some.shape)
        new[wanted.cumsum(1)[row, place] - 1, :, row, place] = some[:, row, place].T
        new = new.reshape(added, *along.shape).movedim(1, dim + 1)
        before = padded(form.generators, self.count)
        self.count += added
        return Form(form.centre, torch.cat([before, new]), form.slack)

    def lined(self, x: Form, line: Line, known: Interval | None = None, symbols: bool = True) -> Form:
        """A function of numbers by a line beside it; where there is none it lies in what is ``known`` of it."""
        slope, least, most = line.slope, line.least, line.most
        if known is not None:
            lower, upper = ends(in_float64(known))
            beside = slope.isfinite() & least.isfinite() & most.isfinite()
            slope = torch.where(beside, slope, 0.0)
            least, most = torch.where(beside, least, lower), torch.where(beside, most, upper)
        centre, half = halves(least, most)
        centre = x.centre * slope + centre
        found = Form(centre, x.generators, lost(lambda t: t * slope.abs(), x, centre, 1))
        if not symbols:
            return Form(centre, x.generators * slope, up(found.slack + half, 1))
        return self.fresh(found, half, times=slope)

    def product(self, x: Form, y: Form, box: Any = None, other: Any = None) -> Form:
        """Elementwise; ``box`` and ``other``: what else is known of x and of y."""
        return self.bilinear(torch.mul, x, y, 1, box, other)

    def bilinear(
        self, product: Callable[[Tensor, Tensor], Tensor], x: Form, y: Form, terms: int, box: Any = None,
        other: Any = None, symbols: bool = True,
    ) -> Form:  # fmt: skip
        """Any product that is linear in both, with coefficients >= 0, of which each result sums so many terms.

        With x = c + d + e, where d varies by symbols and e within the slack, and y alike, x·y is c·c' + d·c' + c·d' and
        what is left: if y has no symbols, x·e' + e·c'; else no more than the product of both reaches, c·e' and e·c'.
        """
        centre = product(x.centre, y.centre)
        if not len(y.generators):
            left = product(magnitude(x, box), y.slack) + product(x.slack, y.centre.abs())
        elif not len(x.generators):
            left = product(x.slack, magnitude(y, other)) + product(x.centre.abs(), y.slack)
        else:
            left = product(x.reach, y.reach) + product(x.centre.abs(), y.slack) + product(x.slack, y.centre.abs())
        slack = up(rounding_loss(terms + 4) * product(x.size, y.size), terms + 4)
        left = up(left, terms + 6)
        if symbols and product is torch.mul and not len(y.generators) and x.centre.shape == centre.shape:
            return self.fresh(Form(centre, x.generators, slack), left, times=y.centre)
        count = max(len(x.generators), len(y.generators))
        some = []
        if len(x.generators):
            some.append(_times(product, x, y.centre, count, centre))
        if len(y.generators):
            swapped = product if product is torch.mul else lambda a, b: product(b, a)
            some.append(_times(swapped, y, x.centre, count, centre))
        generators = total(some, centre)
        if not symbols:
            return Form(centre, generators, up(slack + left, 1))
        return self.fresh(Form(centre, generators, slack), left)


def _times(product: Callable[[Tensor, Tensor], Tensor], x: Form, y: Tensor, count: int, like: Tensor) -> Tensor:
    """The generators of a form, each times a number."""
    if product is torch.mul:
        return spread(x, count, like.shape) * y
    return padded(each(lambda t: product(t, y), x.generators, like), count)
