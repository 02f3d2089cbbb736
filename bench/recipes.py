"""``python -m bench.recipes digits-cnn7 --seeds 3``: trains and certifies the networks of docs/recipes.md."""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyxai_bounds import Interval, TopK, bound, certify, data, explain, models
from pyxai_bounds.certify.metrics import (
    accuracy,
    commonest_top_share,
    relu_inputs,
    same_class_cosine,
    unstable_relu_fraction,
)
from pyxai_bounds.data import Dataset
from pyxai_bounds.train import linear_ramp, natural
from pyxai_bounds.train.objectives.separated import separated_topk

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "cpu" / "recipes.csv"
PICTURE = ROOT / "docs" / "recipes.png"
COLUMNS = [
    "recipe", "model", "by", "accuracy", "train_accuracy", "certified_01", "certified_02", "certified_even_odd",
    "cosine", "cosine_even_odd", "commonest_top", "top_sets", "unstable", "unstable_by_layer", "switching_by_layer",
    "seconds", "cpu_seconds", "threads", "load", "seed", "settings",
]  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """One recipe: Adam, cosine learning rate to 0, eps growing linearly over half of the objective's steps."""

    model: str
    epochs: int
    hinge: float
    margin: float
    width: float
    stability: float
    hinge_ramp: bool = False  # whether the hinge's weight grows with eps
    reach: float = 2.0
    eps: float = 0.012
    natural_epochs: int = 5
    batch_size: int = 100
    lr: float = 2e-3
    warmup: int = 42  # steps
    clip_gradient: float = 5.0


LINEAR = 0.9169  # test accuracy of logistic regression (Adam 0.02, 600 full-batch steps), certified at any radius

RECIPES = {
    "digits-cnn7": Settings("cnn7-identity", epochs=110, hinge=0.45, margin=0.025, width=0.05, stability=1.0),
    "digits-cnn7-ramped": Settings(
        "cnn7-identity", epochs=110, hinge=0.75, margin=0.025, width=0.05, stability=1.0, hinge_ramp=True
    ),
    "digits-resnet": Settings("resnet11-identity", epochs=90, hinge=0.35, margin=0.025, width=0.03, stability=1.0),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.recipes", description=__doc__)
    parser.add_argument("recipe", choices=[*RECIPES, "plot"], help=f"what to train, or plot: draw {PICTURE.name} anew")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 … SEEDS − 1")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the CSV that rows are added to")
    parser.add_argument("--split", type=int, default=0, help="seed of another split of the data; 0 is the fixed one")
    options = parser.parse_args()
    if options.recipe == "plot":
        plot(options.out, PICTURE)
        return 0
    settings, dataset = RECIPES[options.recipe], data.load("digits-parity")
    if options.split:
        dataset = other_split(dataset, options.split)
    for seed in range(options.seeds):
        wall, cpu, load = time.perf_counter(), time.process_time(), os.getloadavg()[0]
        model = train(settings, dataset, seed)
        row = {
            "recipe": options.recipe + (f" split {options.split}" if options.split else ""),
            "model": settings.model,
            "by": "package",
            "seed": seed,
            "seconds": round(time.perf_counter() - wall, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "threads": torch.get_num_threads(),
            "load": f"{load:.1f} to {os.getloadavg()[0]:.1f}",
            "settings": json.dumps(asdict(settings)),
            **measure(model, dataset),
        }
        append(options.out, row)
        print(" ".join(f"{name}={row[name]}" for name in COLUMNS if name != "settings"), flush=True)
    return 0


def train(settings: Settings, dataset: Dataset, seed: int) -> nn.Module:
    """A trained network in evaluation mode. Batch norm keeps the statistics of the natural epochs, so that the network
    that trains is the one that is certified."""
    x, y = dataset.train_x, dataset.train_y
    torch.manual_seed(seed)
    model = models.build(settings.model, dataset.input_shape, dataset.classes)
    optimiser = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99))
    order = torch.Generator().manual_seed(seed)
    per_epoch = len(x) // settings.batch_size
    steps, before = settings.epochs * per_epoch, settings.natural_epochs * per_epoch
    for step, batch in enumerate(_batches(len(x), settings, order)):
        model.train(step < before)
        if step < before:
            loss = natural(model, x[batch], y[batch])
        else:
            eps = linear_ramp(step - before, (steps - before) // 2, settings.eps)
            loss = separated_topk(
                model, x[batch], y[batch], eps, dataset.clip, margin=settings.margin, width=settings.width,
                hinge=settings.hinge * (eps / settings.eps if settings.hinge_ramp else 1),
                stability=settings.stability, reach=settings.reach,
            )  # fmt: skip
        rate = settings.lr * min(1, (step + 1) / settings.warmup) * (1 + math.cos(math.pi * step / steps)) / 2
        optimiser.param_groups[0]["lr"] = rate
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip_gradient, error_if_nonfinite=True)
        optimiser.step()
    return model.eval()


