"""interval_relu, interval_relu_backward and interval_gate: three operators that keep or zero end points."""

import pytest
import torch
from torch.library import opcheck

from pyxai_bounds import ops
from pyxai_bounds.ops import native, reference

from .cases import (
    DTYPES,
    LAYOUTS,
    LEVELS,
    SHAPES,
    SIZES,
    assert_encloses,
    assert_identical,
    box,
    channels_last,
    leaves,
    level,
    nasty_box,
    needs_native,
    samples,
)


def assert_native_agrees(name, *args, at=LEVELS[0]):
    with level(at):
        actual = getattr(native, name)(*args)
    for a, e in zip(actual, getattr(reference, name)(*args), strict=True):
        assert_identical(a, e)


@needs_native
@pytest.mark.parametrize("level_name", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_native_is_identical_at_every_size_and_level(n, dtype, level_name):
    mid, rad = nasty_box(n, dtype=dtype)
    grad_mid, grad_rad = nasty_box(n, dtype=dtype, seed=5)
    state = reference.interval_relu(mid, rad)[2]
    any_bits = torch.randint(0, 256, state.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    assert_native_agrees("interval_relu", mid, rad, at=level_name)
    assert_native_agrees("interval_relu", mid, rad, 1, at=level_name)  # rounded outward
    assert_native_agrees("interval_relu_backward", grad_mid, grad_rad, state, 1, at=level_name)
    assert_native_agrees("interval_relu_backward", grad_mid, grad_rad, state, at=level_name)
    assert_native_agrees("interval_relu_backward", grad_mid, grad_rad, any_bits, at=level_name)
    assert_native_agrees("interval_gate", grad_mid, grad_rad, any_bits, at=level_name)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_native_is_identical_in_every_layout(shape, layout, dtype):
    mid, rad = (layout(t) for t in nasty_box(*shape, dtype=dtype))
    grad_mid, grad_rad = (layout(t) for t in nasty_box(*shape, dtype=dtype, seed=5))
    state = reference.interval_relu(mid, rad)[2]
    assert_native_agrees("interval_relu", mid, rad)
    assert_native_agrees("interval_relu", mid, rad.contiguous())  # mid decides the memory order
    assert_native_agrees("interval_relu", mid.contiguous(), rad)
    assert_native_agrees("interval_relu_backward", grad_mid, grad_rad, state)
    assert_native_agrees("interval_gate", grad_mid, grad_rad, state)


@needs_native
@pytest.mark.parametrize("level_name", LEVELS)
def test_native_is_identical_on_a_million_elements(level_name):
    assert_native_agrees("interval_relu", *nasty_box(1_000_003, dtype=torch.float32), at=level_name)


@needs_native
@pytest.mark.parametrize("level_name", LEVELS)
@pytest.mark.parametrize("n", [0, 1, 9, 33, 65539])
def test_native_in_place_is_the_same_stage(n, level_name):
    mid, rad = nasty_box(n, dtype=torch.float32)
    expected = reference.interval_relu(mid, rad)
    with level(level_name):
        actual = native._relu_in_place(mid, rad)
    assert actual[0].data_ptr() == mid.data_ptr() and actual[1].data_ptr() == rad.data_ptr()
    for a, e in zip(actual, expected, strict=True):
        assert_identical(a, e)


@needs_native
@pytest.mark.parametrize("n", [1, 9, 33, 65539])
def test_native_without_the_gate_gives_the_same_box(n):
    mid, rad = nasty_box(n)
    state = reference.interval_relu(*nasty_box(n, seed=3))[2]
    actual = native._relu_backward_into(mid, rad, state, None)
    for a, e in zip(actual, reference.interval_relu_backward(mid, rad, state), strict=False):
        assert_identical(a, e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_states_of_relu(dtype):
    """Dead, unstable at both ends of the range, active; a lower end of exactly 0 is unstable."""
    mid = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, 0.0], dtype=dtype)
    rad = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0], dtype=dtype)
    out_mid, out_rad, state = ops.interval_relu(mid, rad)
    assert state.tolist() == [[0b010000], [0b011100]]
    assert out_mid.tolist() == [0, 0, 0.5, 1, 2, 0] and out_rad.tolist() == [0, 0, 0.5, 1, 1, 0]


