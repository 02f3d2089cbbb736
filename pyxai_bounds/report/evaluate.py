"""Everything that a report says about one network on one data set, each certificate beside an attack."""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pyxai_bounds import attack, explain
from pyxai_bounds.certify import Certificate, TopK, certified_radius, certify
from pyxai_bounds.certify.metrics import (
    accuracy,
    certain_members,
    same_class_cosine,
    top_features,
    unstable_relu_fraction,
)
from pyxai_bounds.certify.pieces import Progress, share_of, silent
from pyxai_bounds.data import Dataset
from pyxai_bounds.interval import Interval
from pyxai_bounds.program import bound
from pyxai_bounds.widths import Widths

GRADIENT = "gradient of the true label's logit"


class SoundnessError(RuntimeError):
    """An attack broke what a certificate promised: one of the two is wrong, and no report may hide it."""


@dataclass(frozen=True)
class AtRadius:
    """Of all samples, the share certified and the share that survived the attack, at one radius."""

    eps: float
    certified: float
    survived: float


@dataclass(frozen=True, eq=False)
class Sample:
    """One held-out sample and what is known of its explanation in the box of radius eps.

    x, attribution, lower, upper in the shape of an input; top bool [D], the nominal top features; certain bool [D],
    those that are top features everywhere in the box. A pixel of a colour image is one feature.
    """

    x: Tensor
    target: int
    predicted: int
    attribution: Tensor
    lower: Tensor
    upper: Tensor
    top: Tensor
    certain: Tensor
    holds: bool
    radius: float


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One network's results over all held-out samples. radius [N]: each sample's certified radius, at most max_eps."""

    label: str
    dataset: Dataset
    model: str
    explained_as: str
    parameters: int
    property: TopK
    accuracy: float
    unstable: float | None
    cosine: float
    at: tuple[AtRadius, ...]  # at the radii asked for
    curve: tuple[AtRadius, ...]  # at these and others, up to max_eps
    radius: Tensor
    max_eps: float
    rounding: str
    samples: tuple[Sample, ...]
    widths: Widths  # of the bounds of these samples, at the first of the radii

    def summary(self) -> dict[str, Any]:
        """The numbers alone, as JSON can hold them."""
        return {
            "label": self.label,
            "data": self.dataset.name,
            "model": self.model,
            "explanation": self.explained_as,
            "parameters": self.parameters,
            "samples": len(self.radius),
            "k": self.property.k,
            "rounding": self.rounding,
            "accuracy": self.accuracy,
            "unstable_relus": self.unstable,
            "unstable_relus_at_eps": self.at[0].eps,
            "same_class_cosine": None if math.isnan(self.cosine) else self.cosine,
            "at": [vars(row) for row in self.at],
            "curve": [vars(row) for row in self.curve],
            "median_radius": self.radius.median().item(),
            "max_eps": self.max_eps,
        }


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    label: str,
    *,
    name: str = "",
    explanation: Callable[..., Tensor] | None = None,
    explained_as: str = "",
    eps: Sequence[float] = (0.01, 0.02),
    k: int = 5,
    attack_steps: int = 20,
    branches: int = 1,
    pictures: int = 4,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Certify and attack the top-k features of an explanation on every held-out sample; those of images are pixels.

    explanation: ``fn(x, y)`` in the shape of x, and ``explained_as`` what the report calls it; by default the gradient
    of the true label's logit. eps: the radii of the table, in the units of the inputs; the curves go on to 2½ times the
    largest. branches: at the radii of the table, what neither certificate nor attack decided is divided into so many
    parts (see :func:`certify`). pictures: how many samples, from the first on, are kept whole, and over how many the
    widths along the network are averaged. ``on_progress`` is called with the fraction done.
    Puts the model in evaluation mode. Raises ValueError for no radius or an explanation in another shape,
    SoundnessError if an attack breaks a certificate, and what ``certify`` raises.
    """
    if not eps or min(eps) <= 0:
        raise ValueError(f"eps={list(eps)} must hold at least one radius, all of them positive.")
    model.eval()
    fn, property, clip = explanation or explain.gradient(model), top_features(k, dataset.test_x), dataset.clip
    x, y = dataset.test_x, dataset.test_y
    eps, max_eps = sorted(eps), 2.5 * max(eps)
    check_shape(fn, x, y)
    told = on_progress or silent
    tick = told if branches == 1 else share_of(told, 0, 0.5)

    # Attacks take longer than Intervals, and far less long than what sharpens these.
    certificates, share = {}, 0.3 / len(eps)
    for i, radius in enumerate(eps):
        tell = share_of(tick, share * i, share)
        certificates[radius] = certify(fn, x, y, eps=radius, property=property, clip=clip, on_progress=tell)
    reach = certified_radius(
        fn, x, y, property=property, max_eps=max_eps, tol=max_eps / 512, clip=clip, on_progress=share_of(tick, 0.3, 0.5)
    )
    grid = sorted({*eps, max(eps) / 4, max(eps) * 1.5, max_eps})
    broken: dict[float, Tensor] = {}
    so_far = torch.zeros(len(x), dtype=torch.bool)
    for i, radius in enumerate(grid):
        found = attack.pgd(fn, x, y, eps=radius, property=property, clip=clip, steps=attack_steps, seed=seed)
        so_far = so_far | found.broken  # what was found in a smaller box lies in this one
        broken[radius] = so_far
        tick(0.8 + 0.2 * (i + 1) / len(grid))
    for i, radius in enumerate(eps if branches > 1 else ()):
        certificate, share = certificates[radius], 0.5 / len(eps)
        open_ = ~certificate.holds & ~broken[radius]
        if not open_.any():
            continue
        decided = certify(
            fn, x[open_], y[open_], eps=radius, property=property, clip=clip, branches=branches,
            on_progress=share_of(told, 0.5 + share * i, share),
        )  # fmt: skip
        holds = certificate.holds.masked_scatter(open_, decided.holds)
        certificates[radius] = replace(certificate, holds=holds)
        reach = torch.where(holds, reach.clamp(min=radius), reach)
        refuted = torch.zeros_like(open_).masked_scatter(open_, decided.refuted)
        broken |= {wider: broken[wider] | refuted for wider in grid if wider >= radius}

    at = tuple(_row(label, radius, certificates[radius].holds, broken[radius]) for radius in eps)
    curve = tuple(_row(label, radius, reach >= radius, broken[radius]) for radius in grid)
    first = certificates[eps[0]]
    few = slice(max(pictures, 1))
    widths = bound(fn, sound=True).widths(Interval.linf(x[few], eps[0], clip), y[few])
    return Evaluation(
        label=label, dataset=dataset, model=name or type(model).__name__,
        explained_as=explained_as or (GRADIENT if explanation is None else "the given function"),
        parameters=sum(p.numel() for p in model.parameters()), property=property,
        accuracy=accuracy(model, x, y), unstable=unstable_relu_fraction(model, x, eps[0], clip),
        cosine=same_class_cosine(first.nominal, y), at=at, curve=curve, radius=reach, max_eps=max_eps,
        rounding=first.rounding, samples=_samples(model, dataset, property, first, reach, min(pictures, len(x))),
        widths=widths,
    )  # fmt: skip


