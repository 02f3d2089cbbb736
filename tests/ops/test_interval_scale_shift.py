"""interval_scale_shift: one scale and shift per channel."""

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
    assert_encloses,
    assert_identical,
    box,
    channels_last,
    leaves,
    level,
    nasty_box,
    needs_native,
    samples,
    strided,
)

# Also two and three dimensions, and enough elements for two threads with the split inside a channel's run.
ALL_SHAPES = [*SHAPES, (3, 5), (1, 256), (0, 5), (4, 33, 17), (2, 3, 129, 131), (1, 1, 300, 301), (700, 101)]


def problem(*shape, dtype=torch.float64, layout=torch.clone, make=box):
    mid, rad = (layout(t) for t in make(*shape, dtype=dtype))
    scale, shift = make(shape[1], dtype=dtype, seed=2)
    return mid, rad, scale, shift


@needs_native
@pytest.mark.parametrize("level_name", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_native_is_identical(shape, layout, dtype, level_name):
    mid, rad, scale, shift = problem(*shape, dtype=dtype, layout=layout, make=nasty_box)
    scale_rad, shift_rad = (t.abs() for t in nasty_box(shape[1], dtype=dtype, seed=5))
    for args in [
        (mid, rad, scale, shift), (mid, rad, scale, None), (mid, rad, scale.flip(0), strided(shift)),
        (mid, rad, scale, shift, scale_rad, None), (mid, rad, scale, None, None, shift_rad),
        *((mid, rad, scale, shift, scale_rad, shift_rad, r) for r in rd.Rounding),
        *((mid, rad, scale, None, None, None, r) for r in rd.Rounding),
    ]:  # fmt: skip
        with level(level_name):
            actual = native.interval_scale_shift(*args)
        for a, e in zip(actual, reference.interval_scale_shift(*args), strict=True):
            assert_identical(a, e)


def test_encloses_samples(backend):
    mid, rad, scale, shift = problem(3, 4, 5, 2)
    out_mid, out_rad = ops.interval_scale_shift(mid, rad, scale, shift)
    for x in samples(mid, rad):
        assert_encloses(out_mid, out_rad, x * scale[:, None, None] + shift[:, None, None])


@pytest.mark.parametrize("layout", [torch.clone, channels_last])
def test_gradients(backend, layout):
    inputs = leaves(*problem(2, 3, 2, 3, layout=layout))
    assert torch.autograd.gradcheck(ops.interval_scale_shift, inputs)
    assert torch.autograd.gradcheck(lambda *a: ops.interval_scale_shift(*a, None), inputs[:3])
    assert torch.autograd.gradgradcheck(ops.interval_scale_shift, inputs)


@pytest.mark.parametrize("layout", [torch.clone, channels_last])
def test_operator_passes_opcheck(backend, layout):
    inputs = leaves(*problem(2, 3, 2, 3, layout=layout))
    opcheck(torch.ops.pyxai_bounds.interval_scale_shift.default, inputs)
    opcheck(torch.ops.pyxai_bounds.interval_scale_shift.default, (*inputs[:3], None))
    opcheck(torch.ops.pyxai_bounds.interval_scale_shift.default, leaves(*problem(4, 3)))


@needs_native
def test_native_refuses_a_scale_that_does_not_fit():
    mid, rad, scale, shift = problem(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"scale needs one torch\.float64 value for each of the 3 channels"):
        native.interval_scale_shift(mid, rad, scale[:2], shift)
    with pytest.raises(ValueError, match="shift needs one"):
        native.interval_scale_shift(mid, rad, scale, shift.float())
