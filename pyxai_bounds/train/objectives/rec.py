"""Robust Explanation Constraints: cross entropy plus the width of the explanation's bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from pyxai_bounds import explain
from pyxai_bounds.interval import Interval
from pyxai_bounds.train.objectives.adversarial import natural
from pyxai_bounds.train.objectives.shared import Clip, bounded, deployed, norms

Width = Literal["mean", "l2", "log", "squared", "relative", "log-relative"]


def rec(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    clip: Clip = None,
    *,
    alpha: float = 0.1,
    width: Width = "log",
    of: explain.Of = "logit",
    gamma: float = 0.0,
) -> Tensor:
    """Robust Explanation Constraints: cross entropy + alpha · width of the bound on the explanation.

    Shapes: x [B, ...] in ``clip`` if given, y [B] integer; eps the input radius in the units of x, gamma the relative
    radius of the parameters; returns a scalar. The bounds are those of the deployed network (running statistics, no
    dropout), in whatever mode it trains. Errors: those of ``bound``.
    Source: Wicker et al., ICLR 2023, arXiv 2212.08507. The authors' code multiplies the mean width by B as well:
    their alpha is ours divided by the batch size.
    """
    return natural(model, x, y) + alpha * explanation_width(model, x, y, eps, clip, width=width, of=of, gamma=gamma)


def explanation_width(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor | None,
    eps: float | Tensor,
    clip: Clip = None,
    *,
    width: Width = "log",
    of: explain.Of = "logit",
    gamma: float = 0.0,
) -> Tensor:
    """How wide the gradient explanation's bound [v_L, v_U] is over the box around x: a scalar to minimise.

    Shapes: x [B, ...] in ``clip`` if given; y [B] integer, or None for a model with one output; eps in the units of x,
    a number or a tensor that broadcasts to x. ``model`` is a module in any mode, wrapped by DDP or ``torch.compile``
    or not, or a function that calls one, such as ``lambda x: model(inputs_embeds=x).logits`` (with gamma > 0 a module).

    ``mean``      the mean of v_U − v_L over samples and features, as published
    ``l2``        the mean over samples of ‖v_U − v_L‖₂
    ``squared``   the mean of (v_U − v_L)² over samples and features
    ``log``       the mean over samples of log(1 + 10 ‖v_U − v_L‖₂): it keeps its slope where the width is small and
                  cannot crush a deep network whose width is still enormous
    ``relative``  the mean over samples of ‖v_U − v_L‖₂ / ‖v‖₂ with v the explanation of x: shrinking the whole network
                  does not lower it
    ``log-relative``  the mean over samples of log(1 + 10 ‖v_U − v_L‖₂ / ‖v‖₂)
    Raises ValueError for another name.
    """
    if width not in get_args(Width):
        raise ValueError(f"width={width!r} is unknown; choose one of {', '.join(get_args(Width))}.")
    explanation = explain.gradient(model, of=of)
    with deployed(model):
        box = bounded(explanation, model, gamma)(Interval.linf(x, eps, clip=clip), y)
        nominal = explanation(x, y) if width.endswith("relative") else None
    if width == "mean":
        return box.width.mean()
    if width == "squared":
        return box.width.square().mean()
    sizes = norms(box.width)
    if nominal is not None:
        sizes = sizes / norms(nominal).clamp(min=torch.finfo(x.dtype).tiny ** 0.5)
    return torch.log1p(10 * sizes).mean() if width.startswith("log") else sizes.mean()


def rec_released(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    clip: Clip = None,
    *,
    alpha: float = 0.5,
    functional: Literal["training", "evaluation"] = "training",
    gamma: float = 0.0,
) -> Tensor:
    """What the released code of REC trains with, its bounds corrected: CE + alpha · B · mean(w_U − w_L).

    w is (p_t − 1)·∂z_t/∂x or (z_t − 1)·∂z_t/∂x (``explain.released_rec``), and gamma the whole radius that is claimed.
    For reproduction only: use :func:`rec`.
    """
    with deployed(model):
        box = bounded(explain.released_rec(model, functional), model, gamma)(Interval.linf(x, eps, clip), y)
    return natural(model, x, y) + alpha * len(x) * box.width.mean()
