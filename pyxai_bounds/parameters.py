"""Boxes of parameters: every network whose weights lie near the given ones."""

from __future__ import annotations

import fnmatch
import math
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from pyxai_bounds import rounding as rd
from pyxai_bounds.interval import Interval

# The layers whose weights and biases are perturbed unless names are given.
_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
)


def _parameters_of(layer: nn.Module) -> Iterator[nn.Parameter]:
    """The layer's own, and those from which ``torch.nn.utils.parametrize`` makes its weights."""
    yield from layer.parameters(recurse=False)
    if parametrize.is_parametrized(layer):
        yield from layer.parametrizations.parameters()  # type: ignore[union-attr]


class ParameterBox:
    """All θ′ with |θ′ − θ| ≤ relative·|θ| + absolute, elementwise, for the chosen parameters of a model.

    A specification: the midpoints are the live parameters, so that an optimiser step moves the box with them.
    """

    def __init__(
        self,
        model: nn.Module,
        relative: float = 0.0,
        absolute: float = 0.0,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"parameter_box: model must be an nn.Module, got {type(model).__name__}.")
        for name, value in (("relative", relative), ("absolute", absolute)):
            if not isinstance(value, (int, float)):
                raise TypeError(f"parameter_box: {name} must be a number, got {type(value).__name__}.")
            if not 0 <= value < math.inf:
                raise ValueError(f"parameter_box: {name} must be finite and ≥ 0, got {value}.")
        for name, patterns in (("include", include), ("exclude", exclude)):
            listed = [] if patterns is None or isinstance(patterns, str) else patterns
            if not isinstance(listed, Sequence) or not all(isinstance(pattern, str) for pattern in listed):
                raise TypeError(
                    f"parameter_box: {name} must be a pattern of names or a list of such, got {patterns!r}."
                )
        self._model = weakref.ref(model)  # captures are kept per model, and must not keep it alive
        hash(self._model)  # while it lives: a reference remembers its hash
        self.relative, self.absolute = float(relative), float(absolute)
        self.include = (include,) if isinstance(include, str) else None if include is None else tuple(include)
        self.exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude or ())
        for pattern in (*(self.include or ()), *self.exclude):
            if not any(fnmatch.fnmatchcase(name, pattern) for name, _ in model.named_parameters()):
                names = ", ".join(name for name, _ in model.named_parameters())
                raise ValueError(f"parameter_box: no parameter is called {pattern!r}; there are {names or 'none'}.")
        if not self.parameters():
            raise ValueError(
                "parameter_box: the box holds no parameter. Without include it takes those of linear, convolutional "
                "and batch-norm layers; name others with include='pattern'."
            )

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters in the box, by name."""
        model = self._model()
        if model is None:
            raise ReferenceError("The model of this parameter box no longer exists; build the box from the new one.")
        usual = {id(p) for m in model.modules() if isinstance(m, _LAYERS) for p in _parameters_of(m)}
        chosen = {}
        for name, parameter in model.named_parameters():
            named = self.include is not None and any(fnmatch.fnmatchcase(name, p) for p in self.include)
            left_out = any(fnmatch.fnmatchcase(name, pattern) for pattern in self.exclude)
            if (named or (self.include is None and id(parameter) in usual)) and not left_out:
                chosen[name] = parameter
        return chosen

    def radius(self, parameter: Tensor) -> Tensor:
        """relative·|θ| + absolute; rounded up where bounds are proofs."""
        if rd.mode() == rd.Rounding.NEAREST:
            return parameter.abs() * self.relative + self.absolute
        # In float64, which holds the two numbers themselves: a small factor would underflow in float32.
        rad = parameter.abs().double() * self.relative + self.absolute
        return rd.narrow_up(rd.up(rad, underflows=True), parameter.dtype)

    def interval(self, parameter: Tensor) -> Interval:
        """The box of one parameter as an Interval; differentiable in it."""
        return Interval.of(parameter, self.radius(parameter))

    @property
    def key(self) -> Any:
        """Equal for boxes that are the same set."""
        return self._model, self.relative, self.absolute, self.include, self.exclude

    def __repr__(self) -> str:
        return f"ParameterBox({len(self.parameters())} tensors, relative={self.relative:g}, absolute={self.absolute:g})"


def parameter_box(
    model: nn.Module,
    *,
    relative: float = 0.0,
    absolute: float = 0.0,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> ParameterBox:
    """The networks whose parameters θ′ satisfy |θ′ − θ| ≤ relative·|θ| + absolute: for ``bound(fn, parameters=…)``.

    By default all weights, biases and batch-norm affine parameters of linear, convolutional and batch-norm layers move,
    biases by the same rule as weights; of a parametrized layer (weight norm, spectral norm) the parameters move from
    which its weight is made, not the weight itself. ``include`` and ``exclude`` are patterns of parameter names
    ("*.weight", "fc.*"): ``include`` replaces that choice, ``exclude`` takes away from it.
    Raises TypeError for what is no module; ValueError for negative radii, a pattern that matches nothing, an empty box.
    Source: the model perturbations of Wicker et al., ICLR 2023, arXiv 2212.08507 (gamma is ``relative`` there).
    """
    return ParameterBox(model, relative, absolute, include, exclude)
