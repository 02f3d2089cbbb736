"""The fused max-pool pair against the rule that it stands for: values, bits and gradients."""

import pytest
import torch

from pyxai_bounds import ops
from pyxai_bounds.interval import Interval
from pyxai_bounds.ops import reference
from pyxai_bounds.ops.windows import unpack_positions
from pyxai_bounds.rules import RULES
from tests.ops.cases import assert_identical, box, channels_last, leaves, nasty_box

aten = torch.ops.aten
# shape, kernel, stride, padding, dilation, ceil_mode
CASES = [
    ((2, 3, 6, 7), [2, 2], [2, 2], [0, 0], [1, 1], False),
    ((1, 4, 7, 8), [3, 2], [2, 1], [1, 1], [1, 1], False),
    ((2, 1, 9, 9), [3, 3], [2, 2], [1, 1], [2, 2], False),
    ((2, 5, 7, 5), [3, 3], [2, 2], [1, 0], [1, 1], True),
    ((1, 9, 8, 8), [4, 4], [4, 4], [0, 0], [1, 1], False),
    ((3, 2, 5, 5), [2, 2], [3, 3], [0, 0], [1, 1], False),  # between the windows lies what gets nothing
    ((0, 2, 4, 4), [2, 2], [2, 2], [0, 0], [1, 1], False),
]


def boxes(case, dtype=torch.float64, layout=torch.clone, make=box):
    shape = case[0]
    image = [layout(t) for t in make(*shape, dtype=dtype)]
    # Values that repeat: ties within a window are what the rule is about.
    image[0] = (image[0] * 2).round() / 2
    size = aten.max_pool2d_with_indices(image[0], *case[1:])[0].shape
    return image, [layout(t) for t in make(*size, dtype=dtype, seed=5)]


def pair(backend, image, grad, case):
    """What the windows send to the image, and by which bits."""
    bits = backend.interval_first_maximum(*image, list(grad[0].shape[2:]), *case[1:5])
    return backend.interval_max_pool2d_backward(*grad, *bits, list(image[0].shape[2:]), *case[1:5]), bits


def by_rule(case, image, grad):
    _, kernel, stride, padding, dilation, ceil_mode = case
    x = Interval.of(*image)
    out = RULES[aten.max_pool2d_with_indices.default].function(x, kernel, stride, padding, dilation, ceil_mode)[0]
    rule = RULES[aten.max_pool2d_with_indices_backward.default].function
    back = rule(Interval.of(*grad), x, kernel, stride, padding, dilation, ceil_mode, None)
    return (out.mid, out.rad), (back.mid, back.rad)


@pytest.mark.parametrize("layout", [torch.clone, channels_last])
@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_the_rule(case, layout):
    image, grad = boxes(case, layout=layout)
    out, back = by_rule(case, image, grad)
    for a, e in zip(reference.interval_max_pool2d(*image, *case[1:]), out, strict=True):
        assert torch.equal(a, e)
    for a, e in zip(pair(reference, image, grad, case)[0], back, strict=True):
        assert torch.equal(a, e) and a.stride() == image[0].stride()


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_rules(case):
    image, grad = boxes(case)
    expected, actual = [], []
    inputs = leaves(*image, *grad)
    out, back = by_rule(case, inputs[:2], inputs[2:])
    weights = [box(*t.shape, seed=9)[0] for t in (*out, *back)]
    expected = torch.autograd.grad([(t * w).sum() for t, w in zip((*out, *back), weights, strict=True)], inputs)
    inputs = leaves(*image, *grad)
    out = ops.interval_max_pool2d(*inputs[:2], *case[1:])
    back = pair(ops, inputs[:2], inputs[2:], case)[0]
    losses = [(t * w).sum() for t, w in zip((*out, *back), weights, strict=True)]
    actual = torch.autograd.grad(losses, inputs)
    for a, e in zip(actual, expected, strict=True):
        assert torch.allclose(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES[:6])
def test_second_derivatives(case):
    image, grad = boxes(case)
    bits = reference.interval_first_maximum(*image, list(grad[0].shape[2:]), *case[1:5])
    size, inputs = list(case[0][2:]), leaves(*grad)
    assert torch.autograd.gradgradcheck(
        lambda *box: ops.interval_max_pool2d_backward(*box, *bits, size, *case[1:5]), inputs
    )


def test_bits_name_the_elements():
    mid = torch.tensor([[1.0, 1.0], [0.0, 5.0]]).reshape(1, 1, 2, 2)
    geometry = ([2, 2], [2, 2], [0, 0], [1, 1])
    for rad, must, may in [(0.0, [3], [3]), (2.0, [], [0, 1, 3]), (9.0, [], [0, 1, 2, 3])]:
        bits = reference.interval_first_maximum(mid, torch.full_like(mid, rad), [1, 1], *geometry)
        found = [unpack_positions(b, 4).flatten().nonzero().flatten().tolist() for b in bits]
        assert found == [must, may]


@pytest.mark.parametrize("case", CASES[:4])
def test_opcheck(case):
    image, grad = boxes(case)
    torch.library.opcheck(ops.interval_max_pool2d, (*leaves(*image), *case[1:]))
    size = list(grad[0].shape[2:])
    torch.library.opcheck(ops.interval_first_maximum, (*leaves(*image), size, *case[1:5]))
    bits = ops.interval_first_maximum(*image, size, *case[1:5])
    args = (*leaves(*grad), *bits, list(case[0][2:]), *case[1:5])
    torch.library.opcheck(ops.interval_max_pool2d_backward, args)


def test_rounding_and_infinities_do_not_hide_the_maximum():
    """NaN and infinite ends: an element that may be the maximum is never left out."""
    image = nasty_box(1, 4, 6, 6)
    image = [image[0], image[1].abs()]
    may = reference.interval_first_maximum(*image, [3, 3], [2, 2], [2, 2], [0, 0], [1, 1])[1]
    assert (may != 0).all()
    out = reference.interval_max_pool2d(*image, [2, 2], [2, 2], [0, 0], [1, 1], False)
    lower = aten.max_pool2d_with_indices(image[0] - image[1], [2, 2])[0]
    upper = aten.max_pool2d_with_indices(image[0] + image[1], [2, 2])[0]
    assert_identical(out[0], (lower + upper) * 0.5)
