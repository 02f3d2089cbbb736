"""Programs recorded as CUDA graphs: when they are recorded, what a recording may assume, and that it changes nothing.

Without a GPU, torch.cuda is imitated: what is done while "recording" is noted below autograd, and replaying does it
again on the very tensors, wherever the parameters lie by then.
"""

import contextlib
import types

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

import pyxai_bounds as xb
from pyxai_bounds import ops
from pyxai_bounds.ops import replay, triton

pytestmark = pytest.mark.filterwarnings("ignore:Input Tensor . did not already require gradients")


class Recording(TorchDispatchMode):
    """Stands for a CUDA graph: refuses what looks at values, remembers the rest with the memory that it touches."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if torch.Tag.data_dependent_output in function.tags:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = function(*args, **(kwargs or {}))
        lying = tree_map_only(torch.Tensor, lambda t: t.data, (args, kwargs or {}))
        self.done.append((function, *lying, out))
        return out

    def replay(self):
        for function, args, kwargs, out in self.done:
            again = function(*args, **kwargs)
            for old, new in zip(tree_flatten(out)[0], tree_flatten(again)[0], strict=True):
                if isinstance(old, torch.Tensor) and old.numel() and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def device(monkeypatch):
    """A GPU if there is one; else the CPU, passed off as one."""
    if torch.cuda.is_available():
        if "triton" in ops.available():  # the library, which is there without being compiled
            monkeypatch.setattr(triton._kernels("tuning"), "fastest", lambda key, candidates, run: candidates[-1])
        # Results are compared to the last bit, and some of cuDNN's algorithms add in whatever order they come.
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
        yield "cuda"
        return
    nothing = types.SimpleNamespace(wait_stream=lambda other: None, record=lambda: None, wait=lambda: None)
    imitations = {
        "CUDAGraph": Recording,
        "Stream": lambda: nothing,
        "Event": lambda: nothing,
        "current_stream": lambda: nothing,
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "graph": lambda graph, stream, capture_error_mode: graph,
        "is_current_stream_capturing": lambda: False,
    }
    for name, imitation in imitations.items():
        monkeypatch.setattr(torch.cuda, name, imitation)
    monkeypatch.setattr(replay, "_on_gpu", lambda t: True)
    monkeypatch.setattr(xb.program.Program, "_without_grad", without_grad_as_on_a_gpu)
    yield "cpu"


def without_grad_as_on_a_gpu(program, tensors):
    with torch.no_grad():
        return program._on_gpu(tensors)


@pytest.fixture
def recorded(monkeypatch):
    """The recordings that were made."""
    found = []

    class Noted(replay.Replay):
        def __init__(self, *args):
            super().__init__(*args)
            found.append(self)

    monkeypatch.setattr(replay, "Replay", Noted)
    return found


def case(device, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 3)
    ).eval()
    x = torch.rand(4, 2, 8, 8)
    return model.to(device), x.to(device), torch.tensor([0, 1, 2, 1], device=device)


def plainly(monkeypatch, bounded, *args):
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setenv("PYXAI_BOUNDS_CUDA_GRAPHS", "0")
        return bounded(*args)


def same(a, b):
    return torch.equal(a.mid, b.mid) and torch.equal(a.rad, b.rad)


@pytest.mark.parametrize("sound", [False, True])
def test_replayed_bounds_are_the_bounds(device, recorded, monkeypatch, sound):
    model, x, target = case(device)
    bounded = xb.bound(xb.explain.gradient(model), sound=sound)
    with torch.no_grad():
        for k in range(4):
            box = xb.Interval.linf(x + 0.1 * k, 0.01)
            labels = (target + k) % 3
            out = bounded(box, labels)
            assert len(recorded) == (k > 0)
            expected = plainly(monkeypatch, bounded, box, labels)
            assert same(out, expected)
        assert len(recorded) == 1
        box = xb.Interval.linf(x[:2], 0.01)  # another shape is another program
        for _ in range(2):
            out = bounded(box, target[:2])
        assert len(recorded) == 2 and same(out, plainly(monkeypatch, bounded, box, target[:2]))


def test_results_stay_when_the_graph_runs_again(device, recorded):
    model, x, target = case(device)
    bounded = xb.bound(xb.explain.gradient(model))
    with torch.no_grad():
        bounded(xb.Interval.linf(x, 0.01), target)
        first = bounded(xb.Interval.linf(x, 0.01), target)
        kept = first.rad.clone()
        bounded(xb.Interval.linf(x, 0.2), target)
    assert len(recorded) == 1 and torch.equal(first.rad, kept)


def test_live_parameters_are_read_and_moved_ones_recorded_again(device, recorded, monkeypatch):
    model, x, target = case(device)
    bounded = xb.bound(xb.explain.gradient(model))
    box = xb.Interval.linf(x, 0.01)
    with torch.no_grad():
        for _ in range(2):
            before = bounded(box, target)
        model[0].weight.mul_(1.5)  # where it lies: the graph sees it
        model[1].running_var.add_(0.5)
        out = bounded(box, target)
        assert len(recorded) == 1 and not torch.allclose(out.rad, before.rad)
        assert same(out, plainly(monkeypatch, bounded, box, target))
        old = model[5].weight.data  # alive, so that its memory is not given out again
        model[5].weight.data = old * 2
        for times in (1, 2, 2):
            out = bounded(box, target)
            assert same(out, plainly(monkeypatch, bounded, box, target)) and len(recorded) == times
        for _ in range(3):  # moved before every call: not worth recording
            old, model[5].weight.data = model[5].weight.data, model[5].weight.data + 1
            assert same(bounded(box, target), plainly(monkeypatch, bounded, box, target))
    assert len(recorded) == 2


def test_another_backend_or_arithmetic_is_another_recording(device, recorded):
    model, x, target = case(device)
    bounded = xb.bound(xb.explain.gradient(model))
    box = xb.Interval.linf(x, 0.01)
    before = torch.backends.cudnn.conv.fp32_precision
    with torch.no_grad():
        for _ in range(2):
            bounded(box, target)
        with ops.backend("reference"):
            bounded(box, target)
            assert len(recorded) == 1
            bounded(box, target)
        assert len(recorded) == 2
        bounded(box, target)
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        try:
            bounded(box, target)
            assert len(recorded) == 2
        finally:
            torch.backends.cudnn.conv.fp32_precision = before


def test_targets_are_still_checked(device, recorded):
    model, x, target = case(device)
    bounded = xb.bound(xb.explain.gradient(model))
    box = xb.Interval.linf(x, 0.01)
    with torch.no_grad():
        for _ in range(2):
            bounded(box, target)
        with pytest.raises(ValueError, match=r"target\[0\] = 9 is out of range"):
            bounded(box, torch.full_like(target, 9))
    assert len(recorded) == 1


def test_nothing_is_recorded_with_gradients_by_request_or_if_too_large(device, recorded, monkeypatch):
    model, x, target = case(device)
    bounded = xb.bound(xb.explain.gradient(model))
    box = xb.Interval.linf(x, 0.01)
    for _ in range(3):
        assert bounded(box, target).rad.requires_grad
        plainly(monkeypatch, bounded, box, target)
    monkeypatch.setattr(replay, "LARGEST", 1000)
    large = xb.bound(xb.explain.gradient(case(device, seed=1)[0]))
    with torch.no_grad():
        for _ in range(3):
            large(box, target)
    assert recorded == []


def test_a_program_that_cannot_be_recorded_runs_as_it_is(device, monkeypatch):
    def refuse(*args):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    model, x, target = case(device)
    bounded = xb.bound(xb.explain.gradient(model))
    box = xb.Interval.linf(x, 0.01)
    monkeypatch.setattr(replay, "Replay", refuse)
    with torch.no_grad():
        expected = bounded(box, target)
        with pytest.warns(RuntimeWarning, match="not permitted when stream is capturing\\)"):
            assert same(bounded(box, target), expected)
        assert same(bounded(box, target), expected)  # and says so once


def test_numbers_on_the_cpu_and_looks_at_values_are_not_recorded(device, recorded, monkeypatch):
    constant = torch.full((), 2.0)
    x = torch.rand(3, 4, device=device)
    if device == "cpu":
        monkeypatch.setattr(replay, "_on_gpu", lambda t: t is not constant)
    functions = [lambda t: t * constant]
    weight = torch.rand(4, 4, device=device)
    box = xb.parameter_box(model := nn.Linear(4, 2).to(device), absolute=0.1)
    bounds = [xb.bound(functions[0]), xb.bound(model, parameters=box, product="exact")]
    with torch.no_grad():
        for bounded in bounds:
            for _ in range(3):
                bounded(xb.Interval.linf(x, 0.1))
        assert recorded == []
        for _ in range(2):
            xb.bound(model)(xb.Interval.linf(x @ weight, 0.1))
    assert len(recorded) == 1


def test_expanded_arguments_keep_their_layout(device, recorded, monkeypatch):
    model, x, target = case(device)
    bounded = xb.bound(xb.explain.gradient(model))
    rad = torch.full((1, 1, 1, 1), 0.01, device=device).expand(x.shape)
    box = xb.Interval.of(x, rad)
    with torch.no_grad():
        for _ in range(3):
            out = bounded(box, target)
    assert len(recorded) == 1 and recorded[0]._graph.inputs[1].stride() == (0, 0, 0, 0)
    assert same(out, plainly(monkeypatch, bounded, box, target))


def test_a_replay_takes_what_it_was_recorded_for(device):
    x = torch.rand(3, 4, device=device)
    double = replay.Replay(lambda t: (t * 2,), [x])
    assert torch.equal(double(x + 1)[0], (x + 1) * 2)
    with pytest.raises(ValueError, match=r"Recorded for torch\.float32 \[3, 4\]"):
        double(x[:2])
    with pytest.raises(ValueError, match="Only work on CUDA tensors"):
        replay.Replay(lambda: (), [])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams of a GPU")
def test_calls_on_several_streams_wait_for_one_another():
    model, x, target = case("cuda")
    bounded = xb.bound(xb.explain.gradient(model))
    boxes = [xb.Interval.linf(x, 0.01 * (k + 1)) for k in range(8)]
    with torch.no_grad():
        expected = [bounded(boxes[0], target), *(bounded(box, target) for box in boxes)][1:]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in boxes]
        found = []
        for box, stream in zip(boxes, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(bounded(box, target))
        torch.cuda.synchronize()
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
