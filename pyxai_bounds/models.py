"""Networks by name, for the command line and for checkpoints: plain ``torch.nn``, which knows nothing of bounds."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def build(name: str, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """A network [B, *input_shape] → logits [B, classes], in training mode, with weights from the global generator.

    ``name`` is one of ``MODELS``, or ``package.module:factory`` for your own: the factory is called with
    (input_shape, classes) and returns the module.
    Raises ValueError for an unknown name, a factory that cannot be found or returns something else, or a
    convolutional network on a table.
    """
    if ":" in name:
        try:
            model = _factory(name)(input_shape, classes)
        except TypeError as error:
            raise TypeError(f"{name}, called with ({input_shape}, {classes}): {error}") from error
        if not isinstance(model, nn.Module):
            raise ValueError(f"{name} returned {type(model).__name__}; a model factory must return an nn.Module.")
        return model
    if name not in MODELS:
        raise ValueError(
            f"There is no model {name!r}; choose one of {', '.join(MODELS)}, or name your own as "
            "package.module:factory."
        )
    return MODELS[name](tuple(input_shape), classes)


def _factory(name: str) -> Callable[[tuple[int, ...], int], nn.Module]:
    module, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"The model factory {name!r} cannot be imported: {error}.") from error
    if not callable(factory):
        raise ValueError(f"{name} is not callable; a model factory takes (input_shape, classes).")
    return factory


def _linear(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Logistic regression: its explanation is constant, which is why every table carries it."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), classes))


def _fully_connected(*hidden: int) -> Callable[[tuple[int, ...], int], nn.Module]:
    def make(input_shape: tuple[int, ...], classes: int) -> nn.Module:
        sizes = [math.prod(input_shape), *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], classes))

    return make


def _cnn_small(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Two 3×3 convolutions, 16 and 32 wide, the second of stride 2, and a hidden layer of 64."""
    channels, height, width = _image("cnn-small", input_shape)
    flat = 32 * _halved(height) * _halved(width)
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(flat, 64), nn.ReLU(), nn.Linear(64, classes),
    )  # fmt: skip


def _cnn7(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Five convolutions and two linear layers, the network of the certified-training literature."""
    channels, height, width = _image("cnn7", input_shape)
    flat = 128 * _halved(height) * _halved(width)
    return nn.Sequential(
        nn.Conv2d(channels, 64, 3, padding=1), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
        nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(),
        nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(flat, 512), nn.ReLU(), nn.Linear(512, classes),
    )  # fmt: skip


def _rec_mnist(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """REC's network for MNIST: 16 4×4 stride 2, 32 4×4, a hidden layer of 100."""
    channels, height, width = _image("rec-mnist", input_shape)
    if min(height, width) < 10:
        raise ValueError(f"rec-mnist needs images of at least 10×10, not {height}×{width}; use cnn-small.")
    flat = 32 * math.prod((size - 4) // 2 + 1 - 3 for size in (height, width))
    return nn.Sequential(
        nn.Conv2d(channels, 16, 4, stride=2), nn.ReLU(),
        nn.Conv2d(16, 32, 4), nn.ReLU(),
        nn.Flatten(), nn.Linear(flat, 100), nn.ReLU(), nn.Linear(100, classes),
    )  # fmt: skip


def _rar_mnist(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """RAR's network for MNIST: 32 5×5, pool, 64 5×5, pool, a hidden layer of 1024."""
    channels, height, width = _image("rar-mnist", input_shape)
    flat = 64 * _halved(_halved(height)) * _halved(_halved(width))
    return nn.Sequential(
        nn.Conv2d(channels, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True),
        nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True),
        nn.Flatten(), nn.Linear(flat, 1024), nn.ReLU(), nn.Linear(1024, classes),
    )  # fmt: skip


class PreActivationBlock(nn.Module):
    """x + conv(act(conv(act(x)))), the input's size and channels matched by average pooling and zero channels.

    RAR's residual unit: leaky ReLU of slope 0.1, no batch norm. ``shared`` lets the skip start behind the first
    activation.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1, shared: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.stride, self.grow, self.shared = stride, outputs - inputs, shared

    def forward(self, x: Tensor) -> Tensor:
        active = F.leaky_relu(x, 0.1)
        skip = active if self.shared else x
        if self.stride > 1:
            skip = F.avg_pool2d(skip, self.stride, ceil_mode=True)
        if self.grow:
            skip = F.pad(skip, (0, 0, 0, 0, self.grow // 2, self.grow - self.grow // 2))
        return self.conv2(F.leaky_relu(self.conv1(active), 0.1)) + skip


def _rar_resnet(name: str, units: int) -> Callable[[tuple[int, ...], int], nn.Module]:
    """RAR's small residual networks: 16, 32 and 64 channels, ``units`` blocks of each."""

    def make(input_shape: tuple[int, ...], classes: int) -> nn.Module:
        channels, _, _ = _image(name, input_shape)
        layers: list[nn.Module] = [nn.Conv2d(channels, 16, 3, padding=1, bias=False)]
        for i, (inputs, outputs) in enumerate(((16, 16), (16, 32), (32, 64))):
            layers.append(PreActivationBlock(inputs, outputs, stride=1 if i == 0 else 2, shared=i == 0))
            layers += [PreActivationBlock(outputs, outputs) for _ in range(units - 1)]
        layers += [nn.LeakyReLU(0.1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)]
        return nn.Sequential(*layers)

    return make


class ResidualBlock(nn.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + skip(x)): He et al. 2015, with a convolution for a skip where the shape
    changes, 1×1 and normalised.

    A ``growing`` one starts as its skip, for the last norm's weight begins at 0; and the skip copies its input, into
    s²-fold channels where stride s folds space (:func:`near_identity_`).
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1, growing: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        if growing:
            nn.init.kaiming_normal_(self.conv1.weight)
            nn.init.kaiming_normal_(self.conv2.weight)
            nn.init.zeros_(self.norm2.weight)
        self.skip: nn.Module = nn.Identity()
        if (stride != 1 or inputs != outputs) and growing:
            self.skip = near_identity_(nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False))
        elif stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.skip(x))


