"""interval_conv2d and its backward-data operator, alone and with ReLU fused, in both memory orders."""

import pytest
import torch
from torch.library import opcheck

from pyxai_bounds import ops
from pyxai_bounds import rounding as rd
from pyxai_bounds.ops import native, reference
from pyxai_bounds.ops.layout import unpack

from .cases import (
    DTYPES,
    LEVELS,
    assert_contains,
    assert_encloses,
    assert_identical,
    assert_sums_agree,
    box,
    channels_last,
    leaves,
    level,
    needs_native,
    samples,
)

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
def test_native_is_identical_where_a_library_convolves(sizes, dtype, layout, relu):
    with level("portable"):
        actual = outputs_and_gradients("native", relu, dtype=dtype, layout=layout, **sizes)
        expected = outputs_and_gradients("reference", relu, dtype=dtype, layout=layout, **sizes)
    for a, e in zip(actual, expected, strict=True):
        assert_identical(a, e)


# Kernels, strides, paddings and dilations that meet every way through the tiles: fewer, more and as many outputs as a
# register has lanes; runs that end in mid-register; remainders of a stride that no tap reaches; taps outside of
# the image; more than one block of terms; an image for each thread, and bands of one image.
TILES = [
    dict(shape=(2, 16, 6, 7), outputs=32, kernel=(3, 3), args=([1, 1], [1, 1], [1, 1], 1)),
    dict(shape=(2, 3, 9, 8), outputs=48, kernel=(3, 2), args=([1, 1], [1, 0], [1, 1], 1)),
    dict(shape=(3, 5, 8, 9), outputs=17, kernel=(4, 4), args=([2, 2], [1, 1], [1, 1], 1)),
    dict(shape=(1, 4, 11, 10), outputs=16, kernel=(3, 3), args=([2, 3], [2, 1], [2, 1], 1)),
    dict(shape=(2, 2, 9, 9), outputs=5, kernel=(3, 3), args=([2, 2], [2, 2], [2, 2], 1)),
    dict(shape=(2, 8, 7, 5), outputs=8, kernel=(1, 1), args=([2, 2], [0, 0], [1, 1], 1)),
    dict(shape=(1, 2, 5, 6), outputs=2, kernel=(3, 3), args=([1, 2], [3, 4], [1, 1], 1)),
    dict(shape=(2, 7, 6, 4), outputs=3, kernel=(2, 3), args=([1, 1], [0, 1], [2, 1], 1)),
    dict(shape=(1, 2, 8, 8), outputs=4, kernel=(5, 5), args=([3, 3], [2, 2], [1, 1], 1)),
    dict(shape=(1, 150, 3, 3), outputs=20, kernel=(3, 3), args=([1, 1], [1, 1], [1, 1], 1)),
    dict(shape=(3, 32, 16, 16), outputs=32, kernel=(3, 3), args=([1, 1], [1, 1], [1, 1], 1)),
    dict(shape=(1, 32, 33, 16), outputs=33, kernel=(3, 3), args=([1, 1], [1, 1], [1, 1], 1)),
]


