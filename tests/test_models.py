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


@pytest.mark.parametrize(("name", "convolutions"), [("cnn7-identity", 5), ("resnet11-identity", 13)])
def test_recipes_networks_are_as_deep_as_they_say(name, convolutions):
    layers = list(models.build(name, (1, 8, 8), 2).modules())
    assert sum(isinstance(m, nn.Conv2d) for m in layers) == convolutions
    assert isinstance(layers[-1], models.CentredLinear)
    kinds = {type(m) for m in layers}
    assert nn.ReLU in kinds or models.ResidualBlock in kinds
    if name.startswith("resnet"):
        assert nn.BatchNorm2d in kinds and any(isinstance(m, models.ResidualBlock) for m in layers)


@pytest.mark.parametrize(("stride", "size"), [(1, 7), (2, 8), (3, 9)])
def test_near_identity_loses_nothing(stride, size):
    """Without noise, each input value comes out once: a cell's pixels in channels of their own."""
    conv = models.near_identity_(nn.Conv2d(2, 2 * stride**2, stride + 2, stride=stride, padding=1), noise=0.0)
    x = torch.rand(3, 2, size, size)
    out = (conv(x) - 0.01).flatten(1).sort().values
    assert torch.allclose(out, x.flatten(1).sort().values, atol=1e-6)
    assert (conv.bias > 0).all()


@pytest.mark.parametrize(
    "conv",
    [nn.Conv2d(2, 2, 3, padding=1, groups=2), nn.Conv2d(2, 2, 3, dilation=2), nn.Conv2d(2, 8, 2, stride=2, padding=1)],
)
def test_near_identity_says_what_it_cannot_do(conv):
    with pytest.raises(ValueError, match=r"near_identity_|stride cell"):
        models.near_identity_(conv)


def test_a_growing_block_starts_as_its_skip():
    block = models.ResidualBlock(4, 4, growing=True).eval()
    x = torch.rand(2, 4, 6, 6)
    assert torch.equal(block(x), x)
    assert models.ResidualBlock(4, 16, stride=2, growing=True)(torch.rand(2, 4, 7, 5)).shape == (2, 16, 4, 3)


def test_centred_logits_are_the_same_to_softmax():
    layer = models.CentredLinear(5, 3)
    x = torch.randn(7, 5)
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.allclose(layer(x).sum(1), torch.zeros(7), atol=1e-6)
    assert torch.allclose(layer(x).softmax(1), plain.softmax(1), atol=1e-6)
    assert models.CentredLinear(5, 3, bias=False)(x).shape == (7, 3)
