"""The kernels of smooth activations against the reference in float64, outputs and gradients, and within programs."""

import pytest
import torch

import pyxai_bounds as xb
from pyxai_bounds import ops
from pyxai_bounds.ops import reference, triton
from tests.ops.cases import box, channels_last, nasty_box
from tests.ops.test_interval_smooth import CASES, smooth_box

# Of the functions: a few u for exp and its like, and what 1 − s loses where it cancels, of 1 and not of itself.
RELATIVE, ABSOLUTE = 2e-5, 1e-6


def on(device, *tensors):
    return tuple(t.to(device) for t in tensors)


def assert_near(actual, exact, size, name, rtol=RELATIVE, atol=ABSOLUTE, kinks=0.0):
    """``kinks``: the share of elements that may lie so close to a kink that float32 takes the other side of it."""
    for a, e in zip(actual, exact, strict=True):
        assert a.shape == e.shape
        error = (a.cpu().double() - e).abs()
        far = error > (rtol + atol) * size + rtol * e.abs()
        assert far.sum() <= kinks * far.numel() and a.isfinite().all(), (name, error.max().item())


@pytest.mark.parametrize("name, params", CASES)
def test_values_and_gradients(kernels, name, params):
    for shape in ((7,), (3, 1041)):
        mid, rad = smooth_box(*shape, dtype=torch.float32)
        grad, back = box(*shape, dtype=torch.float32, seed=5), box(*shape, dtype=torch.float32, seed=8)
        exact = [t.double() for t in (*back, *grad, mid, rad)]
        size = 10 * (1 + (mid.abs() + rad).double())  # the functions grow no faster; factors of boxes below are < 10
        for op, tensors in [
            ("interval_smooth", (mid, rad)),
            ("interval_smooth_backward", (*grad, mid, rad)),
            ("interval_smooth_adjoint", (*back, mid, rad)),
            ("interval_smooth_backward_adjoint", (*back, *grad, mid, rad)),
        ]:
            expected = getattr(reference, op)(*exact[6 - len(tensors) :], name, params)
            if op == "interval_smooth_adjoint":
                expected = reference.interval_smooth_adjoint(*exact[:2], *exact[4:], name, params)
            actual = getattr(triton, op)(*on(kernels, *tensors), name, params)
            assert_near(actual, expected, size, (op, name), kinks=1e-3 if op.endswith("adjoint") else 0.0)


@pytest.mark.parametrize("name", ["tanh", "softplus", "elu", "silu", "sigmoid"])
def test_small_results_keep_their_digits(kernels, name):
    """Where a formula cancels or underflows, a relative error is what counts."""
    params = {"softplus": (1.0, 20.0), "elu": (1.0, 1.0, 1.0)}.get(name, ())
    x = torch.cat([s * torch.logspace(-6, 1.2, 300) for s in (1, -1)])
    mid = triton.interval_smooth(*on(kernels, x, torch.zeros_like(x)), name, params)[0]
    exact = reference.interval_smooth(x.double(), torch.zeros_like(x).double(), name, params)[0]
    assert ((mid.cpu().double() - exact).abs() <= RELATIVE * exact.abs()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_computed_in_32(kernels, dtype):
    mid, rad = (channels_last(t) for t in box(2, 5, 3, 3, dtype=dtype))
    out = triton.interval_smooth_backward(*on(kernels, mid, rad, mid, rad), "gelu_slope", ())
    exact = reference.interval_smooth_backward(*(t.double() for t in (mid, rad, mid, rad)), "gelu_slope", ())
    cut = 2.0**-7 if dtype is torch.bfloat16 else 2.0**-10
    assert all(a.dtype is dtype and a.stride() == mid.stride() for a in out)
    assert_near(out, exact, torch.ones(()).double(), dtype, rtol=cut, atol=0)


@pytest.mark.parametrize("name, params", CASES)
def test_nothing_not_finite_becomes_finite(kernels, name, params):
    """Where the reference's range is NaN or unbounded, so is the kernel's, or no set at all."""
    mid, rad = nasty_box(300, dtype=torch.float32)
    rad = rad.abs()
    actual = [t.cpu() for t in triton.interval_smooth(*on(kernels, mid, rad), name, params)]
    expected = reference.interval_smooth(mid, rad, name, params)
    nan = mid.isnan() | rad.isnan()
    assert (actual[0] + actual[1])[nan].isnan().all()
    lost = ~(expected[0] + expected[1]).isfinite()
    assert not (actual[0] + actual[1])[lost].isfinite().any()


MODELS = {
    "sigmoid": torch.nn.Sigmoid(), "tanh": torch.nn.Tanh(), "gelu": torch.nn.GELU(), "silu": torch.nn.SiLU(),
    "gelu_tanh": torch.nn.GELU("tanh"), "softplus": torch.nn.Softplus(2.0), "elu": torch.nn.ELU(),
    "celu": torch.nn.CELU(0.7), "selu": torch.nn.SELU(),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_program_uses_them_where_there_are_kernels_and_only_there(device, name):
    def program(backend, where):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 9), MODELS[name], torch.nn.Linear(9, 7), MODELS[name])
        model = torch.nn.Sequential(model, torch.nn.Linear(7, 3)).to(where)
        x, target = box(4, 6, dtype=torch.float32)[0].to(where), torch.tensor([0, 2, 1, 1], device=where)
        bounded = xb.bound(xb.explain.gradient(model))
        with ops.backend(backend):
            out = bounded(xb.Interval.linf(x, 0.1), target)
            (out.rad.sum() + out.mid.square().sum()).backward()
            nodes = bounded.graph(xb.Interval.linf(x, 0.1), target).graph.nodes
        grads = [p.grad.cpu() for p in model.parameters() if p.grad is not None]
        return [out.mid.cpu(), out.rad.cpu(), *grads], sum("interval_smooth" in str(n.target) for n in nodes)

    actual, fused = program("triton", device)
    expected, plain = program("reference", "cpu")
    assert fused >= 3 and plain == 0 and len(actual) > 4  # the last value itself may not be needed
    for a, e in zip(actual, expected, strict=True):
        assert torch.allclose(a, e, rtol=1e-4, atol=1e-4 * (1e-3 + e.abs().max().item()))
