"""Choosing by measurement, and which backend `auto` takes for which tensors; no GPU is needed for either."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pyxai_bounds import ops
from pyxai_bounds.ops import native, reference, triton


@pytest.fixture
def tuning(monkeypatch):
    pytest.importorskip("triton")
    found = triton._kernels("tuning")
    monkeypatch.setattr(found, "_chosen", {})
    monkeypatch.setattr(found, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return found


def test_the_fastest_is_measured_once_for_each_key(tuning, monkeypatch):
    times = {"a": 3.0, "b": 1.0, "c": 2.0}
    measured = []
    monkeypatch.setattr(tuning, "_milliseconds", lambda run, c: measured.append(c) or run(c))
    assert tuning.fastest("x", list(times), times.get) == "b" and measured == ["a", "b", "c"]
    times["a"] = 0.5
    assert tuning.fastest("x", list(times), times.get) == "b" and len(measured) == 3
    assert tuning.fastest("y", list(times), times.get) == "a" and tuning.choices() == {"x": "b", "y": "a"}
    assert tuning.fastest("z", ["only"], times.get) == "only" and len(measured) == 6


def test_a_candidate_too_large_for_the_device_drops_out(tuning, monkeypatch):
    def run(candidate):
        if candidate == "large":
            raise tuning.OutOfResources(10**6, 10**5, "shared memory")

    monkeypatch.setattr(tuning, "_launch_ms", lambda run, candidate: run(candidate) or 0.1)
    monkeypatch.setattr(tuning, "_timed", lambda run, candidate, rounds, launch_ms: 1.0)
    assert tuning.fastest("x", ["large", "small"], run) == "small"


def test_a_candidate_that_does_not_compile_drops_out_loudly(tuning, monkeypatch):
    failures = {"passes": RuntimeError("PassManager::run failed"), "ptxas": tuning.TritonError("ptxas failed")}

    def run(candidate):
        if candidate in failures:
            raise failures[candidate]

    monkeypatch.setattr(tuning, "_launch_ms", lambda run, candidate: run(candidate) or 0.1)
    monkeypatch.setattr(tuning, "_timed", lambda run, candidate, rounds, launch_ms: 1.0)
    with pytest.warns(RuntimeWarning, match="could not compile"):
        assert tuning.fastest("x", ["passes", "ptxas", "library"], run) == "library"
    failures["crash"] = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tuning.fastest("y", ["crash", "library"], run)


def test_nothing_is_measured_while_a_graph_is_captured(tuning, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.fastest("x", ["default", "other"], None) == "default" and tuning.choices() == {}


def test_auto_takes_the_kernels_for_tensors_on_a_gpu(monkeypatch):
    with FakeTensorMode():
        on_gpu = torch.empty(4, device="cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(triton, "_is_installed", lambda: True)
    monkeypatch.setattr(triton, "_interpreting", lambda: False)
    monkeypatch.setattr(triton, "_is_capable", lambda index: True)
    assert ops._select(on_gpu) is triton.measured and ops.has_kernels(on_gpu)
    assert ops._select(torch.empty(4)) is native
    token = ops._forced.set("triton")
    assert ops._select(on_gpu) is triton
    ops._forced.reset(token)
    with ops.backend("reference"):
        assert ops._select(on_gpu) is reference
    monkeypatch.setattr(triton, "_is_capable", lambda index: False)
    assert ops._select(on_gpu) is reference


def test_measured_offers_the_library_and_triton_does_not(monkeypatch):
    seen = []

    def fastest(key, candidates, run):
        seen.append(candidates)
        return None  # the library

    pytest.importorskip("triton")
    monkeypatch.setattr(triton._kernels("tuning"), "fastest", fastest)
    mid, rad, weight = torch.randn(4, 8), torch.rand(4, 8), torch.randn(6, 8)
    out = triton.measured.interval_linear(mid, rad, weight, None, False)
    expected = reference.interval_linear(mid, rad, weight, None, False)
    assert all(torch.equal(a, e) for a, e in zip(out, expected, strict=True))
    image = torch.randn(2, 8, 5, 5)
    args = ([1, 1], [1, 1], [1, 1], 1)
    kernel = torch.randn(8, 8, 3, 3)
    for name, arguments in [
        ("interval_linear_backward", (torch.randn(4, 6), torch.rand(4, 6), weight, None)),
        ("interval_linear_weight", (torch.randn(4, 6), torch.rand(4, 6), mid, rad, weight)),
        ("interval_conv2d", (image, image.abs(), kernel, None, *args, False)),
        ("interval_conv2d_backward", (image, image.abs(), kernel, None, [2, 8, 5, 5], *args)),
        ("interval_conv2d_backward_relu", (image, image.abs(), kernel, None, [2, 8, 5, 5], *args)),
        ("interval_conv2d_weight", (image, image.abs(), image, image.abs(), kernel, *args)),
    ]:
        actual, expected = (getattr(module, name)(*arguments) for module in (triton.measured, reference))
        for a, e in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (actual, expected)), strict=True):
            assert torch.equal(a, e), name
    assert all(candidates[-1] is None for candidates in seen)
    seen.clear()
    monkeypatch.setattr(triton._kernels("tuning"), "fastest", lambda key, found, run: seen.append(found) or None)
    triton.interval_linear(mid, rad, weight, None, False)
    assert None not in seen[0]


def test_why_not_available_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(triton, "_interpreting", lambda: False)
    if torch.version.cuda is None:
        assert "without CUDA" in triton.why_not_available() and "TRITON_INTERPRET" in triton.why_not_available()
        with pytest.raises(RuntimeError, match="triton backend is not available"), ops.backend("triton"):
            pass
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in triton.why_not_available()
    monkeypatch.setattr(triton, "_is_installed", lambda: False)
    assert "pip install triton" in triton.why_not_available() and "triton" not in ops.available()
