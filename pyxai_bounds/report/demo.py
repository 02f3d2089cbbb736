"""The demo: five small networks on even against odd digits, trained, certified, attacked and reported."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyxai_bounds import data
from pyxai_bounds.report.evaluate import Evaluation, evaluate
from pyxai_bounds.train import Recipe, run

EPS = (0.01, 0.02)
K = 5

# A network and its undefended twin differ in the objective alone. Depth costs certificates: the convolutional network
# needs twice the weight on the width, and slower steps, to keep its unstable ReLUs few.
RECIPES: dict[str, Recipe] = {
    "linear": Recipe(model="linear", objective="natural", epochs=100, lr=1e-2),
    "fc-128": Recipe(model="fc-128", objective="natural", epochs=100, lr=2e-3),
    "fc-128, REC": Recipe(model="fc-128", objective="rec", epochs=100, lr=2e-3, options={"alpha": 0.1}),
    "cnn-small": Recipe(model="cnn-small", objective="natural", epochs=80, lr=1e-3),
    "cnn-small, REC": Recipe(model="cnn-small", objective="rec", epochs=80, lr=1e-3, options={"alpha": 0.2}),
}

# Rough seconds to train and to evaluate each on two cores, for a progress bar that moves evenly.
COSTS = {
    "linear": (0.3, 1),
    "fc-128": (0.4, 20),
    "fc-128, REC": (3, 6),
    "cnn-small": (3, 55),
    "cnn-small, REC": (12, 40),
}


def run_demo(
    out: str | Path,
    seeds: Sequence[int] = (0,),
    branches: int = 1,
    on_progress: Callable[[str, float], None] | None = None,
) -> list[list[Evaluation]]:
    """Train and evaluate the five networks for each seed; returns [seed][network].

    The runs of the first seed are kept in ``out``, one folder each, for ``pyxai-bounds certify`` and ``report``; the
    others in ``out/seed-N``. Everything measured goes to ``out/results.json``. ``on_progress`` gets (what is being
    done, fraction of everything done). ``branches``: see :func:`evaluate`.
    """
    out = Path(out)
    total, done = len(seeds) * sum(sum(cost) for cost in COSTS.values()), 0.0
    results: list[list[Evaluation]] = []
    for seed in seeds:
        folder = out if seed == seeds[0] else out / f"seed-{seed}"
        results.append([])
        for label, recipe in RECIPES.items():

            def tell(doing: str, cost: float, seed: int = seed, before: float = done) -> None:
                if on_progress is not None:
                    on_progress(f"{doing}, seed {seed}" if len(seeds) > 1 else doing, (before + cost) / total)

            results[-1].append(_train_and_evaluate(label, replace(recipe, seed=seed), folder, branches, tell))
            done += sum(COSTS[label])
    summaries = [
        {"seed": seed, **evaluation.summary()}
        for seed, evaluations in zip(seeds, results, strict=True)
        for evaluation in evaluations
    ]
    (out / "results.json").write_text(json.dumps(summaries, indent=2) + "\n", encoding="utf-8")
    return results


def _train_and_evaluate(
    label: str, recipe: Recipe, folder: Path, branches: int, tell: Callable[[str, float], None]
) -> Evaluation:
    training, evaluating = COSTS[label]
    model = run(
        recipe,
        folder / label.replace(", ", "-").lower(),
        lambda epoch, _: tell(f"training {label}", training * epoch / recipe.epochs),
    )
    return evaluate(
        model,
        data.load(recipe.data),
        label,
        name=recipe.model,
        eps=EPS,
        k=K,
        seed=recipe.seed,
        branches=branches,
        on_progress=lambda done: tell(f"certifying and attacking {label}", training + evaluating * done),
    )


def table(results: Sequence[Sequence[Evaluation]]) -> list[dict[str, Any]]:
    """One row per network: each number's mean over the seeds and its sample standard deviation, or None for one seed.

    Keys: label; accuracy, certified@eps, survived@eps, unstable, cosine, each a pair (mean, spread), or None where a
    network has no ReLUs.
    """
    rows = []
    for runs in zip(*results, strict=True):
        row: dict[str, Any] = {"label": runs[0].label, "accuracy": _spread([e.accuracy for e in runs])}
        for i, at in enumerate(runs[0].at):
            row[f"certified@{at.eps:g}"] = _spread([e.at[i].certified for e in runs])
            row[f"survived@{at.eps:g}"] = _spread([e.at[i].survived for e in runs])
        unstable = [e.unstable for e in runs if e.unstable is not None]
        row["unstable"] = _spread(unstable) if unstable else None
        row["cosine"] = _spread([e.cosine for e in runs])
        rows.append(row)
    return rows


def _spread(values: list[float]) -> tuple[float, float | None]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
