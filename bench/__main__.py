"""``python -m bench``: what bounding a gradient costs, and what it costs otherwise. Writes a CSV, prints a table."""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench import measure
from bench.measure import Case, Contender

COLUMNS = ["op", "shape", "backend", "p20", "p50", "p80", "peak_bytes", "device", "torch", "triton", "commit"]
BACKENDS = ["native", "reference", "eager", "compiled", "floor"]
# Float32 against float64. The midpoint is 1e-6 of the radius on these nets: formed from the ends, it loses digits.
TOLERANCE = 2e-2
# Compiling takes about a minute a network. Past this many seconds the rest is not compiled, and that is said.
COMPILE_UNTIL = 240

SLOWEST = 0.85  # of the committed speed beside the eager loop, below which --check fails

_start = time.perf_counter()


def say(text: str) -> None:
    print(f"[{time.perf_counter() - _start:5.0f} s] {text}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute: no torch.compile, no memory, few repeats")
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu"), help="folder of the CSV")
    parser.add_argument(
        "--check", type=Path, metavar="CSV", help="measure quickly, compare with this table, and write nothing"
    )
    options = parser.parse_args()
    options.quick |= options.check is not None
    rows: list[dict[str, Any]] = []
    refused: list[str] = []
    for name in measure.CASES:
        rows += run_case(measure.make_case(name), options.quick, refused)
    if options.check is not None:
        return check(rows, options.check, refused)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / ("quick.csv" if options.quick else "gradient_bounds.csv")
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    say(f"wrote {path}")
    print(table(rows))
    noisy = sum(float(entry["p80"]) > 1.5 * float(entry["p20"]) for entry in rows)
    if noisy:
        print(f"{noisy} of {len(rows)} rows have p80 > 1.5 p20: something else was running; measure again when idle")
    for line in refused:
        print(f"not timed: {line}")
    return 1 if any("disagrees" in line for line in refused) else 0


def run_case(case: Case, quick: bool, refused: list[str]) -> list[dict[str, Any]]:
    """Build the contenders, compare their outputs, time those that agree; one row per operation and backend."""
    contenders: dict[tuple[str, str], Contender] = {}
    say(f"{case.name}: the eager loop in float64")
    truth = measure.truth(case)
    for backend in BACKENDS:
        for layout in case.layouts:
            if backend == "compiled":
                # A minute each: only in the layout that suits the loop it compiles.
                if quick or layout != case.layouts[-1]:
                    continue
                if time.perf_counter() - _start > COMPILE_UNTIL:
                    refused.append(f"{case.name} compiled: {COMPILE_UNTIL} s had passed")
                    continue
            problem = None
            try:
                say(f"{case.name}: {backend}, {layout}")
                one = measure.contender(case, backend, layout)
                if backend != "floor":
                    errors = measure.disagreement(measure.outcome(case, one), truth)
                    say("    error " + "  ".join(f"{key} {value:.1e}" for key, value in errors.items()))
                    # Written so that a NaN disagrees.
                    if not max(errors.values()) <= TOLERANCE:
                        problem = f"disagrees with the float64 eager loop: {errors}"
            except Exception as error:
                problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if problem is None:
                contenders[backend, layout] = one
            else:
                refused.append(f"{case.name} {backend} {layout}: {problem}")
    rows = []
    for op in ("certify", "train"):
        say(f"{case.name}: timing {op}")
        steps = {key: one.bounds if op == "certify" else one.step for key, one in contenders.items()}
        times = measure.interleaved(steps, seconds=0.2 if quick else 1.5, rounds=3 if quick else 9)
        for backend in BACKENDS:
            spans = {layout: measure.percentiles(t) for (name, layout), t in times.items() if name == backend}
            if not spans:
                continue
            layout = min(spans, key=lambda layout: spans[layout][1])
            peak = "" if op == "certify" or quick else peak_of(case, backend, layout)
            rows.append(
                row(op, case.name, f"{backend} {layout}" if len(case.layouts) > 1 else backend, spans[layout], peak)
            )
    return rows