def _resnet18(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """ResNet-18; images under 64×64 get the stem that is usual for CIFAR, one 3×3 convolution and no pooling."""
    channels, height, width = _image("resnet18", input_shape)
    if min(height, width) < 64:
        stem = [nn.Conv2d(channels, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    else:
        stem = [
            nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        ]  # fmt: skip
    blocks = []
    for i, (inputs, outputs) in enumerate(((64, 64), (64, 128), (128, 256), (256, 512))):
        blocks += [ResidualBlock(inputs, outputs, stride=1 if i == 0 else 2), ResidualBlock(outputs, outputs)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


class WideBlock(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))): Zagoruyko and Komodakis, "Wide residual networks", 2016."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        changes = stride != 1 or inputs != outputs
        self.skip = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        skip = x if self.skip is None else self.skip(active)
        return self.conv2(F.relu(self.norm2(self.conv1(active)))) + skip


def _wrn_16_4(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """A wide residual network of depth 16 and width 4: 64, 128 and 256 channels, two blocks of each."""
    channels, _, _ = _image("wrn-16-4", input_shape)
    layers: list[nn.Module] = [nn.Conv2d(channels, 16, 3, padding=1, bias=False)]
    for i, (inputs, outputs) in enumerate(((16, 64), (64, 128), (128, 256))):
        layers += [WideBlock(inputs, outputs, stride=1 if i == 0 else 2), WideBlock(outputs, outputs)]
    return nn.Sequential(
        *layers, nn.BatchNorm2d(256), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, classes)
    )


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.f = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x) + x


def _resnet9(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """ResNet-9, R2ET's network for CIFAR-10: 64 to 512 channels, two residual pairs, max pools."""
    channels, height, width = _image("resnet9", input_shape)
    last = _halved(_halved(_halved(height))), _halved(_halved(_halved(width)))

    def conv(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())

    def pool() -> nn.Module:
        return nn.MaxPool2d(2, ceil_mode=True)

    return nn.Sequential(
        conv(channels, 64), conv(64, 128), pool(), Residual(conv(128, 128), conv(128, 128)),
        conv(128, 256), pool(), conv(256, 512), pool(), Residual(conv(512, 512), conv(512, 512)),
        nn.MaxPool2d(last), nn.Flatten(), nn.Linear(512, classes),
    )  # fmt: skip


class CentredLinear(nn.Linear):
    """A linear layer whose outputs sum to zero: x ↦ (W − mean of its rows)·x + b − mean(b).

    Softmax does not notice. It is for the last layer of a network that trains for certified explanations: without it,
    an objective on the true label's logit can leave one class's logit linear while the others do the work, and that
    class's certificates are trivial. Here no logit can stay behind; with two classes their gradients are opposite.
    """

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias - self.bias.mean()
        return F.linear(x, self.weight - self.weight.mean(0, keepdim=True), bias)


@torch.no_grad()
def near_identity_(conv: nn.Conv2d, noise: float = 0.1) -> nn.Conv2d:
    """Set a convolution to hand its input on, plus ``noise`` times Kaiming's normal weights; returns it.

    Output channel c copies input channel c mod I. With stride s and O > I, the copies are of different pixels of each
    s×s cell, so that with O = I·s² nothing is lost. Behind a ReLU the input is ≥ 0 and the small positive bias keeps
    what is copied in the active half of the next ReLU: a deep network starts as a shallow one, with bounds as narrow,
    and grows its nonlinearity where that pays. Draws from the global generator.
    Raises ValueError for groups, dilation, or a kernel that does not reach all pixels of a cell.
    """
    if conv.groups != 1 or conv.dilation != (1, 1):
        raise ValueError(f"near_identity_ is for convolutions without groups and dilation; got {conv}.")
    outputs, inputs, *kernel = conv.weight.shape
    strides, padding = conv.stride, conv.padding
    if isinstance(padding, str) or any(p + s > size for p, s, size in zip(padding, strides, kernel, strict=True)):
        raise ValueError(
            f"The kernel of {conv} must reach every pixel of its stride cell, from its padding given in numbers."
        )
    nn.init.kaiming_normal_(conv.weight).mul_(noise)
    cell = [(int(padding[0]) + i, int(padding[1]) + j) for i in range(strides[0]) for j in range(strides[1])]
    for c in range(outputs):
        row, column = cell[c // inputs % len(cell)]
        conv.weight[c, c % inputs, row, column] += 1
    if conv.bias is not None:
        conv.bias.fill_(0.01)
    return conv


def _cnn7_identity(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """cnn7's five convolutions and two linear layers, narrow, near the identity behind the first, logits centred."""
    channels, height, width = _image("cnn7-identity", input_shape)
    first = nn.Conv2d(channels, 16, 3, padding=1)
    assert first.bias is not None
    nn.init.kaiming_normal_(first.weight)
    nn.init.uniform_(first.bias, -0.1, 0.1)  # away from 0, where a background of zeros would sit on every kink
    return nn.Sequential(
        first, nn.ReLU(),
        near_identity_(nn.Conv2d(16, 16, 3, padding=1)), nn.ReLU(),
        near_identity_(nn.Conv2d(16, 64, 3, stride=2, padding=1)), nn.ReLU(),
        near_identity_(nn.Conv2d(64, 64, 3, padding=1)), nn.ReLU(),
        near_identity_(nn.Conv2d(64, 64, 3, padding=1)), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * _halved(height) * _halved(width), 128), nn.ReLU(), CentredLinear(128, classes),
    )  # fmt: skip


def _resnet11_identity(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """A residual network with batch norm whose five blocks start as their skips: 11 convolutions and 2 in skips."""
    channels, height, width = _image("resnet11-identity", input_shape)
    stem = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight)
    blocks = ((16, 16), (16, 32), (32, 32), (32, 64), (64, 64))
    return nn.Sequential(
        stem, nn.BatchNorm2d(16), nn.ReLU(),
        *(ResidualBlock(inputs, outputs, outputs // inputs, growing=True) for inputs, outputs in blocks),
        nn.Flatten(), CentredLinear(64 * _halved(_halved(height)) * _halved(_halved(width)), classes),
    )  # fmt: skip


def _image(name: str, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(input_shape) != 3:
        raise ValueError(
            f"{name} takes images [C, H, W], but these inputs have shape {list(input_shape)}; use linear or an "
            "fc model."
        )
    return input_shape


def _halved(size: int) -> int:
    """The size behind a 3×3 convolution of stride 2 and padding 1, or a 2×2 pool that keeps the last odd row."""
    return (size + 1) // 2


MODELS: dict[str, Callable[[tuple[int, ...], int], nn.Module]] = {
    "linear": _linear,
    "fc-128": _fully_connected(128),
    "fc-256x2": _fully_connected(256, 256),
    "cnn-small": _cnn_small,
    "cnn7": _cnn7,
    "resnet9": _resnet9,
    "resnet18": _resnet18,
    "wrn-16-4": _wrn_16_4,
    "rec-mnist": _rec_mnist,
    "rar-mnist": _rar_mnist,
    "rar-gtsrb": _rar_resnet("rar-gtsrb", 2),
    "rar-flower": _rar_resnet("rar-flower", 1),
    "cnn7-identity": _cnn7_identity,
    "resnet11-identity": _resnet11_identity,
}
