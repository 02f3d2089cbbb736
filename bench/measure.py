"""Ways to bound a gradient, made comparable: the engine, hand-written loops, the least that a GEMM library can do.

``contenders.py`` lists them; here they are built, compared and timed.
"""

from __future__ import annotations

import copy
import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import models
from bench.eager import gradient_bounds as tuned_bounds
from bench.peers.plain import gradient_bounds as plain_bounds
from pyxai_bounds.ops.replay import GraphedStep, Replay

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


IMAGE = (3, 32, 32)
CASES: dict[str, tuple[Callable[[], nn.Sequential], int, tuple[int, ...]]] = {
    "n4 B32": (models.n4, 32, IMAGE),
    "n4 B1": (models.n4, 1, IMAGE),
    "mlp B1": (models.mlp, 1, (784,)),
    "mlp B64": (models.mlp, 64, (784,)),
    "residual B32": (models.residual, 32, IMAGE),
}


def make_case(name: str, build: Callable[[], nn.Sequential], batch: int, shape: tuple[int, ...]) -> Case:
    model = build()
    generator = torch.Generator().manual_seed(1)
    x = torch.rand((batch, *shape), generator=generator)
    return Case(name, model, x, torch.randint(10, (batch,), generator=generator))


@dataclass
class Contender:
    """``bounds`` is certify's work and returns (mid, rad), or (lower, upper) where ``ends``; ``step`` leaves gradients
    in the parameters. None where it cannot do that, or does it as another contender."""

    bounds: Step | None
    step: Step | None
    ends: bool = False


def _loss(model: nn.Module, x: Tensor, target: Tensor, width: Tensor) -> Tensor:
    return F.cross_entropy(model(x), target) + width.square().mean()


def _contender(
    case: Case,
    x: Tensor,
    bounds: Step,
    loss: Step | Sequence[Step],
    graphed: bool = False,
    pieces: int = 1,
    concurrent: bool = False,
) -> Contender:
    """Of functions of (x, target); ``graphed``: on a GPU each is recorded as a CUDA graph at its third call. Such a
    step may have several losses, which are differentiated one by one or side by side, and its batch in pieces."""
    model, target = case.model, case.target
    if graphed:
        certify = _Graphed(bounds, (x, target))
        training = GraphedStep(loss, model.parameters(), pieces, concurrent)
        return Contender(certify, lambda: training(x, target))
    assert callable(loss) and pieces == 1

    def certify_launched() -> Any:
        with torch.no_grad():
            return bounds(x, target)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        loss(x, target).backward()

    return Contender(certify_launched, step)


class _Graphed:
    """A function without gradients as a CUDA graph, unless the environment asks for none (to measure memory)."""

    def __init__(self, function: Step, args: tuple[Tensor, ...]) -> None:
        self.function, self.args = function, args
        self.replay: Replay | None = None

    def __call__(self) -> Any:
        if os.environ.get("PYXAI_BOUNDS_CUDA_GRAPHS") == "0":
            with torch.no_grad():
                return self.function(*self.args)
        self.replay = self.replay or Replay(self.function, self.args)
        return self.replay(*self.args)


def eager(case: Case, layout: str, compiled: bool = False, graphed: bool = False) -> Contender:
    """The tuned loop."""
    run = functools.partial(tuned_bounds, case.model, channels_last=layout == "channels-last")
    return _loop(case, layout, run, compiled, graphed)


def plain(case: Case, layout: str, compiled: bool = False) -> Contender:
    """The loop as it is usually written."""
    return _loop(case, layout, functools.partial(plain_bounds, case.model), compiled)


