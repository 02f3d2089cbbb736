"""interval_conv2d and its backward-data operator, alone and with ReLU fused, in both memory orders."""

import pytest
import torch
from torch.library import opcheck

from pyxai_bounds import ops

from .cases import DTYPES, assert_encloses, assert_identical, box, channels_last, leaves, needs_native, samples

ARGS = ([2, 1], [1, 2], [1, 2], 2)  # stride, padding, dilation, groups
PLAIN = ([1, 1], [0, 0], [1, 1], 1)
LAYOUTS = [torch.clone, channels_last]


def problem(shape=(2, 4, 6, 7), outputs=6, kernel=(3, 2), args=ARGS, dtype=torch.float64, layout=torch.clone):
    """A box, a weight and bias, a gradient box, and the ReLU state of the outputs."""
    mid, rad = box(*shape, dtype=dtype)
    mid, rad = layout(mid), layout(0.1 * rad)
    weight, bias = box(outputs, shape[1] // args[3], *kernel, dtype=dtype, seed=2)[0], box(outputs, dtype=dtype)[0]
    out, _, state = ops.interval_conv2d(mid, rad, weight, bias, *args, True)
    grad = [layout(t) for t in box(*out.shape, dtype=dtype, seed=4)]
    return mid, rad, weight, bias, grad, state


def outputs_and_gradients(name, relu, **sizes):
    mid, rad, weight, bias, grad, state = problem(**sizes)
    args = sizes["args"]
    with ops.backend(name):
        inputs = leaves(mid, rad, weight, bias)
        out_mid, out_rad, out_state = ops.interval_conv2d(*inputs, *args, relu)
        first = torch.autograd.grad((out_mid * grad[0] + out_rad * grad[1]).sum(), inputs)
        inputs = leaves(*grad, weight)
        back = ops.interval_conv2d_backward(*inputs, state if relu else None, list(mid.shape), *args)
        second = torch.autograd.grad((back[0] * mid + back[1] * rad).sum(), inputs)
    return out_mid, out_rad, out_state, *first, *back, *second


@needs_native
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [
        dict(shape=(2, 4, 6, 7), outputs=6, kernel=(3, 2), args=ARGS),
        dict(shape=(0, 4, 6, 7), outputs=6, kernel=(3, 3), args=PLAIN),
        dict(shape=(1, 1, 3, 3), outputs=1, kernel=(3, 3), args=PLAIN),
        dict(shape=(3, 5, 1, 1), outputs=9, kernel=(1, 1), args=PLAIN),
        dict(shape=(4, 3, 32, 32), outputs=17, kernel=(3, 3), args=([1, 1], [1, 1], [1, 1], 1)),
    ],
)
def test_native_is_identical(sizes, dtype, layout, relu):
    actual = outputs_and_gradients("native", relu, dtype=dtype, layout=layout, **sizes)
    expected = outputs_and_gradients("reference", relu, dtype=dtype, layout=layout, **sizes)
    for a, e in zip(actual, expected, strict=True):
        assert_identical(a, e)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("relu", [True, False])
def test_encloses_samples(backend, relu, layout):
    mid, rad, weight, bias, grad, state = problem(layout=layout)
    out_mid, out_rad, _ = ops.interval_conv2d(mid, rad, weight, bias, *ARGS, relu)
    used = state if relu else None
    back_mid, back_rad = ops.interval_conv2d_backward(*grad, weight, used, list(mid.shape), *ARGS)
    for x, g in zip(samples(mid, rad), samples(*grad, seed=1), strict=True):
        x.requires_grad_()
        z = torch.conv2d(x, weight, bias, *ARGS)
        out = z.relu() if relu else z
        assert_encloses(out_mid, out_rad, out.detach())
        assert_encloses(back_mid, back_rad, torch.autograd.grad(out, x, g)[0])


@pytest.mark.parametrize("relu", [True, False])
def test_gradients_of_one_output_alone(backend, relu):
    """The engine leaves out the gradient of an output that the loss does not use."""
    mid, rad, weight, bias, grad, state = problem((1, 2, 3, 4), 2)
    for used in (0, 1):
        inputs = leaves(mid, rad, weight, bias)
        assert torch.autograd.gradcheck(lambda *a, used=used: ops.interval_conv2d(*a, *ARGS, relu)[used], inputs)
        inputs, bits = leaves(*grad, weight), state if relu else None
        assert torch.autograd.gradcheck(
            lambda *a, used=used, bits=bits: ops.interval_conv2d_backward(*a, bits, list(mid.shape), *ARGS)[used],
            inputs,
        )


def test_results_follow_the_memory_order_of_the_input(backend):
    for layout, order in zip(LAYOUTS, (torch.contiguous_format, torch.channels_last), strict=True):
        mid, rad, weight, bias, grad, state = problem(layout=layout)
        results = (
            *ops.interval_conv2d(mid, rad, weight, bias, *ARGS, True)[:2],
            *ops.interval_conv2d_backward(*grad, weight, state, list(mid.shape), *ARGS),
        )
        assert all(t.is_contiguous(memory_format=order) for t in results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_on_the_reference(dtype):
    mid, _, weight, _, grad, state = problem(args=PLAIN, dtype=dtype)
    back_mid, back_rad = ops.interval_conv2d_backward(*grad, weight, state, list(mid.shape), *PLAIN)
    assert back_mid.dtype is back_rad.dtype is dtype and (back_rad >= 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients(backend, layout):
    mid, rad, weight, bias, grad, state = problem(shape=(1, 4, 4, 3), outputs=2, layout=layout)
    inputs = leaves(mid, rad, weight, bias)
    assert torch.autograd.gradcheck(lambda *a: ops.interval_conv2d(*a, *ARGS, True)[:2], inputs)
    inputs = leaves(*grad, weight)
    size = list(mid.shape)
    assert torch.autograd.gradcheck(lambda *a: ops.interval_conv2d_backward(*a, state, size, *ARGS), inputs)


def test_second_derivatives(backend):
    mid, rad, weight, bias, *_ = problem(shape=(1, 2, 3, 3), outputs=2, kernel=(2, 2), args=([1, 1], [0, 0], [1, 1], 1))
    inputs = leaves(mid, rad, weight, bias)
    assert torch.autograd.gradgradcheck(lambda *a: ops.interval_conv2d(*a, *PLAIN, True)[:2], inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operators_pass_opcheck(backend, layout):
    mid, rad, weight, bias, grad, state = problem(layout=layout)
    inputs = leaves(mid, rad, weight, bias)
    opcheck(torch.ops.pyxai_bounds.interval_conv2d.default, (*inputs, *ARGS, True))
    opcheck(torch.ops.pyxai_bounds.interval_conv2d.default, (*inputs[:3], None, *ARGS, False))
    inputs = leaves(*grad, weight)
    size = list(mid.shape)
    opcheck(torch.ops.pyxai_bounds.interval_conv2d_backward.default, (*inputs, state, size, *ARGS))
    opcheck(torch.ops.pyxai_bounds.interval_conv2d_backward.default, (*inputs, None, size, *ARGS))
