"""Every attack on inputs: it keeps its box, its range and the label it promises, and never breaks a certificate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyxai_bounds as xb
from pyxai_bounds import attack
from pyxai_bounds.certify import Excluded, Unlike, metrics
from pyxai_bounds.certify.targeted import corner_masks
from tests.networks import images, mlp

CLIP = (0.0, 1.0)


def convolutional(classes: int = 4) -> nn.Sequential:
    """Steep, and with logits centred on the images below, so that labels can change within a box."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(96, 12), nn.ReLU(), nn.Linear(12, classes),
    ).double()  # fmt: skip
    with torch.no_grad():
        for module in (model[0], model[2], model[5], model[7]):
            module.weight *= 2
        model[7].bias -= model(images(50, shape=(1, 8, 8))).mean(0)
    return model


MODEL = convolutional()
X = images(9, shape=(1, 8, 8))
X[:, :, 0, 0] = 0.0  # at an end of the range
Y = torch.arange(9) % 4
FN = xb.explain.gradient(MODEL)
MASK = torch.zeros(8, 8).index_fill(0, torch.tensor([0, 1]), 1.0)
TOWARD = torch.ones(1, 8, 8) * 0.1

SHORT: dict[str, Any] = {"steps": 12, "clip": CLIP}
ATTACKS: dict[str, Callable[..., attack.Attack]] = {
    "pgd": lambda model=None, **o: attack.pgd(FN, X, Y, property=xb.TopK(5), **o),
    "topk": lambda **o: attack.topk(FN, X, Y, k=5, **o),
    "topk by kendall": lambda **o: attack.topk(FN, X, Y, k=5, measure="kendall", **o),
    "topk by spearman": lambda **o: attack.topk(FN, X, Y, k=5, measure="spearman", **o),
    "center": lambda **o: attack.center(FN, X, Y, **o),
    "region": lambda **o: attack.region(FN, X, Y, mask=MASK, **o),
    "random": lambda **o: attack.random(FN, X, Y, k=5, **o),
    "er": lambda **o: attack.er(FN, X, Y, k=5, **o),
    "er stop": lambda **o: attack.er(FN, X, Y, k=5, **{"keep": "stop", **o}),
    "er hinge": lambda **o: attack.er(FN, X, Y, k=5, **{"keep": "hinge", **o}),
    "mse": lambda **o: attack.mse(FN, X, Y, **o),
    "mse stop": lambda **o: attack.mse(FN, X, Y, **{"keep": "stop", **o}),
    "mse hinge": lambda **o: attack.mse(FN, X, Y, **{"keep": "hinge", **o}),
    "targeted": lambda **o: attack.targeted(FN, X, Y, toward=TOWARD, **{"keep": "judge", **o}),
    "untargeted": lambda **o: attack.untargeted(FN, X, Y, **{"keep": "judge", **o}),
    "ig_norm": lambda model=None, **o: attack.ig_norm(MODEL, X, Y, m=3, **o),
    "misclassify": lambda model=None, **o: attack.misclassify(MODEL, X, Y, **o),
}
LABEL_KEEPING = [name for name in ATTACKS if name not in ("pgd", "ig_norm", "misclassify")]


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("eps", [0.02, 0.5])
def test_every_attack_keeps_its_box_and_its_range(name: str, eps: float) -> None:
    found = ATTACKS[name](eps=eps, model=MODEL, **SHORT)
    box = xb.Interval.linf(X, eps, CLIP)
    assert box.contains(found.x).all()
    assert ((found.x >= box.mid - box.rad) & (found.x <= box.mid + box.rad)).all()
    assert ((found.x >= 0) & (found.x <= 1)).all()
    if name == "ig_norm":
        expected = xb.explain.integrated_gradients(MODEL, "loss", steps=3)(found.x, Y, X)
    else:
        expected = MODEL(found.x) if name == "misclassify" else FN(found.x, Y)
    assert torch.allclose(found.attribution, expected.detach(), atol=1e-12)
    assert found.margin.shape == found.broken.shape == (9,)


@pytest.mark.parametrize("name", ATTACKS)
def test_without_a_range_only_the_box_limits(name: str) -> None:
    found = ATTACKS[name](eps=0.3, model=MODEL, steps=6)
    assert xb.Interval.linf(X, 0.3).contains(found.x).all()


@pytest.mark.parametrize("name", LABEL_KEEPING)
def test_the_label_is_kept_where_that_is_claimed(name: str) -> None:
    label = MODEL(X).argmax(1)
    options = {**SHORT, "eps": 0.6, "step_size": 0.5, "steps": 20}
    found = ATTACKS[name](model=MODEL, **options)
    assert (MODEL(found.x).argmax(1) == label).all()
    assert not torch.equal(found.x, X), "it must have found something"


def test_labels_do_flip_where_nobody_keeps_them() -> None:
    label = MODEL(X).argmax(1)
    flips = [
        int((MODEL(ATTACKS[name](eps=0.6, **SHORT, step_size=0.5, keep="ignore").x).argmax(1) != label).sum())
        for name in ("topk", "er", "mse", "untargeted")
    ]
    assert max(flips) > 0


