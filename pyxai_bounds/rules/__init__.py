"""Interval rules: one function per ATen operator, an operator and its backward side by side.

A rule takes the operator's arguments, Intervals where they are sets, and returns Intervals. It runs once,
while the program is traced: what it computes with tensors becomes part of the compiled program, what it
decides in Python is decided for good.
"""

from pyxai_bounds.rules import (  # noqa: F401
    activation,
    complex,
    conv,
    elementwise,
    functions,
    linear,
    logic,
    norm,
    pool,
    ranks,
    reduce,
    remainder,
    shape,
    softmax,
    solve,
    standardise,
)
from pyxai_bounds.rules.registry import RULES, Rule, UnsupportedArgumentsError, rule

__all__ = ["RULES", "Rule", "UnsupportedArgumentsError", "rule"]
