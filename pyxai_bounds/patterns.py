"""Norms that a captured graph computes in plain operators, x less its mean and x·(mean x² + eps)^−½, found by what is
computed: one by one, these forget that their arguments move together. Read by ``interpreter``.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import fx

aten = torch.ops.aten


class Part(NamedTuple):
    """What a node of the graph has to do with a norm over the last ``dims`` dimensions of x.

    centred: x − mean x. inverse: 1/σ, σ² = mean x² + eps; value: x/σ. gradient: g/σ, one of the two terms of x's
    gradient; rest: the other one, −x·Σ(gx)/(Nσ³). Both go into one sum and nowhere else, so that either may stand for
    both.
    """

    role: Literal["centred", "inverse", "value", "gradient", "rest"]
    x: fx.Node
    dims: int
    eps: float
    inverse: fx.Node  # or σ, where x is divided by it
    grad: fx.Node | None = None


def norms(graph: fx.Graph) -> dict[fx.Node, Part]:
    """The nodes that are parts of such norms."""
    parts: dict[fx.Node, Part] = {}
    for node in graph.find_nodes(op="call_function", target=aten.sub.Tensor):
        x, mean = node.args
        if _is(node, aten.sub.Tensor) and _is(mean, aten.mean.dim) and mean.args[0] is x and mean.args[2:] == (True,):
            dims = _trailing(mean.args[1], x.meta["val"].dim())
            if dims and x.meta["val"].dtype == mean.meta["val"].dtype == node.meta["val"].dtype:
                parts[node] = Part("centred", x, dims, 0.0, node)
    for root in graph.find_nodes(op="call_function", target=aten.sqrt.default):
        norm = _norm(root)
        for user in root.users if norm is not None else ():
            if _is(user, aten.div.Tensor) and user.args[1] is root and _same(user.args[0], norm.x):  # type: ignore[union-attr]
                parts[user] = norm._replace(role="value")  # type: ignore[union-attr]
    for inverse in graph.find_nodes(op="call_function", target=aten.rsqrt.default):
        norm = _norm(inverse)
        if norm is None:
            continue
        parts[inverse] = norm
        for user in inverse.users:
            if _is(user, aten.mul.Tensor) and set(user.args) == {norm.x, inverse}:
                parts[user] = norm._replace(role="value")
            elif _is(user, aten.pow.Tensor_Scalar) and user.args[1] == 3:
                for product in user.users:
                    _find_gradient(norm, product, user, parts)
    return parts


def _is(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in targets and not node.kwargs


def _same(a: Any, b: fx.Node) -> bool:
    """One node, or the same operator of the same arguments once more."""
    return a is b or (_is(a, b.target) and not b.kwargs and a.args == b.args)


def _norm(inverse: fx.Node) -> Part | None:
    total: Any = inverse.args[0]
    if not _is(total, aten.add.Tensor, aten.add.Scalar):
        return None
    mean, eps = cast(Any, total.args)
    if not _is(mean, aten.mean.dim) or len(mean.args) != 3 or not mean.args[2]:
        return None
    square, over, _ = mean.args
    squares = (_is(square, aten.pow.Tensor_Scalar) and square.args[1] == 2) or (
        _is(square, aten.mul.Tensor) and square.args[0] is square.args[1]
    )
    # A tiny eps is lost where squares underflow.
    if not squares or not isinstance(eps, int | float) or not 1e-100 < eps < math.inf:
        return None
    x = square.args[0]
    value = x.meta["val"]
    dims = _trailing(over, value.dim())
    if not dims or value.dtype != inverse.meta["val"].dtype or value.dtype not in (torch.float32, torch.float64):
        return None
    return Part("inverse", x, dims, float(eps), inverse)


def _trailing(over: Any, dims: int) -> int:
    """How many dimensions these are, if they are the last ones."""
    named = sorted(d % dims for d in over) if over and dims else []
    return len(named) if named == list(range(dims - len(named), dims)) else 0


def _find_gradient(norm: Part, scaled: fx.Node, cube: fx.Node, parts: dict[fx.Node, Part]) -> None:
    """From Σ(gx)·−½·σ⁻³ on: divided by N, times 2x, and added to the gradient g/σ."""
    if not _is(scaled, aten.mul.Tensor) or len(scaled.users) != 1:
        return
    half, power = cast(Any, scaled.args)
    total: Any = half.args[0] if _is(half, aten.mul.Scalar) and half.args[1] == -0.5 and power is cube else None
    if not _is(total, aten.sum.dim_IntList) or len(total.args) != 3 or not total.args[2]:
        return
    product, over, _ = total.args
    shape = norm.x.meta["val"].shape
    if _trailing(over, len(shape)) != norm.dims or not _is(product, aten.mul.Tensor) or norm.x not in product.args:
        return
    grad: Any = product.args[1 if product.args[0] is norm.x else 0]
    if not isinstance(grad, fx.Node) or grad.meta["val"].shape != shape:
        return
    expanded = _only_user(scaled, aten.expand.default)
    divided = _only_user(expanded, aten.div.Scalar)
    rest = _only_user(divided, aten.mul.Tensor)
    if rest is None or divided.args[1] != math.prod(shape[-norm.dims :]):  # type: ignore[union-attr]
        return
    twice: Any = rest.args[1 if rest.args[0] is divided else 0]
    single: Any = twice.args[0] if _is(twice, aten.mul.Scalar) and twice.args[1] == 2 else None
    if single is not norm.x and not (
        _is(single, aten.pow.Tensor_Scalar) and single.args[0] is norm.x and single.args[1] == 1
    ):
        return
    products = (n for n in norm.inverse.users if _is(n, aten.mul.Tensor) and set(n.args) == {grad, norm.inverse})
    straight = next(products, None)
    if straight is None or straight in parts or grad is norm.x or _sum_of(straight) is not _sum_of(rest):
        return
    parts[straight] = norm._replace(role="gradient", grad=grad)
    parts[rest] = norm._replace(role="rest", grad=grad)


def _only_user(node: fx.Node | None, target: Any) -> fx.Node | None:
    """The one node that reads this one, and reads it once."""
    if node is None or len(node.users) != 1:
        return None
    user = next(iter(node.users))
    return user if _is(user, target) and user.args.count(node) == 1 else None


def _sum_of(term: fx.Node) -> fx.Node:
    """The last of the sums into which a node goes, and whose parts are read by nobody else."""
    shape = term.meta["val"].shape
    while (user := _only_user(term, aten.add.Tensor)) is not None and user.meta["val"].shape == shape:
        term = user
    return term
