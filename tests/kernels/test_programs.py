"""Whole bound programs on the kernels: bounds and parameter gradients, and torch.compile without a break."""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import pyxai_bounds as xb
from pyxai_bounds import program

pytestmark = pytest.mark.filterwarnings("ignore:Input Tensor . did not already require gradients")


def network() -> nn.Sequential:
    """Strides, an odd number of channels, batch norm, ReLU after ReLU-free layers, and a linear head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 20, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(20), nn.ReLU(),
        nn.Flatten(), nn.Linear(20 * 4 * 4, 24), nn.ReLU(), nn.Linear(24, 5),
    ).eval()  # fmt: skip


def bounds_and_gradients(backend: str, device: str, compiled: bool = False) -> list[torch.Tensor]:
    model = network().double().to(device)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)
    target = torch.tensor([1, 3], device=device)
    with xb.backend(backend):
        box = xb.Interval.linf(x, 1 / 255)
        bounded = xb.bound(xb.explain.gradient(model))
        if compiled:
            graph = torch.compile(bounded.graph(box, target), fullgraph=True, backend="aot_eager")
            mid, rad = graph(box.mid, box.rad, target)
        else:
            out = bounded(box, target)
            mid, rad = out.mid, out.rad
        (rad.square().mean() + mid.square().sum()).backward()
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return [t.detach().cpu() for t in (mid, rad, *grads)]


@pytest.mark.parametrize("compiled", [False, True])
def test_bounds_and_parameter_gradients(device, compiled):
    torch._dynamo.reset()
    actual = bounds_and_gradients("triton", device, compiled)
    expected = bounds_and_gradients("reference", "cpu")
    assert sum(bool(e.any()) for e in expected) >= 6
    for a, e in zip(actual, expected, strict=True):
        assert torch.allclose(a, e, rtol=1e-9, atol=1e-12 + 1e-10 * e.abs().max().item())


class First(nn.Module):
    """Of what a layer returns the first tensor, flattened, and a linear head: [B, 3]."""

    def __init__(self, layer: nn.Module, *shape: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(torch.Size(shape).numel(), 3)

    def forward(self, x: Tensor) -> Tensor:
        args = (x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else (x,)
        out = self.layer(*args)
        return self.head((out if isinstance(out, Tensor) else out[0]).flatten(1))


# Layers for which PyTorch has other operators on a GPU than on the CPU, the shape of a sample, that of the result.
OTHERWISE_ON_A_GPU = {
    "batch norm": (lambda: nn.BatchNorm2d(3), (3, 4, 4), (3, 4, 4)),
    "batch norm, 1-D": (lambda: nn.BatchNorm1d(3), (3, 4), (3, 4)),
    "instance norm": (lambda: nn.InstanceNorm2d(3, affine=True), (3, 4, 4), (3, 4, 4)),
    "group norm": (lambda: nn.GroupNorm(1, 3), (3, 4, 4), (3, 4, 4)),
    "layer norm": (lambda: nn.LayerNorm(4), (3, 4), (3, 4)),
    "RMS norm": (lambda: nn.RMSNorm(4), (3, 4), (3, 4)),
    "LSTM": (lambda: nn.LSTM(4, 3, batch_first=True), (3, 4), (3, 3)),
    "GRU": (lambda: nn.GRU(4, 3, 2, batch_first=True, bidirectional=True), (3, 4), (3, 6)),
    "RNN": (lambda: nn.RNN(4, 3, batch_first=True), (3, 4), (3, 3)),
    "LSTM cell": (lambda: nn.LSTMCell(4, 3), (4,), (3,)),
    "GRU cell": (lambda: nn.GRUCell(4, 3), (4,), (3,)),
    "attention": (lambda: nn.MultiheadAttention(4, 2, batch_first=True), (3, 4), (3, 4)),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (3, 4), (3, 4)),
    "transposed convolution": (lambda: nn.ConvTranspose2d(3, 2, 3, stride=2), (3, 4, 4), (2, 9, 9)),
}


@pytest.mark.parametrize("name", OTHERWISE_ON_A_GPU)
def test_a_gpu_is_asked_for_the_same_operators(device, name):
    if device == "cpu":
        pytest.skip("needs an NVIDIA GPU")
    layer, shape, result = OTHERWISE_ON_A_GPU[name]
    torch.manual_seed(0)
    model = First(layer(), *result).double().eval()
    x, target = torch.rand(2, *shape, dtype=torch.float64), torch.tensor([0, 2])
    operators, bounds = [], []
    for place in ("cpu", "cuda"):
        fn = xb.explain.gradient(model.to(place))
        graph = program.captured_graph(fn, x.to(place), target.to(place)).graph.graph
        operators.append(Counter(str(node.target) for node in graph.nodes if node.op == "call_function"))
        out = xb.bound(fn)(xb.Interval.linf(x.to(place), 1e-3), target.to(place))
        bounds.append((out.mid.detach().cpu(), out.rad.detach().cpu()))
    assert operators[0] == operators[1]
    for a, e in zip(bounds[1], bounds[0], strict=True):
        assert torch.allclose(a, e, rtol=1e-7, atol=1e-12 + 1e-9 * e.abs().max().item())
