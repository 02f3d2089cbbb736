"""The cuda backend as a whole: when it is chosen, what it says where it cannot run, and sound programs on it."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import pyxai_bounds as xb
from pyxai_bounds import ops
from pyxai_bounds.ops import cuda, dispatch, native, reference
from pyxai_bounds.rounding import Rounding
from tests.ops.cases import assert_identical, box, nasty_box

on_a_gpu = pytest.mark.skipif(not cuda.available(), reason=cuda.why_not_available() or "it is available")


def network(dtype: torch.dtype) -> nn.Sequential:
    """Strides, groups, batch norm, ReLU, a linear head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 9, 12), nn.ReLU(), nn.Linear(12, 4),
    ).eval().to(dtype)  # fmt: skip


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-2])
def test_sound_programs(kernels, eps):
    """float32 bounds of outputs and of a gradient hold what float64 computes, and are as narrow as the reference's."""
    model = network(torch.float32)
    wide = copy.deepcopy(model).double()
    x = torch.rand(2, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    target = torch.tensor([1, 3])
    widths = {}
    for name in ("cuda", "reference"):
        with xb.backend(name):
            input_box = xb.Interval.linf(x, eps)
            bounds = [
                xb.bound(model, sound=True)(input_box),
                xb.bound(xb.explain.gradient(model), sound=True)(input_box, target),
            ]
        widths[name] = [b.width.detach().double().sum() for b in bounds]
        for seed in range(10):
            t = 2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1
            point = (input_box.mid.double() + input_box.rad.double() * (t.sign() if seed % 2 else t)).requires_grad_()
            logits = wide(point)
            (gradient,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), point)
            for b, value in zip(bounds, (logits, gradient), strict=True):
                assert (b.lower.double() <= value).all() and (value <= b.upper.double()).all()
    for ours, theirs in zip(widths["cuda"], widths["reference"], strict=True):
        assert 0 < ours <= theirs * (1 + 1e-4)


@on_a_gpu
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_sound_programs_on_the_gpu(order):
    """Tensors there from the box to the bounds, large enough for every way to allocate: the emulator knows the CPU."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16 * 16, 10),
    ).eval()  # fmt: skip
    x, target = torch.rand(16, 3, 32, 32).contiguous(memory_format=order), torch.arange(16) % 10
    exact = copy.deepcopy(model).double()
    model = model.cuda().to(memory_format=order)
    bound = xb.bound(xb.explain.gradient(model), sound=True)
    with xb.backend("cuda"):
        bounds = [bound(xb.Interval.linf(x.cuda(), 1 / 255), target.cuda()) for _ in range(3)]
    with xb.backend("reference"):
        theirs = bound(xb.Interval.linf(x.cuda(), 1 / 255), target.cuda())
    for ours in bounds:
        assert ours.mid.is_cuda and ours.rad.is_cuda
        assert ours.width.double().sum() <= theirs.width.double().sum() * (1 + 1e-4)
        for seed in range(4):
            noise = 2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) - 1
            point = (x + noise / 256).double().requires_grad_()
            (gradient,) = torch.autograd.grad(exact(point).gather(1, target[:, None]).sum(), point)
            assert (ours.lower.double().cpu() <= gradient).all() and (gradient <= ours.upper.double().cpu()).all()


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_results_are_where_the_arguments_are(monkeypatch, order):
    """Allocation alone, on a device that computes nothing; large, where the CPU's backend would take its own memory."""
    monkeypatch.setattr(cuda, "_run", lambda name, mid, *args: None)
    mid = torch.empty(64, 64, 32, 32, device="meta").contiguous(memory_format=order)
    weight = torch.empty(64, 64, 3, 3, device="meta")
    args = ([1, 1], [1, 1], [1, 1], 1)
    image, rad, state = cuda.interval_conv2d(mid, mid, weight, None, *args, True, Rounding.OUTWARD)
    results = [
        image, rad, state,
        *cuda.interval_relu(mid, mid, Rounding.OUTWARD),
        *cuda.interval_relu_backward(image, rad, state, Rounding.OUTWARD),
        *cuda.interval_conv2d_backward(image, rad, weight, state, list(mid.shape), *args, Rounding.OUTWARD),
        *cuda.interval_scale_shift(mid, mid, weight.new_empty(64), None, None, None, Rounding.OUTWARD),
        *cuda.interval_mul(mid, mid, mid, mid, Rounding.OUTWARD),
    ]  # fmt: skip
    assert all(result.is_meta for result in results)


