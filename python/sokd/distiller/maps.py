"""Any layer's output as a map [B, C, H, W], and which pairs of them can be distilled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sokd.kd.adapter import Size, tokens_to_map

__all__ = ["Grid", "Layout", "as_map", "batch_size", "check_pair", "same_aspect"]

ORDERS = ("BCHW", "BHWC")
Grid = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """How one layer's features lie: see `sokd.kd.adapter.tokens_to_map`, and the order of four dimensions."""

    tokens: int | None = None
    grid: Size | None = None
    order: str = "BCHW"


def as_map(features: Tensor, layout: Layout, name: str) -> Tensor:
    """features as [B, C, H, W]: maps, tokens [B, N, C], vectors [B, C] (as 1x1 maps); a view.

    Raises:
        TypeError, ValueError: `Distiller: {name} must {rule}, got {value}`.
    """
    if not features.is_floating_point():
        raise TypeError(f"Distiller: {name} must be floating point, got {features.dtype}")
    rank = features.dim()
    if rank not in (2, 3, 4) or 0 in features.shape[1:]:
        rule = "be a map [B, C, H, W], tokens [B, N, C] or a vector [B, C]"
        raise ValueError(f"Distiller: {name} must {rule}, got {list(features.shape)}")
    if rank == 2:
        return features[:, :, None, None]
    if rank == 4:
        return features.movedim(3, 1) if layout.order == "BHWC" else features
    return tokens_to_map(
        features, tokens=layout.tokens, grid=layout.grid, op="Distiller", name=name
    )


def check_pair(student: Tensor, teacher: Tensor, names: tuple[str, str]) -> None:
    """Refuse two maps that an adapter would fit together without a reason to.

    Raises:
        ValueError: of other batches; one a vector and the other a map; of another aspect, by more than the
            rounding of strides: a transposed map, dimensions in another order, or a wrong grid of tokens.
    """
    (of_student, of_teacher), shape = names, list(student.shape)
    wanted: str | None = None
    if student.shape[0] != teacher.shape[0]:
        wanted = f"have the batch size of {of_teacher}, {teacher.shape[0]}"
    elif (student.shape[2:].numel() == 1) != (teacher.shape[2:].numel() == 1):
        wanted = f"be a map where {of_teacher} is one, {list(teacher.shape)}"
    elif not same_aspect(_size(student), _size(teacher)):
        wanted = (
            f"have the aspect of {of_teacher}, {list(teacher.shape)} (name student_order='BHWC', "
            "student_grid or those of the teacher where they are not as they seem)"
        )
    if wanted:
        raise ValueError(f"Distiller: {of_student} must {wanted}, got {shape}")


def _size(features: Tensor) -> Grid:
    return features.shape[2], features.shape[3]


def same_aspect(one: Grid, other: Grid) -> bool:
    """Whether one size times a factor is the other, within a cell of either."""
    (h, w), (high, wide) = one, other
    return abs(high * w / wide - h) <= 1 or abs(h * wide / w - high) <= 1


def batch_size(x: Any) -> int | None:
    """How many samples the input holds, where that can be seen."""
    if isinstance(x, Mapping):
        x = next((value for value in x.values() if isinstance(value, Tensor)), None)
    if isinstance(x, Tensor):
        return x.shape[0] if x.dim() else None
    return len(x) if isinstance(x, (list, tuple)) else None


# ----------------------------------------------------------------------------------------- one for each pair


def layouts(side: str, pairs: int, tokens: Any, grid: Any, order: Any) -> list[Layout]:
    """The pairs' layouts from the user's options: a list has one entry for each pair."""
    given = {"tokens": tokens, "grid": grid, "order": order}
    columns = {name: _for_pairs(f"{side}_{name}", value, pairs) for name, value in given.items()}
    for value in columns["order"]:
        if value not in ORDERS:
            raise ValueError(
                f"Distiller: {side}_order must be {' or '.join(map(repr, ORDERS))}, got {value!r}"
            )
    rows: Sequence[tuple[Any, ...]] = list(zip(*columns.values(), strict=True))
    return [Layout(*row) for row in rows]


def _for_pairs(name: str, value: Any, pairs: int) -> list[Any]:
    if not isinstance(value, list):
        return [value] * pairs
    if len(value) != pairs:
        rule = f"have one entry for each of the {pairs} pairs of layers"
        raise ValueError(f"Distiller: {name} must {rule}, got {len(value)}")
    return list(value)


@contextmanager
def untouched(*models: nn.Module) -> Iterator[None]:
    """Run models in eval mode without gradients; modes and buffers are afterwards as they were."""
    parts = [(part, part.training) for model in models for part in model.modules()]
    buffers = [(buffer, buffer.clone()) for model in models for buffer in model.buffers()]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for part, training in parts:
            part.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
