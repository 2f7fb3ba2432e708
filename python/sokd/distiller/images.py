"""Images of unequal size in one padded batch: which cells of a map show image, not padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sokd.distiller.inputs import Grid

__all__ = ["Images", "inside", "only"]


@dataclass(frozen=True)
class Images:
    """The images in a padded batch x [B, C, H, W]."""

    sizes: tuple[Grid, ...]  # height and width of each image, which begins at the top left
    padded: Grid  # H and W of x

    @classmethod
    def of(cls, x: Any, sizes: Sequence[Any] | None) -> Images | None:
        """`image_sizes=` of a Distiller's call, checked; None without them.

        Raises:
            TypeError, ValueError: `Distiller: {argument} must {rule}, got {value}`.
        """
        if sizes is None:
            return None
        if not isinstance(x, Tensor) or x.dim() != 4:
            rule = "be one padded batch [B, C, H, W] where image_sizes are given"
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"Distiller: x must {rule}, got {got}")
        padded = x.shape[2], x.shape[3]
        if len(sizes) != len(x):
            rule = f"have one entry for each of the {len(x)} images"
            raise ValueError(f"Distiller: image_sizes must {rule}, got {len(sizes)}")
        for index, size in enumerate(sizes):
            if len(size) != 2 or not all(0 < a <= b for a, b in zip(size, padded, strict=True)):
                rule = f"be (height, width) of the images in x, at most {padded}"
                raise ValueError(f"Distiller: image_sizes[{index}] must {rule}, got {size}")
        return cls(tuple((int(size[0]), int(size[1])) for size in sizes), padded)

    def cells(self, features: Tensor) -> Tensor:
        """[B, 1, H, W] of ones for the cells of features [B, C, H, W] with any pixel of an image in
        them, of zeros for those of padding alone; float32."""
        grid = features.shape[2], features.shape[3]
        counts = [[math.ceil(s * g / p) for s, g, p in zip(size, grid, self.padded, strict=True)]
                  for size in self.sizes]  # fmt: skip
        height, width = torch.tensor(counts, device=features.device)[:, :, None].unbind(1)
        rows, columns = (torch.arange(side, device=features.device) for side in grid)
        held = (rows < height)[:, :, None] & (columns < width)[:, None]
        return held[:, None].to(torch.float32)


def inside(
    maps: list[Tensor], images: Images | None
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The maps [B, C, H, W] with zeros in the padding, and each one's `Images.cells`."""
    if images is None:
        return maps, [None] * len(maps)
    cells: list[Tensor | None] = [images.cells(features) for features in maps]
    return list(map(only, maps, cells)), cells


def only(features: Tensor, cells: Tensor | None) -> Tensor:
    """The features with zeros where `cells` are 0; as given without them."""
    return features if cells is None else features * cells.to(features.dtype)
