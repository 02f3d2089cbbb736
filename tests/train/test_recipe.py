"""Recipes: options that fit their objective, presets that can be trained, and JSON there and back."""

from typing import Literal

import pytest
import torch
from torch import nn

from pyxai_bounds import data, models
from pyxai_bounds.train import Options, Recipe, objectives
from pyxai_bounds.train.presets import PRESETS
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
    with pytest.raises(ValueError, match="no objective 'rce'; choose from natural, rec"):
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


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_names_what_exists(name):
    recipe = PRESETS[name]
    recipe.check()
    assert recipe.data in data.DATASETS and recipe.model in models.MODELS
    if recipe.objective in objectives.OBJECTIVES:
        assert typed_options(recipe.objective, recipe.options) == recipe.options
    assert Recipe.from_json(recipe.as_json()) == recipe


@pytest.mark.parametrize(
    ("name", "settings", "options"),
    [
        ("rec-mnist-cnn", {"batch_size": 256, "epochs": 30, "eps_ramp_share": 1.0}, {"alpha": 128.0, "width": "mean"}),
        ("rec-mnist-fc", {"batch_size": 100, "epochs": 20, "model": "fc-128"}, {}),
        ("rec-pneumonia", {"eps": 0.05, "lr": 0.0025, "epochs": 35, "class_weights": (3.0, 1.0)}, {"alpha": 50.0}),
        ("rec-adult", {"lr": 5e-4, "epochs": 25, "batch_size": 32, "model": "fc-256x2"}, {}),
        ("rar-mnist", {"eps": 0.3, "batch_size": 50, "steps": 100_000, "lr": 1e-4, "objective": "ig-norm"},
         {"weight": 1.0, "m": 50, "approx_factor": 5, "steps": 40, "step_size": 0.01}),
        ("rar-mnist-sum", {"objective": "ig-sum-norm"}, {"weight": 0.1}),
        ("rar-fashion", {"eps": 0.1}, {"steps": 20, "step_size": 0.01}),
        ("rar-gtsrb", {"eps": 8 / 255, "batch_size": 64, "steps": 70_000, "optimiser": "sgd", "momentum": 0.9,
                       "weight_decay": 2e-4}, {"steps": 7, "step_size": 2 / 255, "approx_factor": 10, "weight": 1.0}),
        ("rar-flower", {"batch_size": 16, "steps": 70_000}, {"weight": 0.1, "approx_factor": 10}),
        ("r2et-cifar10", {"model": "resnet9", "lr": 1e-5, "epochs": 10, "optimiser": "adam"}, {"k": 100, "h": 1e-3}),
        ("r2et-adult", {}, {"k": 8}), ("r2et-bank", {}, {"k": 8}), ("r2et-compas", {}, {"k": 8}),
        ("r2et-mnist", {}, {"k": 50}),
    ],
)  # fmt: skip
def test_presets_have_the_papers_numbers(name, settings, options):
    recipe = PRESETS[name]
    assert {key: getattr(recipe, key) for key in settings} == settings
    assert {key: recipe.options[key] for key in options} == options