def check(rows: list[dict[str, Any]], committed: Path, refused: list[str]) -> int:
    """Is the engine as fast as it was, beside the eager loop in the same run? Times of different runs say nothing.

    The faster fifth counts (p20): a busy machine makes the others slower, and not both alike.
    """
    with open(committed, newline="") as file:
        before = speedups(list(csv.DictReader(file)))
    now = speedups(rows)
    slower = 0
    print(f"{'':14}{'':9}{'committed':>10}{'now':>8}{'ratio':>8}   (eager / native)")
    for key, was in before.items():
        if key not in now:
            continue
        ratio = now[key] / was
        slower += ratio < SLOWEST
        print(f"{key[0]:14}{key[1]:9}{was:10.2f}{now[key]:8.2f}{ratio:8.2f}" + ("   too slow" * (ratio < SLOWEST)))
    for line in refused:
        print(f"not timed: {line}")
    missing = len(before.keys() - now.keys())
    if slower or missing:
        print(
            f"{slower} below {SLOWEST} of what is committed, {missing} not measured. On an idle machine, measure again."
        )
    return 1 if slower or missing else 0


def speedups(rows: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """(network, operation) → how many times as long the eager loop takes as the native backend."""
    fastest: dict[tuple[str, str, str], float] = {}
    for entry in rows:
        key = (entry["shape"], entry["op"], entry["backend"].split()[0])
        fastest[key] = min(float(entry["p20"]), fastest.get(key, float("inf")))
    both = [key for key in fastest if key[2] == "native" and (*key[:2], "eager") in fastest]
    return {key[:2]: fastest[*key[:2], "eager"] / fastest[key] for key in both}


def peak_of(case: Case, backend: str, layout: str) -> int | str:
    if backend in ("compiled", "floor"):  # compiling takes more memory than the step; the floor keeps nothing
        return ""
    say(f"{case.name}: peak memory of {backend}")
    try:
        return measure.peak_bytes(case.name, backend, layout)
    except (subprocess.SubprocessError, ValueError, OSError) as error:
        say(f"    none: {error}")
        return ""


def row(op: str, shape: str, backend: str, spans: tuple[float, float, float], peak: int | str) -> dict[str, Any]:
    p20, p50, p80 = (f"{span:.6f}" for span in spans)
    values = [op, shape, backend, p20, p50, p80, peak, device(), torch.__version__, triton(), commit()]
    return dict(zip(COLUMNS, values, strict=True))


def device() -> str:
    """The processor's name, where Linux tells it, and the number of threads that PyTorch uses."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    return f"{name} ({torch.get_num_threads()} threads)"


def triton() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def commit() -> str:
    def git(*arguments: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, cwd=here).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (subprocess.SubprocessError, OSError):
        return "none"


def table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds, the time relative to the native backend's, and the peak memory of the training step."""
    lines = [f"{'':14}{'':9}{'':26}{'p20':>9}{'p50':>9}{'p80':>9} ms {'/native':>8} {'/floor':>7}{'peak MB':>9}"]
    for entry in rows:
        same = [other for other in rows if (other["op"], other["shape"]) == (entry["op"], entry["shape"])]
        ratios = []
        for base in ("native", "floor"):
            found = [float(other["p50"]) for other in same if other["backend"].split()[0] == base]
            ratios.append(f"{float(entry['p50']) / found[0]:.2f}" if found else "-")
        spans = "".join(f"{1e3 * float(entry[key]):9.2f}" for key in ("p20", "p50", "p80"))
        peak = f"{entry['peak_bytes'] / 2**20:.0f}" if entry["peak_bytes"] != "" else "-"
        head = f"{entry['shape']:14}{entry['op']:9}{entry['backend']:26}"
        lines.append(f"{head}{spans}    {ratios[0]:>8} {ratios[1]:>7}{peak:>9}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
