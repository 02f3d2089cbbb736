"""The attack on the prediction itself: accuracy under it stands beside certified accuracy."""

from __future__ import annotations

import torch
from torch import Tensor

from pyxai_bounds.attack.search import Attack, Model, Search, lead, search


def misclassify(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    clip: tuple[float, float] | None = None,
    steps: int = 40,
    step_size: float = 0.01,
    restarts: int = 1,
    seed: int = 0,
    batch_size: int = 256,
) -> Attack:
    """Sign steps that ascend the cross entropy from a random start: RAR's AA is the share that it does not break.

    Attribution: the logits at the worst input; margin: the label's lead over the largest other logit; broken: ≤ 0.
    Source: Madry et al., ICLR 2018.
    """
    y = y.long()  # of whatever integers: they are indices
    how = Search(steps=steps, step_size=step_size, restarts=restarts, start="random", seed=seed, batch_size=batch_size)

    def guide(piece: slice):  # type: ignore[no-untyped-def]
        return lambda logits, nominal: -torch.nn.functional.cross_entropy(logits, y[piece], reduction="none")

    return search(
        model, x, None, eps=eps, clip=clip, guide=guide, how=how, broken=lambda margin: margin <= 0,
        judge=lambda piece: lambda logits, nominal: lead(logits, y[piece]),
    )  # fmt: skip
