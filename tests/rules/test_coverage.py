"""Every rule is exercised, by the captured graph of some case or by a direct call; what has none says so."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pyxai_bounds as xb
from pyxai_bounds.rules import RULES
from tests.rules.cases import MODULES, operators_on_sets, rand


def test_every_rule_has_a_case() -> None:
    covered = set()
    for name in MODULES:
        module = importlib.import_module(f"tests.rules.test_{name}")
        for case in module.CASES:
            covered |= operators_on_sets(case)
        covered |= {direct.op for direct in getattr(module, "DIRECT", [])}
    missing = sorted(op.name() for op in RULES if op not in covered)
    assert not missing, f"no test exercises the rules of {', '.join(missing)}"


# What docs/soundness.md says is refused.
REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "renorm": lambda x: torch.renorm(x, 2, 0, 1.0),
    "histc": lambda x: torch.histc(x, 4),
    "bincount": lambda x: torch.bincount(torch.tensor([0, 1, 1]), weights=x[:, 0]),
    "searchsorted": lambda x: torch.searchsorted(torch.linspace(-1, 1, 5).double(), x),
    "mode": lambda x: x.mode(1).values,
    "det": lambda x: torch.det(x),
    "svd": lambda x: torch.linalg.svdvals(x),
    "polygamma": lambda x: torch.polygamma(2, x),
    "embedding_bag": lambda x: F.embedding_bag(torch.tensor([[0, 1]]), x),
    "multi_margin_loss": lambda x: F.multi_margin_loss(x, torch.tensor([0, 1, 2])),
    "bicubic2d_aa": lambda x: F.interpolate(x[None, None], size=(2, 2), mode="bicubic", antialias=True),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named_with_its_place_and_a_way_out(name: str) -> None:
    x = rand(3, 3)
    with pytest.raises(xb.UnsupportedOperatorError, match="Rewrite these lines") as caught:
        xb.bound(REFUSED[name])(xb.Interval.linf(x, 0.1))
    operators = caught.value.operators
    assert any(name in operator and "test_coverage.py:" in source for operator, source in operators), operators


def test_what_is_refused_at_points_is_to_be_computed_outside() -> None:
    x = rand(3, 3).float()
    with pytest.raises(xb.UnsupportedOperatorError, match=r"aten::linalg_qr .at points.*compute it outside"):
        xb.bound(lambda y: y @ torch.linalg.qr(x).Q, sound=True)(xb.Interval.linf(x, 0.1))
    factor = torch.linalg.qr(x).Q
    assert xb.bound(lambda y: y @ factor, sound=True)(xb.Interval.linf(x, 0.1)).isfinite().all()
