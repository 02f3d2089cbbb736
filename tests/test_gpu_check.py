"""What ``make gpu-check`` does when something goes wrong, on the one run that there may be. No GPU is needed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, gpu_check, measure, rows
from pyxai_bounds.ops import replay
from tests import conftest
from tests.cuda_graphs import imitate

WORKER = """
import argparse, json, os, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("--seconds"), parser.add_argument("--begin", type=int), parser.add_argument("--progress")
options = parser.parse_args(sys.argv[2:])
fates = json.loads(sys.argv[1])
for job in range(options.begin, 6):
    with open(options.progress, "w") as file:
        file.write(str(job))
    fate = fates.get(str(job))
    with open("done", "a") as file:
        file.write(str(job))
    if fate == "hang":
        time.sleep(100)
    if fate == "crash":
        os.abort()
"""


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> gpu.Results:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu, "JOBS", gpu.JOBS[:6])
    monkeypatch.setattr(gpu, "LIMIT", 2.0)
    monkeypatch.setattr(gpu, "LIMITS", {})
    monkeypatch.setattr(gpu, "GRACE", 1.0)
    return gpu.Results(tmp_path / "out")


def supervise(results: gpu.Results, fates: dict[int, str], seconds: float = 1e9) -> str:
    gpu.supervise(results, [sys.executable, "-c", WORKER, json.dumps(fates)], seconds)
    done = Path("done")
    return done.read_text() if done.exists() else ""


def test_a_job_that_ends_or_holds_up_its_process_costs_itself_alone(results: gpu.Results) -> None:
    assert supervise(results, {1: "crash", 3: "hang", 4: "crash"}) == "012345"
    notes = results.notes()
    assert [str(gpu.JOBS[k]) in note for k, note in zip((1, 3, 4), notes, strict=True)] == [True] * 3
    assert "status -6" in notes[0] and "hung" in notes[1]
    assert sorted(path.name for path in results.folder.iterdir()) == ["notes.txt"]


def test_nothing_is_begun_past_the_time_and_a_worker_that_cannot_begin_is_no_loop(results: gpu.Results) -> None:
    assert supervise(results, {}, seconds=0.0) == ""
    assert "the time was up" in results.notes()[0]
    gpu.supervise(results, [sys.executable, "-c", "raise SystemExit(3)"], 1e9)
    assert results.notes() == [
        f"not timed: {gpu.JOBS[0]} and what follows: the process ended with status 3 before it began"
    ]


def entry(op: str, backend: str) -> rows.Row:
    return rows.row(op, "cnn7 B512 bf16", backend, (1e-3, 2e-3, 3e-3), 2**20)


def test_what_was_measured_before_a_failure_stays(results: gpu.Results, monkeypatch: pytest.MonkeyPatch) -> None:
    """An out-of-memory error in the training step leaves the certify row, and the next contender is measured."""
    called: list[str] = []

    def timed(job: gpu.Job) -> Any:
        called.append(job.what)
        yield entry("certify", job.what)
        if job.what == "auto":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")
        if job.what == "engine-graphed":
            time.sleep(30)
        yield entry("train", job.what)

    monkeypatch.setattr(gpu, "timed", timed)
    monkeypatch.setattr(
        gpu, "errors", lambda job: iter(["error cnn7 bf16 auto: mid 1.0e-03", "WILD cnn7 bf16 eager: mid nan"])
    )
    monkeypatch.setattr(gpu, "alive", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert gpu.work(results, 0, 1e9, results.folder / "progress") == 0
    assert called == [job.what for job in gpu.JOBS if job.what != "errors"]
    found = [(r["op"], r["backend"]) for r in results.rows("gradient_bounds")]
    assert [pair for pair in found if pair[1] in called[:2]] == [("certify", "auto"), ("certify", "engine-graphed")]
    assert found.count(("train", "eager")) == 1
    notes = [line for line in results.notes() if line.startswith("not timed")]
    assert "auto: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB" in notes[0]
    assert "engine-graphed: TimeoutError" in notes[1] and len(notes) == 2
    assert gpu.table(results.rows("gradient_bounds")).splitlines()[1].endswith("2.000 (1)")
    monkeypatch.setattr(gpu, "alive", lambda: False)  # after an illegal access
    assert gpu.work(results, 0, 1e9, results.folder / "progress") == 1 and called[-1] == "auto"


def test_every_job_can_be_done() -> None:
    assert len(set(gpu.JOBS)) == len(gpu.JOBS)
    for job in gpu.JOBS:
        assert job.what in (*gpu.CONTENDERS, "errors", "operators")
        assert job.network in gpu.NETWORKS and job.precision in gpu.TOLERANCE


def test_contenders_are_measured_as_the_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU passed off as a GPU: each contender certifies, and trains where it can.

    Peaks are those without a CUDA graph, but where terms run side by side.
    """
    small = measure.make_case("small", gpu.models.n4, 2, measure.IMAGE)
    monkeypatch.setattr(gpu, "make_case", lambda *place: small)
    monkeypatch.setattr(gpu, "seconds", lambda step, budget: (step(), [1.0] * 5)[1])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "one")
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(
        torch.cuda,
        "max_memory_allocated",
        lambda: 350 if name.endswith("-concurrent") != (os.environ.get("PYXAI_BOUNDS_CUDA_GRAPHS") == "0") else 0,
    )
    imitate(monkeypatch)  # of CUDA graphs; under it nothing can be compiled, which test_compile.py does
    monkeypatch.setattr(measure, "_compiled", lambda function: function)
    recorded: list[str] = []
    record = replay.Graph.record
    monkeypatch.setattr(replay.Graph, "record", lambda *args: (recorded.append(name), record(*args)))
    for name in ("auto", "launched", "eager", "floor", "plain", "sound", "engine-graphed", *gpu.GRAPHED, *gpu.STEPS):
        found = list(gpu.timed(gpu.Job("cnn7", 2, 32, "fp32", name)))
        certify, train = name not in ("engine-graphed", *gpu.STEPS), name != "sound"
        assert [r["op"] for r in found] == ["certify"] * certify + ["train"] * train, name
        assert {r["peak_bytes"] for r in found} == {250} and found[0]["device"] == "one"
        small.model.zero_grad(set_to_none=True)
    both = [name for name in gpu.GRAPHED if "graphed" in name for _ in range(2)]
    assert recorded == ["engine-graphed", *both, *gpu.STEPS]
    assert "PYXAI_BOUNDS_CUDA_GRAPHS" not in os.environ


