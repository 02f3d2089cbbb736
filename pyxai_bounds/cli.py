"""The command line: train, evaluate, certify, report, demo and info; the last stage, and the only one that prints."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import torch
from torch import Tensor, nn

from pyxai_bounds import __version__, data, explain, models, ops
from pyxai_bounds.certify import certify
from pyxai_bounds.certify.metrics import accuracy, top_features
from pyxai_bounds.errors import UnsupportedOperatorError
from pyxai_bounds.ops import hopper
from pyxai_bounds.report import evaluate_all, glossary
from pyxai_bounds.train import Options, Progress, Recipe, TrainingDivergedError, load, read_description, run
from pyxai_bounds.train.checkpoint import check_writable, write_file
from pyxai_bounds.train.objectives import OBJECTIVES, WITHOUT_EPS
from pyxai_bounds.train.objectives.options import described
from pyxai_bounds.train.presets import PRESETS
from pyxai_bounds.train.runs import stored_recipe

if TYPE_CHECKING:
    from pyxai_bounds.report import Evaluation

try:
    import rich.box
    import rich.console
    import rich.markup
    import rich.progress
    import rich.table
    import tyro
    from tyro.conf import OmitArgPrefixes, Positional
except ModuleNotFoundError as _error:
    _missing: str | None = _error.name
else:
    _missing = None

PRESET_HELP = f"""flags' defaults: a run's folder, the JSON file of a recipe, or one of {", ".join(PRESETS)}"""
Method = Literal["gradient", "saliency", "gradient-x-input", "integrated-gradients", "smoothgrad"]
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
    branches: int = 1
    """into how many parts a sample's box may be divided, to decide what is left open (branch and bound)"""

    def __call__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"--seeds {self.seeds}: at least one seed is needed.")
        report = _html()
        from pyxai_bounds.report.demo import run_demo, table
        from pyxai_bounds.report.plots import plot_overview

        with _progress() as bar, _one_thread():
            results = run_demo(self.out, range(self.seed, self.seed + self.seeds), self.branches, bar.move)
            plot_overview(results[0])[0].savefig(self.out / "overview.png", dpi=130, facecolor="white")
            page = report.write_page(self.out / "report.html", results[0])
        _print_table(table(results), f"Even or odd? {len(results[0][0].radius)} held-out digits; top 5 of 64 pixels")
        console = _console()
        console.print(f"[bold]{page}[/bold] shows the explanations and their bounds. Next:", highlight=False)
        trained = shlex.quote(str(self.out / "fc-128-rec"))
        console.print(f"  pyxai-bounds certify {trained} --eps 0.03", highlight=False)


@dataclass(frozen=True)
class Train:
    """Train a network by a preset, or the recipe of a file or run, and flags that override it; keep it in a folder.

    A folder whose training was interrupted is continued by --resume. Under torchrun the processes share the work.
    """

    out: Path
    """folder for the run; an earlier run in it is replaced"""
    preset: Positional[Annotated[str, tyro.conf.arg(metavar="[PRESET]", help=PRESET_HELP)]] = ""
    recipe: OmitArgPrefixes[Recipe] = field(default_factory=Recipe)
    resume: bool = False
    """continue the run in the folder where it was interrupted, by the recipe that it has"""
    data_root: Path | None = None
    """folder of the data sets' files; else $PYXAI_BOUNDS_DATA, else ~/.cache/pyxai_bounds"""
    device: str = "auto"
    """auto (a GPU where there is one), cpu or cuda:N"""
    checkpoint_every: int = 500
    """steps from one checkpoint to the next; 0: none"""
    tensorboard: bool = False
    """write TensorBoard's files, besides log.csv"""

    def __call__(self) -> None:
        recipe = self.recipe
        dataset = data.load(recipe.data, self.data_root)
        with _progress() as bar:
            if self.resume and stored_recipe(self.out) is None:
                bar.say(f"There is nothing to continue in {self.out}: training begins.", "yellow")
            show = _Training(recipe, dataset, bar)
            model = run(
                recipe, self.out, dataset=dataset, device=self.device, resume=self.resume,
                checkpoint_every=self.checkpoint_every, tensorboard=self.tensorboard,
                on_progress=show, tell=lambda text: bar.say(text, "yellow"),
            )  # fmt: skip
        if not _first_process():
            return
        correct = accuracy(model, dataset.test_x, dataset.test_y)
        console = _console()
        result = f"[bold]accuracy {correct:.3f}[/bold] on {len(dataset.test_x)} test samples"
        console.print(f"{result}; kept in [bold]{self.out}[/bold]", highlight=False)
        commonest = (dataset.test_y.bincount().max() / len(dataset.test_y)).item()
        if correct <= commonest:
            console.print(
                f"Always naming the commonest class gives {commonest:.3f}: this network has learnt nothing, or "
                "unlearnt it. Train longer, or with a smaller --lr or a smaller weight of the objective's terms.",
                style="yellow",
                highlight=False,
            )
        console.print(
            f"Next: pyxai-bounds evaluate {shlex.quote(str(self.out))} --eps {recipe.eps or 0.01:g}", highlight=False
        )


