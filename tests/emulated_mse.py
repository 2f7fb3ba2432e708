"""`masked_mse` through the emulator: what the host does, in Python."""

from __future__ import annotations

import torch
from emulated import (
    DTYPES,
    I64,
    NAMES,
    REAL,
    U64,
    Grid,
    Library,
    Map,
    Placed,
    grid_of,
    is_lanes,
    is_wide,
    library,
    map_of,
    scratch,
    structure,
)
from torch import Tensor

from sokd.reference import layout_of

MaskedMse = structure(
    "MaskedMse",
    student=Map,
    teacher=Map,
    d_student=Map,
    weight=Map,
    grid=Grid,
    weight_dtype=I64,
    area=I64,
    scale=REAL,
    divisor=REAL,
    factor=REAL,
    partials=U64,
    areas=U64,
    norm=U64,
    loss=U64,
    loss_dtype=I64,
    blocks=I64,
    area_blocks=I64,
    wide=I64,
)

Scale = structure(
    "Scale", gradient=U64, count=I64, upstream=U64, upstream_dtype=I64, blocks=I64, wide=I64
)


def masked_mse(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None = None,
    *,
    normalise: str = "elements",
    scale: float = 1.0,
    gradient: bool = True,
    kernels: Library | None = None,
    align: int = 16,
) -> tuple[Tensor, Tensor | None]:
    """Loss and gradient, in the layout that the operator gives it; `align` below 16: unaligned pointers."""
    kernels = kernels or library("masked_mse")
    maps = [Placed(student, align=align), Placed(teacher, align=align)]
    if gradient:
        like = torch.empty_like(student, memory_format=layout_of(student))
        maps.append(Placed(like, align=align, fill=False))
    order = "lanes" if is_lanes(maps[-1].like if gradient else student) else "planes"
    wide = is_wide(order, maps)
    grid, blocks = grid_of(order, student)
    if weight is not None and weight.dim() == 4:
        weight = weight[:, 0]
    weights = None if weight is None else Placed(weight, align=1)
    area = weights is not None and normalise == "area"
    numel = student.numel()
    area_blocks = min(max(-(-(numel // max(student.shape[1], 1)) // 4096), 1), 128)
    loss = Placed(
        torch.empty((), dtype=torch.float64 if student.dtype == torch.float64 else torch.float32),
        fill=False,
    )
    room = [scratch(blocks), scratch(area_blocks), scratch(3)]
    args = MaskedMse(
        map_of(maps[0]),
        map_of(maps[1]),
        map_of(maps[2] if gradient else None),
        map_of(weights),
        grid,
        0 if weight is None else DTYPES.index(weight.dtype),
        area,
        scale,
        numel,
        2 * scale / numel if numel else 0,
        *(memory.pointer for memory in room),
        loss.pointer,
        DTYPES.index(loss.like.dtype),
        blocks,
        area_blocks,
        wide,
    )
    if area:
        kernels.launch("masked_mse_area", area_blocks, args)
        kernels.launch("masked_mse_norm", 1, args)
    kernels.launch(f"masked_mse_{NAMES[student.dtype]}_{order}", blocks, args)
    kernels.launch("masked_mse_finish", 1, args)
    return loss.read(), maps[2].read() if gradient else None


def scale(
    gradient: Tensor,
    upstream: float,
    kernels: Library | None = None,
    *,
    align: int = 16,
    blocks: int | None = None,
    nowhere: bool = False,
) -> Tensor:
    """gradient * upstream, of a flat gradient; `nowhere`: in memory that must not be touched."""
    memory = Placed(gradient, align=align)
    factor = Placed(
        torch.tensor(upstream, dtype=torch.promote_types(gradient.dtype, torch.float32))
    )
    if blocks is None:
        blocks = min(-(-gradient.numel() // (1024 * max(4, 16 // gradient.element_size()))), 2048)
    args = Scale(
        4096 if nowhere else memory.pointer,
        gradient.numel(),
        factor.pointer,
        DTYPES.index(factor.like.dtype),
        blocks,
        memory.pointer % 16 == 0,
    )
    name = f"masked_mse_scale_{NAMES[gradient.dtype]}"
    (kernels or library("masked_mse")).launch(name, blocks, args)
    return memory.read()[: gradient.numel()]