SLOW = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
print("begun", child.pid, flush=True)
try:
    time.sleep(100)
except KeyboardInterrupt:
    print("what it has found", flush=True)
    {then}
"""


def has_ended(process: int) -> bool:
    """Soon: the system takes its time to end what was killed. One that lives on is ended here."""
    for _ in range(100):
        try:
            if Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    os.kill(process, signal.SIGKILL)
    return False


@pytest.mark.parametrize("then", ["pass", "time.sleep(100)"])
def test_a_stage_whose_time_is_up_says_what_it_has(then, tmp_path, monkeypatch, capsys) -> None:
    """Also one that does not end by itself; the processes that it began are ended with it."""
    monkeypatch.setattr(gpu_check, "PLACE", tmp_path)
    monkeypatch.setattr(gpu_check, "GRACE", 1.0)
    log = tmp_path / "log"
    log.write_text("an earlier stage\n")
    code = SLOW.format(then=then)
    assert gpu_check.run("slow", [sys.executable, "-c", code], 5.0, log) == 124
    printed = capsys.readouterr().out
    assert "what it has found" in printed and "an earlier stage" not in printed
    assert log.read_text().startswith("an earlier stage\nbegun")
    child = int(log.read_text().split()[4])
    assert has_ended(child), "a process outlived its stage"
    assert gpu_check.run("quick", [sys.executable, "-c", "raise SystemExit(7)"], 30, log) == 7


def test_tests_after_an_error_of_a_gpu_run_in_a_new_process(tmp_path: Path) -> None:
    """With pytest-xdist: the test that made it fails with its own words, and no other does."""
    pytest.importorskip("xdist")
    (tmp_path / "conftest.py").write_text(Path(conftest.__file__).read_text() + textwrap.dedent("""
        broken = []
        torch.cuda.is_initialized = lambda: True
        def synchronize():
            if broken:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
        torch.cuda.synchronize = synchronize
    """))  # fmt: skip
    (tmp_path / "test_it.py").write_text(
        textwrap.dedent("""
        import pytest
        @pytest.mark.parametrize("k", range(8))
        def test_it(k, request):
            plugin = next(p for p in request.config.pluginmanager.get_plugins() if hasattr(p, "broken"))
            if k == 2:
                plugin.broken.append(k)
            assert not plugin.broken, "these are its own words"
    """)
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "1", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 1 and "these are its own words" in found.stdout
    assert "7 passed" in found.stdout and "test_it[2]" in found.stdout
    assert not any(f"FAILED test_it.py::test_it[{k}]" in found.stdout for k in (0, 1, 3, 4, 5, 6, 7))


def test_what_runs_beside_the_tests_ends_with_its_children_when_its_time_is_up(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gpu_check, "PLACE", tmp_path)
    children = "import subprocess, sys; subprocess.run([sys.executable, '-c', {!r}])"
    child = "import os, time; open('child', 'w').write(str(os.getpid())); time.sleep(60)"
    begun = time.monotonic()
    with gpu_check.beside([sys.executable, "-c", children.format(child)], 6.0, tmp_path / "log"):
        time.sleep(0.1)
    assert 5 < time.monotonic() - begun < 30
    assert has_ended(int((tmp_path / "child").read_text()))
    with gpu_check.beside([sys.executable, "-c", "print('all of it')"], 60.0, tmp_path / "log"):
        pass  # waits for it
    assert "all of it" in (tmp_path / "log").read_text()


def test_every_candidate_is_compiled_ahead_by_one_part_or_another(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    tuning = gpu.ops.triton._kernels("tuning")
    ran: list[tuple[str, str]] = []

    def step() -> None:
        for key in ("one product", "another", "one product"):
            taken = tuning.fastest(key, ["a", "b", "c", None], lambda block, key=key: ran.append((key, block)))
            assert taken == "a"

    monkeypatch.setattr(gpu, "make_case", lambda *job: None)
    monkeypatch.setitem(gpu.CONTENDERS, "auto", lambda case: measure.Contender(step, step))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    parts = [number for number, (job, _) in enumerate(gpu.PARTS) if job == gpu.PARTS[0][0] and job.what == "auto"]
    for number in parts:
        gpu.compile_ahead(number)
    assert sorted(ran) == [(key, block) for key in ("another", "one product") for block in "abc"]


def test_what_was_measured_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    measured = Path(__file__).parents[1] / "bench" / "results" / "nvidia-h200" / "gradient_bounds.csv"
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "--from-csv", str(measured), "--pictures", str(tmp_path)])
    assert gpu.main() == 0
    assert (tmp_path / "gpu.png").stat().st_size > 10_000 and "cnn7 B512 bf16" in capsys.readouterr().out
