"""The command line: train, certify, report, demo and info. The last stage of the flow, and the only one that prints."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch

from pyxai_bounds import __version__, data, explain, models, ops
from pyxai_bounds.certify import TopK, certify
from pyxai_bounds.errors import UnsupportedOperatorError
from pyxai_bounds.report import accuracy
from pyxai_bounds.train import Recipe, TrainingDivergedError, load, read_description, run
from pyxai_bounds.train.objectives import Width

if TYPE_CHECKING:
    from pyxai_bounds.report import Evaluation

try:
    import rich.box
    import rich.console
    import rich.markup
    import rich.progress
    import rich.table
    import tyro
    from tyro.conf import Positional
except ModuleNotFoundError as _error:
    _missing: str | None = _error.name
else:
    _missing = None

USER_ERRORS = (ValueError, TypeError, OSError, ModuleNotFoundError, TrainingDivergedError, UnsupportedOperatorError)


@dataclass
class Demo:
    """Train five small networks on even against odd digits, certify and attack them, and write a report."""

    out: Path = Path("runs/demo")
    """folder for the runs, report.html and results.json"""
    seed: int = 0
    """the first seed"""
    seeds: int = 1
    """how many seeds to run; the table then shows mean ± standard deviation"""

    def __call__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"--seeds {self.seeds}: at least one seed is needed.")
        report = _html()
        from pyxai_bounds.report.demo import run_demo, table
        from pyxai_bounds.report.plots import plot_overview

        with _progress() as tell, _one_thread():
            results = run_demo(self.out, range(self.seed, self.seed + self.seeds), tell)
            plot_overview(results[0])[0].savefig(self.out / "overview.png", dpi=130, facecolor="white")
            page = report.write_page(self.out / "report.html", results[0])
        _print_table(table(results), f"Even or odd? {len(results[0][0].radius)} held-out digits; top 5 of 64 pixels")
        console = _console()
        console.print(f"[bold]{page}[/bold] shows the explanations and their bounds. Next:", highlight=False)
        console.print(f"  pyxai-bounds certify {self.out / 'fc-128-rec'} --eps 0.03", highlight=False)


@dataclass(frozen=True)
class Train:
    """Train a network by a recipe, and keep it in a folder."""

    out: Path
    """folder for the run; an earlier run in it is replaced"""
    data: str = "digits-parity"
    """digits, digits-parity, breast-cancer or wine"""
    model: str = "fc-128"
    """linear, fc-128, fc-256x2, cnn-small, cnn7, or package.module:factory"""
    objective: Literal["natural", "rec"] = "rec"
    """rec narrows the bounds of the explanation; natural is cross entropy alone"""
    eps: float = 0.02
    """radius of the box that rec trains for, in the units of the data"""
    epochs: int = 40
    """all epochs, the natural ones included"""
    natural_epochs: int = 5
    """epochs of cross entropy alone, before rec"""
    alpha: float = 0.1
    """weight of the width"""
    width: Width = "log"
    """how the width of a bound is measured"""
    batch_size: int = 100
    """samples in a batch"""
    lr: float = 2e-3
    """Adam's step size"""
    seed: int = 0
    """of the initial weights and the order of the samples"""

    def __call__(self) -> None:
        recipe = Recipe(**{field.name: getattr(self, field.name) for field in fields(Recipe)})
        with _progress() as tell:
            model = run(recipe, self.out, lambda done, loss: tell(f"loss {loss:.4f}", done / recipe.epochs))
        dataset = data.load(self.data)
        correct = accuracy(model, dataset.test_x, dataset.test_y)
        console = _console()
        console.print(
            f"accuracy {correct:.3f} on {len(dataset.test_x)} held-out samples; kept in [bold]{self.out}[/bold]"
        )


