"""Areas of interest: the k best local maxima of the heat, a box around each, the cells covered.

    heat = sqrt(heat_s * heat_t), size and offset the means, where a teacher is given
    peaks: cells of heat > 0 and >= all neighbours in the kernel; the k best of all maps, ties to
    the lower flat index
    box  = trunc(clamp(cell + offset -+ size / 2)), filled inclusively
No gradient flows through areas [method 3].
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sokd import _core, reference
from sokd.ops.checks import Array, check_kind
from sokd.ops.runtime import checked_by, has_kernel, is_eager, is_meta, register, resources
from sokd.reference import Areas, accumulator

_Maps = tuple[Tensor, Tensor, Tensor]


def _kernel(
    heat: Tensor, size: Tensor, offset: Tensor, heat_t: Tensor | None, size_t: Tensor | None,
    offset_t: Tensor | None, k: int, kernel: int,
) -> _Maps:  # fmt: skip
    outputs = _fake(heat, size, offset, heat_t, size_t, offset_t, k, kernel)
    teacher = None
    if heat_t is not None and size_t is not None and offset_t is not None:
        teacher = (heat_t, size_t, offset_t)
    _core.areas(*outputs, heat, size, offset, teacher, k, kernel, resources(heat))
    return outputs


def _fake(
    heat: Tensor, size: Tensor, offset: Tensor, heat_t: Tensor | None, size_t: Tensor | None,
    offset_t: Tensor | None, k: int, kernel: int,
) -> _Maps:  # fmt: skip
    batch, _, height, width = heat.shape
    coverage = heat.new_empty((batch, height, width), dtype=torch.float32)
    boxes = heat.new_empty((batch, k, 4), dtype=torch.int64)
    return coverage, boxes, heat.new_empty((batch, k), dtype=accumulator(heat.dtype))


_areas = register(
    "areas(Tensor heat, Tensor size, Tensor offset, Tensor? heat_t, Tensor? size_t, "
    "Tensor? offset_t, int k, int kernel) -> (Tensor, Tensor, Tensor)",
    _kernel,
    _fake,
)


def _check(
    heat: Any, size: Any, offset: Any, *, k: Any = 8, kernel: Any = 3, teacher: Any = None
) -> None:
    teacher = _three(teacher)
    if is_eager(heat, size, offset, *(teacher or ())):
        check_kind("areas", "heat", heat, size=size, offset=offset, **_named(teacher))
        _check_ints(k=k, kernel=kernel)
        _core.check_areas(heat, size, offset, teacher, k, kernel)


@checked_by(_check)
def areas(
    heat: Array, size: Array, offset: Array, *, k: int = 8, kernel: int = 3,
    teacher: tuple[Array, Array, Array] | None = None,
) -> Areas:  # fmt: skip
    """Find the k areas of highest heat in each sample, and the cells they cover.

    Args:
        heat: [B, A, H, W] in [0, 1]; float64, float32, float16 or bfloat16.
        size: [B, 2, H, W], width and height in cells; offset: [B, 2, H, W], x and y in cells.
        k: number of areas in each sample, 1 .. A*H*W.
        kernel: side of the window of a local maximum; odd.
        teacher: the teacher's heat, size and offset, for the areas that both attend to.

    Returns:
        Areas: coverage [B, H, W] float32; boxes [B, k, 4] int64, y0 x0 y1 x1 inclusive; scores
        [B, k] float32 (float64 for float64). With fewer peaks than k the missing boxes
        are (0, 0, -1, -1), which cover nothing, with score 0. A cell of heat 0 is no peak (a map of
        zeros has none), nor is a NaN, nor are a NaN's neighbours.

    NumPy arrays give NumPy arrays. Source: method 3 [P, A]; ties and missing peaks settled here.
    """
    teacher = _three(teacher)
    _check_ints(k=k, kernel=kernel)
    if isinstance(heat, np.ndarray):
        return _areas_numpy(heat, size, offset, k, kernel, teacher)
    served = has_kernel(heat)
    if not served or is_meta(heat, size, offset, *(teacher or ())):
        _check(heat, size, offset, k=k, kernel=kernel, teacher=teacher)
    if not served:
        return reference.areas(heat, size, offset, k=k, kernel=kernel, teacher=teacher)
    maps = [part.detach() for part in (heat, size, offset, *(teacher or ()))]
    return Areas(*_areas(*maps, *([] if teacher else [None] * 3), k, kernel))


def _check_ints(**values: Any) -> None:
    """Raise for values that are not ints of 64 bits; the schema would convert a tensor."""
    for name, value in values.items():
        if isinstance(value, torch.SymInt):
            continue
        if not isinstance(value, (int, np.integer)):
            raise TypeError(f"areas: {name} must be an int, got {type(value).__name__}")
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"areas: {name} must fit in 64 bits, got {value}")


def _three(teacher: Any) -> Any:
    if teacher is None:
        return None
    if not isinstance(teacher, (tuple, list)) or len(teacher) != 3:
        found = (
            f"{len(teacher)} of them"
            if isinstance(teacher, (tuple, list))
            else type(teacher).__name__
        )
        raise TypeError(f"areas: teacher must be three maps (heat, size, offset), got {found}")
    return tuple(teacher)


def _named(teacher: Any) -> dict[str, Any]:
    return (
        {} if teacher is None else dict(zip(("heat_t", "size_t", "offset_t"), teacher, strict=True))
    )


def _areas_numpy(heat: Any, size: Any, offset: Any, k: int, kernel: int, teacher: Any) -> Areas:
    batch, _, height, width = heat.shape
    coverage: Any = np.empty((batch, height, width), np.float32)
    boxes: Any = np.empty((batch, k, 4), np.int64)
    scores: Any = np.empty((batch, k), accumulator(heat.dtype))
    outputs = (coverage, boxes, scores)
    _core.areas(*outputs, heat, size, offset, teacher, k, kernel, resources(heat))
    return Areas(*outputs)
