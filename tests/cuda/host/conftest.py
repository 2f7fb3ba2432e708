"""Fixtures for the tests of the Rust host."""

from pathlib import Path

import pytest
import torch

from sokd import _core


@pytest.fixture(autouse=True)
def _ready() -> None:
    _core.select_reader("portable")  # reads fakes of CUDA tensors
    torch.set_num_threads(1)  # threads do not survive a fork


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; the other tests share one, and so compile each kernel once."""
    monkeypatch.setenv("SOKD_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"
