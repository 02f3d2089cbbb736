"""Margins by differences of entries: never above the truth, exact for one hidden layer, and left alone elsewhere."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pyxai_bounds as xb
from pyxai_bounds.certify import certificate, differences, forms
from tests.networks import images, mlp, residual, sample


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Affine forms, which come after them, take nothing; and corners of the box, which come before, refute nothing."""
    monkeypatch.setattr(forms, "CHEAP", 0)
    monkeypatch.setattr(certificate, "CORNERS", 0)


def convolutional(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, stride=2, padding=1, groups=3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3)),
        *(nn.Sigmoid(), nn.Flatten(), nn.Linear(16, 4)),
    )
    nn.init.uniform_(model[1].running_var, 0.5, 2.0)
    nn.init.normal_(model[1].weight)
    return model.double().eval()


def recurrent(seed: int = 0) -> nn.Module:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.out = nn.GRU(5, 6, batch_first=True), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.gru(x)[0].mean(1))

    torch.manual_seed(seed)
    return Network().double()


NETWORKS = {
    "linear layers": (lambda seed: mlp(seed=seed), (6,)),
    "convolutions": (convolutional, (3, 8, 8)),
    "residual": (residual, (3, 8, 8)),
    "recurrent": (recurrent, (4, 5)),
}


def least_difference(property: xb.TopK, nominal: Tensor, values: Tensor) -> Tensor:
    """At single explanations [B, ...]."""
    return property.margin(nominal, xb.Interval.of(values, torch.zeros_like(values)))


@pytest.mark.parametrize("by", ["abs", "signed"])
@pytest.mark.parametrize("name", NETWORKS)
def test_margins_are_at_most_what_points_of_the_box_show(name: str, by: str) -> None:
    """In float32, without tolerance beyond the rounding of the float64 evaluation that they are compared with."""
    make, shape = NETWORKS[name]
    sharper = 0
    for seed, channels in ((0, "none"), (1, "sum")):
        if channels == "sum" and len(shape) != 3:
            continue
        model, x, target = make(seed), images(3, seed, shape).float(), torch.arange(3)
        fn, single = xb.explain.gradient(model), xb.explain.gradient(make(seed).float())
        model.load_state_dict({k: v.float().double() for k, v in model.state_dict().items()})
        for k, eps in itertools.product((1, 3), (0.002, 0.02, 0.1)):
            property = xb.TopK(k, by, channels)
            entries = xb.certify(single, x, target, eps=eps, property=property, sharpen=False)
            found = xb.certify(single, x, target, eps=eps, property=property)
            assert (found.margin >= entries.margin).all() and torch.equal(found.bounds.rad, entries.bounds.rad)
            assert (found.holds >= entries.holds).all()
            sharper += int((found.margin > entries.margin).sum())
            box = xb.Interval.linf(x, eps)
            box = xb.Interval.of(box.mid.double(), box.rad.double())
            for n in range(20):
                values = fn(sample(box, n, corners=n % 2 == 0), target).detach()
                seen = least_difference(property, found.nominal.double(), values)
                assert (found.margin.double() <= seen + 1e-12 * values.flatten(1).norm(dim=1)).all()
    assert sharper > 0


def test_for_one_hidden_layer_they_are_exact() -> None:
    """Unstable units may be on or off independently of each other: all cases, one by one."""
    checked = 0
    for seed in range(6):
        model, x, target = mlp((6, 9, 4), seed), images(2, seed, (6,)), torch.tensor([0, 3])
        first, last = model[0], model[2]
        property, eps = xb.TopK(2), 0.12
        found = xb.certify(xb.explain.gradient(model), x, target, eps=eps, property=property)
        entries = xb.certify(xb.explain.gradient(model), x, target, eps=eps, property=property, sharpen=False)
        for b in range(2):
            reach = eps * first.weight.abs().sum(1)
            z = first(x[b])
            free = ((z - reach) <= 0) & ((z + reach) > 0)
            cases = torch.tensor(list(itertools.product((0.0, 1.0), repeat=int(free.sum()))), dtype=torch.float64)
            on = (z > 0).double().repeat(len(cases), 1)
            on[:, free] = cases
            values = (on * last.weight[target[b]]) @ first.weight
            nominal = found.nominal[b]
            top = property.top(nominal[None])[0]
            rest = values.abs()[:, ~top].amax(1)
            least = ((nominal.sign() * values)[:, top].amin(1) - rest).amin()  # of those that keep their signs
            truth = (values.abs()[:, top].amin(1) - rest).amin()
            if entries.holds[b]:
                continue  # nothing sharper was asked for
            assert least - 1e-9 <= found.margin[b] <= truth + 1e-12
            checked += int(least == truth and found.margin[b] > entries.margin[b])
    assert checked > 3


