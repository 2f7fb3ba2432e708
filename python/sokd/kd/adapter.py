"""The adapter Phi: the student's features in the teacher's channels and cells, tokens included.

Source: docs/method.md 1, after the authors' prototype: size-matching convolution + BN + ReLU, then two 3x3
convolutions + BN + ReLU. Settled here, where the prototype raises for all but a few ratios: which convolution
matches which sizes (`Adapter`), what happens at any other ratio (`resize`), and tokens (`tokens_to_map`).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Adapter", "positive", "resize", "tokens_to_map"]

Size = tuple[int, int]

# class token, class + distillation token, four registers without and with a class token
_USUAL_PREFIXES = (0, 1, 2, 4, 5)


class Adapter(nn.Module):
    """Student features [B, C_s, H_s, W_s] -> [B, C, H, W]: three convolutions, each + BN + ReLU.

    The first matches the sizes, on each axis by itself (settled here); the others are 3x3:

    ============================  =================================================================
    sizes given at construction   convolution
    ============================  =================================================================
    student = r * teacher, r > 1  strided: kernel r rounded up to odd, stride r
    teacher = r * student, r > 1  transposed: kernel r + 2 * (r // 2), stride r
    equal, other ratios, unknown  1x1, after `resize` to the teacher's cells where they differ
    ============================  =================================================================

    Without sizes the parameters are the same whatever arrives, so an optimiser made before the first batch
    holds them all. Maps of another ratio than the adapter was made for are resized after the convolution.

    Args:
        student_channels: C_s.
        teacher_channels: C, also of the hidden layers.
        student_size: (height, width) of the student's map, or one number for both; None: not known.
        teacher_size: the same for the teacher; both or neither.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        student_size: int | Size | None = None,
        teacher_size: int | Size | None = None,
    ) -> None:
        super().__init__()
        if (student_size is None) != (teacher_size is None):
            raise ValueError(
                "Adapter: student_size and teacher_size must be given together, "
                f"got {student_size} and {teacher_size}"
            )
        self.student_channels = positive("Adapter", "student_channels", student_channels)
        self.teacher_channels = positive("Adapter", "teacher_channels", teacher_channels)
        self.match = _size_matching(
            student_channels,
            teacher_channels,
            as_size("student_size", student_size),
            as_size("teacher_size", teacher_size),
        )
        self.norm = nn.BatchNorm2d(teacher_channels)
        self.body = nn.Sequential(
            *_conv_norm_relu(teacher_channels), *_conv_norm_relu(teacher_channels)
        )

    def forward(self, features: Tensor, size: Size | None = None) -> Tensor:
        """features [B, C_s, H_s, W_s] -> [B, C, *size]; `size` None: what the convolution gives.

        Dtype and memory format are the convolution's own (autocast applies, channels_last is kept).
        """
        if size is not None and self.match.kernel_size == (1, 1):
            features = resize(features, size)  # a 1x1 convolution and a resize commute
        matched = self.match(features)
        if size is not None:
            matched = resize(matched, size)
        return cast(Tensor, self.body(F.relu(self.norm(matched), inplace=True)))

    def extra_repr(self) -> str:
        return f"{self.student_channels} -> {self.teacher_channels}"


def resize(features: Tensor, size: Size) -> Tensor:
    """features [B, C, H, W] -> [B, C, *size]; equal sizes: the tensor itself.

    Settled here: where neither axis grows, the mean of the cells each new cell covers (`adaptive_avg_pool2d`,
    no aliasing), otherwise bilinear with align_corners=False.
    """
    height, width = features.shape[-2:]
    if (height, width) == tuple(size):
        return features
    if size[0] <= height and size[1] <= width:
        return F.adaptive_avg_pool2d(features, size)
    return F.interpolate(features, size=size, mode="bilinear", align_corners=False)


