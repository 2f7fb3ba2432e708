"""Batches of inputs: the number of samples and the size of the images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Given", "Grid", "batch_size", "input_size", "is_input", "kinds"]

Grid = tuple[int, int]


@dataclass(frozen=True)
class Given:
    """Properties of the inputs of a forward pass; None for an unknown one."""

    batches: frozenset[int] | None = None  # the possible batch sizes of a layer
    image: Grid | None = None  # height and width of the images
    sequence: bool = False  # whether the inputs are tensors but not images
    clips: frozenset[int] = frozenset()  # the batch sizes of videos and volumes
    words: frozenset[int] = frozenset()  # the lengths of sequences next to images

    @classmethod
    def of(cls, x: Any) -> Given:
        """Read the properties from the tensors in x.

        The frames [B, T, ...] of a video may count as samples, and so may the samples of several
        tensors together.
        """
        tensors, images = _tensors(x), _images(x)
        if not tensors:
            return cls()
        if isinstance(x, (list, tuple)) and tensors[0].dim() < 4:
            batches = {len(x)}
        else:
            batches = {each.shape[0] for each in tensors if each.dim()}
            batches |= {sum(each.shape[0] for each in images)} if images else set()
            batches |= {each.shape[0] * each.shape[1] for each in images if each.dim() == 5}
        clips = frozenset(each.shape[0] for each in images if each.dim() == 5)
        if not images:
            return cls(frozenset(batches), sequence=True)
        sides = zip(*(each.shape[-2:] for each in images), strict=True)
        height, width = (max(side) for side in sides)  # a list of images is padded
        words = frozenset(
            each.shape[1]
            for each in tensors
            if each.dim() == 2 and each.dtype in (torch.int32, torch.int64)
        )
        return cls(frozenset(batches), (height, width), clips=clips, words=words)

    def has_grid(self, tokens: Tensor) -> bool:
        """Whether tokens [B, N, C] may be cells of the images, as far as the inputs are known."""
        batch, count = tokens.shape[:2]
        return not (self.sequence or batch in self.clips or count in self.words)


def _tensors(x: Any) -> list[Tensor]:
    """The tensors in x whose shape is known: a nested one has none."""
    values = x.values() if isinstance(x, Mapping) else x if isinstance(x, (list, tuple)) else [x]
    return [each for each in values if isinstance(each, Tensor) and not each.is_nested]


def _images(x: Any) -> list[Tensor]:
    ranks = (3, 4, 5) if isinstance(x, (list, tuple)) else (4, 5)
    return [each for each in _tensors(x) if each.dim() in ranks]


def batch_size(x: Any) -> int | None:
    """The number of samples in the input; None where it is unknown."""
    if isinstance(x, Mapping):
        x = next((value for value in x.values() if isinstance(value, Tensor)), None)
    if isinstance(x, Tensor):
        return x.size(0) if x.dim() else None
    return len(x) if isinstance(x, (list, tuple)) else None


def input_size(x: Any) -> Grid | None:
    """The height and width of the one batch of images [B, C, H, W] in the input; None: no such."""
    images = [] if isinstance(x, (list, tuple)) else _images(x)
    if len(images) != 1 or images[0].dim() != 4:
        return None
    return images[0].shape[2], images[0].shape[3]


def is_input(x: Any) -> bool:
    """Whether x can be a model's input: a tensor, keywords, or images, which have one rank."""
    if isinstance(x, (list, tuple)):
        return all(isinstance(each, Tensor) for each in x) and len({each.dim() for each in x}) == 1
    return isinstance(x, (Tensor, Mapping))


def kinds(x: Any) -> str:
    """The type of x, with the types in a list or tuple and the keys of a dict, for an error."""
    kind = type(x).__name__
    if isinstance(x, Mapping):
        return f"{kind} of {', '.join(map(repr, x))}"
    if not isinstance(x, (list, tuple)):
        return kind
    return f"{kind} of {', '.join(type(each).__name__ for each in x[:3])}"
