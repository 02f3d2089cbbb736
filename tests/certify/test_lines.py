"""Lines beside functions: they hold everywhere between the ends, and are as narrow as they can be."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import pytest
import torch
from torch import Tensor

from pyxai_bounds import rounding as rd
from pyxai_bounds.certify import lines
from pyxai_bounds.certify.affine import functions
from pyxai_bounds.rules import RULES
from pyxai_bounds.rules.registry import singleton

aten = torch.ops.aten


def sigmoid(t: mpmath.mpf) -> mpmath.mpf:
    return 1 / (1 + mpmath.exp(-t))


# The operator, the function with many digits, and the least x; powers are given by their exponents.
FUNCTIONS: dict[str, tuple[object, Callable, float]] = {
    "exp": (aten.exp.default, mpmath.exp, -math.inf),
    "log": (aten.log.default, mpmath.log, 0.0),
    "sqrt": (aten.sqrt.default, mpmath.sqrt, 0.0),
    "rsqrt": (aten.rsqrt.default, lambda t: 1 / mpmath.sqrt(t), 0.0),
    "sigmoid": (aten.sigmoid.default, sigmoid, -math.inf),
    "tanh": (aten.tanh.default, mpmath.tanh, -math.inf),
    **{f"power {e}": (e, lambda t, e=e: t ** mpmath.mpf(e), -math.inf) for e in (2.0, 3.0, 4.0, -1.0, -3.0)},
    **{f"power {e}": (e, lambda t, e=e: t ** mpmath.mpf(e), 0.0) for e in (0.5, 1.0, 1.5, -0.5, -2.0, 0.1)},
    "relu": (0.0, lambda t: max(t, mpmath.mpf(0)), -math.inf),
    "clamp": (None, lambda t: min(max(t, mpmath.mpf(-0.5)), mpmath.mpf(1)), -math.inf),
    "abs": (-1.0, abs, -math.inf),
    "leaky relu": (0.3, lambda t: t if t > 0 else t * mpmath.mpf(0.3), -math.inf),
}


def line_of(name: str, lower: Tensor, upper: Tensor) -> lines.Line:
    given = FUNCTIONS[name][0]
    if name == "clamp":
        return lines.clamped(-0.5, 1.0, lower, upper)
    if name in ("relu", "abs", "leaky relu"):
        return lines.rectified(lower, upper, float(given))  # type: ignore[arg-type]
    with rd.use(rd.choose(True, "real")):
        if name.startswith("power"):
            return lines.power(functions.powers(given), given, lower, upper)  # type: ignore[arg-type]
        shape, derivative, touch = functions.SHAPES[given]
        f = lines.Function(lambda t: RULES[given].function(singleton(t)), derivative, touch)  # type: ignore[index]
        return shape(f, lower, upper)


def boxes(least: float) -> tuple[Tensor, Tensor]:
    """Wide ones, narrow ones, single numbers, tiny and subnormal ones, on both sides of 0 and across it."""
    edges = torch.tensor(
        [
            -700.0,
            -30.0,
            -3.0,
            -1.0,
            -1e-3,
            -1e-160,
            -5e-324,
            0.0,
            5e-324,
            1e-300,
            1e-20,
            1e-5,
            0.4,
            1.0,
            2.5,
            40.0,
            600.0,
        ]
    ).double()
    lower, upper = (t.flatten() for t in torch.meshgrid(edges, edges, indexing="ij"))
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(200, dtype=torch.float64, generator=generator) * 3
    radii = 10 ** (torch.rand(200, dtype=torch.float64, generator=generator) * 18 - 17)
    lower, upper = torch.cat([lower, centres - radii]), torch.cat([upper, centres + radii])
    chosen = (lower <= upper) & (lower >= least)
    return lower[chosen], upper[chosen]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_they_hold_in_exact_arithmetic(name: str) -> None:
    lower, upper = boxes(FUNCTIONS[name][2])
    line = line_of(name, lower, upper)
    beside = line.slope.isfinite() & line.least.isfinite() & line.most.isfinite()
    assert beside.double().mean() > 0.4  # elsewhere nothing is claimed
    function = FUNCTIONS[name][1]
    with mpmath.workdps(400):
        for low, high, slope, least, most in zip(
            *(t[beside].tolist() for t in (lower, upper, line.slope, line.least, line.most)), strict=True
        ):
            low, high, slope = mpmath.mpf(low), mpmath.mpf(high), mpmath.mpf(slope)
            for share in (0, 1, 0.5, 0.1, 0.9, 0.37, 1e-9, 1 - 1e-9):
                x = low + (high - low) * mpmath.mpf(share)
                rest = function(x) - slope * x
                assert least <= rest <= most, (low, high, share)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_they_leave_a_quarter_of_what_the_mean_value_leaves(name: str) -> None:
    """What is left falls with the square of the radius, and is at most (f″/4)·r²."""
    lower, upper = torch.tensor([1.0, 0.5]).double(), torch.tensor([1.002, 0.502]).double()
    line = line_of(name, lower, upper)
    width = (line.most - line.least) / 2
    bent = torch.tensor([float(abs(mpmath.diff(FUNCTIONS[name][1], x, 2))) for x in (1.001, 0.501)]).double()
    assert (width <= 1.01 * bent * 1e-6 / 4 + 1e-13).all()


def test_across_zero_sigmoids_are_nearly_straight() -> None:
    """A cubic's best line leaves r³/12 of the third derivative's half; that along its chord half as much again."""
    for name, third in (("tanh", 2.0), ("sigmoid", 0.125)):
        line = line_of(name, torch.tensor([-0.1]).double(), torch.tensor([0.1]).double())
        assert float(line.most - line.least) / 2 <= 1.6 * third / 6 * 1e-3 / 4


def test_nothing_is_claimed_where_a_function_has_no_values() -> None:
    lower, upper = torch.tensor([-1.0, 0.0, -2.0]).double(), torch.tensor([1.0, 1.0, -1.0]).double()
    for name in ("log", "rsqrt", "power -1.0", "power -2.0"):
        line = line_of(name, lower, upper)
        finite = (line.slope + line.least + line.most).isfinite()
        assert not finite[:2].any() and finite[2] == (name == "power -1.0")
    assert not (line_of("sqrt", lower, upper).most + line_of("sqrt", lower, upper).least).isfinite()[[0, 2]].any()
