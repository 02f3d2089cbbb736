"""Pictures of evaluations. Every plot returns (Figure, Axes) and touches no global state of matplotlib."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from pyxai_bounds.report.evaluate import Evaluation, Sample, rounded_down
from pyxai_bounds.widths import Widths

INK = "#808285"  # legible on white and on near-black alike
COLOURS = ("#cc79a7", "#d55e00", "#0072b2", "#e69f00", "#009e73", "#56b4e9", "#8d6e63")  # after Okabe and Ito
CERTAIN, POSSIBLE = "#009e73", "#d55e00"


def plot_curves(evaluations: Sequence[Evaluation], axes: Axes | None = None) -> tuple[Figure, Axes]:
    """Certified fraction against eps (solid) and, beside it, the fraction that survived the attack (dashed).

    The truth lies in the band between the two. What survived at one radius holds up to the next that was tried, for a
    larger box breaks no fewer. All evaluations must share k; the axis ends at the largest max_eps.
    """
    figure, axes = _axes(axes, (8.4, 4.3))
    for number, evaluation in enumerate(evaluations):
        colour = COLOURS[number % len(COLOURS)]
        radius = evaluation.radius.double().cpu().numpy()
        eps = np.linspace(0, evaluation.max_eps, 201)
        certified = (radius[None] >= eps[:, None]).mean(1)
        certified[0] = (radius > 0).mean()
        radii = np.array([0.0, *(row.eps for row in evaluation.curve)])
        survived = np.array([1.0, *(row.survived for row in evaluation.curve)])
        above = survived[np.searchsorted(radii, eps, side="right") - 1]
        axes.fill_between(eps, certified, above, color=colour, alpha=0.09, linewidth=0)
        axes.plot(eps, certified, color=colour, linewidth=2.2, label=evaluation.label)
        axes.plot(
            radii, survived, color=colour, linewidth=1.3, linestyle=(0, (3, 2)), marker="o", markersize=3.5,
            drawstyle="steps-post",
        )  # fmt: skip
    axes.set_xlim(0, max(e.max_eps for e in evaluations))
    axes.set_ylim(-0.02, 1.04)
    axes.set_xlabel("radius eps of the box around each input")
    axes.set_ylabel(f"top-{evaluations[0].property.k} features unchanged,\nfraction of samples")
    handles, labels = axes.get_legend_handles_labels()
    styles = [
        Line2D([], [], color=INK, linewidth=2.2),
        Line2D([], [], color=INK, linewidth=1.3, linestyle=(0, (3, 2)), marker="o", markersize=3.5),
    ]
    axes.legend(
        [*handles, *styles], [*labels, "certified (guaranteed)", "survived the attack"],
        loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, labelcolor=INK, fontsize=9, borderaxespad=0,
    )  # fmt: skip
    _neutral(axes)
    return figure, axes


def plot_samples(evaluations: Sequence[Evaluation], index: int) -> tuple[Figure, Any]:
    """One held-out sample as every network explains it: a row for each, Axes [rows, columns].

    Images: the input, the lower bound, the explanation and the upper bound in one colour scale per row, and which of
    the top-k features are certain. Tables: the bounds of the most important features as bars, one column.
    """
    if evaluations[0].dataset.image_shape is None:
        return _plot_tables(evaluations, index)
    figure = _figure((7.2, 1.24 * len(evaluations) + 0.55))
    return figure, _draw_images(figure, figure.get_figheight(), evaluations, index)


def plot_overview(evaluations: Sequence[Evaluation], index: int = 0) -> tuple[Figure, Any]:
    """One sample's explanations and bounds on the left, the curves on the right: the picture of the README."""
    height = 1.24 * len(evaluations) + 0.55
    figure = _figure((14.6, height))
    left, right = figure.subfigures(1, 2, width_ratios=(7.2, 7.4), squeeze=False)[0]
    _draw_images(left, height, evaluations, index)
    axes = right.subplots()
    right.subplots_adjust(left=0.14, right=0.74, top=1 - 0.28 / height, bottom=0.6 / height)
    plot_curves(evaluations, axes)
    return figure, figure.axes


