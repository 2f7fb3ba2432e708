"""Images of unequal size in one padded batch: the maps without their padding."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sokd.distiller.inputs import batch_size, input_size
from sokd.kd.features import kept
from sokd.methods.regions import Images

__all__ = ["Images", "images_of", "inside"]


def images_of(x: Any, sizes: Any, padded: Any) -> Images | None:
    """`image_sizes=` and `input_size=` of a Distiller's call, checked; None: nothing is known.

    Raises:
        TypeError, ValueError: `Distiller: {argument} must {rule}, got {value}`.
    """
    padded = input_size(x) if padded is None else padded
    if padded is None and sizes is None:
        return None
    if padded is None:
        rule = "be one padded batch [B, C, H, W] where image_sizes are given without input_size"
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"Distiller: x must {rule}, got {got}")
    return Images.checked("Distiller", sizes, padded, batch_size(x) or 0)


def inside(maps: list[Tensor], images: Images | None) -> tuple[list[Tensor], list[Tensor | None]]:
    """The maps [B, C, H, W] with zeros in the padding, and each one's `Images.cells`."""
    if images is None or images.sizes is None:
        return maps, [None] * len(maps)
    cells: list[Tensor | None] = [images.cells(features) for features in maps]
    return list(map(kept, maps, cells)), cells
