"""Every rule is exercised: by the captured graph of some case, or by a direct call of the rule."""

from __future__ import annotations

import importlib

from pyxai_bounds.rules import RULES
from tests.rules.cases import operators_on_sets

MODULES = (
    "linear",
    "conv",
    "activation",
    "pool",
    "norm",
    "elementwise",
    "logic",
    "ranks",
    "reduce",
    "shape",
    "softmax",
)


def test_every_rule_has_a_case() -> None:
    covered = set()
    for name in MODULES:
        module = importlib.import_module(f"tests.rules.test_{name}")
        for case in module.CASES:
            covered |= operators_on_sets(case)
        covered |= {direct.op for direct in getattr(module, "DIRECT", [])}
    missing = sorted(op.name() for op in RULES if op not in covered)
    assert not missing, f"no test exercises the rules of {', '.join(missing)}"
