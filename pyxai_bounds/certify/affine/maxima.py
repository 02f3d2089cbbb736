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
    """Of each column of places [P, M] in x flattened, -1 for none: max(a, b) = a + relu(b - a), one by one, from
    that of the greatest lower end on. What lies below that end cannot be the greatest.
    """
    if not bool(box.isfinite().all()):
        return None

    def taken(x: Form, places: Tensor) -> Form:
        return moved(lambda t: t[places], x)

    flat = reshaped(x, [-1])
    lower, upper = (t.flatten()[index] for t in common_ends(x, box))
    lower, upper = (torch.where(index < 0, -math.inf, t) for t in (lower, upper))
    order = lower.argsort(0, descending=True)
    index, lower, upper = (t.gather(0, order) for t in (index, lower, upper))
    best = taken(flat, index[0])
    for place, most in zip(index[1:], upper[1:], strict=True):
        open_ = (most > lower[0]).nonzero()[:, 0]
        if len(open_):
            ahead = taken(flat, place[open_]) - taken(best, open_)
            least, furthest = ahead.ends
            furthest = torch.fmin(furthest, up(most[open_] - lower[0, open_], 1))
            furthest = torch.fmax(furthest, least)
            best = best + scattered(symbols.lined(ahead, lines.rectified(least, furthest)), open_, best)
    return best


@form_rule(aten.amax.default)
def maximum(run: Evaluator, n: fx.Node, result: Interval) -> Form | None:
    """Over one dimension."""
    x, box = run.operand(n.args[0]), run.value(n.args[0])
    named: Any = n.args[1] if len(n.args) > 1 else None
    dims = [named] if isinstance(named, int) else named
    if not dims or len(dims) != 1 or not isinstance(box, Interval) or x.centre.dim() == 0:
        return None
    places = torch.arange(x.centre.numel(), device=x.centre.device).reshape(x.centre.shape)
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
    x, shape = run.forms[call.args[0]], n.meta["val"].shape
    try:
        places = indices.windows()[1]
    except UnsupportedArgumentsError:
        return None
    rows = x.centre.numel() // places.whole
    first = torch.arange(rows, device=x.centre.device)[:, None] * places.whole
    index = places.index[:, None] + first
    index = torch.where((places.index < places.whole)[:, None], index, -1)
    found = greatest(run.symbols, x, run.value(call.args[0]), index.flatten(1))
    return None if found is None else reshaped(found, shape)


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
    must, may = (t.to(torch.float64) for t in places.first_maximum(in_float64(x)))
    windows = reshaped(grad, [must.shape[0], 1, must.shape[2]])
    sure = mapped(lambda t: t * (must + may) / 2, lambda t: t * (must + may) / 2, windows, terms=1)
    unsure = up(windows.size * (may - must) / 2, 2) * (may - must)
    two = (may.sum(1, keepdim=True) == 2) & (must.sum(1, keepdim=True) == 0)
    signs = torch.where(may.cumsum(1) > 1, -1.0, 1.0) * unsure * two
    parts = run.symbols.fresh(run.symbols.shared(sure, signs, 1), torch.where(two, 0.0, unsure))

    def fold(t: Tensor) -> Tensor:
        return places.fold(t)

    return reshaped(mapped(fold, fold, parts, terms=len(places.index)), result.shape)
