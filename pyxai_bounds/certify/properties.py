"""Properties of an explanation that bounds can prove and that an attack can break.

A property compares the explanation at the centre of the box with a set of explanations. Its margin is positive
where the property is kept by every member of the set; at a single explanation, which is a set of one, the same
formula is what an attack minimises. Selecting and comparing are exact in floating point; whatever sums, multiplies or
takes roots does so in float64, and leaves room for what that may lose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from pyxai_bounds import rounding
from pyxai_bounds.interval import Interval


class Property(Protocol):
    """What ``certify`` needs of a property."""

    strict: bool  # does a margin of exactly 0 break it?
    # It may have ``of_direction: bool``: does it hold of all positive multiples of an explanation, or of none?

    def margin(self, nominal: Tensor, bounds: Interval) -> Tensor:
        """Distance from being broken, [B], for explanations of shape [B, ...]."""
        ...


def check_property(property: Any) -> None:
    """Raise TypeError for what is no property, a class such as ``TopK`` included."""
    if not hasattr(property, "margin") or isinstance(property, type):
        raise TypeError(f"property must be one such as TopK(5), got {property!r}.")


def kept(property: Property, margin: Tensor) -> Tensor:
    """Which margins [B] mean that the property is kept; never a NaN."""
    return margin > 0 if property.strict else margin >= 0


def flat(t: Tensor) -> Tensor:
    """[B, ...] as [B, D]; an explanation of one number per sample has D = 1."""
    return t.reshape(len(t), t.shape[1:].numel())


def check_shapes(property: Property, nominal: Tensor, bounds: Interval) -> None:
    """Raise where the explanation and its bounds do not belong together."""
    name = type(property).__name__
    if not isinstance(nominal, Tensor) or not isinstance(bounds, Interval):
        given = f"{type(nominal).__name__} and {type(bounds).__name__}"
        raise TypeError(f"{name}.margin takes an explanation (a tensor) and its bounds (an Interval), got {given}.")
    if nominal.shape != bounds.shape or nominal.dim() == 0:
        raise ValueError(
            f"{name}.margin takes an explanation and its bounds of one shape [B, ...], got {list(nominal.shape)} and "
            f"{list(bounds.shape)}; of a single sample use nominal[None] and bounds[None]."
        )


def check_number(property: Property, name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{type(property).__name__}: {name} must be a number, got {value!r}.")


def _check_count(name: str, k: int) -> None:
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"{name}: k must be a whole number of entries, got {k!r}.")
    if k < 1:
        raise ValueError(f"{name}: k must be at least 1, got {k}.")


@dataclass(frozen=True)
class TopK:
    """The k largest entries stay the k largest, as a set, in any order among themselves.

    ``by="abs"`` ranks |v|, ``"signed"`` ranks v; ``channels="sum"`` adds the ranked quantity over dimension 1 first,
    as R2ET does. With k ≥ the number of entries the property is trivially true.
    Margin: least lower bound among the top minus greatest upper bound among the rest, in units of the explanation.
    """

    k: int
    by: Literal["abs", "signed"] = "abs"
    channels: Literal["none", "sum"] = "none"
    strict = True
    of_direction = True

    def __post_init__(self) -> None:
        _check_count("TopK", self.k)
        if self.by not in ("abs", "signed"):
            raise ValueError(f"TopK: by={self.by!r} is unknown; choose 'abs' or 'signed'.")
        if self.channels not in ("none", "sum"):
            raise ValueError(f"TopK: channels={self.channels!r} is unknown; choose 'none' or 'sum'.")

    def scores(self, bounds: Interval) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of what is ranked, [B, D]."""
        lower, upper = bounds.lower, bounds.upper
        if self.by == "abs":
            lower, upper = magnitude(lower, upper)
        if self.channels == "sum":
            if lower.dim() < 3:
                raise ValueError(
                    f"TopK: channels='sum' needs explanations of shape [B, C, ...], got {list(lower.shape)}."
                )
            lost = rounding_loss(lower.shape[1])
            lower, upper = lower.double(), upper.double()
            lower = lower.sum(1) - lost * lower.abs().sum(1)
            upper = upper.sum(1) + lost * upper.abs().sum(1)
        return flat(lower), flat(upper)

    def top(self, nominal: Tensor) -> Tensor:
        """The k top entries of each explanation, bool [B, D]."""
        score = self.scores(Interval.of(nominal, torch.zeros_like(nominal)))[0]
        if self.k >= score.shape[1]:
            return torch.ones_like(score, dtype=torch.bool)
        return torch.zeros_like(score, dtype=torch.bool).scatter(1, score.topk(self.k, 1).indices, True)

    def margin(self, nominal: Tensor, bounds: Interval) -> Tensor:
        check_shapes(self, nominal, bounds)
        lower, upper = self.scores(bounds)
        if self.k >= lower.shape[1]:
            return torch.full_like(lower[:, 0], torch.inf)
        top = self.top(nominal)
        return lower.masked_fill(~top, torch.inf).amin(1) - upper.masked_fill(top, -torch.inf).amax(1)


