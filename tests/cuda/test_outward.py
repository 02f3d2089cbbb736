"""Linear layers and convolutions rounded outward: they contain the exact image of the box, and little more."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pyxai_bounds import ops
from pyxai_bounds.ops import cuda, reference
from pyxai_bounds.rounding import Rounding
from tests.cuda import exact
from tests.ops.cases import DTYPES, SHAPES, assert_identical, box, channels_last, nasty_box, strided, transposed

OUTWARD = int(Rounding.OUTWARD)
# B, N, M: one, odd, more than a tile of rows, of columns and of terms.
LINEAR = [(1, 1, 1), (3, 5, 7), (2, 301, 3), (67, 9, 5), (4, 17, 70), (66, 8, 65)]
# B, C, K, image, kernel, stride, padding, dilation, groups.
CONV = [
    (2, 3, 5, (6, 7), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (1, 2, 3, (9, 8), (3, 2), (2, 3), (1, 0), (1, 1), 1),
    (2, 4, 6, (7, 7), (3, 3), (2, 2), (2, 2), (2, 2), 2),
    (1, 3, 3, (8, 5), (2, 4), (3, 2), (0, 3), (2, 1), 3),
    (1, 2, 2, (7, 9), (2, 2), (4, 4), (0, 0), (1, 2), 1),  # pixels that no output reads
    (1, 2, 4, (12, 16), (3, 3), (6, 4), (1, 1), (4, 6), 1),  # strides and dilations with common factors
    (3, 1, 70, (5, 5), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (1, 70, 2, (3, 3), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (1, 1, 1, (1, 1), (1, 1), (1, 1), (0, 0), (1, 1), 1),
]
SCALES = [1.0, 1e-40, 1e-25, 1e18]


def weights(*shape: int, dtype: torch.dtype, seed: int = 5) -> Tensor:
    """Random weights, some of them 0, one of either sign."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    w[torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.2] = 0
    return w.to(dtype)


