"""Fixtures for the tests of the Distiller."""

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None: ...
