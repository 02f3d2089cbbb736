"""The attack stays in its box, never breaks what is certified, and finds what random search does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import pyxai_bounds as xb
from tests.networks import images, mlp, residual, sample

X = images(12, shape=(6,))
TARGET = torch.arange(12) % 4


@pytest.mark.parametrize("property", [xb.TopK(2), xb.Sign(k=2), xb.L2(0.05), xb.Linf(0.02), xb.Cosine(0.95)], ids=str)
def test_the_attack_stays_in_the_box_and_respects_certificates(property) -> None:
    fn = xb.explain.gradient(mlp())
    for eps in (0.02, 0.2):
        found = xb.attack.pgd(fn, X, TARGET, eps=eps, property=property, clip=(0.0, 1.0), restarts=2)
        box = xb.Interval.linf(X, eps, clip=(0.0, 1.0))
        exact_lower, exact_upper = box.mid - box.rad, box.mid + box.rad
        assert ((found.x >= exact_lower) & (found.x <= exact_upper)).all() and box.contains(found.x).all()
        assert torch.allclose(found.attribution, fn(found.x, TARGET).detach())
        certificate = xb.certify(fn, X, TARGET, eps=eps, property=property, clip=(0.0, 1.0))
        assert not (certificate.holds & found.broken).any()
        assert (found.margin >= certificate.margin - 1e-9).all()


def test_the_attack_beats_random_search() -> None:
    model = mlp((6, 40, 40, 4))
    fn = xb.explain.gradient(model)
    nominal = fn(X, TARGET).detach()
    property = xb.Linf(0.0)
    found = xb.attack.pgd(fn, X, TARGET, eps=0.2, property=property, steps=20, restarts=3)
    box = xb.Interval.linf(X, 0.2)
    best = torch.full((12,), torch.inf, dtype=torch.float64)
    for seed in range(60):  # as many evaluations as the attack had
        there = fn(sample(box, seed, corners=True), TARGET).detach()
        best = best.minimum(property.margin(nominal, xb.Interval.of(there, torch.zeros_like(there))))
    assert (found.margin < best).double().mean() > 0.5


def test_a_constant_explanation_cannot_be_moved() -> None:
    fn = xb.explain.gradient(nn.Linear(6, 4).double())
    found = xb.attack.pgd(fn, X, TARGET, eps=1.0, property=xb.TopK(2))
    assert not found.broken.any()


def test_the_attack_stays_inside_a_clip_that_floats_cannot_hit() -> None:
    model = mlp().float()
    x = X.float().clamp(0.1, 0.9)
    for seed in range(5):
        found = xb.attack.pgd(
            xb.explain.gradient(model), x, TARGET, eps=0.3, property=xb.Linf(0.0), clip=(0.1, 0.9), seed=seed
        )
        xb.Interval.linf(found.x, 0.1, clip=(0.1, 0.9))


def test_explanations_that_depend_on_nothing_and_nan() -> None:
    frozen = nn.Linear(6, 4).double().requires_grad_(False)
    assert not xb.attack.pgd(xb.explain.gradient(frozen), X, TARGET, eps=0.1, property=xb.TopK(2)).broken.any()
    broken = mlp()
    with torch.no_grad():
        broken[4].weight.fill_(float("nan"))
    assert not xb.attack.pgd(xb.explain.gradient(broken), X, TARGET, eps=0.1, property=xb.TopK(2)).broken.any()


def test_the_same_seed_gives_the_same_attack() -> None:
    fn = xb.explain.gradient(residual())
    args = {"eps": 0.01, "property": xb.TopK(3), "steps": 4}
    one, two, other = (xb.attack.pgd(fn, images(2), torch.tensor([0, 1]), seed=s, **args) for s in (0, 0, 1))
    assert torch.equal(one.x, two.x) and not torch.equal(one.x, other.x)


def test_the_smooth_twin_approaches_the_network() -> None:
    fn = xb.explain.gradient(residual())
    x, y = images(2), torch.tensor([0, 1])
    errors = [(xb.attack.smooth(fn, x, y, beta=beta)(x, y) - fn(x, y)).abs().max().item() for beta in (1e2, 1e4, 1e6)]
    assert errors[2] < 1e-6 and errors[0] > errors[2]
    x.requires_grad_()
    (slope,) = torch.autograd.grad(xb.attack.smooth(fn, x, y, beta=10.0)(x, y).square().sum(), x)
    assert slope.abs().max() > 0


def plain_gradient(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """As Captum takes it: not to be differentiated again, for which PyTorch has operators without a derivative."""

    def explain(x: Tensor, target: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(model(x).gather(1, target[:, None]).sum(), x)[0]

    return explain


@pytest.mark.parametrize(
    "activation",
    [nn.LeakyReLU(0.1), nn.PReLU(), nn.ReLU6(), nn.Hardtanh(-0.3, 0.2), nn.Hardsigmoid(), nn.Hardswish(), nn.SiLU(),
     nn.Mish(), nn.GELU(), nn.SELU(), nn.Sequential(nn.Unflatten(1, (3, 3)), nn.GroupNorm(3, 3), nn.Flatten())],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_the_smooth_twins_of_networks_can_be_differentiated(activation: nn.Module) -> None:
    model = mlp()
    model[1] = model[3] = activation.double()
    if isinstance(activation, nn.Sequential):
        model[3] = nn.ReLU()
    fn, x = plain_gradient(model), X.clone().requires_grad_()
    assert torch.allclose(xb.attack.smooth(fn, X, TARGET, beta=1e7)(X, TARGET), fn(X, TARGET), atol=1e-6)
    (slope,) = torch.autograd.grad(xb.attack.smooth(fn, X, TARGET, beta=2.0)(x, TARGET).square().sum(), x)
    assert slope.abs().max() > 0


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="steps ≥ 1"):
        xb.attack.pgd(xb.explain.gradient(mlp()), X, TARGET, eps=0.1, property=xb.TopK(2), steps=0)


def test_a_property_is_one_and_no_class() -> None:
    with pytest.raises(TypeError, match=r"property must be one such as TopK\(5\)"):
        xb.attack.pgd(lambda x: x, torch.rand(2, 6), eps=0.1, property=xb.TopK)  # type: ignore[arg-type]


def test_an_attack_prints_its_outcome() -> None:
    attack = xb.attack.pgd(lambda x: x, torch.tensor([[0.0, 1.0], [0.0, 0.01]]), eps=0.1, property=xb.TopK(1))
    assert repr(attack).startswith("Attack(broke 1 of 2, least margin -")


def test_attention_is_attacked() -> None:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(block, nn.Flatten(), nn.Linear(4 * 8, 3)).double().eval()
    x, y = torch.rand(5, 4, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    fn, property = xb.explain.gradient(model), xb.Linf(0.0)
    found = xb.attack.pgd(fn, x, y, eps=0.02, property=property, steps=5)
    at_a_corner = fn(x + 0.02, y).detach()
    margin = property.margin(fn(x, y).detach(), xb.Interval.of(at_a_corner, torch.zeros_like(at_a_corner)))
    assert (found.margin < margin).all()


def test_a_model_in_training_mode_is_refused_before_its_statistics_move() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4)).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(xb.CaptureError, match="statistics of the batch"):
        xb.attack.pgd(xb.explain.gradient(model), X, TARGET, eps=0.1, property=xb.TopK(2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("x", "target", "message"),
    [
        (X, 1, "got int; for one class for all torch.full"),
        (X, torch.tensor(1), "target is a single class"),
        (X, TARGET[:5], r"12 samples, but target has shape \[5\]"),
        (X.long(), TARGET, "floating"),
    ],
)
def test_what_is_no_batch_is_named(x, target, message) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        xb.attack.pgd(xb.explain.gradient(mlp()), x, target, eps=0.1, property=xb.TopK(2))