def conv_case(case, dtype, seed=0):
    batch, channels, outputs, image, kernel, *args = case
    w = weights(outputs, channels // args[3], *kernel, dtype=dtype)
    return *box(batch, channels, *image, dtype=dtype, seed=seed), w, weights(outputs, dtype=dtype, seed=8), args


def check(
    out: tuple[Tensor, ...], mid: Tensor, rad: Tensor, weight: Tensor, bias: Tensor | None, terms: int, apply
) -> None:
    """Containment of the exact image, without tolerance, and the width against its budget, where these are finite.

    ``apply(x, w)`` is the linear map in integers. If s is the image's centre and t its radius, both exact, it lies in
    the result iff |s − mid′| + t ≤ rad′.
    """
    shift = exact.SHIFT[mid.dtype]
    m, r, w = exact.whole(mid), exact.whole(rad), exact.whole(weight)
    centre, radius = apply(m, w), apply(r, abs(w))
    reach = apply(abs(m), abs(w))
    if bias is not None:
        b = exact.whole(bias).reshape(-1, *[1] * (mid.dim() - 2)) << shift
        centre, reach = centre + b, reach + abs(b)
    out_mid, out_rad = exact.whole(out[0], 2 * shift), exact.whole(out[1], 2 * shift)
    finite = (out[0].isfinite() & out[1].isfinite()).numpy()
    off = abs(centre - out_mid)
    assert (off + radius <= out_rad)[finite].all()
    # The proof's own excess: γ_n of the magnitudes in float64 arithmetic, and 2ε for each step that rounds up.
    ulp = torch.finfo(mid.dtype).eps
    grows, lost = int((terms + 4) * ulp * 1.1 * 2**80), int((terms + 1) * 2.0**-53 * 1.1 * 2**80)
    budget = radius + off + (reach * lost >> 80)
    # One least number for each sum that rounds up, and one in each widened radius.
    underflow = (2 * (terms + 4) << shift) + apply(np.full_like(m, 1), abs(w))
    assert (out_rad <= budget + (budget * grows >> 80) + underflow)[finite].all()
    nothing = (reach == 0) & (radius == 0) & finite
    assert (out[0] == 0)[nothing].all() and (out[1] == 0)[nothing].all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", LINEAR)
def test_linear(backend, sizes, dtype):
    batch, n, m = sizes
    w, bias = weights(m, n, dtype=dtype), weights(m, dtype=dtype, seed=8)
    for eps in (1.0, 1e-5, 0.0):
        mid, rad = box(batch, n, dtype=dtype)
        mid[0], rad = 0, rad * eps
        for b in (bias, 1e9 * bias, None):
            out = ops.interval_linear(mid, rad, w, b, False, OUTWARD)
            check(out, mid, rad, w, b, n, lambda x, w: x @ w.T)
        out = ops.interval_linear_backward(mid, rad, w.t().contiguous(), None, OUTWARD)
        check(out, mid, rad, w, None, n, lambda x, w: x @ w.T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CONV)
def test_conv2d(backend, case, dtype):
    for eps in (1.0, 1e-5, 0.0):
        mid, rad, w, bias, args = conv_case(case, dtype)
        mid[:, 0], rad = 0, rad * eps
        terms = w[0].numel()
        for b in (bias, None):
            out = ops.interval_conv2d(mid, rad, w, b, *args, False, OUTWARD)
            check(out, mid, rad, w, b, terms, lambda x, w, args=args: exact.conv2d(x, w, *args))
        grad_mid, grad_rad = box(*out[0].shape, dtype=dtype, seed=3)
        grad_rad = grad_rad * eps
        back = ops.interval_conv2d_backward(grad_mid, grad_rad, w, None, mid.shape, *args, OUTWARD)
        terms = w.numel() // w.shape[1]
        check(back, grad_mid, grad_rad, w, None, terms,
              lambda x, w, args=args, size=mid.shape: exact.conv2d_input(x, w, size, *args))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_tiny_and_huge_numbers(backend, scale, dtype):
    """Subnormal factors and products that underflow, sums near the greatest number."""
    scale = scale ** (1 if dtype is torch.float32 else 7.5)
    w = weights(6, 40, dtype=torch.float64)
    mid, rad = box(5, 40)
    for left, right in ((scale, 1.0), (scale, scale), (scale**0.5, scale**0.5), (1.0, scale)):
        boxes = [(t * left).to(dtype) for t in (mid, rad)]
        factor = (w * right).to(dtype)
        if not factor.isfinite().all():
            continue
        out = ops.interval_linear(*boxes, factor, None, False, OUTWARD)
        check(out, *boxes, factor, None, 40, lambda x, w: x @ w.T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_next_to_the_least_number(backend, dtype):
    """There a midpoint is off by half of it, and rounding the radius up may gain less than that."""
    least = exact.SHIFT[dtype]
    for n in (1, 2):
        mid, rad = (torch.ldexp(t, torch.tensor(-(least // 2))).to(dtype) for t in box(66, n))
        w = torch.ldexp(weights(65, n, dtype=torch.float64), torch.tensor(-(least - least // 2) + 1)).to(dtype)
        out = ops.interval_linear(mid, rad, w, None, False, OUTWARD)
        assert dtype is torch.float32 or (out[0].abs() < 2.0**-1050).all()
        check(out, mid, rad, w, None, n, lambda x, w: x @ w.T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_never_looks_finite(backend, dtype):
    mid, rad = nasty_box(4, 3, 6, 5, dtype=dtype)
    w = weights(4, 3, 3, 3, dtype=dtype)
    args = ([1, 1], [1, 1], [1, 1], 1)
    out = ops.interval_conv2d(mid, rad, w, None, *args, False, OUTWARD)
    odd = (~(mid.isfinite() & rad.isfinite())).double()
    reached = torch.conv2d(odd, torch.ones_like(w).double(), None, *args) > 0
    assert reached.any() and not reached.all()
    assert not (out[0].isfinite() & out[1].isfinite())[reached].any()
    check(out, mid, rad, w, None, 27, lambda x, w: exact.conv2d(x, w, *args))
    far = torch.full((2, 3), torch.finfo(dtype).max, dtype=dtype)
    mid, rad, _ = ops.interval_linear(far, far, torch.ones(4, 3, dtype=dtype), None, False, OUTWARD)
    assert rad.isnan().all()  # the midpoint overflows: ReLU must not call this active


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [strided, transposed, channels_last])
def test_memory_order(backend, layout, dtype):
    """The midpoint decides the order of the results; values do not depend on it."""
    for case in CONV[:4]:
        mid, rad, w, bias, args = conv_case(case, dtype)
        grad = box(*ops.interval_conv2d(mid, rad, w, bias, *args, False, OUTWARD)[0].shape, dtype=dtype)
        for relu in (False, True):
            expected = ops.interval_conv2d(mid, rad, w, bias, *args, relu, OUTWARD)
            actual = ops.interval_conv2d(layout(mid), rad, layout(w), bias, *args, relu, OUTWARD)
            for x, y in zip(actual[:2], expected[:2], strict=True):
                assert torch.equal(x, y)
            order = torch.channels_last if layout is channels_last else torch.contiguous_format
            assert actual[0].is_contiguous(memory_format=order)
        expected = ops.interval_conv2d_backward(*grad, w, None, mid.shape, *args, OUTWARD)
        actual = ops.interval_conv2d_backward(layout(grad[0]), grad[1], layout(w), None, mid.shape, *args, OUTWARD)
        assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))
    mid, rad = box(5, 6, dtype=dtype)
    w = weights(7, 6, dtype=dtype)
    expected = ops.interval_linear(mid, rad, w, None, True, OUTWARD)
    actual = ops.interval_linear(layout(mid), layout(rad), layout(w), None, True, OUTWARD)
    for x, y in zip(actual, expected, strict=True):
        assert_identical(x, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_is_the_stage_after_and_before(backend, dtype):
    mid, rad, w, bias, args = conv_case(CONV[0], dtype)
    plain = ops.interval_conv2d(mid, rad, w, bias, *args, False, OUTWARD)
    fused = ops.interval_conv2d(mid, rad, w, bias, *args, True, OUTWARD)
    for x, y in zip(fused, cuda.interval_relu(*plain[:2], OUTWARD), strict=True):
        assert_identical(x, y)
    grad = box(*plain[0].shape, dtype=dtype, seed=4)
    gated = cuda.interval_relu_backward(*grad, fused[2], OUTWARD)
    expected = ops.interval_conv2d_backward(*gated[:2], w, None, mid.shape, *args, OUTWARD)
    actual = ops.interval_conv2d_backward(*grad, w, fused[2], mid.shape, *args, OUTWARD)
    for x, y in zip(actual, expected, strict=True):
        assert_identical(x, y)
    mid, rad, w = *box(9, 5, dtype=dtype), weights(7, 5, dtype=dtype)
    state = ops.interval_linear(mid, rad, w, None, True, OUTWARD)[2]
    grad = box(9, 7, dtype=dtype, seed=4)
    gated = cuda.interval_relu_backward(*grad, state, OUTWARD)
    expected = ops.interval_linear_backward(*gated[:2], w, None, OUTWARD)
    for x, y in zip(ops.interval_linear_backward(*grad, w, state, OUTWARD), expected, strict=True):
        assert_identical(x, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_empty(backend, sizes, dtype):
    batch, n, m = sizes
    bias = torch.ones(m, dtype=dtype)
    mid, rad, _ = ops.interval_linear(*box(batch, n, dtype=dtype), torch.ones(m, n, dtype=dtype), bias, False, OUTWARD)
    assert mid.shape == rad.shape == (batch, m)
    assert (mid == 1).all() and (rad == 0).all()
    image = box(0, 2, 3, 3, dtype=dtype)
    out = ops.interval_conv2d(
        *image, torch.ones(2, 2, 3, 3, dtype=dtype), None, [1, 1], [1, 1], [1, 1], 1, True, OUTWARD
    )
    assert out[0].shape == (0, 2, 3, 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_about_as_narrow_as_the_reference(backend, dtype):
    """Summed in a known order, and rounded up only where something is lost."""
    mid, rad, w, bias, args = conv_case((2, 24, 8, (8, 8), (3, 3), (1, 1), (1, 1), (1, 1), 1), dtype)
    for eps in (1e-3, 1e-6):
        ours = ops.interval_conv2d(mid, rad * eps, w, bias, *args, False, OUTWARD)[1]
        theirs = reference.interval_conv2d(mid, rad * eps, w, bias, *args, False, OUTWARD)[1]
        assert ours.double().sum() <= theirs.double().sum() * (1 + 1e-4)


def test_what_does_not_fit_is_refused(backend):
    mid, rad = box(3, 4)
    with pytest.raises(ValueError, match="does not fit a weight"):
        cuda.interval_linear(mid, rad, torch.ones(2, 5, dtype=torch.float64), None, False, OUTWARD)
    with pytest.raises(ValueError, match=r"convert one of them"):
        cuda.interval_linear(mid, rad, torch.ones(2, 4), None, False, OUTWARD)
    with pytest.raises(ValueError, match="bias of 2 outputs"):
        cuda.interval_linear(mid, rad, torch.ones(2, 4).double(), torch.ones(3).double(), False, OUTWARD)
    with pytest.raises(ValueError, match="does not support"):
        ops.interval_relu(mid.bfloat16(), rad.bfloat16())


# --- elementwise ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(n,) for n in (0, 1, 7, 8, 9, 31, 32, 33, 255, 257, 1003)] + SHAPES)
def test_relu(backend, shape, dtype):
    """The same states as the reference; what is kept whole is untouched; the rest holds its ends as narrowly."""
    mid, rad = nasty_box(*shape, dtype=dtype)
    grad = nasty_box(*shape, dtype=dtype, seed=5)
    for t in (mid, rad, *grad):  # some odd multiples of the least number, whose halves are not numbers
        t.view(-1)[5::11] = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * 3
    rad.view(-1)[5::22] *= 2
    expected = reference.interval_relu(mid, rad, OUTWARD)
    actual = ops.interval_relu(mid, rad, OUTWARD)
    assert_identical(actual[2], expected[2])
    gradient = ops.interval_relu_backward(*grad, actual[2], OUTWARD)
    expected_gradient = reference.interval_relu_backward(*grad, expected[2], OUTWARD)
    assert_identical(gradient[2], expected_gradient[2])
    for (out_mid, out_rad, bits), (box_mid, box_rad), theirs in (
        (actual, (mid, rad), expected),
        (gradient, grad, expected_gradient),
    ):
        lower_kept, upper_kept = reference.unpack(bits, mid)
        both, neither = lower_kept & upper_kept, ~(lower_kept | upper_kept)
        assert torch.equal(out_mid[both].nan_to_num(7), box_mid[both].nan_to_num(7))
        assert torch.equal(out_rad[both].nan_to_num(7), box_rad[both].nan_to_num(7))
        assert (out_mid[neither] == 0).all() and (out_rad[neither] == 0).all()
        odd = ~(box_mid.isfinite() & box_rad.isfinite()) & (lower_kept ^ upper_kept)
        assert not (out_mid.isfinite() & out_rad.isfinite())[odd].any()
        some = ((lower_kept ^ upper_kept) & out_mid.isfinite() & out_rad.isfinite()).numpy()
        m, r, a, b = (exact.whole(t) for t in (box_mid, box_rad, out_mid, out_rad))
        end = np.where(upper_kept.numpy(), m + r, m - r)
        assert (abs(a) <= b)[some].all() and (abs(end - a) <= b)[some].all()
        assert (out_rad <= theirs[1])[torch.from_numpy(some) & theirs[1].isfinite()].all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_mul(backend, dtype):
    a, b = nasty_box(67, 31, dtype=dtype), nasty_box(67, 31, dtype=dtype, seed=3)
    mid, rad = ops.interval_mul(*a, *b, OUTWARD)
    finite = mid.isfinite() & rad.isfinite()
    assert not finite[~torch.stack([t.isfinite() for t in (*a, *b)]).all(0)].any()
    am, ar, bm, br = (exact.whole(t) for t in (*a, *b))
    m, r = (exact.whole(t, 2 * exact.SHIFT[dtype]) for t in (mid, rad))
    ends = np.stack([(am + i * ar) * (bm + j * br) for i in (-1, 1) for j in (-1, 1)])
    assert ((m - r <= ends.min(0)) & (ends.max(0) <= m + r))[finite.numpy()].all()
    theirs = reference.interval_mul(*a, *b, OUTWARD)[1]
    assert (rad <= theirs)[finite & theirs.isfinite()].all()
    zero = (ends == 0).all(0) & finite.numpy()
    assert zero.any() and (mid == 0).numpy()[zero].all() and (rad == 0).numpy()[zero].all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last])
def test_scale_shift(backend, layout, dtype):
    mid, rad = (layout(t) for t in nasty_box(3, 7, 4, 5, dtype=dtype))
    scale, scale_rad = box(7, dtype=dtype, seed=1)
    shift, shift_rad = box(7, dtype=dtype, seed=2)
    scale[0] = shift[0] = scale_rad[0] = shift_rad[0] = 0
    scale[1] = torch.finfo(dtype).smallest_normal
    for arguments in ((scale, shift, scale_rad, shift_rad), (scale, None, None, None), (scale, shift, None, shift_rad)):
        out = ops.interval_scale_shift(mid, rad, *arguments, OUTWARD)
        finite = (out[0].isfinite() & out[1].isfinite()).numpy()
        assert not finite[(~(mid.isfinite() & rad.isfinite())).numpy()].any()
        m, r = exact.whole(mid), exact.whole(rad)
        s, t, sr, tr = (0 if x is None else exact.whole(x).reshape(1, -1, 1, 1) for x in arguments)
        centre, radius = m * s + (t << exact.SHIFT[dtype]), r * abs(s) + sr * (abs(m) + r) + (tr << exact.SHIFT[dtype])
        a, b = (exact.whole(x, 2 * exact.SHIFT[dtype]) for x in out)
        assert (abs(a - centre) + radius <= b)[finite].all()
        theirs = reference.interval_scale_shift(mid, rad, *arguments, OUTWARD)[1]
        assert (out[1] <= theirs)[torch.from_numpy(finite) & theirs.isfinite()].all()
        assert out[0].stride() == mid.stride()
