"""REC's targeted certificates as properties: no explanation looks like a target, or ranks a given feature high."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyxai_bounds.certify.properties import check_number, flat, magnitude, rounding_loss
from pyxai_bounds.interval import Interval


@dataclass(frozen=True, eq=False)
class Unlike:
    """No explanation comes within a mean square of ``tau`` of any target: min over T of MSE(T, v) > tau.

    targets [T, *explanation]. Margin: the least MSE(T, clip(T, v_L, v_U)) − tau, exact for the bounds.
    Source: Wicker et al., ICLR 2023, arXiv 2212.08507 (targeted certificate; tau = 0.0385 with corner boxes of ones).
    """

    targets: Tensor
    tau: float = 0.0385
    strict = True

    def __post_init__(self) -> None:
        check_number(self, "tau", self.tau)
        if not isinstance(self.targets, Tensor):
            raise TypeError(f"Unlike: targets must be a tensor [T, ...], got {type(self.targets).__name__}.")
        if not self.tau >= 0:
            raise ValueError(f"Unlike: tau must be ≥ 0, got {self.tau}.")
        if self.targets.dim() < 1 or len(self.targets) == 0:
            raise ValueError("Unlike: targets must hold at least one target, [T, ...].")

    def margin(self, nominal: Tensor, bounds: Interval) -> Tensor:
        lower, upper = flat(bounds.lower).double().unsqueeze(1), flat(bounds.upper).double().unsqueeze(1)
        goals = self.targets.to(lower).reshape(1, len(self.targets), -1)
        if goals.shape[2] != lower.shape[2]:
            raise ValueError(
                f"Unlike: a target has {goals.shape[2]} entries, but an explanation {lower.shape[2]}; targets are "
                "[T, *explanation]."
            )
        nearest = (goals - goals.maximum(lower).minimum(upper)).square().mean(2).amin(1)
        return nearest * (1 - rounding_loss(lower.shape[2])) - self.tau


@dataclass(frozen=True)
class Excluded:
    """None of these features reaches the top k, by magnitude or by signed value.

    Margin: the k-th largest lower bound among the other features minus the largest upper bound among these, in units of
    the explanation. With fewer than k others one of these always does: margin −∞.
    Source: Wicker et al., ICLR 2023, arXiv 2212.08507 (targeted certificate of tables, k = 5, sensitive features).
    """

    features: tuple[int, ...]
    k: int = 5
    signed: bool = False
    strict = True

    def __post_init__(self) -> None:
        whole = isinstance(self.features, tuple | list) and all(isinstance(f, int) for f in self.features)
        if not whole or not isinstance(self.k, int):
            raise TypeError(f"Excluded: features is a tuple of flat indices and k a number of them, got {self}.")
        if not self.features or min(self.features) < 0 or self.k < 1:
            raise ValueError(f"Excluded: name flat feature indices ≥ 0 and k ≥ 1, got {self.features} and k={self.k}.")

    def margin(self, nominal: Tensor, bounds: Interval) -> Tensor:
        lower, upper = bounds.lower, bounds.upper
        if not self.signed:
            lower, upper = magnitude(lower, upper)
        lower, upper = flat(lower), flat(upper)
        if max(self.features) >= lower.shape[1]:
            raise ValueError(f"Excluded: feature {max(self.features)} of {lower.shape[1]}, 0 to {lower.shape[1] - 1}.")
        inside = torch.zeros(lower.shape[1], dtype=torch.bool, device=lower.device)
        inside[list(self.features)] = True
        others = lower[:, ~inside]
        if others.shape[1] < self.k:
            return torch.full_like(lower[:, 0], -torch.inf)
        return others.topk(self.k, 1).values[:, -1] - upper[:, inside].amax(1)


def corner_masks(height: int, width: int, size: int = 8) -> Tensor:
    """Targets for ``Unlike``: every non-empty union of the four corner boxes, [15, height, width] of 0 and 1."""
    if not 0 < size <= min(height, width):
        raise ValueError(f"size={size} must lie in 1 … {min(height, width)}.")
    corners = []
    for rows in (slice(size), slice(height - size, None)):
        for columns in (slice(size), slice(width - size, None)):
            corners.append(torch.zeros(height, width))
            corners[-1][rows, columns] = 1
    unions = [sum(corners[i] for i in range(4) if choice >> i & 1) for choice in range(1, 16)]
    return torch.stack([torch.as_tensor(union).clamp(max=1) for union in unions])
