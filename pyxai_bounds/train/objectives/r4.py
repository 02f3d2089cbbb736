"""Provably ignored features: bounds on the gradient where it should be zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyxai_bounds import explain
from pyxai_bounds.interval import Interval
from pyxai_bounds.train.objectives.adversarial import natural
from pyxai_bounds.train.objectives.shared import Clip, bounded, deployed, per_sample


def r4(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    clip: Clip = None,
    *,
    ignore: str = "",
    alpha: float = 0.1,
    of: explain.Of = "logit",
    gamma: float = 0.0,
) -> Tensor:
    """CE + alpha · mean_b Σ_{i ignored} (|v_L| + |v_U|)_i: a model that provably does not use these features.

    ignore: flat feature indices and half-open ranges, ``"3,8:16"``; for a mask of your own, per sample or for all, see
    :func:`ignored_magnitude`. At eps 0 the term is twice the |v| penalty on sensitive features of "fairwash" baselines.
    Source: R4, "Model guidance via robust feature attribution"; Ross et al., IJCAI 2017, at eps 0.
    """
    mask = feature_mask(ignore, x.shape[1:]).to(x.device)
    term = ignored_magnitude(model, x, y, eps, clip, mask=mask, of=of, gamma=gamma)
    return natural(model, x, y) + alpha * term


def ignored_magnitude(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    clip: Clip = None,
    *,
    mask: Tensor,
    of: explain.Of = "logit",
    gamma: float = 0.0,
) -> Tensor:
    """mean_b Σ_{i: mask} (|v_L| + |v_U|)_i; mask bool, of the shape of one sample or of the batch."""
    if mask.dtype != torch.bool or mask.shape not in (x.shape, x.shape[1:]):
        raise ValueError(
            f"mask must be bool of shape {list(x.shape[1:])} or {list(x.shape)}, got {mask.dtype} {list(mask.shape)}."
        )
    with deployed(model):
        box = bounded(explain.gradient(model, of), model, gamma)(Interval.linf(x, eps, clip), y)
    # |v_L| + |v_U| = 2 max(|mid|, rad)
    return per_sample(2 * torch.maximum(box.mid.abs(), box.rad) * mask).sum(1).mean()


def feature_mask(indices: str, shape: torch.Size) -> Tensor:
    """The features that ``"3,8:16"`` names, flat indices and half-open ranges, as bool of ``shape``.

    Raises ValueError for no features, something else than numbers, and indices outside the features.
    """
    features = shape.numel()
    mask = torch.zeros(features, dtype=torch.bool)
    for part in filter(None, (piece.strip() for piece in indices.split(","))):
        start, _, stop = part.partition(":")
        try:
            first, last = int(start), int(stop) if stop else int(start) + 1
        except ValueError:
            raise ValueError(f"ignore={indices!r}: {part!r} is neither an index nor a range such as 8:16.") from None
        if not 0 <= first < last <= features:
            raise ValueError(f"ignore={indices!r}: {part!r} lies outside the {features} features, 0:{features}.")
        mask[first:last] = True
    if not mask.any():
        raise ValueError("ignore names no feature: give flat indices or ranges, such as ignore='3,8:16'.")
    return mask.reshape(shape)