@pytest.mark.parametrize("sound", [False, True])
def test_exact_products_of_programs(kernels, sound):
    """Boxes of inputs and of parameters meet in the exact product, in float64 when sound."""
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    x = torch.rand(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parameters = xb.parameter_box(model, relative=0.05, absolute=0.01)
    seen, results = [], {}
    run = cuda._run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_run", lambda name, *args: (seen.append(name), run(name, *args)))
        for name in ("cuda", "reference"):
            with xb.backend(name):
                bounded = xb.bound(model, parameters=parameters, product="exact", sound=sound)
                results[name] = bounded(xb.Interval.linf(x, 0.1))
                results[name].rad.sum().backward()
                results[name + " gradients"] = [p.grad.clone() for p in model.parameters()]
                model.zero_grad()
    assert {"matmul", "matmul_backward"} <= set(seen)
    assert torch.allclose(results["cuda"].mid, results["reference"].mid, rtol=1e-12, atol=1e-12)
    assert torch.allclose(results["cuda"].rad, results["reference"].rad, rtol=1e-12, atol=1e-12)
    for x, y in zip(results["cuda gradients"], results["reference gradients"], strict=True):
        assert torch.allclose(x, y, rtol=1e-10, atol=1e-10)


def test_what_it_lacks_is_the_references(backend):
    """Rounding to nearest, float32 evaluations, and operators without a kernel."""
    mid, rad, w = *box(3, 4), box(5, 4, seed=2)[0]
    for rounding in (Rounding.NEAREST, Rounding.EVALUATED):
        for name, arguments in (
            ("linear", (mid, rad, w, None, True)),
            ("relu", (mid, rad)),
            ("mul", (mid, rad, mid, rad)),
        ):
            if (name, rounding) == ("relu", Rounding.EVALUATED):
                continue  # what a ReLU rounds does not depend on it
            actual = getattr(ops, f"interval_{name}")(*arguments, int(rounding))
            expected = getattr(reference, f"interval_{name}")(*arguments, int(rounding))
            for x, y in zip(actual, expected, strict=True):
                assert_identical(x, y)
    bits = ops.interval_relu(mid, rad)[2]
    for x, y in zip(ops.interval_gate(mid, rad, bits), reference.interval_gate(mid, rad, bits), strict=True):
        assert_identical(x, y)
    assert not ops.has_kernels(mid)


def test_proofs_on_a_gpu_get_it_and_nobody_else_who_does_not_ask(monkeypatch):
    monkeypatch.setattr(cuda, "available", lambda: True)
    monkeypatch.setattr(cuda, "supports", lambda mid: mid.is_cuda)
    with FakeTensorMode():
        on_gpu = torch.empty(4, device="cuda")
    assert dispatch.select_outward(on_gpu) is cuda and dispatch.select(on_gpu) is not cuda
    assert dispatch.select_outward(torch.empty(4)) is native
    for other in ("reference", "native"):
        with xb.backend(other):
            assert dispatch.select_outward(on_gpu) is reference
    with xb.backend("cuda"):
        assert dispatch.select_outward(on_gpu) is cuda and dispatch.select(on_gpu) is cuda


def test_says_why_it_cannot_run(monkeypatch):
    class Module:
        pass

    class Built:
        def cuda_check(self, device):
            raise RuntimeError("no kernel image is available for execution on the device")

    cuda._what_is_wrong.cache_clear()
    monkeypatch.setattr(native, "_native", Module())
    assert "built without it" in cuda.why_not_available() and not cuda.supports(torch.empty(1))
    with pytest.raises(RuntimeError, match=r"PYXAI_BOUNDS_CUDA=ON"), xb.backend("cuda"):
        pass
    with pytest.raises(RuntimeError, match=r"built without it"):
        cuda._module()
    monkeypatch.setattr(native, "_native", Built())
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in cuda.why_not_available()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in cuda.why_not_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda index: pytest.MonkeyPatch.context())
    assert "no kernel image is available" in cuda.why_not_available() and not cuda.available()
    assert not cuda.supports(torch.empty(1))
    cuda._what_is_wrong.cache_clear()


