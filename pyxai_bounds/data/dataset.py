"""What a data set is to the rest of the package: two parts, fixed once and for all, as tensors in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Dataset:
    """One classification task.

    Shapes: train_x, test_x [N, ...] floating point; train_y, test_y [N] int64 in 0 … classes − 1.
    clip: the range that valid inputs lie in, or None where inputs are scaled columns and unbounded.
    image_shape: (C, H, W), or None for a table, whose columns feature_names names.
    unit: what a difference of 1 between inputs is, in words, for reports.
    Raises ValueError if the parts do not fit together.
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
    unit: str = "units of the data"

    def __post_init__(self) -> None:
        for part, x, y in (("train", self.train_x, self.train_y), ("test", self.test_x, self.test_y)):
            where = f"The data set {self.name}, {part}"
            if len(x) != len(y) or len(x) == 0:
                raise ValueError(f"{where}: {len(x)} samples and {len(y)} labels; there must be equally many, some.")
            if not x.is_floating_point() or y.dtype != torch.int64 or y.dim() != 1:
                raise ValueError(
                    f"{where}: x must be floating point and y int64 [N], but they are {x.dtype} and {y.dtype} "
                    f"{list(y.shape)}."
                )
            if not bool(x.isfinite().all()):
                raise ValueError(f"{where}: some inputs are NaN or infinite.")
            if not 0 <= int(y.min()) <= int(y.max()) < self.classes:
                raise ValueError(
                    f"{where}: labels go from {int(y.min())} to {int(y.max())}, but there are {self.classes} classes."
                )
            if self.clip is not None and not self.clip[0] <= float(x.min()) <= float(x.max()) <= self.clip[1]:
                raise ValueError(
                    f"{where}: inputs go from {float(x.min()):g} to {float(x.max()):g}, outside of clip={self.clip}."
                )
        if self.train_x.shape[1:] != self.test_x.shape[1:]:
            raise ValueError(
                f"The data set {self.name}: a training sample has shape {list(self.train_x.shape[1:])}, a test sample "
                f"{list(self.test_x.shape[1:])}."
            )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.train_x.shape[1:])


def split(samples: int, train: int) -> tuple[Tensor, Tensor]:
    """Indices of the training and of the test samples: the same seed-0 permutation on every machine."""
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(0))
    return order[:train], order[train:]
