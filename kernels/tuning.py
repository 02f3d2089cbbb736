"""Chooses the fastest of several ways to compute one thing, by measuring them once per kind of problem."""

from __future__ import annotations

import functools
import statistics
import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from .launch import interpreting

Candidate = TypeVar("Candidate")

WARM_UP_MS = 3.0
MEASURE_MS = 10.0
LONGEST_WAIT_MS = 20.0
CYCLES_PER_MS = 2_000_000  # of a multiprocessor: about 2 GHz, or less, which makes it wait longer

_chosen: dict[Hashable, Any] = {}
_dropped: list[str] = []


def fastest(key: Hashable, candidates: Sequence[Candidate], run: Callable[[Candidate], Any]) -> Candidate:
    """The candidate with which ``run`` takes least time on the current CUDA device, as measured when ``key`` was new.

    The first one unmeasured, in the interpreter and while a CUDA graph is being captured (run once before capturing).
    A candidate that needs more of the device than there is drops out; so does, with a warning, one that raises another
    error: Triton cannot compile it here, it cannot be launched, its results are wrong (``Trial``). If all do, the first
    one's error is raised; one that ended the use of the device is raised at once.
    """
    if interpreting() or (key not in _chosen and torch.cuda.is_current_stream_capturing()):
        return candidates[0]
    if key not in _chosen:
        measure = _milliseconds if len(candidates) > 1 else _once
        times: dict[Candidate, float] = {}
        errors = []
        for candidate in candidates:
            try:
                times[candidate] = measure(run, candidate)
            except Exception as error:
                _drop(key, candidate, error)
                errors.append(error.with_traceback(None))  # which would hold on to tensors
        if not times:
            errors[0].add_note('Inside of `with xb.backend("reference"):` plain PyTorch computes this.')
            raise errors[0]
        _chosen[key] = min(times, key=lambda candidate: times[candidate])
    return _chosen[key]


def choices() -> dict[Hashable, Any]:
    """What was chosen so far, by key."""
    return dict(_chosen)


def dropped() -> list[str]:
    """Which candidates dropped out with a warning so far, and why."""
    return list(_dropped)


def _drop(key: Hashable, candidate: Any, error: Exception) -> None:
    if isinstance(error, (OutOfResources, torch.cuda.OutOfMemoryError)):
        return
    torch.cuda.synchronize()  # raises again what ended the use of the device
    name = "The library with fused stages" if candidate is None else f"The kernel {candidate}"
    message = (
        f"{name} is not used for {key} on {torch.cuda.get_device_name()}: {type(error).__name__}: "
        f"{' '.join(str(error).split())[:500]}. Others are used in its place, which may be slower. Please report this, "
        "with the output of `pyxai-bounds info`."
    )
    _dropped.append(message)
    warnings.warn(message, RuntimeWarning, stacklevel=3)


class WrongResultError(RuntimeError):
    """A candidate does not compute what it should."""


class Given(NamedTuple):
    """What a trial compares on: whole numbers, so few to a sum that every type holds the results, and halves, exactly.

    Then they depend neither on the order of sums nor on tf32, and whoever computes them right has the same bits.
    """

    tensors: Sequence[Tensor | None]  # arguments
    results: Sequence[Tensor]  # of these
    scaled: Sequence[Tensor]  # of both, what may be multiplied by the same number
    is_library_exact: bool  # or does it not sum products as they are (Winograd)?


class Trial:
    """Called with a candidate, raises WrongResultError if ``run`` does not give with it what it must; once for each.

    A candidate is run twice, with different numbers, so that what another left in memory is no result. The second time
    Triton's kernels are launched directly (``Launch``).
    """

    def __init__(self, run: Callable[..., Any], prepare: Callable[[], Given]) -> None:
        self._run, self._prepare = run, functools.cache(prepare)
        self._begun: set[Any] = set()

    def __call__(self, candidate: Any) -> None:
        if candidate in self._begun:
            return
        self._begun.add(candidate)
        try:
            given = self._prepare()
        except torch.cuda.OutOfMemoryError:
            if candidate is None:
                return  # the library needs no trial; others do
            raise
        except Exception as error:  # not the candidate's: without a trial it is as good as it was
            torch.cuda.synchronize()
            warnings.warn(f"No trial of {candidate}: {error}. Please report this.", RuntimeWarning, stacklevel=2)
            return
        if candidate is None and not given.is_library_exact:
            return
        for factor in (2.0, 0.5):
            results = self._run(candidate, *given.tensors)
            for found, wanted in zip(results if isinstance(results, tuple) else [results], given.results, strict=False):
                if not torch.equal(found, wanted):
                    raise WrongResultError(_difference(found, wanted))
            for t in given.scaled:
                t.mul_(factor)


def _difference(found: Tensor, wanted: Tensor) -> str:
    count = f"{int((found != wanted).sum())} of {wanted.numel()}"
    if not wanted.is_floating_point():
        return f"with whole numbers, {count} bytes of packed signs are not those of plain PyTorch"
    largest = (found - wanted).abs().max().item()
    return f"with whole numbers, {count} results are not those of plain PyTorch, by up to {largest:g}"


def _milliseconds(run: Callable[[Candidate], Any], candidate: Candidate) -> float:
    """Of the device alone: what the launches cost depends on who calls, and is nothing in a CUDA graph."""
    launch_ms = _launch_ms(run, candidate)
    rounds = max(1, min(20, int(WARM_UP_MS / max(_timed(run, candidate, 1, launch_ms), 1e-3))))
    each = _timed(run, candidate, rounds, launch_ms)
    rounds = max(1, min(20, int(MEASURE_MS / 3 / max(each, 1e-3))))
    return statistics.median(_timed(run, candidate, rounds, launch_ms) for _ in range(3))


def _once(run: Callable[[Candidate], Any], candidate: Candidate) -> float:
    run(candidate)
    return 0.0


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
