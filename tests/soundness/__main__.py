"""The long run: ``python -m tests.soundness --networks 1000 --components 1000000 --out rules.csv``.

Networks at radius 0 and at every eps, then every rule; prints how many components were checked and how many lay
outside, of the sound bounds and of the ones that are rounded to nearest. Exits with 1 if a sound bound was violated.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
import time
from collections import Counter

import torch

import pyxai_bounds as xb
from tests.soundness.networks import subject
from tests.soundness.programs import outside

EPSILONS = (0.0, 1e-6, 1e-4, 1e-2)


WEIGHTS = 8  # networks of one architecture: redrawing weights is cheaper than capturing


def networks(count: int, seed: int, epsilons: tuple[float, ...] = EPSILONS, points: int = 3) -> dict[float, Counter]:
    """Violations over random networks, per eps. At radius 0 every network is checked, at others every fourth."""
    found = {eps: Counter() for eps in epsilons}
    for i in range(count):
        if i % WEIGHTS == 0:
            subj = subject(random.Random(seed + i).choice, batch=16)
        else:
            subj.redraw(seed + i)
        for eps, counts in found.items():
            if eps and i % 4:
                continue
            box = xb.Interval.linf(subj.x, eps)
            sound = xb.bound(subj.fn, sound=True)(box, subj.target).detach()
            nearest = xb.bound(subj.fn)(box, subj.target).detach()
            counts["networks"] += 1
            counts["not finite"] += int((~sound.isfinite() & nearest.isfinite()).sum())
            for x in subj.points(box, points, i):
                value = subj.value(x)
                bad = outside(sound, value)
                if bad.any():
                    print(
                        f"network {seed}+{i}, eps {eps}: {int(bad.sum())} of {bad.numel()} components outside",
                        flush=True,
                    )
                counts["components"] += value.numel()
                counts["sound"] += int(bad.sum())
                counts["nearest"] += int(outside(nearest, value).sum())
        if i % 100 == 99:
            print(f"{i + 1}: { ({eps: dict(c) for eps, c in found.items()}) }", file=sys.stderr, flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soundness", description=__doc__)
    parser.add_argument("--networks", type=int, default=1000, help="how many random networks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rules", type=int, default=0, help="components to check per rule and eps; 0 leaves them out")
    parser.add_argument("--out", default="", help="a CSV file for the table of rules")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.time()
    violations = 0
    if options.networks:
        print("eps,networks,components,violations_sound,violations_nearest,not_finite")
        for eps, c in networks(options.networks, options.seed).items():
            violations += c["sound"]
            print(f"{eps},{c['networks']},{c['components']},{c['sound']},{c['nearest']},{c['not finite']}")
    if options.rules:
        from tests.soundness.rules import COLUMNS, table

        rows = table(options.rules, EPSILONS[1:], options.seed)
        violations += sum(int(row["violations_sound"]) for row in rows)
        with open(options.out, "w", newline="") if options.out else sys.stdout as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    print(f"{time.time() - started:.0f} s")
    return 1 if violations else 0


if __name__ == "__main__":
    raise SystemExit(main())
