"""``python -m bench.gpu``: what certify and a certified training step cost on a GPU, and what they cost otherwise.

Contenders as on the CPU (the engine, the eager loop, its compiled form, the products alone), these recorded as CUDA
graphs, an ordinary training step, and the two ways to a sound bound. Most important first, and nothing new is begun
past the time limit. Each job is written down when it ends. A process of its own does them: where one kills it (a CUDA
error is the end of its context), hangs or takes too long, another goes on with the next. What was left out is said; a
table is printed last.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F

from bench import measure, models
from bench import rows as tables
from bench.measure import Case, Contender
from bench.rows import Row, say
from pyxai_bounds import ops

LAYOUT = "channels-last"
NETWORKS: dict[str, Callable[[], torch.nn.Sequential]] = {
    "cnn7": models.cnn7,
    "resnet18": models.resnet18,
    "wrn16-4": models.wrn16_4,
    **{f"depth{depth}": functools.partial(models.chain, depth, 64) for depth in (4, 10, 18, 34)},
}
MOST = ("auto", "engine-graphed", "eager", "floor", "plain")
GRAPHED = ("engine-compiled-graphed", "compiled-graphed", "eager-graphed")
STEPS = (
    "engine-compiled-graphed-concurrent", "engine-graphed-model-concurrent", "engine-graphed-concurrent",
    "engine-compiled-graphed-2", "engine-graphed-2", "engine-graphed-model", "engine-compiled-graphed-1",
)  # fmt: skip
REST = ("launched", "triton", "engine-compiled", "checkpointed")
# Network, batch, pixels, precision, and what is done with it.
PLAN: list[tuple[str, int, int, str, tuple[str, ...]]] = [
    ("cnn7", 512, 32, "bf16", (*MOST, "compiled", *GRAPHED, *STEPS, "errors")),
    ("cnn7", 128, 32, "fp32", ("sound", "sound-reference")),
    ("resnet18", 256, 32, "bf16", MOST),
    ("wrn16-4", 256, 32, "bf16", MOST),
    *(("cnn7", batch, 32, "bf16", MOST) for batch in (1, 16, 128, 1024)),
    *((f"depth{depth}", 128, 32, "bf16", MOST) for depth in (4, 10, 18, 34)),
    ("cnn7", 512, 32, "tf32", (*MOST, "errors")),
    ("cnn7", 512, 32, "bf16", REST),
    ("cnn7", 512, 32, "bf16", ("operators",)),
    ("resnet18", 32, 32, "bf16", MOST),
    ("resnet18", 1024, 32, "bf16", MOST),
    ("wrn16-4", 32, 32, "bf16", MOST),
    ("resnet18", 16, 224, "bf16", MOST),
    ("resnet18", 8, 32, "fp32", ("errors",)),
    ("cnn7", 512, 32, "fp32", MOST),
    *(("cnn7", batch, 32, "bf16", ("compiled",)) for batch in (1, 16, 128, 1024)),
    ("resnet18", 256, 32, "bf16", ("compiled",)),
    ("wrn16-4", 256, 32, "bf16", ("compiled",)),
    ("resnet18", 32, 32, "bf16", ("compiled",)),
    ("resnet18", 1024, 32, "bf16", ("compiled",)),
    ("wrn16-4", 32, 32, "bf16", ("compiled",)),
    ("resnet18", 16, 224, "bf16", ("compiled",)),
]
# Relative error in the 2-norm against the eager loop in float64. A ReLU whose bound is next to 0 changes its state,
# and in 16 bits many are: no kernel is tested here (tests/kernels does that), only that no contender is wild.
TOLERANCE = {"fp32": 2e-2, "tf32": 1e-1, "bf16": 5e-1}
# Seconds for one job: these wait for a compiler.
LIMITS = dict.fromkeys(("errors", "compiled", "engine-compiled", *GRAPHED, *STEPS), 120.0)
LIMIT = 80.0
LEAST = 10.0  # no job is begun with less
GRACE = 15.0  # after a job's limit, until its process is ended
WILD = "WILD"


class Job(NamedTuple):
    network: str
    batch: int
    pixels: int
    precision: str
    what: str  # "errors", "operators", or a contender

    @property
    def case(self) -> str:
        size = f"{self.pixels}x{self.pixels} " if self.pixels != 32 else ""
        return f"{self.network} {size}B{self.batch} {self.precision}"

    def __str__(self) -> str:
        return f"{self.case} {self.what}"


JOBS = [Job(*case, what) for *case, whats in PLAN for what in whats]
# What compilers do before anything is timed, and in how many parts: of the first cases, or tests would wait for it.
AHEAD = [
    *(
        Job(network, batch, 32, "bf16", "auto")
        for network, batch in (("cnn7", 512), ("resnet18", 256), ("wrn16-4", 256))
    ),
    *(
        Job("cnn7", 512, 32, "bf16", what)
        for what in ("compiled", "engine-compiled", *STEPS)
        if what != "engine-graphed-2" and not what.endswith("-concurrent")  # what others compile is all they need
    ),
]
PARTS = [(job, part) for job in AHEAD for part in range(2 if job.what == "auto" else 1)]


@functools.lru_cache(maxsize=1)
def make_case(network: str, batch: int, pixels: int, precision: str) -> Case:
    model = NETWORKS[network]()
    generator = torch.Generator().manual_seed(1)
    x = torch.rand((batch, 3, pixels, pixels), generator=generator)
    target = torch.randint(10, (batch,), generator=generator)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = model.to(device="cuda", dtype=dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    name = Job(network, batch, pixels, precision, "").case
    return Case(name, model, x.to("cuda", dtype), target.to("cuda"))


def set_precision(precision: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


# --- contenders ----------------------------------------------------------------------------------------------


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


def launching() -> Any:
    """Without the CUDA graphs that the engine records by itself at a program's second call."""
    return mock.patch.dict(os.environ, {"PYXAI_BOUNDS_CUDA_GRAPHS": "0"})