@dataclass(frozen=True)
class Explained:
    """What is explained, and how."""

    explanation: Method = "gradient"
    """what is bounded: gradient, saliency (its magnitude), gradient-x-input, integrated-gradients or smoothgrad"""
    of: explain.Of = "logit"
    """of the true label: its logit, its probability, or the loss"""
    points: int = 10
    """steps of integrated-gradients, noisy copies of smoothgrad"""
    noise: float = 0.1
    """standard deviation of smoothgrad's noise, in the units of the data"""

    def function(self, model: nn.Module, shape: tuple[int, ...], seed: int) -> Callable[..., Tensor]:
        """The function (x, y), whose result has the shape of x. ``seed`` draws smoothgrad's noise."""
        if self.explanation == "integrated-gradients":
            return explain.integrated_gradients(model, self.of, self.points)
        if self.explanation == "smoothgrad":
            return self._smoothgrad(model, shape, seed)
        if self.explanation == "saliency":
            return explain.saliency(model, self.of, channels="none")
        plain = {"gradient": explain.gradient, "gradient-x-input": explain.gradient_x_input}
        return plain[self.explanation](model, self.of)

    def _smoothgrad(self, model: nn.Module, shape: tuple[int, ...], seed: int) -> Callable[..., Tensor]:
        """One noise for all samples: bounds and attacks are then about one program, in whatever pieces they run."""
        if self.points < 1 or not 0 < self.noise < math.inf:
            raise ValueError(f"smoothgrad needs --points ≥ 1 and --noise > 0, got {self.points} and {self.noise:g}.")
        generator = torch.Generator().manual_seed(seed)
        noise = self.noise * torch.randn((self.points, 1, *shape), generator=generator)
        smooth = explain.smoothgrad(model, self.of)
        return lambda x, y: smooth(x, y, noise.to(x))

    @property
    def in_words(self) -> str:
        """As the report says it."""
        return str(self).replace(" of ", " of the true label's ", 1)

    def __str__(self) -> str:
        details = {
            "integrated-gradients": f", {self.points} steps from 0",
            "smoothgrad": f", {self.points} copies, noise {self.noise:g}",
        }
        return f"{self.explanation} of {self.of}{details.get(self.explanation, '')}"


