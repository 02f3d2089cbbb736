"""Random networks over all rules, their explanations, and the points at which these are evaluated."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyxai_bounds as xb
from tests.networks import Branches
from tests.soundness.programs import members

Choose = Callable[[Sequence[Any]], Any]  # random.Random(seed).choice, or a draw of hypothesis

CLASSES = 4


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Standardise(nn.Module):
    """Divides each channel by a norm of it: a quotient of two sets."""

    def __init__(self, order: float) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x / (torch.linalg.vector_norm(x, self.order, dim=(2, 3), keepdim=True) + 0.7)


ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU, nn.ReLU, nn.ReLU, nn.LeakyReLU, nn.Hardtanh, nn.ReLU6, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.ELU, nn.SELU,
    lambda: nn.CELU(0.6), nn.GELU, lambda: nn.GELU("tanh"), nn.SiLU, nn.Hardsigmoid, nn.Hardswish, nn.Softsign,
    nn.LogSigmoid, nn.Mish, nn.PReLU,
    lambda: nn.Sequential(Apply(lambda x: x - 0.1), nn.ReLU(inplace=True)),
]  # fmt: skip

FUNCTIONS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x * 0.1 - 1 / 3,
    lambda x: 1.1 - x / 3,
    lambda x: x.abs() + x.clamp(-0.3, 0.7),
    lambda x: (x * x + 0.2).sqrt(),
    lambda x: (x.square() + 1).rsqrt() * x,
    lambda x: torch.exp(0.3 * x - 0.1),
    lambda x: torch.log1p(x.abs()) + torch.erf(x),
    lambda x: torch.sin(3 * x) - torch.cos(x) * torch.atan(x),
    lambda x: torch.addcmul(x, x, x.flip(2), value=-0.3),
    lambda x: F.glu(torch.cat([x, x.flip(3)], 1), 1),
    lambda x: torch.log(x.square() + 0.5) - torch.expm1(-x.abs()),
    lambda x: x**3 * 0.1 + (x.abs() + 1) ** 0.7,
    lambda x: torch.where(x > 0.1, x, 0.3 * x),
    lambda x: x.masked_fill(x < -0.7, -0.7),
    lambda x: F.pad(x, (1, 0, 0, 1), value=0.1),
    lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"),
    lambda x: x.flip(2).roll(1, 3) + x.transpose(2, 3),
    lambda x: torch.maximum(x, x.flip(3)) - torch.minimum(x, 0.25 * x.flip(2)),
    lambda x: x.softmax(1) * x.shape[1],
    lambda x: x.flatten(2).log_softmax(2).reshape(x.shape) * 0.1,
    lambda x: x - x.mean((2, 3), keepdim=True),
    lambda x: x + x.logsumexp((2, 3), keepdim=True),
    lambda x: x * x.sum(1, keepdim=True).tanh(),
    lambda x: x.cumsum(3) / x.shape[3],
    lambda x: x.index_select(2, torch.arange(x.shape[2] - 1, -1, -1)),
    lambda x: x.index_add(2, torch.tensor([0, 1, 0]), x[:, :, :3], alpha=-0.3),
    lambda x: x.scatter_add(3, torch.zeros_like(x, dtype=torch.long), x) * 0.2,
    lambda x: x.amax((2, 3), keepdim=True) - x,
    lambda x: torch.einsum("bchw,bchv->bcwv", x, x) * 0.1,
]  # fmt: skip


RARE = ["max", "average", "adaptive", "branches", "transposed", "resize", "standardise"]


def _layer(choose: Choose, channels: int) -> tuple[nn.Module, int]:
    """A layer on images [B, channels, H, W] of at least 3×3, and its output channels."""
    kind = choose(["conv", "act"] * 5 + ["norm", "function"] * 2 + RARE)
    if kind == "conv":
        groups = choose([1, 1, channels])
        out = channels if groups > 1 else choose([1, 2, 3, 5])
        kernel, dilation = choose([1, 2, 3]), choose([1, 1, 2])
        padding = dilation * (kernel // 2) + choose([0, 1])
        stride = choose([1, 1, 2])
        return nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, choose([True, False])), out
    if kind == "act":
        return choose(ACTIVATIONS)(), channels
    if kind == "norm":
        return nn.BatchNorm2d(channels, affine=choose([True, True, False])), channels
    if kind == "max":
        return nn.MaxPool2d(choose([2, 3]), choose([1, 2]), 1, ceil_mode=choose([True, False])), channels
    if kind == "average":
        return nn.AvgPool2d(3, choose([1, 2]), 1, count_include_pad=choose([True, False])), channels
    if kind == "adaptive":
        return nn.AdaptiveAvgPool2d(choose([3, (4, 3), 5])), channels
    if kind == "transposed":
        out = choose([1, 2, 3])
        return nn.ConvTranspose2d(channels, out, choose([2, 3]), choose([1, 2]), bias=choose([True, False])), out
    if kind == "resize":
        mode = choose(["nearest", "bilinear"])
        return nn.Upsample(size=choose([(5, 7), (4, 4), (9, 6)]), mode=mode), channels
    if kind == "function":
        return Apply(choose(FUNCTIONS)), channels
    if kind == "standardise":
        return Standardise(choose([1, 2, float("inf")])), channels
    if choose([True, False]):
        inner = [nn.Conv2d(channels, channels, 3, padding=1), choose(ACTIVATIONS)()]
        return Branches(nn.Sequential(*inner), nn.Identity(), concatenate=False), channels
    other = choose([1, 2])
    return Branches(nn.Conv2d(channels, other, 3, padding=1), nn.Identity(), concatenate=True), channels + other


def network(choose: Choose, depth: int = 6) -> nn.Module:
    """A float32 network on [B, 2, 6, 6] in eval mode, with weights of several scales."""
    torch.manual_seed(choose(range(1000)))
    channels, layers = 2, []
    for _ in range(choose(range(2, depth + 1))):
        module, channels = _layer(choose, channels)
        layers.append(module)
        if nn.Sequential(*layers).eval()(torch.zeros(1, 2, 6, 6)).shape[-2:] < (3, 3):
            layers.append(nn.Upsample(size=(4, 4)))
        shape = nn.Sequential(*layers).eval()(torch.zeros(1, 2, 6, 6)).shape
        if min(shape[-2:]) < 3 or shape[-2] != shape[-1]:
            layers.append(nn.AdaptiveAvgPool2d(4))
    body = nn.Sequential(*layers).eval()
    features = body(torch.zeros(1, 2, 6, 6)).flatten(1).shape[1]
    hidden = choose([5, 40])
    model = nn.Sequential(
        body, nn.Flatten(), nn.Linear(features, hidden), choose(ACTIVATIONS)(), nn.Linear(hidden, CLASSES)
    )
    return model.eval()


def redraw(model: nn.Module, seed: int) -> None:
    """New parameters and statistics, of one of several scales; some of the linear weights are 0."""
    generator = torch.Generator().manual_seed(seed)

    def fill(t: Tensor | None, low: float, high: float) -> None:
        if t is not None:
            t.copy_(low + (high - low) * torch.rand(t.shape, generator=generator))

    scale = (0.5, 1.0, 1.0, 3.0)[seed % 4]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                fill(module.running_mean, -0.6, 0.6)
                fill(module.running_var, 0.05, 2.0)
                fill(module.weight, -1.5, 1.5)
                fill(module.bias, -1.0, 1.0)
            elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                reach = scale * (3 / module.weight[0].numel()) ** 0.5
                fill(module.weight, -reach, reach)
                module.weight.mul_(torch.rand(module.weight.shape, generator=generator) > 0.1)
                fill(module.bias, -0.3, 0.3)


EXPLANATIONS: dict[str, Callable[[nn.Module], Callable]] = {
    "output": lambda m: lambda x, target: m(x),
    "logit": lambda m: xb.explain.gradient(m),
    "probability": lambda m: xb.explain.gradient(m, of="probability"),
    "loss": lambda m: xb.explain.gradient(m, of="loss"),
    "gradient × input": lambda m: xb.explain.gradient_x_input(m),
    "integrated gradients": lambda m: xb.explain.integrated_gradients(m, steps=3),
}


@dataclass
class Subject:
    """A network's explanation in float32, the same in float64, and where it is explained."""

    model: nn.Module
    twin: nn.Module
    fn: Callable[[Tensor, Tensor], Tensor]
    oracle: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    target: Tensor

    def redraw(self, seed: int) -> None:
        """Other weights in the same architecture, which needs no new capture."""
        redraw(self.model, seed)
        self.twin.load_state_dict(self.model.state_dict())  # float32 numbers are float64 numbers

    def value(self, x: Tensor) -> Tensor:
        return self.oracle(x, self.target).detach()

    def points(self, box: xb.Interval, count: int, seed: int, attack: bool = True) -> Iterator[Tensor]:
        """Members of the box, and one that gradient ascent on the explanation's components was driven to."""
        yield from members(box, count, seed)
        if attack and bool(box.rad.any()):
            yield self._attacked(box, seed)

    def _attacked(self, box: xb.Interval, seed: int, steps: int = 3) -> Tensor:
        mid, rad = box.mid.double(), box.rad.double()
        generator = torch.Generator().manual_seed(seed)
        x = mid + rad * (2 * torch.rand(mid.shape, generator=generator, dtype=torch.float64) - 1)
        signs = torch.randn(self.value(x).shape, generator=generator, dtype=torch.float64).sign()
        for _ in range(steps):
            x = x.detach().requires_grad_()
            try:
                value = self.oracle(x, self.target)
                (slope,) = torch.autograd.grad((signs * value).sum(), x, allow_unused=True)
            except RuntimeError:  # no second derivative, or none that is not 0
                return x.detach()
            if slope is None:
                return x.detach()
            x = (mid + rad * slope.nan_to_num().sign()).detach()
        return x


def subject(choose: Choose, batch: int = 2) -> Subject:
    """A random network, explanation and batch of images: smooth, rounded (kinks, ties), or with a black background."""
    model = network(choose)
    generator = torch.Generator().manual_seed(choose(range(1000)))
    x = torch.rand(batch, 2, 6, 6, generator=generator)
    look = choose(["smooth", "smooth", "ties", "black", "large"])
    if look == "ties":
        x = (2 * x).round() / 2
    elif look == "black":
        x = x * (x > 0.6)
    elif look == "large":
        x = 30 * x - 10
    if choose([False, False, True]):
        x = x.contiguous(memory_format=torch.channels_last)
    explain = EXPLANATIONS[choose(sorted(EXPLANATIONS))]
    target = torch.tensor([choose(range(CLASSES)) for _ in range(batch)])
    twin = copy.deepcopy(model).double()
    made = Subject(model, twin, explain(model), explain(twin), x, target)
    made.redraw(choose(range(1000)))
    return made