def launched(case: Case) -> Contender:
    one = measure.engine(case, LAYOUT, "auto")

    def run(step: Callable[[], Any]) -> Any:
        with launching():
            return step()

    assert one.bounds is not None and one.step is not None
    return Contender(functools.partial(run, one.bounds), functools.partial(run, one.step))


def sound(case: Case, backend: str) -> Contender:
    """Certify with outward rounding: by the kernels in CUDA C++, or by PyTorch's products in float64."""
    import pyxai_bounds as xb

    x = case.input(LAYOUT)
    bound = xb.bound(xb.explain.gradient(case.model), sound=True)

    def bounds() -> Any:
        with torch.no_grad(), xb.backend(backend):
            return bound(xb.Interval.linf(x, measure.EPS), case.target)

    return Contender(bounds, None)


# Training steps of the engine as CUDA graphs; where there is no certify here, it is that of auto.
RECORDED: dict[str, Callable[..., Contender]] = {
    "engine-graphed": lambda case, **how: replace(
        measure.engine(case, LAYOUT, "auto", graphed=True, **how), bounds=None
    ),
    "engine-graphed-model": lambda case, **how: replace(
        measure.engine(case, LAYOUT, "auto", graphed=True, compiled=True, **how), bounds=None
    ),
    "engine-compiled-graphed": lambda case, **how: measure.compiled_engine(case, LAYOUT, graphed=True, **how),
}


def term_by_term(case: Case, name: str, **how: Any) -> Contender:
    return replace(RECORDED[name](case, **how), bounds=None)


CONTENDERS: dict[str, Callable[[Case], Contender]] = {
    "auto": lambda case: measure.engine(case, LAYOUT, "auto"),
    "triton": lambda case: measure.engine(case, LAYOUT, "triton"),
    "launched": launched,
    "engine-compiled": lambda case: measure.compiled_engine(case, LAYOUT),
    **RECORDED,
    # The batch in so many pieces, each differentiated term by term; in one: term by term alone.
    **{f"{name}-{k}": functools.partial(term_by_term, name=name, pieces=k) for name in RECORDED for k in (1, 2, 4)},
    **{
        f"{name}-concurrent": functools.partial(term_by_term, name=name, pieces=1, concurrent=True) for name in RECORDED
    },
    "checkpointed": lambda case: replace(measure.engine(case, LAYOUT, "auto", checkpoint=True), bounds=None),
    "eager": lambda case: measure.eager(case, LAYOUT),
    "eager-graphed": lambda case: measure.eager(case, LAYOUT, graphed=True),
    "compiled": lambda case: measure.eager(case, LAYOUT, compiled=True),
    "compiled-graphed": lambda case: measure.eager(case, LAYOUT, compiled=True, graphed=True),
    "floor": lambda case: measure.floor(case, LAYOUT),
    "plain": plain,
    "sound": lambda case: sound(case, "auto"),
    "sound-reference": lambda case: sound(case, "reference"),
}