@dataclass
class Certify:
    """Certify the top-k features of every held-out sample's explanation."""

    run: Positional[Path]
    """a folder that train or demo wrote"""
    eps: float = 0.01
    """radius of the box around each sample, in the units of the data"""
    k: int = 5
    """how many features must stay on top"""
    branches: int = 1
    """into how many parts a sample's box may be divided, to decide what is left open (branch and bound)"""
    what: OmitArgPrefixes[Explained] = field(default_factory=Explained)
    seed: int = 0
    """of smoothgrad's noise"""
    data_root: Path | None = None
    """folder of the data sets' files; else $PYXAI_BOUNDS_DATA, else ~/.cache/pyxai_bounds"""
    json: bool = False
    """print JSON instead of text"""

    def __call__(self) -> None:
        model, dataset = load(self.run), data.load(read_description(self.run)["recipe"]["data"], self.data_root)
        with _progress() as bar:
            certificate = certify(
                self.what.function(model, dataset.input_shape, self.seed), dataset.test_x, dataset.test_y,
                eps=self.eps, property=top_features(self.k, dataset.test_x), clip=dataset.clip, branches=self.branches,
                on_progress=lambda done: bar.move("certifying", done),
            )  # fmt: skip
        correct = accuracy(model, dataset.test_x, dataset.test_y)
        count, samples = int(certificate.holds.sum()), len(certificate.holds)
        if self.json:
            result = {
                "run": str(self.run), "data": dataset.name, "explanation": str(self.what),
                "eps": self.eps, "k": self.k, "samples": samples,
                "accuracy": correct, "certified": count, "fraction": certificate.fraction,
                "rounding": certificate.rounding, "holds": certificate.holds.tolist(),
                "refuted": certificate.refuted.tolist(),
                "margin": [m if math.isfinite(m) else None for m in certificate.margin.tolist()],
            }  # fmt: skip
            print(json.dumps(result))
            return
        console = _console()
        console.print(f"{dataset.name}, {samples} held-out samples, accuracy {correct:.3f}", highlight=False)
        console.print(
            f"[bold]{count} of {samples} certified ({certificate.fraction:.1%})[/bold]: the top {self.k} features of "
            f"their explanation ({self.what}) stay the top {self.k} for every input within {self.eps:g}",
            highlight=False,
        )
        if refuted := int(certificate.refuted.sum()):
            console.print(
                f"{refuted} refuted: an input within {self.eps:g} was found with another top {self.k}", highlight=False
            )
        if open_ := samples - count - refuted:
            further = "" if self.branches > 1 else "; --branches 64 decides most"
            console.print(f"{open_} open: neither proved nor refuted{further}", highlight=False)
        console.print(
            f"margins: median {certificate.margin.median():.4g}; rounding: {certificate.rounding}", highlight=False
        )


@dataclass
class Evaluate:
    """Measure one run: accuracy, certificates and attacks, each certificate beside its attack."""

    run: Positional[Path]
    """a folder that train or demo wrote; evaluation.json is written into it"""
    eps: tuple[float, ...] = (0.01,)
    """the radii, in the units of the data"""
    k: int = 5
    """how many features must stay on top"""
    samples: int = 1000
    """at most so many held-out samples, the first ones"""
    seed: int = 0
    """of the attacks and of smoothgrad's noise"""
    data_root: Path | None = None
    """folder of the data sets' files; else $PYXAI_BOUNDS_DATA, else ~/.cache/pyxai_bounds"""
    what: OmitArgPrefixes[Explained] = field(default_factory=Explained)
    csv: Path | None = None
    """write every number with its settings into this file, a line each"""
    json: bool = False
    """print JSON instead of text"""

    def __call__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"--samples {self.samples}: at least one sample is needed.")
        if self.csv is not None:
            _check_file("--csv", self.csv)
        recipe = read_description(self.run)["recipe"]
        if not os.access(self.run, os.W_OK):
            raise ValueError(
                f"{self.run} cannot be written to, where evaluation.json is kept: copy the run to a folder of your own."
            )
        model, dataset = load(self.run), data.load(recipe["data"], self.data_root)
        dataset = replace(dataset, test_x=dataset.test_x[: self.samples], test_y=dataset.test_y[: self.samples])
        with _progress() as bar:
            found = _measure(model, dataset, self, lambda done: bar.move("certifying and attacking", done))
        settings = {"run": str(self.run), "data": dataset.name, "model": recipe["model"], "seed": self.seed}
        settings["explanation"] = str(self.what)
        result = settings | found
        if self.csv is not None:
            self.csv.parent.mkdir(parents=True, exist_ok=True)
            write_file(self.csv, glossary.csv_text(settings, found).encode())
        text = json.dumps(result, indent=2)
        write_file(self.run / "evaluation.json", (text + "\n").encode())
        if self.json:
            print(text)
        else:
            _print_measurements(settings, found)


