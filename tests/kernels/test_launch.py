"""What is remembered between launches: neither another alignment, type, order or value nor another choice is missed."""

import pytest
import torch

from pyxai_bounds import ops
from pyxai_bounds.ops import reference, triton
from tests.ops.cases import box, channels_last


@pytest.fixture
def launched():
    """A launch of a kernel that notes how it was reached: (by whom, tensors, other arguments)."""
    pytest.importorskip("triton")
    launch = triton._kernels("launch")
    calls = []

    class Compiled(launch.CompiledKernel):
        def __init__(self):
            self.module = None  # nothing to unload

        def __getitem__(self, grid):
            return lambda *args: calls.append(("directly", grid, args[:2], args[2:]))

    class Kernel:
        arg_names = ("x_ptr", "y_ptr", "n", "FLAG", "BLOCK")

        def __getitem__(self, grid):
            def run(*args, **constants):
                calls.append(("by triton", grid, args[:2], (args[2:], constants)))
                return Compiled()

            return run

    return launch.Launch(Kernel(), (7,), (5,), BLOCK=64, num_warps=4, FLAG=True), calls


def unaligned(dtype=torch.float32):
    found = torch.zeros(9, dtype=dtype)[1:]
    assert found.data_ptr() % 16
    return found


def test_only_tensors_like_the_first_are_launched_directly(launched):
    launch, calls = launched
    x, y = torch.zeros(8), torch.zeros(8)
    for tensors in ((x, y), (x, y), (torch.ones(8), y), (x, unaligned()), (unaligned(), y), (x, y.half()), (y, x)):
        launch(*tensors)
        assert all(a is b for a, b in zip(calls[-1][2], tensors, strict=True))
    directly = [kind == "directly" for kind, *_ in calls]
    assert directly == [False, True, True, False, False, False, False]  # the last: Triton was asked for other types
    launch(x, y)
    assert calls[-1] == ("directly", (7, 1, 1), calls[-1][2], (5, True, 64))  # constants in the kernel's order
    assert calls[0][3] == ((5,), {"BLOCK": 64, "num_warps": 4, "FLAG": True})


def test_what_was_compiled_for_other_addresses_is_not_kept(launched):
    launch, calls = launched
    for _ in range(2):
        launch(unaligned(), torch.zeros(8))
    launch(torch.zeros(8), torch.zeros(8))
    assert [kind for kind, *_ in calls] == ["by triton"] * 3
    launch(torch.zeros(8), torch.zeros(8))
    assert calls[-1][0] == "directly"


def test_wrong_numbers_of_tensors_are_refused(launched):
    launch, _ = launched
    x = torch.zeros(8)
    launch(x, x)
    with pytest.raises(ValueError, match="zip"):
        launch(x)


def test_candidates_are_listed_and_measured_once(monkeypatch):
    pytest.importorskip("triton")
    tuning, launch = triton._kernels("tuning"), triton._kernels("launch")
    listed, measured, capturing = [], [], [True]
    blocks = launch.box_blocks
    monkeypatch.setattr(triton, "_problems", {})
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(tuning, "_milliseconds", lambda run, c: measured.append(c) or float(c is not None))
    monkeypatch.setattr(launch, "box_blocks", lambda *a: listed.append(a) or [*blocks(*a), "another"])
    monkeypatch.setattr(triton._kernels("interval_linear"), "box_product_into", lambda *a: None)
    mid, rad, weight = torch.randn(4, 8), torch.rand(4, 8), torch.randn(6, 8)
    for _ in range(2):  # unmeasured, which is not remembered
        triton.measured.interval_linear(mid, rad, weight, None, False)
    assert len(listed) == 2 and not measured
    capturing[0] = False
    expected = reference.interval_linear(mid, rad, weight, None, False)
    for _ in range(3):
        found = triton.measured.interval_linear(mid, rad, weight, None, False)
        assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))
    assert len(listed) == 3 and measured[-1] is None and len(set(measured)) == len(measured)
    triton.measured.interval_linear(mid, rad, torch.randn(8, 6).t(), None, False)
    assert len(listed) == 4  # of a transposed weight
    with pytest.raises(ValueError, match="needs a weight"):
        triton.measured.interval_linear(mid, rad, weight.double(), None, False)


def test_calls_of_one_shape_that_differ_otherwise(kernels):
    """Strides, types, values changed in place or replaced, and other backends in between."""
    args = ([1, 1], [1, 1], [1, 1], 1)
    weight, bias = box(16, 8, 3, 3, seed=2)[0], box(16, seed=3)[0]
    mid, rad = box(2, 8, 5, 6)
    wide = torch.zeros(2, 8, 5, 12, dtype=mid.dtype)
    wide[..., ::2] = mid

    def check(mid, rad, weight, bias):
        there = [t.to(kernels) for t in (weight, bias)]
        boxes = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=kernels).copy_(t) for t in (mid, rad)]
        expected = reference.interval_conv2d(*(t.double() for t in (mid, rad, weight, bias)), *args, False)
        found = ops.interval_conv2d(*boxes, *there, *args, False)
        with ops.backend("reference"):
            plain = ops.interval_conv2d(*boxes, *there, *args, False)
        again = ops.interval_conv2d(*boxes, *there, *args, False)
        tolerance = {"rtol": 1e-3, "atol": 1e-3} if mid.dtype is torch.float32 else {"rtol": 1e-11, "atol": 1e-11}
        for a, p, b, e in zip(found[:2], plain[:2], again[:2], expected[:2], strict=True):
            assert torch.equal(a, b) and torch.allclose(a.cpu().double(), e, **tolerance)
            assert torch.allclose(p.cpu().double(), e, **tolerance)

    check(mid, rad, weight, bias)
    check(wide[..., ::2], rad, weight, bias)
    check(channels_last(mid), rad, channels_last(weight), bias)
    check(mid.float(), rad.float(), weight.float(), bias.float())
    weight.mul_(-2)
    weight.data.add_(1)
    bias.zero_()
    check(mid, rad, weight, bias)
    weight.data = weight.data.flip(0).contiguous()
    check(mid, rad, weight, bias)
