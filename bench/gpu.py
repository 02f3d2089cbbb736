"""``python -m bench.gpu``: what certify and a certified training step cost on a GPU, and what they cost otherwise.

Contenders as on the CPU (the engine, the eager loop, its compiled form, the products alone), and an ordinary training
step. Most important first, and nothing new is begun past the time limit; what was left out is said. Writes the CSV
after every network, prints a short table last.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench import measure, models
from bench.measure import Case, Contender
from bench.rows import COLUMNS, commit, triton
from pyxai_bounds import ops

LAYOUT = "channels-last"
NETWORKS: dict[str, Callable[[], torch.nn.Sequential]] = {
    "cnn7": models.cnn7,
    "resnet18": models.resnet18,
    "wrn16-4": models.wrn16_4,
}
# Network, batch, pixels, precision, whether to compile the eager loop: about a minute each time.
PLAN = [
    ("cnn7", 512, 32, "bf16", True),
    ("cnn7", 512, 32, "tf32", False),
    ("resnet18", 256, 32, "bf16", False),
    ("wrn16-4", 256, 32, "bf16", False),
    ("cnn7", 16, 32, "bf16", False),
    ("cnn7", 1, 32, "bf16", False),
    ("cnn7", 128, 32, "bf16", False),
    ("cnn7", 1024, 32, "bf16", False),
    ("resnet18", 32, 32, "bf16", False),
    ("resnet18", 1024, 32, "bf16", False),
    ("wrn16-4", 32, 32, "bf16", False),
    ("resnet18", 16, 224, "bf16", False),
    ("cnn7", 512, 32, "fp32", False),
]
# Relative error in the 2-norm against the eager loop in float64. A ReLU whose bound is next to 0 changes its state,
# and in 16 bits many are: no kernel is tested here (tests/kernels does that), only that no contender is wild.
TOLERANCE = {"fp32": 2e-2, "tf32": 1e-1, "bf16": 5e-1}
COMPILE_SECONDS = 130

_start = time.perf_counter()


def say(text: str) -> None:
    print(f"[{time.perf_counter() - _start:5.0f} s] {text}", file=sys.stderr, flush=True)


def make_case(name: str, batch: int, pixels: int, precision: str) -> Case:
    model = NETWORKS[name]()
    generator = torch.Generator().manual_seed(1)
    x = torch.rand((batch, 3, pixels, pixels), generator=generator)
    target = torch.randint(10, (batch,), generator=generator)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = model.to(device="cuda", dtype=dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    size = f"{pixels}x{pixels} " if pixels != 32 else ""
    return Case(f"{name} {size}B{batch} {precision}", model, x.to("cuda", dtype), target.to("cuda"))


def set_precision(precision: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


def plain(case: Case) -> Contender:
    """The network's own forward pass, and an ordinary training step on it."""
    x = case.input(LAYOUT)

    def step() -> None:
        case.model.zero_grad(set_to_none=True)
        F.cross_entropy(case.model(x), case.target).backward()

    def forward() -> Any:
        with torch.no_grad():
            return case.model(x)

    return Contender(forward, step)


def launched(case: Case) -> Contender:
    """The engine's certify without a CUDA graph, which it records by itself at its second call."""
    one = measure.engine(case, LAYOUT, "auto")

    def bounds() -> Any:
        os.environ["PYXAI_BOUNDS_CUDA_GRAPHS"] = "0"
        try:
            return one.bounds()
        finally:
            del os.environ["PYXAI_BOUNDS_CUDA_GRAPHS"]

    return Contender(bounds, lambda: None)


def contenders(case: Case, compile: bool, refused: list[str]) -> Iterator[tuple[str, Contender]]:
    makers: dict[str, Callable[[], Contender]] = {
        "auto": lambda: measure.engine(case, LAYOUT, "auto"),
        "triton": lambda: measure.engine(case, LAYOUT, "triton"),
        "launched": lambda: launched(case),
        "eager": lambda: measure.eager(case, LAYOUT),
        "floor": lambda: measure.floor(case, LAYOUT),
        "plain": lambda: plain(case),
    }
    if compile:
        makers["compiled"] = lambda: measure.eager(case, LAYOUT, compiled=True)
    for name, make in makers.items():
        try:
            say(f"{case.name}: {name}")
            one = make()
            one.step()  # compiles, measures tile sizes
            for _ in range(2):  # the second call records
                one.bounds()
            torch.cuda.synchronize()
        except Exception as error:
            refused.append(f"{case.name} {name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}")
            torch.cuda.empty_cache()
        else:
            yield name, one


