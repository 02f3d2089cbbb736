"""Interval: conversions round outward, points stay exact, and bad input is refused with its place."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyxai_bounds as xb
from pyxai_bounds import rounding

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
floats = st.floats(-(2.0**99), 2.0**99, width=32)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(floats, floats)
def test_directed_addition_is_exactly_rounded(a: float, b: float) -> None:
    x, y = torch.tensor(a), torch.tensor(b)
    exact = Fraction(a) + Fraction(b)
    down, up = rounding.add_down(x, y).item(), rounding.add_up(x, y).item()
    assert Fraction(down) <= exact <= Fraction(up)
    neighbours = down == up or torch.nextafter(torch.tensor(down), torch.tensor(up)).item() == up
    assert neighbours, "at most one step apart"
    assert (down == up) == (Fraction(x.add(y).item()) == exact)


def test_directed_addition_is_differentiable_and_handles_infinity() -> None:
    x = torch.tensor([0.1, 1e30], requires_grad=True)
    rounding.add_up(x, torch.tensor([0.2, 1.0])).sum().backward()
    assert torch.equal(x.grad, torch.ones(2))
    inf = torch.tensor(float("inf"))
    assert rounding.add_up(inf, torch.tensor(1.0)) == inf
    assert rounding.add_down(torch.tensor(1.0), -inf) == -inf


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_stored_set_contains_its_end_points(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    ends = torch.randn(2, 10_000, generator=generator) * torch.tensor(10.0) ** torch.randint(
        -4, 4, (10_000,), generator=generator
    )
    ends = ends.to(dtype)
    lower, upper = ends.min(0).values, ends.max(0).values
    box = xb.Interval(lower, upper)
    assert (box.lower <= lower).all() and (box.upper >= upper).all()
    exact_lower = box.mid.double() - box.rad.double()
    if dtype is not torch.float64:  # float64 sums of these are exact
        assert (exact_lower <= lower.double()).all()
        assert (box.mid.double() + box.rad.double() >= upper.double()).all()
    point = xb.Interval(lower, lower)
    assert point.rad.max() == 0 and torch.equal(point.lower, lower) and torch.equal(point.upper, lower)


def test_rounding_to_nearest_would_fail_that_test() -> None:
    """The test above is not blind: the naive midpoint and radius miss an end point somewhere."""
    ends = torch.randn(2, 10_000, generator=torch.Generator().manual_seed(0))
    lower, upper = ends.min(0).values, ends.max(0).values
    mid, rad = (lower + upper) / 2, (upper - lower) / 2
    missed = (mid.double() + rad.double() < upper.double()) | (mid.double() - rad.double() > lower.double())
    assert missed.double().mean() > 0.05


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linf_never_shrinks_the_box(dtype: torch.dtype) -> None:
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    for eps in (0.3, 0.1, 1e-3, 1 / 255):
        box = xb.Interval.linf(x, eps)
        assert torch.equal(box.mid, x) and (box.rad.double() >= eps).all()
        clipped = xb.Interval.linf(x, eps, clip=(0.0, 1.0))
        want_lower, want_upper = (x.double() - eps).clamp(min=0), (x.double() + eps).clamp(max=1)
        assert (clipped.lower.double() <= want_lower).all() and (clipped.upper.double() >= want_upper).all()
        slack = 4 * torch.finfo(dtype).eps
        assert (clipped.lower.double() >= -slack).all() and (clipped.upper.double() <= 1 + slack).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_limits_that_the_dtype_cannot_hold_are_rounded_outward(dtype: torch.dtype) -> None:
    """What lies inside clip stays in the box, the limits themselves included."""
    ends = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = ends.min(0).values - 0.1, ends.max(0).values + 0.1
    tenth = torch.full((1000,), 0.1, dtype=torch.float64)
    for limits, x in (((low, high), ends[:1]), ((-0.1, 0.1), 0.1 * torch.rand(1000, dtype=torch.float64))):
        least, most = limits if isinstance(limits[0], torch.Tensor) else (-tenth, tenth)
        box = xb.Interval.linf(x.to(dtype), 10.0, clip=limits)
        assert (box.lower.double() <= least).all() and (box.upper.double() >= most).all()
        if dtype != torch.float64:  # in which these sums would round
            assert (box.mid.double() - box.rad.double() <= least).all()
            assert (box.mid.double() + box.rad.double() >= most).all()


def test_tiny_radii_stay_exact() -> None:
    box = xb.Interval.linf(torch.ones(3), 1e-12)
    assert torch.equal(box.rad, torch.full((3,), rounding.scalar_up(1e-12, torch.float32)))
    assert (box.lower < 1).all() and (box.upper > 1).all()


def test_one_radius_per_sample() -> None:
    x = torch.zeros(3, 2)
    box = xb.Interval.linf(x, torch.tensor([[0.1], [0.2], [0.0]]))
    assert torch.allclose(box.rad, torch.tensor([[0.1, 0.1], [0.2, 0.2], [0.0, 0.0]]))
    from_double = xb.Interval.linf(x, torch.tensor(0.3, dtype=torch.float64))
    assert (from_double.rad.double() >= 0.3).all()


def test_contains_width_and_the_rest() -> None:
    box = xb.Interval(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]))
    assert box.contains(torch.tensor([0.5, 1.0])).all()
    assert not box.contains(torch.tensor([float("nan"), 1.1])).any()
    assert torch.equal(box.width, torch.tensor([1.0, 0.0]))
    assert box.shape == (2,) and box.dtype is torch.float32 and len(box) == 2 and box.device.type == "cpu"
    assert "shape=(2,)" in repr(box)
    assert box[1:].shape == (1,)


def test_converting_to_a_coarser_dtype_widens() -> None:
    lower = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    box = xb.Interval(lower, lower + 1e-3)
    tiny = xb.Interval.linf(torch.full((3,), 1e-20, dtype=torch.bfloat16), 1e-22).to(torch.float16)
    assert (tiny.mid.double() + tiny.rad.double() >= 1.01e-20).all()  # float16 is finer but ends sooner
    for dtype in (torch.float32, torch.bfloat16):
        coarse = box.to(dtype)
        assert (coarse.mid.double() - coarse.rad.double() <= lower).all()
        assert (coarse.mid.double() + coarse.rad.double() >= lower + 1e-3).all()
    with pytest.raises(TypeError, match="not a floating dtype"):
        box.to(torch.int64)


def test_the_box_is_differentiable() -> None:
    x = torch.rand(4, dtype=torch.float64, requires_grad=True)
    eps = torch.full((4,), 0.3, dtype=torch.float64, requires_grad=True)
    box = xb.Interval.linf(x, eps, clip=(0.0, 1.0))
    (2 * box.lower.sum() + 3 * box.upper.sum()).backward()
    low, high = x.detach() - 0.3 > 0, x.detach() + 0.3 < 1
    assert torch.allclose(x.grad, 2 * low.double() + 3 * high.double())
    assert torch.allclose(eps.grad, -2 * low.double() + 3 * high.double())


def test_bad_input_says_what_where_and_how_to_mend_it() -> None:
    zero, one, nan = torch.zeros(2, 3), torch.ones(2, 3), torch.ones(2, 3)
    nan[1, 2] = float("nan")
    wrong = torch.zeros(2, 3)
    wrong[0, 1] = 5.0
    half = torch.tensor([0.1, 0.1])
    for error, message, call in (
        (ValueError, r"lower > upper at 1 of 6 elements, first at index \(0, 1\)", lambda: xb.Interval(wrong, one)),
        (ValueError, r"upper is NaN or infinite at 1 of 6 .* index \(1, 2\)", lambda: xb.Interval(zero, nan)),
        (ValueError, "lower is NaN or infinite", lambda: xb.Interval(zero - float("inf"), one)),
        (ValueError, "different shapes", lambda: xb.Interval(zero, torch.ones(3))),
        (ValueError, "different dtypes", lambda: xb.Interval(zero, one.double())),
        (ValueError, "different devices", lambda: xb.Interval(zero, one.to("meta"))),
        (TypeError, "must be a tensor, got list", lambda: xb.Interval([0.0], one)),
        (TypeError, r"floating dtype, got torch.int64", lambda: xb.Interval.point(torch.arange(3))),
        (ValueError, r"eps must be finite and ≥ 0, got -0.1", lambda: xb.Interval.linf(zero, -0.1)),
        (ValueError, "eps must be finite", lambda: xb.Interval.linf(zero, float("nan"))),
        (ValueError, "eps must be finite", lambda: xb.Interval.linf(zero, float("inf"))),
        (ValueError, "1 of 2 entries", lambda: xb.Interval.linf(zero, torch.tensor([[0.1], [-0.1]]))),
        (ValueError, r"does not broadcast.*\[B, 1, \.\.\.\]", lambda: xb.Interval.linf(zero, half)),
        (ValueError, "x is NaN or infinite", lambda: xb.Interval.linf(nan, 0.1)),
        (
            ValueError,
            r"outside clip=.* first at index \(0, 1\): 5.0",
            lambda: xb.Interval.linf(wrong, 0.1, clip=(0, 1)),
        ),
        (ValueError, "is empty", lambda: xb.Interval.linf(zero, 0.1, clip=(1, 0))),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("clip", [(0.0, 1.0, 2.0), (0.0, None), (torch.zeros(3), None), 1.0])
def test_a_clip_that_is_no_pair_of_numbers(clip) -> None:
    with pytest.raises(TypeError, match=r"clip must be two numbers \(low, high\)"):
        xb.Interval.linf(torch.rand(2, 3), 0.1, clip)


def test_a_set_with_a_history_can_be_printed() -> None:
    assert "widest 0.2" in repr(
        xb.Interval.linf(torch.rand(2, 3, requires_grad=True), torch.tensor(0.1, requires_grad=True))
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_point_that_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"NaN or infinite at 1 of 2 elements, first at index \(1,\)"):
        xb.Interval.point(torch.tensor([0.0, value]))


def test_a_tensor_without_values_is_refused() -> None:
    with pytest.raises(ValueError, match="x is on the meta device"):
        xb.Interval.linf(torch.empty(2, 3, device="meta"), 0.1)


def test_radii_that_could_be_meant_in_two_ways_are_refused() -> None:
    eps = torch.tensor([0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match=r"eps.reshape\(\[-1, 1\]\) for one per sample, eps\[None\]"):
        xb.Interval.linf(torch.zeros(3, 3), eps)
    with pytest.raises(ValueError, match=r"eps.reshape\(\[-1, 1, 1, 1\]\)"):
        xb.Interval.linf(torch.zeros(3, 1, 2, 3), eps)
    assert torch.equal(xb.Interval.linf(torch.zeros(3, 3), eps.reshape(-1, 1)).rad[:, 0], eps)
    assert torch.equal(xb.Interval.linf(torch.zeros(3, 3), eps[None]).rad[0], eps)
    assert torch.equal(xb.Interval.linf(torch.zeros(2, 3), eps).rad[1], eps)  # per entry is all that it can be
    assert torch.equal(xb.Interval.linf(torch.zeros(3), eps).rad, eps)


def test_what_contains_cannot_compare() -> None:
    box = xb.Interval.linf(torch.zeros(4, 6), 0.1)
    with pytest.raises(ValueError, match=r"\[4, 5\] cannot be compared with a set of shape \[4, 6\]"):
        box.contains(torch.zeros(4, 5))
    with pytest.raises(TypeError, match="takes a tensor, got list"):
        box.contains([0.0])  # type: ignore[arg-type]
    assert box.contains(torch.zeros(6)).shape == (4, 6)


def test_functions_of_tensors_say_how_to_bound_them() -> None:
    box = xb.Interval.linf(torch.zeros(4, 6), 0.1)
    for call in (lambda: torch.relu(box), lambda: torch.nn.Linear(6, 2)(box)):
        with pytest.raises(TypeError, match=r"given an Interval.*xb.bound\(fn\)\(box\)"):
            call()  # type: ignore[arg-type]


def test_a_set_becomes_no_array() -> None:
    with pytest.raises(TypeError, match=r"no array: take its \.lower"):
        np.asarray(xb.Interval.linf(torch.zeros(4, 6), 0.1))
