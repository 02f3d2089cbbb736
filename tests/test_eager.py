"""The engine and the plain loop against the tuned eager loop of bench/: the same bounds and parameter gradients.

The three share no code. float64, relative 1e-9.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pyxai_bounds as xb
from bench import eager, models
from bench.peers import plain
from tests.networks import images, mlp, residual

NETWORKS = {
    "mlp": (models.mlp, (784,)),
    "cnn": (models.n4, (3, 32, 32)),
    "residual": (lambda: models.residual(width=8), (3, 32, 32)),
}
EPS = 1e-3


def loss_of(mid: Tensor, rad: Tensor) -> Tensor:
    """A loss in which midpoint and radius both matter, and differently everywhere."""
    return terms_of(mid, rad).sum()


def terms_of(mid: Tensor, rad: Tensor) -> Tensor:
    weights = torch.linspace(0.5, 1.5, mid.numel(), dtype=mid.dtype).reshape(mid.shape)
    return weights * (2 * rad).square() + (weights * mid).sin()


def network(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    make, shape = NETWORKS[name]
    return make().double(), images(2, shape=shape), torch.tensor([3, 7])


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter; a parameter that the loss does not reach has a gradient of 0."""
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    named = zip(model.named_parameters(), found, strict=True)
    return {name: torch.zeros_like(p) if grad is None else grad for (name, p), grad in named}


def assert_close(ours: Tensor, theirs: Tensor, what: str, relative: float = 1e-9) -> None:
    assert (ours - theirs).norm() <= relative * theirs.norm(), what


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_bounds_and_parameter_gradients_equal_the_eager_loops(name: str, channels_last: bool) -> None:
    model, x, target = network(name)
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    box = xb.Interval.linf(x, EPS)
    ours = xb.bound(xb.explain.gradient(model))(box, target)
    theirs = eager.gradient_bounds(model, box.mid, box.rad, target, channels_last=channels_last)
    assert_close(ours.mid, theirs[0], "mid")
    assert_close(ours.rad, theirs[1], "rad")
    assert ours.rad.min() > 0
    mine = gradients(model, loss_of(ours.mid, ours.rad))
    other = gradients(model, loss_of(*theirs))
    for parameter in mine:
        assert_close(mine[parameter], other[parameter], parameter)
    assert sum(grad.norm() > 0 for grad in mine.values()) >= len(mine) / 2 - 1


PLAIN = {
    **NETWORKS,
    "chain": (lambda: models.chain(6, width=4), (3, 8, 8)),
    "pre-activation": (lambda: models.wrn16_4(width=2), (3, 16, 16)),
    "odd sizes": (lambda: strided(), (3, 9, 11)),
}


def strided() -> nn.Sequential:
    """Strides that cut off a border, dilation and groups; two linear layers without a ReLU between them."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.Conv2d(6, 4, 2, stride=3, padding=1, dilation=2, groups=2),
        nn.Flatten(), nn.Linear(16, 7), nn.ReLU(), nn.Linear(7, 6, bias=False), nn.Linear(6, 10),
    )  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_the_plain_loop_equals_the_engine_and_the_tuned_loop(name: str) -> None:
    make, shape = PLAIN[name]
    model, x, target = make().double(), images(2, shape=shape), torch.tensor([3, 7])
    box = xb.Interval.linf(x, EPS)
    found = plain.gradient_bounds(model, box.mid, box.rad, target)
    engine = xb.bound(xb.explain.gradient(model))(box, target)
    others = {"engine": (engine.mid, engine.rad)}
    if name != "odd sizes":  # the tuned loop takes no linear layer behind the last ReLU but the last one
        others["tuned"] = eager.gradient_bounds(model, box.mid, box.rad, target)
    assert found[1].max() > 0
    mine = gradients(model, loss_of(*found))
    for other, bounds in others.items():
        # Of the radius, from which the midpoint is formed: in a deep network it is far smaller.
        assert (found[0] - bounds[0]).norm() <= 1e-9 * (bounds[0].norm() + bounds[1].norm()), other
        assert_close(found[1], bounds[1], other)
        theirs = gradients(model, loss_of(*bounds))
        for parameter in mine:
            assert_close(mine[parameter], theirs[parameter], f"{other}: {parameter}")


def test_the_plain_loop_says_what_it_does_not_know() -> None:
    x, target = torch.zeros(1, 4), torch.tensor([0])
    with pytest.raises(ValueError, match="must end in a linear layer"):
        plain.gradient_bounds(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), x, x, target)
    with pytest.raises(ValueError, match="does not know Tanh"):
        plain.gradient_bounds(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), x, x, target)


SMALL = {
    "mlp": lambda: (mlp(), images(2, shape=(6,)), torch.tensor([1, 3])),
    "cnn": lambda: (models.cnn7(width=1 / 16).double(), images(1, shape=(3, 32, 32)), torch.tensor([3])),
    "residual": lambda: (residual(), images(2), torch.tensor([1, 3])),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("of", ["logit", "probability"])
def test_parameter_gradients_pass_a_finite_difference_check(name: str, of: str) -> None:
    """Along a random direction of each parameter; for a probability the gradient flows through the forward bounds, too.

    The bounds are piecewise smooth: a step that changes a ReLU's state would compare two pieces, so it is tiny.
    """
    model, x, target = SMALL[name]()
    box = xb.Interval.linf(x, 0.05)
    bounded = xb.bound(xb.explain.gradient(model, of=of))
    start = bounded(box, target).detach()

    def terms() -> Tensor:
        bounds = bounded(box, target)
        return terms_of(bounds.mid / start.mid.abs().mean(), bounds.rad / start.rad.mean())

    grads = gradients(model, terms().sum())
    generator = torch.Generator().manual_seed(0)
    step = 1e-7
    checked = 0
    for parameter_name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        direction *= parameter.detach().norm() / direction.norm()
        with torch.no_grad():
            parameter += step * direction
            ahead = terms()
            parameter -= 2 * step * direction
            behind = terms()
            parameter += step * direction
        slope = (
            (ahead - behind).sum() / (2 * step)
        ).item()  # of the sums of all terms the last bits alone would differ
        expected = (grads[parameter_name] * direction).sum().item()
        assert abs(slope - expected) <= 1e-4 * max(abs(slope), abs(expected)) + 1e-5, (parameter_name, slope, expected)
        checked += abs(expected) > 1e-3
    assert checked >= 3