@pytest.fixture(params=LEVELS)
def tiles(request, monkeypatch):
    """The native convolution at each level, those included where a library's is faster."""
    monkeypatch.setattr(native, "TILED", LEVELS)
    # Whatever falls back is no test of the kernel.
    monkeypatch.setattr(reference, "interval_conv2d", None)
    monkeypatch.setattr(reference, "interval_conv2d_backward", None)
    with level(request.param):
        yield


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", TILES)
def test_tiles_convolve(sizes, dtype, tiles):
    """The sums of a library, in another order, and then the same ReLU, with the same ReLU′ before them."""
    mid, rad, weight, bias, grad, state = problem(dtype=dtype, layout=channels_last, **sizes)
    args, size = sizes["args"], list(mid.shape)
    wide = [t.double() for t in (mid, rad, weight, *grad)]
    terms = weight[0].numel() + len(weight) * weight[0, 0].numel()
    out = native.interval_conv2d(mid, rad, weight, bias, *args, False)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in out[:2])
    sizes_of = torch.conv2d(wide[0].abs(), wide[2].abs(), bias.double().abs(), *args[:3])
    assert_sums_agree(out[0], torch.conv2d(wide[0], wide[2], bias.double(), *args[:3]), sizes_of, terms)
    exact = torch.conv2d(wide[1], wide[2].abs(), None, *args[:3])
    assert_sums_agree(out[1], exact, exact, terms)
    for a, e in zip(
        native.interval_conv2d(mid, rad, weight, bias, *args, True), native.interval_relu(*out[:2]), strict=True
    ):
        assert_identical(a, e)
    for order in (channels_last, torch.Tensor.contiguous):
        assert torch.equal(native.interval_conv2d(mid, rad, order(weight), None, *args, False)[1], out[1])
    back = native.interval_conv2d_backward(*grad, weight, None, size, *args)
    sizes_of = reference.conv2d_input(wide[3].abs(), wide[2].abs(), size, *args)
    assert_sums_agree(back[0], reference.conv2d_input(wide[3], wide[2], size, *args), sizes_of, terms)
    exact = reference.conv2d_input(wide[4], wide[2].abs(), size, *args)
    assert_sums_agree(back[1], exact, exact, terms)
    gated = native.interval_relu_backward(*grad, state)[:2]
    for a, e in zip(
        native.interval_conv2d_backward(*grad, weight, state, size, *args),
        native.interval_conv2d_backward(*gated, weight, None, size, *args),
        strict=True,
    ):
        assert_identical(a, e)


@needs_native
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("rounding", [rd.Rounding.OUTWARD, rd.Rounding.EVALUATED])
@pytest.mark.parametrize("sizes", TILES)
def test_tiles_round_outward(sizes, rounding, relu, tiles):
    """float32 boxes hold, without any slack, what float64 computes at corners and samples; a point at 0 stays one."""
    mid, rad, weight, bias, grad, state = problem(dtype=torch.float32, layout=channels_last, **sizes)
    rad, grad = rad * 1e-6, [grad[0], grad[1] * 1e-6]
    mid[:, :, :1], rad[:, :, :1] = 0.0, 0.0
    args, size, used = sizes["args"], list(mid.shape), state if relu else None
    wide = [t.double() for t in (mid, rad, weight, bias, *grad)]
    out = native.interval_conv2d(mid, rad, weight, bias, *args, relu, rounding)
    back = native.interval_conv2d_backward(*grad, weight, used, size, *args, rounding)
    for x, g in zip(samples(*wide[:2]), samples(*wide[4:], seed=1), strict=True):
        z = torch.conv2d(x, wide[2], wide[3], *args[:3])
        assert_contains(*out[:2], z.relu() if relu else z)
        if relu:  # any member of ReLU' that the state allows
            active, alive = unpack(state, g)
            g = torch.where(active, g, torch.where(alive, g * torch.rand_like(g).round(), 0.0))
        assert_contains(*back, reference.conv2d_input(g, wide[2], size, *args))
    nothing = torch.zeros_like(mid), torch.zeros_like(rad)
    assert not torch.cat(native.interval_conv2d(*nothing, weight, None, *args, relu, rounding)[:2]).any()


@needs_native
def test_tiles_leave_the_smallest_weights_to_the_reference():
    """A product with one may underflow, which the widened radii would not cover."""
    mid, rad, weight, bias, grad, state = problem(dtype=torch.float32, layout=channels_last, **TILES[0])
    weight[3, 4, 1, 1] = 1e-30
    args, size = TILES[0]["args"], list(mid.shape)
    rounding = rd.Rounding.OUTWARD
    for a, e in zip(
        (
            *native.interval_conv2d(mid, rad, weight, bias, *args, True, rounding),
            *native.interval_conv2d_backward(*grad, weight, state, size, *args, rounding),
        ),
        (
            *reference.interval_conv2d(mid, rad, weight, bias, *args, True, rounding),
            *reference.interval_conv2d_backward(*grad, weight, state, size, *args, rounding),
        ),
        strict=True,
    ):
        assert_identical(a, e)


