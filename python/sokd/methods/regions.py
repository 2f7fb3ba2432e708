"""Images of unequal size in one padded batch, and their boxes, on the cells of a map.

A map H x W of an input H_in x W_in; image b is the part h_b x w_b at the top left of it.
    cells[b,y,x] = 1 where y < ceil(h_b H / H_in) and x < ceil(w_b W / W_in), else 0
    the box (x1, y1, x2, y2) covers the cells floor(x1 W / W_in) <= x < ceil(x2 W / W_in), y alike
    density[b,y,x] = the largest 1 / (cells of the box) over the boxes that cover the cell, else 0
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sokd.ops.runtime import is_eager
from sokd.reference import accumulator

__all__ = ["Images", "checked_boxes"]

Size = tuple[int, int]  # (height, width)

_SLACK = 1.0  # pixels by which a box may leave its image: a resize rounds


@dataclass(frozen=True)
class Images:
    """The images in a padded batch."""

    sizes: tuple[Size, ...] | None  # of each image, which begins at the top left; None: no padding
    padded: Size  # of the batch, the network's input

    @classmethod
    def checked(cls, op: str, sizes: Any, padded: Any, batch: int) -> Images:
        """Make it from a user's `image_sizes` and `input_size`.

        Raises:
            ValueError: another number of images, or a size that is not (height, width) within the
                input's.
        """
        if torch.compiler.is_compiling():
            return cls(None if sizes is None else tuple(sizes), padded)
        if not _is_size(padded):
            rule = "be (height, width) of the padded input"
            raise ValueError(f"{op}: input_size must {rule}, got {padded!r}")
        padded = int(padded[0]), int(padded[1])
        if sizes is None:
            return cls(None, padded)
        if len(sizes) != batch:
            rule = f"have one entry for each of the {batch} images"
            raise ValueError(f"{op}: image_sizes must {rule}, got {len(sizes)}")
        for index, size in enumerate(sizes):
            if not _is_size(size) or size[0] > padded[0] or size[1] > padded[1]:
                rule = f"be (height, width) of the images in x, at most {padded}"
                raise ValueError(f"{op}: image_sizes[{index}] must {rule}, got {size}")
        return cls(tuple((int(size[0]), int(size[1])) for size in sizes), padded)

    def of(self, batch: int) -> Sequence[Size]:
        """The size of each image."""
        return (self.padded,) * batch if self.sizes is None else self.sizes

    def cells(self, features: Tensor) -> Tensor:
        """[B, 1, H, W] of ones for the cells of features [B, C, H, W] with any pixel of an image in
        them, of zeros for those of padding alone; float32."""
        grid = features.shape[2], features.shape[3]
        counts = [self._counts(size, grid) for size in self.of(features.shape[0])]
        height, width = torch.tensor(counts, device=features.device)[:, :, None].unbind(1)
        rows, columns = (torch.arange(side, device=features.device) for side in grid)
        held = (rows < height)[:, :, None] & (columns < width)[:, None]
        return held[:, None].to(torch.float32)

    def density(self, boxes: Sequence[Tensor], features: Tensor) -> Tensor:
        """1 / cells of the smallest box over each cell of features [B, C, H, W], 0 for background.

        Args:
            boxes: [n, 4] for each image.

        Returns:
            [B, H, W] float32 (float64 for float64 features).
        """
        grid = features.shape[2], features.shape[3]
        counts = [
            self._smallest(of_image.to(features.device), self._counts(size, grid), grid)
            for of_image, size in zip(boxes, self.of(features.shape[0]), strict=True)
        ]
        count = torch.stack(counts).to(accumulator(features.dtype))
        return torch.where(count > 0, 1 / count.clamp(min=1), 0.0)

    def _counts(self, size: Size, grid: Size) -> Size:
        """The rows and columns of a map with a pixel of the image in them; integers, so exact."""
        rows, columns = (
            -(-side * cells // of) for side, cells, of in zip(size, grid, self.padded, strict=True)
        )
        return rows, columns

    def _smallest(self, boxes: Tensor, cells: Size, grid: Size) -> Tensor:
        """The cells of the smallest box over each cell of one image, 0 without one: [H, W]."""
        if boxes.shape[0] == 0:
            return torch.zeros(grid, device=boxes.device)
        boxes = boxes.to(accumulator(boxes.dtype) if boxes.is_floating_point() else torch.float32)
        covered, counts = [], []
        for axis in (0, 1):  # rows, columns
            first, last = boxes[:, 1 - axis], boxes[:, 3 - axis]
            # multiplied before the division: exact where an edge is one of a cell
            first = (first * grid[axis] / self.padded[axis]).floor().clamp(0, cells[axis] - 1)
            last = (last * grid[axis] / self.padded[axis]).ceil().clamp(max=cells[axis])
            last = torch.maximum(last, first + 1)
            place = torch.arange(grid[axis], device=boxes.device)
            covered.append((place >= first.unsqueeze(1)) & (place < last.unsqueeze(1)))
            counts.append(last - first)
        over = covered[0].unsqueeze(2) & covered[1].unsqueeze(1)
        count = torch.where(over, (counts[0] * counts[1])[:, None, None], torch.inf).amin(0)
        return torch.where(count < torch.inf, count, 0.0)


def checked_boxes(op: str, boxes: Any, images: Images, batch: int) -> list[Tensor]:
    """One [n, 4] for each image; their values are read on the CPU only.

    Raises:
        TypeError: boxes that are not a list of tensors.
        ValueError: another number of images, boxes that are empty or leave their image by more than
            a pixel.
    """
    if not isinstance(boxes, (list, tuple)) or not all(isinstance(b, Tensor) for b in boxes):
        got = type(boxes).__name__
        if isinstance(boxes, (list, tuple)):
            got = f"{got} of {', '.join(sorted({type(each).__name__ for each in boxes}))}"
        raise TypeError(f"{op}: boxes must be a list of tensors [n, 4], one an image, got {got}")
    if len(boxes) != batch:
        rule = f"have one tensor for each of the {batch} images"
        raise ValueError(f"{op}: boxes must {rule}, got {len(boxes)}")
    _check_pixels(op, boxes, images.padded)
    for index, (of_image, size) in enumerate(zip(boxes, images.of(batch), strict=True)):
        if of_image.dim() != 2 or of_image.shape[1] != 4:
            rule = "be [n, 4], x1 y1 x2 y2 ([0, 4] for an image without boxes)"
            raise ValueError(f"{op}: boxes[{index}] must {rule}, got {list(of_image.shape)}")
        if of_image.device.type == "cpu" and of_image.numel() and is_eager(of_image):
            _check_values(op, of_image, size, index)
    return list(boxes)


def _check_pixels(op: str, boxes: Sequence[Tensor], padded: Size) -> None:
    """Raise for boxes that all lie in one pixel: shares of the sides, as DETR's and YOLO's are."""
    read = min(padded) > 2 and all(each.device.type == "cpu" for each in boxes) and is_eager(*boxes)
    # of boxes in pixels those of the first image are read
    within = read and all(((each >= 0) & (each <= 1)).all() for each in boxes)
    if within and any((each.double().frac() != 0).any() for each in boxes):
        rule = f"be in pixels of the network's input, {padded[0]} x {padded[1]} (height x width)"
        raise ValueError(f"{op}: boxes must {rule}, got none above 1, as shares of the sides are")


def _check_values(op: str, boxes: Tensor, size: Size, index: int) -> None:
    first, last = boxes[:, :2], boxes[:, 2:]
    end = torch.tensor([size[1], size[0]]) + _SLACK
    within = f"{size[0]} x {size[1]} (height x width) pixels of the network's input"
    rules = (
        ((first < last).all(1), "have x1 < x2 and y1 < y2"),
        (((first >= -_SLACK) & (last <= end)).all(1), f"lie in their image, {within}"),
    )
    for kept, rule in rules:
        if not kept.all():
            box = [round(edge, 2) for edge in boxes[~kept][0].tolist()]
            raise ValueError(f"{op}: boxes[{index}] must {rule}, got {box}")


def _is_size(size: Any) -> bool:
    pair = isinstance(size, Sequence) and not isinstance(size, str) and len(size) == 2
    return pair and all(isinstance(side, numbers.Integral) and int(side) > 0 for side in size)
