"""Data sets by name: four that scikit-learn carries inside itself, others from files, and one's own.

The start of the flow: data imports nothing of the engine.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pyxai_bounds.data.dataset import Dataset, split
from pyxai_bounds.data.files import data_root
from pyxai_bounds.data.images import MEDMNIST, load_cifar10, load_flower, load_gtsrb, load_idx, load_medmnist
from pyxai_bounds.data.tables import TABLES, load_table

TRAIN_FRACTION = 0.78


def load(name: str, root: str | Path | None = None) -> Dataset:
    """The data set called ``name``: one of ``DATASETS``, or ``package.module:factory`` for your own.

    Those in ``EMBEDDED`` need no file. The others are read from ``root``, by default the folder that the environment
    variable PYXAI_BOUNDS_DATA names, or ~/.cache/pyxai_bounds; nothing is downloaded. The split is the same on every
    machine: the authors' own where they publish one, else a permutation drawn with seed 0. A factory is called
    without arguments and returns a ``Dataset``.
    Raises ValueError for an unknown name and for damaged files, FileNotFoundError where files are missing (it says
    where they were looked for and how to get them), ModuleNotFoundError without scikit-learn or Pillow where needed.
    """
    if ":" in name:
        return _own(name)
    if name not in DATASETS:
        raise ValueError(
            f"There is no data set {name!r}; choose one of {', '.join(DATASETS)}, or name your own as "
            "package.module:factory."
        )
    return DATASETS[name](name, data_root(root))


def _own(name: str) -> Dataset:
    module, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"The data factory {name!r} cannot be imported: {error}.") from error
    try:
        dataset = factory() if callable(factory) else factory
    except TypeError as error:
        raise TypeError(f"{name}, called without arguments: {error}") from error
    if not isinstance(dataset, Dataset):
        raise ValueError(f"{name} gave {type(dataset).__name__}; a data factory returns a pyxai_bounds.data.Dataset.")
    return dataset


def _digits(name: str, root: Path) -> Dataset:
    """1797 handwritten digits, 8×8 pixels in [0, 1], 1400 of them for training."""
    raw = _sklearn().load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(raw.target, dtype=torch.int64)
    class_names = tuple(str(digit) for digit in range(10))
    if name == "digits-parity":
        labels, class_names = labels % 2, ("even", "odd")
    train, test = split(len(images), 1400)
    return Dataset(
        name=name,
        train_x=images[train], train_y=labels[train], test_x=images[test], test_y=labels[test],
        classes=len(class_names), clip=(0.0, 1.0), image_shape=(1, 8, 8),
        feature_names=tuple(raw.feature_names), class_names=class_names,
    )  # fmt: skip


def _measurements(name: str, root: Path) -> Dataset:
    """A table of measurements, each column scaled to mean 0 and deviation 1 on the training rows."""
    raw = {"breast-cancer": _sklearn().load_breast_cancer, "wine": _sklearn().load_wine}[name]()
    rows = torch.tensor(raw.data, dtype=torch.float64)
    labels = torch.tensor(raw.target, dtype=torch.int64)
    train, test = split(len(rows), round(TRAIN_FRACTION * len(rows)))
    # The test rows must not be seen: a scaler fitted on all rows, or on each part, leaks or misaligns them.
    mean, deviation = rows[train].mean(0), rows[train].std(0, unbiased=False)
    rows = ((rows - mean) / torch.where(deviation > 0, deviation, 1)).float()
    return Dataset(
        name=name,
        train_x=rows[train], train_y=labels[train], test_x=rows[test], test_y=labels[test],
        classes=len(raw.target_names), clip=None, image_shape=None,
        feature_names=tuple(str(column) for column in raw.feature_names),
        class_names=tuple(str(kind) for kind in raw.target_names),
        unit="standard deviations of each feature",
    )  # fmt: skip


def _sklearn() -> Any:
    try:
        import sklearn.datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "This data set comes from scikit-learn, which is not installed: pip install 'pyxai-bounds[train]'."
        ) from error
    return sklearn.datasets


EMBEDDED: dict[str, Callable[[str, Path], Dataset]] = {
    "digits": _digits,
    "digits-parity": _digits,
    "breast-cancer": _measurements,
    "wine": _measurements,
}

DATASETS: dict[str, Callable[[str, Path], Dataset]] = {
    **EMBEDDED,
    "mnist": load_idx,
    "fashion-mnist": load_idx,
    "cifar10": load_cifar10,
    "gtsrb": load_gtsrb,
    "flower": load_flower,
    **dict.fromkeys(MEDMNIST, load_medmnist),
    **dict.fromkeys(TABLES, load_table),
}
