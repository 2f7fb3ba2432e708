"""Images of unequal size in one padded batch: maps with zeros in the padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sokd.methods import regions

__all__ = ["inside", "only"]


def inside(
    maps: Sequence[Tensor], image_sizes: Any, input_size: Any
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The maps [B, C, H, W] with zeros in the padding, and 1 for each one's other cells.

    Returns:
        The maps, and for each [B, 1, H, W] with 0 for cells of padding alone; the maps as given and
        None without `image_sizes`.

    Raises:
        ValueError: `Distiller: {argument} must {rule}, got {value}`.
    """
    if image_sizes is None:
        return list(maps), [None] * len(maps)
    sizes = regions.checked_sizes("Distiller", image_sizes, input_size, len(maps[0]))
    cells: list[Tensor | None] = [
        regions.inside(*sizes, features).unsqueeze(1) for features in maps
    ]
    return list(map(only, maps, cells)), cells


def only(features: Tensor, cells: Tensor | None) -> Tensor:
    """The features with zeros where `cells` are 0; as given without them."""
    return features if cells is None else features * cells.to(features.dtype)
