"""Networks by name: shapes, the user's own factories, and errors that say what there is."""

import sys
import types

import pytest
import torch
from torch import nn

from pyxai_bounds import Interval, bound, explain, models


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("shape", [(1, 10, 10), (3, 11, 13)])
def test_logits_have_one_column_per_class(name, shape):
    assert models.build(name, shape, 4)(torch.rand(3, *shape)).shape == (3, 4)


@pytest.mark.parametrize("name", ["linear", "fc-128", "fc-256x2"])
def test_dense_networks_take_tables(name):
    assert models.build(name, (13,), 3)(torch.rand(2, 13)).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "shape", "linear", "convolutions", "parameters"),
    [
        ("linear", (1, 8, 8), 1, 0, 130),
        ("cnn-small", (1, 8, 8), 2, 2, 37_762),
        ("cnn7", (1, 8, 8), 2, 5, 1_456_706),
        ("rec-mnist", (1, 28, 28), 2, 2, 328_798),
        ("rar-mnist", (1, 28, 28), 2, 2, 3_266_434),
        ("rar-gtsrb", (3, 32, 32), 1, 13, 171_058),
        ("rar-flower", (3, 128, 128), 1, 7, 74_290),
        ("resnet9", (3, 32, 32), 1, 8, 6_571_266),
        ("resnet18", (3, 32, 32), 1, 20, 11_169_858),
        ("resnet18", (3, 224, 224), 1, 20, 11_177_538),
        ("wrn-16-4", (3, 32, 32), 1, 16, 2_746_834),
    ],
)
def test_layers_are_what_the_name_says(name, shape, linear, convolutions, parameters):
    kinds = [type(m) for m in models.build(name, shape, 2).modules()]
    assert kinds.count(nn.Linear) == linear and kinds.count(nn.Conv2d) == convolutions
    assert sum(p.numel() for p in models.build(name, shape, 2).parameters()) == parameters


@pytest.mark.parametrize("name", ["rec-mnist", "rar-mnist", "rar-gtsrb", "rar-flower", "resnet9", "wrn-16-4"])
def test_their_explanations_can_be_bounded(name, one_thread):
    """At a radius where deep networks with random weights have bounds at all; the sample itself must lie inside."""
    torch.manual_seed(0)
    model = models.build(name, (3, 10, 11), 3).double().eval()
    x, y = torch.rand(1, 3, 10, 11, dtype=torch.float64), torch.tensor([2])
    box = bound(explain.gradient(model))(Interval.linf(x, 1e-9), y)
    inside = torch.stack([explain.gradient(model)(x + d, y) for d in 1e-9 * (2 * torch.rand(3, *x.shape) - 1)])
    slack = 1e-12 * inside.abs().max()  # bounds are rounded to nearest
    assert (box.lower - slack <= inside).all() and (inside <= box.upper + slack).all() and box.isfinite().all()


def test_a_picture_that_is_too_small():
    with pytest.raises(ValueError, match="at least 10×10, not 8×8"):
        models.build("rec-mnist", (1, 8, 8), 2)


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
