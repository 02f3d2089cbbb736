"""``python -m bench``: what bounding a gradient costs, and what it costs otherwise. Writes a CSV, prints a table."""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
from pathlib import Path

import torch

from bench import figures, fresh, measure
from bench.contenders import CONTENDERS, layouts
from bench.measure import Case, Contender
from bench.rows import COLUMNS, Row, commit, read, row, say, seconds, triton, write

__all__ = ["COLUMNS", "commit", "main", "row", "say", "triton"]

# Float32 against float64. The midpoint is 1e-6 of the radius on these nets: formed from the ends, it loses digits.
TOLERANCE = 2e-2
# Compiling takes about a minute a network and loop. Past this many seconds the rest is not compiled, and that is said.
COMPILE_UNTIL = 420

SLOWEST = 0.85  # of the committed speed beside an eager loop, below which --check fails
LOOPS = ("plain", "tuned")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute: engine, eager loops, floor; few repeats")
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu"), help="folder of the CSV")
    parser.add_argument(
        "--check", type=Path, metavar="CSV", help="measure quickly, compare with this table, and write nothing"
    )
    parser.add_argument("--from-csv", type=Path, metavar="CSV", help="print this table as Markdown, and its figures")
    options = parser.parse_args()
    if options.from_csv is not None:
        print(figures.markdown(measured := read(options.from_csv)))
        print(f"\n{figures.table(measured)}")
        return 0
    options.quick |= options.check is not None
    rows: list[Row] = []
    refused: list[str] = []
    for name, plan in measure.CASES.items():
        rows += run_case(measure.make_case(name, *plan), options.quick, refused)
    if options.check is not None:
        return check(rows, read(options.check), refused)
    if not options.quick:
        rows += first_calls(refused)
    write(options.out / ("quick.csv" if options.quick else "gradient_bounds.csv"), rows)
    print(table(rows))
    noisy = sum(float(entry["p80"]) > 1.5 * float(entry["p20"]) for entry in rows)
    if noisy:
        print(f"{noisy} of {len(rows)} rows have p80 > 1.5 p20: something else was running; measure again when idle")
    for line in refused:
        print(f"not timed: {line}")
    print(f"\n{figures.table(rows)}")
    return 1 if any("disagrees" in line for line in refused) else 0


def run_case(case: Case, quick: bool, refused: list[str]) -> list[Row]:
    """Build the contenders, compare their outputs, time those that agree; one row per operation and backend."""
    contenders: dict[tuple[str, str], Contender] = {}
    say(f"{case.name}: the tuned loop in float64")
    truth = measure.truth(case)
    if not quick:
        torch._dynamo.reset()  # the last case's compiled loops
    for backend, kind in CONTENDERS.items():
        if quick and not kind.quick:
            continue
        if kind.compiled and seconds() > COMPILE_UNTIL:
            refused.append(f"{case.name} {backend}: {COMPILE_UNTIL} s had passed")
            continue
        for layout in layouts(case, kind):
            problem = None
            try:
                say(f"{case.name}: {backend}, {layout}")
                one = kind.make(case, layout)
                if kind.exact:
                    errors = measure.disagreement(measure.outcome(case, one), truth)
                    say("    error " + "  ".join(f"{key} {value:.1e}" for key, value in errors.items()))
                    # Written so that a NaN disagrees.
                    if not max(errors.values()) <= TOLERANCE:
                        problem = f"disagrees with the float64 loop: {errors}"
            except ImportError as error:
                problem = f"not installed ({error}); bench/peers/__init__.py says how"
            except Exception as error:
                problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if problem is None:
                contenders[backend, layout] = one
            else:
                refused.append(f"{case.name} {backend} {layout}: {problem}")
    rows = []
    for op in ("certify", "train"):
        say(f"{case.name}: timing {op}")
        both = {key: one.bounds if op == "certify" else one.step for key, one in contenders.items()}
        steps = {key: step for key, step in both.items() if step is not None}
        gc.collect()
        times = measure.interleaved(steps, seconds=0.4 if quick else 1.5, rounds=5 if quick else 9)
        for backend in CONTENDERS:
            spans = {layout: measure.percentiles(t) for (name, layout), t in times.items() if name == backend}
            if not spans:
                continue
            layout = min(spans, key=lambda layout: spans[layout][1])
            peak = "" if op == "certify" or quick else peak_of(case, backend, layout)
            rows.append(
                row(op, case.name, f"{backend} {layout}" if len(case.layouts) > 1 else backend, spans[layout], peak)
            )
    return rows


