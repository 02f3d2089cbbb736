"""The symbols of one evaluation: what may vary besides the input gets symbols of its own, as long as there is room.

So lines beside functions and products of two forms, of which something is left that no symbol so far explains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyxai_bounds.certify.affine.form import Form, each, halves, magnitude, mapped, padded, spread, up
from pyxai_bounds.certify.lines import Line
from pyxai_bounds.certify.properties import rounding_loss
from pyxai_bounds.interval import Interval
from pyxai_bounds.rules.registry import ends, in_float64

NEGLIGIBLE = 1e-9  # of a value's size: what rounding adds gets no symbols


class Symbols:
    """So many of at most ``most`` there are."""

    def __init__(self, most: int) -> None:
        self.most, self.count = most, 0

    def fresh(self, form: Form, amounts: Tensor | None = None) -> Form:
        """``form`` + [-amounts, amounts], each of which becomes a symbol of its own where there is room for it.

        Without amounts it is the slack that does.
        """
        if amounts is None:
            form, amounts = Form(form.centre, form.generators, torch.zeros_like(form.slack)), form.slack
        size = (form.centre.abs() + amounts).amax() if amounts.numel() else 0.0
        wanted = (amounts.flatten() > NEGLIGIBLE * size).nonzero()[:, 0]
        room = self.most - self.count
        if len(wanted) > room:
            wanted = wanted[amounts.flatten()[wanted].topk(room).indices]
        new = amounts.new_zeros(len(wanted), amounts.numel())
        new[torch.arange(len(wanted), device=new.device), wanted] = amounts.flatten()[wanted]
        left = amounts.flatten().index_fill(0, wanted, 0.0).reshape(amounts.shape)
        before = padded(form.generators, self.count) if len(wanted) else form.generators
        self.count += len(wanted)
        generators = torch.cat([before, new.reshape(len(wanted), *amounts.shape)])
        return Form(form.centre, generators, up(form.slack + left, 1))

    def shared(self, form: Form, amounts: Tensor, dim: int) -> Form:
        """``form`` + ξ·amounts, a symbol for all that lie along a dimension; slack where there is no room for them."""
        rows = amounts.movedim(dim, 0).flatten(1)
        wanted = rows.abs().amax(0).nonzero()[:, 0]
        if self.count + len(wanted) > self.most:
            return Form(form.centre, form.generators, up(form.slack + amounts.abs(), 1))
        if not len(wanted):
            return form
        new = rows.new_zeros(len(wanted), *rows.shape)
        new[torch.arange(len(wanted), device=rows.device), :, wanted] = rows[:, wanted].T
        new = new.reshape(len(wanted), amounts.shape[dim], *amounts.movedim(dim, 0).shape[1:]).movedim(1, dim + 1)
        before = padded(form.generators, self.count)
        self.count += len(wanted)
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
        found = mapped(lambda t: t * slope, lambda t: t * slope.abs(), x, centre, terms=1)
        if not symbols:
            return Form(found.centre, found.generators, up(found.slack + half, 1))
        return self.fresh(found, half)

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
        count = max(len(x.generators), len(y.generators))
        if product is torch.mul:
            generators = spread(x, count, centre.shape) * y.centre + spread(y, count, centre.shape) * x.centre
        else:
            by_x = each(lambda t: product(t, y.centre), x.generators, centre)
            by_y = each(lambda t: product(x.centre, t), y.generators, centre)
            generators = padded(by_x, count) + padded(by_y, count)
        slack = up(rounding_loss(terms + 4) * product(x.size, y.size), terms + 4)
        left = up(left, terms + 6)
        if not symbols:
            return Form(centre, generators, up(slack + left, 1))
        return self.fresh(Form(centre, generators, slack), left)