def test_a_launch_that_fails_raises_what_cuda_says(kernels, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("an error on a device may be the end of its context")
    monkeypatch.setattr(cuda, "_current_stream", lambda mid: contextlib.nullcontext((7, 0)))
    with pytest.raises(RuntimeError, match=r"kernel of relu was not launched: invalid device ordinal\."):
        cuda.interval_relu(*box(9), int(Rounding.OUTWARD))


# --- on a GPU alone ------------------------------------------------------------------------------------------


def everything(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """A result of every kernel, of numbers of every kind."""
    outward = int(Rounding.OUTWARD)

    def there(*tensors: torch.Tensor) -> list[torch.Tensor]:
        return [t.to(device) for t in tensors]

    image, other = there(*nasty_box(3, 6, 9, 8, dtype=dtype)), there(*nasty_box(3, 6, 9, 8, dtype=dtype, seed=2))
    smooth = there(*box(3, 6, 9, 8, dtype=dtype, seed=3))
    w, bias, _ = there(box(10, 3, 3, 2, dtype=dtype, seed=4)[0], *box(10, dtype=dtype, seed=5))
    args = ([2, 1], [1, 1], [1, 2], 2)
    out = cuda.interval_conv2d(*smooth, w, bias, *args, True, outward)
    gradient = there(*box(*out[0].shape, dtype=dtype, seed=6))
    factors = there(*box(70, 50, dtype=dtype, seed=7), *box(50, 66, dtype=dtype, seed=8))
    grads = there(*box(70, 66, dtype=dtype, seed=9))
    channels = there(*box(6, dtype=dtype, seed=10), *box(6, dtype=dtype, seed=11))
    return [
        *out,
        *cuda.interval_conv2d_backward(*gradient, w, out[2], image[0].shape, *args, outward),
        *cuda.interval_linear(*factors[:2], factors[2].t(), None, False, outward)[:2],
        *cuda.interval_linear_backward(*factors[:2], factors[2], None, outward),
        *cuda.interval_relu(*image, outward),
        *cuda.interval_relu_backward(*other, cuda.interval_relu(*image, outward)[2], outward),
        *cuda.interval_mul(*image, *other, outward),
        *cuda.interval_scale_shift(*image, channels[0], channels[2], channels[1], channels[3], outward),
        *cuda.interval_matmul(*factors, True),
        *cuda.interval_matmul_backward(*grads, *factors),
    ]


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gpu_computes_the_bits_of_the_emulator(emulator, dtype, monkeypatch):
    """So all that is shown of the emulated kernels holds on it."""
    actual = everything("cuda", dtype)
    monkeypatch.setattr(cuda, "_module", lambda: emulator)
    monkeypatch.setattr(cuda, "_current_stream", lambda mid: contextlib.nullcontext((0, 0)))
    for x, y in zip(actual, everything("cpu", dtype), strict=True):
        assert_identical(x.cpu(), y)


@on_a_gpu
def test_runs_on_the_current_stream_and_in_a_graph():
    """What is recorded in a CUDA graph computes from what lies in its inputs when it is replayed."""
    mid, rad = (t.cuda() for t in box(64, 300, dtype=torch.float32))
    w = box(100, 300, dtype=torch.float32, seed=2)[0].cuda()
    a, b = (t.cuda() for t in box(300, 40, dtype=torch.float32, seed=4))

    def run():
        linear = cuda.interval_linear(mid, rad, w, None, True, int(Rounding.OUTWARD))
        return *linear, *cuda.interval_matmul(mid, rad, a, b, True)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run()
    mid.mul_(-0.5)
    graph.replay()
    for x, y in zip(recorded, run(), strict=True):
        assert torch.equal(x, y)
