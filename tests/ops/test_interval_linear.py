"""interval_linear and its backward-data operator, alone and with ReLU fused."""

import pytest
import torch
from torch.library import opcheck

from pyxai_bounds import ops

from .cases import DTYPES, assert_encloses, assert_identical, box, leaves, needs_native, samples


def problem(batch=5, inputs=7, outputs=9, dtype=torch.float64):
    """A box, a weight and bias, a gradient box, and the ReLU state of the outputs."""
    mid, rad = box(batch, inputs, dtype=dtype)
    weight, bias = box(outputs, inputs, dtype=dtype, seed=2)[0], box(outputs, dtype=dtype, seed=3)[0]
    grad = box(batch, outputs, dtype=dtype, seed=4)
    state = ops.interval_linear(mid, 0.1 * rad, weight, bias, True)[2]
    return mid, 0.1 * rad, weight, bias, grad, state


def outputs_and_gradients(name, *sizes, dtype, relu):
    mid, rad, weight, bias, grad, state = problem(*sizes, dtype=dtype)
    with ops.backend(name):
        inputs = leaves(mid, rad, weight, bias)
        out_mid, out_rad, out_state = ops.interval_linear(*inputs, relu)
        first = torch.autograd.grad((out_mid * grad[0] + out_rad * grad[1]).sum(), inputs)
        inputs = leaves(*grad, weight)
        back_mid, back_rad = ops.interval_linear_backward(*inputs, state if relu else None)
        second = torch.autograd.grad((back_mid * mid + back_rad * rad).sum(), inputs)
    return out_mid, out_rad, out_state, *first, back_mid, back_rad, *second


@needs_native
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(5, 7, 9), (0, 7, 9), (1, 1, 1), (1, 33, 31), (300, 20, 257)])
def test_native_is_identical(sizes, dtype, relu):
    actual = outputs_and_gradients("native", *sizes, dtype=dtype, relu=relu)
    expected = outputs_and_gradients("reference", *sizes, dtype=dtype, relu=relu)
    for a, e in zip(actual, expected, strict=True):
        assert_identical(a, e)


@needs_native
def test_native_takes_strided_inputs():
    mid, rad, weight, bias, grad, state = problem()
    results = {}
    for name in ("native", "reference"):
        with ops.backend(name):
            results[name] = (
                *ops.interval_linear(mid.t().clone().t(), rad.t().clone().t(), weight.t().clone().t(), bias, True),
                *ops.interval_linear_backward(grad[0].t().clone().t(), grad[1], weight, state),
            )
    for actual, expected in zip(results["native"], results["reference"], strict=True):
        assert_identical(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_on_the_reference(dtype):
    mid, rad, weight, bias, *_ = problem(dtype=dtype)
    out_mid, out_rad, state = ops.interval_linear(mid, rad, weight, bias, True)
    assert out_mid.dtype is out_rad.dtype is dtype and (out_rad >= 0).all() and state.dtype is torch.uint8


@pytest.mark.parametrize("relu", [True, False])
def test_encloses_samples(backend, relu):
    mid, rad, weight, bias, grad, state = problem()
    out_mid, out_rad, _ = ops.interval_linear(mid, rad, weight, bias, relu)
    back_mid, back_rad = ops.interval_linear_backward(*grad, weight, state if relu else None)
    for x, g in zip(samples(mid, rad), samples(*grad, seed=1), strict=True):
        z = x @ weight.t() + bias
        assert_encloses(out_mid, out_rad, z.relu() if relu else z)
        assert_encloses(back_mid, back_rad, (g * (z > 0) if relu else g) @ weight)


def test_is_exact_at_zero_radius(backend):
    mid, _, weight, bias, *_ = problem()
    out_mid, out_rad, _ = ops.interval_linear(mid, torch.zeros_like(mid), weight, bias, True)
    expected = torch.nn.functional.linear(mid, weight, bias).relu()
    # Triton's interpreter leaves products to numpy, which sums in another order.
    slack = 1e-15 * (mid.abs() @ weight.t().abs() + bias.abs()) if backend == "triton" else 0.0
    assert ((out_mid - expected).abs() <= slack).all() and not out_rad.any()


@pytest.mark.parametrize("relu", [True, False])
def test_gradients(backend, relu):
    mid, rad, weight, bias, grad, state = problem(3, 4, 5)
    inputs = leaves(mid, rad, weight, bias)
    assert torch.autograd.gradcheck(lambda *a: ops.interval_linear(*a, relu)[:2], inputs)
    inputs = leaves(*grad, weight)
    state = state if relu else None
    assert torch.autograd.gradcheck(lambda *a: ops.interval_linear_backward(*a, state), inputs)


def test_second_derivatives(backend):
    mid, rad, weight, bias, *_ = problem(3, 4, 5)
    inputs = leaves(mid, rad, weight, bias)
    assert torch.autograd.gradgradcheck(lambda *a: ops.interval_linear(*a, True)[:2], inputs)


def test_operators_pass_opcheck(backend):
    mid, rad, weight, bias, grad, state = problem()
    inputs = leaves(mid, rad, weight, bias)
    opcheck(torch.ops.pyxai_bounds.interval_linear.default, (*inputs, True))
    opcheck(torch.ops.pyxai_bounds.interval_linear.default, (*inputs[:3], None, False))
    inputs = leaves(*grad, weight)
    opcheck(torch.ops.pyxai_bounds.interval_linear_backward.default, (*inputs, state))
    opcheck(torch.ops.pyxai_bounds.interval_linear_backward.default, (*inputs, None))
