"""The data sets that scikit-learn carries inside itself, as tensors, split once and for all by a seed-0 permutation.

The start of the flow: data imports nothing of the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TRAIN_FRACTION = 0.78


@dataclass(frozen=True, eq=False)
class Dataset:
    """One classification task.

    Shapes: train_x, test_x [N, ...] float32; train_y, test_y [N] int64 in 0 … classes − 1.
    clip: the range that valid inputs lie in, or None where inputs are standardised and unbounded.
    image_shape: (C, H, W), or None for a table, whose columns feature_names names.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    clip: tuple[float, float] | None
    image_shape: tuple[int, int, int] | None
    feature_names: tuple[str, ...]
    class_names: tuple[str, ...]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.train_x.shape[1:])


def load(name: str) -> Dataset:
    """The data set called ``name``: one of ``DATASETS``.

    The split is the same on every machine: a permutation drawn with seed 0, the first part for training.
    Raises ValueError for an unknown name, ModuleNotFoundError without scikit-learn.
    """
    if name not in DATASETS:
        raise ValueError(f"There is no data set {name!r}; choose one of {', '.join(DATASETS)}.")
    return DATASETS[name](name)


def _digits(name: str) -> Dataset:
    """1797 handwritten digits, 8×8 pixels in [0, 1], 1400 of them for training."""
    raw = _sklearn().load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(raw.target, dtype=torch.int64)
    class_names = tuple(str(digit) for digit in range(10))
    if name == "digits-parity":
        labels, class_names = labels % 2, ("even", "odd")
    train, test = _split(len(images), 1400)
    return Dataset(
        name=name,
        train_x=images[train], train_y=labels[train], test_x=images[test], test_y=labels[test],
        classes=len(class_names), clip=(0.0, 1.0), image_shape=(1, 8, 8),
        feature_names=tuple(raw.feature_names), class_names=class_names,
    )  # fmt: skip


def _table(name: str) -> Dataset:
    """A table of measurements, each column scaled to mean 0 and deviation 1 on the training rows."""
    raw = {"breast-cancer": _sklearn().load_breast_cancer, "wine": _sklearn().load_wine}[name]()
    rows = torch.tensor(raw.data, dtype=torch.float64)
    labels = torch.tensor(raw.target, dtype=torch.int64)
    train, test = _split(len(rows), round(TRAIN_FRACTION * len(rows)))
    # The test rows must not be seen: a scaler fitted on all rows, or on each part, leaks or misaligns them.
    mean, deviation = rows[train].mean(0), rows[train].std(0, unbiased=False)
    rows = ((rows - mean) / torch.where(deviation > 0, deviation, 1)).float()
    return Dataset(
        name=name,
        train_x=rows[train], train_y=labels[train], test_x=rows[test], test_y=labels[test],
        classes=len(raw.target_names), clip=None, image_shape=None,
        feature_names=tuple(str(column) for column in raw.feature_names),
        class_names=tuple(str(kind) for kind in raw.target_names),
    )  # fmt: skip


def _split(samples: int, train: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(0))
    return order[:train], order[train:]


def _sklearn() -> Any:
    try:
        import sklearn.datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The data sets come from scikit-learn, which is not installed: pip install 'pyxai-bounds[train]'."
        ) from error
    return sklearn.datasets


DATASETS: dict[str, Callable[[str], Dataset]] = {
    "digits": _digits,
    "digits-parity": _digits,
    "breast-cancer": _table,
    "wine": _table,
}