def _measure(model: nn.Module, dataset: data.Dataset, how: Evaluate, tick: Callable[[float], None]) -> dict[str, Any]:
    return evaluate_all(
        model, dataset.test_x, dataset.test_y,
        eps=how.eps, k=how.k, clip=dataset.clip, seed=how.seed, on_progress=tick,
        explanation=how.what.function(model, dataset.input_shape, how.seed),
    )  # fmt: skip


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
    branches: int = 1
    """into how many parts a sample's box may be divided, to decide what is left open (branch and bound)"""
    seed: int = 0
    """of the attack and of smoothgrad's noise"""
    what: OmitArgPrefixes[Explained] = field(default_factory=Explained)
    data_root: Path | None = None
    """folder of the data sets' files; else $PYXAI_BOUNDS_DATA, else ~/.cache/pyxai_bounds"""

    def __call__(self) -> None:
        if not self.runs:
            raise ValueError("Name at least one run, a folder that pyxai-bounds train or demo wrote.")
        _check_file("--out", self.out)
        report = _html()
        from pyxai_bounds.report import evaluate

        results: list[Evaluation] = []
        networks = [load(path) for path in self.runs]  # all of them, before the first is measured
        recipes = [read_description(path)["recipe"] for path in self.runs]
        datasets = {name: data.load(name, self.data_root) for name in dict.fromkeys(r["data"] for r in recipes)}
        with _progress() as bar:
            runs = zip(_labels(self.runs), networks, recipes, strict=True)
            for i, (label, model, recipe) in enumerate(runs):

                def on_progress(fraction: float, label: str = label, start: int = i) -> None:
                    bar.move(f"certifying and attacking {label}", (start + fraction) / len(self.runs))

                dataset = datasets[recipe["data"]]
                fn = self.what.function(model, dataset.input_shape, self.seed)
                results.append(
                    evaluate(
                        model, dataset, label,
                        name=recipe["model"], explanation=fn, explained_as=self.what.in_words, eps=self.eps,
                        k=self.k, seed=self.seed, branches=self.branches, on_progress=on_progress,
                    )
                )  # fmt: skip
        _console().print(f"[bold]{report.write_page(self.out, results)}[/bold]", highlight=False)


def _check_file(flag: str, path: Path) -> None:
    """Before anything is measured that could not be written."""
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a folder: name a file, which is written there.")
    check_writable(path)


