"""The files that one `sokd.loss` enters: `python tests/package/test_pipeline.py` prints them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import sokd

PACKAGE = Path(sokd.__file__).parent
# Its decorator and its `apply` call the operator that called them, as PyTorch's dispatcher does.
GLUE = "ops/runtime.py"

IN_ORDER = [
    "kd/sokd.py", "kd/virtual.py", "ops/torch_internals.py", "kd/features.py",
    "kd/policy/online.py", "ops/distributed.py", "kd/policy/policy.py", "ops/draw.py",
    "ops/checks.py", "kd/adapter.py", "reference.py", "kd/policy/plan.py", "ops/refine.py",
    "kd/dam.py", "kd/attention.py", "ops/areas.py", "ops/masked_mse.py", "kd/sanity.py",
]  # fmt: skip


def paths_of(call: Callable[[], object]) -> list[list[str]]:
    """For each function of the package that runs, the files on the stack, outermost first."""
    paths: list[list[str]] = []

    def look(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and file_of(frame) not in (None, GLUE):
            paths.append(path_to(frame))

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return paths


def path_to(frame: FrameType | None) -> list[str]:
    """The package's files on the stack; calls within a file, and through PyTorch, count once."""
    path: list[str] = []
    while frame is not None:
        file = file_of(frame)
        if file not in (None, GLUE) and path[-1:] != [file]:
            path.append(str(file))
        frame = frame.f_back
    return path[::-1]


def file_of(frame: FrameType) -> str | None:
    path = Path(frame.f_code.co_filename)
    return path.relative_to(PACKAGE).as_posix() if PACKAGE in path.parents else None


def one_loss() -> list[list[str]]:
    kd = sokd.SoKD(8, 16)
    kd.search.every = 1  # a search step in each loss
    student, teacher = torch.randn(2, 8, 7, 7, requires_grad=True), torch.randn(2, 16, 7, 7)
    sokd.loss(student, teacher, kd).backward()  # without the work of a first call
    return paths_of(lambda: sokd.loss(student, teacher, kd))


def test_a_loss_enters_each_file_once_on_the_way_down() -> None:
    paths = one_loss()
    assert [path for path in paths if len(set(path)) < len(path)] == []
    assert list(dict.fromkeys(path[-1] for path in paths)) == IN_ORDER


def test_a_loss_goes_down_the_storeys() -> None:
    floors = ("kd/", "ops/", "reference.py")
    for path in one_loss():
        storeys = [
            next(at for at, name in enumerate(floors) if file.startswith(name)) for file in path
        ]
        assert storeys == sorted(storeys), path


if __name__ == "__main__":
    print(*dict.fromkeys(path[-1] for path in one_loss()), sep="\n")
