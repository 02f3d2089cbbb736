"""Whole runs: train by a recipe, keep the result and its checkpoints in a folder, go on where a run was interrupted."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyxai_bounds import data, models
from pyxai_bounds.train.checkpoint import (
    check_writable,
    clear_checkpoints,
    load,
    load_checkpoint,
    read_description,
    save,
    save_checkpoint,
)
from pyxai_bounds.train.distributed import world
from pyxai_bounds.train.log import Epoch, Log
from pyxai_bounds.train.loop import OnEpoch, Progress, fit
from pyxai_bounds.train.recipe import Recipe, objective_of, typed_options

RESIDENT_BYTES = 2 << 30  # training samples that a GPU keeps, rather than fetch each batch


def run(
    recipe: Recipe,
    out: str | Path,
    on_epoch: OnEpoch | None = None,
    *,
    dataset: data.Dataset | None = None,
    data_root: str | Path | None = None,
    device: str = "cpu",
    resume: bool = False,
    checkpoint_every: int = 500,
    tensorboard: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    tell: Callable[[str], None] = warnings.warn,
) -> nn.Module:
    """Train what the recipe says, keep it in the folder ``out``, and return the model in evaluation mode, on the CPU.

    Besides the finished run the folder holds log.csv and, until it is finished, a checkpoint of every
    ``checkpoint_every`` steps (0: of none) and the one before. ``resume`` continues from the newest one that is whole,
    to the same result, bit for bit, as without the interruption (on the CPU, with one thread); where there is nothing
    to continue it starts, and where the run is finished it returns it. ``tell`` hears what a person should know: of
    damaged checkpoints, for example.
    Under torchrun the processes share the work. ``dataset`` saves loading what ``recipe.data`` names.

    Raises ValueError for names that do not exist and settings that make no sense, TrainingDivergedError if the
    loss does not stay finite (no finished run is written then).
    """
    recipe.check()
    if checkpoint_every < 0:
        raise ValueError(f"checkpoint_every={checkpoint_every} must be ≥ 0; 0 writes no checkpoints.")
    recipe = replace(recipe, options=typed_options(recipe.objective, recipe.options))
    dataset = dataset or data.load(recipe.data, data_root)
    objective = objective_of(recipe, dataset.clip)
    if resume and (finished := _finished(recipe, out)) is not None:
        tell(f"The run in {out} is finished.")
        return finished
    model = _built(recipe, dataset)
    processes = world(device)
    tell = tell if processes.first else lambda _: None
    _tell_if_only_natural(recipe, tell)
    check_writable(Path(out) / "run.json")
    model.to(processes.device)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    saved = load_checkpoint(out, tell) if resume else None
    if saved is not None:
        _check_same(recipe, saved[1]["recipe"], out)
        tell(f"Continuing after step {saved[1]['step']}.")
    elif processes.first:
        clear_checkpoints(out)
    history = [Epoch(**row) for row in saved[1]["history"]] if saved else ()
    log: Log | None = None

    def progress(now: Progress) -> None:
        nonlocal log
        if now.done is not None:
            log = log or Log(out, history, tensorboard)
            log.write(now.done)
        if on_progress is not None:
            on_progress(now)

    def checkpoint(step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        save_checkpoint(out, step, tensors, {"recipe": recipe.as_json(), **state})

    x, y = dataset.train_x, dataset.train_y
    if processes.device.type == "cuda" and x.numel() * x.element_size() <= RESIDENT_BYTES:
        x, y = x.to(processes.device), y.to(processes.device)
    losses = fit(
        model, x, y, objective, recipe,
        on_epoch=on_epoch, on_progress=progress, on_checkpoint=checkpoint, checkpoint_every=checkpoint_every,
        resume=saved, processes=processes,
    )  # fmt: skip
    model = model.to("cpu").eval()
    if processes.first:
        if log is not None:
            log.close()
        save(
            model, out,
            recipe=recipe.as_json(), input_shape=dataset.input_shape, classes=dataset.classes, losses=losses,
        )  # fmt: skip
        clear_checkpoints(out)
        (Path(out) / "evaluation.json").unlink(missing_ok=True)  # of an earlier run in this folder
    processes.gather(None)  # nobody leaves before the run is written
    return model


def stored_recipe(out: str | Path) -> Recipe | None:
    """The recipe of the run in a folder, of the one under way if there is one; None where there is no run.

    Raises ValueError if what is there is damaged.
    """
    saved = load_checkpoint(out, lambda _: None)
    if saved is not None:
        return Recipe.from_json(saved[1]["recipe"])
    if (Path(out) / "run.json").is_file():
        return Recipe.from_json(read_description(out)["recipe"])
    return None


def _tell_if_only_natural(recipe: Recipe, tell: Callable[[str], None]) -> None:
    if recipe.objective != "natural" and not recipe.steps and recipe.epochs <= recipe.natural_epochs:
        tell(
            f"All {recipe.epochs} epochs are natural: {recipe.objective} never runs. It begins after "
            f"{recipe.natural_epochs} natural epochs: train for more epochs, or with fewer natural ones."
        )


def _built(recipe: Recipe, dataset: data.Dataset) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model = models.build(recipe.model, dataset.input_shape, dataset.classes)
    if recipe.start_from:
        try:
            model.load_state_dict(load(recipe.start_from).state_dict())
        except RuntimeError as error:
            raise ValueError(f"The run in {recipe.start_from} is of another network than {recipe.model}.") from error
    return model


def _finished(recipe: Recipe, out: str | Path) -> nn.Module | None:
    """The finished run of this recipe, if there is one and none is under way."""
    folder = Path(out)
    if any(folder.glob("checkpoint-*.json")) or not (folder / "run.json").is_file():
        return None
    _check_same(recipe, read_description(out)["recipe"], out)
    return load(out)


def _check_same(recipe: Recipe, saved: dict[str, Any], out: str | Path) -> None:
    now = recipe.as_json()
    old = Recipe.from_json(saved).as_json()
    different = [f"{name} ({old.get(name)} there, {now[name]} now)" for name in now if now[name] != old.get(name)]
    if different:
        raise ValueError(
            f"The run in {out} has another recipe: {', '.join(different)}. Continue it as it was, or start anew "
            "without --resume."
        )
