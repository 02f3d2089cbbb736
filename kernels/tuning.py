"""Chooses the fastest of several ways to compute one thing, by measuring them once per kind of problem."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from triton.errors import TritonError
from triton.runtime.errors import OutOfResources

from .launch import interpreting

Candidate = TypeVar("Candidate")

WARM_UP_MS = 3.0
MEASURE_MS = 10.0
LONGEST_WAIT_MS = 20.0
CYCLES_PER_MS = 2_000_000  # of a multiprocessor: about 2 GHz, or less, which makes it wait longer

_chosen: dict[Hashable, Any] = {}


def fastest(key: Hashable, candidates: Sequence[Candidate], run: Callable[[Candidate], Any]) -> Candidate:
    """The candidate with which ``run`` takes least time on the current CUDA device, as measured when ``key`` was new.

    The first one unmeasured, in the interpreter and while a CUDA graph is being captured (run once before capturing).
    A candidate that needs more of the device than there is drops out; so does, with a warning, one that this version of
    Triton cannot compile for this device. If all do, the first is returned, to fail where it is used.
    """
    if interpreting():
        return candidates[0]
    if key not in _chosen:
        if len(candidates) == 1:
            _chosen[key] = candidates[0]
            return candidates[0]
        if torch.cuda.is_current_stream_capturing():
            return candidates[0]
        times = [_milliseconds(run, candidate) for candidate in candidates]
        _chosen[key] = candidates[times.index(min(times))]
    return _chosen[key]


def choices() -> dict[Hashable, Any]:
    """What was chosen so far, by key."""
    return dict(_chosen)


def _milliseconds(run: Callable[[Candidate], Any], candidate: Candidate) -> float:
    """Of the device alone: what the launches cost depends on who calls, and is nothing in a CUDA graph."""
    try:
        launch_ms = _launch_ms(run, candidate)
        rounds = max(1, min(20, int(WARM_UP_MS / max(_timed(run, candidate, 1, launch_ms), 1e-3))))
        each = _timed(run, candidate, rounds, launch_ms)
        rounds = max(1, min(20, int(MEASURE_MS / 3 / max(each, 1e-3))))
        return statistics.median(_timed(run, candidate, rounds, launch_ms) for _ in range(3))
    except (OutOfResources, torch.cuda.OutOfMemoryError):
        return float("inf")
    except (TritonError, RuntimeError) as error:
        if not isinstance(error, TritonError) and "PassManager" not in str(error):
            raise  # not the compiler's: a kernel that failed when it ran
        warnings.warn(f"Triton could not compile {candidate}: {error}", RuntimeWarning, stacklevel=2)
        return float("inf")


def _launch_ms(run: Callable[[Candidate], Any], candidate: Candidate) -> float:
    """Milliseconds that the host needs to launch one run, once it is compiled."""
    run(candidate)
    torch.cuda.synchronize()
    start = time.perf_counter()
    run(candidate)
    return 1e3 * (time.perf_counter() - start)


def _timed(run: Callable[[Candidate], Any], candidate: Candidate, rounds: int, launch_ms: float) -> float:
    """Milliseconds of one of several runs back to back, all of which are launched while the device still waits."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(int(min(1.5 * rounds * launch_ms + 0.05, LONGEST_WAIT_MS) * CYCLES_PER_MS))
    start.record()
    for _ in range(rounds):
        run(candidate)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / rounds
