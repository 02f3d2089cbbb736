"""Training objectives: a loss of (model, x, y, eps), differentiable through the bounds of the explanation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyxai_bounds import explain
from pyxai_bounds.interval import Interval
from pyxai_bounds.program import bound

Width = Literal["mean", "l2", "log"]


def natural(
    model: nn.Module, x: Tensor, y: Tensor, eps: float = 0.0, clip: tuple[float, float] | None = None
) -> Tensor:
    """Mean cross entropy, the same at every eps."""
    return F.cross_entropy(model(x), y)


def rec(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    clip: tuple[float, float] | None = None,
    *,
    alpha: float = 0.1,
    width: Width = "log",
    of: explain.Of = "logit",
) -> Tensor:
    """Robust Explanation Constraints: cross entropy + alpha · width of the bound on the explanation.

    Shapes: x [B, ...] in ``clip`` if given, y [B] integer; eps the input radius in the units of x; returns a scalar.
    Errors: those of ``bound``; a model with batch norm or dropout must be in evaluation mode.
    Source: Wicker et al., ICLR 2023, arXiv 2212.08507. The authors' code multiplies the mean width by B as well:
    their alpha is ours divided by the batch size.
    """
    return natural(model, x, y) + alpha * explanation_width(model, x, y, eps, clip, width=width, of=of)


def explanation_width(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    clip: tuple[float, float] | None = None,
    *,
    width: Width = "log",
    of: explain.Of = "logit",
) -> Tensor:
    """How wide the gradient explanation's bound [v_L, v_U] is over the box around x: a scalar to minimise.

    ``mean``  the mean of v_U − v_L over samples and features, as published
    ``l2``    the mean over samples of ‖v_U − v_L‖₂
    ``log``   the mean over samples of log(1 + 10 ‖v_U − v_L‖₂): it keeps its slope where the width is small and
              cannot crush a deep network whose width is still enormous
    Raises ValueError for another name.
    """
    if width not in get_args(Width):
        raise ValueError(f"width={width!r} is unknown; choose one of {', '.join(get_args(Width))}.")
    box = bound(explain.gradient(model, of=of))(Interval.linf(x, eps, clip=clip), y)
    if width == "mean":
        return box.width.mean()
    norms = box.width.flatten(1).norm(dim=1)
    return norms.mean() if width == "l2" else torch.log1p(10 * norms).mean()


OBJECTIVES: dict[str, Callable[..., Tensor]] = {"natural": natural, "rec": rec}
