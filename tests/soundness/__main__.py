"""The long run: ``python -m tests.soundness --networks 1200 --rules 1000000 --out rules.csv``, about half an hour.

Networks at radius 0 and at every eps, in real arithmetic and as float32 evaluates them, then every rule; prints how
many components were checked and how many lay outside, of the sound bounds and of the ones that are rounded to
nearest. Exits with 1 if a sound bound was violated.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

import pyxai_bounds as xb
from pyxai_bounds.program import captured_graph
from tests.soundness.evaluations import Evaluation
from tests.soundness.networks import Subject, subject
from tests.soundness.programs import outside

EPSILONS = (0.0, 1e-6, 1e-4, 1e-2)
EVALUATIONS = 3  # of each network in float32: sums in another order, in chunks of another length, other algebra
WEIGHTS = 8  # networks of one architecture: redrawing weights is cheaper than capturing


def networks(count: int, seed: int, epsilons: tuple[float, ...] = EPSILONS, points: int = 3) -> dict[float, Counter]:
    """Violations over random networks, per eps. At radius 0 every network is checked, at others every fourth."""
    found = {eps: Counter() for eps in epsilons}
    for i, subj in _subjects(count, seed):
        for eps, counts in found.items():
            if eps and i % 4:
                continue
            box = xb.Interval.linf(subj.x, eps)
            sound = xb.bound(subj.fn, sound=True)(box, subj.target).detach()
            nearest = xb.bound(subj.fn)(box, subj.target).detach()
            _tally(
                counts,
                sound,
                nearest,
                (subj.value(x) for x in subj.points(box, points, i)),
                f"network {seed}+{i}, {eps}",
            )
    return found


def evaluations(count: int, seed: int, eps: float = 1e-6) -> dict[float, Counter]:
    """The same of ``semantics="float32"``, against float32 evaluations in permuted and chunked orders of summation.

    At radius 0 every network, else every fourth.
    """
    found = {0.0: Counter(), eps: Counter()}
    graph: Any = None
    for i, subj in _subjects(count, seed):
        if i % WEIGHTS == 0:
            graph = captured_graph(subj.fn, subj.x, subj.target).graph  # its parameters are the model's own
        for eps, counts in found.items():
            if eps and i % 4:
                continue
            box = xb.Interval.linf(subj.x, eps)
            sound = xb.bound(subj.fn, sound=True, semantics="float32")(box, subj.target).detach()
            nearest = xb.bound(subj.fn)(box, subj.target).detach()
            values = []
            for j, x in enumerate(subj.points(box, EVALUATIONS - 1 if eps else 0, i, attack=False)):
                x = x.float().clamp(box.lower, box.upper)  # as a float32 number, one of the box
                for k in range(1 if eps else EVALUATIONS):
                    run = Evaluation(graph, i + j + k, chunk=3 + 2 * (j + k))
                    values.append(run.run(x, subj.target, enable_io_processing=False)[0].detach())
            _tally(counts, sound, nearest, values, f"float32 evaluations of network {seed}+{i}, {eps}")
    return found


def _subjects(count: int, seed: int) -> Iterator[tuple[int, Subject]]:
    for i in range(count):
        if i % WEIGHTS == 0:
            subj = subject(random.Random(seed + i).choice, batch=16)
        else:
            subj.redraw(seed + i)
        yield i, subj
        if i % 100 == 99:
            print(f"{i + 1} of {count} networks", file=sys.stderr, flush=True)


def _tally(counts: Counter, sound: xb.Interval, nearest: xb.Interval, values: Iterable[Tensor], where: str) -> None:
    counts["networks"] += 1
    counts["not finite"] += int((~sound.isfinite() & nearest.isfinite()).sum())
    for value in values:
        bad = outside(sound, value)
        if bad.any():
            print(f"{where}: {int(bad.sum())} of {bad.numel()} components outside", flush=True)
        counts["components"] += value.numel()
        counts["sound"] += int(bad.sum())
        counts["nearest"] += int(outside(nearest, value).sum())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soundness", description=__doc__)
    parser.add_argument("--networks", type=int, default=1000, help="how many random networks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rules", type=int, default=0, help="components to check per rule and eps; 0 leaves them out")
    parser.add_argument("--out", default="", help="a CSV file for the table of rules")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("torch").setLevel(logging.CRITICAL)  # cases that cannot be made larger say so at length
    torch._C._debug_only_display_vmap_fallback_warnings(False)
    started = time.time()
    violations = 0
    if options.networks:
        for run in (networks, evaluations):
            print(f"{run.__name__}: eps,networks,components,violations_sound,violations_nearest,not_finite")
            for eps, c in run(options.networks, options.seed).items():
                violations += c["sound"]
                print(
                    f"{eps},{c['networks']},{c['components']},{c['sound']},{c['nearest']},{c['not finite']}", flush=True
                )
    if options.rules:
        from tests.soundness.rules import COLUMNS, table

        with open(options.out, "w", newline="") if options.out else contextlib.nullcontext(sys.stdout) as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            for row in table(options.rules, EPSILONS[1:], options.seed):
                violations += int(row["violations_sound"])
                writer.writerow(row)
                file.flush()
    print(f"{time.time() - started:.0f} s")
    return 1 if violations else 0


if __name__ == "__main__":
    raise SystemExit(main())
