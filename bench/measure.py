"""Compares and times the ways to bound a gradient: the engine, the eager loop, its compiled form, a floor of GEMMs.

``python -m bench.measure CASE BACKEND LAYOUT`` prints the peak memory of one training step, measured in that process.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import models
from bench.eager import gradient_bounds

Step = Callable[[], Any]
EPS = 1 / 255
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


@dataclass
class Case:
    """A network at a batch size, with one fixed batch in [0, 1] and random labels."""

    name: str
    model: nn.Sequential
    x: Tensor
    target: Tensor

    @property
    def layouts(self) -> list[str]:
        return list(LAYOUTS) if self.x.dim() == 4 else ["contiguous"]

    def input(self, layout: str) -> Tensor:
        return self.x.contiguous(memory_format=LAYOUTS[layout])


CASES = {
    "n4 B32": (models.n4, 32),
    "mlp B1": (models.mlp, 1),
    "mlp B64": (models.mlp, 64),
    "residual B32": (models.residual, 32),
}


def make_case(name: str) -> Case:
    build, batch = CASES[name]
    model = build()
    generator = torch.Generator().manual_seed(1)
    shape = (batch, 784) if build is models.mlp else (batch, 3, 32, 32)
    x = torch.rand(shape, generator=generator)
    return Case(name, model, x, torch.randint(10, (batch,), generator=generator))


@dataclass
class Contender:
    """``bounds`` returns (mid, rad) and is certify's work; ``step`` leaves gradients in the parameters."""

    bounds: Step
    step: Step


def _loss(model: nn.Module, x: Tensor, target: Tensor, width: Tensor) -> Tensor:
    return F.cross_entropy(model(x), target) + width.square().mean()


def _contender(model: nn.Module, bounds: Step, loss: Step) -> Contender:
    def certify() -> Any:
        with torch.no_grad():
            return bounds()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        loss().backward()

    return Contender(certify, step)


