"""Bounds under torch.compile: the program is one graph, and its values and gradients are the same."""

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyxai_bounds as xb
from bench import measure, models
from tests.ops.cases import needs_native

pytestmark = pytest.mark.filterwarnings("ignore:Input Tensor . did not already require gradients")

NETWORKS: dict[str, Callable[[], nn.Sequential]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 9), nn.SiLU(), nn.Linear(9, 3)),
    "cnn": lambda: nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3),
    ),
}  # fmt: skip


def step(name: str, backend: str, compiler: str | None) -> list[Tensor]:
    """One step of training on the width of the gradient's bounds: the loss and all gradients."""
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    x = torch.rand((4, 12) if name == "mlp" else (4, 2, 8, 8))
    target = torch.tensor([0, 2, 1, 0])
    bounded = xb.bound(xb.explain.gradient(model))
    box = xb.Interval.linf(x, 0.02)
    with xb.backend(backend):
        program: Callable = bounded.graph(box, target)
        if compiler is not None:
            torch._dynamo.reset()
            program = torch.compile(program, fullgraph=True, backend=compiler)
        mid, rad = program(box.mid, box.rad, target)
        loss = F.cross_entropy(model(x), target) + rad.square().mean() + (mid.abs() * rad).sum()
        loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    "name, backend, compiler",
    [
        ("mlp", "reference", "aot_eager"),
        ("cnn", "reference", "aot_eager"),
        pytest.param("cnn", "native", "aot_eager", marks=needs_native),
        pytest.param("mlp", "native", "inductor", marks=needs_native),  # once: a cold start compiles C++ for long
    ],
)
def test_the_gradients_of_a_compiled_step_are_the_same(name, backend, compiler):
    expected = step(name, backend, None)
    actual = step(name, backend, compiler)
    assert len(actual) == len(expected) == 1 + len(list(NETWORKS[name]().parameters()))
    assert all(bool(e.any()) for e in expected)
    for a, e in zip(actual, expected, strict=True):
        assert torch.allclose(a, e, rtol=1e-4, atol=1e-5 * e.abs().max().item())


def test_a_program_without_gradients_compiles_and_returns_the_bounds():
    model = NETWORKS["cnn"]().eval()
    bounded = xb.bound(xb.explain.gradient(model))
    box, target = xb.Interval.linf(torch.rand(4, 2, 8, 8), 0.02), torch.tensor([0, 2, 1, 0])
    torch._dynamo.reset()
    with torch.no_grad():
        program = bounded.graph(box, target)
        mid, rad = torch.compile(program, fullgraph=True, backend="aot_eager")(box.mid, box.rad, target)
        out = bounded(box, target)
    assert not program.graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled)
    assert bounded.graph(box, target).graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled)
    assert torch.allclose(mid, out.mid) and torch.allclose(rad, out.rad)


def test_the_compiled_contenders_of_the_benchmarks_agree(monkeypatch):
    """Built as a user would: the box outside, the program and the loss compiled as one graph, with gradients and
    without; so is a recorded step in pieces, or with the network alone compiled."""
    case = measure.make_case("small", models.n4, 2, measure.IMAGE)
    make = functools.partial(torch.compile, dynamic=False, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(measure, "_compiled", make)
    torch._dynamo.reset()
    found = measure.outcome(case, measure.compiled_engine(case, "channels-last"))
    case.model.zero_grad()
    expected = measure.outcome(case, measure.engine(case, "channels-last", "auto"))
    assert max(measure.disagreement(found, expected).values()) < 1e-5
    recorded = [
        measure.compiled_engine(case, "channels-last", graphed=True, pieces=2),
        measure.engine(case, "channels-last", "auto", graphed=True, compiled=True, pieces=2),
    ]
    for one in recorded:
        found = measure.outcome(case, replace(one, bounds=lambda: (expected["mid"][0], expected["rad"][0])))
        assert max(measure.disagreement(found, expected).values()) < 1e-5
    with pytest.raises(ValueError, match="2 samples make no 3 equal pieces"):
        measure.compiled_engine(case, "channels-last", graphed=True, pieces=3)
