"""What only a fresh process can measure: peak memory, and how long the first call takes, capture included.

``python -m bench.fresh peak CASE BACKEND LAYOUT`` prints bytes, ``python -m bench.fresh first NETWORK`` seconds.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from bench import measure, models
from bench.contenders import CONTENDERS
from bench.measure import Case, Step
from pyxai_bounds import models as named

# Name → (network, batch, shape, sound). The run that follows a capture, and alone depends on the batch, is part of it.
FIRST_CALLS: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, ...], bool]] = {
    "n4 B32": (models.n4, 32, (3, 32, 32), False),
    "resnet18 B1": (lambda: named.build("resnet18", (3, 32, 32), 10).eval(), 1, (3, 32, 32), False),
    "transformer B1": (models.transformer, 1, (3, 32, 32), False),
    "transformer B1 sound": (models.transformer, 1, (3, 32, 32), True),
}


def measured(*arguments: str) -> float:
    """What ``python -m bench.fresh`` prints. Raises subprocess.SubprocessError if it fails or takes two minutes."""
    command = [sys.executable, "-m", "bench.fresh", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return float(result.stdout.split()[-1])


def first_call(name: str) -> float:
    """Seconds from ``xb.bound`` to the bounds. Imports of torch and of the package, and the network's construction,
    come before; what they leave to be imported by the first call is part of it."""
    import pyxai_bounds as xb

    build, batch, shape, sound = FIRST_CALLS[name]
    model, x, target = build(), torch.rand(batch, *shape), torch.zeros(batch, dtype=torch.long)
    model(x)
    start = time.perf_counter()
    with torch.no_grad():
        xb.bound(xb.explain.gradient(model), sound=sound)(xb.Interval.linf(x, measure.EPS), target)
    return time.perf_counter() - start


def peak(name: str, backend: str, layout: str) -> int:
    """Peak memory of a training step. What a first step at another batch size (1, or 2 where the batch is 1) loads and
    keeps lies in the baseline."""
    make = CONTENDERS[backend].make
    case = measure.make_case(name, *measure.CASES[name])
    few = torch.arange(2 if len(case.x) == 1 else 1) % len(case.x)
    small = make(Case(name, case.model, case.x[few], case.target[few]), layout).step
    step = make(case, layout).step
    if small is None or step is None:
        raise ValueError(f"{backend} does not train")
    small()
    case.model.zero_grad(set_to_none=True)
    return growth(step)


def growth(step: Step, calls: int = 3) -> int:
    """Growth of the resident set over that many calls, in bytes.

    Counts everything that they touch: tensors, oneDNN's scratch space, a backend's own buffers, the parameters'
    gradients. Freed heap is handed back first, or its reuse would not show.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")  # VmHWM starts again at the present VmRSS
    before = status("VmRSS")
    for _ in range(calls):
        step()
    return status("VmHWM") - before


def status(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    print({"peak": peak, "first": first_call}[sys.argv[1]](*sys.argv[2:]))
