"""The contenders by name: one list for the table, the check against the committed one, and the curves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from bench import measure
from bench.measure import LAYOUTS, Case, Contender
from bench.peers import agt, auto_lirpa


@dataclass(frozen=True)
class Kind:
    """``layouts``: the memory orders that it is tried in, where images have more than one; the fastest counts."""

    make: Callable[[Case, str], Contender]
    layouts: tuple[str, ...] = tuple(LAYOUTS)
    compiled: bool = False  # takes a minute
    quick: bool = False  # measured by --quick and --check, too
    exact: bool = True  # computes the bounds, so that they can be compared


CONTIGUOUS = ("contiguous",)
CONTENDERS = {
    "native": Kind(functools.partial(measure.engine, backend="native"), quick=True),
    "reference": Kind(functools.partial(measure.engine, backend="reference")),
    "plain": Kind(measure.plain, CONTIGUOUS, quick=True),
    "tuned": Kind(measure.eager, quick=True),
    "plain-compiled": Kind(functools.partial(measure.plain, compiled=True), CONTIGUOUS, compiled=True),
    "tuned-compiled": Kind(functools.partial(measure.eager, compiled=True), ("channels-last",), compiled=True),
    "agt": Kind(functools.partial(measure.peer, make=agt.gradient_bounds, trains=True), CONTIGUOUS),
    "auto_lirpa": Kind(functools.partial(measure.peer, make=auto_lirpa.gradient_bounds, trains=False), CONTIGUOUS),
    "auto_lirpa-any-label": Kind(
        functools.partial(measure.peer, make=auto_lirpa.any_label, trains=False), CONTIGUOUS
    ),
    "floor": Kind(measure.floor, quick=True, exact=False),
}  # fmt: skip


def layouts(case: Case, kind: Kind) -> list[str]:
    """The memory orders of ``kind`` that make a difference for this case."""
    return [name for name in case.layouts if name in kind.layouts] or list(CONTIGUOUS)