@dataclass
class Certify:
    """Certify the top-k features of every held-out sample's explanation: the gradient of the true label's logit."""

    run: Positional[Path]
    """a folder that train or demo wrote"""
    eps: float = 0.01
    """radius of the box around each sample, in the units of the data"""
    k: int = 5
    """how many features must stay on top"""
    json: bool = False
    """print JSON instead of text"""

    def __call__(self) -> None:
        model, dataset = load(self.run), data.load(read_description(self.run)["recipe"]["data"])
        certificate = certify(
            explain.gradient(model), dataset.test_x, dataset.test_y,
            eps=self.eps, property=TopK(self.k), clip=dataset.clip,
        )  # fmt: skip
        correct = accuracy(model, dataset.test_x, dataset.test_y)
        count, samples = int(certificate.holds.sum()), len(certificate.holds)
        if self.json:
            result = {
                "run": str(self.run), "data": dataset.name, "eps": self.eps, "k": self.k, "samples": samples,
                "accuracy": correct, "certified": count, "fraction": certificate.fraction,
                "rounding": certificate.rounding, "holds": certificate.holds.tolist(),
                "margin": [m if math.isfinite(m) else None for m in certificate.margin.tolist()],
            }  # fmt: skip
            print(json.dumps(result))
            return
        console = _console()
        console.print(f"{dataset.name}, {samples} held-out samples, accuracy {correct:.3f}", highlight=False)
        console.print(
            f"[bold]{count} of {samples} certified ({certificate.fraction:.1%})[/bold]: their top {self.k} features "
            f"stay the top {self.k} for every input within {self.eps:g}",
            highlight=False,
        )
        console.print(
            f"margins: median {certificate.margin.median():.4g}; rounding: {certificate.rounding}", highlight=False
        )


@dataclass
class Report:
    """Certify and attack one run or several, and write one HTML page that compares them."""

    runs: Positional[tuple[Path, ...]]
    """folders that train or demo wrote; add a linear model's to compare with"""
    out: Path = Path("report.html")
    """the page"""
    eps: tuple[float, ...] = (0.01, 0.02)
    """the radii of the table"""
    k: int = 5
    """how many features must stay on top"""
    seed: int = 0
    """of the attack"""

    def __call__(self) -> None:
        if not self.runs:
            raise ValueError("Name at least one run, a folder that pyxai-bounds train or demo wrote.")
        report = _html()
        from pyxai_bounds.report import evaluate

        results: list[Evaluation] = []
        with _progress() as tell:
            for i, (path, label) in enumerate(zip(self.runs, _labels(self.runs), strict=True)):
                recipe = read_description(path)["recipe"]

                def on_progress(fraction: float, label: str = label, start: int = i) -> None:
                    tell(f"certifying and attacking {label}", (start + fraction) / len(self.runs))

                dataset, model = data.load(recipe["data"]), load(path)
                results.append(
                    evaluate(
                        model, dataset, label,
                        name=recipe["model"], eps=self.eps, k=self.k, seed=self.seed, on_progress=on_progress,
                    )
                )  # fmt: skip
        _console().print(f"[bold]{report.write_page(self.out, results)}[/bold]", highlight=False)