def _draw_images(figure: Figure | SubFigure, height: float, evaluations: Sequence[Evaluation], index: int) -> Any:
    grid = figure.subplots(len(evaluations), 5, squeeze=False)
    for row, evaluation in zip(grid, evaluations, strict=True):
        _image_row(row, evaluation, evaluation.samples[index])
    k = evaluations[0].property.k
    for axes, title in zip(grid[0], ("input", "lower bound", "explanation", "upper bound", f"top {k}"), strict=True):
        axes.set_title(title, color=INK, fontsize=9)
    certain = Patch(facecolor=CERTAIN, label="certain everywhere in the box")
    possible = Patch(facecolor="none", edgecolor=POSSIBLE, linewidth=1.6, label=f"top {k} at the input, not certain")
    figure.legend(
        handles=[certain, possible], loc="lower right", ncols=2, frameon=False, labelcolor=INK, fontsize=8,
        borderaxespad=0,
    )  # fmt: skip
    figure.subplots_adjust(
        left=0.175, right=0.995, top=1 - 0.28 / height, bottom=0.32 / height, hspace=0.08, wspace=0.08
    )
    return grid


def _image_row(row: Sequence[Axes], evaluation: Evaluation, sample: Sample) -> None:
    low, high = evaluation.dataset.clip or (None, None)
    row[0].imshow(_image(sample.x), cmap="gray_r", vmin=low, vmax=high)
    scale = max(sample.lower.abs().max().item(), sample.upper.abs().max().item()) or 1.0
    for axes, values in zip(row[1:4], (sample.lower, sample.attribution, sample.upper), strict=True):
        axes.imshow(_image(values), cmap="RdBu_r", vmin=-scale, vmax=scale)
    faded = sample.x.max() if high is None else high
    row[4].imshow(_image(sample.x), cmap="gray_r", vmin=low, vmax=4 * float(faded))
    height, width = _image(sample.x).shape
    for feature in range(height * width):
        y, x = divmod(feature, width)
        if sample.certain[feature]:
            row[4].add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, color=CERTAIN, linewidth=0))
        elif sample.top[feature]:
            inset = Rectangle((x - 0.38, y - 0.38), 0.76, 0.76, fill=False, edgecolor=POSSIBLE, linewidth=1.6)
            row[4].add_patch(inset)
    for axes in row:
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color(INK)
            spine.set_linewidth(0.6)
    verdict = f"certified up to\neps {rounded_down(sample.radius)}" if sample.radius > 0 else "no certificate"
    if sample.radius >= evaluation.max_eps:
        verdict = f"certified beyond\neps {evaluation.max_eps:g}"
    row[0].set_ylabel(
        f"{evaluation.label}\n{verdict}", color=INK, fontsize=8.5, rotation=0, ha="right", va="center", labelpad=8
    )


def _image(values: Tensor) -> np.ndarray:
    """[C, H, W] → [H, W]: one channel as it is, several as their mean."""
    return values.mean(0).detach().cpu().numpy()


def _plot_tables(evaluations: Sequence[Evaluation], index: int, shown: int = 10) -> tuple[Figure, Any]:
    """Interval bars for the features that the first network ranks highest, the same ones for all networks."""
    samples = [evaluation.samples[index] for evaluation in evaluations]
    order = samples[0].attribution.abs().argsort(descending=True)[:shown].flip(0)
    names = [evaluations[0].dataset.feature_names[i] for i in order.tolist()]
    figure = _figure((2.6 + 2.6 * len(evaluations), 0.32 * len(order) + 1.2))
    grid = figure.subplots(1, len(evaluations), squeeze=False, sharey=True)[0]
    positions = range(len(order))
    for axes, evaluation, sample in zip(grid, evaluations, samples, strict=True):
        low, mid, high = (v[order].tolist() for v in (sample.lower, sample.attribution, sample.upper))
        colours = [CERTAIN if sample.certain[i] else POSSIBLE if sample.top[i] else INK for i in order.tolist()]
        axes.axvline(0, color=INK, linewidth=0.6)
        axes.hlines(positions, low, high, colors=colours, linewidth=5, alpha=0.45)
        axes.scatter(mid, positions, color=colours, s=16, zorder=3)
        axes.set_yticks(list(positions), names)
        axes.set_title(f"{evaluation.label}, certified to {rounded_down(sample.radius)}", color=INK, fontsize=9)
        _neutral(axes)
    legend = [
        Patch(facecolor=colour, label=label)
        for colour, label in (
            (CERTAIN, "certain in the top k"),
            (POSSIBLE, "in the top k, not certain"),
            (INK, "others"),
        )
    ]
    figure.legend(handles=legend, loc="lower center", ncols=3, frameon=False, labelcolor=INK, fontsize=8)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    return figure, grid


