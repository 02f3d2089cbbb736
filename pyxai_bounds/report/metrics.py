"""The numbers of a report: accuracy, unstable ReLUs, how constant explanations are, which features are certain."""

from __future__ import annotations

import decimal
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pyxai_bounds.certify import TopK
from pyxai_bounds.interval import Interval
from pyxai_bounds.program import bound


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 256) -> float:
    """The share of samples whose largest logit is the label's. Shapes: x [N, ...], y [N] integer."""
    predicted = torch.cat([model(piece).argmax(1) for piece in x.split(batch_size)])
    return (predicted == y).double().mean().item()


@torch.no_grad()
def unstable_relu_fraction(
    model: nn.Module, x: Tensor, eps: float, clip: tuple[float, float] | None = None, batch_size: int = 256
) -> float | None:
    """The share of ReLUs, over all samples, whose input may have either sign in the box: l ≤ 0 < u.

    None for a model without ReLUs. Such a unit's derivative is unknown, and only there do explanations get a width:
    0 means that each box lies in one linear piece of the network.
    Shapes: x [N, ...] in ``clip`` if given; eps in the units of x. Raises what ``bound`` and ``Interval.linf`` raise.
    """
    bounded = bound(relu_inputs(model))
    unstable = total = 0
    for piece in x.split(batch_size):
        for box in bounded(Interval.linf(piece, eps, clip)):
            unstable += int(((box.lower <= 0) & (box.upper > 0)).sum())
            total += box.mid.numel()
    return unstable / total if total else None


def relu_inputs(model: nn.Module) -> Callable[[Tensor], list[Tensor]]:
    """The function x → what every ReLU of the model is applied to, modules and functional calls alike."""

    def inputs(x: Tensor) -> list[Tensor]:
        with _RecordReLUs() as record:
            model(x)
        return record.inputs

    return inputs


_RELUS: frozenset[Any] = frozenset(
    (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.leaky_relu, F.leaky_relu_, F.threshold)
)


class _RecordReLUs(TorchFunctionMode):
    """A mode rather than hooks: it sees functional ReLUs too, and leaves nothing on the modules."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in _RELUS:
            self.inputs.append(args[0].clone())  # an in-place ReLU is about to overwrite it
        return func(*args, **(kwargs or {}))


def same_class_cosine(attributions: Tensor, y: Tensor) -> float:
    """Mean cosine between the explanations of two different samples of one class, averaged over the classes.

    1 means that every sample of a class gets the same explanation, as a linear model's do. Classes with fewer than two
    samples do not count; NaN if none has two. Shapes: attributions [N, ...], y [N].
    """
    directions = F.normalize(attributions.detach().double().flatten(1), dim=1)
    means = []
    for label in y.unique():
        group = directions[y == label]
        if len(group) > 1:
            # Σ over ordered pairs of different samples = ‖Σ‖² − Σ‖·‖²
            pairs = group.sum(0).square().sum() - group.square().sum()
            means.append(pairs / (len(group) * (len(group) - 1)))
    return min(torch.stack(means).mean().item(), 1.0) if means else float("nan")  # rounding may step past 1


def certain_members(property: TopK, bounds: Interval) -> Tensor:
    """Which features are among the k largest for *every* explanation in the bounds: bool [B, D].

    A feature is when fewer than k others can reach its lower bound. All k are exactly where the property itself holds.
    """
    lower, upper = property.scores(bounds)
    rivals = (upper.unsqueeze(1) >= lower.unsqueeze(2)).sum(2) - 1  # itself
    return (rivals < property.k) & bounds.isfinite().flatten(1).all(1, keepdim=True)


def rounded_down(radius: float) -> str:
    """A certified radius as text, two significant digits, never more than was certified."""
    two_digits = decimal.Context(prec=2, rounding=decimal.ROUND_FLOOR)
    return f"{two_digits.create_decimal(repr(radius)).normalize():f}"
