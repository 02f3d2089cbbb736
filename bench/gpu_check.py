"""``make gpu-check``: builds the package beside the source tree, tests the kernels on the GPU, measures them.

Runs under any python that has PyTorch with CUDA, needs no network and changes nothing in that python's environment: the
package is installed into build/gpu-check, together with copies of tests/, bench/ and csrc/. Ends inside nine
minutes. What a stage prints goes to gpu-check.log as it is printed, and its end to the screen. A stage whose time is up
is asked to say what it has found.
Exit status 2 if something that it needs is missing, 1 if something failed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / "build" / "gpu-check"
LIMIT = 525.0  # seconds; nine minutes are 540
AHEAD_LIMIT = 80.0  # for what is compiled beside the tests
TEST_LIMIT = 170.0
CUDA_TEST_LIMIT = 90.0
GRACE = 15.0  # for a stage whose time is up
END = 3500  # characters of a stage's output that are shown
MODULES = {
    "torch": "PyTorch with CUDA",
    "triton": "Triton, which comes with it",
    "pip": "pip",
    "pytest": "pytest",
    "hypothesis": "hypothesis",
    "numpy": "numpy",
    "scikit_build_core": "scikit-build-core",
    "pybind11": "pybind11",
}
PROGRAMS = {"nvcc": "the CUDA compiler", "cmake": "CMake", "ninja": "ninja", "c++": "a C++17 compiler"}

_start = time.monotonic()
_limit = LIMIT


def left() -> float:
    return _limit - (time.monotonic() - _start)


def say(text: str) -> None:
    print(f"gpu-check [{time.monotonic() - _start:4.0f} s] {text}", flush=True)


def missing() -> list[str]:
    """What is not here, one line each."""
    lines = [f"module {m}: {what}" for m, what in MODULES.items() if importlib.util.find_spec(m) is None]
    here = [os.path.dirname(sys.executable), "/usr/local/cuda/bin", os.environ.get("PATH", "")]
    os.environ["PATH"] = os.pathsep.join(here)
    for program, what in PROGRAMS.items():
        in_python = program in ("cmake", "ninja") and importlib.util.find_spec(program) is not None
        if shutil.which(program) is None and not in_python:
            lines.append(f"program {program}: {what}")
    if importlib.util.find_spec("torch") is not None:
        import torch

        if torch.version.cuda is None:
            lines.append(f"CUDA in PyTorch: {torch.__version__} is built without it")
        elif not torch.cuda.is_available():
            lines.append("a CUDA device: PyTorch finds none (see nvidia-smi)")
    return lines


def run(what: str, command: list[str], seconds: float, log: Path, environment: dict[str, str] | None = None) -> int:
    """Run in PLACE to the end or to the time limit; 124 for the latter, as timeout(1) says it.

    Then the command gets what Ctrl-C sends, upon which pytest and the benchmarks print what they have found, and a
    little later it is ended with all the processes that it began.
    """
    seconds = max(1.0, seconds)
    say(f"{what} (at most {seconds:.0f} s)")
    with open(log, "ab") as file:
        begin = file.tell()
        process = subprocess.Popen(
            command, cwd=PLACE, env={**os.environ, **(environment or {})}, stdout=file, stderr=subprocess.STDOUT,
            process_group=0,
            # What runs in the background may be started with interrupts ignored, and would pass that on.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            say(f"{what}: stopped, the time was up")
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            status = 124
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    printed = log.read_bytes()[begin:].decode(errors="replace")
    print(printed[-END:].rstrip(), flush=True)
    return status


@contextlib.contextmanager
def beside(command: list[str], seconds: float, log: Path) -> Iterator[None]:
    """Run a command while the body runs, and after it until the time limit; it may fail."""
    end = time.monotonic() + seconds
    with open(log, "ab") as file:
        process = subprocess.Popen(command, cwd=PLACE, stdout=file, stderr=subprocess.STDOUT, process_group=0)
    try:
        yield
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def build(log: Path) -> int:
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir(parents=True)
    command = [
        sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation",
        "--disable-pip-version-check", "--root-user-action=ignore", "--target", str(PLACE), str(ROOT),
    ]  # fmt: skip
    status = run("build", command, 180, log)
    if status == 0:
        for folder in ("tests", "bench", "csrc"):
            shutil.copytree(ROOT / folder, PLACE / folder)
        shutil.copy(ROOT / "pyproject.toml", PLACE)
    return status


def commit() -> str:
    """What is measured; a copy without its history is told it in PYXAI_BOUNDS_COMMIT."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found = "none"
    return os.environ.get("PYXAI_BOUNDS_COMMIT") or found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of results and log; bench/results/<gpu> and build by default")
    parser.add_argument("--seconds", type=float, default=LIMIT, help=f"end inside this time; {LIMIT:.0f} by default")
    options = parser.parse_args()
    out = options.out
    global _limit
    _limit = options.seconds
    signal.signal(signal.SIGINT, signal.default_int_handler)  # who starts this in the background may have ignored it
    lines = missing()
    without_gpu = any(line.startswith(("CUDA", "a CUDA", "module torch")) for line in lines)
    for line in lines:
        say(f"missing: {line}")
    if lines and not without_gpu:
        return 2
    log = (ROOT / "build" if out is None else out.resolve()) / "gpu-check.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    if (status := build(log)) != 0:
        say("build: FAILED")
        return 2 if without_gpu else status
    if without_gpu:
        say("built; without a CUDA device there is nothing to test or to measure")
        return 2
    python = [sys.executable]
    # Importing the folders of tests from the copy: there the installed package is the one beside it.
    tests = [*python, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None:
        tests += ["-n", str(min(12, os.cpu_count() or 1))]  # most of the time goes into compiling kernels
    say_why = "import sys; from pyxai_bounds.ops import cuda; sys.exit(cuda.why_not_available() or 0)"
    tested = run("cuda backend", [*python, "-c", say_why], 60, log)  # or its tests would pass in the emulator
    with beside([*python, "-m", "bench.gpu", "--ahead"], min(AHEAD_LIMIT, left()), log):
        for folder, limit in (("cuda", CUDA_TEST_LIMIT), ("kernels", TEST_LIMIT)):
            command = [*tests, f"tests/{folder}", "--deselect", f"tests/{folder}/test_compile.py"]
            status = run(f"tests/{folder}", command, min(limit, left()), log)
            say(f"tests/{folder}: " + ("passed" if status == 0 else f"FAILED ({status})"))
            tested = tested or status
    name = subprocess.run(
        [*python, "-c", "import torch; print(torch.cuda.get_device_name().lower())"], capture_output=True, text=True
    ).stdout.strip()
    gpu = "-".join("".join(c if c.isalnum() else " " for c in name).split())
    folder = ROOT / "bench" / "results" / gpu if out is None else out.resolve()
    bench = [*python, "-m", "bench.gpu", "--out", str(folder), "--seconds", f"{left() - 2 * GRACE:.0f}"]
    measured = run("benchmarks", bench, left() - GRACE, log, {"PYXAI_BOUNDS_COMMIT": commit()})
    say("benchmarks: " + (f"written to {folder}" if measured == 0 else f"FAILED ({measured})"))
    say(f"tests {'passed' if tested == 0 else 'FAILED'}, benchmarks {'done' if measured == 0 else 'FAILED'}")
    return 1 if tested or measured else 0


if __name__ == "__main__":
    sys.exit(main())
