"""Every number of the field for one network, ready for JSON: accuracy, attacks, metrics and certificates together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyxai_bounds import attack, explain
from pyxai_bounds.attack import Attack
from pyxai_bounds.certify import Cosine, MeanSquare, certified_radius, certify, metrics
from pyxai_bounds.certify.pieces import Progress, share_of, silent
from pyxai_bounds.interval import Interval
from pyxai_bounds.report.evaluate import SoundnessError, check_shape

PARTS = 9  # measurements per radius, for the progress bar


def evaluate_all(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: Sequence[float] = (0.01, 0.02),
    k: int = 5,
    clip: tuple[float, float] | None = None,
    explanation: Callable[..., Tensor] | None = None,
    max_eps: float | None = None,
    tau: float = 0.03,
    cosine: float = 0.9,
    attack_steps: int = 20,
    m: int = 10,
    neighbours: int = 5,
    seed: int = 0,
    batch_size: int = 256,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Accuracy, robustness under every attack, and certificates of one network; every certificate beside its attack.

    Shapes: x [N, ...] in ``clip`` if given, y [N] integer. eps: the radii, in the units of x; k: the features that
    count as top; explanation: ``fn(x, y)`` in the shape of x, by default the gradient of the label's logit; tau: of
    REC's mean-square certificate; m: steps of the integrated gradients whose L1 norm is bounded and attacked;
    neighbours: per sample, for the thickness.
    The statements about explanations under attack (IN, CO, ...) are about the samples that the network classifies
    correctly, and the attacks keep the label; those about certificates are about all samples.

    Returns numbers, strings, None (where a number does not exist), lists and dicts of them; ``at`` has one entry per
    radius. ``report.glossary`` says what each number means.
    The model is put in evaluation mode. ``on_progress`` gets the fraction done.
    Raises ValueError without positive radii or samples and for an explanation in another shape, SoundnessError if an
    attack breaks a certificate.
    """
    if not eps or min(eps) <= 0 or not all(map(math.isfinite, eps)):
        raise ValueError(f"eps={list(eps)} must hold at least one radius, all of them positive and finite.")
    if len(x) == 0 or len(x) != len(y):
        raise ValueError(f"x and y must have the same number of samples, at least one; got {len(x)} and {len(y)}.")
    model.eval()
    measure = _Measure(
        model, x, y, k, clip, explanation or explain.gradient(model), tau, cosine, attack_steps, m, neighbours, seed,
        batch_size,
    )  # fmt: skip
    check_shape(measure.fn, x, y)
    done, total = PARTS, PARTS * (1 + len(eps))
    tell = on_progress or silent

    def tick() -> None:
        nonlocal done
        done += 1
        tell(done / total)

    reach = 2.5 * max(eps) if max_eps is None else max_eps
    radius = certified_radius(
        measure.fn, x, y, property=measure.topk, max_eps=reach, tol=reach / 512, clip=clip, batch_size=batch_size,
        on_progress=share_of(tell, 0, PARTS / total),
    )  # fmt: skip
    first = certify(measure.fn, x, y, eps=min(eps), property=measure.topk, clip=clip, batch_size=batch_size)
    quartiles = torch.quantile(radius.double(), torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64, device=x.device))
    result = {
        "samples": len(x),
        "k": k,
        "rounding": first.rounding,
        "NA": metrics.accuracy(model, x, y, batch_size),
        "unstable_relus": metrics.unstable_relu_fraction(model, x, min(eps), clip, batch_size),
        "unstable_relus_at_eps": min(eps),
        "same_class_cosine": metrics.same_class_cosine(first.nominal, y),
        "certified_radius": {
            "max_eps": reach,
            "mean": radius.double().mean().item(),
            "lower_quartile": quartiles[0].item(),
            "median": quartiles[1].item(),
            "upper_quartile": quartiles[2].item(),
        },
        "at": [measure.at(value, tick) for value in sorted(eps)],
    }
    return _jsonable(result)


