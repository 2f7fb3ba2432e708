"""Boxes and padding of a batch of images, on the cells of a map.

A map H x W of a padded input H_in x W_in; image b is the part h_b x w_b at the top left of it.
    inside[b,y,x] = 1 where y < ceil(h_b H / H_in) and x < ceil(w_b W / W_in), else 0
    the box (x1, y1, x2, y2) covers the cells floor(x1 W / W_in) <= x < ceil(x2 W / W_in), y alike
    density[b,y,x] = the largest 1 / (cells of the box) over the boxes that cover the cell, else 0
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sokd.methods.common import wide
from sokd.ops.runtime import is_eager

__all__ = ["Regions", "checked_regions", "checked_sizes", "inside"]

Size = tuple[int, int]  # (H, W)

_SLACK = 1.0  # pixels by which a box may leave its image: a resize rounds


class Regions(NamedTuple):
    """The checked boxes and sizes of a batch."""

    boxes: list[Tensor]  # [n, 4] for each image: x1, y1, x2, y2 in pixels of the padded input
    image_sizes: list[Size]  # of the images without padding
    input_size: Size  # of the padded input

    def inside(self, features: Tensor) -> Tensor:
        """1 for cells of the image, 0 for padding: [B, H, W] for features [B, C, H, W]."""
        return inside(self.image_sizes, self.input_size, features)

    def density(self, features: Tensor) -> Tensor:
        """1 / cells of the smallest box over each cell, 0 for background, as `inside`."""
        size = features.shape[2], features.shape[3]
        counts = [
            _counts(boxes.to(features.device), _cells(image, self.input_size, size), self, size)
            for boxes, image in zip(self.boxes, self.image_sizes, strict=True)
        ]
        count = torch.stack(counts).to(wide(features).dtype)
        return torch.where(count > 0, 1 / count.clamp(min=1), 0.0)


def inside(image_sizes: Sequence[Size], input_size: Size, features: Tensor) -> Tensor:
    """1 for the cells of features [B, C, H, W] that hold a pixel of their image, 0 for padding.

    Returns:
        [B, H, W], float32 (float64 for float64 features).
    """
    size, device = (features.shape[2], features.shape[3]), features.device
    cells = torch.tensor([_cells(image, input_size, size) for image in image_sizes], device=device)
    rows, columns = (
        torch.arange(side, device=device) < cells[:, axis, None] for axis, side in enumerate(size)
    )
    return (rows.unsqueeze(2) & columns.unsqueeze(1)).to(wide(features).dtype)


def _cells(image: Size, padded: Size, size: Size) -> Size:
    """The rows and columns of a map that hold a pixel of the image; integers, so exact."""
    rows, columns = (
        -(-side * cells // of) for side, cells, of in zip(image, size, padded, strict=True)
    )
    return rows, columns


def _counts(boxes: Tensor, cells: Size, regions: Regions, size: Size) -> Tensor:
    """The cells of the smallest box over each cell of one image, 0 where there is none: [H, W]."""
    if boxes.shape[0] == 0:
        return torch.zeros(size, device=boxes.device)
    boxes = wide(boxes) if boxes.is_floating_point() else boxes.to(torch.float32)
    covered, counts = [], []
    for axis in (0, 1):  # rows, columns
        first, last = boxes[:, 1 - axis], boxes[:, 3 - axis]
        # multiplied before the division: exact where an edge is one of a cell
        first = (first * size[axis] / regions.input_size[axis]).floor().clamp(0, cells[axis] - 1)
        last = (last * size[axis] / regions.input_size[axis]).ceil().clamp(max=cells[axis])
        last = torch.maximum(last, first + 1)
        place = torch.arange(size[axis], device=boxes.device)
        covered.append((place >= first.unsqueeze(1)) & (place < last.unsqueeze(1)))
        counts.append(last - first)
    over = covered[0].unsqueeze(2) & covered[1].unsqueeze(1)
    count = torch.where(over, (counts[0] * counts[1])[:, None, None], torch.inf).amin(0)
    return torch.where(count < torch.inf, count, 0.0)


# ------------------------------------------------------------------------------------------- checks


def checked_regions(
    op: str, boxes: Any, input_size: Any, image_sizes: Any, features: Tensor
) -> Regions:
    """The boxes and sizes of the batch of `features`; boxes are read on the CPU alone.

    Raises:
        TypeError: boxes that are not a list of tensors.
        ValueError: another number of images, boxes that are empty or leave their image by more than
            a pixel, sizes that do not fit.
    """
    batch = features.shape[0]
    images, padded = checked_sizes(op, image_sizes, input_size, batch)
    if not isinstance(boxes, (list, tuple)) or not all(isinstance(b, Tensor) for b in boxes):
        got = f"a list of {_kinds(boxes)}" if isinstance(boxes, list) else type(boxes).__name__
        raise TypeError(f"{op}: boxes must be a list of tensors [n, 4], one an image, got {got}")
    if len(boxes) != batch:
        rule = f"have one tensor for each of the {batch} images"
        raise ValueError(f"{op}: boxes must {rule}, got {len(boxes)}")
    for number, (of_image, size) in enumerate(zip(boxes, images, strict=True)):
        if of_image.dim() != 2 or of_image.shape[1] != 4:
            rule = "be [n, 4], x1 y1 x2 y2 ([0, 4] for an image without boxes)"
            raise ValueError(
                f"{op}: boxes must {rule}, got {list(of_image.shape)} for image {number}"
            )
        if of_image.device.type == "cpu" and of_image.numel() and is_eager(of_image):
            _check_boxes(op, of_image, size, number)
    return Regions(list(boxes), images, padded)


def _check_boxes(op: str, boxes: Tensor, size: Size, number: int) -> None:
    first, last = boxes[:, :2], boxes[:, 2:]
    end = torch.tensor([size[1], size[0]]) + _SLACK
    rules = (
        ((first < last).all(1), "have x1 < x2 and y1 < y2"),
        (
            ((first >= -_SLACK) & (last <= end)).all(1),
            f"lie in their image, {size[0]} x {size[1]} (H x W) pixels of the network's input",
        ),
    )
    for kept, rule in rules:
        if not kept.all():
            box = [round(edge, 2) for edge in boxes[~kept][0].tolist()]
            raise ValueError(f"{op}: boxes must {rule}, got {box} in image {number}")


def checked_sizes(
    op: str, image_sizes: Any, input_size: Any, batch: int
) -> tuple[list[Size], Size]:
    """(H, W) of each image and of the padded input; no `image_sizes`: nothing is padding.

    Raises:
        ValueError: no input size, another number of images, a size that is not (H, W) or that is
            larger than the input.
    """
    if not _is_size(input_size):
        rule = "be (H, W) of the padded input (a Distiller reads it from x = [B, C, H, W])"
        raise ValueError(f"{op}: input_size must {rule}, got {input_size!r}")
    padded = int(input_size[0]), int(input_size[1])
    if image_sizes is None:
        return [padded] * batch, padded
    if len(image_sizes) != batch:
        rule = f"have one (H, W) for each of the {batch} images"
        raise ValueError(f"{op}: image_sizes must {rule}, got {len(image_sizes)}")
    for number, size in enumerate(image_sizes):
        if not _is_size(size) or size[0] > padded[0] or size[1] > padded[1]:
            rule = f"be (H, W) within the input's {padded[0]} x {padded[1]}"
            raise ValueError(f"{op}: image_sizes must {rule}, got {size!r} for image {number}")
    return [(int(size[0]), int(size[1])) for size in image_sizes], padded


def _is_size(size: Any) -> bool:
    if torch.compiler.is_compiling():
        return size is not None
    pair = isinstance(size, Sequence) and not isinstance(size, str) and len(size) == 2
    return pair and all(isinstance(side, numbers.Integral) and int(side) > 0 for side in size)


def _kinds(values: Sequence[Any]) -> str:
    return ", ".join(sorted({type(value).__name__ for value in values}))
