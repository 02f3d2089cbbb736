"""Branch and bound: it decides what can be decided, never against the truth, and finds where a property fails."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pyxai_bounds as xb
from pyxai_bounds.certify import branches, certificate
from pyxai_bounds.certify.affine.form import Form
from tests.networks import images, mlp, sample

linprog = pytest.importorskip("scipy.optimize").linprog


def cells(model: nn.Sequential, box: xb.Interval, label: int) -> list[Tensor]:
    """All gradients that a network with one hidden layer has in a box of one sample: one for each pattern of gates that
    some input has, by linear programs."""
    first, last = model[0], model[2]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    lower, upper = box.lower[0].numpy(), box.upper[0].numpy()
    reach = first.weight.abs() @ box.rad[0]
    middle = first(box.mid[0])
    unknown = ((middle - reach <= 0) & (middle + reach > 0)).nonzero()[:, 0].tolist()
    found = []
    for pattern in itertools.product((True, False), repeat=len(unknown)):
        active = middle > 0
        active[unknown] = torch.tensor(pattern, dtype=torch.bool)
        signs = np.where(np.array(pattern), -1.0, 1.0)
        rows = signs[:, None] * first.weight.detach().numpy()[unknown]
        limits = -signs * first.bias.detach().numpy()[unknown]
        if linprog(np.zeros(len(lower)), rows, limits, bounds=np.stack([lower, upper], 1)).status == 0:
            found.append((last.weight[label] * active) @ first.weight)
    return [gradient.detach()[None] for gradient in found]


@pytest.mark.parametrize("seed", range(3))
def test_a_network_with_one_hidden_layer_is_decided_as_it_is(seed: int) -> None:
    model = mlp((2, 20, 3), seed)
    fn, x, y = xb.explain.gradient(model), images(30, seed, (2,)), torch.arange(30) % 3
    property, eps = xb.TopK(1), 0.15
    plain = xb.certify(fn, x, y, eps=eps, property=property)
    found = xb.certify(fn, x, y, eps=eps, property=property, branches=400)
    box = xb.Interval.linf(x, eps)
    points = [[Tensor.double(g) for g in cells(model, box[i : i + 1], int(y[i]))] for i in range(30)]
    worst = [
        min(property.margin(found.nominal[i : i + 1], xb.Interval.point(g)).item() for g in points[i])
        for i in range(30)
    ]
    truth = torch.tensor(worst) > 0
    assert torch.equal(found.holds, truth)
    assert (plain.holds & ~truth).sum() == 0 and (found.holds & ~plain.holds).any() and not truth.all()
    assert torch.equal(found.refuted, ~truth)  # an input was found wherever there is one
    assert f"holds for {int(truth.sum())} of {len(truth)}, refuted for {int((~truth).sum())}, " in repr(found)
    for i, gradients in enumerate(points):
        assert all(found.bounds[i : i + 1].contains(g).all() for g in gradients)


NETWORKS = {
    "deep": lambda: mlp((6, 14, 12, 3)),
    "leaky": lambda: nn.Sequential(
        nn.Linear(6, 14), nn.LeakyReLU(0.1), nn.Linear(14, 8), nn.LeakyReLU(0.2), nn.Linear(8, 3)
    ),
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 6, 2, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 2), nn.ReLU(),
        nn.Flatten(), nn.Linear(4 * 2 * 3, 3),
    ),
    "smooth": lambda: nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)),
}  # fmt: skip
PROPERTIES = [xb.TopK(2), xb.Sign(2), xb.Cosine(0.9), xb.L2(0.1)]


@pytest.mark.parametrize(("name", "of"), [*((name, "logit") for name in NETWORKS), ("deep", "probability")])
def test_no_input_contradicts_what_was_decided(name: str, of: str) -> None:
    torch.manual_seed(1)
    model = NETWORKS[name]().double()
    fn, x, y = xb.explain.gradient(model, of=of), images(8, 2, (6,)), torch.arange(8) % 3
    open_ = 0
    for property, eps in zip(PROPERTIES, (0.05, 0.05, 0.05, 0.02), strict=True):
        plain = xb.certify(fn, x, y, eps=eps, property=property, clip=(0.0, 1.0))
        found = xb.certify(fn, x, y, eps=eps, property=property, clip=(0.0, 1.0), branches=20)
        assert (found.holds | ~plain.holds).all() and (found.margin >= plain.margin - 1e-12).all()
        assert not (found.holds & found.refuted).any()
        open_ += int((~found.holds & ~found.refuted).sum())
        box = xb.Interval.linf(x, eps, (0.0, 1.0))
        for seed in range(40):
            value = fn(sample(box, seed, corners=seed % 2 == 0), y).detach()
            margin = property.margin(found.nominal, xb.Interval.of(value, torch.zeros_like(value)))
            assert not (found.holds & (margin < 0)).any()
            slack = 1e-9 * value.abs().max()
            assert ((found.bounds.lower - slack <= value) & (value <= found.bounds.upper + slack)).all()
        broken = xb.attack.pgd(fn, x, y, eps=eps, property=property, clip=(0.0, 1.0), steps=10).broken
        assert not (broken & found.holds).any()
    assert open_ <= (3 if of == "logit" else 16)  # of 32 questions


def test_what_cannot_be_is_told_from_what_can() -> None:
    """Against linear programs: no system with a solution is called impossible, and few without stay open."""
    generator = np.random.default_rng(0)
    settled = 0
    for trial in range(200):
        symbols, rows = int(generator.integers(1, 12)), int(generator.integers(1, 8))
        a = generator.normal(size=(symbols, rows)) * (generator.random((symbols, rows)) < 0.7)
        b = generator.normal(size=rows) * generator.choice([0.1, 1.0, 3.0]) - np.abs(a).sum(0) * generator.choice(
            [0, 0.5]
        )
        slack = np.abs(generator.normal(size=rows)) * generator.choice([0.0, 0.1])
        possible = linprog(np.zeros(symbols), -a.T, b + slack, bounds=(-1, 1)).status == 0
        form = Form(*(torch.from_numpy(t) for t in (b, a, slack)))
        found = branches._solved(form)
        assert found is not None or not possible, trial
        settled += (found is not None) == possible
        if found is not None:
            assert found.abs().max() <= 1
    assert settled >= 196


def test_a_counterexample_lies_in_the_box_and_is_one() -> None:
    model = mlp((2, 20, 3), 0)
    fn, x, y = xb.explain.gradient(model), images(30, 0, (2,)), torch.arange(30) % 3
    seen = []
    original = branches.Search

    def kept(*arguments):
        seen.append((arguments, original(*arguments)))
        return seen[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certificate, "Search", kept)
        xb.certify(fn, x, y, eps=0.15, property=xb.TopK(1), branches=400)
    found = [(arguments, decision) for arguments, decision in seen if decision and decision.counterexample is not None]
    assert found
    for (_, (box, target), property, nominal, *_), decision in found:
        x = decision.counterexample
        assert ((x >= box.lower) & (x <= box.upper)).all()
        value = fn(x, target).detach()
        assert property.margin(nominal, xb.Interval.point(value)).item() < 0
