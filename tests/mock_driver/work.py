"""What the cases share: one call of an operator on host memory that says it is on CUDA, and what came of it.

A plugin of pytest, too: `-p work` brings the fixtures.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake import HostCuda
from torch import Tensor

from sokd import _core, reference

SHAPE = (2, 3, 5, 7)


@pytest.fixture(autouse=True)
def _ready() -> None:
    _core.select_reader("portable")  # the one that reads fakes
    torch.set_num_threads(1)  # threads do not survive a fork


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one; the other cases share one, and with it the time of compiling."""
    monkeypatch.setenv("SOKD_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def counts() -> tuple[int, int]:
    """Units compiled, units from the cache."""
    info = _core.cuda_info()
    return info["compiled"], info["cached"]


def loaded() -> int:
    """Units from either."""
    return sum(counts())


def masked_mse(
    device: int = 0,
    stream: int = 0,
    allocate: Callable[[int], Any] | None = None,
    shape: Any = SHAPE,
) -> tuple[float, Tensor]:
    """One call of the operator that has two kernels in two units; checked against the twin."""
    student, teacher = torch.randn(shape), torch.randn(shape)
    loss, gradient = torch.full((), torch.nan), torch.full(shape, torch.nan)
    views = [HostCuda(tensor, device) for tensor in (loss, gradient, student, teacher)]
    room = allocate or (lambda size: torch.full((size,), 255, dtype=torch.uint8))
    _core.masked_mse(*views, None, "elements", 1.0, (1, stream, room))
    torch.testing.assert_close(loss, reference.masked_mse(student, teacher))
    torch.testing.assert_close(gradient, 2 * (student - teacher) / student.numel())
    return loss.item(), gradient


def draw(device: int = 0, stream: int = 0) -> None:
    """One call of the operator with the smallest kernel."""
    words = [torch.tensor([value]) for value in (3, 4)]
    outputs = torch.empty(9), torch.empty(1, dtype=torch.int64)
    _core.draw(*(HostCuda(tensor, device) for tensor in (*outputs, *words)), (1, stream, None))
    assert all(map(torch.equal, outputs, reference.draw(*words, 9)))


def error_of(work: Callable[[], Any]) -> str:
    with pytest.raises(RuntimeError) as caught:
        work()
    return str(caught.value)
