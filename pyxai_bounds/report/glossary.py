"""What each number of an evaluation means, in one place: the printed table, the CSV, the HTML page and docs/metrics.md.

``python -m pyxai_bounds.report.glossary > docs/metrics.md`` writes the page anew.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

RAR = "Chen et al., NeurIPS 2019, arXiv 1905.09957 (RAR)"
R2ET = "Chen et al., arXiv 2212.14106 (R2ET)"
REC = "Wicker et al., ICLR 2023, arXiv 2212.08507 (REC)"
GHORBANI = "Ghorbani et al., AAAI 2019"
MADRY = "Madry et al., ICLR 2018"
IBP = "Gowal et al., ICCV 2019 (IBP)"
STABILITY = "Xiao et al., ICLR 2019"
OURS = "pyxai_bounds"


@dataclass(frozen=True)
class Metric:
    """One number. certified: a proof; empirical: what was measured or found by a search; setting: an input.

    explained: whether it depends on the explanation that was chosen.
    """

    definition: str
    unit: str
    better: Literal["higher", "lower", "neither"]
    kind: Literal["certified", "empirical", "setting"]
    source: str
    explained: bool = True

    @property
    def arrow(self) -> str:
        return {"higher": "↑", "lower": "↓", "neither": "·"}[self.better]

    @property
    def details(self) -> str:
        direction = "" if self.kind == "setting" else f"; {_DIRECTION[self.better]}; {self.kind}"
        return f"Unit: {self.unit}{direction}. Source: {self.source}."

    @property
    def line(self) -> str:
        """Everything in one line, for a title attribute."""
        return f"{self.definition}. {self.details}"


_DIRECTION = {"higher": "higher is better", "lower": "lower is better", "neither": "neither end is better"}


def _setting(definition: str, unit: str, explained: bool = True) -> Metric:
    return Metric(definition, unit, "neither", "setting", "–", explained)


METRICS: dict[str, Metric] = {
    "samples": _setting("Held-out samples measured", "count"),
    "k": _setting("Features that count as top", "count"),
    "rounding": _setting("How bounds are rounded; outward makes a certificate a proof", "–"),
    "NA": Metric("Accuracy without attack", "share", "higher", "empirical", RAR, explained=False),
    "unstable relus": Metric(
        "ReLUs whose input may have either sign in the box, by bounds that round to nearest", "share",
        "lower", "empirical", STABILITY, explained=False,
    ),
    "unstable relus at eps": _setting("Radius of that box", "units of the data", explained=False),
    "same class cosine": Metric(
        "Mean cosine between explanations of two samples of a class; near 1 they say nothing of the sample",
        "−1 … 1", "neither", "empirical", OURS,
    ),
    "certified radius max eps": _setting("Largest radius tried; no certified radius exceeds it", "units of the data"),
    "certified radius mean": Metric(
        "Mean over samples of the radius up to which the top k are certified", "units of the data", "higher",
        "certified", OURS,
    ),
    "certified radius lower quartile": Metric(
        "Lower quartile over samples of the radius up to which the top k are certified", "units of the data", "higher",
        "certified", OURS,
    ),
    "certified radius median": Metric(
        "Median over samples of the radius up to which the top k are certified", "units of the data", "higher",
        "certified", OURS,
    ),
    "certified radius upper quartile": Metric(
        "Upper quartile over samples of the radius up to which the top k are certified", "units of the data", "higher",
        "certified", OURS,
    ),
    "AA": Metric(
        "Accuracy under attack: samples still classified correctly after a PGD attack on the loss", "share", "higher",
        "empirical", f"{MADRY}; {RAR}", explained=False,
    ),
    "certified accuracy": Metric(
        "Samples whose label provably wins everywhere in the box; at most AA", "share", "higher", "certified", IBP,
        explained=False,
    ),
    "certified topk": Metric(
        "Samples whose top k features provably stay the top k in the whole box", "share", "higher", "certified", OURS
    ),
    "survived topk": Metric(
        "Samples whose top k a PGD attack did not change, the label free; at least certified topk", "share", "higher",
        "empirical", GHORBANI,
    ),
    "certified intersection": Metric(
        "Mean share of the top k features that provably stay among the top k", "share", "higher", "certified", OURS
    ),
    "certified cosine": Metric(
        "Samples whose explanation provably keeps a cosine of at least certified cosine least to the nominal one",
        "share", "higher", "certified", OURS,
    ),
    "certified cosine least": _setting("The cosine that is asked for", "−1 … 1"),
    "certified mean square": Metric(
        "Samples whose explanation provably moves by a mean square of at most tau", "share", "higher", "certified", REC
    ),
    "survived mean square": Metric(
        "Samples for which REC's untargeted attack did not exceed tau; at least certified mean square", "share",
        "higher", "empirical", REC,
    ),
    "tau": _setting("The mean square that is allowed", "(unit of the explanation)²"),
    "compared": _setting(
        "Correctly classified samples: IN, CO, P@k and the attacks on explanations are means over them, the label kept",
        "count", explained=False,
    ),
    "IN": Metric(
        "Mean share of the top k left by the top-k attack (attack topk, intersection)", "share", "higher",
        "empirical", RAR,
    ),
    "CO": Metric(
        "Mean Kendall's tau of the rankings before and after the top-k attack (attack topk, kendall)", "−1 … 1",
        "higher", "empirical", RAR,
    ),
    "P@k": Metric(
        "Mean share of the top k left by ERAttack with early stop (attack er-stop, intersection)", "share", "higher",
        "empirical", R2ET,
    ),
    "thickness": Metric(
        "Mean share of (top, other) feature pairs that keep their order on the way to random neighbours in the box",
        "share", "higher", "empirical", R2ET,
    ),
    "ig norm found": Metric(
        "Mean of the largest ‖IG(x, x′)‖₁ of the loss that an attack found in the box", "loss", "lower", "empirical",
        RAR, explained=False,
    ),
    "ig norm certified": Metric(
        "Mean of a proven upper bound on ‖IG(x, x′)‖₁ of the loss in the box; at least ig norm found", "loss", "lower",
        "certified", OURS, explained=False,
    ),
}  # fmt: skip

ATTACKS: dict[str, tuple[str, str]] = {
    "topk": ("Sign steps that drain the saliency of the top k", f"{GHORBANI}; {RAR}"),
    "random": ("The worst point of a walk in random signs: what an attack must beat", f"{GHORBANI}; {RAR}"),
    "center": ("Sign steps that move the saliency's centre of mass; images only", f"{GHORBANI}; {RAR}"),
    "region": ("Sign steps that draw the saliency into the upper left quarter; images only", f"{GHORBANI}; {RAR}"),
    "er-stop": ("ERAttack: lowers the top k below the features next to them; stops before the label flips", R2ET),
    "er-hinge": ("ERAttack with a hinge that keeps the label instead; the same as er-stop where none flips", R2ET),
    "mse-stop": ("Moves the explanation as far as possible in mean square; stops before the label flips", R2ET),
    "mse-hinge": ("mse-stop with a hinge that keeps the label instead; the same where none flips", R2ET),
}

COMPARISONS: dict[str, Metric] = {
    "intersection": Metric(
        "Mean share of the top k features that the explanations before and after have in common", "share", "higher",
        "empirical", f"{RAR}; {R2ET}",
    ),
    "kendall": Metric("Mean Kendall's tau-b of the two saliency rankings", "−1 … 1", "higher", "empirical", RAR),
    "spearman": Metric(
        "Mean Spearman rank correlation of the two saliency maps", "−1 … 1", "higher", "empirical", GHORBANI
    ),
    "pearson": Metric("Mean Pearson correlation of the two saliency maps", "−1 … 1", "higher", "empirical", "–"),
    "mse": Metric(
        "Mean square difference of the two explanations", "(unit of the explanation)²", "lower", "empirical", REC
    ),
}  # fmt: skip


def entry(metric: str, attack: str = "") -> Metric:
    """The entry of a number by its name: ``entry("certified topk")``, ``entry("kendall", "er-stop")``.

    Raises KeyError for a name without an entry.
    """
    if not attack:
        return METRICS[metric]
    how, source = ATTACKS[attack]
    compared = COMPARISONS[metric]
    return replace(compared, definition=f"{compared.definition}. After: {how}", source=source)


class Row(NamedTuple):
    """One number of an evaluation. eps is None where it belongs to no radius, attack empty where to no attack."""

    eps: float | None
    attack: str
    metric: str
    value: Any

    @property
    def entry(self) -> Metric:
        return entry(self.metric, self.attack)


def rows(found: Mapping[str, Any]) -> Iterator[Row]:
    """Every number of what :func:`evaluate_all` returned, in its order, by the names of the glossary."""
    for key, value in found.items():
        if key == "at":
            for at in value:
                yield from _at_radius(at)
        elif isinstance(value, Mapping):
            yield from (Row(None, "", _name(f"{key} {part}"), number) for part, number in value.items())
        else:
            yield Row(None, "", _name(key), value)


def _at_radius(at: Mapping[str, Any]) -> Iterator[Row]:
    yield from (Row(at["eps"], "", _name(key), at[key]) for key in at if key not in ("eps", "attacks"))
    for attack, compared in at["attacks"].items():
        yield from (Row(at["eps"], attack, metric, value) for metric, value in compared.items())


def _name(key: str) -> str:
    return key.replace("_", " ")


SETTINGS = ("run", "data", "model", "explanation", "samples", "k", "seed", "rounding")
COLUMNS = (*SETTINGS, "eps", "attack", "metric", "value", "kind", "better", "unit")


def csv_text(settings: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """What :func:`evaluate_all` found as CSV, a line per number; settings: what of ``SETTINGS`` it does not hold."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    common = {name: {**settings, **found}[name] for name in SETTINGS}
    for row in rows(found):
        if row.metric in SETTINGS:
            continue
        metric = row.entry
        line = common | {name: getattr(row, name) for name in ("eps", "attack", "metric", "value")}
        line |= {name: getattr(metric, name) for name in ("kind", "better", "unit")}
        table.writerow(line if metric.explained else line | {"explanation": ""})
    return text.getvalue()


