"""``make compare``: trains every objective on the same data for as long, measures all alike, writes docs/comparison.md.

Processes of one thread each take jobs, an objective on a network with all its seeds. Rows are written as jobs are done,
by the first process alone, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import comparison_page
from bench.recipes import ROOT, append, read
from pyxai_bounds import attack, certify, data, explain, models
from pyxai_bounds.certify import Cosine, metrics
from pyxai_bounds.data import Dataset
from pyxai_bounds.report.evaluate import SoundnessError
from pyxai_bounds.train import Options, Recipe, fit
from pyxai_bounds.train.objectives import OBJECTIVES
from pyxai_bounds.train.recipe import objective_of

RESULTS = ROOT / "bench" / "results" / "cpu" / "comparison.csv"
DOCS = ROOT / "docs"
TOP, COSINE = 5, 0.9  # what is certified: the TOP largest features stay so; the cosine to the explanation at x stays ≥
MEASURES = [
    "accuracy", "same_class_cosine", "unstable_relus", "commonest_top_share", "AA", "IN", "CO", "P@5",
    "certified_top5_1", "certified_top5_2", "certified_cosine_1", "certified_cosine_2", "seconds_per_epoch",
]  # fmt: skip
COLUMNS = ["data", "model", "objective", "seed", "eps_1", "eps_2", *MEASURES, "seconds", "note", "torch", "settings"]


@dataclass(frozen=True)
class Plan:
    """What all objectives share on one data set and network. seconds: of one training and its measurement, about."""

    data: str
    model: str
    epochs: int
    natural_epochs: int
    seconds: float
    eps: float = 0.02  # trained for
    radii: tuple[float, float] = (0.01, 0.02)  # certified; attacked at the second
    batch_size: int = 100
    lr: float = 2e-3
    samples: int = 397  # held-out ones that are certified
    attacked: int = 128  # the first of them, which are attacked
    attack_steps: int = 10
    ignore: str = "0:8,56:64"  # features that R4 is told to ignore: the first and the last row of pixels


_TABLE: dict[str, Any] = {
    "data": "breast-cancer", "eps": 0.05, "radii": (0.02, 0.05), "batch_size": 74, "samples": 125, "attacked": 125,
    "ignore": "20:30",
}  # fmt: skip
PLANS = [
    *(
        plan
        for name in ("digits-parity", "digits")
        for plan in (
            Plan(name, "linear", epochs=40, natural_epochs=5, lr=2e-2, seconds=1.3),
            Plan(name, "fc-128", epochs=50, natural_epochs=5, seconds=2),
            Plan(name, "cnn-small", epochs=18, natural_epochs=4, batch_size=50, seconds=6),
            Plan(name, "cnn7-identity", epochs=10, natural_epochs=3, batch_size=50, seconds=11),
        )
    ),
    Plan(model="linear", epochs=30, natural_epochs=5, lr=2e-2, seconds=1.3, **_TABLE),
    Plan(model="fc-256x2", epochs=30, natural_epochs=5, seconds=1.3, **_TABLE),
]

# RAR's search costs most of all. Published: m 50, 7 to 40 steps, sums (to Adam, mean and sum are the same).
_RAR: dict[str, Any] = {"m": 5, "approx_factor": 5, "steps": 3, "reduction": "mean"}
# Of the published weights, .001 … 100 in steps of ten, the largest that leaves networks trained from scratch accurate.
_R2ET: dict[str, Any] = {"k": TOP, "weight": 0.01, "hessian_weight": 0.01, "adaptive": True}

# The same for all data sets and networks. An objective that is not here runs with its own defaults.
OPTIONS: dict[str, dict[str, Any]] = {
    "rec": {"alpha": 0.1, "width": "log"},
    "rec-released": {"alpha": 0.1},
    "ibp": {"kappa": 0.5},
    "ig-norm": {"weight": 1.0, **_RAR},
    "ig-sum-norm": {"weight": 0.1, **_RAR},
    "certified-ig-norm": {"weight": 1.0},
    "certified-ig-sum-norm": {"weight": 0.1},
    "r2et": _R2ET,
    "r2et-mm": {**_R2ET, "extremes": TOP},
    "certified-topk": {"alpha": 0.1, "k": TOP},
    "separated-topk": {"k": TOP, "hinge": 0.1, "margin": 0.02, "width": 0.05, "stability": 0.5},
    "r4": {"alpha": 0.1},
    "pgd": {"steps": 7},
    "l2": {"alpha": 0.1},
    "l2-adversarial": {"alpha": 0.1, "steps": 5},
    "hessian": {"alpha": 0.1},
    "est-h": {"alpha": 0.1},
    "ssr": {"alpha": 0.3, "iterations": 5},
    "relu-stability": {"alpha": 0.1},
    "tightness": {"alpha": 0.5},
}
WITHOUT_RELU = "the network has no ReLU to be kept stable: the objective does not apply"
ENTROPY = "a linear network's logit gradient and its (absent) ReLUs do not vary: cross entropy alone"
NOT_APPLICABLE = {("linear", "separated-topk"): WITHOUT_RELU}
SAME_AS_NATURAL = {("linear", name): ENTROPY for name in ("rec", "l2", "l2-adversarial", "relu-stability", "tightness")}


@dataclass(frozen=True)
class Job:
    """One objective on one network and data set: its seeds share what was captured."""

    plan: Plan
    objective: str
    seeds: tuple[int, ...]

    def recipe(self, seed: int) -> Recipe:
        options = dict(OPTIONS.get(self.objective, {}))
        if self.objective == "r4":
            options["ignore"] = self.plan.ignore
        plan = self.plan
        return Recipe(
            data=plan.data, model=plan.model, objective=self.objective, options=Options(options), seed=seed,
            eps=plan.eps, epochs=plan.epochs, natural_epochs=plan.natural_epochs, batch_size=plan.batch_size,
            lr=plan.lr, lr_schedule="cosine", warmup=14, clip_gradient=5.0,
        )  # fmt: skip

    def settings(self) -> str:
        """What determines a row besides its first columns: rows of other settings are not this job's.

        Of the recipe, what the page shows and what is not its default.
        """
        recipe, default = self.recipe(0).as_json(), Recipe().as_json()
        named, shown = ("data", "model", "objective", "seed"), ("eps", "epochs", "natural_epochs", "batch_size", "lr")
        recipe = {
            name: value for name, value in recipe.items()
            if name not in named and (name in (*shown, "options") or value != default[name])
        }  # fmt: skip
        return json.dumps(
            recipe | {name: getattr(self.plan, name) for name in ("radii", "samples", "attacked", "attack_steps")}
        )


@dataclass
class Done:
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


_at_hand: tuple[tuple[str, str], Dataset, nn.Module] | None = None


def work(job: Job) -> Done:
    """Train and measure an objective with each of its seeds. One that fails does not stop the others."""
    done = Done()
    for seed in job.seeds:
        try:
            done.rows.append(row_of(job, seed))
        except Exception as error:
            print(traceback.format_exc(), file=sys.stderr, flush=True)
            done.failures.append(f"{name_of(job)} seed {seed}: {type(error).__name__}: {error}")
    return done


def row_of(job: Job, seed: int) -> dict[str, Any]:
    plan, kind = job.plan, (job.plan.model, job.objective)
    row = {
        "data": plan.data, "model": plan.model, "objective": job.objective, "seed": seed, "eps_1": plan.radii[0],
        "eps_2": plan.radii[1], "note": NOT_APPLICABLE.get(kind, SAME_AS_NATURAL.get(kind, "")),
        "torch": torch.__version__, "settings": job.settings(),
    }  # fmt: skip
    if kind in NOT_APPLICABLE:
        return row
    started = time.process_time()
    dataset, model = fresh(plan, seed)
    seconds = train(model, dataset, job.recipe(seed))
    found = {**measure(model, dataset, plan), "seconds_per_epoch": seconds}
    return (
        row
        | {name: _rounded(value) for name, value in found.items()}
        | {"seconds": round(time.process_time() - started, 2)}
    )


def fresh(plan: Plan, seed: int) -> tuple[Dataset, nn.Module]:
    """The data, and the network with its seed's weights: one object for all jobs of a plan, so that what was captured
    of it for one seed and objective serves the others."""
    global _at_hand
    if _at_hand is None or _at_hand[0] != (plan.data, plan.model):
        _at_hand = None  # captures go with the network
        dataset = data.load(plan.data)
        _at_hand = (plan.data, plan.model), dataset, models.build(plan.model, dataset.input_shape, dataset.classes)
    _, dataset, model = _at_hand
    torch.manual_seed(seed)
    model.load_state_dict(models.build(plan.model, dataset.input_shape, dataset.classes).state_dict())
    model.zero_grad()
    return dataset, model


def train(model: nn.Module, dataset: Dataset, recipe: Recipe) -> float:
    """Train in place; returns the median processor seconds of an epoch of the objective, captures not counted."""
    times = [time.process_time()]
    fit(
        model, dataset.train_x, dataset.train_y, objective_of(recipe, dataset.clip), recipe,
        on_epoch=lambda *_: times.append(time.process_time()),
    )  # fmt: skip
    model.eval()
    lasted = [after - before for before, after in itertools.pairwise(times)]
    return statistics.median(lasted[recipe.natural_epochs + 1 :] or lasted[-1:])


def measure(model: nn.Module, dataset: Dataset, plan: Plan) -> dict[str, float | None]:
    """All columns but the time. AA, IN, CO, P@5: under the attacks of ``evaluate_all``, at the second radius.

    Certificates are proofs, rounded outward, of all samples, also of those that the network gets wrong; from bounds of
    the entries alone, which is what the objectives train. Raises
    SoundnessError where an attack breaks what was certified.
    """
    fn, clip = explain.gradient(model), dataset.clip
    x, y = dataset.test_x[: plan.samples], dataset.test_y[: plan.samples]
    top = metrics.top_features(TOP, x)
    certified = [
        [
            certify(fn, x, y, eps=eps, property=property, clip=clip, batch_size=len(x), sharpen=False)
            for eps in plan.radii
        ]
        for property in (top, Cosine(COSINE))
    ]
    nominal, sure = certified[0][0].nominal, certified[0][1].holds
    found: dict[str, float | None] = {
        "accuracy": metrics.accuracy(model, x, y),
        "same_class_cosine": metrics.same_class_cosine(nominal, y),
        "unstable_relus": metrics.unstable_relu_fraction(model, x, plan.radii[0], clip, batch_size=len(x)),
        "commonest_top_share": metrics.commonest_top_share(top, nominal, y),
    }
    for name, (near, far) in zip(("top5", "cosine"), certified, strict=True):
        found |= {f"certified_{name}_1": near.fraction, f"certified_{name}_2": far.fraction}

    x, y, eps, steps = x[: plan.attacked], y[: plan.attacked], plan.radii[1], plan.attack_steps
    with torch.no_grad():
        right = (model(x).argmax(1) == y).nonzero().flatten()
    how: dict[str, Any] = {"eps": eps, "clip": clip, "steps": steps, "batch_size": len(x)}
    length = 2.5 * eps / steps  # sign steps that can cross the box
    found["AA"] = (~attack.misclassify(model, x, y, step_size=length, **how).broken).double().mean().item()
    if not len(right):
        return found | {"IN": None, "CO": None, "P@5": None}
    x, y, before = x[right], y[right], metrics.saliency_map(nominal[right])
    how |= {"model": model, "k": TOP}
    drained = attack.topk(fn, x, y, step_size=length, **how)
    ranked = attack.er(fn, x, y, step_size=length * math.sqrt(x[0].numel()), keep="stop", **how)
    kept = [metrics.intersection(before, metrics.saliency_map(a.attribution), TOP) for a in (drained, ranked)]
    if any(bool((share[sure[right]] < 1).any()) for share in kept):
        raise SoundnessError(f"At eps {eps:g} an attack broke a certified top {TOP}: one of the two is wrong.")
    found["IN"], found["P@5"] = (share.mean().item() for share in kept)
    found["CO"] = metrics.kendall(before, metrics.saliency_map(drained.attribution)).nanmean().item()
    return found


def _rounded(value: float | None) -> float | str:
    return "" if value is None or not math.isfinite(value) else round(value, 4)


def name_of(job: Job) -> str:
    return f"{job.plan.data} {job.plan.model} {job.objective}"


# --- all of them ------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None, plans: Sequence[Plan] = tuple(PLANS)) -> int:
    options = _options(arguments, plans)
    results, docs = (RESULTS, DOCS) if options.out is None else (options.out / RESULTS.name, options.out)
    failures: list[str] = []
    if not options.page:
        jobs = [
            Job(plan, objective, tuple(range(options.seeds)))
            for plan in plans
            for objective in options.only
            if plan.data in options.data and plan.model in options.model
        ]
        if options.fresh:
            forget(results, jobs)
        jobs = missing(results, jobs)
        failures = run(jobs, options.jobs, results)
    rows = read(results) if results.exists() else []
    if rows:
        comparison_page.write(rows, docs)
    elif not failures:
        raise SystemExit(f"{results} has no rows to write a page from: run python -m bench.compare without --page.")
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _options(arguments: Sequence[str] | None, plans: Sequence[Plan]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)

    def some_of(flag: str, known: Iterable[str], what: str) -> None:
        known = list(dict.fromkeys(known))

        def chosen(text: str) -> list[str]:
            names = [name.strip() for name in text.split(",") if name.strip()]
            unknown = [name for name in names if name not in known]
            if unknown or not names:
                raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'nothing'}: choose from {', '.join(known)}")
            return names

        parser.add_argument(flag, type=chosen, default=known, metavar="NAME,…", help=what)

    some_of("--only", OBJECTIVES, "these objectives")
    some_of("--data", (plan.data for plan in plans), "these data sets")
    some_of("--model", (plan.model for plan in plans), "these networks")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 … SEEDS − 1")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes, one thread each")
    parser.add_argument("--fresh", action="store_true", help="measure again what has been, and replace it")
    parser.add_argument("--resume", action="store_true", help="skip what has been measured so (the default)")
    parser.add_argument("--page", action="store_true", help="measure nothing, write page and picture from the CSV")
    parser.add_argument("--out", type=Path, help="folder for CSV, page and picture, instead of the repository's")
    options = parser.parse_args(arguments)
    if options.fresh and (options.resume or options.page):
        parser.error("--fresh measures again: it goes with neither --resume nor --page")
    if options.seeds < 1 or options.jobs < 1:
        parser.error("--seeds and --jobs must be at least 1")
    return options


def _key(job: Job, seed: int) -> tuple[str, ...]:
    return job.plan.data, job.plan.model, job.objective, str(seed)


def _key_of(row: dict[str, Any]) -> tuple[str, ...]:
    return row["data"], row["model"], row["objective"], str(row["seed"])


def missing(results: Path, jobs: Iterable[Job]) -> list[Job]:
    """What is left of the jobs; rows of the same runs with other settings are removed."""
    jobs = list(jobs)
    settings = {_key(job, seed): job.settings() for job in jobs for seed in job.seeds}
    rows = read(results) if results.exists() else []
    stale = [row for row in rows if settings.get(_key_of(row), row["settings"]) != row["settings"]]
    if stale:
        print(f"{len(stale)} rows were measured with other settings: they are measured again.", file=sys.stderr)
        _rewrite(results, [row for row in rows if row not in stale])
    there = {_key_of(row) for row in rows if row not in stale}
    left = [Job(job.plan, job.objective, tuple(s for s in job.seeds if _key(job, s) not in there)) for job in jobs]
    return [job for job in left if job.seeds]


def forget(results: Path, jobs: Iterable[Job]) -> None:
    """Remove the rows that the jobs will measure."""
    if results.exists():
        keys = {_key(job, seed) for job in jobs for seed in job.seeds}
        _rewrite(results, [row for row in read(results) if _key_of(row) not in keys])


def _rewrite(results: Path, rows: Iterable[dict[str, Any]]) -> None:
    """All or nothing: an interruption leaves the old file."""
    new = results.with_name(results.name + ".new")
    new.unlink(missing_ok=True)
    for row in rows:
        append(new, row, COLUMNS)
    if new.exists():
        new.replace(results)
    else:
        results.unlink()


def run(jobs: Sequence[Job], processes: int, results: Path) -> list[str]:
    """Do the jobs, the longest first, those of one network in a row; returns what failed."""

    def cost(job: Job) -> float:
        return job.plan.seconds * len(job.seeds)

    jobs = sorted(jobs, key=lambda job: (-job.plan.seconds, job.plan.data, job.plan.model))
    total, done, failures, started = sum(map(cost, jobs)), 0.0, [], time.monotonic()
    for number, (job, result) in enumerate(_done(jobs, min(processes, len(jobs))), 1):
        for row in result.rows:
            append(results, row, COLUMNS)
        failures += result.failures
        done += cost(job)
        left = (time.monotonic() - started) * (total / done - 1) / 60
        what = "; ".join([*dict.fromkeys(map(_short, result.rows)), *(["failed"] if result.failures else [])])
        print(f"[{number}/{len(jobs)}] {name_of(job)}: {what}; about {left:.0f} min left", file=sys.stderr, flush=True)
    return failures


def _short(row: dict[str, Any]) -> str:
    if "accuracy" not in row:
        return str(row["note"])
    return f"accuracy {row['accuracy']:.3f}, certified {row['certified_top5_1']:.2f} ({row['seconds']:.0f} s)"


def _done(jobs: Sequence[Job], processes: int) -> Iterator[tuple[Job, Done]]:
    """Each job with its result, as it is done."""
    if processes <= 1:
        _one_thread()
        yield from ((job, work(job)) for job in jobs)
        return
    # A process that is spawned reads the number of OpenMP threads anew.
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _one_thread)
    try:
        futures: dict[Future[Done], Job] = {pool.submit(work, job): job for job in jobs}
        for future in as_completed(futures):
            job = futures[future]
            try:
                result = future.result()
            except Exception as error:  # the process died
                result = Done(failures=[f"{name_of(job)}: {type(error).__name__}: {error}"])
            yield job, result
    finally:
        pool.shutdown(cancel_futures=True)  # an interruption waits for what is under way, not for all


def _one_thread() -> None:
    torch.set_num_threads(1)


if __name__ == "__main__":
    raise SystemExit(main())