# --- measuring -----------------------------------------------------------------------------------------------


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
    """Without a CUDA graph, also of contenders that run as one, which in this way report what the step itself takes.

    What a recording holds was allocated when it was made, and a replay allocates nothing.
    """
    with launching():
        step()
        return allocated(step)


def allocated(step: Callable[[], Any]) -> int:
    """The most memory that a call holds beyond what there was before it."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def timed(job: Job) -> Iterator[Row]:
    """Certify, then a training step: what goes wrong in the second leaves the first."""
    case = make_case(*job[:4])
    one = CONTENDERS[job.what](case)
    for op, step in (("certify", one.bounds), ("train", one.step)):
        if step is None:
            continue
        for _ in range(2):  # compiles, and measures tile sizes; the second or third call records
            step()
        recorded = allocated(step)
        times = seconds(step, budget=0.5)
        # Terms run side by side only in a recording, and only there hold their memory together.
        peak = recorded if job.what.endswith("-concurrent") else peak_bytes(step)
        yield row(op, case.name, job.what, measure.percentiles(times), peak)
        case.model.zero_grad(set_to_none=True)


def errors(job: Job) -> Iterator[str]:
    """Relative errors of the engine and of the eager loop at batch 8, against the eager loop in float64."""
    case = make_case(job.network, 8, 32, job.precision)
    truth = measure.truth(case)
    # On networks with random weights midpoints are tiny beside radii: as part of the box they are judged.
    share = (truth["mid"][0].norm() / (truth["mid"][0].norm() + truth["rad"][0].norm())).item()
    for name in ("auto", "triton", "eager"):
        found = measure.disagreement(measure.outcome(case, CONTENDERS[name](case)), truth)
        found["mid"] *= share
        verdict = "error" if max(found.values()) <= TOLERANCE[job.precision] else WILD  # so that a NaN is wild
        yield f"{verdict} {job.network} {job.precision} {name}: " + "  ".join(f"{k} {v:.1e}" for k, v in found.items())


def layers(batch: int) -> Iterator[Row]:
    """Each operator at the layers of cnn7, bf16: our kernel, and the library with fused stages about it."""
    tuning: Any = ops.triton._kernels("tuning")
    geometry = [(3, 64, 32, 1), (64, 64, 32, 1), (64, 128, 32, 2), (128, 128, 16, 1)]
    like: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    for channels, outputs, pixels, stride in geometry:
        args = ([stride] * 2, [1, 1], [1, 1], 1)
        x = torch.randn(batch, channels, pixels, pixels, **like).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(outputs, channels, 3, 3, **like).contiguous(memory_format=torch.channels_last)
        bias = torch.randn(outputs, **like)
        out, rad, state = ops.triton.interval_conv2d(x, x.abs(), weight, bias, *args, True)
        relu = ops.triton.interval_relu(x, x.abs() * 0.1)[2] if channels > 3 else None  # the image has none
        jobs = [
            ("interval_conv2d", (x, x.abs(), weight, bias, *args, True)),
            ("interval_conv2d_gate", (x, x.abs(), weight, state, *args)),
            ("interval_conv2d_backward_relu", (out, rad, weight, relu, list(x.shape), *args)),
            ("interval_conv2d_weight", (out, rad, x, x.abs(), weight, *args)),
        ]
        for op, arguments in jobs:
            for contender, library in (("triton", False), ("library", True)):
                function = getattr(ops.triton, op)

                def run(op: Any = function, arguments: Any = arguments, library: bool = library) -> None:
                    op(*arguments, library=library)

                original = tuning.fastest
                ops.triton._problems.clear()  # what was chosen for them before
                if library:  # its candidates end with None: the library
                    tuning.fastest = lambda key, candidates, run: candidates[-1]
                try:
                    run()
                    spans = measure.percentiles(seconds(run, 0.1))
                finally:
                    tuning.fastest = original
                shape = f"{channels}-{outputs} {pixels}x{pixels} /{stride} B{batch} bf16"
                yield row(op, shape, contender, spans, "")


def elementwise(batch: int) -> Iterator[Row]:
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
    state = ops.triton.interval_relu(*x)[2]
    slope: tuple[Any, ...] = ("gelu_slope", ())
    jobs: list[tuple[str, tuple]] = [
        ("interval_relu", x),
        ("interval_relu_backward", (*grad, state)),
        ("interval_gate", (*grad, state)),
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
    for op, arguments in jobs:
        for contender, module in (("triton", ops.triton), ("reference", ops.reference)):
            function = getattr(module, op)
            function(*arguments)
            spans = measure.percentiles(seconds(lambda f=function, a=arguments: f(*a), 0.1))  # type: ignore[misc]
            yield row(op, f"64 32x32 B{batch} bf16", contender, spans, "")


def row(op: str, shape: str, backend: str, spans: tuple[float, float, float], peak: int | str) -> Row:
    made = os.environ.get("PYXAI_BOUNDS_COMMIT") or tables.commit()
    return tables.row(op, shape, backend, spans, peak) | {"device": torch.cuda.get_device_name(), "commit": made}


# --- the files -----------------------------------------------------------------------------------------------


class Results:
    """The files of a folder, which another process may have begun: rows, notes, and what was chosen by measurement."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.files = {name: folder / f"{name}.csv" for name in ("gradient_bounds", "operators")}
        self.choices, self.noted = folder / "choices.txt", folder / "notes.txt"

    def clear(self) -> None:
        for path in (*self.files.values(), self.choices, self.noted):
            path.unlink(missing_ok=True)

    def rows(self, name: str) -> list[Row]:
        return tables.read(self.files[name]) if self.files[name].exists() else []

    def add(self, entry: Row) -> None:
        name = "operators" if entry["op"].startswith("interval_") else "gradient_bounds"
        tables.append(self.files[name], entry)

    def note(self, line: str) -> None:
        say(line)
        with open(self.noted, "a") as file:
            file.write(line + "\n")

    def notes(self) -> list[str]:
        return self.noted.read_text().splitlines() if self.noted.exists() else []


