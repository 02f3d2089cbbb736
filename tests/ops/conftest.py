"""Memory that is never clean by accident, and one thread unless a test says otherwise."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def dirty_memory(one_thread: None) -> Iterator[None]:
    """Fresh tensors are full of NaN (255 for bytes), so that an element nobody wrote is seen."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
