"""interval_linear and its backward-data operator, alone and with ReLU fused."""

import itertools

import pytest
import torch
from torch.library import opcheck

from pyxai_bounds import ops
from pyxai_bounds import rounding as rd
from pyxai_bounds.ops import native, reference
from pyxai_bounds.ops.layout import unpack
from pyxai_bounds.ops.native import FEW, SEVERAL, SEVERAL_OUTWARD

from .cases import (
    DTYPES,
    LEVELS,
    SIZES,
    assert_contains,
    assert_encloses,
    assert_identical,
    assert_identical_up_to_zero_sign,
    assert_sums_agree,
    box,
    leaves,
    level,
    nasty_box,
    needs_native,
    samples,
)


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
@pytest.mark.parametrize("sizes", [(FEW + 1, 7, 9), (0, 7, 9), (FEW + 1, 1, 1), (300, 20, 257)])
def test_native_is_identical(sizes, dtype, relu):
    actual = outputs_and_gradients("native", *sizes, dtype=dtype, relu=relu)
    expected = outputs_and_gradients("reference", *sizes, dtype=dtype, relu=relu)
    for a, e in zip(actual, expected, strict=True):
        assert_identical(a, e)


def check_products(mid, rad, weight, bias, grad, state, stored):
    """Sums in another order than a library's, and then the same ReLU and ReLU′; ``stored`` lays the weight out anew."""
    wide = [t.double() for t in (mid, rad, weight, bias, *grad)]
    outputs, inputs = weight.shape
    out = native.interval_linear(mid, rad, weight, bias, False)
    assert_sums_agree(out[0], wide[0] @ wide[2].t() + wide[3], wide[0].abs() @ wide[2].abs().t() + 1, inputs)
    assert_sums_agree(out[1], wide[1] @ wide[2].abs().t(), wide[1] @ wide[2].abs().t(), inputs)
    for a, e in zip(native.interval_linear(mid, rad, weight, bias, True), native.interval_relu(*out[:2]), strict=True):
        assert_identical(a, e)
    assert torch.equal(native.interval_linear(mid, rad, stored(weight), None, False)[1], out[1])
    back = native.interval_linear_backward(*grad, weight, None)
    assert_sums_agree(back[0], wide[4] @ wide[2], wide[4].abs() @ wide[2].abs(), outputs)
    assert_sums_agree(back[1], wide[5] @ wide[2].abs(), wide[5] @ wide[2].abs(), outputs)
    gated = native.interval_relu_backward(*grad, state)[:2]
    for a, e in zip(
        native.interval_linear_backward(*grad, weight, state),
        native.interval_linear_backward(*gated, weight, None),
        strict=True,
    ):
        assert_identical(a, e)


@needs_native
@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (1, 33, 31), (2, 64, 16), (3, 7, 9), (5, 130, 3), (8, 17, 40), (1, 784, 513)]
)
def test_native_multiplies_few_boxes(sizes, dtype, name):
    """One walk over the weight for midpoint and radius."""
    with level(name):
        check_products(*problem(*sizes, dtype=dtype), torch.clone)


@pytest.fixture(params=LEVELS)
def tiles(request, monkeypatch):
    """The packed kernel at each level, those included where a library's products are faster."""
    monkeypatch.setattr(native, "TILED", LEVELS)
    # Whatever falls back is no test of the kernel.
    monkeypatch.setattr(reference, "interval_linear", None)
    monkeypatch.setattr(reference, "interval_linear_backward", None)
    with level(request.param):
        yield


# More boxes than the kernel for few takes, and no multiples; more terms than a panel; outputs that end in mid-register.
TILES = [(FEW + 1, 16, 16), (13, 33, 50), (SEVERAL_OUTWARD, 64, 32), (17, 1200, 48), (30, 40, 161)]


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [*TILES, (SEVERAL, 20, 32)])
def test_tiles_multiply_several_boxes(sizes, dtype, tiles):
    """The same by packed panels, which take a weight with any strides."""
    check_products(*problem(*sizes, dtype=dtype), lambda weight: weight.t().clone().t())


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(FEW + 1, 16, 16), (13, 33, 50), (64, 1024, 160)])
def test_boxes_of_one_radius_are_as_among_others(sizes, dtype, tiles):
    """Their radii are summed once; a box of another radius in the batch changes no bit of theirs."""
    mid, rad, weight, bias, *_ = problem(*sizes, dtype=dtype)
    rad = rad[:1].expand_as(mid).contiguous()
    mixed = rad.clone()
    mixed[-1, -1] += 1
    relu = sizes[2] % 16 == 0
    found = native.interval_linear(mid, rad, weight, bias, relu)
    among = native.interval_linear(mid, mixed, weight, bias, relu)
    assert not torch.equal(found[1][-1], among[1][-1])
    for a, e in zip(found[:2], among[:2], strict=True):
        assert_identical(a[:-1], e[:-1])
    if relu:
        bits = (unpack(t[2], mid.new_empty(sizes[0], sizes[2])) for t in (found, among))
        for a, e in zip(*bits, strict=True):
            assert torch.equal(a[:-1], e[:-1])
    wide = [t.double() for t in (mid, rad, weight, bias)]
    if not relu:
        radii = wide[1] @ wide[2].abs().t()
        assert_sums_agree(found[1], radii, radii, sizes[1])


