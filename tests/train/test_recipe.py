"""Recipes: options that fit their objective, presets that can be trained, and JSON there and back."""

from typing import Literal

import pytest
import torch
from torch import nn

from pyxai_bounds.train import Options, Recipe, objectives
from pyxai_bounds.train.recipe import objective_of, typed_options


def sample(
    model, x, y, eps, clip=None, *,
    alpha: float = 1.0, steps: int = 3, kind: Literal["a", "b"] = "a", flag: bool = False,
    limit: float | None = None, columns: tuple[int, ...] = (), name: str = "x",
):  # fmt: skip
    return alpha * model(x).sum()


@pytest.fixture(autouse=True)
def an_objective(monkeypatch):
    monkeypatch.setitem(objectives.OBJECTIVES, "sample", sample)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ({"alpha": "0.5"}, {"alpha": 0.5}), ({"alpha": 2}, {"alpha": 2.0}), ({"steps": "7"}, {"steps": 7}),
        ({"kind": "b"}, {"kind": "b"}), ({"flag": "yes"}, {"flag": True}), ({"flag": False}, {"flag": False}),
        ({"limit": "none"}, {"limit": None}), ({"limit": "1e-3"}, {"limit": 1e-3}),
        ({"columns": "1,4,"}, {"columns": (1, 4)}), ({"columns": [2]}, {"columns": (2,)}),
        ({"name": "7"}, {"name": "7"}),
    ],
)  # fmt: skip
def test_text_becomes_what_the_signature_asks_for(text, value):
    typed = typed_options("sample", text)
    assert typed == value and [type(v) for v in typed.values()] == [type(v) for v in value.values()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 1}, "sample has no option beta; it has alpha, steps, kind, flag, limit, columns, name"),
        ({"clip": (0, 1)}, "no option clip"),
        ({"alpha": "much"}, "alpha of sample is 'much'; it must be a number"),
        ({"steps": "1.5"}, "it must be a whole number"),
        ({"kind": "c"}, "kind of sample is 'c'; choose one of a, b"),
        ({"flag": "perhaps"}, "choose true or false"),
        ({"limit": "much"}, "it must be a number"),
    ],
)
def test_an_option_that_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        typed_options("sample", options)


def test_the_objective_gets_its_options():
    model = nn.Linear(2, 2, bias=False)
    x, y = torch.ones(1, 2), torch.tensor([0])
    loss = objective_of(Recipe(objective="sample", options={"alpha": "3"}), (0.0, 1.0))(model, x, y, 0.1)
    assert loss == 3 * model(x).sum()
    with pytest.raises(ValueError, match="no objective 'rce'; choose one of natural, rec"):
        objective_of(Recipe(objective="rce"), None)


def test_json_there_and_back():
    recipe = Recipe(objective="sample", options=Options(alpha=0.1), class_weights=(3.0, 1.0), lr_schedule="steps",
                    lr_steps=((5, 0.1),))  # fmt: skip
    assert Recipe.from_json(recipe.as_json()) == recipe


def test_a_recipe_of_version_0_1_has_its_options_in_fields_of_their_own():
    old = {"data": "wine", "model": "linear", "objective": "rec", "eps": 0.1, "epochs": 3, "natural_epochs": 1,
           "alpha": 0.2, "width": "mean", "batch_size": 10, "lr": 0.1, "seed": 4}  # fmt: skip
    recipe = Recipe.from_json(old)
    assert recipe.options == {"alpha": 0.2, "width": "mean"} and (recipe.seed, recipe.eps) == (4, 0.1)
    assert Recipe.from_json({**old, "objective": "natural"}).options == {}
    with pytest.raises(ValueError, match="has magic, which this version"):
        Recipe.from_json({"magic": 1})
