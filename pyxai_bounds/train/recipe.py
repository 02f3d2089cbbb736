"""A recipe: everything that determines a run, as plain values that the command line and JSON can hold."""

from __future__ import annotations

import functools
import inspect
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args, get_origin

from torch import Tensor, nn

from pyxai_bounds.train.objectives import by_name
from pyxai_bounds.train.schedules import Ramp, Rate

Loss = Callable[[nn.Module, Tensor, Tensor, float], Tensor]  # (model, x, y, eps) → scalar


class Options(dict[str, Any]):
    """Options of an objective by name: its keyword arguments."""


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a run."""

    data: str = "digits-parity"
    """a data set (pyxai-bounds info lists them), or package.module:factory"""
    model: str = "fc-128"
    """a network (pyxai-bounds info lists them), or package.module:factory"""
    objective: str = "rec"
    """what is minimised after the natural epochs (pyxai-bounds info lists them)"""
    options: Mapping[str, Any] = field(default_factory=Options)
    """options of the objective, such as alpha=0.1 width=log; pyxai-bounds info --objective NAME explains them"""
    start_from: str = ""
    """a run's folder to take the initial weights from"""
    seed: int = 0
    """of the initial weights and the order of the samples"""

    eps: float = 0.02
    """radius of the box that is trained for, in the units of the data"""
    eps_ramp: Ramp = "linear"
    """how eps grows: constant (at once), linear, or smooth (slowly first)"""
    eps_ramp_share: float = 0.5
    """share of the objective's steps during which eps grows"""
    weight: float = 1.0
    """s in (1 − s)·cross entropy + s·objective"""
    weight_ramp: Ramp = "constant"
    """how s grows"""
    weight_ramp_share: float = 0.5
    """share of the objective's steps during which s grows"""

    epochs: int = 40
    """all epochs, the natural ones included"""
    steps: int = 0
    """optimiser steps in all, instead of epochs, if not 0"""
    natural_epochs: int = 5
    """epochs of cross entropy alone, before the objective"""
    batch_size: int = 100
    """samples in an optimiser step, over all processes"""
    accumulate: int = 1
    """parts that a step's samples are processed in, to save memory"""
    class_weights: tuple[float, ...] = ()
    """how often each class is drawn, relative to its samples; without, each sample once an epoch"""
    validation: float = 0.0
    """share of the training samples held out to watch"""
    patience: int = 0
    """stop after this many epochs without a better validation loss, and keep the best weights; 0: never"""

    optimiser: Literal["adam", "adamw", "sgd"] = "adam"
    """sgd has momentum"""
    lr: float = 2e-3
    """learning rate"""
    lr_schedule: Rate = "constant"
    """constant, cosine (to 0), or steps"""
    lr_steps: tuple[tuple[int, float], ...] = ()
    """pairs STEP RATE for --lr-schedule steps: the rate from that step on"""
    warmup: int = 0
    """steps in which the learning rate grows from 0"""
    momentum: float = 0.9
    """of sgd"""
    beta2: float = 0.999
    """decay of adam's and adamw's mean square; a smaller one adapts sooner to widths that change"""
    weight_decay: float = 0.0
    """of the optimiser"""
    clip_gradient: float = 0.0
    """greatest norm of the gradient; 0: any"""
    batch_norm: Literal["update", "frozen", "batch"] = "update"
    """batch norm under an objective: running statistics that go on learning, that stay, or the batch's own"""
    channels_last: bool = False
    """keep images and weights channels-last in memory"""
    recompute: bool = False
    """keep few values of the objective's bounds for the backward pass and compute the others again, to save memory"""
    cuda_graph: bool = False
    """on a GPU, record the objective's steps as a CUDA graph: shorter where launching takes longer than computing"""

    def check(self) -> None:
        """Raises ValueError for a setting that makes no sense, and says which."""
        for name in ("epochs", "batch_size", "accumulate"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "must be ≥ 1")
        for name in ("steps", "natural_epochs", "patience", "warmup"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "must be ≥ 0")
        for name in ("eps", "momentum", "weight_decay", "clip_gradient"):
            _require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "must be finite and ≥ 0")
        for name in ("weight", "eps_ramp_share", "weight_ramp_share"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "must lie between 0 and 1")
        for name, hint in typing.get_type_hints(type(self)).items():
            if get_origin(hint) is Literal:
                value = getattr(self, name)
                _require(value in get_args(hint), name, value, f"must be one of {', '.join(get_args(hint))}")
        _require(0 <= self.beta2 < 1, "beta2", self.beta2, "must be ≥ 0 and below 1")
        _require(0 < self.lr < math.inf, "lr", self.lr, "must be positive and finite")
        _require(all(r > 0 for _, r in self.lr_steps), "lr_steps", self.lr_steps, "must hold positive rates")
        _require(bool(self.lr_steps) == (self.lr_schedule == "steps"), "lr_steps", self.lr_steps,
                 "go with lr_schedule='steps', and only with it")  # fmt: skip
        _require(0 <= self.validation < 1, "validation", self.validation, "must be ≥ 0 and below 1")
        _require(not self.patience or self.validation > 0, "patience", self.patience, "needs validation above 0")
        _require(all(0 <= w < math.inf for w in self.class_weights), "class_weights", self.class_weights,
                 "must be finite and ≥ 0")  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """What JSON gives back after writing this recipe: tuples are lists there."""
        result: dict[str, Any] = json.loads(json.dumps(asdict(self) | {"options": dict(self.options)}))
        return result

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Recipe:
        """A recipe from what JSON holds, version 0.1's with its own fields for REC's options included.

        Raises ValueError for fields that this version does not know.
        """
        values = dict(values)
        options = dict(values.pop("options", {}))
        for name in ("alpha", "width"):
            if name in values and "start_from" not in values:
                value = values.pop(name)
                if values.get("objective") == "rec":
                    options[name] = value
        unknown = sorted(values.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"The recipe has {', '.join(unknown)}, which this version of pyxai_bounds does not know.")
        for name in ("class_weights", "lr_steps"):
            if name in values:
                values[name] = tuple(tuple(v) if isinstance(v, list) else v for v in values[name])
        return cls(options=Options(options), **values)


