"""`areas` against the usual loops over images and boxes.

Bytes: heat, size and offset of both sides read once, the coverage written once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from support import eager
from support.eager import Heads

import sokd
from benches.harness import MEMORY, Case, Options, check_close
from sokd import reference

HEATS = 100


def make(batch: int, height: int, width: int) -> Heads:
    heat = torch.rand(batch, HEATS, height, width)
    size = torch.rand(batch, 2, height, width) * torch.tensor([width, height]).view(1, 2, 1, 1) / 2
    return heat, size, torch.rand(batch, 2, height, width)


def case(batch: int, height: int, width: int, *, target: float) -> Case:
    torch.manual_seed(0)
    student, teacher = make(batch, height, width), make(batch, height, width)

    def check() -> None:
        truth = reference.areas(*student, teacher=teacher)
        ours = sokd.ops.areas(*student, teacher=teacher)
        check_close(ours.boxes, truth.boxes)
        check_close(ours.coverage, truth.coverage)
        # The loops compute in float64: a corner on the edge of a cell can fall on either side.
        differs = (eager.areas(student, teacher) != truth.coverage).float().mean().item()
        if differs > 1e-3:
            raise AssertionError(
                f"the loops disagree with the reference in {differs:.2%} of the cells"
            )

    sides = {
        "sokd": lambda: sokd.ops.areas(*student, teacher=teacher),
        "loops": lambda: eager.areas(student, teacher),
        "reference": lambda: reference.areas(*student, teacher=teacher),
    }
    if target > 1:
        sides[MEMORY] = lambda: student[0].sum() + teacher[0].sum()
    moved = sum(part.nbytes for part in (*student, *teacher)) + 4 * batch * height * width
    return Case(
        "mutual areas, k = 8", (batch, HEATS, height, width), sides, moved,
        {"loops": target, "reference": 1}, check,
    )  # fmt: skip


def cases(options: Options) -> Iterator[Case]:
    yield case(64, 16, 16, target=200)
    if options.quick:
        return
    yield case(32, 28, 28, target=1)
    yield case(2, 100, 100, target=1)
