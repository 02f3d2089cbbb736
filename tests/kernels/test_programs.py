"""Whole bound programs on the kernels: bounds and parameter gradients, and torch.compile without a break."""

import pytest
import torch
from torch import nn

import pyxai_bounds as xb

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
