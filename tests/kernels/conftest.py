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


PRODUCTS = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)


def set_precision(precision: str) -> None:
    """Of products of float32: "ieee" or "tf32"."""
    for owner in PRODUCTS:
        owner.fp32_precision = precision


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where tensors for the kernels live. Of the candidates for a tile only the default is compiled; products are in
    full precision, unless a test says otherwise (of convolutions PyTorch allows tf32 by default)."""
    if not NUMBERS:
        pytest.skip(NEEDS)
    monkeypatch.setattr(triton, "_problems", {})  # what was measured before is forgotten
    monkeypatch.setattr(triton._kernels("tuning"), "fastest", lambda key, candidates, run: candidates[0])
    before = [owner.fp32_precision for owner in PRODUCTS]
    set_precision("ieee")
    yield "cpu" if triton._interpreting() else "cuda"
    for owner, precision in zip(PRODUCTS, before, strict=True):
        owner.fp32_precision = precision


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
