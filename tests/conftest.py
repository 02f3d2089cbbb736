"""What all tests share: the backends that run here."""

from collections.abc import Iterator

import pytest

from pyxai_bounds import ops


@pytest.fixture(params=ops.available())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each backend."""
    with ops.backend(request.param):
        yield request.param
