"""The numbers of a report: those of :mod:`pyxai_bounds.certify.metrics`, and how certified radii are written."""

from __future__ import annotations

import decimal

from pyxai_bounds.certify.metrics import (
    accuracy,
    certain_members,
    relu_inputs,
    same_class_cosine,
    unstable_relu_fraction,
)


def rounded_down(radius: float) -> str:
    """A certified radius as text, two significant digits, never more than was certified."""
    two_digits = decimal.Context(prec=2, rounding=decimal.ROUND_FLOOR)
    return f"{two_digits.create_decimal(repr(radius)).normalize():f}"


__all__ = [
    "accuracy",
    "certain_members",
    "relu_inputs",
    "rounded_down",
    "same_class_cosine",
    "unstable_relu_fraction",
]
