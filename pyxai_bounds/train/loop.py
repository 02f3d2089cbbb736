"""The training loop: natural epochs first, then an objective whose radius ramps up; and whole runs by recipe."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from pyxai_bounds import data, models
from pyxai_bounds.train.checkpoint import save
from pyxai_bounds.train.objectives import Width, natural, rec
from pyxai_bounds.train.schedules import linear_ramp

Loss = Callable[[nn.Module, Tensor, Tensor, float], Tensor]  # (model, x, y, eps) → scalar
OnEpoch = Callable[[int, float], None]  # (epochs done, mean loss of the last one)


class TrainingDivergedError(RuntimeError):
    """The loss became NaN or infinite."""


def fit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    objective: Loss = natural,
    *,
    eps: float = 0.0,
    epochs: int = 40,
    natural_epochs: int = 5,
    batch_size: int = 100,
    lr: float = 1e-3,
    seed: int = 0,
    on_epoch: OnEpoch | None = None,
) -> list[float]:
    """Train ``model`` in place with Adam; returns the mean loss of each epoch.

    The first ``natural_epochs`` minimise cross entropy alone, so that the bounds start at a sensible scale. In the
    others ``objective(model, x, y, eps)`` takes over, and eps ramps linearly to its end over their first half.
    Every batch has the same size, so that bounds are captured once: each epoch leaves out a different remainder.
    The model trains in the mode it is given in. The same weights, data and seed give the same result, bit for bit,
    on one machine with one number of threads.
    Shapes: x [N, ...], y [N] integer. Raises ValueError for impossible settings, TrainingDivergedError when the loss
    is no longer finite.
    """
    _check_settings(x, y, eps, epochs, natural_epochs, batch_size, lr)
    optimiser = torch.optim.Adam(model.parameters(), lr=lr)
    batch_size = min(batch_size, len(x))
    ramp = (epochs - natural_epochs) * (len(x) // batch_size) // 2
    step, losses = 0, []
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.manual_seed(seed)  # for layers that draw at random
        order = torch.Generator().manual_seed(seed)
        for epoch in range(epochs):
            total = torch.zeros((), device=x.device)
            batches = list(_batches(len(x), batch_size, order))
            for batch in batches:
                if epoch < natural_epochs:
                    radius, loss = 0.0, natural(model, x[batch], y[batch])
                else:
                    radius = linear_ramp(step, ramp, eps)
                    loss = objective(model, x[batch], y[batch], radius)
                    step += 1
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                total += loss.detach()
            losses.append(float(total) / len(batches))
            _check_loss(losses[-1], epoch + 1, radius, lr)
            if on_epoch is not None:
                on_epoch(epoch + 1, losses[-1])
    return losses


def _batches(samples: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    order = torch.randperm(samples, generator=generator)
    for start in range(0, samples - batch_size + 1, batch_size):
        yield order[start : start + batch_size]


def _check_settings(
    x: Tensor, y: Tensor, eps: float, epochs: int, natural_epochs: int, batch_size: int, lr: float
) -> None:
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(f"x and y must have the same number of samples, at least one; got {len(x)} and {len(y)}.")
    if epochs < 1 or natural_epochs < 0:
        raise ValueError(f"epochs={epochs} must be ≥ 1 and natural_epochs={natural_epochs} ≥ 0.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be ≥ 1.")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr={lr} must be positive and finite.")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps={eps} must be finite and ≥ 0.")


def _check_loss(loss: float, epoch: int, eps: float, lr: float) -> None:
    if not math.isfinite(loss):
        raise TrainingDivergedError(
            f"The loss became {loss} in epoch {epoch}, at eps {eps:.4g} and lr {lr:g}. Lower lr or alpha, train more "
            "natural epochs first, or use width='log', whose gradient stays small while the bounds are still wide."
        )


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a run. ``epochs`` counts the natural ones too."""

    data: str = "digits-parity"
    model: str = "fc-128"
    objective: Literal["natural", "rec"] = "rec"
    eps: float = 0.02
    epochs: int = 40
    natural_epochs: int = 5
    alpha: float = 0.1
    width: Width = "log"
    batch_size: int = 100
    lr: float = 2e-3
    seed: int = 0


def run(recipe: Recipe, out: str | Path, on_epoch: OnEpoch | None = None) -> nn.Module:
    """Train what the recipe says, keep it in the folder ``out``, and return the model in evaluation mode.

    Raises ValueError for names that do not exist and settings that make no sense, TrainingDivergedError if the
    loss does not stay finite (nothing is written then).
    """
    dataset = data.load(recipe.data)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model = models.build(recipe.model, dataset.input_shape, dataset.classes)
    losses = fit(
        model, dataset.train_x, dataset.train_y, objective_of(recipe, dataset.clip),
        eps=recipe.eps, epochs=recipe.epochs, natural_epochs=recipe.natural_epochs, batch_size=recipe.batch_size,
        lr=recipe.lr, seed=recipe.seed, on_epoch=on_epoch,
    )  # fmt: skip
    save(model, out, recipe=vars(recipe), input_shape=dataset.input_shape, classes=dataset.classes, losses=losses)
    return model.eval()


def objective_of(recipe: Recipe, clip: tuple[float, float] | None) -> Loss:
    """The loss that a recipe names. Raises ValueError for an unknown one."""
    if recipe.objective == "natural":
        return natural
    if recipe.objective == "rec":
        return functools.partial(rec, clip=clip, alpha=recipe.alpha, width=recipe.width)
    raise ValueError(f"There is no objective {recipe.objective!r}; choose natural or rec.")