def check_derivatives(sizes, dtype, relu, mid_given):
    """Each gradient is a sum of products of gated boxes; a gate rounds each end once."""
    mid, rad, weight, _, grad, state = problem(*sizes, dtype=dtype)
    weight[0, 0] = 0.0
    batch, inputs, outputs = sizes
    bits = state if relu else None

    def check(found, expected, sizes, terms):
        for a, e, size in zip(found, expected, sizes, strict=True):
            assert_sums_agree(a, e, size, terms + 4)

    w, m, r, *g = (t.double() for t in (weight, mid, rad, *grad))
    sign, magnitude = w.sign(), w.abs()
    g[0] = g[0] * mid_given
    reach = g[0].abs() + g[1]
    found = native.interval_linear_adjoint(grad[0] if mid_given else None, grad[1], mid, rad, weight, bits, *[True] * 3)
    if not (mid_given or relu):
        assert found[0] is found[3] is None
    of_mid, of_rad = reference.interval_gate(*g, state) if relu else g
    check(
        [torch.zeros_like(e) if f is None else f for f, e in zip(found, (mid, rad, weight, weight[:, 0]), strict=True)],
        (of_mid @ w, of_rad @ magnitude, of_mid.t() @ m + sign * (of_rad.t() @ r), of_mid.sum(0)),
        (reach @ magnitude, reach @ magnitude, reach.t() @ (m.abs() + r), reach.sum(0)),
        max(batch, outputs),
    )
    # The transposed layer: (mid, rad) are the gradients of its results, `grad` is the box.
    found = native.interval_linear_backward_adjoint(mid if mid_given else None, rad, *grad, weight, bits, *[True] * 2)
    m, g[0] = m * mid_given, grad[0].double()
    box_mid, box_rad, gate = reference.interval_relu_backward(*g, state) if relu else (*g, None)
    back = m @ w.t(), r @ magnitude.t()
    back = reference.interval_gate(*back, gate) if relu else back
    reach, spread = (m.abs() + r) @ magnitude.t(), (g[0].abs() + g[1]).t() @ (m.abs() + r)
    check(
        [torch.zeros_like(e) if f is None else f for f, e in zip(found, (*grad, weight), strict=True)],
        (*back, box_mid.t() @ m + sign * (box_rad.t() @ r)),
        (reach, reach, spread),
        max(batch, inputs),
    )


@needs_native
@pytest.mark.parametrize("mid_given", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (1, 33, 31), (2, 64, 16), (3, 7, 9), (8, 130, 5), (0, 4, 3), (1, 784, 513)]
)
def test_native_differentiates_few_boxes(sizes, dtype, relu, mid_given):
    for name in LEVELS:
        with level(name):
            check_derivatives(sizes, dtype, relu, mid_given)


@needs_native
@pytest.mark.parametrize("mid_given", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(9, 16, 16), (13, 33, 50), (64, 70, 37), (17, 1200, 48)])
def test_tiles_differentiate_several_boxes(sizes, dtype, relu, mid_given, tiles):
    check_derivatives(sizes, dtype, relu, mid_given)


@pytest.mark.parametrize("batch", [2, FEW + 1])
def test_only_the_gradients_that_are_asked_for(backend, batch):
    """Whichever arguments are differentiated in, their gradients are the same; in float64, up to the order of sums."""
    mid, rad, weight, bias, grad, state = problem(batch, 20, 18)
    calls = {
        lambda *a: ops.interval_linear(*a, True)[:2]: ((mid, rad, weight, bias), grad),
        lambda *a: ops.interval_linear_backward(*a, state): ((*grad, weight), (mid, rad)),
    }
    for function, (inputs, given) in calls.items():
        every = leaves(*inputs)
        expected = torch.autograd.grad(function(*every), every, given)
        for chosen in itertools.product([True, False], repeat=len(inputs)):
            if not any(chosen):
                continue
            some = [t.detach().requires_grad_(is_chosen) for t, is_chosen in zip(inputs, chosen, strict=True)]
            wanted = [t for t in some if t.requires_grad]
            found = iter(torch.autograd.grad(function(*some), wanted, given, create_graph=chosen[0]))
            for e, is_chosen in zip(expected, chosen, strict=True):
                if is_chosen:
                    torch.testing.assert_close(next(found), e, rtol=1e-12, atol=1e-12)