def check_shape(fn: Callable[..., Tensor], x: Tensor, y: Tensor) -> None:
    """Raises ValueError unless ``fn(x, y)`` has the shape of x."""
    shape = explained.shape if isinstance(explained := fn(x[:1], y[:1]), Tensor) else None
    if shape != x[:1].shape:
        raise ValueError(
            f"The explanation of inputs {list(x[:1].shape)} must have their shape, but has "
            f"{None if shape is None else list(shape)}: metrics rank the features and add up the channels themselves. "
            "Of a saliency map take explain.saliency(model, channels='none')."
        )


def rounded_down(radius: float) -> str:
    """A certified radius as text, two significant digits, never more than was certified."""
    two_digits = decimal.Context(prec=2, rounding=decimal.ROUND_FLOOR)
    return f"{two_digits.create_decimal(repr(radius)).normalize():f}"


def _row(label: str, eps: float, holds: Tensor, broken: Tensor) -> AtRadius:
    """Certified ≤ true ≤ survived, sample by sample, or there is no row."""
    wrong = (holds & broken).nonzero().flatten().tolist()
    if wrong:
        raise SoundnessError(
            f"{label}: at eps {eps:g} the attack broke {len(wrong)} certified samples, the first with index "
            f"{wrong[0]}. A certificate is wrong. Please report this with the model and the data."
        )
    return AtRadius(eps, holds.double().mean().item(), (~broken).double().mean().item())


def _samples(
    model: nn.Module, dataset: Dataset, property: TopK, certificate: Certificate, radius: Tensor, count: int
) -> tuple[Sample, ...]:
    bounds, nominal = certificate.bounds[:count], certificate.nominal[:count]
    with torch.no_grad():
        predicted = model(dataset.test_x[:count]).argmax(1)
    lower, upper = bounds.lower, bounds.upper
    top, certain = property.top(nominal), certain_members(property, bounds)
    return tuple(
        Sample(
            x=dataset.test_x[i], target=int(dataset.test_y[i]), predicted=int(predicted[i]),
            attribution=nominal[i], lower=lower[i], upper=upper[i], top=top[i], certain=certain[i],
            holds=bool(certificate.holds[i]), radius=radius[i].item(),
        )
        for i in range(count)
    )  # fmt: skip