@needs_native
def test_tiles_hide_no_nan(tiles):
    mid, rad, weight, bias, grad, state = problem(dtype=torch.float32, layout=channels_last, **TILES[0])
    args, size = TILES[0]["args"], list(mid.shape)
    mid[0, 3, 2, 2], grad[1][0, 3, 2, 2] = float("nan"), float("inf")
    clean = torch.ones(1, 1, *size[2:])
    clean[:, :, 1:4, 1:4] = 0  # what the 3 × 3 taps reach
    for rounding in rd.Rounding:
        out = native.interval_conv2d(mid, rad, weight, bias, *args, False, rounding)
        back = native.interval_conv2d_backward(*grad, weight, None, size, *args, rounding)
        assert torch.equal(out[0][:1].isnan(), (clean == 0).expand_as(out[0][:1])) and out[0][1:].isfinite().all()
        assert torch.equal(back[1][:1].isfinite(), (clean == 1).expand_as(back[1][:1]))
        if rounding:
            assert torch.equal(out[1].isnan(), out[0].isnan())
    weight[5, 2, 1, 1] = float("nan")
    dead = torch.zeros_like(state)
    assert native.interval_conv2d_backward(*grad, weight, dead, size, *args)[0][:, 2].isnan().all()


@needs_native
@pytest.mark.parametrize("channels", [8, 40, 64, 200])
@pytest.mark.parametrize("dead", [0.3, 0.9, 1.0])
def test_leaving_out_dead_boxes_changes_no_bit(dead, channels, tiles):
    """Beside boxes of the least subnormal number, which are not left out and lost in every sum."""
    shape, args = (2, channels, 5, 13), ([1, 1], [1, 1], [1, 1], 1)
    mid, rad, weight, bias, *_ = problem(shape, 40, (3, 3), args, torch.float32, channels_last)
    # Of 11 significant bits: products are exact, and hide a subnormal number that the sum began with.
    mid, rad, weight = (t.half().float() for t in (mid, rad, weight))
    generator = torch.Generator().manual_seed(0)
    of_channel, of_pixel = torch.rand(2, channels, 1, 1, generator=generator), torch.rand(shape, generator=generator)
    is_dead = channels_last((of_channel < dead) | (of_pixel < dead / 3))
    least = torch.tensor(1e-45)
    assert least > 0 and is_dead.any()

    def results(at_dead):
        boxes = channels_last(torch.where(is_dead, at_dead, mid)), channels_last(rad.masked_fill(is_dead, 0.0))
        back = weight[:32].transpose(0, 1).contiguous()  # [channels, 32, 3, 3]: the box is a gradient
        return (
            *native.interval_conv2d(*boxes, weight, bias, *args, True),
            *native.interval_conv2d_backward(*boxes, back, None, [2, 32, 5, 13], *args),
        )

    def without_subnormal(t):
        return t.masked_fill(t.abs() < 1e-30, 0.0) if t.is_floating_point() else t

    expected = [without_subnormal(t) for t in results(least)]
    for zero in (torch.tensor(0.0), torch.tensor(-0.0)):
        assert all(torch.equal(without_subnormal(a), e) for a, e in zip(results(zero), expected, strict=True))


@needs_native
def test_weights_that_are_not_finite_meet_dead_boxes(tiles):
    """0 times infinity is NaN."""
    sizes = TILES[0]
    mid, _, weight, _, grad, _ = problem(dtype=torch.float32, layout=channels_last, **sizes)
    nothing, args = torch.zeros_like(mid), sizes["args"]
    weight[5, 2, 1, 1] = float("inf")
    for rounding in rd.Rounding:
        out = native.interval_conv2d(nothing, nothing, weight, None, *args, False, rounding)
        assert out[0][:, 5].isnan().all() and not out[0][:, :5].any()
        no_grad = torch.zeros_like(grad[0])
        back = native.interval_conv2d_backward(no_grad, no_grad, weight, None, list(mid.shape), *args, rounding)
        assert back[0][:, 2].isnan().all() and not back[0][:, :2].any()