@needs_native
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("rounding", [rd.Rounding.OUTWARD, rd.Rounding.EVALUATED])
@pytest.mark.parametrize("sizes", [(1, 40, 20), (3, 1200, 16), *TILES])
def test_tiles_round_outward(sizes, rounding, relu, tiles):
    """float32 boxes hold, without any slack, what float64 computes at corners and samples; nothing stays nothing."""
    mid, rad, weight, bias, grad, state = problem(*sizes, dtype=torch.float32)
    rad, grad = rad * 1e-6, (grad[0], grad[1] * 1e-6)
    wide = [t.double() for t in (mid, rad, weight, bias, *grad)]
    out = native.interval_linear(mid, rad, weight, bias, relu, rounding)
    back = native.interval_linear_backward(*grad, weight, state if relu else None, rounding)
    for x, g in zip(samples(*wide[:2]), samples(*wide[4:], seed=1), strict=True):
        z = x @ wide[2].t() + wide[3]
        assert_contains(*out[:2], z.relu() if relu else z)
        if relu:  # any member of ReLU′ that the state allows
            active, alive = unpack(state, g)
            g = torch.where(active, g, torch.where(alive, g * torch.rand_like(g).round(), 0.0))
        assert_contains(*back, g @ wide[2])
    nothing = torch.zeros_like(mid), torch.zeros_like(rad)
    assert not torch.cat(native.interval_linear(*nothing, weight, None, relu, rounding)[:2]).any()
    with_nan = native.interval_linear(torch.full_like(mid, float("inf")), rad, weight, bias, False, rounding)
    assert with_nan[1].isnan().all()


@needs_native
def test_tiles_leave_the_smallest_weights_to_the_reference():
    """A product with one may underflow, which the widened radii would not cover."""
    mid, rad, weight, bias, grad, state = problem(20, 32, 16, dtype=torch.float32)
    weight[3, 4] = 1e-30
    args = (rd.Rounding.OUTWARD,)
    for a, e in zip(
        (
            *native.interval_linear(mid, rad, weight, bias, True, *args),
            *native.interval_linear_backward(*grad, weight, state, *args),
        ),
        (
            *reference.interval_linear(mid, rad, weight, bias, True, *args),
            *reference.interval_linear_backward(*grad, weight, state, *args),
        ),
        strict=True,
    ):
        assert_identical(a, e)


@needs_native
@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_native_adds_signed_parts(n, dtype, name):
    a, b = nasty_box(n, dtype=dtype)
    weight = nasty_box(n, dtype=dtype, seed=7)[0]
    for first in (a, None):
        with level(name):
            actual = native.signed_sum(first, b.clone(), weight)
        assert_identical_up_to_zero_sign(actual, reference.signed_sum(first, b, weight))


@pytest.mark.parametrize("relu", [True, False])
def test_gradients_of_one_output_alone(backend, relu):
    """The engine leaves out the gradient of an output that the loss does not use."""
    mid, rad, weight, bias, grad, state = problem(3, 4, 5)
    for used in (0, 1):
        inputs = leaves(mid, rad, weight, bias)
        assert torch.autograd.gradcheck(lambda *a, used=used: ops.interval_linear(*a, relu)[used], inputs)
        inputs = leaves(*grad, weight)
        bits = state if relu else None
        assert torch.autograd.gradcheck(
            lambda *a, used=used, bits=bits: ops.interval_linear_backward(*a, bits)[used], inputs
        )


@needs_native
def test_a_nan_in_the_weight_is_not_hidden_by_dead_units():
    """0 · NaN is NaN in PyTorch's gradient as well."""
    mid, rad, weight, bias, grad, _ = problem(2)
    weight[3, 4] = float("nan")
    dead = ops.interval_relu(torch.full((2, 9), -1.0, dtype=mid.dtype), torch.zeros(2, 9, dtype=mid.dtype))[2]
    assert native.interval_linear(mid, rad, weight, bias, False)[0][:, 3].isnan().all()
    assert native.interval_linear_backward(*grad, weight, dead)[0][:, 4].isnan().all()


@needs_native
@pytest.mark.parametrize("inputs, outputs", [(0, 3), (3, 0), (0, 16)])
@pytest.mark.parametrize("relu", [False, True])
def test_layers_without_inputs_or_outputs(inputs, outputs, relu, monkeypatch):
    """An empty tensor has no address, and must not be taken for one that is absent: nothing would be written."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    mid, rad, weight, bias, grad, state = problem(2, inputs, outputs)
    results = {}
    torch.use_deterministic_algorithms(True)  # what nobody writes is NaN
    try:
        for backend in ("reference", "native"):
            given = [t.clone().requires_grad_() for t in (mid, rad, weight, bias, *grad)]
            with ops.backend(backend):
                forward = ops.interval_linear(*given[:4], relu)[:2]
                backward = ops.interval_linear_backward(*given[4:], given[2], state if relu else None)
                both = [*forward, *backward]
                grads = torch.autograd.grad(sum(t.sum() for t in both), given, materialize_grads=True)
            results[backend] = [*both, *grads]
    finally:
        torch.use_deterministic_algorithms(False)
    for ours, wanted in zip(results["native"], results["reference"], strict=True):
        assert torch.equal(ours, wanted)


@needs_native
def test_native_takes_strided_inputs():
    mid, rad, weight, bias, grad, state = problem(FEW + 1)
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
    # The reference sums as PyTorch does; a kernel of our own sums in another order.
    slack = 0.0 if backend == "reference" else 1e-15 * (mid.abs() @ weight.t().abs() + bias.abs())
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
