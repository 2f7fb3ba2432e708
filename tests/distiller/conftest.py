"""What the tests of the Distiller start from."""

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None: ...
