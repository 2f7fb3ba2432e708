"""The readers of tensors: 100 calls of `masked_mse` on a map of 16 cells, where a call is mostly overhead.

The first side is the reader that is selected by default where sokd_tch is not installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import sokd
from benches.harness import Case, Options, check_close
from sokd import _core

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
        sides = {name: _with_reader(name, call) for name in ("dlpack", "tch", "portable")}
        yield Case(
            f"{CALLS} x masked_mse, {work}, by reader",
            SHAPE,
            {"sokd": sides.pop("dlpack"), **sides},
            check=lambda call=call, expected=expected: check_close(call(), expected),
            note="sokd: reader dlpack",
        )


def _with_reader(name: str, call: Callable[[], object]) -> Callable[[], None]:
    """A side fails, and says so in its row, where its reader is not available."""

    def side() -> None:
        before = _core.build_info()["reader"]
        _core.select_reader(name)
        try:
            for _ in range(CALLS):
                call()
        finally:
            _core.select_reader(before)

    return side
