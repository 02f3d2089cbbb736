"""What all tests share: the backends that run here, and how many threads they run on."""

import os
from collections.abc import Iterator

import pytest
import torch

from pyxai_bounds import ops

HERE = [name for name in ops.available() if ops.BACKENDS[name].supports(torch.empty(1))]  # for tensors on the CPU


@pytest.fixture(params=HERE)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each backend."""
    with ops.backend(request.param):
        yield request.param


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of tiny tensors: on a busy machine a second thread makes each of them wait for its turn."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish() -> None:
    """After an illegal access a process cannot use its GPU any more: its other tests are for a new one, which
    pytest-xdist begins in its place. Waiting for the GPU here charges an error to the test that made it."""
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
