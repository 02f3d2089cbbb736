"""Forms of operators that are linear, or affine, in one argument, and of sums and joins of several."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from pyxai_bounds.certify.affine.evaluator import Evaluator
from pyxai_bounds.certify.affine.form import BLOCK, Form, mapped, moved, padded
from pyxai_bounds.certify.affine.registry import call_of, form_rule
from pyxai_bounds.certify.differences import LINEAR_AT
from pyxai_bounds.fuse import VIEWS
from pyxai_bounds.interval import Interval
from pyxai_bounds.rules import RULES as INTERVAL_RULES

aten = torch.ops.aten

_COPIES = (aten.clone.default, aten.alias.default, aten.detach.default)
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)
_POOLS = (
    *(aten.avg_pool2d.default, aten.avg_pool3d.default, aten._adaptive_avg_pool2d.default),
    *(aten.avg_pool2d_backward.default, aten.avg_pool3d_backward.default, aten._adaptive_avg_pool2d_backward.default),
)
_MOVES = (
    *(aten.select_backward.default, aten.slice_backward.default, aten.gather.default, aten.index_select.default),
    *(aten.flip.default, aten.repeat.default, aten.mean.default, aten.sum.default),
)
# What is linear in an argument, all others being numbers: as where rankings are cut, and affine operators.
_AFFINE_AT = {
    **LINEAR_AT,
    **dict.fromkeys((*_POOLS, aten.constant_pad_nd.default, *_SPLITS, *_MOVES), (0,)),
    **dict.fromkeys((aten.mul.Scalar, aten.div.Scalar), (0,)),
    aten.addmm.default: (1,),
}
_REARRANGED = frozenset(
    (*_COPIES, *VIEWS, aten.t.default, aten.permute.default, aten.transpose.int, aten.unsqueeze.default,
     aten.squeeze.dim)
)  # fmt: skip
# Whose other arguments are coefficients: ``products`` has rules for two sets.
_SCALING = (
    *(aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar),
    *(aten.mm.default, aten.bmm.default, aten.addmm.default),
)
_BIAS_AT: dict[Any, int] = {aten.convolution.default: 2, aten.addmm.default: 0}


@form_rule(*_REARRANGED, moves=True)
def rearranged(run: Evaluator, n: fx.Node, result: Interval) -> Form | None:
    """Nothing is rounded."""
    x = run.forms[n.args[0]]  # type: ignore[index]
    if n.target in _COPIES:
        return x
    move: Any = aten.reshape.default if n.target in VIEWS else n.target
    rest, options = n.args[1:], n.kwargs
    return moved(lambda t: move(t, *rest, **options), x)


@form_rule(*(_AFFINE_AT.keys() - _REARRANGED - {*_SCALING, aten.convolution.default}))
def linear(run: Evaluator, n: fx.Node, result: Interval) -> Form | None:
    """In one argument, all others being numbers."""
    call = call_of(n)
    place = next((i for i in _AFFINE_AT[call.target] if call.args[i] in run.forms), None)
    if place is None or call.args.count(call.args[place]) != 1:
        return None
    x = run.forms[call.args[place]]
    values = [run.env[arg] if isinstance(arg, fx.Node) else arg for arg in call.args]
    for i in INTERVAL_RULES[call.target].shape_only:
        if isinstance(values[i], Interval):
            values[i] = values[i].mid
    if any(isinstance(v, Interval) for i, v in enumerate(values) if i != place):
        return None
    if any(values[2:]) if call.target is aten.constant_pad_nd.default else {"alpha", "beta"} & call.kwargs.keys():
        return None
    if not (call.kwargs.get("dtype") or torch.float64).is_floating_point:  # terms are cut down to integers
        return None
    values = [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]
    kwargs = {key: torch.float64 if isinstance(v, torch.dtype) else v for key, v in call.kwargs.items()}
    added, bias_at = None, _BIAS_AT.get(n.target)
    if bias_at is not None and values[bias_at] is not None:
        added = values[bias_at]
        added = added if n.target is aten.addmm.default else added.reshape(-1, *[1] * (n.meta["val"].dim() - 2))
        values[bias_at] = torch.zeros_like(values[bias_at]) if n.target is aten.addmm.default else None
    coefficients = (Tensor, float, int) if call.target in _SCALING else Tensor
    truths = bool, torch.bool
    sizes = [
        abs(v) if isinstance(v, coefficients) and getattr(v, "dtype", type(v)) not in truths else v for v in values
    ]

    def function(t: Tensor, values: list[Any] = values) -> Tensor:
        found = call.target(*values[:place], t, *values[place + 1 :], **kwargs)
        return found if call is n else found[n.args[1]]

    terms, at_once = x.centre.numel() // run.symbols.rows, None
    if call.target is aten.convolution.default:
        at_once = _convolved_at_once(n.meta["val"], values[1], x.centre)
    return mapped(function, lambda t: function(t, sizes), x, added, terms, at_once)


def _convolved_at_once(result: Tensor, weight: Tensor, x: Tensor) -> int | None:
    """PyTorch's convolution in float64 on a CPU writes down what each output reads, of all images before it begins: a
    small part of them at once, which a cache holds, takes a third of the time.
    """
    read = x.shape[:2].numel() * weight[0, 0].numel() * result[0, 0].numel()
    return None if x.is_cuda else max(1, 2 * BLOCK // max(1, read))


_ADDED = (aten.add.Tensor, aten.add.Scalar)
_SUBTRACTED_FROM = (aten.rsub.Scalar, aten.rsub.Tensor)


@form_rule(*_ADDED, aten.sub.Tensor, aten.sub.Scalar, *_SUBTRACTED_FROM)
def added(run: Evaluator, n: fx.Node, result: Interval) -> Form:
    factor = float(n.kwargs.get("alpha", n.args[2] if len(n.args) > 2 else 1))  # type: ignore[arg-type]
    x, y = (run.operand(arg) for arg in n.args[:2])
    if n.target in _SUBTRACTED_FROM:
        x, y = y, x
    if n.target not in _ADDED:
        factor = -factor
    if factor != 1:
        y = mapped(lambda t: t * factor, lambda t: t * abs(factor), y)
    return x + y


@form_rule(aten.cat.default, aten.stack.default)
def joined(run: Evaluator, n: fx.Node, result: Interval) -> Form:
    parts: Any = [run.operand(arg) for arg in n.args[0]]  # type: ignore[union-attr]
    if n.target is aten.cat.default:  # which passes over tensors of shape [0], whatever the others have
        parts = [part for part in parts if part.centre.shape != (0,)] or parts
    dim = int(n.args[1]) if len(n.args) > 1 else 0  # type: ignore[arg-type]
    dim %= len(n.meta["val"].shape)
    join: Any = torch.cat if n.target is aten.cat.default else torch.stack
    count = max(len(part.generators) for part in parts)
    generators = join([padded(part.generators, count) for part in parts], dim + 1)
    return Form(join([part.centre for part in parts], dim), generators, join([part.slack for part in parts], dim))
