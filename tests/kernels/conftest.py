"""Where the kernels run: on a GPU if there is one, else in Triton's interpreter, which must be asked for from outside.

What Triton's decorator makes of a function is decided when it is imported, so one process cannot do both: `make test`
runs this folder a second time, with TRITON_INTERPRET=1.
"""

from collections.abc import Iterator

import pytest
import torch

from pyxai_bounds import ops
from pyxai_bounds.ops import triton

NUMBERS = triton.available()
NEEDS = "the kernels need an NVIDIA GPU, or TRITON_INTERPRET=1 in the environment"


def set_precision(patch: pytest.MonkeyPatch, precision: str) -> None:
    """Of products of float32: "ieee" or "tf32"."""
    for owner in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):
        patch.setattr(owner, "fp32_precision", precision)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    """Where tensors for the kernels live. Of the candidates for a tile only the default is compiled; products are in
    full precision, unless a test says otherwise (of convolutions PyTorch allows tf32 by default)."""
    if not NUMBERS:
        pytest.skip(NEEDS)
    set_precision(monkeypatch, "ieee")
    monkeypatch.setattr(triton._kernels("tuning"), "fastest", lambda key, candidates, run: candidates[0])
    return "cpu" if triton._interpreting() else "cuda"


@pytest.fixture
def kernels(device: str) -> Iterator[str]:
    """Runs the test on the kernels; memory that nobody wrote is NaN. The device."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    # On GPUs only what is filled counts: cuBLAS's own warnings about determinism are not ours.
    torch.use_deterministic_algorithms(device == "cpu")
    with ops.backend("triton"):
        yield device
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(before)