class _Measure:
    """One network on one set of samples, to be measured at several radii."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        k: int,
        clip: tuple[float, float] | None,
        fn: Callable[..., Tensor],
        tau: float,
        cosine: float,
        steps: int,
        m: int,
        neighbours: int,
        seed: int,
        batch_size: int,
    ) -> None:
        self.model, self.x, self.y, self.k, self.clip, self.fn = model, x, y, k, clip, fn
        self.tau, self.cosine, self.steps, self.m, self.neighbours = tau, cosine, steps, m, neighbours
        self.seed, self.batch_size = seed, batch_size
        with torch.no_grad():
            predicted = torch.cat([model(piece).argmax(1) for piece in x.split(batch_size)])
        self.correct = (predicted == y).nonzero().flatten()
        self.topk = metrics.top_features(k, x)
        self.rankable = k < metrics.saliency_map(x[:1]).shape[1]  # else everything is on top and stays there

    def at(self, eps: float, tick: Callable[[], None]) -> dict[str, Any]:
        row: dict[str, Any] = {"eps": eps, "attacks": {}}
        for part in (
            self._prediction, self._certificates, self._survival, self._topk_attack, self._other_attacks, self._r2et,
            self._rec, self._thickness, self._ig_norm,
        ):  # fmt: skip
            found = part(eps)
            row["attacks"] |= found.pop("attacks", {})
            row |= found
            tick()
        return row

    def _options(self, eps: float) -> dict[str, Any]:
        """Sign steps that can cross the box."""
        step_size = 2.5 * eps / self.steps
        return {"eps": eps, "clip": self.clip, "steps": self.steps, "step_size": step_size, "seed": self.seed}

    def _prediction(self, eps: float) -> dict[str, Any]:
        found = attack.misclassify(self.model, self.x, self.y, batch_size=self.batch_size, **self._options(eps))
        certified = metrics.certified_accuracy(self.model, self.x, self.y, eps, self.clip, self.batch_size)
        survived = (~found.broken).double().mean().item()
        _check("certified accuracy", certified <= survived, eps)
        return {"AA": survived, "certified_accuracy": certified}

    def _certificates(self, eps: float) -> dict[str, Any]:
        self.certificate = self._certify(self.topk, eps)
        self.overlap = metrics.certified_intersection(self.topk, self.certificate.nominal, self.certificate.bounds)
        return {
            "certified_topk": self.certificate.fraction,
            "certified_intersection": self.overlap.mean().item(),
            "certified_cosine": self._certify(Cosine(self.cosine), eps).fraction,
            "certified_cosine_least": self.cosine,
        }

    def _certify(self, property: Any, eps: float) -> Any:
        return certify(self.fn, self.x, self.y, eps=eps, property=property, clip=self.clip, batch_size=self.batch_size)

    def _survival(self, eps: float) -> dict[str, Any]:
        """The strongest attack on the certified statement itself; the label may change."""
        found = attack.pgd(
            self.fn, self.x, self.y, eps=eps, property=self.topk, clip=self.clip, steps=self.steps, seed=self.seed,
            batch_size=self.batch_size,
        )  # fmt: skip
        _check("certified top-k", not bool((self.certificate.holds & found.broken).any()), eps)
        return {"survived_topk": (~found.broken).double().mean().item()}

    def _compare(self, eps: float, found: Attack, overlap: Tensor | None) -> dict[str, Any]:
        """The explanations of the attacked inputs beside the nominal ones, over correctly classified samples."""
        here = self.certificate.nominal[self.correct]
        a, b = metrics.saliency_map(here), metrics.saliency_map(found.attribution)
        kept = metrics.intersection(a, b, self.k)
        if overlap is not None:
            _check("certified intersection", bool((overlap[self.correct] <= kept).all()), eps)
        return {
            "intersection": _mean(kept),
            "kendall": _mean(metrics.kendall(a, b)),
            "spearman": _mean(metrics.spearman(a, b)),
            "pearson": _mean(metrics.pearson(a, b)),
            "mse": _mean(metrics.mean_square(here, found.attribution)),
        }

    def _attacked(self, name: str, eps: float, **options: Any) -> Attack:
        chosen = self.correct
        return getattr(attack, name)(
            self.fn, self.x[chosen], self.y[chosen], model=self.model, batch_size=self.batch_size,
            **{**self._options(eps), **options},
        )  # fmt: skip

    def _topk_attack(self, eps: float) -> dict[str, Any]:
        compared = self._compare(eps, self._attacked("topk", eps, k=self.k), self.overlap)
        return {
            "compared": len(self.correct),
            "IN": compared["intersection"],
            "CO": compared["kendall"],
            "attacks": {"topk": compared},
        }

    def _other_attacks(self, eps: float) -> dict[str, Any]:
        found = {"random": self._attacked("random", eps, k=self.k)}
        if self.x.dim() == 4:
            found["center"] = self._attacked("center", eps)
            found["region"] = self._attacked("region", eps, mask=_corner(self.x))
        return {"attacks": {name: self._compare(eps, result, self.overlap) for name, result in found.items()}}

    def _r2et(self, eps: float) -> dict[str, Any]:
        # A step of this L2 length moves each feature by about 2.5·eps / steps, as the sign steps do.
        length = 2.5 * eps / self.steps * math.sqrt(self.x[0].numel())
        attacks: dict[str, Any] = {}
        for keep in ("stop", "hinge"):
            if self.rankable:
                found = self._attacked("er", eps, k=self.k, step_size=length, keep=keep)
                attacks[f"er-{keep}"] = self._compare(eps, found, self.overlap)
            found = self._attacked("mse", eps, step_size=length, keep=keep)
            attacks[f"mse-{keep}"] = self._compare(eps, found, self.overlap)
        return {"P@k": attacks["er-stop"]["intersection"] if self.rankable else 1.0, "attacks": attacks}

    def _rec(self, eps: float) -> dict[str, Any]:
        """REC's untargeted certificate, and its attack."""
        certificate = self._certify(MeanSquare(self.tau), eps)
        found = attack.untargeted(
            self.fn, self.x, self.y, tau=self.tau, batch_size=self.batch_size,
            **{**self._options(eps), "step_size": eps / 4},
        )  # fmt: skip
        _check("certified mean square", not bool((certificate.holds & found.broken).any()), eps)
        return {
            "certified_mean_square": certificate.fraction,
            "survived_mean_square": (~found.broken).double().mean().item(),
            "tau": self.tau,
        }

    def _thickness(self, eps: float) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.seed)
        box = Interval.linf(self.x, eps, self.clip)
        position = torch.rand((self.neighbours, *self.x.shape), generator=generator, dtype=torch.float64)
        others = box.mid + box.rad * (2 * position - 1).to(self.x)
        if not self.rankable:
            return {"thickness": 1.0}
        held = metrics.thickness(self.fn, self.x, self.y, others, k=self.k, batch_size=self.batch_size)
        return {"thickness": _mean(held)}

    def _ig_norm(self, eps: float) -> dict[str, Any]:
        found = -attack.ig_norm(
            self.model, self.x, self.y, m=self.m, batch_size=max(1, self.batch_size // self.m), **self._options(eps)
        ).margin
        pieces = zip(self.x.split(self.batch_size), self.y.split(self.batch_size), strict=True)
        with torch.no_grad():
            bound = torch.cat([metrics.ig_norm_bound(self.model, a, b, eps, self.clip, sound=True) for a, b in pieces])
        # What was found is rounded itself: where the bound is attained, a thousand additions may step past it.
        _check("certified IG norm", bool((found <= bound * (1 + 1e3 * torch.finfo(found.dtype).eps)).all()), eps)
        return {"ig_norm_found": _mean(found), "ig_norm_certified": _mean(bound)}


def _corner(x: Tensor) -> Tensor:
    """A region of interest for the region attack: the upper left quarter of the image."""
    mask = torch.zeros(x.shape[2:], device=x.device)
    mask[: x.shape[2] // 2, : x.shape[3] // 2] = 1
    return mask


def _check(what: str, kept: bool, eps: float) -> None:
    """Certified ≤ true ≤ attacked, or there is no row."""
    if not kept:
        raise SoundnessError(
            f"At eps {eps:g} an attack went beyond the {what}: one of the two is wrong. Please report this with the "
            "model and the data."
        )


def _mean(values: Tensor) -> float:
    """The mean of what exists."""
    return values.double().nanmean().item()


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_jsonable(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