def plot_widths(widths: Widths, axes: Axes | None = None) -> tuple[Figure, Axes]:
    """The relative width of the bounds after each layer, in the order of the program, on a logarithmic axis.

    Numbered are the layers that widen most; bars show which share of a ReLU's or another kinked operator's entries is
    unstable. What has no finite bounds, or midpoints of 0 alone, is marked at the upper edge; width 0 is left out.
    """
    figure, axes = _axes(axes, (11.4, 3.7))
    rows = widths.layers
    finite = [row.width for row in rows if 0 < row.width < math.inf] or [1.0]
    room = max(max(finite) / min(finite), 10.0) ** 0.2  # below the curve for bars, above it for numbers
    axes.set_yscale("log")
    axes.set_ylim(min(finite) / room, max(finite) * room)
    axes.set_xlim(-0.5, max(len(rows), 2) - 0.5)
    places = range(len(rows))
    shares = [0.13 * (row.unstable or 0) for row in rows]
    axes.bar(places, shares, color=INK, alpha=0.45, width=0.8, transform=axes.get_xaxis_transform(), linewidth=0)
    for backward, name in ((False, "forward pass"), (True, "backward pass")):
        colour = COLOURS[1] if backward else COLOURS[2]
        side = [place for place in places if rows[place].backward is backward]
        if not side:
            continue
        shown = [rows[place].width if 0 < rows[place].width < math.inf else math.nan for place in side]
        axes.axvspan(min(side) - 0.5, max(side) + 0.5, color=colour, alpha=0.05, linewidth=0)
        axes.plot(side, shown, color=colour, linewidth=1.8, marker="o", markersize=3, label=name)
    for unbounded, marker, label in ((True, "x", "no finite bounds"), (False, "2", "all midpoints 0")):
        lost = [p for p in places if math.isinf(rows[p].width) and (rows[p].unbounded > 0) is unbounded]
        if lost:
            axes.scatter(
                lost, [0.965] * len(lost), marker=marker, color=POSSIBLE, s=20, linewidths=1.2, label=label,
                transform=axes.get_xaxis_transform(),
            )  # fmt: skip
    handles, _ = axes.get_legend_handles_labels()
    handles.append(Patch(facecolor=INK, alpha=0.45, label="unstable share (bars)"))
    for number, row in enumerate(widths.worst(5), 1):
        place = rows.index(row)
        spot = (place, max(finite) * room**0.5 if math.isinf(row.width) else row.width)
        axes.annotate(
            str(number), spot, (0, 9), textcoords="offset points", ha="center", va="center", fontsize=8, color="white",
            bbox={"boxstyle": "circle,pad=0.2", "facecolor": INK, "edgecolor": "none"},
        )  # fmt: skip
        growth = "no finite bounds" if row.unbounded else f"× {row.growth:.3g}"
        label = f"{_shortened(row.layer)}\n{row.operator}, {growth}"
        handles.append(Line2D([], [], linestyle="none", marker=f"${number}$", color=INK, markersize=6, label=label))
    axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, labelcolor=INK, fontsize=8.5,
        borderaxespad=0, labelspacing=0.55,
    )  # fmt: skip
    ticks = _parts_of([row.layer for row in rows])
    axes.set_xticks(list(ticks), [_shortened(name, 20) for name in ticks.values()], rotation=40, ha="right")
    axes.set_ylabel("width of the bounds,\nmean radius / mean |midpoint|")
    figure.set_layout_engine("constrained")  # it makes room for names of any length
    _neutral(axes)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(False, axis="x")
    return figure, axes


def _parts_of(layers: Sequence[str], most: int = 26) -> dict[int, str]:
    """Where a part of the model begins, and its name: parts as small as leave at most so many."""
    found: dict[int, str] = {}
    for depth in range(1, 9):
        names = [".".join(layer.split(".")[:depth]) if ": " not in layer else "" for layer in layers]
        starts = {i: name for i, name in enumerate(names) if name and (i == 0 or names[i - 1] != name)}
        if found and len(starts) > most:
            break
        found = starts
    apart, last = {}, -math.inf
    for place, name in found.items():
        if place - last >= len(layers) / 40:
            apart[place], last = name, place
    return apart


def _shortened(name: str, most: int = 40) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"


def encode(figure: Figure, dpi: int = 170) -> str:
    """The figure as a PNG data URI with a transparent background, to stand inside a page."""
    content = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(content, format="png", dpi=dpi, transparent=True, bbox_inches="tight", pad_inches=0.05)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode("ascii")


def _figure(size: tuple[float, float]) -> Figure:
    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)
    return figure


def _axes(axes: Axes | None, size: tuple[float, float]) -> tuple[Figure, Axes]:
    if axes is not None:
        figure = axes.get_figure(root=True)
        assert figure is not None
        return figure, axes
    figure = _figure(size)
    return figure, figure.subplots()


def _neutral(axes: Axes) -> None:
    """Ink that suits a light and a dark page, no box, a faint grid."""
    axes.set_facecolor("none")
    axes.tick_params(colors=INK, labelsize=9)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.grid(True, color=INK, alpha=0.18, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