# --- the process that measures -------------------------------------------------------------------------------


def work(results: Results, begin: int, budget: float, progress: Path) -> int:
    """Do the jobs from number ``begin`` on; 1 after one that was the end of the CUDA context."""
    known: set[Any] = set()
    tuning: Any = ops.triton._kernels("tuning")
    for index, job in enumerate(JOBS[begin:], begin):
        left = budget - tables.seconds()
        if left < LEAST:
            results.note(f"not timed: {job}: the time was up")
            continue
        progress.write_text(str(index))
        say(str(job))
        problem = attempt(results, job, min(left, LIMITS.get(job.what, LIMIT)))
        if problem:
            results.note(f"not timed: {job}: {problem}")
            if not alive():
                return 1
        gc.collect()
        torch.cuda.empty_cache()
        chosen, dropped = tuning.choices(), [line for line in tuning.dropped() if line not in known]
        for line in dropped:
            results.note(line)
        with open(results.choices, "a") as file:
            file.writelines(f"{key}: {value}\n" for key, value in chosen.items() if key not in known)
        known.update(chosen, dropped)
    return 0


def attempt(results: Results, job: Job, limit: float) -> str:
    """Do one job, writing down what it yields when it does; what went wrong, if something did."""
    set_precision(job.precision)
    try:
        with within(limit):
            if job.what == "errors":
                for line in errors(job):
                    results.note(line)
            elif job.what == "operators":
                for entry in (*layers(job.batch), *elementwise(job.batch // 2)):
                    results.add(entry)
            else:
                for entry in timed(job):
                    results.add(entry)
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
    return ""


@contextlib.contextmanager
def within(limit: float) -> Iterator[None]:
    """Raises TimeoutError inside when the time is up; in a call that never returns to Python it cannot."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"not done in {limit:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def alive() -> bool:
    """Can this process still use the GPU? After an illegal access or a failed assertion it cannot."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


# --- the processes that compile ahead ------------------------------------------------------------------------


def compile_ahead(number: int) -> None:
    """Run one of PARTS untimed: what it compiles, candidates of its products included, is found in caches later."""
    job, part = PARTS[number]
    tuning: Any = ops.triton._kernels("tuning")
    seen: set[Any] = set()

    def fastest(key: Any, candidates: list[Any], run: Callable[[Any], Any]) -> Any:
        new = key not in seen
        seen.add(key)
        for index, candidate in enumerate(candidates):
            if new and candidate is not None and (len(seen) + index) % 2 == part:
                with contextlib.suppress(Exception):  # the tuner will say it
                    run(candidate)
        return candidates[0]

    set_precision(job.precision)
    case = make_case(*job[:4])
    one = CONTENDERS[job.what](case)
    with mock.patch.object(tuning, "fastest", fastest), launching():
        for step in (one.bounds, one.step):
            if step is not None:
                step()
    torch.cuda.synchronize()
    say(f"compiled ahead: {job}, part {part}")


def compile_all_ahead() -> None:
    """A process for each part, all at once."""
    command = [sys.executable, "-m", "bench.gpu", "--ahead"]
    for process in [subprocess.Popen([*command, str(number)]) for number in range(len(PARTS))]:
        process.wait()


# --- the process that looks after it -------------------------------------------------------------------------


def supervise(results: Results, command: list[str], budget: float) -> None:
    """Do all jobs by ``command``, begun anew after a job that ended its process, or that must be ended."""
    results.clear()
    progress = results.folder / ".progress"
    begin = 0
    try:
        while begin < len(JOBS):
            left = budget - tables.seconds()
            if left < LEAST:
                results.note(f"not timed: {JOBS[begin]} and what follows: the time was up")
                break
            progress.write_text("-1")
            rest = ["--seconds", f"{left:.1f}", "--begin", str(begin), "--progress", str(progress)]
            with subprocess.Popen([*command, *rest]) as worker:
                try:
                    how = watched(worker, progress)
                finally:
                    worker.kill()
            at = int(progress.read_text())
            if not how:
                break
            if at < begin:
                results.note(f"not timed: {JOBS[begin]} and what follows: {how} before it began")
                break
            results.note(f"not timed: {JOBS[at]}: {how}")
            begin = at + 1
    except KeyboardInterrupt:
        results.note("not timed: what follows: interrupted")
    finally:
        progress.unlink(missing_ok=True)


def watched(worker: subprocess.Popen, progress: Path) -> str:
    """Wait for the worker's end, or for a job that is far past its limit; how it ended, empty if well."""
    last, since = "", time.monotonic()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = worker.wait(0.2)
            return f"the process ended with status {status}" if status else ""
        text = progress.read_text()
        if text != last:
            last, since = text, time.monotonic()
        job = int(text or -1)
        limit = LIMITS.get(JOBS[job].what, LIMIT) if job >= 0 else LIMIT
        if time.monotonic() - since > limit + GRACE:
            return f"the process hung for {limit + GRACE:.0f} s"


def table(rows: list[Row]) -> str:
    """p50 in milliseconds; of the first contender, as a multiple of the others; peak memory in MB."""
    backends = list(dict.fromkeys(entry["backend"] for entry in rows))
    lines = [f"{'ms (MB)':60}" + "".join(f"{backend:>16}" for backend in backends)]
    for shape, op in dict.fromkeys((entry["shape"], entry["op"]) for entry in rows):
        same = {o["backend"]: o for o in rows if (o["op"], o["shape"]) == (op, shape)}
        cells = []
        for backend in backends:
            if backend not in same:
                cells.append("-")
                continue
            peak = same[backend]["peak_bytes"]
            memory = f" ({float(peak) / 2**20:.0f})" if peak != "" else ""
            cells.append(f"{1e3 * float(same[backend]['p50']):.3f}{memory}")
        lines.append(f"{shape:28} {op:31}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


# Of certify, `auto` records itself as a CUDA graph; of training, `engine-graphed` is recorded.
STYLE: dict[str, dict[str, Any]] = {
    "auto": {"color": "#1b6ca8", "marker": "o", "label": "engine"},
    "engine-graphed": {"color": "#1b6ca8", "marker": "o", "linestyle": ":", "label": "engine, recorded step"},
    "eager": {"color": "#c8553d", "marker": "s", "label": "eager loop"},
    "plain": {"color": "#7a9e3f", "marker": "^", "label": "no bounds: forward, ordinary step"},
    "floor": {"color": "#555555", "linestyle": "--", "label": "products alone"},
}


def draw(rows: list[Row], folder: Path) -> None:
    """Time and peak memory in bf16 against the batch of cnn7, and against the depth of residual networks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 3, figsize=(11, 7))
    plots = (("certify", "p50", 1e3, "ms"), ("train", "p50", 1e3, "ms"), ("train", "peak_bytes", 2**-20, "MiB, peak"))
    axes = ((r"cnn7 B(\d+) bf16", "batch (cnn7)"), (r"depth(\d+) B128 bf16", "depth (width 64, batch 128)"))
    for line, (pattern, axis) in zip(panels, axes, strict=True):
        found = [(int(match[1]), entry) for entry in rows if (match := re.fullmatch(pattern, entry["shape"]))]
        for panel, (op, column, scale, unit) in zip(line, plots, strict=True):
            for backend, style in STYLE.items():
                points = sorted(
                    (place, scale * float(entry[column]))
                    for place, entry in found
                    if (entry["op"], entry["backend"]) == (op, backend)
                )
                if points and not (column == "peak_bytes" and backend in ("floor", "engine-graphed")):
                    panel.plot(*zip(*points, strict=True), markersize=4, **style)
            panel.set(xlabel=axis, ylabel=f"{op}, {unit}")
            if found:  # or a scale of logarithms would have nothing to show
                panel.set(xscale="log", yscale="log")
                places = sorted({place for place, _ in found})
                panel.set_xticks(places, [str(place) for place in places], fontsize=7)
            panel.minorticks_off()
            panel.grid(alpha=0.3)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.legend(*panels[0, 1].get_legend_handles_labels(), loc="lower center", ncol=len(STYLE), frameon=False)
    figure.savefig(folder / "gpu.png", dpi=110)
    say(f"wrote {folder / 'gpu.png'}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the results; bench/results/<gpu> by default")
    parser.add_argument("--seconds", type=float, default=300.0, help="begin nothing new past this time")
    parser.add_argument("--from-csv", type=Path, metavar="CSV", help="print and draw what was measured before")
    parser.add_argument("--pictures", type=Path, default=Path("docs"), help="folder of the picture")
    parser.add_argument("--ahead", type=int, nargs="?", const=-1, help="time nothing: fill the caches of compilers")
    parser.add_argument("--begin", type=int, help=argparse.SUPPRESS)  # of a worker, like the next
    parser.add_argument("--progress", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.from_csv is not None:
        measured = tables.read(options.from_csv)
        print(table(measured))
        draw(measured, options.pictures)
        return 0
    if not torch.cuda.is_available():
        print("bench.gpu: no CUDA device; `python -m bench` measures on the CPU.", file=sys.stderr)
        return 2
    if options.ahead is not None:
        compile_all_ahead() if options.ahead < 0 else compile_ahead(options.ahead)
        return 0
    gpu = re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()).strip("-")
    results = Results(options.out or Path("bench/results") / gpu)
    if options.begin is not None:
        return work(results, options.begin, options.seconds, options.progress)
    supervise(results, [sys.executable, "-m", "bench.gpu", "--out", str(results.folder)], options.seconds)
    for name in results.files:
        print(table(results.rows(name)) + "\n")
    print("\n".join(results.notes()))
    wild = any(line.startswith(WILD) for line in results.notes())
    return 1 if wild or not results.rows("gradient_bounds") else 0


if __name__ == "__main__":
    sys.exit(main())
