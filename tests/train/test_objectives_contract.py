"""What every objective and term promises: arguments, plain options, a finite scalar, gradients, and no side effects."""

from __future__ import annotations

import functools
import inspect
import typing

import pytest
import torch
from torch import nn

from pyxai_bounds.train.objectives import OBJECTIVES, TERMS, by_name, explanation_width, natural, rec, weighted
from pyxai_bounds.train.objectives.shared import deployed
from pyxai_bounds.train.transform import softplus
from tests.networks import images

ALL = {**OBJECTIVES, **TERMS}
X, Y = images(4, shape=(2, 4, 4)), torch.tensor([0, 1, 2, 1])


def network(seed: int = 0) -> nn.Sequential:
    """Convolutions, batch norm with statistics that are not trivial, dropout; in training mode."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2),
        nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 3),
    ).double()  # fmt: skip
    nn.init.normal_(model[1].running_mean, std=0.1)
    nn.init.uniform_(model[1].running_var, 0.5, 2.0)
    return model


def called(name: str) -> typing.Callable[..., torch.Tensor]:
    return functools.partial(ALL[name], ignore="0:4") if name == "r4" else ALL[name]


@pytest.mark.parametrize("name", ALL)
def test_arguments_and_options_are_what_a_command_line_can_offer(name: str) -> None:
    parameters = list(inspect.signature(ALL[name]).parameters.values())
    assert [p.name for p in parameters[:5]] == ["model", "x", "y", "eps", "clip"]
    hints = typing.get_type_hints(ALL[name])
    for option in parameters[5:]:
        assert option.kind is option.KEYWORD_ONLY and option.default is not option.empty, option
        kind = hints[option.name]
        if typing.get_origin(kind) is typing.Literal:
            assert option.default in typing.get_args(kind)
        else:
            assert kind in (str, float, int, bool) and isinstance(option.default, kind), option


@pytest.mark.parametrize("name", ALL)
def test_a_finite_scalar_with_gradients_and_no_side_effects(name: str) -> None:
    model = network()
    statistics = model[1].running_mean.clone()
    torch.manual_seed(1)
    loss = called(name)(model, X, Y, 0.05, (0.0, 1.0))
    assert loss.shape == () and loss.isfinite()
    assert all(p.grad is None for p in model.parameters())
    assert all(m.training for m in model.modules())
    if name in TERMS:
        assert torch.equal(model[1].running_mean, statistics), "only the cross entropy runs in training mode"
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    # The weights of the convolution are where the released code of REC loses the bound's gradient.
    assert model[0].weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", ALL)
def test_random_draws_come_from_the_global_generator_alone(name: str) -> None:
    model, values = network(), []
    start = {key: value.clone() for key, value in model.state_dict().items()}
    for _ in range(2):
        model.load_state_dict(start)
        torch.manual_seed(5)
        values.append(called(name)(model, X, Y, 0.05, (0.0, 1.0)).item())
    assert values[0] == values[1]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_baselines_keep_their_regulariser(name: str) -> None:
    """Two baselines of REC's released code compute a regulariser and leave it out of the loss."""
    options = inspect.signature(OBJECTIVES[name]).parameters
    weight = next((w for w in ("alpha", "weight", "hinge") if w in options), None)
    if weight is None:
        assert name in ("natural", "pgd", "ibp")
        return
    model, values = network().eval(), {}
    for size in (0.0, 1.0, 3.0):
        torch.manual_seed(1)
        values[size] = called(name)(model, X, Y, 0.05, (0.0, 1.0), **{weight: size}).item()
    assert abs(values[1.0] - values[0.0]) > 1e-9 and abs(values[3.0] - values[1.0]) > 1e-9
    if weight != "weight":
        assert values[3.0] - values[0.0] == pytest.approx(3 * (values[1.0] - values[0.0]), rel=1e-9)


def test_explanations_are_those_of_the_deployed_network() -> None:
    """In training mode the regulariser is the same as in evaluation mode, though the cross entropy is not."""
    model = network()
    for name, term in TERMS.items():
        values = []
        for mode in (True, False):
            model.train(mode)
            torch.manual_seed(2)
            values.append(term(model, X, Y, 0.05, (0.0, 1.0)).item())
        assert values[0] == values[1], name
    model.train()
    model[1].eval()
    with deployed(model):
        assert not any(m.training for m in model.modules())
    assert model.training and not model[1].training and model[4].training


@pytest.mark.parametrize("name", ALL)
def test_the_value_is_the_same_where_no_gradient_is_wanted(name: str) -> None:
    model = network().eval()
    values = []
    for mode in (torch.enable_grad(), torch.no_grad()):
        torch.manual_seed(3)
        with mode:
            values.append(called(name)(model, X, Y, 0.05, (0.0, 1.0)).item())
    assert values[0] == pytest.approx(values[1], rel=1e-9)


def test_weighted_adds_up() -> None:
    model = network().eval()
    loss = weighted({"natural": 2.0, "width": 0.5, functools.partial(rec, alpha=0.3): 1.0, "unstable-relus": 0.0})
    expected = (
        2 * natural(model, X, Y)
        + 0.5 * TERMS["width"](model, X, Y, 0.05, (0.0, 1.0))
        + rec(model, X, Y, 0.05, (0.0, 1.0), alpha=0.3)
    )
    assert loss(model, X, Y, 0.05, (0.0, 1.0)).item() == pytest.approx(expected.item(), rel=1e-12)
    with pytest.raises(ValueError, match="no objective 'widths'; choose from natural, rec"):
        weighted({"widths": 1.0})
    with pytest.raises(ValueError, match="at least one"):
        weighted({})


def test_sums_by_name() -> None:
    model = network().eval()
    assert by_name("rec") is OBJECTIVES["rec"]
    loss = by_name("natural + 0.5*width + 1e-2 * box-growth")(model, X, Y, 0.05, (0.0, 1.0)).item()
    by_hand = weighted({"natural": 1.0, "width": 0.5, "box-growth": 0.01})(model, X, Y, 0.05, (0.0, 1.0)).item()
    assert loss == pytest.approx(by_hand, rel=1e-12)
    for text, message in (
        ("width", "has no cross entropy: add 'natural"),
        ("natural + 0.1*widht", "no objective 'widht'; choose from"),
        ("natural + a*width", "write weight"),
        ("", "no objective ''"),
    ):
        with pytest.raises(ValueError, match=message):
            by_name(text)


def test_softplus_replaces_every_relu_also_a_shared_one() -> None:
    shared = nn.ReLU()
    model = nn.Sequential(nn.Linear(3, 3), shared, nn.Sequential(nn.Linear(3, 3), shared), nn.Linear(3, 2))
    assert softplus(model, 4.0) is model
    assert isinstance(model[1], nn.Softplus) and isinstance(model[2][1], nn.Softplus) and model[1].beta == 4.0
    with pytest.raises(ValueError, match=r"no nn\.ReLU module"):
        softplus(model, 4.0)
    with pytest.raises(ValueError, match="beta=0"):
        softplus(model, 0)


def test_a_function_around_a_module_in_training_mode_is_bounded_as_the_module() -> None:
    model = network()
    inside = explanation_width(model, X, Y, 0.05, (0.0, 1.0))
    assert torch.equal(explanation_width(lambda x: model(x), X, Y, 0.05, (0.0, 1.0)), inside)
    assert all(module.training for module in model.modules())
