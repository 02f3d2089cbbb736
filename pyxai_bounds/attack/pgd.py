"""Projected gradient descent on the margin of a property, inside the box."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyxai_bounds.attack.search import Attack, Search, search
from pyxai_bounds.certify.properties import Property, check_property, kept
from pyxai_bounds.interval import Clip, Interval


def pgd(
    fn: Callable[..., Tensor],
    x: Tensor,
    target: Tensor | None = None,
    *,
    eps: float | Tensor,
    property: Property,
    clip: Clip = None,
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
    check_property(property)

    def margin(attribution: Tensor, nominal: Tensor) -> Tensor:
        return property.margin(nominal, Interval.of(attribution, torch.zeros_like(attribution)))

    how = Search(
        steps=steps, step_size=Interval.linf(x, eps, clip).rad, restarts=restarts, start="random", decay=True,
        beta=beta, seed=seed, batch_size=batch_size,
    )  # fmt: skip
    return search(
        fn, x, target, eps=eps, clip=clip, guide=lambda _: margin, judge=lambda _: margin, how=how,
        broken=lambda found: ~kept(property, found),
    )  # fmt: skip
