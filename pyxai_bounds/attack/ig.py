"""RAR's inner search as an attack: how large can the integrated gradients of the loss become inside the box?"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyxai_bounds import explain
from pyxai_bounds.attack.search import Attack, Model, Search, search
from pyxai_bounds.certify.properties import flat


def ig_norm(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    clip: tuple[float, float] | None = None,
    m: int = 50,
    steps: int = 40,
    step_size: float = 0.01,
    restarts: int = 1,
    batch_size: int = 32,
    **how: Any,
) -> Attack:
    """Maximise ‖IG(x, x′)‖₁ of the cross entropy, m steps of the right Riemann sum, by sign steps from a random start.

    Attribution: IG(x, x′); margin: −‖IG(x, x′)‖₁, never below −``certify.metrics.ig_norm_bound``; broken: nowhere.
    Source: Chen et al., NeurIPS 2019, arXiv 1905.09957 (the inner maximum of IG-NORM).
    """

    def small(attribution: Tensor, nominal: Tensor) -> Tensor:
        return -flat(attribution).abs().sum(1)

    return search(
        explain.integrated_gradients(model, "loss", steps=m), x, y, extras=(x,), eps=eps, clip=clip,
        guide=lambda _: small, judge=lambda _: small, broken=lambda margin: margin > 0,
        how=Search(
            steps=steps, step_size=step_size, restarts=restarts, start="random", batch_size=batch_size, **how
        ),
    )  # fmt: skip
