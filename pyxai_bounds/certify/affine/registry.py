"""The table of rules for forms: what has none takes the Interval that the rules of ``pyxai_bounds.rules`` give."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch._ops import OpOverload

from pyxai_bounds.certify.affine.form import Form


@dataclass(frozen=True)
class FormRule:
    """``function(evaluator, node, result)``: the form of a node's result, or None; ``result``: its Interval.

    Of an operator with several results the node is the one that takes one of them; see :func:`call_of`.
    moves: it only moves numbers, so that a form and its Interval stay as good as they were. takes_places: also those
    that differ within the box. unread: arguments of which it looks at Intervals alone, so that their forms need not be
    kept for it.
    """

    function: Callable[..., Form | None]
    moves: bool = False
    takes_places: bool = False
    unread: tuple[int, ...] = ()


RULES: dict[Any, FormRule] = {}


def form_rule(
    *operators: OpOverload, moves: bool = False, takes_places: bool = False, unread: tuple[int, ...] = ()
) -> Callable[[Callable], Callable]:
    """Register a function as the rule of the operators; see :class:`FormRule`."""

    def register(function: Callable) -> Callable:
        for op in operators:
            assert op not in RULES, f"{op} has two rules"
            RULES[op] = FormRule(function, moves, takes_places, unread)
        return function

    return register


def call_of(n: fx.Node) -> Any:
    """The operator's own node, of a node that may be one of its results."""
    return n.args[0] if n.target is operator.getitem else n
