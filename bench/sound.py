"""What outward rounding costs: ``python -m bench.sound [--out FILE]``, about a minute on two cores.

Width: bounds of float32 numbers, rounded outward, against bounds of the same numbers in float64. Time: certifying a
gradient with ``sound=True`` against ``sound=False``, interleaved in one process on one thread. It is processor time,
which a busy machine disturbs less than the clock; the least of the repeats counts.
"""

from __future__ import annotations

import argparse
import copy
import csv
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pyxai_bounds as xb
from bench.models import n4, residual

BATCH = 32
REPEATS = 25


def wide_mlp() -> nn.Sequential:
    """4096-64-10: long sums, which an unknown order of summation makes expensive."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4096, 64), nn.ReLU(), nn.Linear(64, 10)).eval()


NETWORKS = {"n4": (n4, (3, 32, 32)), "mlp-4096-64-10": (wide_mlp, (4096,)), "residual": (residual, (3, 32, 32))}


def inflation(of: Any, exact: Any, box: xb.Interval, target: Any) -> float:
    """Mean width of the sound float32 bounds over that of float64 bounds, minus 1."""
    wide = xb.Interval.of(box.mid.double(), box.rad.double())
    arguments = () if target is None else (target,)
    sound = xb.bound(of, sound=True)(box, *arguments).width.double().mean()
    return (sound / xb.bound(exact)(wide, *arguments).width.mean() - 1).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu/sound.csv"))
    out = parser.parse_args().out
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name, (make, shape) in NETWORKS.items():
        model = make()
        exact, fn = copy.deepcopy(model).double(), xb.explain.gradient(model)
        x, target = torch.rand(BATCH, *shape), torch.arange(BATCH) % 10
        row: dict[str, Any] = {"network": name}
        with torch.no_grad():
            for eps in (1e-3, 1e-4):
                box = xb.Interval.linf(x, eps)
                row[f"logit_inflation@{eps:g}"] = inflation(model, exact, box, None)
                row[f"gradient_inflation@{eps:g}"] = inflation(fn, xb.explain.gradient(exact), box, target)
            times: dict[bool, list[float]] = {False: [], True: []}
            bounds = {sound: xb.bound(fn, sound=sound) for sound in times}
            for _ in range(REPEATS):
                for sound, taken in times.items():
                    start = time.process_time()
                    bounds[sound](xb.Interval.linf(x, 1e-3), target)
                    taken.append(time.process_time() - start)
        row["nearest_ms"], row["outward_ms"] = (1e3 * min(times[sound]) for sound in (False, True))
        row["ratio"] = row["outward_ms"] / row["nearest_ms"]
        rows.append(row)
        print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else v for k, v in row.items()), file=sys.stderr)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


if __name__ == "__main__":
    main()
