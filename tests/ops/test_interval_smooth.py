"""The fused smooth activations against what they stand for: ranges, and gradients as autograd finds them."""

import pytest
import torch

from pyxai_bounds import ops
from pyxai_bounds.ops import reference
from pyxai_bounds.ops.smooth import _FUNCTIONS, extremes, smooth
from tests.ops.cases import assert_encloses, box, leaves, samples

PARAMS = {"softplus": [(1.0, 20.0), (2.0, 1.0)], "elu": [(1.0, 1.0, 1.0), (1.7, 1.05, 0.5), (0.7, -1.0, 1.0)]}
CASES = [(name, params) for name in _FUNCTIONS for params in PARAMS.get(name.split("_slope")[0], [()])]


def smooth_box(*shape, dtype=torch.float64, seed=0):
    """Wide and narrow boxes, and points, on both sides of every critical point."""
    mid, rad = box(*shape, dtype=dtype, seed=seed)
    return mid * 3, rad * torch.tensor([0.0, 0.01, 1.0, 3.0], dtype=dtype).repeat(mid.shape[-1])[: mid.shape[-1]]


def by_autograd(inputs, name, params):
    """The same formulas, differentiated by autograd."""
    function = smooth(name, params)
    mid, rad = inputs[-2:]
    least, greatest, _ = extremes(function.value, mid - rad, mid + rad, function.critical)
    factor = (least + greatest) * 0.5, (greatest - least) * 0.5
    return factor if len(inputs) == 2 else reference.interval_mul(*inputs[:2], *factor)


@pytest.mark.parametrize("name, params", CASES)
def test_the_slope_is_the_derivative(name, params):
    x = torch.linspace(-6, 6, 97, dtype=torch.float64).requires_grad_()
    function = smooth(name, params)
    (expected,) = torch.autograd.grad(function.value(x).sum(), x)
    assert torch.allclose(function.slope(x.detach()), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name, params", CASES)
def test_the_range_is_the_range(name, params):
    mid, rad = smooth_box(5, 40)
    out = reference.interval_smooth(mid, rad, name, params)
    for x in samples(mid, rad):
        assert_encloses(*out, smooth(name, params).value(x))


@pytest.mark.parametrize("name, params", CASES)
def test_gradients(name, params):
    for inputs in (smooth_box(3, 17), (*box(3, 17, seed=5), *smooth_box(3, 17))):
        operator = ops.interval_smooth if len(inputs) == 2 else ops.interval_smooth_backward
        found = []
        for run in (operator, lambda *a: by_autograd(a[:-2], *a[-2:])):
            variables = leaves(*inputs)
            out = run(*variables, name, params)
            loss = (out[0] * box(3, 17, seed=8)[0]).sum() + (out[1] * box(3, 17, seed=9)[0]).sum()
            found.append(torch.autograd.grad(loss, variables))
        for a, e in zip(*found, strict=True):
            assert torch.allclose(a, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name, params", [CASES[0], ("softplus", (2.0, 1.0)), ("gelu_slope", ())])
def test_opcheck(name, params):
    torch.library.opcheck(ops.interval_smooth, (*leaves(*smooth_box(3, 8)), name, params))
    args = (*leaves(*box(3, 8, seed=5), *smooth_box(3, 8)), name, params)
    torch.library.opcheck(ops.interval_smooth_backward, args)


def test_second_derivatives_are_refused():
    mid, rad = leaves(*smooth_box(3, 8))
    out = ops.interval_smooth(mid, rad, "silu", ())[1].sum()
    (grad,) = torch.autograd.grad(out, mid, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()
