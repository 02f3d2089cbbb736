"""docs/comparison.md and its picture, from the CSV of ``bench.compare`` alone: no sentence has a figure of its own."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, str]
PAGE, PICTURE = "comparison.md", "comparison.png"
ALIKE, SAME_TOP = 0.99, 0.9  # from here on, explanations of a class count as constant, its top set as everybody's

# Objectives of one colour pursue one thing; the marks tell them apart.
FAMILIES = {
    "#000000": ("natural",),
    "#d55e00": ("rec", "rec-released", "r4"),
    "#0072b2": ("ig-norm", "ig-sum-norm", "certified-ig-norm", "certified-ig-sum-norm"),
    "#009e73": ("r2et", "r2et-mm"),
    "#cc79a7": ("certified-topk", "separated-topk"),
    "#e69f00": ("ibp", "pgd"),
    "#56b4e9": ("l2", "l2-adversarial", "hessian", "est-h", "ssr"),
    "#8d6e63": ("relu-stability", "tightness"),
}
MARKS = "osD^v"


@dataclass(frozen=True)
class Runs:
    """The seeds of one objective on one network and data set."""

    data: str
    model: str
    objective: str
    rows: tuple[Row, ...]

    def values(self, name: str) -> list[float]:
        return [float(row[name]) for row in self.rows if row[name] != ""]

    def mean(self, name: str) -> float:
        return statistics.fmean(self.values(name))

    def cell(self, name: str, digits: int = 2) -> str:
        """Mean ± standard deviation over the seeds; – where there is no number."""
        values = self.values(name)
        if not values:
            return "–"
        text = _short(statistics.fmean(values), digits)
        return text if len(values) == 1 else f"{text} ± {_short(statistics.stdev(values), digits)}"

    @property
    def applies(self) -> bool:
        return bool(self.values("accuracy"))

    @property
    def note(self) -> str:
        return self.rows[0]["note"]

    @property
    def settings(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.rows[0]["settings"])
        return found


Table = dict[tuple[str, str], dict[str, Runs]]  # (data, model) → objective → runs


def write(rows: Sequence[Row], docs: Path) -> None:
    """The page and the picture, from at least one row."""
    table = grouped(rows)
    docs.mkdir(parents=True, exist_ok=True)
    (docs / PAGE).write_text(page(table), encoding="utf-8")
    plot(table, docs / PICTURE)


def grouped(rows: Iterable[Row]) -> Table:
    """In a fixed order, whatever the order in which jobs were done."""
    found: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        found.setdefault((row["data"], row["model"]), {}).setdefault(row["objective"], []).append(row)
    order = [name for names in FAMILIES.values() for name in names]

    def place(name: str) -> tuple[int, str]:
        return (order.index(name) if name in order else len(order)), name

    return {
        pair: {name: Runs(*pair, name, tuple(sorted(found[pair][name], key=lambda row: int(row["seed"]))))
               for name in sorted(found[pair], key=place)}
        for pair in sorted(found, key=lambda pair: (_DATA.get(pair[0], 9), _MODELS.get(pair[1], 9), pair))
    }  # fmt: skip


_DATA = {name: place for place, name in enumerate(("digits-parity", "digits", "breast-cancer"))}
_MODELS = {name: place for place, name in enumerate(("linear", "fc-128", "fc-256x2", "cnn-small", "cnn7-identity"))}


def linear(table: Table, data: str) -> Runs | None:
    """The baseline: the linear model of a data set, trained by cross entropy."""
    return table.get((data, "linear"), {}).get("natural")


def traps(runs: Runs, baseline: Runs | None) -> list[str]:
    """Why a certificate may be worth little. None of them is asked of a linear model, whose explanation is constant."""
    if not runs.applies or runs.model == "linear":
        return []
    found = []
    if runs.mean("same_class_cosine") >= ALIKE:
        found.append("constant")
    if runs.mean("commonest_top_share") >= SAME_TOP:
        found.append("same top")
    if baseline is not None and runs.mean("accuracy") <= baseline.mean("accuracy"):
        found.append("≤ linear")
    return found


def frontier(runs: Iterable[Runs]) -> list[str]:
    """The objectives that no other one beats in accuracy and certified top features at once."""
    at = {r.objective: (r.mean("accuracy"), r.mean("certified_top5_1")) for r in runs if r.applies}
    return [
        name for name, (a, c) in at.items()
        if not any(b >= a and d >= c and (b, d) != (a, c) for b, d in at.values())
    ]  # fmt: skip


# --- the page -----------------------------------------------------------------------------------------------------


def page(table: Table) -> str:
    """The whole page as Markdown."""
    return "\n".join([
        _INTRODUCTION, *_plans(table), _COLUMNS_EXPLAINED, *_reading(table), _TRAPS, f"![{_CAPTION}]({PICTURE})", "",
        _CAPTION + ".", "", *_missing(table), "## Every number", "",
        "Sorted by the certified top 5 at the smaller radius; mean ± standard deviation over the seeds.", "",
        *(line for pair in table for line in _numbers(table, pair)),
        *_objectives(table),
    ])  # fmt: skip


_INTRODUCTION = """# Every objective beside the others

    make compare                      # trains and measures everything, writes this page: half an hour on two cores
    python -m bench.compare           # goes on where it was interrupted, or with what is missing
    python -m bench.compare --only rec,r2et --data digits --model fc-128 --fresh
    python -m bench.compare --page    # this page and the picture anew, from bench/results/cpu/comparison.csv