def check(rows: list[Row], committed: list[Row], refused: list[str]) -> int:
    """Is the engine as fast as it was, beside the eager loops in the same run? Times of different runs say nothing.

    The faster fifth counts (p20): a busy machine makes the others slower, and not both alike.
    """
    before, now = speedups(committed), speedups(rows)
    slower = 0
    print(f"{'':14}{'':9}{'':8}{'committed':>10}{'now':>8}{'ratio':>8}   (loop / native)")
    for key, was in before.items():
        if key not in now:
            continue
        ratio = now[key] / was
        slower += ratio < SLOWEST
        head = f"{key[0]:14}{key[1]:9}{key[2]:8}"
        print(f"{head}{was:10.2f}{now[key]:8.2f}{ratio:8.2f}" + ("   too slow" * (ratio < SLOWEST)))
    for line in refused:
        print(f"not timed: {line}")
    missing = len(before.keys() - now.keys())
    if not before:
        print("The committed table has no row of the engine beside an eager loop: nothing was compared.")
    if slower or missing:
        print(
            f"{slower} below {SLOWEST} of what is committed, {missing} not measured. On an idle machine, measure again."
        )
    return 1 if slower or missing or not before else 0


def speedups(rows: list[Row]) -> dict[tuple[str, str, str], float]:
    """(network, operation, loop) → how many times as long that eager loop takes as the native backend."""
    found = {}
    for shape, op in dict.fromkeys((entry["shape"], entry["op"]) for entry in rows):
        for loop in LOOPS:
            value = figures.ratio(op, shape, loop, "native", "p20")(rows)
            if value is not None:
                found[shape, op, loop] = value
    return found


def peak_of(case: Case, backend: str, layout: str) -> int | str:
    # Compiling takes more memory than the step; the floor keeps nothing.
    if CONTENDERS[backend].compiled or not CONTENDERS[backend].exact:
        return ""
    say(f"{case.name}: peak memory of {backend}")
    try:
        return round(fresh.measured("peak", case.name, backend, layout))
    except (subprocess.SubprocessError, ValueError, OSError) as error:
        say(f"    none: {error}")
        return ""


def first_calls(refused: list[str]) -> list[Row]:
    rows = []
    for name in fresh.FIRST_CALLS:
        say(f"{name}: first call")
        try:
            times = [fresh.measured("first", name) for _ in range(3)]
        except (subprocess.SubprocessError, ValueError, OSError) as error:
            refused.append(f"{name} first call: {error}")
        else:
            rows.append(row("first call", name, "native", measure.percentiles(times), ""))
    return rows


def table(rows: list[Row]) -> str:
    """Milliseconds, the time relative to the native backend's, and the peak memory of the training step."""
    lines = [f"{'':14}{'':11}{'':28}{'p20':>9}{'p50':>9}{'p80':>9} ms {'/native':>8} {'/floor':>7}{'peak MB':>9}"]
    for entry in rows:
        ratios = []
        for base in ("native", "floor"):
            found = figures.ratio(entry["op"], entry["shape"], entry["backend"].split()[0], base)(rows)
            ratios.append("-" if found is None else f"{found:.2f}")
        spans = "".join(f"{1e3 * float(entry[key]):9.2f}" for key in ("p20", "p50", "p80"))
        peak = f"{entry['peak_bytes'] / 2**20:.0f}" if entry["peak_bytes"] != "" else "-"
        head = f"{entry['shape']:14}{entry['op']:11}{entry['backend']:28}"
        lines.append(f"{head}{spans}    {ratios[0]:>8} {ratios[1]:>7}{peak:>9}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
