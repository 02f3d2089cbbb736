"""Networks by name, for the command line and for checkpoints: plain ``torch.nn``, which knows nothing of bounds."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable

from torch import nn


def build(name: str, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """A network [B, *input_shape] → logits [B, classes], in training mode, with weights from the global generator.

    ``name`` is one of ``MODELS``, or ``package.module:factory`` for your own: the factory is called with
    (input_shape, classes) and returns the module.
    Raises ValueError for an unknown name, a factory that cannot be found or returns something else, or a
    convolutional network on a table.
    """
    if ":" in name:
        model = _factory(name)(input_shape, classes)
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


def _image(name: str, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(input_shape) != 3:
        raise ValueError(
            f"{name} takes images [C, H, W], but these inputs have shape {list(input_shape)}; use linear or an "
            "fc model."
        )
    return input_shape


def _halved(size: int) -> int:
    """The size behind a 3×3 convolution of stride 2 and padding 1."""
    return (size + 1) // 2


MODELS: dict[str, Callable[[tuple[int, ...], int], nn.Module]] = {
    "linear": _linear,
    "fc-128": _fully_connected(128),
    "fc-256x2": _fully_connected(256, 256),
    "cnn-small": _cnn_small,
    "cnn7": _cnn7,
}