@dataclass
class Info:
    """Versions, devices, and which backends run here, or why not."""

    def __call__(self) -> None:
        lines = {
            "pyxai_bounds": __version__,
            "torch": torch.__version__,
            "python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
            "devices": ", ".join(["cpu", *_gpus()]),
            "threads": str(torch.get_num_threads()),
        }
        for name in ops.BACKENDS:
            here = name in ops.available()
            lines[f"backend {name}"] = "available" if here else _why_not(name)
        for extra, module in (("train", "sklearn"), ("train", "safetensors"), ("report", "matplotlib")):
            lines[module] = _version(module) or f"missing: pip install 'pyxai-bounds[{extra}]'"
        lines["data sets"] = ", ".join(data.DATASETS)
        lines["models"] = ", ".join(models.MODELS)
        grid = rich.table.Table.grid(padding=(0, 2))
        for name, value in lines.items():
            grid.add_row(f"[bold]{name}[/bold]", rich.markup.escape(value))
        _console().print(grid, highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for what the user can mend, 130 when interrupted."""
    if _missing is not None:
        print(f"error: the command line needs {_missing}: pip install 'pyxai-bounds[cli]'", file=sys.stderr)
        return 2
    # A console script's path does not hold the user's folder, where package.module:factory is looked for.
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    command = tyro.cli(
        Demo | Train | Certify | Report | Info,
        prog="pyxai-bounds",
        description="Certified bounds on explanations.",
        args=arguments,
    )
    try:
        command()
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


# --- printing -----------------------------------------------------------------------------------------------


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """A bar with the time left, on standard error if that is a terminal.

    Yields the function that moves it: (what is being done, fraction done).
    """
    console = rich.console.Console(stderr=True)
    progress = rich.progress.Progress(
        rich.progress.BarColumn(),
        rich.progress.TaskProgressColumn(),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.description}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with progress:
        task = progress.add_task("starting", total=1.0)
        yield lambda what, fraction: progress.update(task, description=what, completed=fraction)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Networks this small lose more to waking threads than they gain, many times over on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _console() -> rich.console.Console:
    return rich.console.Console(soft_wrap=True)


def _print_table(rows: list[dict[str, Any]], title: str) -> None:
    """One line for what is certified and, under it, one for what survived: the table fits 80 columns."""
    radii = [key.partition("@")[2] for key in rows[0] if key.startswith("certified@")]
    columns = ["accuracy", *(f"top 5 @{eps}\ncertified\n[dim]survived[/dim]" for eps in radii)]
    columns += ["unstable\nReLUs", "same-class\ncosine"]
    grid = rich.table.Table(
        title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    grid.add_column("network", no_wrap=True)
    for name in columns:
        grid.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        kept = [f"{_number(row[f'certified@{r}'])}\n[dim]{_number(row[f'survived@{r}'])}[/dim]" for r in radii]
        unstable, cosine = _number(row["unstable"], percent=True), _number(row["cosine"])
        grid.add_row(row["label"], _number(row["accuracy"]), *kept, unstable, cosine)
    console = _console()
    console.print(grid, highlight=False)
    console.print(
        "Certified ≤ true ≤ survived. A linear model is certified at any radius, because it\n"
        "explains every input alike: a certificate counts where a network is more accurate\n"
        "than that and its explanations differ (same-class cosine below 1).\n",
        style="dim",
        highlight=False,
    )


def _number(value: tuple[float, float | None] | None, percent: bool = False) -> str:
    if value is None:
        return "–"
    mean, spread = value
    mean_text, spread_text = f"{mean:.3f}", f"±{spread:.3f}" if spread is not None else ""
    if percent:
        mean_text, spread_text = f"{mean:.1%}", f"±{100 * spread:.1f}" if spread is not None else ""
    return mean_text + spread_text


def _labels(runs: Sequence[Path]) -> list[str]:
    """As few last parts of each path as tell them all apart."""
    paths = [path.resolve().parts for path in runs]
    for length in range(1, max(map(len, paths)) + 1):
        labels = ["/".join(parts[-length:]) for parts in paths]
        if len(set(labels)) == len(set(paths)):
            break
    return labels


# --- what is installed --------------------------------------------------------------------------------------


def _html() -> ModuleType:
    try:
        from pyxai_bounds.report import html
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"The report needs {error.name}: pip install 'pyxai-bounds[report]'.") from error
    return html


def _gpus() -> list[str]:
    return [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]


def _why_not(name: str) -> str:
    explain_absence = getattr(ops.BACKENDS[name], "why_not_available", None)
    return explain_absence() if explain_absence is not None else "not available"


def _version(module: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    return str(getattr(importlib.import_module(module), "__version__", "installed"))