# Outputs that are whole registers; one, two and four of them at a time; channels that do and do not come out even.
WEIGHTS = [
    dict(shape=(2, 16, 6, 7), outputs=32, kernel=(3, 3), args=([1, 1], [1, 1], [1, 1], 1)),
    dict(shape=(3, 8, 9, 8), outputs=48, kernel=(3, 2), args=([1, 1], [1, 0], [1, 1], 1)),
    dict(shape=(2, 11, 11, 10), outputs=16, kernel=(4, 4), args=([2, 3], [2, 1], [1, 1], 1)),
    dict(shape=(1, 23, 9, 9), outputs=64, kernel=(3, 3), args=([2, 2], [3, 4], [2, 1], 1)),
    dict(shape=(2, 9, 5, 5), outputs=112, kernel=(5, 5), args=([3, 3], [4, 4], [1, 2], 1)),
    dict(shape=(2, 8, 140, 3), outputs=16, kernel=(3, 1), args=([1, 1], [1, 0], [1, 1], 1)),
    dict(shape=(1, 8, 3, 140), outputs=16, kernel=(1, 3), args=([1, 1], [0, 0], [1, 1], 1)),
    dict(shape=(4, 32, 16, 16), outputs=64, kernel=(1, 1), args=([2, 2], [0, 0], [1, 1], 1)),
]


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", WEIGHTS)
def test_the_gradient_in_the_weight(sizes, dtype, tiles, monkeypatch):
    monkeypatch.setattr(reference, "interval_conv2d_weight", None)
    generator = torch.Generator().manual_seed(1)

    def normal(*size):
        return channels_last(torch.randn(size, generator=generator, dtype=torch.float64).to(dtype))

    args = sizes["args"]
    mid, rad = normal(*sizes["shape"]), normal(*sizes["shape"])
    weight = normal(sizes["outputs"], sizes["shape"][1], *sizes["kernel"])
    weight[:2, 1] = 0.0
    grads = [normal(*torch.conv2d(mid, weight, None, *args).shape) for _ in range(2)]
    wide = [t.double() for t in (*grads, mid, rad, weight)]

    def exact(grad, box):
        return reference.conv2d_weight(grad, box, wide[4], *args)

    terms = grads[0].numel() // sizes["outputs"] + 1
    for parts in ((0, 1), (0,), (1,)):
        expected, magnitudes = torch.zeros_like(wide[4]), torch.zeros_like(wide[4])
        for part in parts:
            expected += exact(wide[part], wide[2 + part]) * (wide[4].sign() if part else 1)
            magnitudes += exact(wide[part].abs(), wide[2 + part].abs())
        given = [t if k % 2 in parts else None for k, t in enumerate((*grads, mid, rad))]
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(native.interval_conv2d_weight(*given, weight, *args))
        assert_sums_agree(results[0], expected, magnitudes, terms)
        for other in (*results[1:], native.interval_conv2d_weight(*given, weight.contiguous(), *args)):
            assert torch.equal(other, results[0])
        assert results[0].is_contiguous(memory_format=torch.channels_last)


MISFITS = {  # of a weight [16, 8, 3, 3]: shape of the box, then of the convolution's input, if the box is a gradient
    "channels": ((2, 4, 6, 6), None),
    "image smaller than the kernel": ((2, 8, 1, 2), None),
    "channels of a gradient": ((2, 8, 6, 6), (2, 8, 6, 6)),
    "height and width of an input": ((2, 16, 6, 6), (2, 8, 9, 9)),
}


