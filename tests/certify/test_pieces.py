"""Pieces of a batch: the memory that a program says it takes, and how many samples therefore run at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._C._profiler import _EventType

import pyxai_bounds as xb
from pyxai_bounds import program
from pyxai_bounds.certify import pieces
from pyxai_bounds.certify.pieces import Pieces
from pyxai_bounds.ops import native
from tests.networks import images, mlp, residual

TARGET = torch.arange(12) % 3
CPU = torch.device("cpu")


def measured_peak(call: Callable[[], object]) -> int:
    """Bytes that PyTorch's allocator gave out at once, at most, during a call; the result included."""
    kept = []
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        kept.append(call())
    found: list[tuple[int, int]] = []
    pending = list(profile.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.alloc_size))
    now = peak = 0
    for _, size in sorted(found, key=lambda entry: entry[0]):
        now += size
        peak = max(peak, now)
    return peak


def smooth() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.GELU(), nn.MaxPool2d(2), nn.Conv2d(16, 16, 3), nn.Tanh(), nn.Flatten(),
        nn.Linear(16 * 14 * 14, 10),
    )  # fmt: skip


def deep() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 15 * 15, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


FUNCTIONS = {
    "gradient": lambda: xb.explain.gradient(deep()),
    "gradient of the loss": lambda: xb.explain.gradient(deep(), of="loss"),
    "integrated gradients": lambda: xb.explain.integrated_gradients(deep(), steps=4),
    "smooth": lambda: xb.explain.gradient(smooth(), of="probability"),
    "logits": lambda: lambda x, y: deep_model(x) + y.sum() * 0,
}
deep_model = deep()


@pytest.mark.parametrize("sound", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_estimate_is_near_what_the_allocator_sees(name: str, sound: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "TILED", ())  # whose scratch memory, no more than the estimate's, no profiler sees
    bounded = xb.bound(FUNCTIONS[name](), sound=sound)
    x = torch.rand(24, 3, 32, 32)
    arguments = xb.Interval.linf(x, 1e-3), torch.arange(24) % 10
    with torch.no_grad():
        for _ in range(2):
            bounded(*arguments)
        measured = measured_peak(lambda: bounded(*arguments))
    estimated = bounded.peak_bytes(*arguments)
    assert measured / 1.6 < estimated < 1.6 * measured


def test_the_estimate_grows_in_proportion_to_the_batch() -> None:
    bounded = xb.bound(xb.explain.gradient(deep_model))
    few, more, most = (
        bounded.peak_bytes(xb.Interval.point(torch.rand(n, 3, 32, 32)), torch.zeros(n, dtype=torch.long))
        for n in (10, 20, 40)
    )
    assert most - more == pytest.approx(2 * (more - few), rel=0.01)


def test_a_small_budget_gives_more_pieces_and_the_same_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = residual(), images(12)
    fn = xb.explain.gradient(model)
    options = dict(eps=0.001, property=xb.TopK(5), clip=(0.0, 1.0), sound=False, sharpen=False)
    run: list[int] = []
    real = program.BoundFunction.__call__

    def counted(self, box, *rest):
        run.append(len(box))
        return real(self, box, *rest)

    monkeypatch.setattr(program.BoundFunction, "__call__", counted)
    whole = xb.certify(fn, x, TARGET, **options)
    assert run == [12]
    need = xb.bound(fn).peak_bytes(xb.Interval.point(x), TARGET)
    for budget, most in ((need // 2, 6), (need // 4, 3), (1, 1)):
        run.clear()
        part = xb.certify(fn, x, TARGET, memory_budget=budget, **options)
        assert max(run) <= most and len(set(run)) == 1 and sum(run) >= 12
        size = run[0]
        taken = xb.bound(fn).peak_bytes(xb.Interval.point(x[:size]), TARGET[:size])
        assert taken <= budget or size == 1
        assert torch.equal(part.holds, whole.holds)
        assert torch.allclose(part.margin, whole.margin) and torch.allclose(part.bounds.rad, whole.bounds.rad)
    radii = [
        xb.certified_radius(
            fn, x, TARGET, property=xb.TopK(5), max_eps=0.01, sound=False, tol=1e-3, memory_budget=budget
        )
        for budget in (None, need // 3)
    ]
    assert torch.equal(*radii)


def test_a_batch_that_fits_is_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    real = program.Program.__init__
    monkeypatch.setattr(program.Program, "__init__", lambda self, *args: built.append(1) or real(self, *args))
    x = images(5, shape=(6,))
    xb.certify(xb.explain.gradient(mlp()), x, TARGET[:5], eps=0.01, property=xb.TopK(2), sharpen=False)
    assert len(built) == 1


def test_sizes() -> None:
    def peak(size: int) -> int:
        asked.append(size)
        return 1000 + 10 * size

    for samples, budget, expected, questions in (
        (100, 2000, 100, 1),  # all at once
        (100, 1999, 50, 2),
        (100, 1345, 34, 2),
        (100, 1010, 1, 3),
        (100, 500, 1, 3),  # not even one fits
        (1, 1, 1, 0),
        (0, 1, 1, 0),
    ):
        asked: list[int] = []
        assert Pieces(None, budget).size(samples, 1, peak, CPU) == expected
        assert len(asked) <= questions + 1
    assert Pieces(30, None).size(100, 1, peak, CPU) == 25  # 4 equal pieces
    assert Pieces(256, None).size(5, 1, peak, CPU) == 5


def test_the_default_is_positive_and_never_more_than_a_quarter_of_what_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert 0 < pieces.default_budget(CPU) <= 64 << 20
    monkeypatch.setattr(pieces, "_available", lambda: 4000)
    assert pieces.default_budget(CPU) == 1000


@pytest.mark.parametrize(
    "options, error, says",
    [
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"memory_budget": -5}, ValueError, "memory_budget must be at least 1, got -5"),
        ({"memory_budget": 1e9}, TypeError, "whole number of bytes"),
        ({"batch_size": True}, TypeError, "whole number of samples"),
        ({"batch_size": 2, "memory_budget": 100}, ValueError, "give one of them"),
    ],
)
def test_nonsense_is_refused(options: dict, error: type[Exception], says: str) -> None:
    x = images(2, shape=(6,))
    with pytest.raises(error, match=says):
        xb.certify(mlp(), x, eps=0.1, property=xb.TopK(1), **options)
    with pytest.raises(error, match=says):
        xb.certified_radius(mlp(), x, property=xb.TopK(1), max_eps=0.1, **options)


def test_a_training_step_takes_the_memory_of_a_piece_and_of_one_term() -> None:
    layers = [layer for _ in range(6) for layer in (nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *layers, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(256, 10))
    x, target, eps = torch.rand(16, 3, 16, 16), torch.arange(16) % 10, torch.tensor(1e-3)

    def cross_entropy(x: torch.Tensor, y: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(model(x), y)

    def width(x: torch.Tensor, y: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        return xb.train.explanation_width(model, x, y, eps)

    def loss(*given: torch.Tensor) -> torch.Tensor:
        return cross_entropy(*given) + width(*given)

    peaks = []
    for terms, count in ((loss, 1), ([cross_entropy, width], 1), ([cross_entropy, width], 4)):
        step = xb.train.GraphedStep(terms, model.parameters(), count)
        with xb.backend("reference"):  # whose memory the profiler sees
            for _ in range(2):
                step(x, target, eps)
            model.zero_grad()
            peaks.append(measured_peak(lambda step=step: step(x, target, eps)))  # type: ignore[misc]
    assert peaks[1] < 0.9 * peaks[0] and peaks[2] < 0.3 * peaks[1]
