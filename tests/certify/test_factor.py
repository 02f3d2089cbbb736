"""Explanations without the positive factor that their entries share: of the same direction, and so of the same rank."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pyxai_bounds as xb
from pyxai_bounds.certify.factor import Divided
from pyxai_bounds.interpreter import Interpreter
from pyxai_bounds.program import captured_graph
from tests.certify.test_forms import attention, pooling
from tests.networks import images, mlp, sample

NET = mlp((6, 16, 12, 4), 3)
ONE = torch.tensor([1])


def divided(fn, x: Tensor, *arguments: Tensor) -> Divided | None:
    return Divided.of(captured_graph(fn, x, *arguments), [x, *arguments], None)


def gradient_of(score):
    """∂ score(logits, target) / ∂x."""

    def explanation(x: Tensor, target: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(score(NET(x), target).sum(), x, create_graph=True)[0]

    return explanation


WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 3.0]).double()
WITH_FACTOR = {
    **{of: xb.explain.gradient(NET, of=of) for of in ("probability", "loss")},
    "times input": xb.explain.gradient_x_input(NET, of="probability"),
    "saliency": xb.explain.saliency(NET, channels="none"),
    "mean loss": gradient_of(F.cross_entropy),
    "weighed loss": gradient_of(lambda z, y: F.cross_entropy(z, y, WEIGHTS)),
    "less probable": gradient_of(lambda z, y: -2 * z.softmax(-1).gather(1, y[:, None])),
    "one of two": gradient_of(lambda z, y: z[:, :2].softmax(1)[:, 0]),
    "sigmoid": gradient_of(lambda z, y: (z[:, :1] - z[:, 1:2]).sigmoid()),
    "weight that moves": lambda x, y: xb.explain.gradient(NET, of="loss")(x, y) * x.exp(),
    "attention": xb.explain.gradient(lambda x: attention(x[:, :36]), of="loss"),
    "pools": xb.explain.gradient(pooling, of="probability"),
}


@pytest.mark.parametrize("name", WITH_FACTOR)
def test_what_is_left_has_the_direction_of_the_explanation(name: str) -> None:
    fn = WITH_FACTOR[name]
    box = xb.Interval.linf(images(1, 2, (36,) if name in ("attention", "pools") else (6,)), 0.2)
    found = divided(fn, box.mid, ONE)
    assert found is not None
    more, at_point = found.at([box.mid, ONE], fn(box.mid, ONE).detach())
    assert torch.allclose(at_point, fn(box.mid, ONE), rtol=1e-9)
    run, moved = Interpreter(found.graph, None).run, []
    for n in range(10):
        x = sample(box, n, corners=n % 2 == 0)
        value, left = fn(x, ONE).detach(), run(x, ONE, *more, enable_io_processing=False)[0].detach()
        factor = (value * left).sum() / left.square().sum()
        assert factor > 0 and torch.allclose(value, factor * left, rtol=1e-7, atol=1e-12)
        moved.append(float(factor))
    assert max(moved) > 1.001 * min(moved)


WITHOUT = {
    "logit": xb.explain.gradient(NET),
    "two probabilities": gradient_of(lambda z, y: z.softmax(1)[:, :2]),
    "a weight that moves": lambda x, y: gradient_of(lambda z, y: z.softmax(1)[:, 0] * x.detach().sum())(x, y),
    "the class that is found": gradient_of(lambda z, y: z.softmax(1).gather(1, z.argmax(1, keepdim=True))),
    "the greatest": gradient_of(lambda z, y: z.softmax(1).amax(1)),
    "whole numbers": lambda x, y: WITH_FACTOR["loss"](x, y).detach().sum(1, keepdim=True, dtype=torch.int64) * x,
    "several points": xb.explain.integrated_gradients(NET, steps=3, of="probability"),
    "a sum": lambda x, y: WITH_FACTOR["loss"](x, y) + x,
    "a square": lambda x, y: WITH_FACTOR["loss"](x, y).square(),
    "a quotient": lambda x, y: 1 / (WITH_FACTOR["loss"](x, y) + 3),
    "a bias": lambda x, y: F.conv1d(WITH_FACTOR["loss"](x, y)[:, None], torch.ones(1, 1, 1).double(), ONE.double()),
    "a probability": lambda x, y: NET(x).softmax(1),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_what_has_no_such_factor_is_left(name: str) -> None:
    x = images(1, 2, (6,))
    found = divided(WITHOUT[name], x, ONE)
    assert found is None or found.at([x, ONE], WITHOUT[name](x, ONE).detach()) is None


@pytest.mark.parametrize("of", ["probability", "loss"])
@pytest.mark.parametrize("property", [xb.TopK(2), xb.TopK(1, "signed"), xb.Sign(2), xb.Cosine(0.95)], ids=str)
def test_certificates_are_sharper_and_no_attack_breaks_them(of, property) -> None:
    model = mlp((6, 16, 12, 4), 3).float()
    fn, x, target = xb.explain.gradient(model, of=of), images(8, 1, (6,)).float(), torch.arange(8) % 4
    double = xb.explain.gradient(copy.deepcopy(model).double(), of=of)
    more = 0
    for eps in (0.01, 0.05, 0.1):
        options = dict(eps=eps, property=property, clip=(0.0, 1.0))
        plain, sharp = (xb.certify(fn, x, target, sharpen=by, **options) for by in (False, None))
        assert (sharp.holds >= plain.holds).all()
        more += int((sharp.holds & ~plain.holds).sum())
        assert not (sharp.holds & xb.attack.pgd(fn, x, target, **options).broken).any()
        box = xb.Interval.linf(x, eps, clip=(0.0, 1.0))
        for n in range(20):
            values = double(sample(xb.Interval.of(box.mid.double(), box.rad.double()), n, corners=n % 2 == 0), target)
            point = xb.Interval.of(values.detach(), torch.zeros_like(values))
            assert (property.margin(sharp.nominal.double(), point)[sharp.holds] >= 0).all()
    assert more >= 3


def test_it_is_as_good_as_of_the_logits_where_there_are_two_classes() -> None:
    """Of both their gradients are multiples of that of their difference."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 2))

    def difference(x: Tensor, y: Tensor) -> Tensor:
        return xb.explain.gradient(lambda x: (model(x) * (2 * F.one_hot(y, 2) - 1)).sum(1))(x)

    x, target = images(20, 1, (6,)).float(), torch.arange(20) % 2
    for property in (xb.TopK(2), xb.Sign(2), xb.Cosine(0.95)):
        options = dict(eps=0.02, property=property)
        best = xb.certify(difference, x, target, **options).holds
        for of in ("probability", "loss"):
            found = xb.certify(xb.explain.gradient(model, of=of), x, target, **options).holds
            assert (found >= best).all() and best.any()


