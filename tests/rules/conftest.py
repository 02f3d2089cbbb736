"""The tensors of the rules' tests are tiny."""

import pytest


@pytest.fixture(autouse=True)
def tiny(one_thread: None) -> None:
    """One thread for every test in this folder."""
