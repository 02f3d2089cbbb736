"""Projected gradient descent on the margin of a property, inside the box."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyxai_bounds.attack.surrogate import smooth
from pyxai_bounds.certify.certificate import evaluate, usual
from pyxai_bounds.certify.properties import Property, kept
from pyxai_bounds.interval import Interval
from pyxai_bounds.rounding import add_down, add_up


@dataclass(frozen=True)
class Attack:
    """The worst input found per sample: x [B, ...] in the box, its attribution, the margin [B], broken bool [B].

    A margin of NaN breaks nothing.
    """

    x: Tensor
    attribution: Tensor
    margin: Tensor
    broken: Tensor


@torch.inference_mode(False)
def pgd(
    fn: Callable[..., Tensor],
    x: Tensor,
    target: Tensor | None = None,
    *,
    eps: float | Tensor,
    property: Property,
    clip: tuple[float, float] | None = None,
    steps: int = 20,
    restarts: int = 1,
    seed: int = 0,
    beta: float = 100.0,
    batch_size: int = 256,
) -> Attack:
    """Search each sample's box for an input whose explanation breaks ``property``.

    Sign steps descend the margin of the smooth twin of ``fn`` (see :mod:`surrogate`), from a random start; every
    point on the way is judged by ``fn`` itself and the worst is kept. The arguments are those of :func:`certify`; a
    property that is certified is never broken here, which makes the two a test of each other.
    Source: Ghorbani et al., "Interpretation of neural networks is fragile", AAAI 2019, with random restarts.
    """
    if steps < 1 or restarts < 1:
        raise ValueError(f"pgd needs steps ≥ 1 and restarts ≥ 1, got steps={steps}, restarts={restarts}.")
    x = usual(x)
    box = Interval.linf(x, eps, clip)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    pieces = []
    for start in range(0, max(len(x), 1), batch_size):
        piece = slice(start, start + batch_size)
        targets = () if target is None else (target[piece],)
        pieces.append(_search(fn, x[piece], targets, box[piece], clip, property, steps, restarts, generator, beta))
    worst, attribution, margin = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return Attack(worst, attribution, margin, ~kept(property, margin) & ~margin.isnan())


def _search(
    fn: Callable[..., Tensor],
    x: Tensor,
    targets: tuple[Tensor, ...],
    box: Interval,
    clip: tuple[float, float] | None,
    property: Property,
    steps: int,
    restarts: int,
    generator: torch.Generator,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    twin = smooth(fn, x, *targets, beta=beta)
    # Rounded towards the middle: what is found must lie in the very box that the certificate is about.
    lower, upper = add_up(box.mid, -box.rad), add_down(box.mid, box.rad)
    if clip is not None:
        lower, upper = lower.clamp(*clip), upper.clamp(*clip)

    def margin_of(attribution: Tensor, of: Tensor) -> Tensor:
        return property.margin(of, Interval.of(attribution, torch.zeros_like(attribution)))

    nominal = evaluate(fn, x, *targets)
    worst, attribution, margin = x, nominal, margin_of(nominal, nominal)
    for _ in range(restarts):
        start = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x)
        at = torch.lerp(lower, upper, start).clamp(lower, upper)
        for step in range(steps):
            at = at.detach().requires_grad_()
            with torch.enable_grad():
                loss = margin_of(twin(at, *targets), nominal).sum()
            slope = torch.autograd.grad(loss, at, allow_unused=True)[0] if loss.requires_grad else None
            if slope is None:
                break  # a constant explanation: nowhere to go
            length = box.rad * (2 * (1 - step / steps))
            at = (at.detach() - length * slope.sign()).clamp(lower, upper)
            there = evaluate(fn, at, *targets)
            found = margin_of(there, nominal)
            better = found < margin
            margin = torch.where(better, found, margin)
            shape = [-1] + [1] * (x.dim() - 1)
            worst = torch.where(better.reshape(shape), at, worst)
            attribution = torch.where(better.reshape([-1] + [1] * (there.dim() - 1)), there, attribution)
    return worst, attribution, margin
