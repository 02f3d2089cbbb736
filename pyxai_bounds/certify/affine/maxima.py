"""Forms of the greatest of several: max pools and their gradients, and maxima over a dimension."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from pyxai_bounds.certify import lines
from pyxai_bounds.certify.affine.evaluator import Evaluator
from pyxai_bounds.certify.affine.form import Form, common_ends, mapped, moved, reshaped, scattered, up
from pyxai_bounds.certify.affine.registry import call_of, form_rule
from pyxai_bounds.certify.affine.symbols import Symbols
from pyxai_bounds.interval import Interval
from pyxai_bounds.rules.registry import Indices, UnsupportedArgumentsError, in_float64

aten = torch.ops.aten


def greatest(symbols: Symbols, x: Form, box: Interval, index: Tensor) -> Form | None:
    """Of each column of places [P, M] in a row of x flattened, -1 for none, [rows, M]: max(a, b) = a + relu(b - a), one
    by one, from that of the greatest lower end on. What lies below that end cannot be the greatest.
    """
    if not bool(box.isfinite().all()):
        return None
    rows = symbols.rows
    flat = reshaped(x, [rows, -1])
    lower, upper = (t.reshape(rows, -1)[:, index] for t in common_ends(x, box))  # [rows, P, M]
    lower, upper = (torch.where(index < 0, -math.inf, t) for t in (lower, upper))
    order = lower.argsort(dim=1, descending=True, stable=True)
    lower, upper = (t.gather(1, order) for t in (lower, upper))
    index = index.clamp(min=0).expand(rows, -1, -1).gather(1, order)

    def taken(places: Tensor) -> Form:
        return moved(lambda t: t.gather(1, places), flat)

    best = taken(index[:, 0])
    for place in range(1, index.shape[1]):
        above = upper[:, place] > lower[:, 0]
        columns = above.any(0).nonzero()[:, 0]  # of some row
        if len(columns):
            ahead = taken(index[:, place, columns]) - moved(lambda t, at=columns: t[:, at], best)  # type: ignore[misc]
            least, furthest = ahead.ends
            furthest = torch.fmin(furthest, up(upper[:, place, columns] - lower[:, 0, columns], 1))
            furthest = torch.fmax(furthest, least)
            shut = ~above[:, columns]
            least, furthest = torch.where(shut, -1.0, least), torch.where(shut, 0.0, furthest)
            best = best + scattered(symbols.lined(ahead, lines.rectified(least, furthest)), columns, best)
    return best


@form_rule(aten.amax.default)
def maximum(run: Evaluator, n: fx.Node, result: Interval) -> Form | None:
    """Over one dimension."""
    x, box = run.operand(n.args[0]), run.value(n.args[0])
    named: Any = n.args[1] if len(n.args) > 1 else None
    dims = [named] if isinstance(named, int) else named
    if not dims or len(dims) != 1 or not isinstance(box, Interval) or x.centre.dim() == 0:
        return None
    shape, rows = x.centre.shape, run.symbols.rows
    places = torch.arange(shape.numel() // rows, device=x.centre.device).reshape(shape[0] // rows, *shape[1:])
    found = greatest(run.symbols, x, in_float64(box), places.movedim(dims[0], 0).flatten(1))
    return None if found is None else reshaped(found, result.shape)


@form_rule(
    *(aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default),
    *(aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default),
)
def pool(run: Evaluator, n: fx.Node, result: Interval) -> Form | None:
    call = call_of(n)
    indices = run.env[call][1]
    if n.args[1] != 0 or call.args[0] not in run.forms or not isinstance(indices, Indices):
        return None
    x = run.forms[call.args[0]]
    try:
        places = indices.windows()[1]
    except UnsupportedArgumentsError:
        return None
    planes = x.centre.numel() // (places.whole * run.symbols.rows)
    first = torch.arange(planes, device=x.centre.device)[:, None] * places.whole
    index = places.index[:, None] + first
    index = torch.where((places.index < places.whole)[:, None], index, -1)
    found = greatest(run.symbols, x, run.value(call.args[0]), index.flatten(1))
    return None if found is None else reshaped(found, result.shape)


@form_rule(
    *(aten.max_pool2d_with_indices_backward.default, aten.max_pool3d_with_indices_backward.default),
    *(aten.adaptive_max_pool2d_backward.default, aten.adaptive_max_pool3d_backward.default),
    takes_places=True,
)
def pool_backward(run: Evaluator, n: fx.Node, result: Interval) -> Form | None:
    """Each place of a window gets the gradient times 0, 1, or either; of two that may get it, one does."""
    indices, grad = run.value(n.args[-1]), run.operand(n.args[0])
    try:
        x, places = indices.windows()
    except (AttributeError, UnsupportedArgumentsError):
        return None
    each = [run.symbols.rows, -1, *places.index.shape]  # rows, planes, positions, windows
    must, may = (t.to(torch.float64).reshape(each) for t in places.first_maximum(in_float64(x)))
    windows = reshaped(grad, [*must.shape[:2], 1, must.shape[3]])
    sure = mapped(lambda t: t * (must + may) / 2, lambda t: t * (must + may) / 2, windows, terms=1)
    unsure = up(windows.size * (may - must) / 2, 2) * (may - must)
    two = (may.sum(2, keepdim=True) == 2) & (must.sum(2, keepdim=True) == 0)
    signs = torch.where(may.cumsum(2) > 1, -1.0, 1.0) * unsure * two
    parts = run.symbols.fresh(run.symbols.shared(sure, signs, 2), torch.where(two, 0.0, unsure))

    def fold(t: Tensor) -> Tensor:
        return places.fold(t.flatten(0, 1))

    return reshaped(mapped(fold, fold, parts, terms=len(places.index)), result.shape)
