"""Data sets by name, fixed splits, nothing to download: what the training loop, the reports and the demo run on."""

from pyxai_bounds.data.datasets import DATASETS, Dataset, load

__all__ = ["DATASETS", "Dataset", "load"]