def markdown() -> str:
    """docs/metrics.md."""
    head = "| row | what | unit | better | kind | source |\n|---|---|---|---|---|---|\n"
    attacks = "".join(f"| `{name}` | {what} | {source} |\n" for name, (what, source) in ATTACKS.items())
    return _PAGE.format(
        metrics=head + _rows(METRICS),
        attacks=f"| attack | what | source |\n|---|---|---|\n{attacks}",
        comparisons=head.replace("row", "column") + _rows(COMPARISONS),
    )


def _rows(metrics: dict[str, Metric]) -> str:
    cells = (
        (m.definition, m.unit, "" if m.kind == "setting" else m.better, m.kind, m.source) for m in metrics.values()
    )
    return "".join(f"| `{name}` | {' | '.join(row)} |\n" for name, row in zip(metrics, cells, strict=True))


_PAGE = """# What an evaluation measures

    pyxai-bounds evaluate runs/mine --eps 0.01 0.02 --csv mine.csv

prints these rows, keeps them in `evaluation.json` (with `_` for spaces) and, with `--csv FILE`, writes each as a line
with its settings. *Certified* is a proof for every input within eps, rounded outward; *empirical* was measured or
found by a search, and a better search may find worse. Where the two stand side by side the truth lies between them.
*Saliency* is |explanation|, summed over the channels of an image: that is ranked, by `certify` and `report`, too.
(In Python `xb.TopK(k)` ranks entries, `xb.TopK(k, channels="sum")` pixels.) A share is a number from 0 to 1.

With the default explanation a linear model is perfect in most rows, because it explains every input alike: read them
beside `NA` and `same class cosine`.

## The rows

{metrics}
## The attacks on explanations

Each stays within eps, keeps the label and leaves the numbers of the next table. None of them is a proof.

{attacks}
{comparisons}
## Another explanation

`--explanation`, of `certify` and `report` too, chooses what is bounded: `gradient` (default), `saliency` (its size),
`gradient-x-input`, `integrated-gradients` (baseline 0) and `smoothgrad`, with `--of logit`, `probability` or `loss`.
`--points` is the number of steps of integrated gradients or of noisy copies of SmoothGrad, `--noise` the standard
deviation of these, drawn once from `--seed` and the same for all samples. Both bound the gradient at
`--points` inputs per sample. `NA`, `AA`, `certified accuracy`, `unstable relus` and the two `ig norm` rows do not
depend on the explanation. In Python, `evaluate_all` of `pyxai_bounds.report` takes any function `(x, y)` that returns
one number per entry of x; it refuses others, because the metrics add up the channels themselves.

## The CSV

One line per number: `run, data, model, explanation, samples, k, seed, rounding, eps, attack, metric, value, kind,
better, unit`. `explanation` is empty where the number does not depend on it, `eps` where it belongs to no radius,
`value` where the number does not exist (a network without ReLUs has none that are unstable).
"""

if __name__ == "__main__":
    print(markdown(), end="")