def test_radii_grow_and_hold() -> None:
    fn, x, target = xb.explain.gradient(mlp()), images(7, shape=(6,)), torch.arange(7) % 4
    plain, sharp = (
        xb.certified_radius(fn, x, target, property=xb.TopK(2), max_eps=0.5, sharpen=by) for by in (False, None)
    )
    assert (sharp >= plain).all() and (sharp > plain + 1e-3).any()
    at = xb.certify(fn, x, target, eps=sharp[:, None], property=xb.TopK(2))
    assert at.holds[sharp > 0].all()
    attack = xb.attack.pgd(fn, x, target, eps=sharp[:, None], property=xb.TopK(2))
    assert not (at.holds & attack.broken).any()


TOP2 = xb.TopK(2)


def margins(fn, x: Tensor, target: Tensor | None = None, property=TOP2, **options) -> tuple[Tensor, Tensor]:
    """Of entries, and by differences."""
    return tuple(
        xb.certify(fn, x, target, eps=0.1, property=property, sharpen=by, **options).margin for by in (False, None)
    )


def test_what_does_not_end_in_linear_layers_stays_as_it_is() -> None:
    model, x, target = mlp(), images(5, shape=(6,)), torch.arange(5) % 4
    for fn in (xb.explain.gradient_x_input(model), xb.explain.saliency(model)):
        plain, sharp = margins(fn, x, target)
        assert torch.equal(plain, sharp)
    for property in (xb.Sign(), xb.L2(1.0)):
        plain, sharp = margins(xb.explain.gradient(model), x, target, property)
        assert torch.equal(plain, sharp)
    plain, sharp = margins(xb.explain.gradient(model), x, target, parameters=xb.parameter_box(model, relative=1e-3))
    assert torch.equal(plain, sharp)


def test_functions_of_other_kinds() -> None:
    model, x, target = mlp(), images(5, shape=(6,)), torch.arange(5) % 4
    weight = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 6)
    gradient, gradients, noise = xb.explain.gradient(model), xb.explain.smoothgrad(model), 0.05 * images(3, 1, (5, 6))
    functions = {
        "no target": (lambda x: xb.explain.gradient(model)(x, torch.zeros(len(x), dtype=torch.long)),),
        "factors that depend on the target": (lambda x, y: xb.explain.gradient(model)(x, y) * weight[y], target),
        "a mean of gradients": (lambda x, y: (gradient(x, y) + gradient(x + 0.05, y)) / 2, target),
        "noise for five samples": (lambda x, y: gradients(x, y, noise), target),
        "noise that they share": (lambda x, y: gradients(x, y, noise[:, :1]), target),
        "layers of its own": (lambda x: F.relu(x @ weight.T) @ weight,),
        "a constant beside": (lambda x: F.relu(x @ weight.T) @ weight + weight[0],),
    }
    for name, (fn, *arguments) in functions.items():
        told = pytest.warns(RuntimeWarning, match="fails for one sample alone")
        with told if name == "noise for five samples" else nullcontext():
            plain, sharp = margins(fn, x, *arguments)
        assert (sharp >= plain).all(), name
        if name in ("a constant beside", "factors that depend on the target", "noise for five samples"):
            assert torch.equal(sharp, plain), name  # neither linear to us, nor a function of one sample
        else:
            assert (sharp > plain).any(), name
        box = xb.Interval.linf(x, 0.1)
        for n in range(10):
            values = fn(sample(box, n, corners=n % 2 == 0), *arguments).detach()
            assert (sharp <= least_difference(xb.TopK(2), fn(x, *arguments).detach(), values) + 1e-12).all(), name


