"""``python -m bench.curves``: how time and peak memory grow with the batch, the width, the depth and the image.

The engine, the plain eager loop and the GEMM floor by turns in one process; memory in a process for each curve. Writes
a CSV and two pictures, and prints exponents: of the power law through the upper half of each curve, where the constant
cost of a call no longer counts, and the steepest between neighbours there, in which a step would show.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bench import fresh, measure, models
from bench.contenders import CONTENDERS
from bench.measure import Case, Contender
from bench.rows import Row, read, row, say, write

BACKENDS = ("native", "plain", "floor")
OPS = ("certify", "train")
TOLERANCE = 1e-2  # of the engine against the plain loop, both in float32, in the 2-norm
TIME = "p20"  # the faster fifth: a busy machine makes the others slower
STEEP = 1.2  # the exponent between neighbours that is pointed out where cost should be proportional


@dataclass(frozen=True)
class Axis:
    """``network(value)`` bounds ``batch(value)`` images of ``pixels(value)``²; ``amount`` is what is counted."""

    label: str
    values: tuple[int, ...]
    network: Callable[[int], nn.Sequential]
    batch: Callable[[int], int]
    pixels: Callable[[int], int] = lambda value: 32
    amount: Callable[[int], float] = float
    linear: bool = False  # cost should be proportional to the amount


AXES = {
    "batch": Axis(
        "batch (n4)",
        (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
        lambda value: models.n4(),
        batch=lambda value: value,
        linear=True,
    ),
    "width": Axis("width, times n4 (batch 4)", (1, 2, 4, 8), models.n4, batch=lambda value: 4),
    "depth": Axis(
        "layers (residual, 16×16, batch 8)",
        (4, 6, 10, 18, 34),
        models.chain,
        batch=lambda value: 8,
        pixels=lambda value: 16,
        amount=lambda value: (value - 2) / 2,  # equal blocks; the stem and the last layer cost little
        linear=True,
    ),
    "size": Axis(
        "pixels a side (n4, batch 8)",
        (8, 16, 32, 64),
        lambda value: models.n4(pixels=value),
        batch=lambda value: 8,
        pixels=lambda value: value,
    ),
}


def make_case(axis: str, value: int) -> Case:
    plan = AXES[axis]
    shape = (3, plan.pixels(value), plan.pixels(value))
    return measure.make_case(f"{axis} {value}", functools.partial(plan.network, value), plan.batch(value), shape)


def build(case: Case, backend: str) -> Contender:
    """In the memory order that suits it: channels-last but for the plain loop."""
    kind = CONTENDERS[backend]
    return kind.make(case, kind.layouts[-1])


def steps(one: Contender) -> dict[str, measure.Step]:
    assert one.step is not None
    return {"certify": one.bounds, "train": one.step}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.curves", description=__doc__)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--quick", action="store_true", help="the lower half of each curve, without memory")
    parser.add_argument("--from-csv", type=Path, metavar="CSV", help="draw and fit what was measured before")
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu"), help="folder of curves.csv")
    parser.add_argument("--pictures", type=Path, default=Path("docs"), help="folder of the pictures")
    parser.add_argument("--peaks", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peaks:
        axis, backend, *values = options.peaks
        for op, value, peak in own_peaks(axis, backend, [int(value) for value in values]):
            print(op, value, peak, flush=True)
        return 0
    if options.from_csv:
        rows = read(options.from_csv)
    else:
        rows = []
        for axis in options.axes:
            values = AXES[axis].values
            rows += measure_axis(axis, values[: len(values) // 2 + 1] if options.quick else values, not options.quick)
        write(options.out / "curves.csv", rows)
    print(exponents(rows))
    draw(rows, options.pictures)
    return 0


def measure_axis(axis: str, values: tuple[int, ...], memory: bool) -> list[Row]:
    rows = []
    peaks = {backend: peaks_of(axis, backend, values) for backend in BACKENDS[:2]} if memory else {}
    for value in values:
        case = make_case(axis, value)
        say(case.name)
        contenders = {backend: build(case, backend) for backend in BACKENDS}
        agree(case, contenders)
        gc.collect()
        for op in OPS:
            times = measure.interleaved({b: steps(one)[op] for b, one in contenders.items()}, seconds=0.4, rounds=3)
            for backend in BACKENDS:
                peak = peaks.get(backend, {}).get((op, value), "")
                rows.append(row(op, case.name, backend, measure.percentiles(times[backend]), peak))
    return rows


def agree(case: Case, contenders: dict[str, Contender]) -> None:
    """Raises SystemExit unless the engine and the plain loop return the same, gradients included."""
    ours, theirs = (measure.outcome(case, contenders[backend]) for backend in ("native", "plain"))
    # The midpoint is far smaller than the radius, and formed from the ends loses digits: compared as an end is.
    for one in (ours, theirs):
        one["lower"] = [one.pop("mid")[0] - one["rad"][0]]
    errors = measure.disagreement(ours, theirs)
    if not max(errors.values()) <= TOLERANCE:
        raise SystemExit(f"{case.name}: the engine and the plain loop disagree: {errors}")


def peaks_of(axis: str, backend: str, values: tuple[int, ...]) -> dict[tuple[str, int], int]:
    say(f"{axis}: peak memory of {backend}")
    command = [sys.executable, "-m", "bench.curves", "--peaks", axis, backend, *map(str, values)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    lines = [line.split() for line in result.stdout.splitlines()]
    return {(op, int(value)): int(peak) for op, value, peak in lines}


def own_peaks(axis: str, backend: str, values: list[int]) -> Iterator[tuple[str, int, int]]:
    """Growth over calls at each value, smallest first; what any first call loads and keeps lies in the baseline."""
    for step in steps(build(make_case(axis, values[0]), backend)).values():
        step()
    for value in values:
        for op in OPS:
            gc.collect()
            yield op, value, fresh.growth(steps(build(make_case(axis, value), backend))[op])


Curve = dict[int, float]


def curve(rows: list[Row], axis: str, op: str, backend: str, column: str) -> Curve:
    found = {}
    for entry in rows:
        name, value = entry["shape"].split()
        if (name, entry["op"], entry["backend"]) == (axis, op, backend) and entry[column] != "":
            found[int(value)] = float(entry[column])
    return found


def exponents(rows: list[Row]) -> str:
    lines = [f"{'':8}{'':9}{'':8}{'time':>8}{'steepest':>10}{'memory':>9}{'steepest':>10}   (exponents, upper half)"]
    for axis, op, backend in itertools.product(AXES, OPS, BACKENDS):
        fits = [fit(AXES[axis], curve(rows, axis, op, backend, column)) for column in (TIME, "peak_bytes")]
        if fits[0] is None:
            continue
        cells = ["       -         -" if one is None else f"{one[0]:8.2f}{one[1]:10.2f}" for one in fits]
        steep = AXES[axis].linear and any(one is not None and one[1] > STEEP for one in fits)
        lines.append(f"{axis:8}{op:9}{backend:8}{cells[0]} {cells[1]}" + "   steep" * steep)
    return "\n".join(lines)


def fit(axis: Axis, points: Curve) -> tuple[float, float] | None:
    """(exponent of the power law through the upper half, steepest between neighbours there); None of fewer than two."""
    upper = sorted(points.items())[len(points) // 2 - (len(points) < 4) :] if len(points) > 1 else []
    if len(upper) < 2:
        return None
    sizes, costs = [axis.amount(value) for value, _ in upper], [max(cost, 1e-9) for _, cost in upper]
    pairs = zip(itertools.pairwise(sizes), itertools.pairwise(costs), strict=True)
    return measure.exponent(sizes, costs), max(measure.exponent(list(x), list(y)) for x, y in pairs)


STYLE: dict[str, dict[str, Any]] = {
    "native": {"color": "#1b6ca8", "marker": "o", "label": "engine"},
    "plain": {"color": "#c8553d", "marker": "s", "label": "eager loop"},
    "floor": {"color": "#555555", "linestyle": "--", "label": "GEMM floor"},
}


def draw(rows: list[Row], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    axes = [axis for axis in AXES if any(entry["shape"].split()[0] == axis for entry in rows)]
    for column, unit, scale, name in ((TIME, "milliseconds", 1e3, "time"), ("peak_bytes", "MiB", 2**-20, "memory")):
        if not any(entry[column] != "" for entry in rows):
            continue
        figure, panels = pyplot.subplots(2, len(axes), figsize=(3.4 * len(axes), 6), squeeze=False, sharey="row")
        for (op, line), (axis, panel) in itertools.product(
            zip(OPS, panels, strict=True), zip(axes, itertools.count(), strict=False)
        ):
            place = line[panel]
            for backend, style in STYLE.items():
                points = curve(rows, axis, op, backend, column)
                if points:
                    place.plot(points.keys(), [scale * cost for cost in points.values()], markersize=4, **style)
            place.set(xscale="log", yscale="log", xlabel=AXES[axis].label if op == OPS[-1] else "")
            place.set_xticks(AXES[axis].values, [str(value) for value in AXES[axis].values], fontsize=7)
            place.minorticks_off()
            place.grid(alpha=0.3)
        for op, line in zip(OPS, panels, strict=True):
            line[0].set_ylabel(f"{op}, {unit}")
        panels[0][0].legend(frameon=False)
        figure.tight_layout()
        figure.savefig(folder / f"curves-{name}.png", dpi=110)
        pyplot.close(figure)
        say(f"wrote {folder / f'curves-{name}.png'}")


if __name__ == "__main__":
    sys.exit(main())
