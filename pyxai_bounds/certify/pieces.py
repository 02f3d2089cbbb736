"""Into pieces of how many samples is a batch cut? As many as a budget of memory allows, by what the program says.
And how far is long work that is done piece by piece?
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

# On the CPU larger pieces are slower, not faster: beyond, single tensors take more than 32 MiB, which glibc maps afresh
# and gives back each time. `n4` of the benchmarks, ms a sample, 2 cores: 0.78 in pieces of 128 (68 MiB), 0.91 of 256,
# 1.09 of 512.
_ENOUGH = 64 << 20


def default_budget(device: torch.device) -> int:
    """Bytes that a piece may take: half of a GPU's free memory; on the CPU 64 MiB, or a quarter of what is there."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (free + unused) // 2
    return min(_ENOUGH, _available() // 4)


def _available() -> int:
    """Bytes of main memory that can be had without swapping; where the system does not say, enough."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 4 * _ENOUGH


Progress = Callable[[float], None]  # is told the fraction done


def silent(fraction: float) -> None:
    """Progress that nobody asked for."""


def share_of(tell: Progress, start: float, share: float) -> Progress:
    """The progress of a part of the work, told as that of the whole."""
    return lambda fraction: tell(min(1.0, start + share * fraction))


@dataclass(frozen=True)
class Pieces:
    """Pieces of at most ``batch_size`` samples; None: as many as fit into ``memory_budget`` bytes (None: the default).

    Raises TypeError or ValueError unless one at most is given, a positive whole number.
    """

    batch_size: int | None = None
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        for name, unit, value in (
            ("batch_size", "samples", self.batch_size),
            ("memory_budget", "bytes", self.memory_budget),
        ):
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be a whole number of {unit} or None, got {value!r}.")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}; leave it out to have one chosen.")
        if self.batch_size is not None and self.memory_budget is not None:
            raise ValueError("batch_size and memory_budget both say how large a piece is; give one of them.")

    def budget(self, device: torch.device) -> int:
        """Bytes that a piece may take."""
        return default_budget(device) if self.memory_budget is None else self.memory_budget

    def size(self, samples: int, least: int, peak: Callable[[int], int], device: torch.device) -> int:
        """Samples per piece of a batch: equal pieces, so that the last is hardly ever padded by much.

        ``least`` bytes a sample takes in any case; ``peak(size)`` says how many bytes a piece of that size takes, and
        is asked a few times at most, since each answer is a program that has to be captured.
        """
        samples = max(samples, 1)
        if self.batch_size is not None:
            return _equal(samples, self.batch_size)
        budget = self.budget(device)
        size = _equal(samples, max(1, budget // max(least, 1)))
        asked = [(size, peak(size))] if size > 1 else []
        while size > 1 and asked[-1][1] > budget and len(asked) < _TRIES:
            size = _equal(samples, min(size - 1, _fitting(asked, budget)))
            if size > 1:
                asked.append((size, peak(size)))
        return size


_TRIES = 4


def _equal(samples: int, most: int) -> int:
    """The size of equal pieces of at most ``most`` samples."""
    return math.ceil(samples / math.ceil(samples / most))


def _fitting(asked: list[tuple[int, int]], budget: int) -> int:
    """The size that fits: memory is a fixed part and one in proportion to the samples, as two answers tell."""
    size, bytes_ = asked[-1]
    each = bytes_ / size
    if len(asked) > 1:
        before, more = asked[-2]
        each = (more - bytes_) / (before - size)
    return max(1, size - math.ceil((bytes_ - budget) / each)) if each > 0 else 1