def seconds(step: Callable[[], Any], budget: float) -> list[float]:
    """Times of single calls by device events, at least 5 and at most 50."""
    torch.cuda.synchronize()
    begun = time.perf_counter()
    step()
    torch.cuda.synchronize()
    count = min(50, max(5, int(budget / (time.perf_counter() - begun))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in events:
        start.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def peak_bytes(step: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def errors_of(name: str, precision: str) -> dict[str, dict[str, float]]:
    """Relative errors of the engine and of the eager loop at batch 8, against the eager loop in float64."""
    case = make_case(name, 8, 32, precision)
    truth = measure.truth(case)
    makers = {
        "auto": lambda: measure.engine(case, LAYOUT, "auto"),
        "triton": lambda: measure.engine(case, LAYOUT, "triton"),
        "eager": lambda: measure.eager(case, LAYOUT),
    }
    errors = {key: measure.disagreement(measure.outcome(case, make()), truth) for key, make in makers.items()}
    # On networks with random weights midpoints are tiny beside radii: as part of the box they are judged.
    share = (truth["mid"][0].norm() / (truth["mid"][0].norm() + truth["rad"][0].norm())).item()
    return {key: {**found, "mid": found["mid"] * share} for key, found in errors.items()}


def run_case(case: Case, compile: bool, refused: list[str]) -> list[dict[str, Any]]:
    rows = []
    for name, one in contenders(case, compile, refused):
        for op, step in (("train", one.step), ("certify", one.bounds)):
            if name == "launched" and op == "train":
                continue
            times = seconds(step, budget=0.5)
            peak = peak_bytes(step)
            rows.append(row(op, case.name, name, measure.percentiles(times), peak))
    return rows


def layers(batch: int) -> list[dict[str, Any]]:
    """Each operator at the layers of cnn7, bf16: our kernel, and the library with fused stages about it."""
    rows = []
    tuning: Any = ops.triton._kernels("tuning")
    geometry = [(3, 64, 32, 1), (64, 64, 32, 1), (64, 128, 32, 2), (128, 128, 16, 1)]
    like: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    for channels, outputs, pixels, stride in geometry:
        args = ([stride] * 2, [1, 1], [1, 1], 1)
        x = torch.randn(batch, channels, pixels, pixels, **like).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(outputs, channels, 3, 3, **like).contiguous(memory_format=torch.channels_last)
        bias = torch.randn(outputs, **like)
        out, rad, state = ops.triton.interval_conv2d(x, x.abs(), weight, bias, *args, True)
        jobs = [
            ("interval_conv2d", (x, x.abs(), weight, bias, *args, True)),
            ("interval_conv2d_backward", (out, rad, weight, state, list(x.shape), *args)),
            ("interval_conv2d_weight", (out, rad, x, x.abs(), weight, *args)),
        ]
        for op, arguments in jobs:
            for contender, library in (("triton", False), ("library", True)):
                function = getattr(ops.triton, op)

                def run(op: Any = function, arguments: Any = arguments, library: bool = library) -> None:
                    op(*arguments, library=library)

                original = tuning.fastest
                if library:  # its candidates end with None: the library
                    tuning.fastest = lambda key, candidates, run: candidates[-1]
                try:
                    run()
                    spans = measure.percentiles(seconds(run, 0.1))
                finally:
                    tuning.fastest = original
                shape = f"{channels}-{outputs} {pixels}x{pixels} /{stride} B{batch} bf16"
                rows.append(row(op, shape, contender, spans, ""))
    return rows


def elementwise(batch: int) -> list[dict[str, Any]]:
    """The elementwise operators and the max-pool pair on 64 channels of 32 × 32, bf16: our kernel and plain PyTorch."""
    generator = torch.Generator("cuda").manual_seed(1)
    shape = (batch, 64, 32, 32)

    def box(*size: int) -> tuple[torch.Tensor, torch.Tensor]:
        mid = torch.randn(size, generator=generator, device="cuda", dtype=torch.bfloat16)
        mid = mid.contiguous(memory_format=torch.channels_last)
        return mid, mid.abs() * 0.1

    x, grad, back, pooled = box(*shape), box(*shape), box(*shape), box(batch, 64, 16, 16)
    geometry = ([2, 2], [2, 2], [0, 0], [1, 1])
    bits = ops.triton.interval_first_maximum(*x, [16, 16], *geometry)
    slope: tuple[Any, ...] = ("gelu_slope", ())
    jobs: list[tuple[str, tuple]] = [
        ("interval_mul", (*grad, *x)),
        ("interval_smooth", (*x, "gelu", ())),
        ("interval_smooth_adjoint", (*back, *x, "gelu", ())),
        ("interval_smooth_backward", (*grad, *x, *slope)),
        ("interval_smooth_backward_adjoint", (*back, *grad, *x, *slope)),
        ("interval_max_pool2d", (*x, *geometry, False)),
        ("interval_first_maximum", (*x, [16, 16], *geometry)),
        ("interval_max_pool2d_backward", (*pooled, *bits, [32, 32], *geometry)),
        ("interval_max_pool2d_gather", (*x, *pooled, *bits, *geometry)),
    ]
    rows = []
    for op, arguments in jobs:
        for contender, module in (("triton", ops.triton), ("reference", ops.reference)):
            function = getattr(module, op)
            function(*arguments)
            spans = measure.percentiles(seconds(lambda f=function, a=arguments: f(*a), 0.1))  # type: ignore[misc]
            rows.append(row(op, f"64 32x32 B{batch} bf16", contender, spans, ""))
    return rows


def row(op: str, shape: str, backend: str, spans: tuple[float, float, float], peak: int | str) -> dict[str, Any]:
    p20, p50, p80 = (f"{span:.6f}" for span in spans)
    made = os.environ.get("PYXAI_BOUNDS_COMMIT") or commit()
    values = [op, shape, backend, p20, p50, p80, peak, torch.cuda.get_device_name(), torch.__version__, triton(), made]
    return dict(zip(COLUMNS, values, strict=True))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds, as a multiple of the floor, of the eager loop and of the ordinary training step, and memory."""
    lines = [f"{'':22}{'':9}{'':11}{'p50 ms':>9}{'/floor':>8}{'/eager':>8}{'/plain':>8}{'peak MB':>9}"]
    for entry in rows:
        same = {o["backend"]: o for o in rows if (o["op"], o["shape"]) == (entry["op"], entry["shape"])}
        p50 = float(entry["p50"])
        ratios = "".join(
            f"{p50 / float(same[base]['p50']):8.2f}" if base in same else f"{'-':>8}"
            for base in ("floor", "eager", "plain")
        )
        peak = f"{entry['peak_bytes'] / 2**20:9.0f}" if entry["peak_bytes"] != "" else f"{'-':>9}"
        lines.append(f"{entry['shape']:22}{entry['op']:9}{entry['backend']:11}{1e3 * p50:9.3f}{ratios}{peak}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the CSV; bench/results/<gpu> by default")
    parser.add_argument("--seconds", type=float, default=300.0, help="begin nothing new past this time")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.gpu: no CUDA device; `python -m bench` measures on the CPU.", file=sys.stderr)
        return 2
    gpu = re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()).strip("-")
    out = options.out or Path("bench/results") / gpu
    rows: list[dict[str, Any]] = []
    refused: list[str] = []
    wild: list[str] = []
    for name, precision in (("cnn7", "bf16"), ("cnn7", "tf32"), ("resnet18", "fp32")):
        set_precision(precision)
        try:
            for key, errors in errors_of(name, precision).items():
                line = f"{name} {precision} {key}: " + "  ".join(f"{k} {v:.1e}" for k, v in errors.items())
                say("error " + line)
                if not max(errors.values()) <= TOLERANCE[precision]:  # so that a NaN is wild
                    wild.append(line)
        except Exception as error:
            wild.append(f"{name} {precision}: {type(error).__name__}: {error}")
    for name, batch, pixels, precision, compile in PLAN:
        left = options.seconds - (time.perf_counter() - _start)
        label = f"{name} {pixels}x{pixels} B{batch} {precision}"
        if left < 10:
            refused.append(f"{label}: the time was up")
            continue
        set_precision(precision)
        if compile and left < COMPILE_SECONDS:
            refused.append(f"{label} compiled: the time was up")
        try:
            rows += run_case(make_case(name, batch, pixels, precision), compile and left >= COMPILE_SECONDS, refused)
        except torch.cuda.OutOfMemoryError:
            refused.append(f"{label}: out of memory")
        torch.cuda.empty_cache()
        write(out / "gradient_bounds.csv", rows)
        if (name, batch) == ("cnn7", 512) and precision == "bf16":
            write(out / "operators.csv", operators := layers(512) + elementwise(256))
            say("operators\n" + table(operators))
    choices = ops.triton._kernels("tuning").choices()
    (out / "choices.txt").write_text("".join(f"{key}: {value}\n" for key, value in choices.items()))
    print(table(rows))
    for line in refused:
        print(f"not timed: {line}")
    for line in wild:
        print(f"WILD: {line}")
    return 1 if wild or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
