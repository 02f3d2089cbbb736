"""REC's attacks: an explanation that looks like a chosen one, or unlike the true one, by Adam on the input.

The weights are attacked in :mod:`pyxai_bounds.attack.weights`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyxai_bounds.attack.ranking import unlike
from pyxai_bounds.attack.search import Attack, Judge, Keep, Model, Search, search
from pyxai_bounds.certify.properties import flat


def targeted(
    fn: Callable[..., Tensor],
    x: Tensor,
    target: Tensor | None = None,
    *,
    toward: Tensor,
    eps: float | Tensor,
    tau: float = 0.0385,
    clip: tuple[float, float] | None = None,
    model: Model | None = None,
    label_reg: float = 1.0,
    steps: int = 100,
    step_size: float = 0.01,
    restarts: int = 1,
    beta: float = 5.0,
    keep: Keep = "ignore",
    **how: Any,
) -> Attack:
    """Make the explanation look like ``toward``: minimise ½·MSE(v, T) + label_reg · MSE(softmax f(x′), softmax f(x)).

    toward: T in the shape of one explanation or of the batch of them. Adam with learning rate step_size from x, inside
    the box and clip; softplus(beta) stands for ReLU in what is descended. The second term needs ``model``.
    With steps=1, move="sign" and step_size=eps it is the FGSM variant.
    Margin: MSE(v, T) − tau, of the program itself; broken where that is ≤ 0.
    Source: Wicker et al., ICLR 2023, arXiv 2212.08507 (targeted attack, after Dombrowski et al., NeurIPS 2019).
    """
    goal = toward_each(toward, x, fn, target)

    def guide(piece: slice) -> Judge:
        return lambda attribution, nominal: 0.5 * flat(attribution - goal(piece)).square().mean(1)

    def judge(piece: slice) -> Judge:
        return lambda attribution, nominal: flat(attribution - goal(piece)).square().mean(1) - tau

    walk = _walk(model, label_reg, steps=steps, step_size=step_size, restarts=restarts, keep=keep, beta=beta, **how)
    return search(
        fn, x, target, eps=eps, clip=clip, model=model, guide=guide, judge=judge, broken=lambda margin: margin <= 0,
        how=walk,
    )  # fmt: skip


def untargeted(
    fn: Callable[..., Tensor],
    x: Tensor,
    target: Tensor | None = None,
    *,
    eps: float | Tensor,
    tau: float = 0.03,
    clip: tuple[float, float] | None = None,
    model: Model | None = None,
    label_reg: float = 1.0,
    steps: int = 100,
    step_size: float = 0.01,
    restarts: int = 1,
    beta: float = 5.0,
    keep: Keep = "ignore",
    **how: Any,
) -> Attack:
    """Make the explanation unlike that of x: *maximise* MSE(v, v(x)), with the options of :func:`targeted`.

    From a random start. Margin: tau − MSE(v, v(x)), that of ``MeanSquare(tau)``; broken where it is negative.
    Source: Wicker et al., ICLR 2023, arXiv 2212.08507 (untargeted attack).
    """

    def judge(attribution: Tensor, nominal: Tensor) -> Tensor:
        return tau + unlike(attribution, nominal)

    how = {"start": "random", **how}
    walk = _walk(model, label_reg, steps=steps, step_size=step_size, restarts=restarts, keep=keep, beta=beta, **how)
    return search(
        fn, x, target, eps=eps, clip=clip, model=model, guide=lambda _: unlike, judge=lambda _: judge,
        broken=lambda margin: margin < 0, how=walk,
    )  # fmt: skip


def _walk(model: Model | None, label_reg: float, **how: Any) -> Search:
    """Adam unless told otherwise; without a model there are no labels to hold."""
    return Search(regularisation=label_reg if model is not None else 0.0, **{"move": "adam", **how})


def toward_each(
    toward: Tensor, x: Tensor, fn: Callable[..., Tensor], target: Tensor | None
) -> Callable[[slice], Tensor]:
    """The part of ``toward`` that belongs to a piece of the batch; raises ValueError if it fits no explanation."""
    with torch.enable_grad():
        shape = fn(*[t[:1] for t in (x, target) if t is not None]).shape[1:]
    toward = toward.to(x)
    if toward.shape == shape:
        return lambda piece: toward
    if toward.shape == (len(x), *shape):
        return lambda piece: toward[piece]
    raise ValueError(
        f"toward must have the shape of one explanation, {list(shape)}, or of the batch, {[len(x), *shape]}; got "
        f"{list(toward.shape)}."
    )
