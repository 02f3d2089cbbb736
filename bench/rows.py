"""Rows of the committed tables: one schema for all, with what they were measured on."""

from __future__ import annotations

import csv
import functools
import importlib.metadata
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

COLUMNS = ["op", "shape", "backend", "p20", "p50", "p80", "peak_bytes", "device", "torch", "triton", "commit"]

Row = dict[str, Any]
_start = time.perf_counter()


def say(text: str) -> None:
    print(f"[{seconds():5.0f} s] {text}", file=sys.stderr, flush=True)


def seconds() -> float:
    """Since this module was imported."""
    return time.perf_counter() - _start


def row(op: str, shape: str, backend: str, spans: tuple[float, float, float], peak: int | str) -> Row:
    p20, p50, p80 = (f"{span:.6f}" for span in spans)
    values = [op, shape, backend, p20, p50, p80, peak, device(), torch.__version__, triton(), commit()]
    return dict(zip(COLUMNS, values, strict=True))


def write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    say(f"wrote {path}")


def append(path: Path, entry: Row) -> None:
    """One more row: what was measured is there, whatever comes next."""
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(entry), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(entry)


def read(path: Path) -> list[Row]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


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


@functools.cache
def commit() -> str:
    def git(*arguments: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, cwd=here).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (subprocess.SubprocessError, OSError):
        return "none"
