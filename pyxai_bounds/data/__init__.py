"""Data sets by name, with fixed splits and no downloads: what the training loop, the reports and the demo run on."""

from pyxai_bounds.data.dataset import Dataset
from pyxai_bounds.data.datasets import DATASETS, EMBEDDED, load
from pyxai_bounds.data.files import ROOT_VARIABLE, data_root

__all__ = ["DATASETS", "EMBEDDED", "ROOT_VARIABLE", "Dataset", "data_root", "load"]
