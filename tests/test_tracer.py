"""The tracer notes what ``make_fx`` notes: the same operators, at tensors of the same shapes, strides and dtypes."""

from __future__ import annotations

import gc
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from pyxai_bounds import tracer
from pyxai_bounds.decompose import DECOMPOSED
from tests.networks import images

WEIGHT = nn.Parameter(torch.ones(4, 6))
SCALES = torch.tensor([1.0, 2.0, 3.0, 4.0])


def layers(x: Tensor) -> list[Tensor]:
    for _ in range(3):
        x = F.layer_norm(F.gelu(F.linear(F.linear(x, WEIGHT), WEIGHT.t())), (6,))
    return [x]


def gradient(x: Tensor) -> list[Tensor]:
    x = x.requires_grad_()
    y = F.max_pool1d(F.linear(x, WEIGHT).softmax(-1).unsqueeze(1), 2).squeeze(1)
    return [*torch.autograd.grad(y[:, 0].sum(), x), y.detach()]


def views_written_into(x: Tensor) -> list[Tensor]:
    y = x.clone()
    y[:, 1:3] *= 2
    y.view(-1)[0] = 1.0
    y.t()[2].add_(y[:, 0].mean())
    y.transpose_(0, 1)
    return [y + 1, y.expand(2, *y.shape)[1]]


def several_results(x: Tensor) -> list[Tensor]:
    values, places = x.sort(1)
    first, *_, last = x.split(2, 1)
    return [values, places, first * last, *torch.var_mean(x, 1), x[:, 5:].squeeze(1)]


def constants(x: Tensor) -> list[Tensor]:
    half = torch.tensor(0.5)
    y = x[:, :4] * SCALES * half.item() + half.add_(1)
    return [torch.where(y > 0, y, torch.full_like(y, -torch.inf)), torch.zeros_like(y), torch.arange(3) + y[0, 0]]


def complex_numbers(x: Tensor) -> list[Tensor]:
    z = torch.fft.rfft(x)
    return [(z * z.conj()).real, torch.fft.irfft(z, n=6), z.conj().imag]


def replaced(x: Tensor) -> list[Tensor]:
    return [torch.addr(x[:4, :4], SCALES, SCALES), F.smooth_l1_loss(x, 2 * x), torch.cdist(x, x + 1)]


def channels_last(x: Tensor) -> list[Tensor]:
    image = x.reshape(1, 2, 3, -1).contiguous(memory_format=torch.channels_last)
    y = F.conv2d(image, torch.ones(2, 2, 1, 1))
    return [y * y, y.flatten(1), y.mean((2, 3))]


@pytest.mark.parametrize(
    "program",
    [layers, gradient, views_written_into, several_results, constants, complex_numbers, replaced, channels_last],
)
def test_the_graph_is_that_of_make_fx(program: Callable[[Tensor], list[Tensor]]) -> None:
    x = images(5, shape=(6,)).float()
    expected = make_fx(lambda x: program(x), DECOMPOSED, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    for functional in (False, True):
        if functional and program is views_written_into:
            continue
        found = tracer.trace(program, [x], DECOMPOSED, functional=functional)
        assert described(found) == described(expected)
        for ours, theirs in zip(found(x.clone()), expected(x.clone()), strict=True):
            assert torch.equal(ours, theirs)


def described(module: fx.GraphModule) -> list[tuple]:
    """Each operator with its arguments, and what the graph shows of its results."""
    numbers: dict[fx.Node, Any] = {}
    found = []
    for node in module.graph.nodes:
        if node.op == "get_attr":  # make_fx has a node for each use
            value = operator.attrgetter(node.target)(module)
            numbers[node] = tuple(value.flatten().tolist())
            continue
        numbers[node] = len(found)
        arguments = fx.map_arg((node.args, node.kwargs), lambda n: numbers[n])
        target = node.target if node.op == "call_function" else node.op
        found.append((target, repr(arguments), shape_of(node.meta.get("val"))))
    return found


def shape_of(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [shape_of(v) for v in value]
    return value if value is None else (value.shape, value.stride(), value.storage_offset(), value.dtype, value.device)


def test_arguments_of_one_kind_are_told_apart() -> None:
    """Also where a graph is traced again at what its placeholders show, which is one tensor for all of a kind."""
    once = tracer.trace(lambda x, y: [x - 2 * y], [SCALES, SCALES + 1], {}, functional=True)
    shown = [node.meta["val"] for node in once.graph.find_nodes(op="placeholder")]
    twice = tracer.trace(fx.Interpreter(once).run, shown, {}, functional=True)
    for graph in (once, twice):
        assert torch.equal(graph(SCALES, SCALES + 1)[0], SCALES - 2 * (SCALES + 1))


def test_what_repeats_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    dispatch = FakeTensorMode.dispatch

    def counted(self: FakeTensorMode, func: Any, *rest: Any) -> Any:
        asked.append(func)
        return dispatch(self, func, *rest)

    monkeypatch.setattr(FakeTensorMode, "dispatch", counted)

    def deep(count: int) -> int:
        asked.clear()
        tracer.trace(lambda x: [[x := (x * 2.0).relu() for _ in range(count)][-1]], [SCALES], {}, functional=True)
        return len(asked)

    assert deep(50) == deep(1) > 0


def test_a_point_of_another_kind_is_another_key() -> None:
    """1, 1.0 and True are equal, and numbers of kinds are numbers, too."""

    def program(x: Tensor) -> list[Tensor]:
        return [x.long() * number for number in (1, 1.0, True)] + [x.sum(d) for d in (0, 1)] + [x.double() + x]

    assert [t.dtype for t in tracer.trace(program, [torch.ones(2, 3)], {}, functional=True)(torch.ones(2, 3))] == [
        torch.int64, torch.float32, torch.int64, torch.float32, torch.float32, torch.float64
    ]  # fmt: skip
    graph = tracer.trace(program, [torch.ones(2, 3)], {}, functional=True).graph
    shown = [node.meta["val"] for node in graph.output_node().all_input_nodes]
    assert [(t.dtype, tuple(t.shape)) for t in shown[1:]] == [
        (torch.float32, (2, 3)), (torch.int64, (2, 3)), (torch.float32, (3,)), (torch.float32, (2,)),
        (torch.float64, (2, 3)),
    ]  # fmt: skip


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(ValueError, match="stop"), tracer.without_collector():
            assert not gc.isenabled()
            raise ValueError("stop")
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