@needs_native
@pytest.mark.parametrize("misfit", MISFITS)
def test_shapes_that_do_not_belong_are_refused(misfit):
    """The kernel would read and write where nothing of theirs is."""
    shape, input_size = MISFITS[misfit]
    mid, rad = (channels_last(t) for t in box(*shape, dtype=torch.float32))
    weight = torch.ones(16, 8, 3, 3)
    with pytest.raises(RuntimeError, match=r"channels|output padding|[Kk]ernel size"):
        if input_size is None:
            native.interval_conv2d(mid, rad, weight, None, *PLAIN, True)
        else:
            native.interval_conv2d_backward(mid, rad, weight, None, input_size, [1, 1], [1, 1], [1, 1], 1)


@needs_native
@pytest.mark.skipif(not set(LEVELS) & set(native.TILED), reason="the library convolves, and needs no such memory")
def test_memory_that_is_not_to_be_had_is_an_error_in_every_thread():
    side = 1 << 41  # pixels that one output reaches, most of them padding
    mid, rad = (channels_last(t) for t in box(256, 64, 2, 2, dtype=torch.float32))
    args = ([1, 1], [0, side], [1, 2 * side], 1)
    torch.set_num_threads(2)
    try:
        with pytest.raises(MemoryError):
            native.interval_conv2d(mid, rad, torch.ones(64, 64, 1, 2), None, *args, False)
    finally:
        torch.set_num_threads(1)


