"""The comparisons of device_cases.py must fail for a device whose results are off by a little.

`pytest -m gpu` and the tests of the mock driver rely on them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.cuda import device_cases
from support.cuda.device_cases import TorchDevice
from torch import Tensor

SHAPE = (2, 16, 8, 8)
CPU = torch.device("cpu")


class Faulty(TorchDevice):
    """Changes one number in the `which`-th tensor that comes back."""

    def __init__(self, which: int) -> None:
        super().__init__(CPU)
        self.left = which

    def back(self, tensor: Tensor) -> Tensor:
        here = super().back(tensor)
        self.left -= 1
        if self.left == -1:
            last = here.view(-1)[-1:]  # what a skipped tail would leave
            last += 1 if not here.is_floating_point() else 0.01 + 0.1 * last.abs()
        return here


F32 = ("contiguous", torch.float32)
CASES: dict[str, tuple[int, Callable[[device_cases.Device], None]]] = {
    "refine": (5, lambda place: device_cases.refine(place, SHAPE, *F32, 2)),
    "refine_dots": (1, lambda place: device_cases.refine_dots(place, SHAPE, *F32, 3)),
    "areas": (3, lambda place: device_cases.areas(place, SHAPE, *F32, 8, teacher=True)),
    "masked_mse": (2, lambda place: device_cases.masked_mse(place, SHAPE, *F32, None, "elements")),
    "draw": (2, lambda place: device_cases.draw(place, 9)),
}


@pytest.mark.parametrize(
    "name, which", [(name, i) for name, (n, _) in CASES.items() for i in range(n)]
)
def test_one_wrong_number_is_noticed(name: str, which: int) -> None:
    count, compare = CASES[name]
    right = Faulty(count)
    compare(right)
    assert right.left == 0, "not the number of tensors that this case compares"
    with pytest.raises(AssertionError):
        compare(Faulty(which))