def eager(case: Case, layout: str, compiled: bool = False) -> Contender:
    x = case.input(layout)
    run = functools.partial(gradient_bounds, case.model, channels_last=layout == "channels-last")

    def bounds(x: Tensor, rad: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return run(x, rad, target)

    def loss(x: Tensor, rad: Tensor, target: Tensor) -> Tensor:
        return _loss(case.model, x, target, 2 * run(x, rad, target)[1])

    if compiled:
        # One graph or an error: pieces with eager code between them would be a weaker opponent than it looks.
        torch._dynamo.reset()
        bounds, loss = (torch.compile(function, dynamic=False, fullgraph=True) for function in (bounds, loss))
    # The box is built inside the clock, as the engine's is.
    return _contender(
        case.model,
        lambda: bounds(x, torch.full_like(x, EPS), case.target),
        lambda: loss(x, torch.full_like(x, EPS), case.target),
    )


def engine(case: Case, layout: str, backend: str) -> Contender:
    import pyxai_bounds as xb

    x = case.input(layout)
    bound = xb.bound(xb.explain.gradient(case.model))

    def run() -> Any:
        with xb.backend(backend):
            return bound(xb.Interval.linf(x, EPS), case.target)

    def bounds() -> tuple[Tensor, Tensor]:
        out = run()
        return out.mid, out.rad

    def loss() -> Tensor:
        return _loss(case.model, x, case.target, run().width)

    return _contender(case.model, bounds, loss)


def floor(case: Case, layout: str) -> Contender:
    """The GEMMs and convolutions that no method can avoid, on fresh random tensors, and nothing between them.

    Certify: midpoint and radius, forward and backward, of every affine layer but the last, whose forward is not
    needed and whose backward is a row of its weight. Step: also the gradients of the backward ones in their argument
    and their weight (the first layer's radius only: the loss does not read the midpoint), and the plain model's step.
    """
    layers: list[tuple[nn.Module, torch.Size, torch.Size]] = []

    def note(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        layers.append((module, inputs[0].shape, output.shape))

    affine = [module for module in case.model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    hooks = [module.register_forward_hook(note) for module in affine]
    with torch.no_grad():
        case.model(case.x)
    for hook in hooks:
        hook.remove()
    bounds: list[Step] = []
    step: list[Step] = []
    for index, (layer, inputs, outputs) in enumerate(layers):
        forward, data, weight = _products(layer, inputs, outputs, LAYOUTS[layout])
        step += [forward, weight] + [data] * (index > 0)
        if index < len(layers) - 1:
            bounds += 2 * [forward, data]
            step += 2 * [forward, data] + (1 + (index > 0)) * [forward, weight]

    def run(products: list[Step]) -> None:
        with torch.no_grad():
            for product in products:
                product()

    return Contender(lambda: run(bounds), lambda: run(step))


def _products(layer: Any, inputs: torch.Size, outputs: torch.Size, layout: torch.memory_format) -> list[Step]:
    """The layer's forward, its gradient in the argument and its gradient in the weight, without bias."""
    weight = layer.weight.detach()
    if isinstance(layer, nn.Linear):
        x, y = (torch.randn(shape, dtype=weight.dtype, device=weight.device) for shape in (inputs, outputs))
        return [lambda: F.linear(x, weight), lambda: y @ weight, lambda: y.t() @ x]
    x, y = (
        torch.randn(shape, dtype=weight.dtype, device=weight.device).contiguous(memory_format=layout)
        for shape in (inputs, outputs)
    )
    at = (layer.stride, layer.padding, layer.dilation)

    def gradient(mask: list[bool]) -> Tensor:
        groups = (False, (0, 0), layer.groups)
        return torch.ops.aten.convolution_backward(y, x, weight, None, *at, *groups, mask)

    return [
        lambda: F.conv2d(x, weight, None, *at, layer.groups),
        lambda: gradient([True, False, False]),
        lambda: gradient([False, True, False]),
    ]


def contender(case: Case, backend: str, layout: str) -> Contender:
    if backend in ("native", "reference"):
        return engine(case, layout, backend)
    if backend == "floor":
        return floor(case, layout)
    return eager(case, layout, compiled=backend == "compiled")


def outcome(case: Case, one: Contender) -> dict[str, list[Tensor]]:
    """Midpoint and radius, and the parameters' gradients (0 where there is none)."""
    one.step()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in case.model.parameters()]
    mid, rad = one.bounds()
    return {"mid": [mid], "rad": [rad], "grad": grads}


def truth(case: Case) -> dict[str, list[Tensor]]:
    """The outcome of the eager loop in float64."""
    twin = Case(case.name, copy.deepcopy(case.model).double(), case.x.double(), case.target)
    return outcome(twin, eager(twin, "contiguous"))


def disagreement(found: dict[str, list[Tensor]], true: dict[str, list[Tensor]]) -> dict[str, float]:
    """Relative error of each outcome in the 2-norm, the worst over the parameters.

    A norm and not a maximum: of millions of pre-activation bounds a few lie within one rounding of 0, and the state
    of their ReLU differs between any two float32 evaluations.
    """
    return {
        name: max(_relative(a, b) for a, b in zip(found[name], true[name], strict=True)) for name in true
    }  # fmt: skip


def _relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return ((a - b).norm() / b.norm().clamp_min(1e-300)).item() if a.isfinite().all() else float("inf")


def interleaved(steps: dict[Any, Step], seconds: float, rounds: int) -> dict[Any, list[float]]:
    """Seconds per call. One call of each in turn, so that a drift of the machine meets all alike.

    Runs at least ``rounds`` rounds and at most 30, until ``seconds`` per contender have passed.
    """
    for step in steps.values():
        step()
    times: dict[Any, list[float]] = {key: [] for key in steps}
    start = time.perf_counter()
    for index in range(30):
        if index >= rounds and time.perf_counter() - start > seconds * len(steps):
            break
        for key, step in steps.items():
            before = time.perf_counter()
            step()
            times[key].append(time.perf_counter() - before)
    return times


def percentiles(times: list[float]) -> tuple[float, float, float]:
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return tenths[1], statistics.median(times), tenths[7]


def peak_bytes(name: str, backend: str, layout: str) -> int:
    """Peak memory of a training step, from a process of its own."""
    command = [sys.executable, "-m", "bench.measure", name, backend, layout]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return int(result.stdout.split()[-1])


def _own_peak(name: str, backend: str, layout: str) -> int:
    """Growth of the resident set over three training steps, in bytes.

    Counts everything the steps touch: tensors, oneDNN's scratch space, a backend's own buffers, the parameters'
    gradients. What a first step at another batch size (1, or 2 where the batch is 1) loads and keeps lies in the
    baseline. Freed heap is handed back first, or its reuse would not show.
    """
    case = make_case(name)
    few = torch.arange(2 if len(case.x) == 1 else 1) % len(case.x)
    contender(Case(name, case.model, case.x[few], case.target[few]), backend, layout).step()
    case.model.zero_grad(set_to_none=True)
    one = contender(case, backend, layout)
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")  # VmHWM starts again at the present VmRSS
    before = _status("VmRSS")
    for _ in range(3):
        one.step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(field))


if __name__ == "__main__":
    print(_own_peak(*sys.argv[1:]))
