"""One self-contained HTML page of evaluations: pictures inside, nothing fetched, nothing run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from pyxai_bounds.report.evaluate import Evaluation, rounded_down
from pyxai_bounds.report.glossary import entry
from pyxai_bounds.report.plots import encode, plot_curves, plot_samples, plot_widths
from pyxai_bounds.train.checkpoint import write_file


def write_page(path: str | Path, evaluations: Sequence[Evaluation], title: str = "How much of it is certain?") -> Path:
    """Write the page of these evaluations, grouped by data set; folders are made as needed. Returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, page(evaluations, title).encode())
    return path


def page(evaluations: Sequence[Evaluation], title: str = "How much of it is certain?") -> str:
    """The page as text. Raises ValueError without evaluations, or where those on one data set differ in radii, k or
    explanation.
    """
    if not evaluations:
        raise ValueError("A report needs at least one evaluation.")
    groups: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations:
        groups.setdefault(evaluation.dataset.name, []).append(evaluation)
    body = "\n".join(_section(name, group) for name, group in groups.items())
    return _PAGE.format(title=escape(title), style=_STYLE, body=body, guide=_GUIDE)


def _section(name: str, group: list[Evaluation]) -> str:
    if len({(e.property, e.explained_as, tuple(row.eps for row in e.at)) for e in group}) > 1:
        raise ValueError(f"The evaluations on {name} used different radii, k or explanations: they need a page each.")
    first = group[0]
    clip = first.dataset.clip
    unit = f"in {first.dataset.unit}" if clip is None else f"inputs lie in [{clip[0]:g}, {clip[1]:g}]"
    curves = _picture(plot_curves(group)[0], f"Certified and attack-survived fractions against eps on {name}")
    samples = "\n".join(_sample(group, i) for i in range(min(len(e.samples) for e in group)))
    widths = "\n".join(_widths(evaluation) for evaluation in group)
    return f"""<section>
<h2>{escape(name)}</h2>
<p class="lead">{len(first.radius)} held-out samples, each one bounded and attacked. The explanation:
{escape(first.explained_as)}. The statement is that its {first.property.k} largest entries by magnitude stay the
{first.property.k} largest for <em>every</em> input within eps ({unit}).</p>
{_table(group)}
{_warning(group)}
<h3>Certified fraction against radius</h3>
<figure>{curves}<figcaption>Solid: guaranteed. Dashed: what an attack could not break, from one radius
that was tried (a dot) to the next. The truth lies between the two, in the shaded band; a narrow band means that the
certificate is tight.</figcaption></figure>
<h3>Explanations and their bounds at eps {first.at[0].eps:g}</h3>
<p>The first held-out samples, not chosen. {_LEGENDS[first.dataset.image_shape is not None]}</p>
{samples}
<h3>Where the bounds widen</h3>
<p>Plain bounds after each layer, for the first samples at eps {first.at[0].eps:g}: first forward, then
backward through the same layers. Numbered are the layers that widen most. Certificates use sharper bounds where these
do not suffice.</p>
{widths}
</section>"""


def _table(group: list[Evaluation]) -> str:
    first = group[0]
    radii = "".join(f'<th colspan="2" class="over">top {first.property.k} kept at {row.eps:g}</th>' for row in first.at)
    kinds = (_head("certified", "certified topk") + _head("survived", "survived topk")) * len(first.at)
    rows = "\n".join(_table_row(evaluation) for evaluation in group)
    return f"""<div class="scroll"><table>
<thead>
<tr><th rowspan="2">network</th>{_head("accuracy", "NA", 2)}{radii}
{_head("median<br>radius", "certified radius median", 2)}
{_head(f"unstable ReLUs<br>at {first.at[0].eps:g}", "unstable relus", 2)}
{_head("same-class<br>cosine", "same class cosine", 2)}</tr>
<tr>{kinds}</tr>
</thead>
<tbody>
{rows}
</tbody></table></div>"""


def _head(label: str, metric: str, rows: int = 1) -> str:
    return f'<th rowspan="{rows}" title="{escape(entry(metric).line)}">{label}</th>'


def _table_row(evaluation: Evaluation) -> str:
    cells = [f"<th scope='row'>{escape(evaluation.label)}<br><small>{evaluation.parameters:,} parameters</small></th>"]
    cells.append(f"<td>{evaluation.accuracy:.3f}</td>")
    for row in evaluation.at:
        cells.append(_bar(row.certified, "certified"))
        cells.append(_bar(row.survived, "survived"))
    median = evaluation.radius.median().item()
    cells.append(f"<td>{f'≥ {evaluation.max_eps:g}' if median >= evaluation.max_eps else rounded_down(median)}</td>")
    cells.append(f"<td>{'none' if evaluation.unstable is None else f'{evaluation.unstable:.1%}'}</td>")
    cells.append(f"<td>{'–' if math.isnan(evaluation.cosine) else f'{evaluation.cosine:.3f}'}</td>")
    return "<tr>" + "".join(cells) + "</tr>"


def _bar(fraction: float, kind: str) -> str:
    return f'<td class="bar {kind}" style="--share:{100 * fraction:.1f}%">{fraction:.3f}</td>'