def _loop(
    case: Case, layout: str, run: Callable[..., tuple[Tensor, Tensor]], compiled: bool, graphed: bool = False
) -> Contender:
    def bounds(x: Tensor, rad: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return run(x, rad, target)

    def loss(x: Tensor, rad: Tensor, target: Tensor) -> Tensor:
        return _loss(case.model, x, target, 2 * run(x, rad, target)[1])

    if compiled:
        bounds, loss = _compiled(bounds), _compiled(loss)
    # The box is built inside the clock, as the engine's is.
    return _contender(
        case,
        case.input(layout),
        lambda x, target: bounds(x, torch.full_like(x, EPS), target),
        lambda x, target: loss(x, torch.full_like(x, EPS), target),
        graphed,
    )


def _compiled(function: Step) -> Step:
    """One graph or an error: pieces with eager code between them would be a weaker opponent than it looks."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def peer(case: Case, layout: str, make: Callable[..., Step], trains: bool) -> Contender:
    """Another library: ``make(model, x, eps, target)`` returns a function that returns lower and upper ends."""
    x = case.input(layout)
    ends = make(case.model, x, EPS, case.target)

    def loss(x: Tensor, target: Tensor) -> Tensor:
        lower, upper = ends()
        return _loss(case.model, x, target, upper - lower)

    one = _contender(case, x, lambda x, target: ends(), loss)
    return Contender(one.bounds, one.step if trains else None, ends=True)


def engine(
    case: Case,
    layout: str,
    backend: str,
    graphed: bool = False,
    checkpoint: bool = False,
    compiled: bool = False,
    pieces: int = 0,
    concurrent: bool = False,
) -> Contender:
    """``compiled``: the network in the cross entropy is, and the bounds run as the program that they are.

    ``pieces``: a recorded step takes the batch in so many, in each the cross entropy first and then the bounds, or both
    side by side if ``concurrent``.
    """
    import pyxai_bounds as xb

    bound = xb.bound(xb.explain.gradient(case.model), checkpoint=checkpoint)
    model = _compiled(case.model) if compiled else case.model

    def run(x: Tensor, target: Tensor) -> Any:
        with xb.backend(backend):
            return bound(xb.Interval.linf(x, EPS), target)

    def bounds(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        out = run(x, target)
        return out.mid, out.rad

    def loss(x: Tensor, target: Tensor) -> Tensor:
        return _loss(model, x, target, run(x, target).width)

    terms = [
        lambda x, target: F.cross_entropy(model(x), target),
        lambda x, target: run(x, target).width.square().mean(),
    ]
    return _contender(case, case.input(layout), bounds, terms if pieces else loss, graphed, pieces or 1, concurrent)


def compiled_engine(
    case: Case, layout: str, graphed: bool = False, pieces: int = 0, concurrent: bool = False
) -> Contender:
    """The engine's programs, one with gradients and one without, inside of functions that are compiled whole.

    ``pieces``, ``concurrent``: as for ``engine``, pieces of equal size, since a program is for one batch size.
    """
    import pyxai_bounds as xb

    x = case.input(layout)
    bound = xb.bound(xb.explain.gradient(case.model))
    size = len(x) // (pieces or 1)
    if size * (pieces or 1) != len(x):
        raise ValueError(f"{len(x)} samples make no {pieces} equal pieces.")
    trained = bound.graph(xb.Interval.linf(x[:size], EPS), case.target[:size])
    with torch.no_grad():
        fixed = bound.graph(xb.Interval.linf(x, EPS), case.target)

    def penalty(mid: Tensor, rad: Tensor, target: Tensor) -> Tensor:
        return (2 * trained(mid, rad, target)[1]).square().mean()

    def boxed(function: Step) -> Step:
        function = _compiled(function)

        def run(x: Tensor, target: Tensor) -> Any:
            box = xb.Interval.linf(x, EPS)
            return function(box.mid, box.rad, target)

        return run

    bounds = boxed(lambda mid, rad, target: fixed(mid, rad, target))
    if not pieces:
        loss = boxed(lambda mid, rad, target: _loss(case.model, mid, target, 2 * trained(mid, rad, target)[1]))
        return _contender(case, x, bounds, loss, graphed)
    cross_entropy = _compiled(lambda x, target: F.cross_entropy(case.model(x), target))
    return _contender(case, x, bounds, [cross_entropy, boxed(penalty)], graphed, pieces, concurrent)


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


def outcome(case: Case, one: Contender) -> dict[str, list[Tensor]]:
    """Midpoint and radius, and the parameters' gradients (0 where there is none) if it trains."""
    first, second = one.bounds()
    mid, rad = ((first + second) / 2, (second - first) / 2) if one.ends else (first, second)
    found = {"mid": [mid], "rad": [rad]}
    if one.step is not None:
        one.step()
        found["grad"] = [torch.zeros_like(p) if p.grad is None else p.grad for p in case.model.parameters()]
    return found


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
        name: max(_relative(a, b) for a, b in zip(found[name], true[name], strict=True)) for name in found
    }  # fmt: skip


def _relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return ((a - b).norm() / b.norm().clamp_min(1e-300)).item() if a.isfinite().all() else float("inf")


def interleaved(steps: dict[Any, Step], seconds: float, rounds: int) -> dict[Any, list[float]]:
    """Seconds per call. Each in its turn, so that a drift of the machine meets all alike.

    A turn is one call, or as many as fill 5 ms after one that is not timed: a short call would otherwise meet the
    caches as the contender before left them, which nobody who calls it in a loop would. At least ``rounds`` rounds
    and at most 100, until ``seconds`` per contender have passed.
    """
    calls: dict[Any, int] = {}
    for key, step in steps.items():
        step()
        calls[key] = int(TURN / _elapsed(step, 1))
    times: dict[Any, list[float]] = {key: [] for key in steps}
    start = time.perf_counter()
    for index in range(100):
        if index >= rounds and time.perf_counter() - start > seconds * len(steps):
            break
        for key, step in steps.items():
            if calls[key]:
                step()
            times[key].append(_elapsed(step, max(1, calls[key])))
    return times


TURN = 5e-3  # seconds


def _elapsed(step: Step, calls: int) -> float:
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


def percentiles(times: list[float]) -> tuple[float, float, float]:
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return tenths[1], statistics.median(times), tenths[7]


def exponent(sizes: list[float], costs: list[float]) -> float:
    """p of the power law cost ∝ size^p that fits best, by least squares on logarithms."""
    x, y = ([math.log(value) for value in values] for values in (sizes, costs))
    return statistics.linear_regression(x, y).slope
