"""Networks by name: shapes, the user's own factories, and errors that say what there is."""

import sys
import types

import pytest
import torch
from torch import nn

from pyxai_bounds import models


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 7)])
def test_logits_have_one_column_per_class(name, shape):
    assert models.build(name, shape, 4)(torch.rand(3, *shape)).shape == (3, 4)


@pytest.mark.parametrize("name", ["linear", "fc-128", "fc-256x2"])
def test_dense_networks_take_tables(name):
    assert models.build(name, (13,), 3)(torch.rand(2, 13)).shape == (2, 3)


@pytest.mark.parametrize(("name", "linear", "convolutions"), [("linear", 1, 0), ("cnn-small", 2, 2), ("cnn7", 2, 5)])
def test_layers_are_what_the_name_says(name, linear, convolutions):
    kinds = [type(m) for m in models.build(name, (1, 8, 8), 2).modules()]
    assert kinds.count(nn.Linear) == linear and kinds.count(nn.Conv2d) == convolutions


def test_convolutions_refuse_a_table():
    with pytest.raises(ValueError, match=r"images \[C, H, W\].*\[13\]"):
        models.build("cnn7", (13,), 3)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"no model 'resnet'.*linear, fc-128, fc-256x2, cnn-small, cnn7.*module:factory"
    ):
        models.build("resnet", (1, 8, 8), 2)


@pytest.fixture
def factories(monkeypatch):
    module = types.ModuleType("own_models")
    module.tiny = lambda shape, classes: nn.Sequential(nn.Flatten(), nn.Linear(4, classes))
    module.wrong = lambda shape, classes: "a string"
    module.number = 3
    monkeypatch.setitem(sys.modules, "own_models", module)


def test_ones_own_factory(factories):
    assert models.build("own_models:tiny", (1, 2, 2), 5)(torch.rand(1, 1, 2, 2)).shape == (1, 5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_models:wrong", "returned str.*nn.Module"),
        ("own_models:number", "not callable"),
        ("own_models:absent", "cannot be imported"),
        ("no_such_module_anywhere:f", "cannot be imported"),
        (":f", "cannot be imported"),
    ],
)
def test_a_bad_factory_says_what_is_wrong(factories, name, message):
    with pytest.raises(ValueError, match=message):
        models.build(name, (1, 2, 2), 5)
