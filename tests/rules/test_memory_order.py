"""The memory order of an image changes no bound: ReLU's packed bits are read in the order that they were written in."""

from __future__ import annotations

import importlib

import pytest
import torch

import pyxai_bounds as xb


@pytest.mark.parametrize("name", ["conv", "pool", "norm", "shape"])
def test_channels_last_gives_the_same_bounds(name: str) -> None:
    for case in importlib.import_module(f"tests.rules.test_{name}").CASES:
        if case.x.dim() != 4:
            continue
        results = []
        for order in (torch.contiguous_format, torch.channels_last):
            box = xb.Interval.linf(case.x.contiguous(memory_format=order), case.eps)
            with torch.no_grad():
                results.append(xb.bound(case.explained)(box))
        for plain, last in zip(*results, strict=True):
            scale = 1e-12 * (plain.mid.abs() + plain.rad).max().clamp(min=1e-300)
            assert (plain.mid - last.mid).abs().max() <= scale, f"{case}"
            assert (plain.rad - last.rad).abs().max() <= scale, f"{case}"