def test_relu_backward_is_the_hull_with_zero_where_unstable(backend):
    dead, unstable, active = 0, 1, 2
    table = [  # state, lower, upper → lower, upper
        (dead, -1, 2, 0, 0), (active, -1, 2, -1, 2), (active, 1, 3, 1, 3),
        (unstable, 1, 3, 0, 3), (unstable, -3, -1, -3, 0), (unstable, -1, 2, -1, 2),
    ]  # fmt: skip
    state, lower, upper, *expected = (torch.tensor(column, dtype=torch.float64) for column in zip(*table, strict=True))
    bits = ops.layout.pack(state == active, state >= unstable)
    mid, rad, _ = ops.interval_relu_backward((lower + upper) / 2, (upper - lower) / 2, bits)
    assert torch.equal(mid - rad, expected[0]) and torch.equal(mid + rad, expected[1])


def test_encloses_samples(backend):
    mid, rad = box(200)
    grad_mid, grad_rad = box(200, seed=5)
    out_mid, out_rad, state = ops.interval_relu(mid, rad)
    back_mid, back_rad, _ = ops.interval_relu_backward(grad_mid, grad_rad, state)
    for x, grad in zip(samples(mid, rad), samples(grad_mid, grad_rad, seed=1), strict=True):
        assert_encloses(out_mid, out_rad, x.relu())
        assert_encloses(back_mid, back_rad, grad * (x > 0))


@pytest.mark.parametrize("layout", [torch.clone, channels_last])
def test_gradients(backend, layout):
    inputs = leaves(*(layout(t) for t in box(2, 3, 2, 3)))
    state = ops.interval_relu(*box(2, 3, 2, 3, seed=3))[2]
    gate = ops.interval_relu_backward(*box(2, 3, 2, 3, seed=4), state)[2]
    check = torch.autograd.gradcheck
    assert check(lambda *box: ops.interval_relu(*box)[:2], inputs)
    assert check(lambda *box: ops.interval_relu_backward(*box, state)[:2], inputs)
    assert check(lambda *box: ops.interval_gate(*box, gate), inputs)
    assert torch.autograd.gradgradcheck(lambda *box: ops.interval_gate(*box, gate), inputs)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 8, 33, 65539])
def test_native_gradients_are_identical(n, dtype):
    state = reference.interval_relu(*box(n, dtype=dtype, seed=3))[2]
    grads = {}
    for name in ("native", "reference"):
        inputs = leaves(*box(n, dtype=dtype))
        weights = box(n, dtype=dtype, seed=7)
        with ops.backend(name):
            mid, rad, _ = ops.interval_relu(*inputs)
            mid, rad, _ = ops.interval_relu_backward(mid - 0.5, rad, state)
            grads[name] = torch.autograd.grad((mid * weights[0] + rad * weights[1]).sum(), inputs)
    for actual, expected in zip(grads["native"], grads["reference"], strict=True):
        assert_identical(actual, expected)


@pytest.mark.parametrize("layout", [torch.clone, channels_last])
def test_operators_pass_opcheck(backend, layout):
    inputs = leaves(*(layout(t) for t in box(2, 3, 2, 3)))
    state = ops.interval_relu(*inputs)[2]
    opcheck(torch.ops.pyxai_bounds.interval_relu.default, inputs)
    opcheck(torch.ops.pyxai_bounds.interval_relu_backward.default, (*inputs, state))
    opcheck(torch.ops.pyxai_bounds.interval_gate.default, (*inputs, state))


@needs_native
def test_native_refuses_what_it_cannot_read():
    mid, rad = box(9)
    state = reference.interval_relu(mid, rad)[2]
    with pytest.raises(ValueError, match="must agree in shape"):
        native.interval_relu(mid, rad[:8])
    with pytest.raises(ValueError, match="must agree in shape"):
        native.interval_relu(mid, rad.float())
    with pytest.raises(ValueError, match=r"uint8 \[2, 2\]"):
        native.interval_gate(mid, rad, state[:, :1])
    with pytest.raises(ValueError, match=r"uint8 \[2, 2\]"):
        native.interval_relu_backward(mid, rad, state.int())
