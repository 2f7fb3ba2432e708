"""The bytes that each kernel moves are those that docs/gpu.md and the kernels' comments state.

Every access of the emulated kernels to a map is counted; smaller tensors (weights, plans) are not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from support.cuda.checks import (
    areas,
    masked_mse,
    masked_mse_scale,
    refine,
    refine_backward,
    refine_dots,
)
from support.cuda.emulator import ROOT, traced
from support.cuda.memory import MockMemory
from support.cuda.mock import Traffic
from torch import Tensor

from sokd import ops

SHAPE = (2, 32, 24, 24)
FORMATS = {"planes": torch.contiguous_format, "lanes": torch.channels_last}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
THETA, SIGMA = torch.tensor([[[0.97, 0.1, 0.05], [-0.1, 1.02, -0.04]]]), torch.tensor([0.3])
PERM, KEEP = torch.arange(SHAPE[1]).flip(0)[None], torch.ones(1, SHAPE[1], dtype=torch.bool)


class Work(NamedTuple):
    """A row of the page's table of floors, and a call with a launch of this kind."""

    row: str
    operator: str
    kernel: str  # without dtype and order
    call: Callable[..., Any]
    given: tuple[Any, ...]
    options: dict[str, Any]
    once: bool = True  # no element of an input is loaded twice


def works(dtype: torch.dtype, order: str) -> Iterator[Work]:
    def maps(count: int, channels: int = SHAPE[1]) -> list[Tensor]:
        shape = (SHAPE[0], channels, *SHAPE[2:])
        return [torch.rand(shape).to(dtype).to(memory_format=FORMATS[order]) for _ in range(count)]

    pair, heads, weight = maps(2), (*maps(1), *maps(2, 2)), torch.rand(SHAPE[0], *SHAPE[2:])
    one, wide = pair[:1], torch.promote_types(dtype, torch.float32)
    forward = ("refine", "refine_forward", refine)
    backward = ("refine", "refine_backward", refine_backward)
    adjoint = ("refine", "refine_adjoint", refine_backward)
    dots = ("refine", "refine_dots", refine_dots)
    loss = ("masked_mse", "masked_mse", masked_mse)
    scale = ("masked_mse", "masked_mse_scale", masked_mse_scale)
    scan = ("areas", "areas_scan", areas)
    plans = ops.Plan(theta=torch.stack([THETA] * 3))
    moved, noisy = {"theta": THETA}, {"theta": THETA, "sigma": SIGMA}
    unit, three = (torch.tensor(factor, dtype=wide) for factor in (1.0, 3.0))
    yield Work("refine forward, nothing moved", *forward, one, {"perm": PERM, "keep": KEEP})
    yield Work("refine forward, resampled", *forward, one, moved, once=False)
    yield Work("refine forward, with noise", *forward, one, noisy, once=False)
    yield Work("refine backward: theta, sigma, straight", *backward, pair, noisy, once=False)
    yield Work("refine backward: straight alone", *backward, pair, {"straight": SIGMA})
    yield Work("refine backward: features", *adjoint, pair, noisy, once=False)
    yield Work("refine_dots, V plans", *dots, (*pair, plans), {}, once=False)
    yield Work("masked_mse, loss and gradient", *loss, (*pair, weight), {})
    yield Work("masked_mse, loss alone", *loss, (*pair, weight), {"gradient": False})
    yield Work("masked_mse_scale, upstream one", *scale, (*one, unit), {})
    yield Work("masked_mse_scale, another upstream", *scale, (*one, three), {})
    yield Work("areas, heads 64 x 100 x 56 x 56 (80.3 MB)", *scan, heads, {}, once=False)


def floors() -> dict[str, tuple[int, int]]:
    """Maps in and maps out, by row."""
    page = (ROOT / "docs/gpu.md").read_text().split("## Floors")[1].split("## Gates")[0]
    found = re.findall(r"^\| ([^|]+?) \| (\d) \+ (\d) \|", page, re.M)
    return {row: (int(read), int(written)) for row, read, written in found}


ROWS = [work.row for work in works(torch.float32, "planes")]


def traffic(cuda: MockMemory, work: Work, dtype: str) -> tuple[int, list[Traffic]]:
    """The bytes of a map, and what the launch did with each map of that size."""
    cuda.driver.use_library(traced(work.operator))
    work.call(cuda, *work.given, **work.options)
    size = work.given[0].nbytes
    launch = [
        each for each in cuda.driver.traffic() if each.kernel.startswith(f"{work.kernel}_{dtype}")
    ]
    return size, [each for each in launch if each.size == size]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("order", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_moved_are_those_of_the_page(
    dtype: str, order: str, row: str, cuda: MockMemory
) -> None:
    work = next(work for work in works(DTYPES[dtype], order) if work.row == row)
    size, seen = traffic(cuda, work, dtype)
    read, written = floors()[row]

    def total(what: str) -> float:
        return sum(getattr(each, what) for each in seen) / size

    assert total("written") == total("kept") == written, "each output element is written once"
    # theta leaves out a little at the borders, a hole what it covers
    assert 0.97 * read <= total("distinct") <= read, "from memory, with a cache that keeps all"
    # from the second-level cache: the neighbours' corners and windows, once more for each block
    of_heads = work.kernel == "areas_scan" and order == "lanes"
    again = 0.75 if of_heads else 0.0 if work.once else 0.25
    assert total("fetched") <= read + again, "of a map, as the page says"
    if work.once:
        assert total("read") <= read, "no element is loaded twice"
    else:
        assert total("read") > total("fetched"), "corners and windows are loaded again"


def test_every_floor_is_counted() -> None:
    assert set(ROWS) == set(floors())


@pytest.mark.parametrize("path, row", [
    ("refine/kernel.cu", "refine forward, with noise"),
    ("refine/backward.cuh", "refine backward: theta, sigma, straight"),
    ("refine/adjoint.cuh", "refine backward: features"),
    ("refine/dots.cuh", "refine_dots, V plans"),
    ("masked_mse/kernel.cu", "masked_mse, loss and gradient"),
    ("areas/kernel.cu", "areas, heads 64 x 100 x 56 x 56 (80.3 MB)"),
])  # fmt: skip
def test_the_kernels_comments_state_the_same(path: str, row: str) -> None:
    comment = (ROOT / "src/ops" / path).read_text().split("// Bytes an element:")[1]
    (stated,) = re.findall(r"\((\d) maps?\b", comment)[:1]
    assert int(stated) == sum(floors()[row])