def test_parameters_may_change_between_certificates() -> None:
    model, x, target = mlp(), images(5, shape=(6,)), torch.arange(5) % 4
    fn = xb.explain.gradient(model)
    before = margins(fn, x, target)[1]
    with torch.no_grad():
        model[0].weight.add_(0.3)
    after = margins(fn, x, target)[1]
    fresh = mlp()
    fresh.load_state_dict(model.state_dict())
    assert not torch.equal(before, after) and torch.equal(after, margins(xb.explain.gradient(fresh), x, target)[1])


def test_what_one_sample_is_alone_must_be_what_it_is_among_others() -> None:
    model, x, target = mlp(), images(5, shape=(6,)), torch.arange(5) % 4

    def depends_on_the_batch(x: Tensor, y: Tensor) -> Tensor:
        return xb.explain.gradient(model)(x, y) * (1.0 if len(x) > 1 else 2.0)

    plain, sharp = margins(depends_on_the_batch, x, target)
    assert torch.equal(plain, sharp)


def test_what_one_sample_alone_does_not_know() -> None:
    """Its target, or what stands beside it: where the second unit is on, the second sample's takes from entry 0."""
    rows, factors = torch.tensor([[2.0, 1.0], [1.5, 0.0]]), torch.tensor([[1.0, 1.0], [1.0, -1.0]])

    def reads(x: Tensor, y: Tensor) -> Tensor:
        return ((x > 0).to(x) * (factors[y.item()] if len(y) == 1 else factors[y])) @ rows

    def stands_beside(x: Tensor) -> Tensor:
        return ((x > 0).to(x) * factors) @ rows

    x, target, property = torch.tensor([[1.0, -0.05], [1.0, -0.05]]), torch.tensor([0, 1]), xb.TopK(1)
    for fn, *arguments in ((reads, target), (stands_beside,)):
        found = xb.certify(fn, x, *arguments, eps=0.1, property=property)
        seen = least_difference(property, found.nominal, fn(x + 0.1, *arguments))
        assert seen[1] < 0 and (found.margin <= seen).all()


def test_entries_must_be_what_they_are_alone_at_the_sample_itself() -> None:
    """Alone, a sample is explained with all that is added to samples: the first unit counts twice, and the third."""
    rows, factors = torch.tensor([[2.0, 1.0], [1.5, 0.0], [-2.0, -2.0]]), torch.tensor([1.0, -1.0, 1.0])
    added = torch.tensor([[0.0, -9.0, 0.0], [0.0, 0.0, -9.0]])

    def fn(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad((F.relu(x + added) * factors).sum(), x)[0] @ rows

    x, property = torch.tensor([[1.0, -0.05, -0.05]]).repeat(2, 1), xb.TopK(1, by="signed")
    found = xb.certify(fn, x, eps=0.1, property=property)
    seen = least_difference(property, found.nominal, fn(x + 0.1))
    assert seen[1] < 0 and (found.margin <= seen).all()


@pytest.mark.parametrize("limit", ["MOST_NUMBERS", "MOST_PRODUCTS", "MOST_CHANNELS"])
def test_what_would_take_too_much_is_left(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fn, x, target = xb.explain.gradient(convolutional()), images(3), torch.arange(3)
    property = xb.TopK(3, channels="sum")
    plain, sharp = margins(fn, x, target, property)
    assert (sharp > plain).any()
    monkeypatch.setattr(differences, limit, 2)
    if limit == "MOST_NUMBERS":
        monkeypatch.setattr(differences, "LARGEST_TABLE", 2)  # those of a table are at hand
    again = margins(fn, x, target, property)[1]
    assert torch.equal(again, plain)
