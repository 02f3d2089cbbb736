"""interval_matmul: Rump's and the exact product of two interval matrices, and the convolutions made of it."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from pyxai_bounds import ops
from pyxai_bounds.ops import native, product, reference

from .cases import DTYPES, LEVELS, box, leaves, level, needs_native, samples, strided, transposed

# m, k, n: ones, odd sizes around the tiles and registers of every level, rank one, several packed blocks of each kind.
SIZES = [
    (1, 1, 1), (3, 5, 7), (4, 1, 32), (5, 2, 33), (17, 33, 65), (2, 300, 3), (37, 64, 1), (1, 40, 50), (40, 3, 15),
    (9, 257, 31),
]  # fmt: skip
EMPTY = [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)]


def factors(m, k, n, dtype=torch.float64, batch=(), seed=0):
    """Two boxes of which about every other entry straddles 0, some with an end point at 0, zeros and points."""
    a, b = box(*batch, m, k, dtype=dtype, seed=seed), box(*batch, k, n, dtype=dtype, seed=seed + 1)
    for mid, rad in (a, b):
        choice = torch.randint(0, 24, mid.shape, generator=torch.Generator().manual_seed(seed + 2))
        rad[choice == 0] = mid.abs()[choice == 0]
        rad[choice == 1] = 0
        mid[choice == 2] = 0
        mid[choice == 3] = -0.0
        mid[choice == 4], rad[choice == 4] = 0, 0
    return *a, *b


def kinds(m, k, n, dtype=torch.float64, batch=()):
    """Factors of every kind that takes a way of its own: straddling, sign-definite (ReLU outputs), points."""
    a_mid, a_rad, b_mid, b_rad = factors(m, k, n, dtype, batch)
    a_upper, b_definite = (a_mid + a_rad).relu() / 2, torch.minimum(b_rad, b_mid.abs())
    zero_a, zero_b = torch.zeros_like(a_rad), torch.zeros_like(b_rad)
    return {
        "straddling": (a_mid, a_rad, b_mid, b_rad),
        "ReLU outputs": (a_upper, a_upper, b_mid, b_rad),
        "definite weights": (a_mid, a_rad, b_mid, b_definite),
        "point a": (a_mid, zero_a, b_mid, b_rad),
        "point b": (a_mid, a_rad, b_mid, zero_b),
        "points": (a_mid, zero_a, b_mid, zero_b),
    }


def four_products(a_mid, a_rad, b_mid, b_rad):
    """The brute force: the least and the greatest of four end-point products for each of the m·k·n pairs."""
    a = [(a_mid + sign * a_rad)[..., :, :, None] for sign in (-1, 1)]
    b = [(b_mid + sign * b_rad)[..., None, :, :] for sign in (-1, 1)]
    products = torch.stack([x * y for x in a for y in b])
    lower, upper = products.amin(0).sum(-2), products.amax(0).sum(-2)
    return (lower + upper) / 2, (upper - lower) / 2


def magnitude(a_mid, a_rad, b_mid, b_rad):
    """E of the error bound, in float64."""
    a_mid, a_rad, b_mid, b_rad = (t.double() for t in (a_mid, a_rad, b_mid, b_rad))
    return (a_mid.abs() + a_rad) @ (b_mid.abs() + b_rad)


def a_priori(k, dtype, extra=0):
    """γ and 2kη of the error bound in reference.py."""
    info = torch.finfo(dtype)
    j = 2 * k + 2 + extra
    return j * info.eps / 2 / (1 - j * info.eps / 2), 2 * k * info.tiny * info.eps


def assert_within_bound(actual, expected, arguments, factor=1.0, extra=0):
    """Both errors within the a-priori bound, times ``factor`` where ``expected`` is rounded, too."""
    gamma, underflow = a_priori(arguments[0].shape[-1], arguments[0].dtype, extra)
    slack = factor * (gamma * magnitude(*arguments) + underflow)
    for x, y in zip(actual, expected, strict=True):
        assert ((x.double() - y.double()).abs() <= slack).all()


# --- values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_exact_is_the_four_product_bound(backend, sizes, dtype):
    for name, arguments in kinds(*sizes, dtype).items():
        expected = four_products(*(t.double() for t in arguments))
        actual = ops.interval_matmul(*arguments, True)
        assert_within_bound(actual, expected, arguments, factor=1.0 if dtype is torch.float32 else 2.0)
        assert (actual[1] >= 0).all(), name


@pytest.mark.parametrize("sizes", SIZES)
def test_rump_is_its_formula(backend, sizes):
    a_mid, a_rad, b_mid, b_rad = factors(*sizes)
    mid, rad = ops.interval_matmul(a_mid, a_rad, b_mid, b_rad, False)
    assert torch.equal(mid, a_mid @ b_mid)
    assert torch.equal(rad, a_mid.abs() @ b_rad + a_rad @ (b_mid.abs() + b_rad))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_exact_lies_in_rump_and_rump_in_three_halves_of_it(backend, sizes, dtype):
    for arguments in kinds(*sizes, dtype).values():
        mid, rad = (t.double() for t in ops.interval_matmul(*arguments, True))
        rump_mid, rump_rad = (t.double() for t in ops.interval_matmul(*arguments, False))
        gamma, underflow = a_priori(sizes[1], dtype)
        slack = 2 * (gamma * magnitude(*arguments) + underflow)
        assert (rad <= rump_rad + slack).all()
        assert ((mid - rump_mid).abs() + rad <= rump_rad + 2 * slack).all()
        assert (rump_rad <= 1.5 * rad + slack).all()


def test_a_factor_without_radius_gives_rumps_result_to_the_last_bit(backend):
    for sizes, dtype in itertools.product(SIZES, DTYPES):
        for name, arguments in kinds(*sizes, dtype).items():
            if "point" in name:
                exact, rump = (ops.interval_matmul(*arguments, exact) for exact in (True, False))
                assert torch.equal(exact[0], rump[0]) and torch.equal(exact[1], rump[1])


@pytest.mark.parametrize("exact", [True, False])
def test_encloses_sampled_and_corner_points(backend, exact):
    a_mid, a_rad, b_mid, b_rad = factors(6, 9, 7)
    mid, rad = ops.interval_matmul(a_mid, a_rad, b_mid, b_rad, exact)
    gamma, _ = a_priori(9, torch.float64)
    slack = 2 * gamma * magnitude(a_mid, a_rad, b_mid, b_rad)
    for x, y in zip(samples(a_mid, a_rad, 40), samples(b_mid, b_rad, 40, seed=1), strict=True):
        assert ((x @ y - mid).abs() <= rad + slack).all()


def rational(t):
    return [[Fraction(x) for x in row] for row in t.double().tolist()]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 3), (3, 4, 2), (2, 9, 2), (2, 40, 17)])
def test_a_priori_bound_in_rational_arithmetic(backend, sizes, dtype, exact):
    """The errors of midpoint and radius, together, and enclosure of the extreme corners with no tolerance at all."""
    m, k, n = sizes
    eps, info = Fraction(1, 2**24 if dtype is torch.float32 else 2**53), torch.finfo(dtype)
    gamma = (2 * k + 2) * eps / (1 - (2 * k + 2) * eps)
    underflow = 4 * k * Fraction(info.tiny) * Fraction(info.eps)
    for seed, scale in itertools.product(range(4), (1.0, math.sqrt(info.tiny))):
        arguments = [t * scale for t in factors(m, k, n, dtype, seed=10 * seed)]
        a_mid, a_rad, b_mid, b_rad = (rational(t) for t in arguments)
        mid, rad = (rational(t) for t in ops.interval_matmul(*arguments, exact))
        for i, j in itertools.product(range(m), range(n)):
            true_mid = true_rad = total = Fraction(0)
            lower = upper = Fraction(0)
            for x in range(k):
                a, r, b, s = a_mid[i][x], a_rad[i][x], b_mid[x][j], b_rad[x][j]
                ends = [(a + p * r) * (b + q * s) for p in (-1, 1) for q in (-1, 1)]
                lower, upper = lower + min(ends), upper + max(ends)
                true_mid += (min(ends) + max(ends)) / 2 if exact else a * b
                true_rad += (max(ends) - min(ends)) / 2 if exact else abs(a) * s + r * (abs(b) + s)
                total += (abs(a) + r) * (abs(b) + s)
            error = gamma * total + underflow
            assert abs(mid[i][j] - true_mid) + abs(rad[i][j] - true_rad) <= error
            assert mid[i][j] - rad[i][j] - error <= lower and upper <= mid[i][j] + rad[i][j] + error


def test_products_of_signs(backend):
    """[1, 2]·[3, 5], [−1, 2]·[3, 5], [−2, −1]·[−1, 1], [−1, 2]·[−3, 1], [0, 2]·[−1, 1] as 1×1 matrices."""
    table = [
        (1, 2, 3, 5, 3, 10),
        (-1, 2, 3, 5, -5, 10),
        (-2, -1, -1, 1, -2, 2),
        (-1, 2, -3, 1, -6, 3),
        (0, 2, -1, 1, -2, 2),
    ]
    for a_lower, a_upper, b_lower, b_upper, lower, upper in table:
        ends = torch.tensor([a_lower, a_upper, b_lower, b_upper], dtype=torch.float64)
        arguments = [(ends[1] + ends[0]) / 2, (ends[1] - ends[0]) / 2, (ends[3] + ends[2]) / 2, (ends[3] - ends[2]) / 2]
        mid, rad = ops.interval_matmul(*(t.reshape(1, 1) for t in arguments), True)
        assert (mid - rad).item() == lower and (mid + rad).item() == upper


def test_what_is_not_finite_never_looks_finite(backend):
    """Each of the four tensors, NaN and infinities, in every kind of product; the other rows stay what they are."""
    for exact, dtype, (m, k, n) in itertools.product([True, False], DTYPES, [(5, 3, 34), (34, 3, 5), (1, 1, 1)]):
        for name, arguments in kinds(m, k, n, dtype).items():
            clean = ops.interval_matmul(*arguments, exact)
            for which, value in itertools.product(range(4), [math.inf, -math.inf, math.nan]):
                if which in (1, 3) and value == -math.inf:
                    continue
                dirty = [t.clone() for t in arguments]
                dirty[which][0, 0] = value
                mid, rad = ops.interval_matmul(*dirty, exact)
                touched = torch.zeros(m, n, dtype=torch.bool)
                touched[(0, slice(None)) if which < 2 else (slice(None), 0)] = True
                assert not (mid.isfinite() & rad.isfinite())[touched].any(), (name, which, value)
                lower, upper = mid - rad, mid + rad
                assert not (lower.isfinite() & upper.isfinite())[touched].any()
                rest = mid[~touched].isfinite() & rad[~touched].isfinite()
                assert rest.all() and torch.allclose(mid[~touched], clean[0][~touched])
            dirty = [t.clone() for t in arguments]
            dirty[1][0, 0] = math.inf
            assert not ops.interval_matmul(*dirty, exact)[1][0].isfinite().any()  # the radius itself


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("sizes", EMPTY)
def test_empty_products(backend, sizes, exact):
    m, k, n = sizes
    inputs = leaves(*factors(m, k, n))
    mid, rad = ops.interval_matmul(*inputs, exact)
    assert mid.shape == rad.shape == (m, n) and not mid.any() and not rad.any()
    for grad in torch.autograd.grad((mid + rad).sum(), inputs):
        assert not grad.any()
    batched = ops.interval_matmul(*(t.expand(2, *t.shape) for t in inputs), exact)
    assert batched[0].shape == (2, m, n) and not batched[1].any()
    none = ops.interval_matmul(*(t.expand(0, *t.shape) for t in inputs), exact)
    assert none[0].shape == (0, m, n)


@pytest.mark.parametrize("exact", [True, False])
def test_a_batch_is_its_products(backend, exact):
    for sizes in [(3, 5, 7), (33, 6, 2), (70, 80, 90)]:
        inputs = leaves(*factors(*sizes, batch=(5,)))
        mid, rad = ops.interval_matmul(*inputs, exact)
        weights = box(*mid.shape, seed=7)
        grads = torch.autograd.grad((mid * weights[0] + rad * weights[1]).sum(), inputs)
        for i in range(5):
            one = leaves(*(t[i] for t in inputs))
            out = ops.interval_matmul(*one, exact)
            one_grads = torch.autograd.grad((out[0] * weights[0][i] + out[1] * weights[1][i]).sum(), one)
            for whole, part in zip((mid, rad, *grads), (*out, *one_grads), strict=True):
                assert torch.allclose(whole[i], part, rtol=1e-12, atol=1e-12)


# --- gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("sizes", [(3, 4, 5), (5, 1, 2), (1, 7, 1)])
def test_gradients(backend, sizes, exact):
    assert torch.autograd.gradcheck(lambda *t: ops.interval_matmul(*t, exact), leaves(*away_from_ties(*sizes)))
    batched = [torch.stack((t, t.flip(-1))) for t in away_from_ties(*sizes)]
    assert torch.autograd.gradcheck(lambda *t: ops.interval_matmul(*t, exact), leaves(*batched))


def away_from_ties(m, k, n):
    """Every kind of entry, none near a kink."""
    a_mid, a_rad, b_mid, b_rad = *box(m, k, seed=3), *box(k, n, seed=4)
    for mid, rad in ((a_mid, a_rad), (b_mid, b_rad)):
        mid += 0.05 * mid.sign()
        rad += 0.05
        close = (mid.abs() - rad).abs() < 0.02
        rad[close] += 0.1
    return a_mid, a_rad, b_mid, b_rad


def test_gradients_of_definite_factors(backend):
    a_mid, a_rad, b_mid, b_rad = away_from_ties(4, 3, 5)
    definite_a = a_mid, 0.7 * torch.minimum(a_rad, a_mid.abs()), b_mid, b_rad
    definite_b = a_mid, a_rad, b_mid, 0.7 * torch.minimum(b_rad, b_mid.abs())
    for arguments in (definite_a, definite_b):
        assert torch.autograd.gradcheck(lambda *t: ops.interval_matmul(*t, True), leaves(*arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_exact_gradients_are_those_of_the_four_products(backend, sizes, dtype):
    """At kinks either side is right, so here there are none: continuous random factors, but for definite ones."""
    m, k, n = sizes
    a, b = box(m, k, dtype=dtype), box(k, n, dtype=dtype, seed=1)
    g, h = (t.double() for t in box(m, n, seed=2))
    relu = (a[0] + a[1]).relu().clamp_min(1e-3) / 2
    for a_mid, a_rad in (a, (relu, 0.9 * relu), (a[0], 0.5 * a[0].abs())):
        inputs = leaves(a_mid, a_rad, *b)
        mid, rad = ops.interval_matmul(*inputs, True)
        actual = torch.autograd.grad((mid * g + rad * h).sum(), inputs)
        inputs = leaves(*(t.double() for t in inputs))
        mid, rad = four_products(*inputs)
        expected = torch.autograd.grad((mid * g + rad * h).sum(), inputs)
        tolerance = 1e-4 if dtype is torch.float32 else 1e-12
        for x, y in zip(actual, expected, strict=True):
            assert torch.allclose(x.double(), y, rtol=tolerance, atol=tolerance * y.abs().max().item())


def test_gradient_of_one_output_alone(backend):
    for exact in (True, False):
        inputs = leaves(*away_from_ties(4, 5, 6))
        mid, rad = ops.interval_matmul(*inputs, exact)
        both = torch.autograd.grad(mid.sum() + rad.sum(), inputs, retain_graph=True)
        apart = [torch.autograd.grad(out.sum(), inputs, retain_graph=True) for out in (mid, rad)]
        for x, y, z in zip(both, *apart, strict=True):
            assert torch.allclose(x, y + z, rtol=1e-12, atol=1e-12)


def test_derivatives_at_kinks_are_one_sided(backend):
    """At a = 0, r > 0 the product is differentiable; at a = r = 0 the midpoint still is."""
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    inputs = leaves(zero, one, 2 * one, one)  # [−1, 1]·[1, 3]: mid = 3a near a = 0 (u·s least is false: r·v = 2 > u·s)
    mid, rad = ops.interval_matmul(*inputs, True)
    assert torch.autograd.grad(mid.sum(), inputs[0], retain_graph=True)[0].item() == 3
    assert torch.autograd.grad(rad.sum(), inputs[0])[0].item() == 0
    inputs = leaves(zero, zero, 2 * one, one)
    grads = torch.autograd.grad(ops.interval_matmul(*inputs, True)[0].sum(), inputs)
    assert grads[0].item() == 2


def test_rump_has_second_derivatives_and_exact_says_that_it_has_none(backend):
    inputs = leaves(*away_from_ties(2, 3, 2))
    assert torch.autograd.gradgradcheck(lambda *t: ops.interval_matmul(*t, False), inputs)
    mid, _ = ops.interval_matmul(*inputs, True)
    (grad,) = torch.autograd.grad(mid.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("exact", [True, False])
def test_operator_passes_opcheck(backend, exact):
    for sizes, batch in [((3, 4, 5), ()), ((20, 4, 3), (2,))]:
        opcheck(torch.ops.pyxai_bounds.interval_matmul.default, (*leaves(*factors(*sizes, batch=batch)), exact))


def test_backward_operator_passes_opcheck(backend):
    arguments = (*box(3, 5, seed=9), *factors(3, 4, 5))
    opcheck(torch.ops.pyxai_bounds.interval_matmul_backward.default, arguments)


# --- the native kernel ----------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("level_name", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [*SIZES, (2051, 3, 17), (3, 2, 1061), (90, 520, 70)])
def test_kernel_agrees_with_the_reference_at_every_level(sizes, dtype, level_name):
    """Two threads where there is enough to do; each within the a-priori bound, so both within twice that."""
    for arguments in kinds(*sizes, dtype).values():
        grads = box(sizes[0], sizes[2], dtype=dtype, seed=8)
        with level(level_name):
            actual = native._matmul(*arguments)
            actual_grads = native.interval_matmul_backward(*grads, *arguments)
        assert_within_bound(actual, reference.interval_matmul(*arguments, True), arguments, factor=2.0)
        expected_grads = reference.interval_matmul_backward(*grads, *arguments)
        tolerance = 1e-4 if dtype is torch.float32 else 1e-12
        for x, y in zip(actual_grads, expected_grads, strict=True):
            assert torch.allclose(x, y, rtol=tolerance, atol=tolerance * y.abs().max().item())


@needs_native
@pytest.mark.parametrize("level_name", LEVELS)
def test_kernel_is_one_at_every_number_of_threads(level_name):
    """Also a batch that is split over threads, and one that is not."""
    for sizes, batch in [((130, 140, 150), ()), ((70, 90, 110), (3,)), ((257, 129, 65), (1,))]:
        arguments = factors(*sizes, torch.float32, batch)
        grads = box(*batch, sizes[0], sizes[2], dtype=torch.float32, seed=8)
        with level(level_name):
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append((*native._matmul(*arguments), *native.interval_matmul_backward(*grads, *arguments)))
        for other in results[1:]:
            for x, y in zip(results[0], other, strict=True):
                assert torch.equal(x, y)


@needs_native
@pytest.mark.parametrize("layout", [strided, transposed])
def test_native_takes_any_layout(layout):
    for batch in [(), (3,)]:
        arguments = factors(5, 6, 40, batch=batch)
        given = leaves(*(layout(t) for t in arguments))
        with ops.backend("native"):
            actual = ops.interval_matmul(*given, True)
            grads = torch.autograd.grad((actual[0] + 2 * actual[1]).sum(), given)
            expected = ops.interval_matmul(*arguments, True)
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
        gradient = torch.ones_like(actual[0])
        expected_grads = reference.interval_matmul_backward(gradient, 2 * gradient, *arguments)
        for x, y in zip(grads, expected_grads, strict=True):
            assert torch.allclose(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("exact", [True, False])
def test_half_precision_runs_on_the_reference(dtype, exact):
    arguments = factors(3, 4, 5, dtype)
    mid, rad = ops.interval_matmul(*arguments, exact)
    assert mid.dtype is rad.dtype is dtype and (rad >= 0).all()
    if exact:
        assert_within_bound((mid, rad), four_products(*(t.double() for t in arguments)), arguments)


def test_refuses_what_cannot_be_multiplied(backend):
    a_mid, a_rad, b_mid, b_rad = factors(3, 4, 5)
    with pytest.raises(ValueError, match=r"\[3, 4\] and \[3, 4\] cannot be multiplied"):
        ops.interval_matmul(a_mid, a_rad, a_mid, a_rad, True)
    with pytest.raises(ValueError, match="must have one shape"):
        ops.interval_matmul(a_mid, a_rad[:2], b_mid, b_rad, True)
    with pytest.raises(ValueError, match="cannot be multiplied"):
        ops.interval_matmul(a_mid[None], a_rad[None], b_mid, b_rad, False)
    with pytest.raises(ValueError, match="agree in dtype"):
        ops.interval_matmul(a_mid, a_rad, b_mid.float(), b_rad.float(), True)


# --- convolutions ---------------------------------------------------------------------------------------------

# input, weight, stride, padding, dilation, groups
CONVOLUTIONS = [
    ((2, 3, 5, 6), (4, 3, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((3, 4, 7, 6), (6, 2, 3, 2), (2, 1), (1, 0), (1, 2), 2),
    ((2, 3, 6, 5), (3, 1, 3, 3), (2, 2), (2, 1), (1, 1), 3),
    ((1, 2, 4, 4), (3, 2, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    ((5, 1, 8, 8), (2, 1, 3, 3), (3, 3), (0, 0), (1, 1), 1),
]


def pairs(input_size, weight_size, stride, padding, dilation, groups):
    """Every (input, weight, output) index of which the convolution has a product, by explicit loops."""
    out = F.conv2d(torch.zeros(input_size), torch.zeros(weight_size), None, stride, padding, dilation, groups)
    per_group = weight_size[0] // groups
    for n, k, y, x in itertools.product(*map(range, out.shape)):
        for c, i, j in itertools.product(*map(range, weight_size[1:])):
            row, column = y * stride[0] - padding[0] + i * dilation[0], x * stride[1] - padding[1] + j * dilation[1]
            if 0 <= row < input_size[2] and 0 <= column < input_size[3]:
                yield (n, k // per_group * weight_size[1] + c, row, column), (k, c, i, j), (n, k, y, x)


def summed_pairs(left, right, indices, out_size, exact):
    """The product of two boxes by explicit loops: indices of the factors and of the sum they belong to."""
    rows = list(indices)
    at_left, at_right, at_out = (tuple(torch.tensor(index).t()) for index in zip(*rows, strict=True))
    a, r, b, s = left[0][at_left], left[1][at_left], right[0][at_right], right[1][at_right]
    if exact:
        ends = torch.stack([(a + p * r) * (b + q * s) for p in (-1, 1) for q in (-1, 1)])
        mids, rads = (ends.amax(0) + ends.amin(0)) / 2, (ends.amax(0) - ends.amin(0)) / 2
    else:
        mids, rads = a * b, a.abs() * s + r * (b.abs() + s)
    zeros = torch.zeros(out_size, dtype=a.dtype)
    return zeros.index_put(at_out, mids, accumulate=True), zeros.index_put(at_out, rads, accumulate=True)


@pytest.mark.parametrize("chunk", [1, 2**22])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_are_their_loops(backend, case, exact, chunk, monkeypatch):
    input_size, weight_size, *geometry, groups = case
    monkeypatch.setattr(product, "CHUNK", chunk)
    loops = list(pairs(*case))
    a, w = box(*input_size), box(*weight_size, seed=1)
    out = product.conv2d_product(*a, *w, *geometry, groups, exact)
    grad = box(*out[0].shape, seed=2)
    expected = summed_pairs(a, w, loops, out[0].shape, exact)
    back = product.conv2d_product_input(*grad, *w, input_size, *geometry, groups, exact)
    expected += summed_pairs(grad, w, [(o, k, i) for i, k, o in loops], input_size, exact)
    weight = product.conv2d_product_weight(*grad, *a, weight_size, *geometry, groups, exact)
    expected += summed_pairs(grad, a, [(o, i, k) for i, k, o in loops], weight_size, exact)
    for x, y in zip((*out, *back, *weight), expected, strict=True):
        assert x.shape == y.shape and torch.allclose(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("exact", [True, False])
def test_gradients_of_convolutions(backend, exact):
    input_size, weight_size, *geometry, groups = (2, 2, 4, 3), (2, 1, 3, 2), (2, 1), (1, 0), (1, 1), 2
    a, w = box(*input_size), box(*weight_size, seed=1)
    grad = box(*product.conv2d_product(*a, *w, *geometry, groups, exact)[0].shape, seed=2)
    rest = (*geometry, groups, exact)
    check = torch.autograd.gradcheck
    assert check(lambda *t: product.conv2d_product(*t, *rest), leaves(*a, *w))
    assert check(lambda *t: product.conv2d_product_input(*t, input_size, *rest), leaves(*grad, *w))
    assert check(lambda *t: product.conv2d_product_weight(*t, weight_size, *rest), leaves(*grad, *a))


def test_convolutions_of_an_empty_batch(backend):
    a, w, grad = box(0, 2, 4, 4), box(3, 2, 3, 3), box(0, 3, 2, 2)
    geometry = ((1, 1), (0, 0), (1, 1), 1, True)
    assert product.conv2d_product(*a, *w, *geometry)[1].shape == (0, 3, 2, 2)
    assert product.conv2d_product_input(*grad, *w, (0, 2, 4, 4), *geometry)[1].shape == (0, 2, 4, 4)
    weight = product.conv2d_product_weight(*grad, *a, (3, 2, 3, 3), *geometry)
    assert weight[0].shape == (3, 2, 3, 3) and not weight[0].any() and not weight[1].any()


def test_convolutions_refuse_sizes_that_do_not_fit():
    a, w = box(2, 3, 5, 5), box(4, 2, 3, 3)
    geometry = ((1, 1), (0, 0), (1, 1), 1, True)
    with pytest.raises(ValueError, match="takes 2 channels"):
        product.conv2d_product(*a, *w, *geometry)
    with pytest.raises(ValueError, match=r"have an output \[2, 4, 3, 3\]"):
        product.conv2d_product_input(*box(2, 4, 3, 4), *box(4, 3, 3, 3), (2, 3, 5, 5), *geometry)
    with pytest.raises(ValueError, match=r"have an output \[2, 4, 3, 3\]"):
        product.conv2d_product_weight(*box(1, 4, 3, 3), *a, (4, 3, 3, 3), *geometry)
