"""`areas` through the emulator: what the host does, in Python."""

from __future__ import annotations

import torch
from emulated import (
    I64,
    NAMES,
    U64,
    Library,
    Map,
    Memory,
    Placed,
    is_lanes,
    library,
    map_of,
    structure,
)
from torch import Tensor

from sokd.reference import Areas

Structure = structure(
    "Areas",
    heat=Map,
    size=Map,
    offset=Map,
    heat_teacher=Map,
    size_teacher=Map,
    offset_teacher=Map,
    batch=I64,
    maps=I64,
    height=I64,
    width=I64,
    k=I64,
    kernel=I64,
    chunks=I64,
    kept=I64,
    wide=I64,
    candidate_scores=U64,
    candidate_cells=U64,
    coverage=U64,
    boxes=U64,
    scores=U64,
)


def areas(
    heat: Tensor,
    size: Tensor,
    offset: Tensor,
    *,
    k: int = 8,
    kernel: int = 3,
    teacher: tuple[Tensor, Tensor, Tensor] | None = None,
    kernels: Library | None = None,
    align: int = 16,
) -> Areas:
    """Coverage, boxes and scores."""
    kernels = kernels or library("areas")
    maps = [Placed(part, align=align) for part in (heat, size, offset, *(teacher or ()))]
    batch, channels, height, width = heat.shape
    order = "lanes" if is_lanes(heat) else "planes"
    wide = _is_wide(order, [maps[0], *maps[3:4]])
    chunks, kept = -(-channels * height * width // 2048), min(k, 2048)
    score = torch.float64 if heat.dtype == torch.float64 else torch.float32
    outputs = [
        Placed(torch.empty(batch, height, width), fill=False),
        Placed(torch.empty(batch, k, 4, dtype=torch.int64), fill=False),
        Placed(torch.empty(batch, k, dtype=score), fill=False),
    ]
    room = [
        Memory(batch * chunks * kept * bytes_each, align=8) for bytes_each in (score.itemsize, 8)
    ]
    args = Structure(
        *(map_of(placed) for placed in maps),
        *(Map() for _ in range(6 - len(maps))),
        batch,
        channels,
        height,
        width,
        k,
        kernel,
        chunks,
        kept,
        wide,
        *(memory.pointer for memory in room),
        *(placed.pointer for placed in outputs),
    )
    kernels.launch(f"areas_scan_{NAMES[heat.dtype]}_{order}", batch * chunks, args)
    kernels.launch(f"areas_pick_{NAMES[heat.dtype]}", batch, args)
    return Areas(*(placed.read() for placed in outputs))


def _is_wide(order: str, heats: list[Placed]) -> bool:
    vector = 16 // heats[0].like.element_size()
    _, channels, height, width = heats[0].like.shape
    if any(placed.pointer % 16 for placed in heats):
        return False
    if order == "planes":
        return channels * height * width % vector == 0 and all(
            placed.like.is_contiguous() for placed in heats
        )
    last = torch.channels_last
    return channels % vector == 0 and all(
        placed.like.is_contiguous(memory_format=last) for placed in heats
    )