def test_with_weights_that_move_it_holds_for_all_of_them() -> None:
    model = mlp((6, 16, 12, 4), 3).float()
    fn, x, target = xb.explain.gradient(model, of="probability"), images(8, 1, (6,)).float(), torch.arange(8) % 4
    options = dict(eps=0.02, property=xb.Cosine(0.95), parameters=xb.parameter_box(model, relative=0.003))
    plain, sharp = (xb.certify(fn, x, target, sharpen=by, **options) for by in (False, None))
    assert (sharp.margin >= plain.margin).all() and (sharp.margin > plain.margin).any() and sharp.holds.any()
    moved = copy.deepcopy(model).double()
    for n in range(20):
        with torch.no_grad():
            for new, p in zip(moved.parameters(), model.parameters(), strict=True):
                steps = torch.rand(p.shape, generator=torch.Generator().manual_seed(n)).double() * 2 - 1
                new.copy_(p.double() * (1 + 0.003 * (steps.sign() if n % 2 else steps)))
        point = sample(xb.Interval.linf(x.double(), 0.02), n, corners=n % 4 < 2)
        values = xb.explain.gradient(moved, of="probability")(point, target).detach()
        margin = xb.Cosine(0.95).margin(sharp.nominal.double(), xb.Interval.of(values, torch.zeros_like(values)))
        assert (sharp.margin.double() <= margin + 1e-9).all()