def _warning(group: list[Evaluation]) -> str:
    """Name the networks that a linear model on the same data equals."""
    linear = [e for e in group if e.unstable is None]
    if not linear:
        return (
            '<p class="note">There is no linear model in this table. Add one before praising any row: what it reaches '
            "is worth little (see below).</p>"
        )
    best = max(e.accuracy for e in linear)
    collapsed = [e.label for e in group if e.unstable is not None and e.accuracy <= best]
    if not collapsed:
        return ""
    names = ", ".join(escape(label) for label in collapsed)
    return f'<p class="note">No more accurate than the linear model ({best:.3f}): the certificates of {names}.</p>'


def _sample(group: list[Evaluation], index: int) -> str:
    sample, names = group[0].samples[index], group[0].dataset.class_names
    wrong = [e.label for e in group if e.samples[index].predicted != e.samples[index].target]
    verdict = f"misclassified by {escape(', '.join(wrong))}" if wrong else "classified correctly by every network"
    picture = _picture(plot_samples(group, index)[0], f"Held-out sample {index}: explanations and bounds")
    return (
        f"<figure>{picture}<figcaption>Held-out sample {index}, labelled “{escape(names[sample.target])}”, {verdict}."
        "</figcaption></figure>"
    )


def _widths(evaluation: Evaluation) -> str:
    label = escape(evaluation.label)
    picture = _picture(plot_widths(evaluation.widths)[0], f"Relative width of the bounds after each layer of {label}")
    return f"<figure>{picture}<figcaption>{label}</figcaption></figure>"


def _picture(figure: Figure, alt: str) -> str:
    return f'<img alt="{escape(alt)}" src="{encode(figure)}">'


_LEGENDS = {
    True: "Blue is negative, red positive, white zero; the lower bound, the explanation and the upper bound of a row "
    "share one scale.",
    False: "A dot is what the explanation gives a feature at the sample, the bar what the bounds allow in the "
    "box. These are the features that matter most to the first network.",
}

_REMARKS = (
    ("Accuracy", "NA", ""),
    (
        "Certified", "certified topk",
        "Not an estimate: no input in the box can contradict it. Bounds are rounded outward, so that this holds for "
        "the function in real arithmetic.",
    ),
    (
        "Survived", "survived topk",
        "The true share lies between the two columns. A report in which certified exceeds survived is refused.",
    ),
    ("Median radius", "certified radius median", "A radius after ≥ is the largest that was tried."),
    (
        "Unstable ReLUs", "unstable relus",
        "Explanations can only move, and bounds only widen, where a ReLU is unstable.",
    ),
    ("Same-class cosine", "same class cosine", "1 means that all samples of a class share one explanation."),
)  # fmt: skip


def _term(label: str, metric: str, remark: str) -> str:
    known = entry(metric)
    text, details = escape(f"{known.definition}. {remark}"), escape(known.details)
    return f"<dt>{label}</dt><dd>{text}<br><small>{details}</small></dd>"


_TERMS = "\n".join(_term(*row) for row in _REMARKS)

_GUIDE = f"""<section>
<h2>How to read this page</h2>
<dl>
{_TERMS}
</dl>
<h3>Beware of the linear model</h3>
<p>The logit's gradient of a linear network is the same for every input. It is certified at every radius, and says
nothing about any particular input. A training method that quietly pushes a deep network towards a linear one therefore
looks brilliant on certificates alone. That is why the linear model stands in the table: a certified network is
interesting where it is <em>more accurate</em> than the linear one and its same-class cosine is clearly below 1.</p>
</section>"""

_STYLE = """
:root { color-scheme: light dark; --page:#fbfbfa; --ink:#22252a; --soft:#62676e; --line:#dcdedf; --good:#009e7333;
  --attack:#80828526; --note:#e69f0022; }
@media (prefers-color-scheme: dark) { :root { --page:#16181b; --ink:#e4e5e7; --soft:#9ba0a6; --line:#33373b;
  --good:#009e7355; --attack:#80828540; --note:#e69f0030; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.4rem; margin: 2.6rem 0 .5rem; border-top: 1px solid var(--line); padding-top: 1.4rem; }
h3 { font-size: 1.05rem; margin: 2rem 0 .4rem; }
p, dd, figcaption { max-width: 46rem; }
.lead, figcaption, small, dd { color: var(--soft); }
figure { margin: .8rem 0 2rem; overflow-x: auto; } figcaption { font-size: .88rem; margin-top: .3rem; }
img { display: block; max-width: 100%; min-width: 36rem; height: auto; width: 50rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; margin: 1rem 0; width: 100%; }
th, td { padding: .42rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
thead th { font-weight: 600; vertical-align: bottom; line-height: 1.3; }
thead tr + tr th { font-weight: 400; text-align: right; }
.over { text-align: center; border-bottom: 0; }
tr:first-child th:first-child, tbody th { text-align: left; }
tbody th { font-weight: 600; line-height: 1.3; } small { font-weight: 400; }
.bar { background-repeat: no-repeat; background-size: var(--share) 100%; min-width: 4.6rem; }
.certified { background-image: linear-gradient(var(--good), var(--good)); }
.survived { background-image: linear-gradient(var(--attack), var(--attack)); }
.note { background: var(--note); padding: .6rem .9rem; border-radius: .4rem; }
dt { font-weight: 600; margin-top: .7rem; } dd { margin: 0; }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
<h1>{title}</h1>
<p class="lead">An explanation says which features mattered. A certificate says how far the input may move before the
answer could change. Written by pyxai_bounds.</p>
{body}
{guide}
</main></body>
</html>
"""
