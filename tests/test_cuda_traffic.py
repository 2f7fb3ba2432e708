"""The bytes that each kernel moves are those that docs/gpu.md and the kernels' comments state.

Every access of the emulated kernels to a map is counted; what is small beside it (weights, plans) is not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from emulated import ROOT
from emulated_areas import areas
from emulated_mse import masked_mse, scale
from emulated_refine import refine, refine_backward, refine_dots
from emulated_traffic import TracedLibrary, Traffic
from torch import Tensor

from sokd import ops

SHAPE = (2, 32, 24, 24)
FORMATS = {"planes": torch.contiguous_format, "lanes": torch.channels_last}
THETA, SIGMA = torch.tensor([[[0.97, 0.1, 0.05], [-0.1, 1.02, -0.04]]]), torch.tensor([0.3])
PERM, KEEP = torch.arange(SHAPE[1]).flip(0)[None], torch.ones(1, SHAPE[1], dtype=torch.bool)


class Work(NamedTuple):
    """A row of the page's floors, and a kernel's launch that is of this kind."""

    row: str
    operator: str
    kernel: str  # without dtype and order
    launch: Callable[..., Any]
    given: tuple[Any, ...]
    options: dict[str, Any]
    once: bool = True  # no element of an input is loaded twice


def works(dtype: torch.dtype, order: str) -> Iterator[Work]:
    def maps(count: int, channels: int = SHAPE[1]) -> list[Tensor]:
        shape = (SHAPE[0], channels, *SHAPE[2:])
        return [torch.rand(shape).to(dtype).to(memory_format=FORMATS[order]) for _ in range(count)]

    pair, heads, weight = maps(2), (*maps(1), *maps(2, 2)), torch.rand(SHAPE[0], *SHAPE[2:])
    one, flat = pair[:1], (pair[0].flatten(),)
    forward, backward = (
        ("refine", "refine_forward", refine),
        ("refine", "refine_backward", refine_backward),
    )
    adjoint = ("refine", "refine_adjoint", refine_backward)
    plans = ops.Plan(theta=torch.stack([THETA] * 3))
    moved, noisy = {"theta": THETA}, {"theta": THETA, "sigma": SIGMA}
    loss, by = ("masked_mse", "masked_mse", masked_mse), ("masked_mse", "masked_mse_scale", scale)
    yield Work("refine forward, nothing moved", *forward, one, {"perm": PERM, "keep": KEEP})
    yield Work("refine forward, resampled", *forward, one, moved, once=False)
    yield Work("refine forward, with noise", *forward, one, noisy, once=False)
    yield Work("refine backward: theta, sigma, straight", *backward, pair, noisy, once=False)
    yield Work("refine backward: straight alone", *backward, pair, {"straight": SIGMA})
    yield Work(
        "refine backward: features", *adjoint, pair, noisy | {"wants_features": True}, once=False
    )
    yield Work(
        "refine_dots, V plans", "refine", "refine_dots", refine_dots, (*pair, plans), {}, once=False
    )
    yield Work("masked_mse, loss and gradient", *loss, (*pair, weight), {})
    yield Work("masked_mse, loss alone", *loss, (*pair, weight), {"gradient": False})
    yield Work("masked_mse_scale, upstream one", *by, (*flat, 1.0), {})
    yield Work("masked_mse_scale, another upstream", *by, (*flat, 3.0), {})
    yield Work(
        "areas, heads 64 x 100 x 56 x 56 (80.3 MB)",
        "areas",
        "areas_scan",
        areas,
        heads,
        {},
        once=False,
    )


def floors() -> dict[str, tuple[int, int]]:
    """Maps in and maps out, by row."""
    page = (ROOT / "docs/gpu.md").read_text().split("## Floors")[1].split("## Gates")[0]
    return {row: (int(read), int(written)) for row, read, written in FLOOR.findall(page)}


FLOOR = re.compile(r"^\| ([^|]+?) \| (\d) \+ (\d) \|", re.M)
ROWS = [work.row for work in works(torch.float32, "planes")]


def traffic(work: Work) -> tuple[int, list[Traffic]]:
    """The bytes of a map, and what the launch did with each of its maps but the weight."""
    size = work.given[0].numel() * work.given[0].element_size()
    few = {
        f"{part}{of}": size // SHAPE[1] * 2
        for part in ("size", "offset")
        for of in ("", "_teacher")
    }
    few["weight"] = torch.Size(SHAPE).numel() // SHAPE[1] * 4
    library = TracedLibrary(work.operator, size, gradient=size, **few)
    work.launch(*work.given, **work.options, kernels=library, align=64)
    names = {work.kernel, *(f"{work.kernel}_{order}" for order in FORMATS)}
    (seen,) = (maps for name, maps in library.seen.items() if name in names)
    return size, [counts for name, counts in seen.items() if name not in few]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("order", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_bytes_moved_are_those_of_the_page(dtype: torch.dtype, order: str, row: str) -> None:
    work = next(work for work in works(dtype, order) if work.row == row)
    size, seen = traffic(work)
    read, written = floors()[row]
    total = Traffic(*(sum(column) / size for column in zip(*seen, strict=True)))
    assert total.written == total.kept == written, "each element of an output is written once"
    # theta leaves out a little at the borders, a hole what it covers
    assert 0.97 * read <= total.distinct <= read, "from memory, if the caches forget nothing"
    # from the second-level cache: for each block once more what its neighbours had, corners and windows
    of_heads = work.kernel == "areas_scan" and order == "lanes"
    assert total.fetched <= read + (0.75 if of_heads else 0.0 if work.once else 0.25), (
        "of a map, as the page says"
    )
    if work.once:
        assert total.read <= read, "no element is loaded twice"
    else:
        assert total.read > total.fetched, "corners and windows are, from the first-level cache"


def test_every_floor_is_counted() -> None:
    assert set(ROWS) == set(floors())


@pytest.mark.parametrize(
    "path, row",
    [
        ("refine/kernel.cu", "refine forward, with noise"),
        ("refine/backward.cuh", "refine backward: theta, sigma, straight"),
        ("refine/adjoint.cuh", "refine backward: features"),
        ("refine/dots.cuh", "refine_dots, V plans"),
        ("masked_mse/kernel.cu", "masked_mse, loss and gradient"),
        ("areas/kernel.cu", "areas, heads 64 x 100 x 56 x 56 (80.3 MB)"),
    ],
)
def test_the_kernels_comments_state_the_same(path: str, row: str) -> None:
    comment = (ROOT / "src/ops" / path).read_text().split("// Bytes an element:")[1]
    (stated,) = re.findall(r"\((\d) maps?\b", comment)[:1]
    assert int(stated) == sum(floors()[row])
