"""auto_LiRPA as an opponent: its bounds on a Jacobian (``JacobianOP``), of which one label's column.

Its bounds are not differentiable in the weights of linear layers, so it certifies and does not train; convolutions
work for one image at a time, and average pooling has no gradient there.
"""

from __future__ import annotations

import copy
import functools
import logging
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn


def gradient_bounds(
    model: nn.Sequential, x: Tensor, eps: float, target: Tensor, *, any_label: bool = False, method: str = "IBP"
) -> Callable[[], tuple[Tensor, Tensor]]:
    """A function that returns lower and upper ends of d logit[target] / d x over the box of radius ``eps`` about x.

    What is built once, the library's graph of the network, is built here. By default the label is built in as well:
    the last layer keeps one row, which is the least that it can be asked to do, and a new label needs a new graph.
    With ``any_label`` the label is an argument, as it is for the engine. ``method``: "IBP", intervals; "CROWN", linear
    bounds; or "CROWN-Optimized", whose slopes are optimised.
    Raises ImportError without the library, NotImplementedError for what crashes in it.
    """
    with warnings.catch_warnings():  # it still compiles functions by torch.jit.script
        warnings.simplefilter("ignore")
        from auto_LiRPA import BoundedModule, BoundedTensor
        from auto_LiRPA.jacobian import JacobianOP
        from auto_LiRPA.perturbations import PerturbationLpNorm

    if len(x) > 1 and not any_label:
        raise NotImplementedError("the label is built in, so that it takes one image at a time")
    if len(x) > 1 and any(isinstance(module, nn.Conv2d) for module in model.modules()):
        raise NotImplementedError("its gradient of a convolution takes one image at a time")
    # Otherwise it logs every Jacobian that it expands.
    logging.getLogger("auto_LiRPA").setLevel(logging.WARNING)

    class OneLabel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            *layers, last = copy.deepcopy(model)
            self.layers = nn.Sequential(*layers, nn.Linear(last.in_features, 1))
            with torch.no_grad():
                self.layers[-1].weight.copy_(last.weight[target])
                self.layers[-1].bias.copy_(last.bias[target])

        def forward(self, x: Tensor) -> Tensor:
            return JacobianOP.apply(self.layers(x), x)

    class AnyLabel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = copy.deepcopy(model)

        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            return JacobianOP.apply((self.layers(x) * label).sum(1, keepdim=True), x)

    network, label = (AnyLabel(), (_one_hot(model, x, target),)) if any_label else (OneLabel(), ())
    with warnings.catch_warnings():  # of torch.jit.trace, by which it reads the network
        warnings.simplefilter("ignore")
        bounded = BoundedModule(network, (x, *label), bound_opts={"conv_mode": "matrix"}, device=x.device)
    ball = PerturbationLpNorm(norm=float("inf"), eps=eps)

    def run() -> tuple[Tensor, Tensor]:
        given = (BoundedTensor(x, ball), *label)
        if method == "IBP":
            lower, upper = bounded.compute_bounds(x=given, method=method)
        else:
            lower, upper = bounded.compute_jacobian_bounds(given, optimize=method == "CROWN-Optimized")
        return lower.reshape(x.shape), upper.reshape(x.shape)

    return run


any_label = functools.partial(gradient_bounds, any_label=True)


def _one_hot(model: nn.Sequential, x: Tensor, target: Tensor) -> Tensor:
    return nn.functional.one_hot(target, model[-1].out_features).to(x.dtype)
