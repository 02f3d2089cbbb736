"""Schedules: where they begin and end, and that nothing jumps."""

import itertools
import math

import pytest

from pyxai_bounds.train.schedules import learning_rate, linear_ramp, ramp, smooth_ramp


@pytest.mark.parametrize("kind", ["constant", "linear", "smooth"])
@pytest.mark.parametrize("steps", [0, 1, 3, 200])
def test_a_ramp_grows_to_its_end_and_stays(kind, steps):
    values = [ramp(kind, step, steps, 0.3) for step in range(steps + 3)]
    assert all(0 < a <= b for a, b in itertools.pairwise(values))
    assert values[-3:] == [0.3] * 3 and (not steps or values[steps - 1] == pytest.approx(0.3))


def test_the_linear_ramp_is_a_line():
    assert [linear_ramp(step, 4, 2.0) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_the_smooth_ramp_starts_as_a_power_and_goes_straight():
    values = [smooth_ramp(step, 1000, 1.0) for step in range(1000)]
    slopes = [b - a for a, b in itertools.pairwise(values)]
    assert values[199] / values[99] == pytest.approx(2**4)  # t⁴ up to a quarter
    assert max(slopes[251:]) == pytest.approx(min(slopes[251:]), rel=1e-6)  # a line behind it
    assert all(b >= a * (1 - 1e-9) for a, b in itertools.pairwise(slopes))  # nowhere a kink back
    assert slopes[250] == pytest.approx(slopes[248], rel=0.02)  # its slope does not jump at the bend


def test_learning_rates():
    assert [learning_rate("constant", s, 10, 0.1) for s in (0, 9)] == [0.1, 0.1]
    assert learning_rate("cosine", 5, 10, 0.1) == pytest.approx(0.05)
    assert learning_rate("cosine", 0, 10, 0.1) == 0.1 and 0 < learning_rate("cosine", 9, 10, 0.1) < 0.01
    steps = [learning_rate("steps", s, 10, 1.0, ((6, 0.1), (3, 0.5))) for s in range(8)]
    assert steps == [1, 1, 1, 0.5, 0.5, 0.5, 0.1, 0.1]
    assert [learning_rate("constant", s, 10, 1.0, warmup=4) for s in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    assert math.isfinite(learning_rate("cosine", 0, 1, 1.0))


def test_unknown_kinds():
    with pytest.raises(ValueError, match="no ramp 'cubic'"):
        ramp("cubic", 0, 1, 1.0)
    with pytest.raises(ValueError, match="no learning rate schedule 'cubic'"):
        learning_rate("cubic", 0, 1, 1.0)