@dataclass
class Info:
    """Versions, devices, and which backends run here, or why not; or what an objective and its options mean."""

    objective: str = ""
    """explain this objective, or term of a sum, instead"""

    def __call__(self) -> None:
        if self.objective:
            print(described(self.objective))
            return
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
        lines["Hopper kernels"] = hopper.why_not_available() or "available"
        for extra, module in (("train", "sklearn"), ("train", "safetensors"), ("report", "matplotlib")):
            lines[module] = _version(module) or f"missing: pip install 'pyxai-bounds[{extra}]'"
        lines["data sets"] = ", ".join(data.EMBEDDED) + f"; from files under {data.data_root()}: "
        lines["data sets"] += ", ".join(name for name in data.DATASETS if name not in data.EMBEDDED)
        lines["models"] = ", ".join(models.MODELS)
        lines["objectives"] = ", ".join(OBJECTIVES)
        lines["presets"] = ", ".join(PRESETS)
        grid = rich.table.Table.grid(padding=(0, 2))
        for name, value in lines.items():
            grid.add_row(f"[bold]{name}[/bold]", rich.markup.escape(value))
        _console().print(grid, highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0; 1 where nobody reads what is printed; 2 for what the user can mend; 130 when interrupted.
    """
    if _missing is not None:
        print(f"error: the command line needs {_missing}: pip install 'pyxai-bounds[cli]'", file=sys.stderr)
        return 2
    # A console script's path does not hold the user's folder, where package.module:factory is looked for.
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = None
    try:
        command = _parse(arguments)
        command()
        sys.stdout.flush()
    except BrokenPipeError:  # who reads has seen enough, as ``head`` has
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains as it exits
        return 1
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = ""
        if isinstance(command, Train) and any(command.out.glob("checkpoint-*.json")):
            hint = f"; go on with: pyxai-bounds train --resume --out {shlex.quote(str(command.out))}"
        print(f"interrupted{hint}", file=sys.stderr)
        return 130
    return 0


# --- reading the command line -------------------------------------------------------------------------------------


def _parse(arguments: list[str]) -> Callable[[], None]:
    """The command. A preset, or the recipe of a run to continue, takes the place of the flags' defaults."""
    training = arguments[:1] == ["train"]
    # Where the preset stands among the flags only a parser can say; a guess makes --help show its numbers.
    guess = next((a for a in arguments[1:] if a in PRESETS), "") if training else ""
    command = _parsed(arguments, guess, _preset(guess))
    if not isinstance(command, Train):
        return command
    default = _preset(command.preset)
    if command.resume and not command.preset:
        default = stored_recipe(command.out) or default
    if default != _preset(guess):
        command = _parsed(arguments, command.preset, default)
        assert isinstance(command, Train)
    return replace(command, recipe=replace(command.recipe, options=_merged(default, command.recipe)))


def _preset(name: str) -> Recipe:
    if not name or name in PRESETS:
        return PRESETS[name] if name else Recipe()
    if (path := Path(name)).is_dir():
        if (recipe := stored_recipe(path)) is None:
            raise ValueError(f"{name} is not a run: it has no run.json and no checkpoint.")
        return recipe
    if path.suffix == ".json":
        return _recipe_file(path)
    raise ValueError(
        f"There is no preset {name!r}; choose one of {', '.join(PRESETS)}, or give a run's folder or a recipe's .json."
    )


def _recipe_file(path: Path) -> Recipe:
    """A recipe as JSON: the fields that differ from the defaults, or a whole run.json."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        recipe = Recipe.from_json(values.get("recipe", values))
        recipe.check()
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no recipe: {error}") from error
    return recipe


def _parsed(arguments: list[str], preset: str, default: Recipe) -> Callable[[], None]:
    train = Train(out=tyro.MISSING, preset=preset, recipe=default)
    commands = Demo | Annotated[Train, tyro.conf.subcommand(default=train)] | Evaluate | Certify | Report | Info
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_options_rule)
    command: Callable[[], None] = tyro.cli(
        commands,
        prog="pyxai-bounds",
        description="Certified bounds on explanations.",
        args=arguments,
        registry=registry,
    )
    return command


def _options_rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """How tyro reads and prints the options of an objective: NAME=VALUE NAME=VALUE."""
    if get_origin(info.type) is not Mapping or get_args(info.type) != (str, Any):
        return None

    def read(values: list[str]) -> Options:
        wrong = [value for value in values if "=" not in value.strip("=")]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is not of the form NAME=VALUE")
        return Options(value.split("=", 1) for value in values)

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME=VALUE",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, Mapping),
        str_from_instance=lambda options: [f"{name}={value}" for name, value in options.items()],
    )


def _merged(default: Recipe, recipe: Recipe) -> Options:
    """Options that were given, and the default's others where the objective is the default's."""
    given = {} if recipe.options == default.options else recipe.options
    return Options({**default.options, **given} if recipe.objective == default.objective else given)


# --- printing -----------------------------------------------------------------------------------------------


def _first_process() -> bool:
    """Of those that torchrun started, the first one alone prints."""
    return os.environ.get("RANK", "0") == "0"


class _Bar:
    """A bar with the time left, on standard error if that is a terminal, and lines above it."""

    def __init__(self) -> None:
        self.console = rich.console.Console(stderr=True, soft_wrap=True)
        self.progress = rich.progress.Progress(
            rich.progress.BarColumn(bar_width=24),
            rich.progress.TaskProgressColumn(),
            rich.progress.TextColumn("{task.description}"),
            rich.progress.TimeRemainingColumn(compact=True),
            rich.progress.TextColumn("left"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal or not _first_process(),
        )
        self.task = self.progress.add_task("starting", total=1.0)

    def move(self, what: str, fraction: float) -> None:
        self.progress.update(self.task, description=what, completed=fraction)

    def say(self, line: str, style: str = "") -> None:
        """A line that stays: above the bar, or on standard output where there is none."""
        if _first_process():
            console = _console() if self.progress.disable else self.progress.console
            console.print(line, style=style, highlight=False, markup=False)


@contextmanager
def _progress() -> Iterator[_Bar]:
    bar = _Bar()
    with bar.progress:
        yield bar


class _Training:
    """Shows a training: what it is, a row for some of the epochs, and how far it is."""

    ROWS = 20

    def __init__(self, recipe: Recipe, dataset: data.Dataset, bar: _Bar) -> None:
        self.recipe, self.bar, self.begun = recipe, bar, False
        options = "".join(f" {name}={value}" for name, value in recipe.options.items())
        eps = "" if recipe.objective in WITHOUT_EPS else f", eps {recipe.eps:g}"
        self.title = (
            f"{recipe.objective}{options}{eps}: {recipe.model} on {dataset.name}, {len(dataset.train_x)} samples"
        )

    def __call__(self, now: Progress) -> None:
        if not self.begun:
            self.begun = True
            watched = "  held-out loss  accuracy" if self.recipe.validation else ""
            self.bar.say(self.title, "bold")
            self.bar.say(f"{'epoch':>9}  {'loss':>10}  {'eps':>8}  {'lr':>8}  {'seconds':>8}{watched}", "dim")
        done = now.done
        if done is not None and (now.epoch % math.ceil(now.epochs / self.ROWS) == 0 or now.step == now.steps):
            eps = "–" if self.recipe.objective in WITHOUT_EPS else f"{done.eps:.3g}"
            eps = eps if done.weight else "natural"
            line = f"{f'{now.epoch}/{now.epochs}':>9}  {done.loss:>10.4f}  {eps:>8}  {done.lr:>8.2g}"
            line += f"  {done.seconds:>8.1f}"
            if done.validation_loss is not None:
                line += f"  {done.validation_loss:>13.4f}  {done.validation_accuracy:>8.3f}"
            self.bar.say(line)
        what = f"epoch {min(now.epoch + (done is not None), now.epochs)}/{now.epochs}, loss {now.loss:.4f}"
        self.bar.move(what, now.step / now.steps)


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


def _print_measurements(settings: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Settings; each number with what it means, its radii side by side; the attacks, a line each."""
    rows, radii = list(glossary.rows(found)), [at["eps"] for at in found["at"]]
    console = rich.console.Console()
    console.width = max(console.width, 60 + 10 * len(radii))  # the definitions keep a readable column
    head = rich.table.Table.grid(padding=(0, 2))
    for name, value in settings.items():
        head.add_row(name, str(value))
    console.print(head, highlight=False)
    console.print(_grid("", [""], [row for row in rows if row.eps is None]), highlight=False)
    at_eps = [row for row in rows if row.eps is not None and not row.attack]
    console.print(_grid("at eps", radii, at_eps), highlight=False)
    attacks = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    attacks.add_column("attack", no_wrap=True)
    attacks.add_column("at eps", justify="right")
    for name, metric in glossary.COMPARISONS.items():
        attacks.add_column(f"{name} {metric.arrow}", justify="right")
    for name in found["at"][0]["attacks"]:
        for at in found["at"]:
            cells = (_text(at["attacks"][name][metric]) for metric in glossary.COMPARISONS)
            attacks.add_row(name if at is found["at"][0] else "", f"{at['eps']:g}", *cells)
    console.print(attacks, highlight=False)
    console.print(
        "↑ higher is better, ↓ lower is better. proof: certified for every input within eps; the others are empirical. "
        "Attacks, units and sources: docs/metrics.md.",
        style="dim",
        highlight=False,
    )


def _grid(title: str, columns: Sequence[Any], rows: Sequence[glossary.Row]) -> rich.table.Table:
    grid = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_header=bool(title))
    grid.add_column(title, no_wrap=True)
    for value in columns:
        grid.add_column(f"{value}", justify="right", no_wrap=True)
    grid.add_column()
    grid.add_column("what it is", style="dim")
    values: dict[str, list[str]] = {}
    for row in rows:
        values.setdefault(row.metric, []).append(_text(row.value))
    for name, cells in values.items():
        metric = glossary.entry(name)
        proof = " proof" if metric.kind == "certified" else ""
        mark = "" if metric.kind == "setting" else metric.arrow + proof
        grid.add_row(name, *cells, mark, metric.definition)
    return grid


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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
