"""The recipes' script: it trains what it names, from the seed alone, and measures what it says."""

import csv
import dataclasses

import pytest
import torch

from bench import recipes
from pyxai_bounds import data


@pytest.fixture(scope="module")
def few():
    whole = data.load("digits-parity")
    return dataclasses.replace(
        whole, train_x=whole.train_x[:100], train_y=whole.train_y[:100],
        test_x=whole.test_x[:30], test_y=whole.test_y[:30],
    )  # fmt: skip


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_short_run_measures_and_repeats(name, few, one_thread, tmp_path):
    settings = dataclasses.replace(recipes.RECIPES[name], epochs=3, natural_epochs=2)
    first, again = (recipes.train(settings, few, seed=1) for _ in range(2))
    assert not first.training
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    found = recipes.measure(first, few)
    right = first(few.test_x).argmax(1) == few.test_y
    assert found["accuracy"] == round(right.double().mean().item(), 4)
    assert 0 <= found["certified_02"] <= found["certified_01"] <= 1
    assert len(found["unstable_by_layer"]) == len(found["switching_by_layer"]) >= 6
    assert 1 <= found["top_sets"] <= 30
    row = dict.fromkeys(recipes.COLUMNS, "") | found
    for _ in range(2):
        recipes.append(tmp_path / "recipes.csv", row)
    with open(tmp_path / "recipes.csv", newline="") as file:
        assert [float(r["accuracy"]) for r in csv.DictReader(file)] == [found["accuracy"]] * 2


def test_another_split_has_the_same_samples():
    whole = data.load("digits-parity")
    other = recipes.other_split(whole, 1)
    assert other.train_x.shape == whole.train_x.shape and not torch.equal(other.test_x, whole.test_x)
    sums = [torch.cat([d.train_x, d.test_x]).double().flatten(1).sum(1).sort().values for d in (whole, other)]
    assert torch.equal(*sums)