@dataclass(frozen=True)
class Sign:
    """Every entry keeps its sign; with ``k``, the k entries of largest magnitude do. A zero has no sign to keep.

    Margin: the least distance of a lower bound above 0 or of an upper bound below 0, in units of the explanation.
    """

    k: int | None = None
    strict = True
    of_direction = True

    def __post_init__(self) -> None:
        if self.k is not None:
            _check_count("Sign", self.k)

    def margin(self, nominal: Tensor, bounds: Interval) -> Tensor:
        check_shapes(self, nominal, bounds)
        distance = flat(torch.where(nominal > 0, bounds.lower, -bounds.upper))
        # A nominal zero keeps no sign, whatever the bounds.
        distance = distance.masked_fill(flat(nominal) == 0, 0.0).minimum(distance)
        if self.k is not None and self.k < distance.shape[1]:
            distance = distance.gather(1, flat(nominal).abs().topk(self.k, 1).indices)
        return distance.amin(1) if distance.shape[1] else torch.full_like(distance.sum(1), torch.inf)


@dataclass(frozen=True)
class _Deviation:
    """A norm of the deviation from the nominal explanation stays at most ``tau``. Margin: tau − that norm."""

    tau: float
    strict = False

    def __post_init__(self) -> None:
        check_number(self, "tau", self.tau)
        if not self.tau >= 0:
            raise ValueError(f"{type(self).__name__}: tau must be ≥ 0, got {self.tau}.")

    def size(self, deviation: Tensor) -> Tensor:
        raise NotImplementedError

    def margin(self, nominal: Tensor, bounds: Interval) -> Tensor:
        check_shapes(self, nominal, bounds)
        moved = flat(deviation(nominal, bounds))
        size = self.size(moved) * (1 + rounding_loss(moved.shape[1]))
        # Squares of numbers below 1e-154 underflow: their root is off by no more than this.
        return self.tau - (size + (moved != 0).any(1).double() * (moved.shape[1] * rounding.floor(torch.float64)))


class L1(_Deviation):
    """‖v′ − v‖₁ ≤ tau for every explanation v′ in the bounds."""

    def size(self, deviation: Tensor) -> Tensor:
        return deviation.sum(1)


class L2(_Deviation):
    """‖v′ − v‖₂ ≤ tau for every explanation v′ in the bounds."""

    def size(self, deviation: Tensor) -> Tensor:
        return torch.linalg.vector_norm(deviation, dim=1)


class Linf(_Deviation):
    """max_j |v′_j − v_j| ≤ tau for every explanation v′ in the bounds."""

    def size(self, deviation: Tensor) -> Tensor:
        return deviation.amax(1)


class MeanSquare(_Deviation):
    """mean_j (v′_j − v_j)² ≤ tau: REC's untargeted certificate (arXiv 2212.08507, tau = 0.03 in its notebooks)."""

    def size(self, deviation: Tensor) -> Tensor:
        return deviation.square().mean(1)


@dataclass(frozen=True)
class Cosine:
    """The cosine between v′ and v stays at least ``least``, for every explanation v′ in the bounds; that of 0 is 0.

    With d the greatest deviation of each entry and r = ‖d‖₂ < ‖v‖ the cosine is at least √(1 − (r/‖v‖)²). It is also at
    least p / (‖v‖·‖v′‖) for p the least product v·v′ and the greatest ‖v′‖ in the bounds, or the least if p < 0: at a
    single explanation that is the cosine itself. The larger one counts. Margin: it − least.
    """

    least: float
    strict = False
    of_direction = True

    def __post_init__(self) -> None:
        check_number(self, "least", self.least)
        if not -1 <= self.least <= 1:
            raise ValueError(f"Cosine: least must lie in [-1, 1], got {self.least}.")

    def margin(self, nominal: Tensor, bounds: Interval) -> Tensor:
        check_shapes(self, nominal, bounds)
        v, d = flat(nominal).double(), flat(deviation(nominal, bounds))
        lower, upper = flat(bounds.lower).double(), flat(bounds.upper).double()
        lost = rounding_loss(v.shape[1])
        # Divided by the greatest entry, so that squares neither underflow nor overflow where that counts.
        top, size = (t.amax(1, keepdim=True) if v.shape[1] else t for t in (v.abs(), lower.abs().maximum(upper.abs())))
        size = size.where(size > 0, 1.0)
        v, d, lower, upper = v / top, d / top, lower / size, upper / size
        norm = torch.linalg.vector_norm(v, dim=1)
        square = 1 - (torch.linalg.vector_norm(d, dim=1) / norm * (1 + lost)).square()
        by_angle = square.where(square > 0, 1.0).sqrt()  # whose slope is infinite at 0
        least, most = magnitude(lower, upper)
        product = torch.minimum(v * lower, v * upper).sum(1) - lost * (v.abs() * most).sum(1)
        length = torch.linalg.vector_norm(most.where((product >= 0).unsqueeze(1), least), dim=1)
        by_product = (product / (norm * length.where(length > 0, 1.0))).clamp(min=-1)
        by_product = by_product.where((length > 0) | (product >= 0), -1.0)
        bound = torch.where(square > 0, torch.maximum(by_angle, by_product), by_product)
        bound = torch.where(norm > 0, (bound - lost).clamp(min=-1), torch.nan)  # a zero has no direction to keep
        return bound - self.least


def deviation(nominal: Tensor, bounds: Interval) -> Tensor:
    """max(v_U − v, v − v_L): how far each entry can move, in the explanation's shape, in float64 and rounded up."""
    v = nominal.double()
    return rounding.up(torch.maximum(bounds.upper.double() - v, v - bounds.lower.double()))


def rounding_loss(terms: int) -> float:
    """What a formula on vectors of so many entries may lose in float64, relative to its terms, several times over."""
    return 8 * (terms + 16) * rounding.unit(torch.float64)


def magnitude(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds of |v|."""
    least = torch.where((lower <= 0) & (upper >= 0), 0.0, torch.minimum(lower.abs(), upper.abs()))
    return least, torch.maximum(lower.abs(), upper.abs())
