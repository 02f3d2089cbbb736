"""The matrix-product kernels against the reference in float64: values, states and gradients, within a rounding budget.

A sum of K products computed in a type of unit roundoff u is off by at most about K·u·Σ|w||x|; operands rounded to a
storage type of unit roundoff v (results, and boxes that ReLU′ changed before) add a few v·Σ|w||x|.
"""

import pytest
import torch

from pyxai_bounds import ops
from pyxai_bounds.ops import reference, triton
from pyxai_bounds.ops.layout import memory_format
from tests.kernels.conftest import set_precision
from tests.ops.cases import assert_identical, box, channels_last, leaves

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-11}
DTYPES = list(UNIT)


def assert_close(actual, expected, magnitude, dtype, terms):
    """Within the budget: ``magnitude`` is the sum of the absolute values of the terms."""
    computing = max(UNIT[dtype], 2.0**-53) if dtype is torch.float64 else 2.0**-24
    budget = ((terms + 4) * computing + 4 * UNIT[dtype]) * magnitude
    assert actual.dtype is dtype and actual.shape == expected.shape
    error = (actual.cpu().double() - expected).abs()
    assert (error <= budget).all(), f"worst error / budget {(error / budget.clamp_min(1e-300)).max().item():.3g}"


def on(device, *tensors):
    return tuple(t if t is None else t.to(device) for t in tensors)


def double(*tensors):
    return tuple(None if t is None else t.double() for t in tensors)