This page is written by that command. Every objective of `pyxai_bounds.train.objectives` trains the same networks on the
same samples for as many epochs, with one value of each option for all data sets and networks (last table). It compares
objectives at equal, small budgets, not at their best: [recipes.md](recipes.md) has what longer runs reach.

## What was compared
"""

_COLUMNS_EXPLAINED = """All: Adam, cosine learning rate to 0, gradient norm ≤ 5; cross entropy alone in the natural
epochs, then the objective with eps growing linearly over half of what is left; one thread. `cnn7-identity` has
the five convolutions and two linear layers of `cnn7`, narrower, starts near the identity and has centred logits: so
many trainings of the wide one would take several times as long. The convolutional networks get fewer epochs than
the others for the same reason.

* *accuracy*, *cosine* (mean same-class cosine of the explanations), *unstable* (share of unstable ReLUs at the first
  radius), *commonest* (`commonest_top_share`) and the certificates are about all held-out samples. The certificates are
  proofs (rounded outward) about the gradient of the label's logit in the box around each sample, at both radii:
  *top-5*, the five most important features stay so; *cos ≥ .9*, to the explanation of the sample itself.
* *AA* (accuracy under attack), *IN* and *CO* (top-5 intersection and Kendall's tau under RAR's top-k attack) and *P@5*
  (under R2ET's attack, which stops at a label flip) are at the second radius. An attack that broke a certificate would
  be an error instead of a row.
* *s / epoch*: processor seconds of an epoch of the objective, median.
"""

_TRAPS = f"""## Traps

A linear model explains every sample alike: it is certified at any radius, and says nothing of the sample. It stands in
every table. A network can look certified in the same way, and the column *trap* says where one does:

* *constant*: the mean same-class cosine is at least {str(ALIKE)[1:]}. The explanation is that of a linear model.
* *same top*: `commonest_top_share` is at least {str(SAME_TOP)[1:]}. The explanations may differ, but the five features
  are the same for nearly every sample of a class, so that their certificate says little.
* *≤ linear*: no more accurate than the linear model, which is certified for free.
"""

_CAPTION = (
    "Accuracy against the share of samples whose top 5 is certified at the smaller radius: a mark for each objective, "
    "bars of one standard deviation over the seeds, hollow where there is a trap; dotted, the linear model's accuracy"
)


def _plans(table: Table) -> list[str]:
    lines = [
        "| data | network | epochs (natural) | batch | lr | trained to eps | radii | samples (attacked) | attack steps "
        "| seeds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for (data, model), group in table.items():
        runs = next(iter(group.values()))
        s = runs.settings
        seeds = dict.fromkeys(sorted({len(other.rows) for other in group.values()}))
        cells = [
            f"`{data}`", f"`{model}`", f"{s['epochs']} ({s['natural_epochs']})", s["batch_size"], _short(s["lr"], 4),
            _short(s["eps"]), _radii(runs.rows[0]), f"{s['samples']} ({s['attacked']})", s["attack_steps"],
            " or ".join(map(str, seeds)),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return [*lines, ""]


def _numbers(table: Table, pair: tuple[str, str]) -> list[str]:
    baseline = linear(table, pair[0])
    radii = _radii(next(iter(table[pair].values())).rows[0])
    lines = [
        f"### {pair[0]}, {pair[1]}", "",
        f"| objective | accuracy | top-5 {radii} | cos ≥ .9 {radii} | cosine | commonest | unstable | AA | IN | CO "
        "| P@5 | s / epoch | trap |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    notes: dict[str, int] = {}
    applies = [runs for runs in table[pair].values() if runs.applies]
    applies.sort(key=lambda runs: (-runs.mean("certified_top5_1"), -runs.mean("accuracy")))
    if baseline is not None and pair[1] != "linear":
        lines.append(_line(baseline, "*linear model*", "–"))
    for runs in [*applies, *(runs for runs in table[pair].values() if not runs.applies)]:
        mark = f" [{notes.setdefault(runs.note, len(notes) + 1)}]" if runs.note else ""
        lines.append(_line(runs, f"`{runs.objective}`{mark}", ", ".join(traps(runs, baseline)) or "–"))
    return [*lines, "", *(f"[{number}] {note}.  " for note, number in notes.items()), *([""] if notes else [])]


def _line(runs: Runs, name: str, trap: str) -> str:
    pairs = [[runs.cell(f"certified_{kind}_{at}") for at in (1, 2)] for kind in ("top5", "cosine")]
    others = ("same_class_cosine", "commonest_top_share", "unstable_relus", "AA", "IN", "CO", "P@5")
    cells = [
        name, runs.cell("accuracy", 3), *(" / ".join(pair) for pair in pairs), *map(runs.cell, others),
        runs.cell("seconds_per_epoch", 3), trap,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _objectives(table: Table) -> list[str]:
    """The options of each objective, what an epoch costs, and how it fared over all networks that are not linear."""
    names = list(dict.fromkeys(name for group in table.values() for name in group))
    deep = {pair: group for pair, group in table.items() if pair[1] != "linear"}
    clear = {
        pair: [runs for runs in group.values() if runs.applies and not traps(runs, linear(table, pair[0]))]
        for pair, group in deep.items()
    }
    best = {pair: frontier(runs) for pair, runs in clear.items()}
    lines = [
        "## The objectives", "",
        "*cost*: an epoch, relative to one of `natural`, median over the networks. *frontier*: on how many networks "
        "that are not linear no other objective without a trap is as accurate and as certified. *trap*: on how many "
        "it fell into one.", "",
        "| objective | options | cost | frontier | trap |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name in names:
        runs = [group[name] for group in table.values() if name in group]
        options: dict[str, list[str]] = {}
        for r in runs:
            for key, value in r.settings["options"].items():
                values = options.setdefault(key, [])
                values += [] if (text := _plain(value)) in values else [text]
        listed = ", ".join(f"{key} {' or '.join(values)}" for key, values in options.items()) or "–"
        costs = [
            group[name].mean("seconds_per_epoch") / group["natural"].mean("seconds_per_epoch")
            for group in table.values()
            if name in group and "natural" in group and group[name].applies
        ]
        here = [pair for pair in deep if name in deep[pair]]
        trapped = sum(bool(traps(deep[pair][name], linear(table, pair[0]))) for pair in here)
        lines.append(
            f"| `{name}` | {listed} | {f'{statistics.median(costs):.1f}' if costs else '–'} | "
            f"{sum(name in best[pair] for pair in here)} of {len(here)} | {trapped} of {len(here)} |"
        )
    return [*lines, "", _SOURCES]


_SOURCES = """Of the papers: the weights of `ig-norm` and `ig-sum-norm` (RAR on MNIST; its m of 50 and its 40 steps
would take too long here), alpha of `rec-released` (REC's smallest, times the batch size as in the released code), the
adaptive weights of `r2et` and `r2et-mm` (of the published .001 … 100). All others are the package's defaults or ours.
`r4` is told to ignore the first and the last row of pixels, or the last ten measurements of the table.
"""


def _reading(table: Table) -> list[str]:
    """What the numbers say, network by network."""
    lines = ["## What the numbers say", ""]
    for pair, group in table.items():
        baseline = linear(table, pair[0])
        applies = [runs for runs in group.values() if runs.applies]
        if not applies:
            continue
        if pair[1] == "linear":
            ends = sorted(applies, key=lambda runs: runs.mean("accuracy"))
            least = min(runs.mean("certified_top5_2") for runs in applies)
            share = "all" if least == 1 else f"at least {_short(least)}"
            low, high = (f"{_short(end.mean('accuracy'), 3)} (`{end.objective}`)" for end in (ends[0], ends[-1]))
            lines.append(
                f"* **{pair[0]}, linear**: every objective certifies {share} of the samples at the second radius; "
                f"accuracy from {low} to {high}."
            )
            continue
        caught = {runs.objective: traps(runs, baseline) for runs in applies}
        clear = [runs for runs in applies if not caught[runs.objective]]
        text = f"* **{pair[0]}, {pair[1]}**"
        text += f" (linear model {_short(baseline.mean('accuracy'), 3)}): " if baseline else ": "
        text += f"{len(clear)} of {len(applies)} objectives are free of traps. "
        if clear:
            sure = max(clear, key=lambda runs: (runs.mean("certified_top5_1"), runs.mean("accuracy")))
            right = max(clear, key=lambda runs: (runs.mean("accuracy"), runs.mean("certified_top5_1")))
            if sure is right:
                text += f"Of these, {_described(sure)} certifies most and is the most accurate; "
            else:
                text += f"Of these, {_described(sure)} certifies most; {_described(right)} is the most accurate; "
            text += f"on the frontier: {', '.join(f'`{name}`' for name in frontier(clear))}. "
            if not sure.mean("certified_top5_1"):
                text += "None of these certifies anything at the first radius. "
        by_trap: dict[str, list[str]] = {}
        for name, reasons in caught.items():
            if reasons:
                by_trap.setdefault(", ".join(reasons), []).append(f"`{name}`")
        text += " ".join(f"*{trap}*: {', '.join(names)}." for trap, names in by_trap.items())
        lines.append(text.rstrip())
    return [*lines, ""]


def _described(runs: Runs) -> str:
    accuracy, certified = _short(runs.mean("accuracy"), 3), _short(runs.mean("certified_top5_1"))
    return f"`{runs.objective}` (accuracy {accuracy}, certified {certified})"


def _missing(table: Table) -> list[str]:
    """Nothing is left out silently."""
    names = dict.fromkeys(name for group in table.values() for name in group)
    seeds = max(len(runs.rows) for group in table.values() for runs in group.values())
    lines = []
    for (data, model), group in table.items():
        absent = [f"`{name}`" for name in names if name not in group]
        fewer = [f"`{name}` ({len(runs.rows)})" for name, runs in group.items() if len(runs.rows) < seeds]
        if absent:
            lines.append(f"* {data}, {model}: not measured: {', '.join(absent)}")
        if len(fewer) == len(group):
            lines.append(f"* {data}, {model}: fewer seeds than the most: all")
        elif fewer:
            lines.append(f"* {data}, {model}: fewer seeds than the most: {', '.join(fewer)}")
    return ["**Missing**, until `python -m bench.compare` has run to its end:", "", *lines, ""] if lines else []


def _radii(row: Row) -> str:
    return f"{_short(float(row['eps_1']))} / {_short(float(row['eps_2']))}"


def _plain(value: Any) -> str:
    return _short(value, 4) if isinstance(value, float) else str(value)


def _short(value: float, digits: int = 2) -> str:
    """.97 for 0.97, as many digits as needed up to ``digits`` for numbers that are whole."""
    text = f"{value:.{digits}f}"
    if float(text) == round(float(text)):
        return str(round(float(text)))
    text = text.rstrip("0") if digits > 3 else text
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


# --- the picture --------------------------------------------------------------------------------------------------


def style(objective: str) -> tuple[str, str]:
    """(colour, mark)"""
    for colour, names in FAMILIES.items():
        if objective in names:
            return colour, MARKS[names.index(objective)]
    return "#808285", "P"


def plot(table: Table, picture: Path) -> None:
    """A panel for each data set and network, a row for each data set; the legend where the last row leaves room."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    data = list(dict.fromkeys(pair[0] for pair in table))
    across = {name: [pair for pair in table if pair[0] == name] for name in data}
    columns = max(len(pairs) for pairs in across.values())
    figure = Figure(figsize=(3.4 * columns + 2.6, 3.1 * len(data) + 0.5), layout="constrained")
    axes = figure.subplots(len(data), columns, squeeze=False)
    handles: dict[str, Line2D] = {}
    for name, line in zip(data, axes, strict=True):
        baseline = linear(table, name)
        for ax in line[len(across[name]) :]:
            ax.axis("off")
        for ax, pair in zip(line, across[name], strict=False):
            shown = [runs for runs in table[pair].values() if runs.applies]
            for runs in shown:
                colour, mark = style(runs.objective)
                hollow = bool(traps(runs, baseline))
                ax.errorbar(
                    [runs.mean("certified_top5_1")], [runs.mean("accuracy")], xerr=[_spread(runs, "certified_top5_1")],
                    yerr=[_spread(runs, "accuracy")], fmt=mark, color=colour, markersize=6.5, elinewidth=0.7, alpha=0.9,
                    markerfacecolor="none" if hollow else colour, clip_on=False, zorder=3,
                )  # fmt: skip
                handles.setdefault(
                    runs.objective, Line2D([], [], linestyle="", marker=mark, color=colour, label=runs.objective)
                )
            if baseline is not None:
                ax.axhline(baseline.mean("accuracy"), color="#808285", linewidth=1, linestyle=":")
            ax.set_title(f"{pair[0]}, {pair[1]}", fontsize=9)
            ax.set_xlim(-0.04, 1.04)
            lowest = min((runs.mean("accuracy") for runs in shown), default=1.0)
            ax.set_ylim(min(lowest - 0.01, 0.9), 1.002)
            ax.tick_params(labelsize=8)
            for side in ("top", "right"):
                ax.spines[side].set_visible(False)
        line[0].set_ylabel("test accuracy", fontsize=9)
    for pairs, line in zip(across.values(), axes, strict=True):
        for ax, pair in zip(line, pairs, strict=False):
            radius = next(iter(table[pair].values())).rows[0]["eps_1"]
            ax.set_xlabel(f"certified top 5, eps {_short(float(radius))}", fontsize=8)
    order = [name for names in FAMILIES.values() for name in names]
    entries = sorted(handles.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order))
    hollow = Line2D([], [], linestyle="", marker="o", color="#808285", markerfacecolor="none", label="hollow: a trap")
    dotted = Line2D([], [], linestyle=":", color="#808285", label="the linear model")
    figure.legend(
        handles=[*(handle for _, handle in entries), hollow, dotted], loc="outside right center", fontsize=9,
        frameon=False,
    )  # fmt: skip
    figure.savefig(picture, dpi=100)


def _spread(runs: Runs, name: str) -> float:
    values = runs.values(name)
    return statistics.stdev(values) if len(values) > 1 else 0.0
