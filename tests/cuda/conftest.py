"""Where the CUDA kernels run: on a GPU if there is one that can, else as C++ on the CPU (see cuda_runtime.h).

Tests bring tensors on the CPU either way; to a GPU their arguments are copied, and the results back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

from pyxai_bounds import ops
from pyxai_bounds.ops import cuda
from tests.cuda.emulator import Emulator, compiler
from tests.ops.conftest import dirty_memory  # noqa: F401  (a fixture that all tests here use)


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    if compiler() is None:
        pytest.skip("needs the sources of the kernels, and a GPU or a C++ compiler")
    return Emulator(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the cuda backend run tensors on the CPU."""
    if cuda.available():
        run = cuda._run

        def relay(name: str, mid: Tensor, *args: Any) -> None:
            # One for one: results may overwrite inputs.
            there = {x.data_ptr(): x.cuda() for x in args if isinstance(x, Tensor)}
            run(name, mid.cuda(), *(there[x.data_ptr()] if isinstance(x, Tensor) else x for x in args))
            for x in args:
                if isinstance(x, Tensor) and x.numel():
                    x.data.copy_(there[x.data_ptr()])  # which autograd takes for no change: most are arguments

        monkeypatch.setattr(cuda, "_run", relay)
    else:
        emulated = request.getfixturevalue("emulator")
        monkeypatch.setattr(cuda, "_module", lambda: emulated)
        monkeypatch.setattr(cuda, "_current_stream", lambda mid: contextlib.nullcontext((0, 0)))
        monkeypatch.setattr(cuda, "available", lambda: True)
    monkeypatch.setattr(cuda, "supports", lambda mid: mid.is_cpu and mid.dtype in cuda.DTYPES)


@pytest.fixture
def backend(kernels: None) -> Iterator[str]:
    """Runs the test on the kernels, those of tests/ops included that are imported here."""
    with ops.backend("cuda"):
        yield "cuda"
