"""pyxai_bounds: guaranteed bounds on anything that PyTorch computes, explanations above all."""

from pyxai_bounds import attack, data, explain, train
from pyxai_bounds.certify import (
    L1,
    L2,
    Certificate,
    Cosine,
    Excluded,
    Linf,
    MeanSquare,
    Sign,
    TopK,
    Unlike,
    certified_radius,
    certify,
)
from pyxai_bounds.errors import CaptureError, UnsupportedOperatorError
from pyxai_bounds.interval import Interval
from pyxai_bounds.ops import backend
from pyxai_bounds.parameters import parameter_box
from pyxai_bounds.program import bound
from pyxai_bounds.train import load

__all__ = [
    "L1",
    "L2",
    "CaptureError",
    "Certificate",
    "Cosine",
    "Excluded",
    "Interval",
    "Linf",
    "MeanSquare",
    "Sign",
    "TopK",
    "Unlike",
    "UnsupportedOperatorError",
    "attack",
    "backend",
    "bound",
    "certified_radius",
    "certify",
    "data",
    "explain",
    "load",
    "parameter_box",
    "train",
]
__version__ = "0.1.0"