@pytest.mark.parametrize("name", ATTACKS)
def test_the_same_seed_gives_the_same_attack_in_pieces_too(name: str) -> None:
    before = torch.get_rng_state()
    one, two = (ATTACKS[name](eps=0.2, model=MODEL, seed=3, **SHORT) for _ in range(2))
    assert torch.equal(one.x, two.x) and torch.equal(one.margin, two.margin)
    if name not in ("pgd", "misclassify", "ig_norm", "random", "mse", "mse stop", "mse hinge", "untargeted"):
        pieces = ATTACKS[name](eps=0.2, model=MODEL, seed=3, batch_size=4, restarts=1, **SHORT)
        whole = ATTACKS[name](eps=0.2, model=MODEL, seed=3, restarts=1, **SHORT)
        assert torch.allclose(pieces.x, whole.x, atol=1e-9), "without random draws the pieces do not matter"
    assert torch.equal(before, torch.get_rng_state())


def moved(found: attack.Attack) -> Tensor:
    return (found.attribution - FN(X, Y).detach()).square().flatten(1).mean(1)


def lost(found: attack.Attack) -> Tensor:
    here, there = metrics.saliency_map(FN(X, Y)), metrics.saliency_map(found.attribution)
    return 1 - metrics.intersection(here, there, 5)


STRENGTH: dict[str, Callable[[attack.Attack], Tensor]] = {
    "topk": lost,
    "er": lost,
    "mse": moved,
    "untargeted": moved,
    "targeted": lambda found: -(found.attribution - TOWARD).square().flatten(1).mean(1),
    "center": lambda found: (metrics.mass_center(found.attribution) - metrics.mass_center(FN(X, Y))).norm(dim=1),
    "region": lambda found: (
        (metrics.saliency_map(found.attribution)[:, :16].sum(1)) / metrics.saliency_map(found.attribution).sum(1)
    ),
}


@pytest.mark.parametrize("name", STRENGTH)
def test_an_attack_is_stronger_than_a_random_walk(name: str) -> None:
    """One that descends where it should ascend is weaker: one of the released ones does."""
    # An L2 step moves each of 64 features by an eighth of it.
    step_size = 0.4 if name in ("er", "mse") else 0.05
    found = ATTACKS[name](eps=0.2, clip=CLIP, steps=20, step_size=step_size, keep="ignore", model=MODEL)
    walk = attack.random(FN, X, Y, k=5, eps=0.2, clip=CLIP, steps=20, step_size=0.05)
    assert STRENGTH[name](found).mean() > STRENGTH[name](walk).mean()


def test_stop_leaves_a_sample_for_good_before_its_first_flip() -> None:
    """After it, random steps are proposed from one and the same point, though many of them would keep the label."""
    label, step = MODEL(X).argmax(1), 0.2
    proposals: list[Tensor] = []

    def recording(x: Tensor) -> Tensor:
        proposals.append(x.clone())
        return MODEL(x)

    attack.random(FN, X, Y, k=5, eps=0.8, steps=30, step_size=step, model=recording, keep="stop")
    stopped, last = torch.zeros(9, dtype=torch.bool), X
    for proposal in proposals[1:]:  # the first call labels x
        assert ((proposal - last).abs().amax((1, 2, 3)) <= step + 1e-12).all()
        stopped |= MODEL(proposal).argmax(1) != label
        last = torch.where(stopped.reshape(-1, 1, 1, 1), last, proposal)
    assert stopped.any()


def test_the_hinge_keeps_the_walk_itself_at_the_label() -> None:
    label = MODEL(X).argmax(1)
    shares = {}
    for keep in ("judge", "hinge"):
        seen: list[Tensor] = []

        def recording(x: Tensor, seen: list[Tensor] = seen) -> Tensor:
            logits = MODEL(x)
            if not x.requires_grad:
                seen.append(logits.detach().argmax(1) == label)
            return logits

        attack.mse(FN, X, Y, eps=0.6, steps=60, step_size=0.3, model=recording, keep=keep, seed=1)
        shares[keep] = torch.stack(seen[1:]).double().mean().item()
    assert shares["judge"] < 0.6 and shares["hinge"] > 0.85


# --- certified ≤ true ≤ attacked -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1e-4, 1e-3, 0.03])
def test_rec_certificates_are_never_broken(tau: float) -> None:
    masks = corner_masks(8, 8, 3).unsqueeze(1) * 0.05
    held = broken = 0
    for eps in (1e-4, 1e-3, 1e-2, 0.1):
        certificate = xb.certify(FN, X, Y, eps=eps, property=xb.MeanSquare(tau), clip=CLIP)
        found = attack.untargeted(FN, X, Y, eps=eps, tau=tau, clip=CLIP, steps=10, step_size=eps / 4, model=MODEL)
        assert not (certificate.holds & found.broken).any() and (found.margin >= certificate.margin - 1e-12).all()
        targeted = xb.certify(FN, X, Y, eps=eps, property=Unlike(masks, tau), clip=CLIP)
        for mask in masks[:3]:
            seen = attack.targeted(
                FN, X, Y, toward=mask, tau=tau, eps=eps, clip=CLIP, steps=10, step_size=eps / 4, model=MODEL
            )
            assert not (targeted.holds & seen.broken).any() and (seen.margin >= targeted.margin - 1e-12).all()
            broken += int(seen.broken.sum())
        held += int(certificate.holds.sum()) + int(targeted.holds.sum())
        broken += int(found.broken.sum())
    assert held > 0 and (tau > 1e-4 or broken > 0)


