"""The exact product of two boxes: what tests/ops asks of every backend, and the reference's own gradient."""

import pytest
import torch

from pyxai_bounds import ops
from pyxai_bounds.ops import reference
from tests.ops.cases import DTYPES, assert_identical_up_to_zero_sign, box, nasty_box, strided, transposed
from tests.ops.test_interval_matmul import (  # noqa: F401  (collected here, and run on the kernels)
    EMPTY,
    SIZES,
    assert_within_bound,
    kinds,
    test_a_batch_is_its_products,
    test_a_priori_bound_in_rational_arithmetic,
    test_backward_operator_passes_opcheck,
    test_derivatives_at_kinks_are_one_sided,
    test_empty_products,
    test_encloses_sampled_and_corner_points,
    test_exact_gradients_are_those_of_the_four_products,
    test_exact_is_the_four_product_bound,
    test_exact_lies_in_rump_and_rump_in_three_halves_of_it,
    test_gradient_of_one_output_alone,
    test_gradients_of_definite_factors,
    test_operator_passes_opcheck,
    test_products_of_signs,
    test_refuses_what_cannot_be_multiplied,
    test_what_is_not_finite_never_looks_finite,
)

LARGER = [(70, 20, 66), (33, 9, 130)]  # more than one tile of rows and of columns for every kernel and type


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [*SIZES, *LARGER, *EMPTY])
def test_values_and_gradients_are_those_of_the_reference(backend, sizes, dtype):
    m, _, n = sizes
    for name, arguments in kinds(*sizes, dtype).items():
        wide = [t.double() for t in arguments]
        grads = box(m, n, dtype=dtype, seed=9)
        if dtype is torch.float32:
            assert_within_bound(
                ops.interval_matmul(*arguments, True), reference.interval_matmul(*wide, True), arguments
            )
        actual = ops.interval_matmul_backward(*grads, *arguments)
        expected = reference.interval_matmul_backward(*(t.double() for t in grads), *wide)
        # Sums of at most four products a pair of entries, each of a gradient and a factor.
        size, (a, b) = sum(t.double().abs() for t in grads), (sum(t.abs() for t in wide[i : i + 2]) for i in (0, 2))
        gamma = 2 * (4 * max(sizes) + 4) * torch.finfo(dtype).eps / 2
        for x, y, most in zip(actual, expected, (size @ b.mT,) * 2 + (a.mT @ size,) * 2, strict=True):
            assert ((x.double() - y).abs() <= gamma * 2 * most).all(), name


@pytest.mark.parametrize("layout", [strided, transposed])
def test_any_layout(backend, layout):
    arguments = kinds(5, 6, 7)["straddling"]
    grads = box(5, 7, seed=3)
    for operator, first in ((ops.interval_matmul, ()), (ops.interval_matmul_backward, grads)):
        last = (True,) if not first else ()
        expected = operator(*first, *arguments, *last)
        actual = operator(*(layout(t) for t in (*first, *arguments)), *last)
        for x, y in zip(actual, expected, strict=True):
            assert_identical_up_to_zero_sign(x, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_radius_looks_finite_where_an_entry_is_not(backend, dtype):
    """Not even where the midpoint alone would say so."""
    a, b = nasty_box(40, 1, dtype=dtype), nasty_box(1, 40, dtype=dtype, seed=3)
    odd_a, odd_b = (~(mid.isfinite() & rad.isfinite()) for mid, rad in (a, b))
    assert odd_a.any() and odd_b.any()
    _, rad = ops.interval_matmul(*a, *b, True)
    assert not rad.isfinite()[odd_a | odd_b].any()
