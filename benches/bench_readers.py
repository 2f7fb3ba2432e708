"""The readers of tensors: 100 calls of `masked_mse` on a map of 16 cells, mostly overhead.

The side "sokd" has the reader that is the default without sokd_tch, DLPack's.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor

import sokd
from benches.harness import Case, Options, Side, check_close
from sokd import _core

_Reader = Literal["dlpack", "tch", "portable"]
READERS: tuple[_Reader, ...] = ("dlpack", "tch", "portable")
CALLS = 100
SHAPE = (1, 1, 4, 4)


def cases(options: Options) -> Iterator[Case]:
    """Forward, then forward and backward."""
    torch.manual_seed(0)
    student, teacher = torch.randn(SHAPE), torch.randn(SHAPE)
    learning = student.clone().requires_grad_()

    def forward() -> Tensor:
        return sokd.ops.masked_mse(student, teacher)

    def both() -> Tensor:
        return torch.autograd.grad(sokd.ops.masked_mse(learning, teacher), learning)[0]

    truth = torch.nn.functional.mse_loss(student, teacher)
    for work, call, expected in (
        ("forward", forward, truth),
        ("forward + backward", both, (student - teacher) / 8),
    ):
        sides: dict[str, Side] = {name: _with_reader(name, call) for name in READERS}
        yield Case(
            f"{CALLS} x masked_mse, {work}, by reader",
            SHAPE,
            {"sokd": sides.pop("dlpack"), **sides},
            check=partial(_check, call, expected),
            note="sokd: reader dlpack",
        )


def _check(call: Callable[[], Tensor], expected: Tensor) -> None:
    check_close(call(), expected)


def _with_reader(name: _Reader, call: Callable[[], object]) -> Side:
    """A side raises where its reader is not available; its row then holds the failure."""

    def side() -> None:
        before = _core.build_info()["reader"]
        _core.select_reader(name)
        try:
            for _ in range(CALLS):
                call()
        finally:
            _core.select_reader(before)

    return side