def tokens_to_map(
    features: Tensor,
    *,
    tokens: int | None = None,
    grid: Size | None = None,
    op: str = "tokens_to_map",
    name: str = "features",
) -> Tensor:
    """Tokens [B, N, C] as a map [B, C, H, W]: a view, laid out as channels_last. Maps pass through.

    Args:
        features: [B, N, C]; the first `tokens` of the N are class, distillation and register tokens.
        tokens: how many to drop; None: N - H*W with a `grid`, else the 0, 1, 2, 4 or 5 that leave a square.
        grid: (H, W); None: the square.
        op, name: for the error's words.

    Raises:
        ValueError: N does not fit. A grid that is not square has to be named, never guessed: [8, 7] with 56
            tokens would pass for a 7 x 7 grid with 7 registers.
    """
    if features.dim() == 4:
        return features
    count = features.shape[1]
    prefix, (height, width) = _token_layout(count, tokens, grid, op, name)
    maps: Tensor = features[:, prefix:].transpose(1, 2).unflatten(2, (height, width))  # type: ignore[no-untyped-call]
    return maps


def _token_layout(
    count: int, tokens: int | None, grid: Size | None, op: str, name: str
) -> tuple[int, Size]:
    """How many prefix tokens there are, and the grid of the others."""
    if grid is not None:
        prefix = count - grid[0] * grid[1]
        fits = prefix >= 0 and tokens in (None, prefix)
        before = "any prefix tokens" if tokens is None else f"{tokens} prefix tokens"
        rule = f"{before} and a {grid[0]} x {grid[1]} grid"
    else:
        side = math.isqrt(max(count - (tokens or 0), 0))
        prefix, grid = count - side * side, (side, side)
        fits = side > 0 and (prefix in _USUAL_PREFIXES if tokens is None else prefix == tokens)
        before = "0, 1, 2, 4 or 5 prefix tokens" if tokens is None else f"{tokens} prefix tokens"
        rule = f"{before} and a square grid (or name tokens and grid)"
    if fits:
        return prefix, grid
    raise ValueError(f"{op}: {name} must hold {rule}, got {count} tokens")


def as_size(name: str, size: int | Size | None) -> Size | None:
    """One number or a pair as a pair, checked."""
    if size is None:
        return None
    pair = (size, size) if isinstance(size, numbers.Integral) else size
    if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
        raise ValueError(f"Adapter: {name} must be one number or (H, W), got {size!r}")
    return positive("Adapter", name, pair[0]), positive("Adapter", name, pair[1])


def positive(op: str, name: str, value: int) -> int:
    """A whole number of 1 or more, NumPy's too; ValueError for any other."""
    if not isinstance(value, numbers.Integral):
        raise ValueError(f"{op}: {name} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{op}: {name} must be positive, got {value}")
    return int(value)


def _size_matching(
    student_channels: int,
    teacher_channels: int,
    student_size: Size | None,
    teacher_size: Size | None,
) -> nn.Conv2d | nn.ConvTranspose2d:
    """The convolution of the table in `Adapter`; no bias: a BatchNorm follows."""
    pairs = list(zip(student_size or (1, 1), teacher_size or (1, 1), strict=True))
    if all(s % t == 0 for s, t in pairs):
        stride = tuple(s // t for s, t in pairs)
        kernel = tuple(r + 1 - r % 2 for r in stride)
        padding = tuple(
            k - r for k, r in zip(kernel, stride, strict=True)
        )  # 1 where the stride is even
        return nn.Conv2d(student_channels, teacher_channels, kernel, stride, padding, bias=False)  # type: ignore[arg-type]
    if all(t % s == 0 for s, t in pairs):
        stride = tuple(t // s for s, t in pairs)
        padding = tuple(r // 2 for r in stride)
        kernel = tuple(r + 2 * p for r, p in zip(stride, padding, strict=True))
        return nn.ConvTranspose2d(
            student_channels, teacher_channels, kernel, stride, padding, bias=False
        )  # type: ignore[arg-type]
    return nn.Conv2d(student_channels, teacher_channels, 1, bias=False)


def _conv_norm_relu(channels: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    return (
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )
