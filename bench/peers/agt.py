"""AbstractGradientTraining as an opponent: the interval passes of its regulariser from the REC paper.

The library bounds gradients in parameters; the gradient in the input is bounded by a script that comes with it
(``scripts/poisoning_paper/robust_regularization.py``), for a network with one logit and binary cross entropy. The
script's two functions, one layer forward and one layer backward, are called here with a logit's gradient in place of
that loss's. It propagates end points, and multiplies by weights as if they were intervals, of radius 0 here: four
products where two would do.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn


def regularizer() -> ModuleType:
    """The script, from the clone that the library is imported from. Raises ImportError if either is missing."""
    package = importlib.util.find_spec("abstract_gradient_training")
    if package is None or package.origin is None:
        raise ImportError("abstract_gradient_training is not installed")
    path = Path(package.origin).parents[1] / "scripts" / "poisoning_paper" / "robust_regularization.py"
    if not path.exists():
        raise ImportError(f"{path} is missing: put a clone on the path, not a wheel")
    spec = importlib.util.spec_from_file_location("agt_robust_regularization", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def gradient_bounds(
    model: nn.Sequential, x: Tensor, eps: float, target: Tensor, *, gamma: float = 0.0
) -> Callable[[], tuple[Tensor, Tensor]]:
    """A function that returns lower and upper ends of d logit[target] / d x, differentiable in the parameters.

    ``gamma`` is the radius of the box of every weight and bias. Raises ImportError without the library,
    NotImplementedError for layers that it does not know.
    """
    script = regularizer()
    for layer in model:
        if not isinstance(layer, nn.Linear | nn.Conv2d | nn.ReLU | nn.Flatten):
            raise NotImplementedError(f"it takes Linear, Conv2d, ReLU and Flatten, not {type(layer).__name__}")
    *layers, last = model
    assert isinstance(last, nn.Linear)

    def run() -> tuple[Tensor, Tensor]:
        # The script multiplies a weight by a batch of columns. While nothing is recorded, PyTorch copies the weight for
        # each of them: ten times slower at 64 images than what it does while recording.
        with torch.set_grad_enabled(torch.is_grad_enabled() or len(x) > 1):
            return bound()

    def bound() -> tuple[Tensor, Tensor]:
        boxes = [(x - eps, x + eps)]
        for layer in layers:
            boxes.append(script.propagate_module_forward(layer, *boxes[-1], gamma))
        lower = upper = torch.nn.functional.one_hot(target, last.out_features).to(x.dtype)
        for layer, box in zip(reversed(model), reversed(boxes), strict=True):
            lower, upper = script.propagate_module_backward(layer, lower, upper, *box, gamma)
        return lower, upper

    return run
