"""The elementwise kernels agree with the reference to the last bit, in every layout, at every edge."""

import pytest
import torch

from pyxai_bounds import ops
from pyxai_bounds.ops import reference, triton
from tests.ops.cases import (
    LAYOUTS,
    SHAPES,
    assert_identical,
    assert_identical_up_to_zero_sign,
    box,
    nasty_box,
    strided,
)

DTYPES = [torch.float32, torch.float64]
SIZES = [0, 1, 7, 8, 9, 33, 65539]


def assert_agrees(name, *args, same=assert_identical, device):
    actual = getattr(triton, name)(*(a if a is None else a.to(device) for a in args))
    expected = getattr(reference, name)(*args)
    for a, e in zip(actual, expected, strict=True):
        same(a.cpu(), e)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_every_size(kernels, n, dtype):
    mid, rad = nasty_box(n, dtype=dtype)
    grad = nasty_box(n, dtype=dtype, seed=5)
    state = reference.interval_relu(mid, rad)[2]
    any_bits = torch.randint(0, 256, state.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    assert_agrees("interval_relu", mid, rad, device=kernels)
    assert_agrees("interval_relu_backward", *grad, state, device=kernels)
    assert_agrees("interval_relu_backward", *grad, any_bits, device=kernels)  # bits set past the end, too
    assert_agrees("interval_gate", *grad, any_bits, device=kernels)
    assert_agrees("interval_mul", mid, rad, *grad, same=assert_identical_up_to_zero_sign, device=kernels)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_layout(kernels, shape, layout):
    mid, rad = (layout(t) for t in nasty_box(*shape, dtype=torch.float32))
    grad = [layout(t) for t in nasty_box(*shape, dtype=torch.float32, seed=5)]
    scale, shift = nasty_box(shape[1], dtype=torch.float32, seed=2)
    state = reference.interval_relu(mid, rad)[2]
    assert_agrees("interval_relu", mid, rad.contiguous(), device=kernels)  # mid decides the memory order
    assert_agrees("interval_relu_backward", *grad, state, device=kernels)
    assert_agrees("interval_gate", *grad, state, device=kernels)
    assert_agrees("interval_scale_shift", mid, rad, scale, strided(shift), device=kernels)
    assert_agrees("interval_scale_shift", mid, rad, scale, None, device=kernels)
    assert_agrees("interval_mul", mid, rad, *grad, same=assert_identical_up_to_zero_sign, device=kernels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_computed_in_32_and_rounded_once(kernels, dtype):
    mid, rad = box(2, 5, 3, 3, dtype=dtype)
    grad = box(2, 5, 3, 3, dtype=dtype, seed=5)
    scale, shift = box(5, dtype=dtype, seed=2)
    state = reference.interval_relu(mid, rad)[2]
    for name, tensors, rest in [
        ("interval_relu", (mid, rad), ()),
        ("interval_relu_backward", grad, (state,)),
        ("interval_scale_shift", (mid, rad, scale, shift), ()),
        ("interval_mul", (mid, rad, *grad), ()),
    ]:
        actual = getattr(triton, name)(*(t.to(kernels) for t in (*tensors, *rest)))
        expected = getattr(reference, name)(*(t.float() for t in tensors), *rest)
        # The interpreter cuts bfloat16 off where GPUs round it.
        cut = 2.0**-7 if dtype is torch.bfloat16 and kernels == "cpu" else 0.0
        for a, e in zip(actual, expected, strict=True):
            assert torch.allclose(a.cpu(), e.to(a.dtype), rtol=cut, atol=0.0), name


def test_offsets_of_64_bits_are_the_same(kernels, monkeypatch):
    """Past 2³¹ elements the kernels count in 64 bits; here on few."""
    from pyxai_bounds.kernels import interval_relu, launch

    narrow = launch.flat
    monkeypatch.setattr(launch, "flat", lambda n, groups: (narrow(n)[0], narrow(n)[1] | {"WIDE": True}))
    assert narrow(2**31)[1]["WIDE"] and not narrow(2**30)[1]["WIDE"]
    interval_relu._relu.cache_clear()
    assert_agrees("interval_relu", *nasty_box(1003, dtype=torch.float32), device=kernels)
    interval_relu._relu.cache_clear()


def test_bytes_are_counted_where_the_elements_only_just_fit_32_bits(kernels):
    from tests.kernels.probes import bytes_for_kernel

    out = torch.zeros(1, dtype=torch.int32, device=kernels)
    for n in (1, 7, 8, 9, 2**31 - 8, 2**31 - 7, 2**31 - 1):
        bytes_for_kernel[(1,)](out, n)
        assert out.item() == (n + 7) // 8


def test_wrong_arguments_are_refused(kernels):
    mid, rad = (t.to(kernels) for t in box(4, 8, dtype=torch.float32))
    state = ops.interval_relu(mid, rad)[2]
    with pytest.raises(ValueError, match="must agree in shape"):
        triton.interval_relu(mid, rad[:2])
    with pytest.raises(ValueError, match=r"uint8 \[2, 4\]"):
        triton.interval_gate(mid, rad, state[:, :1])
    with pytest.raises(ValueError, match=r"scale needs one torch\.float32 value for each of the 8 channels"):
        triton.interval_scale_shift(mid, rad, mid[0, :3], None)
    weight = mid.new_ones(3, 8)
    with pytest.raises(ValueError, match=r"needs a weight of shape \[3, 8\]"):
        triton.interval_linear(mid, rad, weight.double(), None, False)
    with pytest.raises(ValueError, match="A bias"):
        triton.interval_linear(mid, rad, weight, weight[0], False)
    image = mid.reshape(1, 2, 4, 4)
    with pytest.raises(ValueError, match=r"needs a weight of shape \[3, 2, 1, 8\]"):
        triton.interval_conv2d(image, image, weight.reshape(3, 1, 1, 8), None, [1, 1], [0, 0], [1, 1], 1, False)
    with pytest.raises(ValueError, match=r"must have the shape \[1, 2, 5, 5\]"):
        kernel = mid.new_ones(2, 2, 1, 1)
        triton.interval_conv2d_backward(image, image, kernel, None, [1, 2, 5, 5], [1, 1], [0, 0], [1, 1], 1)
