"""The networks that the benchmarks bound: small, seeded, in inference mode, and plain ``torch.nn`` modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with batch norm and a shortcut; the ReLU comes after the sum.

    Shapes: [B, inputs, H, W] to [B, outputs, H / stride, W / stride].
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) + self.shortcut(x))


class PreActivationBlock(nn.Module):
    """Batch norm and ReLU before each of two 3×3 convolutions, and a shortcut (wide residual networks).

    Shapes: [B, inputs, H, W] to [B, outputs, H / stride, W / stride].
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + self.shortcut(x)


def mlp() -> nn.Sequential:
    """784-256-256-10; input [B, 784]."""
    torch.manual_seed(0)
    layers = [nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
    return nn.Sequential(*layers).eval()


def n4(width: int = 1, pixels: int = 32) -> nn.Sequential:
    """Four convolutions and two linear layers, ``width`` times as wide; input [B, 3, pixels, pixels]."""
    torch.manual_seed(0)
    a, b = 32 * width, 64 * width
    return nn.Sequential(
        nn.Conv2d(3, a, 3, padding=1), nn.ReLU(),
        nn.Conv2d(a, b, 4, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(b, b, 3, padding=1), nn.ReLU(),
        nn.Conv2d(b, b, 4, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(b * (pixels // 4) ** 2, 256 * width), nn.ReLU(), nn.Linear(256 * width, 10),
    ).eval()  # fmt: skip


def cnn7(width: float = 1.0) -> nn.Sequential:
    """The network that certified training is judged on: 64-64-128-128-128 and 512 wide; input [B, 3, 32, 32]."""
    torch.manual_seed(0)
    narrow, wide, hidden = (max(1, round(width * channels)) for channels in (64, 128, 512))
    return nn.Sequential(
        nn.Conv2d(3, narrow, 3, padding=1), nn.ReLU(),
        nn.Conv2d(narrow, narrow, 3, padding=1), nn.ReLU(),
        nn.Conv2d(narrow, wide, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(wide, wide, 3, padding=1), nn.ReLU(),
        nn.Conv2d(wide, wide, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(wide * 16 * 16, hidden), nn.ReLU(), nn.Linear(hidden, 10),
    ).eval()  # fmt: skip


def residual(width: int = 32) -> nn.Sequential:
    """A small ResNet: stem, three blocks (the second halves the image), average pool; input [B, 3, 32, 32]."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        ResidualBlock(width, width),
        ResidualBlock(width, 2 * width, stride=2),
        ResidualBlock(2 * width, 2 * width),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10),
    ).eval()  # fmt: skip
    return _with_statistics(model)


def chain(depth: int, width: int = 32) -> nn.Sequential:
    """A stem, (depth − 2) / 2 equal residual blocks and a linear layer; input [B, 3, H, W].

    Each block adds a tenth of its convolutions' output, so that bounds stay finite at any depth.
    """
    if depth < 4 or depth % 2:
        raise ValueError(f"depth must be an even number from 4 on, not {depth}.")
    torch.manual_seed(0)
    blocks = [ResidualBlock(width, width) for _ in range((depth - 2) // 2)]
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), *blocks,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10),
    ).eval()  # fmt: skip
    _with_statistics(model)
    with torch.no_grad():
        for block in blocks:
            block.main[-1].weight.mul_(0.1)  # type: ignore[operator]
    return model


def resnet18(width: int = 64) -> nn.Sequential:
    """ResNet-18 with a 3×3 stem, as it is used at 32 × 32 pixels; input [B, 3, H, W]."""
    torch.manual_seed(0)
    blocks = [ResidualBlock(width, width), ResidualBlock(width, width)]
    for outputs in (2 * width, 4 * width, 8 * width):
        blocks += [ResidualBlock(outputs // 2, outputs, stride=2), ResidualBlock(outputs, outputs)]
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), *blocks,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 10),
    ).eval()  # fmt: skip
    return _with_statistics(model)


def wrn16_4(width: int = 16) -> nn.Sequential:
    """Wide ResNet of depth 16 and widening factor 4; input [B, 3, 32, 32]."""
    torch.manual_seed(0)
    blocks: list[nn.Module] = []
    inputs = width
    for outputs, stride in ((4 * width, 1), (8 * width, 2), (16 * width, 2)):
        blocks += [PreActivationBlock(inputs, outputs, stride), PreActivationBlock(outputs, outputs)]
        inputs = outputs
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False), *blocks, nn.BatchNorm2d(inputs), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10),
    ).eval()  # fmt: skip
    return _with_statistics(model)


class _Patches(nn.Module):
    """Images [B, 3, H, W] as rows of tokens, one for each square of pixels."""

    def __init__(self, width: int, pixels: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, width, pixels, stride=pixels)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x).flatten(2).transpose(1, 2)


def transformer(depth: int = 4, width: int = 48) -> nn.Sequential:
    """A small vision transformer for 32×32 images: patches of 8×8, encoder layers with four heads and GELU."""
    layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
    return nn.Sequential(_Patches(width, 8), encoder, nn.Flatten(), nn.Linear(16 * width, 10)).eval()


def _with_statistics(model: nn.Sequential) -> nn.Sequential:
    """Random running statistics: fresh ones (mean 0, variance 1) would hide a wrong fold of batch norm."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model
