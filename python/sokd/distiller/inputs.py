"""What a batch of inputs is: how many samples, how large the images, and copies of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sokd.ops.torch_internals import version

__all__ = ["Given", "Grid", "batch_size", "changed", "copied", "input_size", "is_input", "kinds"]

Grid = tuple[int, int]


@dataclass(frozen=True)
class Given:
    """What is known of the inputs of a forward pass; None for what is not."""

    batches: frozenset[int] | None = None  # the batch sizes that a layer may have
    image: Grid | None = None  # height and width of the images
    sequence: bool = False  # whether the inputs are tensors, and no images

    @classmethod
    def of(cls, x: Any) -> Given:
        """Read from the tensors in x.

        Frames [B, T, ...] of a video may be samples, and so may the samples of several tensors
        together.
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
        if not images:
            return cls(frozenset(batches), sequence=True)
        sides = zip(*(each.shape[-2:] for each in images), strict=True)
        height, width = (max(side) for side in sides)  # a list of images is padded
        return cls(frozenset(batches), (height, width))


def _tensors(x: Any) -> list[Tensor]:
    values = x.values() if isinstance(x, Mapping) else x if isinstance(x, (list, tuple)) else [x]
    return [each for each in values if isinstance(each, Tensor)]


def _images(x: Any) -> list[Tensor]:
    ranks = (3, 4, 5) if isinstance(x, (list, tuple)) else (4, 5)
    return [each for each in _tensors(x) if each.dim() in ranks]


def batch_size(x: Any) -> int | None:
    """How many samples the input holds, where that can be seen."""
    if isinstance(x, Mapping):
        x = next((value for value in x.values() if isinstance(value, Tensor)), None)
    if isinstance(x, Tensor):
        return x.shape[0] if x.dim() else None
    return len(x) if isinstance(x, (list, tuple)) else None


def input_size(x: Any) -> Grid | None:
    """The height and width of the one batch of images [B, C, H, W] in the input; None: no such."""
    images = [] if isinstance(x, (list, tuple)) else _images(x)
    if len(images) != 1 or images[0].dim() != 4:
        return None
    return images[0].shape[2], images[0].shape[3]


def copied(x: Any) -> Any:
    """x with copies of its tensors, in dicts, lists and tuples too."""
    return _mapped(x, lambda tensor: tensor.clone())


def _mapped(x: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, Mapping):
        return {key: _mapped(value, change) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        values = [_mapped(value, change) for value in x]
        return type(x)(*values) if hasattr(x, "_fields") else type(x)(values)
    return x


def changed(x: Any) -> Callable[[], bool]:
    """A function that tells whether a tensor in x has been written to since."""
    tensors: list[Tensor] = []
    _mapped(x, tensors.append)
    seen = [(tensor, version(tensor)) for tensor in tensors]
    return lambda: any(version(tensor) != before for tensor, before in seen)


def is_input(x: Any) -> bool:
    """Whether models take such a thing: a tensor, keywords, images (which have one rank)."""
    if isinstance(x, (list, tuple)):
        return all(isinstance(each, Tensor) for each in x) and len({each.dim() for each in x}) == 1
    return isinstance(x, (Tensor, Mapping))


def kinds(x: Any) -> str:
    """The type of x, and those in a list or tuple, as an error names them."""
    kind = type(x).__name__
    if not isinstance(x, (list, tuple)):
        return kind
    return f"{kind} of {', '.join(type(each).__name__ for each in x[:3])}"