def _require(condition: bool, name: str, value: object, what: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value} {what}.")


def objective_of(recipe: Recipe, clip: tuple[float, float] | None) -> Loss:
    """The loss that a recipe names, with its options. Raises ValueError for an unknown name or option."""
    function = by_name(recipe.objective)
    return functools.partial(function, clip=clip, **typed_options(recipe.objective, recipe.options))


def typed_options(objective: str, options: Mapping[str, Any]) -> Options:
    """The options of an objective, text turned into what the objective's signature asks for.

    Raises ValueError for an option that it does not have, and for a value of the wrong type.
    """
    function = by_name(objective)
    hints = typing.get_type_hints(function)
    known = {
        p.name: hints.get(p.name) for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY
    }
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(
            f"The objective {objective} has no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}."
        )
    return Options(
        (name, _converted(value, known[name], f"The option {name} of {objective}")) for name, value in options.items()
    )


def _converted(value: Any, hint: Any, what: str) -> Any:
    """``value`` as the annotation ``hint`` asks; text comes from a command line. Raises ValueError if it cannot be."""
    origin = get_origin(hint)
    if origin is Literal:
        for choice in get_args(hint):
            if value == choice or (isinstance(value, str) and value == str(choice)):
                return choice
        raise ValueError(f"{what} is {value!r}; choose one of {', '.join(map(str, get_args(hint)))}.")
    if origin in (typing.Union, types.UnionType):
        if value in (None, "none", "None") and type(None) in get_args(hint):
            return None
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        for kind in kinds[:-1]:
            try:
                return _converted(value, kind, what)
            except ValueError:
                continue
        return _converted(value, kinds[-1], what)
    if origin in (tuple, list):
        parts = [part for part in value.split(",") if part] if isinstance(value, str) else list(value)
        return tuple(_converted(part, get_args(hint)[0], what) for part in parts)
    if hint is bool:
        chosen = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}.get(str(value).lower())
        if chosen is None:
            raise ValueError(f"{what} is {value!r}; choose true or false.")
        return chosen
    if hint in (int, float):
        try:
            number = hint(value)
            if isinstance(value, bool) or (hint is int and number != float(value)):
                raise ValueError
        except (TypeError, ValueError):
            raise ValueError(f"{what} is {value!r}; it must be {'a whole ' if hint is int else 'a '}number.") from None
        return number
    return value
