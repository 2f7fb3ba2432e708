"""One call of an operator on fakes of CUDA tensors, and the state after it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sokd import _core, reference
from support.cuda.fake import HostCuda

SHAPE = (2, 3, 5, 7)


def counts() -> tuple[int, int]:
    """The numbers of units compiled and of units from the cache."""
    info = _core.cuda_info()
    return info["compiled"], info["cached"]


def loaded() -> int:
    """The number of units from either."""
    return sum(counts())


def masked_mse(
    device: int = 0,
    stream: int = 0,
    allocate: Callable[[int], Any] | None = None,
    shape: Any = SHAPE,
) -> tuple[float, Tensor]:
    """A call of an operator with two kernels in two units, compared with sokd.reference."""
    student, teacher = torch.randn(shape), torch.randn(shape)
    loss, gradient = torch.full((), torch.nan), torch.full(shape, torch.nan)
    views = [HostCuda(tensor, device) for tensor in (loss, gradient, student, teacher)]
    room = allocate or (lambda size: torch.full((size,), 255, dtype=torch.uint8))
    _core.masked_mse(*views, None, "elements", 1.0, (1, stream, room))
    torch.testing.assert_close(loss, reference.masked_mse(student, teacher))
    torch.testing.assert_close(gradient, 2 * (student - teacher) / student.numel())
    return loss.item(), gradient


def draw(device: int = 0, stream: int = 0) -> None:
    """A call of the operator with the smallest kernel."""
    words = [torch.tensor([value]) for value in (3, 4)]
    outputs = torch.empty(9), torch.empty(1, dtype=torch.int64)
    _core.draw(*(HostCuda(tensor, device) for tensor in (*outputs, *words)), (1, stream, None))
    assert all(map(torch.equal, outputs, reference.draw(*words, 9)))


def error_of(work: Callable[[], Any]) -> str:
    with pytest.raises(RuntimeError) as caught:
        work()
    return str(caught.value)
