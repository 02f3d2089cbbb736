"""``python -m bench.ops.interval_matmul``: the exact product of two interval matrices, and what it costs otherwise.

Every contender but Rump's product, which is wider, is compared with the others before it is timed. Times are of one
process, the contenders by turns; peak memory is the growth of the resident set in a process of its own.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.fresh import growth
from bench.measure import interleaved, percentiles
from bench.rows import row, say, write
from pyxai_bounds import ops
from pyxai_bounds.ops import reference

Box = tuple[Tensor, Tensor, Tensor, Tensor]
SIZES = [256, 512, 1024, 2048]
KINDS = ["straddling", "ReLU outputs", "point b"]
# The broadcast form holds several tensors of n³ elements: 2 GiB and more at 512, 16 at 1024.
BROADCAST_UP_TO = 512


def make(n: int, kind: str, dtype: torch.dtype) -> Box:
    """Two n×n boxes. Straddling: every entry of both; ReLU outputs: a ≥ 0, a third of it 0; point b: no radius."""
    generator = torch.Generator().manual_seed(0)
    a_mid, b_mid = (torch.rand(n, n, generator=generator, dtype=dtype) * 2 - 1 for _ in range(2))
    a_rad, b_rad = (1 + torch.rand(n, n, generator=generator, dtype=dtype) for _ in range(2))
    if kind == "ReLU outputs":
        a_mid = a_rad = (a_mid + 0.33).relu() / 2
    if kind == "point b":
        b_rad = torch.zeros_like(b_rad)
    return a_mid, a_rad, b_mid, b_rad


def gemm(a_mid: Tensor, a_rad: Tensor, b_mid: Tensor, b_rad: Tensor) -> Tensor:
    return a_mid @ b_mid


def broadcast(a_mid: Tensor, a_rad: Tensor, b_mid: Tensor, b_rad: Tensor) -> tuple[Tensor, Tensor]:
    """The four products of all m·k·n pairs, as few of them at once as the formula allows."""
    a_lower, a_upper = (a_mid - a_rad)[:, :, None], (a_mid + a_rad)[:, :, None]
    b_lower, b_upper = (b_mid - b_rad)[None], (b_mid + b_rad)[None]
    lower = a_lower * b_lower
    upper = lower.clone()
    for x, y in ((a_lower, b_upper), (a_upper, b_lower), (a_upper, b_upper)):
        product = x * y
        torch.minimum(lower, product, out=lower)
        torch.maximum(upper, product, out=upper)
    least, greatest = lower.sum(1), upper.sum(1)
    return (least + greatest) / 2, (greatest - least) / 2


def k_loop(a_mid: Tensor, a_rad: Tensor, b_mid: Tensor, b_rad: Tensor) -> tuple[Tensor, Tensor]:
    """One term of the sums at a time, in buffers that are allocated once."""
    a_lower, a_upper, b_lower, b_upper = a_mid - a_rad, a_mid + a_rad, b_mid - b_rad, b_mid + b_rad
    least = a_mid.new_zeros(a_mid.shape[0], b_mid.shape[1])
    greatest, lower, upper, product = (torch.zeros_like(least) for _ in range(4))
    for k in range(a_mid.shape[1]):
        torch.mul(a_lower[:, k, None], b_lower[k], out=lower)
        upper.copy_(lower)
        for x, y in ((a_lower, b_upper), (a_upper, b_lower), (a_upper, b_upper)):
            torch.mul(x[:, k, None], y[k], out=product)
            torch.minimum(lower, product, out=lower)
            torch.maximum(upper, product, out=upper)
        least += lower
        greatest += upper
    return (least + greatest) / 2, (greatest - least) / 2


def exact(*box: Tensor) -> tuple[Tensor, Tensor]:
    return ops.interval_matmul(*box, True)


def rump(*box: Tensor) -> tuple[Tensor, Tensor]:
    return ops.interval_matmul(*box, False)


def four_gemms(*box: Tensor) -> tuple[Tensor, Tensor]:
    """The exact product by matrix products, where one factor straddles 0 nowhere."""
    out = reference.matmul_of_definite(*box)
    assert out is not None
    return out


CONTENDERS: dict[str, Callable] = {
    "gemm": gemm,
    "exact": exact,
    "rump": rump,
    "exact by four gemms": four_gemms,
    "broadcast": broadcast,
    "k-loop": k_loop,
}


def backward(name: str, box: Box) -> Callable[[], Any]:
    """Forward and the gradients of all four arguments."""
    leaves = [t.clone().requires_grad_() for t in box]
    weights = torch.ones_like(box[0] @ box[2])

    def step() -> Any:
        return torch.autograd.grad(CONTENDERS[name](*leaves), leaves, (weights, weights))

    return step


def run(n: int, kind: str, dtype: torch.dtype, rows: list[dict[str, Any]], quick: bool) -> None:
    box = make(n, kind, dtype)
    label = f"{n} {str(dtype).removeprefix('torch.')} {kind}"
    names = ["gemm", "exact", "rump"]
    if kind != "straddling":
        names.append("exact by four gemms")
    if kind == "straddling" and dtype is torch.float32:  # what neither of these costs depends on the values
        names += ["k-loop", "broadcast"] if n <= BROADCAST_UP_TO else ["k-loop"]
    say(f"{label}: {', '.join(names)}")
    expected = exact(*box)
    scale = ((box[0].abs() + box[1]) @ (box[2].abs() + box[3])).max()
    tolerance = 2 * (2 * n + 2) * torch.finfo(dtype).eps / 2 * scale
    for name in names:
        # At 2048 the K-loop takes half a minute, and has been compared at the smaller sizes.
        if name not in ("gemm", "rump") and (name, n) != ("k-loop", 2048):
            error = max((x - y).abs().max() for x, y in zip(CONTENDERS[name](*box), expected, strict=True))
            if not error <= tolerance:
                raise SystemExit(f"{label}: {name} disagrees by {error}")
    steps = {name: functools.partial(CONTENDERS[name], *box) for name in names}
    times = interleaved(steps, seconds=0.2 if quick else 1.0, rounds=2 if n == 2048 else 5)
    base = statistics.median(times["gemm"])
    for name in names:
        peak: int | str = "" if quick else peak_of(name, kind, n, dtype)
        rows.append(row("interval_matmul", label, name, percentiles(times[name]), peak))
        megabytes = f"{int(peak) / 2**20:.0f} MiB" if peak != "" else "-"
        print(f"{label:28} {name:22} {statistics.median(times[name]) / base:9.2f} gemm  {megabytes}", flush=True)
    steps = {name: backward(name, box) for name in ("exact", "rump")}
    times = interleaved(
        {"gemm": functools.partial(gemm, *box), **steps}, seconds=0.2 if quick else 1.0, rounds=2 if n == 2048 else 5
    )
    for name in steps:
        rows.append(row("interval_matmul and gradients", label, name, percentiles(times[name]), ""))
        ratio = statistics.median(times[name]) / statistics.median(times["gemm"])
        print(f"{label:28} {name + ', gradients':22} {ratio:9.2f} gemm", flush=True)


def peak_of(name: str, kind: str, n: int, dtype: torch.dtype) -> int:
    command = [sys.executable, "-m", "bench.ops.interval_matmul", "--peak", name, kind, str(n), str(dtype)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return int(result.stdout.split()[-1])


def own_peak(name: str, kind: str, n: int, dtype: torch.dtype) -> int:
    """Growth of the resident set over one product, results included, after a small one loaded what stays loaded."""
    CONTENDERS[name](*make(64, kind, dtype))
    box = make(n, kind, dtype)
    return growth(functools.partial(CONTENDERS[name], *box), calls=1)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ops.interval_matmul", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="sizes up to 512, no memory, few repeats")
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu/interval_matmul.csv"), help="the CSV")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        name, kind, n, dtype = options.peak
        print(own_peak(name, kind, int(n), getattr(torch, dtype.removeprefix("torch."))))
        return 0
    rows: list[dict[str, Any]] = []
    for n in SIZES[:2] if options.quick else SIZES:
        for kind in KINDS:
            run(n, kind, torch.float32, rows, options.quick)
    run(512 if options.quick else 1024, "straddling", torch.float64, rows, options.quick)
    write(options.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