def test_sensitive_features_that_are_certified_stay_out_of_the_top() -> None:
    model = mlp((6, 20, 4))
    fn, x, y = xb.explain.gradient(model), images(20, shape=(6,)), torch.arange(20) % 4
    property = Excluded((0, 3), k=2)
    for eps in (0.01, 0.1):
        certificate = xb.certify(fn, x, y, eps=eps, property=property)
        found = attack.pgd(fn, x, y, eps=eps, property=property)
        assert certificate.holds.any() and not (certificate.holds & found.broken).any()
        ranked = found.attribution.abs().argsort(1, descending=True)[:, :2]
        assert ((ranked == 0) | (ranked == 3)).any(1)[found.broken].all()


def test_certified_overlap_lies_below_what_attacks_leave() -> None:
    for eps in (1e-4, 2e-3):
        certificate = xb.certify(FN, X, Y, eps=eps, property=xb.TopK(5), clip=CLIP)
        certified = metrics.certified_intersection(xb.TopK(5), certificate.nominal, certificate.bounds)
        for name in ("topk", "er", "mse", "random"):
            found = ATTACKS[name](eps=eps, **SHORT, step_size=eps)
            here, there = metrics.saliency_map(certificate.nominal), metrics.saliency_map(found.attribution)
            assert (metrics.intersection(here, there, 5) >= certified).all()
        assert (certified == 1).eq(certificate.holds).all()
    assert 0 < certified.mean() < 1


def test_an_adversary_beats_the_certified_accuracy_never() -> None:
    y = MODEL(X).argmax(1)
    for eps in (0.003, 0.05):
        found = attack.misclassify(MODEL, X, y, eps=eps, clip=CLIP, step_size=eps / 4)
        assert metrics.certified_accuracy(MODEL, X, y, eps, CLIP) <= (~found.broken).double().mean().item()
        assert (found.broken == (MODEL(found.x).argmax(1) != y)).all()
    assert found.broken.any()
    assert metrics.certified_accuracy(MODEL, X, y, 0.0) == 1.0
    again = attack.misclassify(MODEL, X, y.int(), eps=eps, clip=CLIP, step_size=eps / 4)
    assert torch.equal(again.broken, found.broken)


def test_a_slope_that_does_not_exist_stops_its_own_entry_alone() -> None:
    """The root of |0 · x| has the slope 0 / 0."""

    def fn(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, :3].square(), (0 * x[:, 3:]).abs().sqrt()], 1)

    x = images(5, shape=(6,))
    for found in (attack.mse(fn, x, eps=0.1, steps=5), attack.untargeted(fn, x, eps=0.1, tau=0.0, steps=5)):
        assert found.x.isfinite().all() and found.broken.all()


def test_per_sample_targets_are_those_of_each_sample() -> None:
    toward = torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.05
    whole = attack.targeted(FN, X, Y, toward=toward, eps=0.1, steps=5, batch_size=4)
    for i in (0, 5, 8):
        one = attack.targeted(FN, X[i : i + 1], Y[i : i + 1], toward=toward[i], eps=0.1, steps=5)
        assert one.margin.item() == pytest.approx(whole.margin[i].item(), rel=1e-9)


def test_bad_options() -> None:
    for call, message in (
        (lambda: attack.topk(FN, X, Y, eps=0.1, k=0), "k=0"),
        (lambda: attack.topk(FN, X, Y, eps=0.1, k=5, measure="tau"), "measure='tau' is unknown"),
        (lambda: attack.topk(FN, X, Y, eps=0.1, k=5, keep="judge"), "looks at labels: pass model"),
        (lambda: attack.topk(FN, X, Y, eps=0.1, k=5, keep="hold", model=MODEL), "keep='hold' is unknown"),
        (lambda: attack.topk(FN, X, Y, eps=0.1, k=5, steps=0), "steps ≥ 1"),
        (lambda: attack.topk(FN, X, Y, eps=-0.1, k=5), "eps must be finite and ≥ 0"),
        (lambda: attack.er(FN, X, Y, eps=0.1, k=64), "less than the number of features"),
        (lambda: attack.region(FN, X, Y, eps=0.1, mask=torch.ones(3)), "mask has 3 entries"),
        (lambda: attack.targeted(FN, X, Y, eps=0.1, toward=torch.ones(3)), "toward must have the shape"),
        (lambda: attack.Search(steps=1, step_size=0.1, move="jump"), "move='jump' is unknown"),
        (lambda: attack.Search(steps=1, step_size=-0.1), "step_size must be ≥ 0"),
        (lambda: attack.Search(steps=1, step_size=0.1, batch_size=0), "batch_size must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