LINEAR = [(5, 7, 9), (1, 1, 1), (3, 40, 8), (70, 33, 72), (2, 130, 24), (65, 16, 10)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", LINEAR)
def test_linear(kernels, sizes, dtype):
    batch, inputs, outputs = sizes
    mid, rad = box(batch, inputs, dtype=dtype)
    weight, bias = box(outputs, inputs, dtype=dtype, seed=2)[0], box(outputs, dtype=dtype, seed=3)[0]
    ours = on(kernels, mid, rad, weight, bias)
    exact = double(mid, rad, weight, bias)
    out_mid, out_rad, none = triton.interval_linear(*ours, False)
    expected = reference.interval_linear(*exact, False)
    scale = (mid.double().abs() + rad.double()) @ weight.double().abs().t() + bias.double().abs()
    assert none.numel() == 0
    assert_close(out_mid, expected[0], scale, dtype, inputs)
    assert_close(out_rad, expected[1], scale, dtype, inputs)
    fused = triton.interval_linear(*ours, True)
    if dtype in (torch.float32, torch.float64):  # the epilogue sees the very sums that were stored
        for a, e in zip(fused, reference.interval_relu(out_mid.cpu(), out_rad.cpu()), strict=True):
            assert_identical(a.cpu(), e)
    else:
        expected = reference.interval_linear(*exact, True)
        assert_close(fused[0], expected[0], 2 * scale, dtype, inputs)
        assert_close(fused[1], expected[1], 2 * scale, dtype, inputs)
    grad = box(batch, outputs, dtype=dtype, seed=4)
    state = reference.interval_relu(*box(batch, outputs, seed=9))[2]
    scale = (grad[0].double().abs() + grad[1].double()) @ weight.double().abs()
    for bits in (None, state):
        back = triton.interval_linear_backward(*on(kernels, *grad, weight, bits))
        expected = reference.interval_linear_backward(*double(*grad, weight), bits)
        assert_close(back[0], expected[0], scale, dtype, outputs)
        assert_close(back[1], expected[1], scale, dtype, outputs)
    found = triton.interval_linear_weight(*on(kernels, *grad, mid, rad, weight))
    expected = reference.interval_linear_weight(*double(*grad, mid, rad, weight))
    scale = reference.interval_linear_weight(*(t.abs() + 1e-300 for t in double(*grad, mid, rad, weight)))
    assert_close(found, expected, scale, dtype, batch)


def test_linear_takes_transposed_weights_and_rows_of_any_shape(kernels):
    mid, rad = (t.reshape(2, 3, 7) for t in box(6, 7))
    weight = box(7, 16, seed=2)[0].t()
    actual = triton.interval_linear(*on(kernels, mid, rad, weight, None), True)
    for a, e in zip(actual, reference.interval_linear(mid, rad, weight, None, True), strict=True):
        assert a.shape == e.shape and torch.allclose(a.cpu().double(), e.double(), rtol=1e-12, atol=1e-12)
    rows = on(kernels, *(t.reshape(6, 16) for t in actual[:2]), weight)
    back = triton.interval_linear_backward(*rows, None)
    expected = reference.interval_linear_backward(*(t.cpu() for t in rows), None)
    assert all(torch.allclose(a.cpu(), e, rtol=1e-12, atol=1e-12) for a, e in zip(back, expected, strict=True))


@pytest.mark.parametrize("sizes", [(0, 7, 8), (3, 0, 8), (3, 7, 0)])
def test_linear_of_nothing(kernels, sizes):
    batch, inputs, outputs = sizes
    mid, rad, weight, bias = box(batch, inputs)[0], box(batch, inputs)[1], box(outputs, inputs)[0], box(outputs)[0]
    for a, e in zip(
        triton.interval_linear(*on(kernels, mid, rad, weight, bias), True),
        reference.interval_linear(mid, rad, weight, bias, True),
        strict=True,
    ):
        assert a.shape == e.shape and torch.allclose(a.cpu().double(), e.double())
    grad = torch.ones(batch, outputs)
    found = triton.interval_linear_weight(*on(kernels, grad.double(), grad.double(), mid, rad, weight))
    assert found.shape == weight.shape and not found.any()


# shape, outputs, kernel, (stride, padding, dilation, groups): every parameter, channels by taps and tap by tap, edges.
CONV = [
    ((2, 4, 6, 7), 6, (3, 2), ([2, 1], [1, 2], [1, 2], 2)),
    ((1, 1, 3, 3), 1, (3, 3), ([1, 1], [0, 0], [1, 1], 1)),
    ((2, 32, 5, 6), 32, (3, 3), ([2, 2], [1, 1], [1, 1], 2)),
    ((2, 8, 9, 11), 16, (3, 3), ([3, 2], [2, 1], [2, 2], 1)),
    ((2, 3, 8, 8), 16, (3, 3), ([1, 1], [1, 1], [1, 1], 1)),
    ((3, 16, 5, 5), 24, (1, 1), ([2, 2], [0, 0], [1, 1], 1)),
    ((1, 40, 6, 5), 72, (3, 3), ([1, 2], [1, 1], [1, 1], 1)),
    ((1, 16, 12, 12), 8, (2, 3), ([4, 6], [0, 1], [2, 4], 1)),
    ((2, 8, 4, 4), 8, (3, 3), ([1, 1], [1, 1], [1, 1], 8)),
    ((2, 5, 1, 1), 9, (1, 1), ([1, 1], [0, 0], [1, 1], 1)),
]


# Few channels: outputs side by side that share a window, images wider than a tile, taps far apart, taps that miss.
IMAGES = [
    ((2, 1, 8, 8), 8, (5, 5), ([1, 1], [2, 2], [1, 1], 1)),
    ((3, 3, 7, 9), 10, (3, 3), ([2, 2], [1, 1], [1, 1], 1)),
    ((1, 3, 14, 15), 8, (7, 7), ([2, 2], [3, 3], [1, 1], 1)),
    ((2, 4, 5, 6), 24, (3, 4), ([1, 2], [2, 0], [1, 1], 1)),
    ((2, 2, 6, 70), 72, (2, 3), ([1, 1], [0, 2], [2, 2], 1)),
    ((1, 3, 5, 150), 9, (3, 3), ([2, 2], [1, 1], [1, 1], 1)),
    ((5, 3, 6, 6), 8, (1, 1), ([2, 2], [0, 0], [1, 1], 1)),
    ((1, 3, 9, 9), 130, (3, 3), ([1, 1], [4, 4], [1, 1], 1)),
    ((5, 3, 32, 32), 16, (3, 3), ([1, 1], [1, 1], [1, 1], 1)),
    ((1, 3, 3, 100), 16, (3, 3), ([1, 1], [1, 70], [1, 1], 1)),  # a strip would hold padding alone
]


def conv_tensors(case, dtype, layout):
    shape, outputs, kernel, args = case
    mid, rad = (layout(t) for t in box(*shape, dtype=dtype))
    weight = box(outputs, shape[1] // args[3], *kernel, dtype=dtype, seed=2)[0]
    bias = box(outputs, dtype=dtype, seed=3)[0]
    out = reference.interval_conv2d(*double(mid, rad, weight, bias), *args, False)
    grad = [layout(t) for t in box(*out[0].shape, dtype=dtype, seed=4)]
    state = reference.interval_relu(*(layout(t) for t in box(*out[0].shape, seed=9)))[2]
    return mid, rad, weight, bias, grad, state, args


@pytest.mark.parametrize("layout", [channels_last, torch.clone])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CONV)
def test_conv2d(kernels, case, dtype, layout):
    check_conv2d(kernels, case, dtype, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", IMAGES)
def test_conv2d_of_images(kernels, case, dtype):
    check_conv2d(kernels, case, dtype, channels_last)


def check_conv2d(kernels, case, dtype, layout):
    mid, rad, weight, bias, grad, state, args = conv_tensors(case, dtype, layout)
    terms = weight[0].numel()
    ours = on(kernels, mid, rad, weight, bias)
    out = triton.interval_conv2d(*ours, *args, False)
    expected = reference.interval_conv2d(*double(mid, rad, weight, bias), *args, False)
    total = mid.double().abs() + rad.double()
    scale = torch.conv2d(total, weight.double().abs(), bias.double().abs(), *args)
    assert_close(out[0], expected[0], scale, dtype, terms)
    assert_close(out[1], expected[1], scale, dtype, terms)
    assert out[0].stride() == expected[0].stride()
    fused = triton.interval_conv2d(*ours, *args, True)
    if dtype is torch.float32:
        for a, e in zip(fused, reference.interval_relu(out[0].cpu(), out[1].cpu()), strict=True):
            assert_identical(a.cpu(), e)
    else:
        expected = reference.interval_conv2d(*double(mid, rad, weight, bias), *args, True)
        assert_close(fused[0], expected[0], 2 * scale, dtype, terms)
        assert_close(fused[1], expected[1], 2 * scale, dtype, terms)
        assert fused[2].shape == expected[2].shape
    total = grad[0].double().abs() + grad[1].double()
    scale = reference.conv2d_input(total, weight.double().abs(), mid.shape, *args)
    for bits in (None, state):
        back = triton.interval_conv2d_backward(*on(kernels, *grad, weight, bits), list(mid.shape), *args)
        expected = reference.interval_conv2d_backward(*double(*grad, weight), bits, list(mid.shape), *args)
        assert_close(back[0], expected[0], scale, dtype, terms)
        assert_close(back[1], expected[1], scale, dtype, terms)
        assert back[0].stride() == back[1].stride() == expected[0].stride()
    found = triton.interval_conv2d_weight(*on(kernels, *grad, mid, rad, weight), *args)
    expected = reference.interval_conv2d_weight(*double(*grad, mid, rad, weight), *args)
    scale = reference.interval_conv2d_weight(*(t.abs() + 1e-300 for t in double(*grad, mid, rad, weight)), *args)
    assert_close(found, expected, scale, dtype, grad[0].numel() // weight.shape[0])
    assert found.stride() == expected.stride()


@pytest.mark.parametrize("layout", [channels_last, torch.clone])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CONV)
@pytest.mark.parametrize("library", [False, True])
def test_gate_and_relu_backward_after_conv2d(kernels, case, dtype, layout, library, monkeypatch):
    """By the kernel and by one after the library's product; in float32 they see the very sums that are stored."""
    mid, rad, weight, _, grad, gate, args = conv_tensors(case, dtype, layout)
    state = reference.interval_relu(*(layout(t) for t in box(*mid.shape, seed=9)))[2]
    assert state.any() and gate.any()
    if library:
        monkeypatch.setattr(triton._kernels("tuning"), "fastest", lambda key, candidates, run: candidates[-1])
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # the sums of one call are those of the next
    run = triton.measured if library else triton
    size, terms = list(mid.shape), weight[0].numel()
    magnitude = weight.double().abs()
    forward = torch.conv2d(mid.double().abs() + rad.double(), magnitude, None, *args)
    back = reference.conv2d_input(grad[0].double().abs() + grad[1].double(), magnitude, mid.shape, *args)
    for op, tensors, rest, plain, stage, scale in (
        ("interval_conv2d_gate", (mid, rad, weight, gate), args,
         ("interval_conv2d", (mid, rad, weight, None), (*args, False)), reference.interval_gate, forward),
        ("interval_conv2d_backward_relu", (*grad, weight, state), (size, *args),
         ("interval_conv2d_backward", (*grad, weight, None), (size, *args)), reference.interval_relu_backward,
         back),
    ):  # fmt: skip
        found = getattr(run, op)(*on(kernels, *tensors), *rest)
        expected = getattr(reference, op)(*double(*tensors[:3]), tensors[3], *rest)
        for a, e in zip(found, expected, strict=True):
            assert (a.shape, a.stride()) == (e.shape, e.stride())
        assert_close(found[0], expected[0], 2 * scale, dtype, terms)
        assert_close(found[1], expected[1], 2 * scale, dtype, terms)
        if dtype is torch.float32:
            product = getattr(run, plain[0])(*on(kernels, *plain[1]), *plain[2])[:2]
            for a, e in zip(found, stage(*(t.cpu() for t in product), tensors[3]), strict=True):
                assert_identical(a.cpu(), e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_channels_are_filled_up(kernels, dtype):
    """What spans taps and what is filled up with zeros give the same sums."""
    from pyxai_bounds.kernels import interval_conv2d
    from pyxai_bounds.kernels.launch import Block

    mid, rad = (channels_last(t) for t in on(kernels, *box(2, 3, 9, 8, dtype=dtype)))
    weight = channels_last(box(16, 3, 3, 3, dtype=dtype, seed=2)[0]).to(kernels)
    results = []
    for flat in (True, False):
        out = [channels_last(torch.empty(2, 16, 5, 8, dtype=dtype, device=kernels)) for _ in range(2)]
        block = Block(64, 32, 32, 4, 2, flat)
        args = ([2, 1], [1, 1], [1, 1], 1)
        interval_conv2d.forward_into(mid, rad, weight, None, *args, *out, "none", None, None, block, False)
        results.append(out)
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", [channels_last, torch.clone])
@pytest.mark.parametrize("outputs", [16, 10])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_librarys_convolution_has_its_bias_and_relu(kernels, dtype, outputs, layout, monkeypatch):
    monkeypatch.setattr(triton._kernels("tuning"), "fastest", lambda key, candidates, run: candidates[-1])
    mid, rad = (layout(t) for t in box(3, 8, 5, 7, dtype=dtype))
    weight, bias = box(outputs, 8, 3, 3, dtype=dtype, seed=2)[0], box(outputs, dtype=dtype, seed=3)[0]
    args = ([2, 1], [1, 1], [1, 1], 1)
    found = triton.measured.interval_conv2d(*on(kernels, mid, rad, weight, bias), *args, True)
    plain = reference.interval_conv2d(*on(kernels, mid, rad, weight), None, *args, False)[:2]
    shifted = (plain[0].cpu().double() + bias.double()[:, None, None]).contiguous(memory_format=memory_format(mid))
    expected = reference.interval_relu(shifted, plain[1].cpu().double())
    scale = shifted.abs() + plain[1].cpu().double()
    assert_close(found[0], expected[0], scale, dtype, 1)
    assert_close(found[1], expected[1], scale, dtype, 1)
    assert found[2].shape == expected[2].shape
    if dtype is torch.float64 or (layout is channels_last and outputs == 16):  # else rounded before ReLU saw it
        assert torch.equal(found[2].cpu(), expected[2])


@pytest.mark.parametrize(
    "case, dtype, layout",
    [
        (CONV[0], torch.float64, channels_last),
        (CONV[5], torch.bfloat16, channels_last),
        (CONV[3], torch.float16, torch.clone),
        (CONV[8], torch.float32, channels_last),
        (IMAGES[6], torch.float32, channels_last),
        (IMAGES[1], torch.bfloat16, channels_last),
        ((5, 7, 9), torch.float32, torch.clone),
        ((70, 330, 72), torch.bfloat16, torch.clone),
        ((17, 1000, 16), torch.float16, torch.clone),
    ],
)
def test_what_computes_right_passes_its_trial(kernels, case, dtype, layout, monkeypatch):
    """Every candidate, the library's products with a kernel after them among them: the bits are those of PyTorch."""
    tried = []

    def fastest(key, candidates, run):
        for candidate in candidates:
            run(candidate)  # raises if something differs
            tried.append((key[0], candidate))
        return candidates[0]

    monkeypatch.setattr(triton._kernels("tuning"), "fastest", fastest)
    if len(case) == 3:
        (mid, rad), grad = box(case[0], case[1], dtype=dtype), box(case[0], case[2], dtype=dtype)
        weight, bias = box(case[2], case[1], dtype=dtype)[0], box(case[2], dtype=dtype)[0]
        calls = [
            ("interval_linear", (mid, rad, weight, bias), (True,)),
            ("interval_linear", (mid, rad, weight, None), (False,)),
            ("interval_linear_backward", (*grad, weight, None), ()),
            ("interval_linear_weight", (*grad, mid, rad, weight), ()),
        ]
    else:
        mid, rad, weight, bias, grad, gate, args = conv_tensors(case, dtype, layout)
        state, size = reference.interval_relu(mid, rad)[2], (list(mid.shape),)
        calls = [
            ("interval_conv2d", (mid, rad, weight, bias), (*args, True)),
            ("interval_conv2d", (mid, rad, weight, None), (*args, False)),
            ("interval_conv2d_gate", (mid, rad, weight, gate), args),
            ("interval_conv2d_backward", (*grad, weight, None), (*size, *args)),
            ("interval_conv2d_backward_relu", (*grad, weight, state), (*size, *args)),
            ("interval_conv2d_weight", (*grad, mid, rad, weight), args),
        ]
    for op, tensors, rest in calls:
        getattr(triton.measured, op)(*on(kernels, *tensors), *rest)
    assert len(tried) >= 2 * len(calls)


def test_bits_packed_in_the_other_order(kernels):
    """The state may be contiguous where the gradient is channels-last, and the other way round."""
    mid, _, weight, _, grad, _, args = conv_tensors(CONV[2], torch.float64, torch.clone)
    for bits_layout in (torch.clone, channels_last):
        state = reference.interval_relu(*(bits_layout(t) for t in box(*grad[0].shape, seed=9)))[2]
        for layout in (torch.clone, channels_last):
            tensors = (*(layout(t) for t in grad), weight, state)
            actual = triton.interval_conv2d_backward(*on(kernels, *tensors), list(mid.shape), *args)
            expected = reference.interval_conv2d_backward(*tensors, list(mid.shape), *args)
            for a, e in zip(actual, expected, strict=True):
                assert torch.allclose(a.cpu(), e, rtol=1e-12, atol=1e-12) and a.stride() == e.stride()


@pytest.mark.parametrize("shape", [(0, 4, 5, 5), (0, 4, 3, 1)])
def test_conv2d_of_nothing(kernels, shape):
    weight, args = torch.ones(8, 4, 3, 3), ([1, 1], [1, 1], [1, 1], 1)
    mid = torch.zeros(shape)
    out = triton.interval_conv2d(*on(kernels, mid, mid, weight), None, *args, True)
    expected = reference.interval_conv2d(mid, mid, weight, None, *args, True)
    assert [t.shape for t in out] == [t.shape for t in expected]
    assert not triton.interval_conv2d_weight(*on(kernels, *out[:2], mid, mid, weight), *args).any()


def test_large_tiles_are_stored_in_halves(kernels):
    """The epilogue of a large tile works on halves; under the interpreter nothing else chooses such a tile."""
    from pyxai_bounds.kernels import interval_linear
    from pyxai_bounds.kernels.launch import Block

    mid, rad = on(kernels, *box(150, 20, dtype=torch.float32))
    weight = box(136, 20, dtype=torch.float32, seed=2)[0].to(kernels)
    expected = triton.interval_linear(mid, rad, weight, None, True)
    out_mid, out_rad, state = (torch.empty_like(t) for t in expected)
    block = Block(128, 128, 16, 8, 2)
    interval_linear.box_product_into(mid, rad, weight, None, out_mid, out_rad, state, block, False)
    assert torch.allclose(out_mid, expected[0], atol=1e-5) and torch.allclose(out_rad, expected[1], atol=1e-5)
    assert torch.equal(state, expected[2])


def test_sums_of_many_rows_are_split_and_added(kernels):
    from pyxai_bounds.kernels.launch import parts_of

    for rows, tiles, block in [(1, 1, 64), (1000, 1, 64), (10**6, 3, 64), (513, 1000, 32)]:
        parts, rows_of_part = parts_of(rows, tiles, block)
        assert rows_of_part % block == 0 and (parts - 1) * rows_of_part < rows <= parts * rows_of_part
    grad, x, weight = box(2100, 3, seed=4), box(2100, 5), box(3, 5, seed=2)[0]
    assert parts_of(2100, 1, 64)[0] > 1
    found = triton.interval_linear_weight(*on(kernels, *grad, *x, weight))
    assert torch.allclose(found.cpu(), reference.interval_linear_weight(*grad, *x, weight), rtol=1e-12, atol=1e-12)


def gradients(name, device, case, relu):
    """Gradients of both convolution operators in all their arguments, on one backend."""
    mid, rad, weight, bias, grad, state, args = conv_tensors(case, torch.float64, channels_last)
    with ops.backend(name):
        inputs = leaves(*on(device, mid, rad, weight, bias))
        out = ops.interval_conv2d(*inputs, *args, relu)
        loss = (out[0] * grad[0].to(device)).sum() + (out[1] * grad[1].to(device)).sum()
        inputs_2 = leaves(*on(device, *grad, weight))
        bits = state.to(device) if relu else None
        back = ops.interval_conv2d_backward(*inputs_2, bits, list(mid.shape), *args)
        loss_2 = (back[0] * mid.to(device)).sum() + (back[1] * rad.to(device)).sum()
    # Outside the block: the backward pass stays on the backend of the forward pass.
    return [g.cpu() for g in (*torch.autograd.grad(loss, inputs), *torch.autograd.grad(loss_2, inputs_2))]


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("case", [CONV[0], CONV[2]])
def test_gradients_of_conv2d(device, case, relu, monkeypatch):
    calls = []
    run = triton.interval_conv2d_weight
    monkeypatch.setattr(triton, "interval_conv2d_weight", lambda *a: calls.append(a) or run(*a))
    actual, expected = gradients("triton", device, case, relu), gradients("reference", "cpu", case, relu)
    assert len(calls) == 2
    assert all(torch.allclose(a, e, rtol=1e-10, atol=1e-10) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("relu", [True, False])
def test_gradients_of_linear(device, relu):
    found = {}
    for name, where in (("triton", device), ("reference", "cpu")):
        mid, rad, weight, bias = on(where, *box(6, 7), box(16, 7, seed=2)[0], box(16, seed=3)[0])
        grad = on(where, *box(6, 16, seed=4))
        with ops.backend(name):
            inputs = leaves(mid, rad, weight, bias)
            out = ops.interval_linear(*inputs, relu)
            first = torch.autograd.grad((out[0] * grad[0] + out[1] * grad[1]).sum(), inputs)
            inputs = leaves(*grad, weight)
            back = ops.interval_linear_backward(*inputs, out[2] if relu else None)
            second = torch.autograd.grad((back[0] * mid + back[1] * rad).sum(), inputs)
        found[name] = [t.cpu() for t in (*first, *second)]
    for a, e in zip(found["triton"], found["reference"], strict=True):
        assert torch.allclose(a, e, rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="tf32 is a mode of GPUs")
def test_tf32_is_used_where_pytorch_may_use_it(kernels):
    mid, rad, weight = on(kernels, *box(64, 512, dtype=torch.float32), box(64, 512, dtype=torch.float32, seed=2)[0])
    exact = reference.interval_linear(*double(mid, rad, weight), None, False)[0]
    errors = {}
    for precision in ("ieee", "tf32"):
        set_precision(precision)
        out = triton.interval_linear(mid, rad, weight, None, False)[0]
        errors[precision] = ((out - exact).norm() / exact.norm()).item()
    assert errors["ieee"] < 1e-6 < errors["tf32"] < 2e-3


def real_layer(op, channels, outputs, stride, dtype):
    """Arguments of one operator at a layer of a real network."""
    if op.startswith("interval_linear"):
        mid, rad = box(64, channels * 64, dtype=dtype)
        weight, bias = box(outputs, channels * 64, dtype=dtype, seed=2)[0], box(outputs, dtype=dtype, seed=3)[0]
        grad = box(64, outputs, dtype=dtype, seed=4)
        state = reference.interval_relu(*box(64, outputs, seed=9))[2]
        size: tuple = ()
        args: tuple = ()
    else:
        case = ((16, channels, 32, 32), outputs, (3, 3), ([stride] * 2, [1, 1], [1, 1], 1))
        mid, rad, weight, bias, grad, state, args = conv_tensors(case, dtype, channels_last)
        size = (list(mid.shape),)
    if op.endswith("_backward"):
        return (*grad, weight, state), (*size, *args)
    if op.endswith("_relu"):
        state = reference.interval_relu(*(channels_last(t) for t in box(*size[0], seed=9)))[2]
        return (*grad, weight, state), (*size, *args)
    if op.endswith("_gate"):
        return (mid, rad, weight, state), args
    if op.endswith("_weight"):
        return (*grad, mid, rad, weight), args
    return (mid, rad, weight, bias), args


@pytest.mark.skipif(not torch.cuda.is_available(), reason="sizes that fill a GPU")
@pytest.mark.parametrize("channels, outputs, stride", [(3, 64, 1), (64, 128, 2), (128, 128, 1)])
@pytest.mark.parametrize("op", ["interval_linear", "interval_linear_backward", "interval_linear_weight",
                                "interval_conv2d", "interval_conv2d_gate", "interval_conv2d_backward",
                                "interval_conv2d_backward_relu", "interval_conv2d_weight"])  # fmt: skip
@pytest.mark.parametrize("precision", ["bf16", "tf32", "ieee"])
def test_every_block_on_the_layers_of_a_real_network(kernels, precision, op, channels, outputs, stride, monkeypatch):
    """Each candidate, not only the default, at shapes where all tiles and stages are in use."""
    tensors, rest = real_layer(op, channels, outputs, stride, torch.bfloat16 if precision == "bf16" else torch.float32)
    limit = {"bf16": 1e-2, "tf32": 2e-3, "ieee": 1e-5}[precision]  # of the norm
    set_precision("tf32" if precision == "tf32" else "ieee")
    tensors_there = on(kernels, *tensors)
    for relu in ((False,), (True,)) if op in ("interval_linear", "interval_conv2d") else ((),):
        exact = getattr(reference, op)(*(t.double() if t.is_floating_point() else t for t in tensors), *rest, *relu)
        for index in range(6):
            monkeypatch.setattr(
                triton._kernels("tuning"), "fastest", lambda key, found, _, index=index: found[index % len(found)]
            )
            found = getattr(triton, op)(*tensors_there, *rest, *relu)
            pairs = zip(found, exact, strict=True) if isinstance(found, tuple) else [(found, exact)]
            for a, e in pairs:
                if a.is_floating_point():
                    assert (a.cpu().double() - e).norm() <= limit * e.norm(), index
