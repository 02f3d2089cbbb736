"""The figures that the engine is held to on the CPU, and what a run of ``python -m bench`` says of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.rows import Row

Value = Callable[[list[Row]], float | None]


@dataclass(frozen=True)
class Figure:
    """``at_least``: whether the value must reach ``wanted`` or must not exceed it."""

    name: str
    value: Value
    wanted: float
    at_least: bool = True
    unit: str = "×"

    def line(self, rows: list[Row]) -> str:
        value = self.value(rows)
        reached = "not measured"
        if value is not None:
            met = value >= self.wanted if self.at_least else value <= self.wanted
            reached = f"{value:.2f} {self.unit}{'' if met else '   MISSED'}"
        return f"{self.name:62}{'≥' if self.at_least else '≤'} {self.wanted:<6g}{reached}"


def find(rows: list[Row], op: str, shape: str, backend: str, column: str = "p50") -> float | None:
    for entry in rows:
        if (entry["op"], entry["shape"], entry["backend"].split()[0]) == (op, shape, backend):
            return float(entry[column]) if entry[column] != "" else None
    return None


def ratio(op: str, shape: str, above: str, below: str, column: str = "p50") -> Value:
    def value(rows: list[Row]) -> float | None:
        a, b = (find(rows, op, shape, backend, column) for backend in (above, below))
        return a / b if a is not None and b else None

    return value


def first_call(shape: str) -> Value:
    return lambda rows: find(rows, "first call", shape, "native")


FIGURES = [
    Figure("certify n4 B32: eager loop / engine", ratio("certify", "n4 B32", "plain", "native"), 1.8),
    Figure(
        "certify n4 B32: eager loop compiled / engine", ratio("certify", "n4 B32", "plain-compiled", "native"), 1.25
    ),
    Figure("certify n4 B32: engine / GEMM floor", ratio("certify", "n4 B32", "native", "floor"), 1.2, at_least=False),
    Figure("train n4 B32: eager loop / engine", ratio("train", "n4 B32", "plain", "native"), 1.8),
    Figure("train n4 B32: eager loop compiled / engine", ratio("train", "n4 B32", "plain-compiled", "native"), 1.15),
    Figure(
        "train n4 B32, peak memory: engine / eager loop",
        ratio("train", "n4 B32", "native", "plain", "peak_bytes"), 0.5, at_least=False,
    ),
    Figure("certify mlp B1: auto_LiRPA / engine", ratio("certify", "mlp B1", "auto_lirpa", "native"), 12),
    Figure("certify mlp B1: eager loop / engine", ratio("certify", "mlp B1", "plain", "native"), 2),
    Figure("certify n4 B1: auto_LiRPA / engine", ratio("certify", "n4 B1", "auto_lirpa", "native"), 8),
    Figure("first call, capture included, n4 B32", first_call("n4 B32"), 2, at_least=False, unit="s"),
    Figure("first call, capture included, resnet18 B1", first_call("resnet18 B1"), 6, at_least=False, unit="s"),
]  # fmt: skip


def table(rows: list[Row]) -> str:
    return "\n".join([f"{'figure':62}{'wanted':8}reached", *(figure.line(rows) for figure in FIGURES)])


def markdown(rows: list[Row]) -> str:
    """Milliseconds (p50) by network and contender for each operation, and MiB of the training step."""
    parts = []
    for op, column, unit in (("certify", "p50", 1e3), ("train", "p50", 1e3), ("train", "peak_bytes", 2**-20)):
        some = [entry for entry in rows if entry["op"] == op and entry[column] != ""]
        if not some:
            continue
        backends = list(dict.fromkeys(entry["backend"].split()[0] for entry in some))
        lines = [f"{op}, {'MiB' if column == 'peak_bytes' else 'ms'} | " + " | ".join(backends)]
        lines.append("---|" * len(backends) + "---")
        for shape in dict.fromkeys(entry["shape"] for entry in some):
            values = [find(some, op, shape, backend, column) for backend in backends]
            cells = ["–" if value is None else f"{unit * value:.3g}" for value in values]
            lines.append(" | ".join([shape, *cells]))
        parts.append("\n".join(f"| {line} |" for line in lines))
    return "\n\n".join(parts)
