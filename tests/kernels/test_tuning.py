"""Choosing by measurement, and which backend `auto` takes for which tensors; no GPU is needed for either."""

import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pyxai_bounds import ops
from pyxai_bounds.ops import dispatch, native, reference, triton


@pytest.fixture
def tuning(monkeypatch):
    pytest.importorskip("triton")
    found = triton._kernels("tuning")
    monkeypatch.setattr(found, "_chosen", {})
    monkeypatch.setattr(found, "_dropped", [])
    monkeypatch.setattr(found, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Imaginary")
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


def test_a_candidate_that_fails_drops_out_loudly_unless_the_device_is_lost(tuning, monkeypatch):
    failures = {
        "passes": RuntimeError("PassManager::run failed"),
        "ptxas": importlib.import_module("triton.errors").TritonError("ptxas failed"),
        "launch": TypeError("function takes exactly 9 arguments"),
        triton.HOPPER: RuntimeError("cuTensorMapEncodeTiled refused the shape"),
    }

    def run(candidate):
        if candidate in failures:
            raise failures[candidate]

    monkeypatch.setattr(tuning, "_launch_ms", lambda run, candidate: run(candidate) or 0.1)
    monkeypatch.setattr(tuning, "_timed", lambda run, candidate, rounds, launch_ms: 1.0)
    with pytest.warns(RuntimeWarning, match="is not used for x on NVIDIA Imaginary") as warned:
        assert tuning.fastest("x", [*failures, None], run) is None
    assert [str(w.message) for w in warned] == tuning.dropped() and len(warned) == len(failures)
    for failure, message in zip(failures.values(), tuning.dropped(), strict=True):
        assert str(failure) in message and "Please report this" in message
    with (
        pytest.warns(RuntimeWarning, match="refused the shape"),
        pytest.raises(RuntimeError, match="refused") as raised,
    ):
        tuning.fastest("y", [triton.HOPPER], run)  # with nothing in its place
    assert "xb.backend" in raised.value.__notes__[0] and set(tuning.choices()) == {"x"}

    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tuning.fastest("z", [triton.HOPPER, None], run)
    assert len(tuning.dropped()) == len(failures) + 1 and set(tuning.choices()) == {"x"}


# --- what candidates compute --------------------------------------------------------------------------------------


@pytest.fixture
def linear(tuning, monkeypatch):
    """A linear layer whose candidates do what is said by name, and are faster the earlier they are named."""
    made_of = {}

    def write(candidate, results, *out):
        for t, result in zip(out, made_of[candidate](results), strict=False):
            t.copy_(result)

    def box_product_into(mid, rad, weight, bias, out_mid, out_rad, state, block, tf32):
        write(block, REFERENCE(mid, rad, weight, bias, state is not None), out_mid, out_rad, state)

    def relu_into(mid, rad, out_mid, out_rad, state, bias):
        mid = mid if bias is None else mid + bias
        write(None, reference.interval_relu(mid, rad), out_mid, out_rad, state)

    monkeypatch.setattr(triton, "_problems", {})
    monkeypatch.setattr(tuning, "_milliseconds", lambda run, c: run(c) and list(made_of).index(c))
    monkeypatch.setattr(triton._kernels("interval_linear"), "box_product_into", box_product_into)
    monkeypatch.setattr(triton._kernels("interval_relu"), "relu_into", relu_into)
    monkeypatch.setattr(triton._kernels("launch"), "box_blocks", lambda *a: [block for block in made_of if block])
    g = torch.Generator().manual_seed(1)
    sizes = (9, 400), (9, 400), (16, 400), (16,)
    # Quarters: sums are exact, in whatever order, with the bias first or last.
    mid, rad, weight, bias = ((4 * torch.randn(size, generator=g)).round() / 4 for size in sizes)
    return made_of, lambda ops=triton.measured: ops.interval_linear(mid, rad.abs(), weight, bias, True)


REFERENCE = reference.interval_linear


def changed(index, place, change):
    def make(results):
        results[index][place] = change(results[index][place])
        return results

    return make


def stale():
    """Writes only the first time."""
    memory = []
    return lambda results: memory.append([t.clone() for t in results]) or memory[0]


WRONG = {
    "value": (changed(0, (3, 5), lambda t: t + 1), "1 of 144 results are not those of plain PyTorch, by up to 1"),
    "digit": (changed(1, (8, 15), lambda t: t + 2**-10), "1 of 144 results .* by up to 0.000976562"),
    "bit": (changed(2, (1, 7), lambda t: t ^ 16), "1 of 36 bytes of packed signs are not"),
    "NaN": (changed(1, (0, 0), lambda t: t * torch.nan), "1 of 144 results .* by up to nan"),
    "stale": (stale(), "of 144 results"),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("candidates", [["wrong", "right", None], ["right", "wrong", None], ["wrong", None]])
def test_a_candidate_that_computes_something_else_drops_out(linear, tuning, what, candidates):
    made_of, call = linear
    wrong, message = WRONG[what]
    made_of.update({c: wrong if c == "wrong" else lambda results: results for c in candidates})
    with pytest.warns(RuntimeWarning, match=message) as warned:
        found = call()
    assert [str(w.message) for w in warned] == tuning.dropped() and len(warned) == 1
    assert "The kernel wrong is not used for ('linear', torch.Size([9, 400])" in tuning.dropped()[0]
    assert list(tuning.choices().values()) == [c for c in candidates if c != "wrong"][:1]
    for _ in range(3):  # later calls compare nothing
        assert all(torch.equal(a, b) for a, b in zip(found, call(reference), strict=True))
        found = call()


def test_where_nothing_computes_the_right_thing_nothing_is_returned(linear, tuning):
    made_of, call = linear
    made_of.update({"wrong": WRONG["bit"][0], None: WRONG["value"][0]})
    with pytest.warns(RuntimeWarning, match="is not used for"), pytest.raises(RuntimeError, match="packed signs"):
        call()  # the library, too: ReLU follows it as a kernel
    with pytest.warns(RuntimeWarning, match="is not used for"), pytest.raises(RuntimeError, match="packed signs"):
        call(triton)  # without the library there is one candidate
    assert tuning.choices() == {} and len(tuning.dropped()) == 3
    made_of["wrong"] = lambda results: results
    assert all(torch.equal(a, b) for a, b in zip(call(triton), call(reference), strict=True))


def test_a_library_that_does_not_sum_products_as_they_are_is_still_one(linear, tuning, monkeypatch):
    """What Winograd makes of whole numbers is not quite whole; kernels are compared with what it stands for."""

    def almost(*args):
        mid, rad, state = REFERENCE(*args)
        return mid + 1e-3, rad - 1e-3, state

    monkeypatch.setattr(reference, "interval_linear", almost)
    made_of, call = linear
    made_of.update({None: lambda results: results, "right": lambda results: results})
    call()
    assert list(tuning.choices().values()) == [None] and tuning.dropped() == []
    made_of["wrong"] = WRONG["digit"][0]
    tuning._chosen.clear()
    triton._problems.clear()
    with pytest.warns(RuntimeWarning, match="The kernel wrong is not used"):
        call()
    assert len(tuning.dropped()) == 1


def test_where_memory_does_not_suffice_for_a_trial_the_library_is_taken(linear, tuning, monkeypatch):
    def full(*args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    made_of, call = linear
    made_of.update({"kernel": lambda results: results, None: lambda results: results})
    monkeypatch.setattr(triton, "_whole_numbers", full)
    assert all(torch.equal(a, b) for a, b in zip(call(), call(reference), strict=True))
    assert list(tuning.choices().values()) == [None]
    with pytest.raises(torch.cuda.OutOfMemoryError):
        call(triton)


def test_a_trial_that_cannot_be_held_costs_no_candidate(linear, tuning, monkeypatch):
    def broken(*args):
        raise TypeError("bernoulli_ knows no such dtype")

    made_of, call = linear
    made_of.update({"kernel": lambda results: results, None: lambda results: results})
    monkeypatch.setattr(triton, "_whole_numbers", broken)
    with pytest.warns(RuntimeWarning, match="No trial of (kernel|None): bernoulli_"):
        assert all(torch.equal(a, b) for a, b in zip(call(), call(reference), strict=True))
    assert tuning.dropped() == []


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
    assert dispatch.select(on_gpu) is triton.measured and ops.has_kernels(on_gpu)
    assert dispatch.select(torch.empty(4)) is native
    token = dispatch._forced.set("triton")
    assert dispatch.select(on_gpu) is triton
    dispatch._forced.reset(token)
    with ops.backend("reference"):
        assert dispatch.select(on_gpu) is reference
    monkeypatch.setattr(triton, "_is_capable", lambda index: False)
    assert dispatch.select(on_gpu) is reference


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
