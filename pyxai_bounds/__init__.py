"""pyxai_bounds: guaranteed bounds on anything that PyTorch computes, explanations above all."""

from pyxai_bounds import explain
from pyxai_bounds.errors import CaptureError, UnsupportedOperatorError
from pyxai_bounds.interval import Interval
from pyxai_bounds.ops import backend
from pyxai_bounds.program import bound

__all__ = ["CaptureError", "Interval", "UnsupportedOperatorError", "backend", "bound", "explain"]
__version__ = "0.1.0"
