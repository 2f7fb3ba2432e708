"""What the tests of the Distiller start from."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(_same_start: None) -> None:
    """Many small steps gain nothing from a second thread."""
    torch.set_num_threads(1)