@needs_native
@pytest.mark.parametrize("rounding", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_do_not_depend_on_threads_or_batch(dtype, rounding, tiles):
    mid, rad, weight, bias, grad, state = problem(dtype=dtype, layout=channels_last, **TILES[-2])
    args, size = TILES[-2]["args"], list(mid.shape)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(
            (
                *native.interval_conv2d(mid, rad, weight, bias, *args, True, rounding),
                *native.interval_conv2d_backward(*grad, weight, state, size, *args, rounding),
            )
        )
    for one, two in zip(*results, strict=True):
        assert_identical(one, two)
    alone = native.interval_conv2d(mid[1:2], rad[1:2], weight, bias, *args, True, rounding)
    assert torch.equal(alone[0], results[0][0][1:2]) and torch.equal(alone[1], results[0][1][1:2])


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


def assert_agree(actual, expected):
    """Up to the rounding of sums in another order; bits, and memory order, exactly."""
    for a, e in zip(actual, expected, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (e.shape, e.dtype, e.stride())
        assert torch.allclose(a, e, rtol=1e-12, atol=1e-12) if a.is_floating_point() else torch.equal(a, e)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_with_a_gate_or_relu_backward_behind_them(backend, layout):
    mid, rad, weight, _, grad, gate = problem(layout=layout)
    size = list(mid.shape)
    out = ops.interval_conv2d(mid, rad, weight, None, *ARGS, False)[:2]
    assert_agree(ops.interval_conv2d_gate(mid, rad, weight, gate, *ARGS), ops.interval_gate(*out, gate))
    state = ops.interval_relu(*(layout(t) for t in box(*size, seed=5)))[2]
    back = ops.interval_conv2d_backward(*grad, weight, None, size, *ARGS)
    found = ops.interval_conv2d_backward_relu(*grad, weight, state, size, *ARGS, None, False)
    assert_agree(found, ops.interval_relu_backward(*back, state))
    *found, none = ops.interval_conv2d_backward_relu(*grad, weight, None, size, *ARGS, None, False)
    assert none.numel() == 0 and none.dtype is torch.uint8
    assert_agree(found, back)


def test_derivatives_of_products_with_a_gate_or_relu_backward_behind_them(backend):
    mid, rad, weight, _, grad, gate = problem(shape=(1, 4, 4, 3), outputs=2)
    size = list(mid.shape)
    state = ops.interval_relu(*box(*size, seed=5))[2]
    check = torch.autograd.gradcheck, torch.autograd.gradgradcheck
    for derivative in check:
        assert derivative(lambda *a: ops.interval_conv2d_gate(*a, gate, *ARGS), leaves(mid, rad, weight))
        for used in (0, 1):
            assert derivative(lambda *a, used=used: ops.interval_conv2d_gate(*a, gate, *ARGS)[used],
                              leaves(mid, rad, weight))  # fmt: skip
        for bits in (state, None):
            assert derivative(
                lambda *a, bits=bits: ops.interval_conv2d_backward_relu(*a, bits, size, *ARGS, None, False)[:2],
                leaves(*grad, weight),
            )


def gated_chain(fused: bool, box_and_weights: tuple, states: list) -> tuple:
    """ReLU′, then three backward-data products with ReLU′ between them; each gate by the reader of the gated box."""
    mid, rad, *weights = box_and_weights
    if not fused:
        for weight, state in zip(weights, states, strict=True):
            mid, rad, _ = ops.interval_relu_backward(mid, rad, state)
            mid, rad = ops.interval_conv2d_backward(mid, rad, weight, None, size_behind(mid, weight), *PLAIN)
        return mid, rad
    mid, rad, gate = ops.interval_relu_backward(mid, rad, states[0], 0, True)
    for weight, state in zip(weights, [*states[1:], None], strict=True):
        mid, rad, gate = ops.interval_conv2d_backward_relu(
            mid, rad, weight, state, size_behind(mid, weight), *PLAIN, gate, state is not None
        )
    return mid, rad


def size_behind(mid: torch.Tensor, weight: torch.Tensor) -> list[int]:
    """Of the image that a PLAIN convolution with this weight makes ``mid`` of."""
    return [len(mid), weight.shape[1], *(n + k - 1 for n, k in zip(mid.shape[2:], weight.shape[2:], strict=True))]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gate_may_be_applied_where_gradients_are_made(backend, layout):
    weights = [box(*shape, seed=seed)[0] for seed, shape in enumerate([(2, 3, 2, 1), (3, 2, 1, 2), (2, 2, 2, 2)])]
    inputs = (*(layout(t) for t in box(1, 2, 1, 2, seed=7)), *weights)
    shapes, states = [(1, 2, 1, 2), (1, 3, 2, 2), (1, 2, 2, 3)], []
    for seed, shape in enumerate(shapes):
        states.append(ops.interval_relu(*(layout(t) for t in box(*shape, seed=20 + seed)))[2])
    found, expected = (gated_chain(fused, leaves(*inputs), states) for fused in (True, False))
    assert_agree(found, expected)
    results = []
    for fused in (True, False):
        variables = leaves(*inputs)
        out = gated_chain(fused, variables, states)
        loss = out[0].square().sum() + (out[1] * out[1].detach().cos()).sum()
        first = torch.autograd.grad(loss, variables, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(3).sum() for g in first), variables)
        plain = torch.autograd.grad(gated_chain(fused, variables, states)[1].sum(), variables)
        results.append((*first, *second, *plain))
    assert_agree(*results)
    assert all(any(e.count_nonzero() for e in results[1][k : k + 5]) for k in (0, 5, 10))
    assert torch.autograd.gradgradcheck(lambda *a: gated_chain(True, a, states), leaves(*inputs))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_with_a_gate_or_relu_backward_pass_opcheck(backend, layout):
    mid, rad, weight, _, grad, gate = problem(layout=layout)
    size, operators = list(mid.shape), torch.ops.pyxai_bounds
    opcheck(operators.interval_conv2d_gate.default, (*leaves(mid, rad, weight), gate, *ARGS))
    state = ops.interval_relu(*(layout(t) for t in box(*size, seed=5)))[2]
    before = ops.interval_relu_backward(*grad, gate)[2]
    grad = ops.interval_gate(*grad, before)
    inputs = leaves(*grad, weight)
    for bits, given, gated in ((state, None, False), (state, before, True), (None, before, False)):
        opcheck(operators.interval_conv2d_backward_relu.default, (*inputs, bits, size, *ARGS, given, gated))