def _batches(samples: int, settings: Settings, order: torch.Generator) -> Iterator[Tensor]:
    for _ in range(settings.epochs):
        shuffled = torch.randperm(samples, generator=order)
        yield from (b for b in shuffled.split(settings.batch_size) if len(b) == settings.batch_size)


def measure(model: nn.Module, dataset: Dataset) -> dict[str, Any]:
    """The columns that describe a network. even_odd: the same for either class, which no class may get for free.

    switching: the share of a layer's ReLUs that are active on 2 to 98 % of the samples; the others are linear there.
    """
    x, y, clip = dataset.test_x, dataset.test_y, dataset.clip
    fn, top = explain.gradient(model), TopK(5)
    certificates = [certify(fn, x, y, eps=eps, property=top, clip=clip, sharpen=False) for eps in (0.01, 0.02)]
    nominal, holds = certificates[0].nominal, certificates[0].holds
    with torch.no_grad():
        kinks = bound(relu_inputs(model))(Interval.linf(x, 0.01, clip))
        active = [(layer > 0).flatten(1).double().mean(0) for layer in relu_inputs(model)(x)]
    return {
        "accuracy": round(accuracy(model, x, y), 4),
        "train_accuracy": round(accuracy(model, dataset.train_x, dataset.train_y), 4),
        "certified_01": round(holds.double().mean().item(), 4),
        "certified_02": round(certificates[1].holds.double().mean().item(), 4),
        "certified_even_odd": [round(holds[y == label].double().mean().item(), 3) for label in (0, 1)],
        "cosine": round(same_class_cosine(nominal, y), 4),
        "cosine_even_odd": [round(same_class_cosine(nominal[y == label], y[y == label]), 3) for label in (0, 1)],
        "commonest_top": round(commonest_top_share(top, nominal, y), 4),
        "top_sets": len(top.top(nominal).unique(dim=0)),
        "unstable": round(unstable_relu_fraction(model, x, 0.01, clip) or 0.0, 4),  # at eps 0.01, as by layer
        "unstable_by_layer": [round(((box.lower <= 0) & (box.upper > 0)).double().mean().item(), 4) for box in kinks],
        "switching_by_layer": [round(((a > 0.02) & (a < 0.98)).double().mean().item(), 3) for a in active],
    }


def other_split(dataset: Dataset, seed: int) -> Dataset:
    """The same samples divided anew, for recipes that were chosen by looking at the fixed split's test samples."""
    x, y = torch.cat([dataset.train_x, dataset.test_x]), torch.cat([dataset.train_y, dataset.test_y])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order.split([len(dataset.train_x), len(dataset.test_x)])
    return replace(dataset, train_x=x[train], train_y=y[train], test_x=x[test], test_y=y[test])


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, row: dict[str, Any], columns: Sequence[str] = tuple(COLUMNS)) -> None:
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def plot(results: Path, picture: Path) -> None:
    """The frontier: certified share against accuracy, a mark for each run, dark where top sets are many."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    rows = read(results)
    figure = Figure(figsize=(9.6, 5.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    marks = {"fc-128": ("v", 34), "cnn7": ("o", 38), "resnet11": ("s", 34)}
    for ax, title, centred in zip(
        axes, ("logits centred", "logits free: one class may stay linear"), (1, 0), strict=True
    ):
        for kind, (mark, size) in marks.items():
            for final in (False, True):
                chosen = [
                    row for row in rows
                    if row["model"].startswith(kind) and (row["by"] == "package") == final
                    and (json.loads(row["settings"]).get("logits") != "free") == centred
                ]  # fmt: skip
                if not chosen:
                    continue
                points = ax.scatter(
                    [float(row["certified_01"]) for row in chosen], [float(row["accuracy"]) for row in chosen],
                    c=[int(row["top_sets"]) for row in chosen], norm=LogNorm(1, 200), cmap="viridis_r", marker=mark,
                    s=size * (2.2 if final else 1), edgecolors="#d55e00" if final else "#808285",
                    linewidths=1.6 if final else 0.5, label=kind + (", trained by the engine" if final else ""),
                )  # fmt: skip
        ax.scatter([1], [LINEAR], marker="*", s=130, color="#d55e00", label="linear model", zorder=3)
        for level, certified in ((0.97, 0.85), (0.97, 0.70)):
            ax.plot([certified, certified, 1.03], [1, level, level], color="#808285", linewidth=0.8, linestyle=":")
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("certified top-5 at eps 0.01, share of test samples")
        ax.set_xlim(-0.03, 1.03)
        ax.set_ylim(0.88, 1.0)
    axes[0].set_ylabel("test accuracy")
    axes[0].legend(loc="lower left", fontsize=8, frameon=False)
    bar = figure.colorbar(points, ax=axes, shrink=0.8, label="different top-5 sets among 397 test samples")
    bar.set_ticks([1, 3, 10, 30, 100, 200], labels=["1", "3", "10", "30", "100", "200"])
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    raise SystemExit(main())
