"""Fixtures for the tests of the emulated kernels."""

from collections.abc import Iterator

import pytest
from support.cuda.memory import MockMemory


@pytest.fixture
def cuda(memory: MockMemory) -> Iterator[MockMemory]:
    """The kernels of the source; threads and blocks in random order."""
    memory.driver.schedule("random")
    yield memory
    memory.driver.use_library(None)
    memory.driver.blocks(None)
