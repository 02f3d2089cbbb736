"""interval_mul: the elementwise product of two boxes."""

import pytest
import torch
from torch.library import opcheck

from pyxai_bounds import ops
from pyxai_bounds import rounding as rd
from pyxai_bounds.ops import native, reference

from .cases import (
    DTYPES,
    LAYOUTS,
    LEVELS,
    SHAPES,
    SIZES,
    assert_encloses,
    assert_identical_up_to_zero_sign,
    box,
    leaves,
    level,
    nasty_box,
    needs_native,
    samples,
)


def assert_native_agrees(*args, at=LEVELS[0]):
    with level(at):
        actual = native.interval_mul(*args)
    for a, e in zip(actual, reference.interval_mul(*args), strict=True):
        assert_identical_up_to_zero_sign(a, e)


@needs_native
@pytest.mark.parametrize("level_name", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_native_is_identical_at_every_size_and_level(n, dtype, level_name):
    for rounding in rd.Rounding:
        a, b = nasty_box(n, dtype=dtype), nasty_box(n, dtype=dtype, seed=5)
        assert_native_agrees(*a, *b, rounding, at=level_name)


@needs_native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_native_is_identical_in_every_layout(shape, layout):
    a, b = nasty_box(*shape, dtype=torch.float32), nasty_box(*shape, dtype=torch.float32, seed=5)
    assert_native_agrees(*(layout(t) for t in (*a, *b)))
    assert_native_agrees(*(layout(t) for t in a), *b)
    assert_native_agrees(*a, *(layout(t) for t in b))


@needs_native
@pytest.mark.parametrize("level_name", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_in_any_end_point_product_reaches_both_ends(dtype, level_name):
    """0·∞ among the four products, in each of the four places, whole registers and tails."""
    infinity = float("inf")
    with level(level_name):
        for a, b in [((0, 1), (1, infinity)), ((1, 0), (1, infinity)), ((1, infinity), (0, 1)), ((1, 2), (3, 4))]:
            a_mid, b_mid = (torch.full((21,), float(t[0]), dtype=dtype) for t in (a, b))
            a_rad, b_rad = (torch.full((21,), float(t[1]), dtype=dtype) for t in (a, b))
            assert_native_agrees(a_mid, a_rad, b_mid, b_rad)
        out_mid, out_rad = native.interval_mul(
            *(torch.full((21,), value, dtype=dtype) for value in (0.5, 0.5, 0.0, infinity))
        )
        assert out_mid.isnan().all() and out_rad.isnan().all()


def test_products_of_signs(backend):
    """[1, 2]·[3, 5] = [3, 10], [−1, 2]·[3, 5] = [−5, 10], [−2, −1]·[−1, 1] = [−2, 2]."""
    lower = torch.tensor([[1, -1, -2], [3, 3, -1]], dtype=torch.float64)
    upper = torch.tensor([[2, 2, -1], [5, 5, 1]], dtype=torch.float64)
    mid, rad = (lower + upper) / 2, (upper - lower) / 2
    out_mid, out_rad = ops.interval_mul(mid[0], rad[0], mid[1], rad[1])
    assert (out_mid - out_rad).tolist() == [3, -5, -2] and (out_mid + out_rad).tolist() == [10, 10, 2]


def test_encloses_samples(backend):
    a, b = box(200), box(200, seed=5)
    out_mid, out_rad = ops.interval_mul(*a, *b)
    for x, y in zip(samples(*a), samples(*b, seed=1), strict=True):
        assert_encloses(out_mid, out_rad, x * y)


def test_gradients(backend):
    inputs = leaves(*box(3, 5), *box(3, 5, seed=5))
    assert torch.autograd.gradcheck(ops.interval_mul, inputs)
    assert torch.autograd.gradgradcheck(ops.interval_mul, inputs)


def test_operator_passes_opcheck(backend):
    opcheck(torch.ops.pyxai_bounds.interval_mul.default, leaves(*box(3, 5), *box(3, 5, seed=5)))


@needs_native
def test_native_refuses_shapes_that_differ():
    with pytest.raises(ValueError, match="must agree in shape"):
        native.interval_mul(*box(3), *box(4))
