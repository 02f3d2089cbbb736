"""The max-pool kernels agree with the reference to the last bit, the sign of a zero apart; so do gradients."""

import pytest
import torch

import pyxai_bounds as xb
from pyxai_bounds import ops
from pyxai_bounds.ops import reference, triton
from pyxai_bounds.ops.windows import Windows, pack_positions
from tests.ops.cases import assert_identical_up_to_zero_sign, box, channels_last, leaves, nasty_box
from tests.ops.test_interval_max_pool2d import CASES, boxes, pair

LAYOUTS = [torch.clone, channels_last]


def on(device, *tensors):
    return tuple(t.to(device) for t in tensors)


def assert_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert_identical_up_to_zero_sign(a.cpu(), e)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [box, nasty_box])
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_are_the_reference(kernels, case, make, dtype, layout):
    image, grad = boxes(case, dtype, layout, make)
    geometry = case[1:5]
    pooled = triton.interval_max_pool2d(*on(kernels, *image), *case[1:])
    assert_same(pooled, reference.interval_max_pool2d(*image, *case[1:]))
    expected, bits = pair(reference, image, grad, case)
    actual, found = pair(triton, on(kernels, *image), on(kernels, *grad), case)
    assert_same(actual, expected)
    there = Windows(image[0], grad[0].shape[2:], *geometry).unfold(torch.ones_like(image[0]), 0.0) != 0
    inside = pack_positions(there, grad[0].shape)
    assert all(torch.equal(a.cpu() & inside, e & inside) for a, e in zip(found, bits, strict=True))
    if make is box:
        back = [layout(t) for t in box(*image[0].shape, dtype=dtype, seed=7)]
        actual = triton.interval_max_pool2d_gather(*on(kernels, *back, *grad, *bits), *geometry)
        budget = 2 ** (-20 if dtype is torch.float32 else -48)  # sums over a window, in another order
        for a, e in zip(actual, reference.interval_max_pool2d_gather(*back, *grad, *bits, *geometry), strict=True):
            assert torch.allclose(a.cpu(), e, rtol=budget, atol=budget) and a.stride() == e.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_computed_in_32(kernels, dtype):
    image, grad = boxes(CASES[1], dtype, channels_last)
    actual, bits = pair(triton, on(kernels, *image), on(kernels, *grad), CASES[1])
    expected, exact = pair(reference, [t.float() for t in image], [t.float() for t in grad], CASES[1])
    cut = 2.0**-7 if dtype is torch.bfloat16 else 2.0**-10
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype is dtype and torch.allclose(a.cpu().float(), e, rtol=cut, atol=cut)
    assert all(torch.equal(a.cpu(), e) for a, e in zip(bits, exact, strict=True))


@pytest.mark.parametrize("case", CASES[:4])
def test_gradients(device, case):
    found = {}
    for name, where in (("triton", device), ("reference", "cpu")):
        image, grad = boxes(case)
        inputs = leaves(*on(where, *image, *grad))
        with ops.backend(name):
            out = ops.interval_max_pool2d(*inputs[:2], *case[1:])
            back = pair(ops, inputs[:2], inputs[2:], case)[0]
            losses = [(t * box(*t.shape, seed=9)[0].to(where)).sum() for t in (*out, *back)]
        found[name] = torch.autograd.grad(losses, inputs)
    for a, e in zip(found["triton"], found["reference"], strict=True):
        assert torch.allclose(a.cpu(), e, rtol=1e-12, atol=1e-12)


def test_a_program_uses_the_pair_where_there_are_kernels_and_only_there(device):
    def program(backend, where):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(3, 2, 1), torch.nn.Flatten(),
            torch.nn.Linear(64, 3),
        )  # fmt: skip
        model = model.double().to(where)
        x = box(2, 2, 8, 8)[0].to(where)
        bounded = xb.bound(xb.explain.gradient(model))
        interval, target = xb.Interval.linf(x, 0.01), torch.tensor([0, 2], device=where)
        with ops.backend(backend):
            out = bounded(interval, target)
            (out.rad.square().sum() + out.mid.square().sum()).backward()
            names = {str(node.target) for node in bounded.graph(interval, target).graph.nodes}
        grads = [p.grad.cpu() for p in model.parameters() if p.grad is not None]
        return [out.mid.cpu(), out.rad.cpu(), *grads], any("interval_max_pool2d" in name for name in names)

    actual, fused = program("triton", device)
    expected, plain = program("reference", "cpu")
    assert fused and not plain
    for a, e in zip(actual, expected, strict=True):
        assert torch.allclose(a, e, rtol=1e-10, atol=1e-12)


def test_wrong_arguments_are_refused(kernels):
    image, grad = boxes(CASES[0])
    bits = reference.interval_first_maximum(*image, list(grad[0].shape[2:]), *CASES[0][1:5])
    for wrong in ((bits[0][:, :1], bits[1]), (bits[0], bits[1].long())):
        with pytest.raises(ValueError, match="not the bits of windows"):
            triton.interval_max_pool2d_gather(*on(kernels, *image, *grad, *wrong), *CASES[0][1:5])
        with pytest.raises(ValueError, match="not the bits of windows"):
            triton.interval_max_pool2d_backward(*on(kernels, *grad, *wrong), [6, 7], *CASES[0][1:5])
