"""Student and teacher features as users pass them, checked and viewed as maps [B, C, H, W].

Tokens [B, N, C] are maps with H * W = N, prefix tokens dropped [docs/method.md section 1].
"""

from __future__ import annotations

import functools
import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Features", "Layout", "Size", "both_sides_at_once", "checked_maps", "described", "kept",
    "layouts", "mixed_dtypes_allowed", "not_negative", "of_one_dtype", "one_of", "per_layer",
    "positive", "same_aspect", "tensors_of", "tokens_to_map", "total",
]  # fmt: skip

Features = Tensor | Sequence[Tensor]
Size = tuple[int, int]

# class token, class + distillation token, four registers without and with a class token
_USUAL_PREFIXES = (0, 1, 2, 4, 5)
_ORDERS = ("BCHW", "BHWC", "BNC", "NBC", "BCN")


class Layout(NamedTuple):
    """Layout of one layer's features on one side."""

    tokens: int | None = None  # prefix tokens to drop; None: see `tokens_to_map`
    grid: Size | None = None  # (H, W) of token features; None: square
    order: str | None = None  # read where it has a letter for each dimension; None: BCHW, BNC

    def ordered(self, features: Tensor) -> Tensor:
        """features as [B, C, H, W] or [B, N, C], a view."""
        if self.order == "BHWC" and features.dim() == 4:
            return features.movedim(3, 1)
        if self.order == "NBC" and features.dim() == 3:
            return features.transpose(0, 1)
        return features.mT if self.order == "BCN" and features.dim() == 3 else features


# ------------------------------------------------------------------------------------------ options


def layouts(
    side: str, count: int, tokens: Any, grid: Any, order: Any = None, *, op: str = "SoKD",
    layers: str = "layers",
) -> list[Layout]:  # fmt: skip
    """The layers' layouts of one side ("student" or "teacher"), from the options of `op`."""
    given = {"tokens": tokens, "grid": grid, "order": order}
    columns = [
        per_layer(f"{side}_{name}", value, count, op=op, layers=layers)
        for name, value in given.items()
    ]
    for prefix, size, letters in zip(*columns, strict=True):
        if size is not None and not _is_grid(size):
            rule = "be (H, W), both positive, for each layer"
            raise ValueError(f"{op}: {side}_grid must {rule}, got {size!r}")
        if prefix is not None and (not isinstance(prefix, int) or prefix < 0):
            rule = "be a whole number, 0 or more, for each layer"
            raise ValueError(f"{op}: {side}_tokens must {rule}, got {prefix!r}")
        if letters is not None and letters not in _ORDERS:
            rule = f"be {', '.join(map(repr, _ORDERS))} or None"
            raise ValueError(f"{op}: {side}_order must {rule}, got {letters!r}")
    return [Layout(*row) for row in zip(*columns, strict=True)]


def per_layer(
    name: str, value: Any, count: int, *, op: str = "SoKD", layers: str = "layers"
) -> list[Any]:
    """An option of `count` layers: a list has one entry per layer, other values apply to all.

    Raises:
        ValueError: a list of another length.
    """
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        rule = f"have one entry for each of the {count} {layers}"
        raise ValueError(f"{op}: {name} must {rule}, got {len(value)}")
    return list(value)


def one_of(op: str, name: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuse an option that is not among `choices`, which have one type."""
    fits = isinstance(value, type(choices[0])) and not isinstance(value, bool)
    if not fits or value not in choices:
        rule = " or ".join(map(repr, choices))
        raise ValueError(f"{op}: {name} must be {rule}, got {value!r}")


def positive(op: str, name: str, value: int) -> int:
    """A whole number of 1 or more, NumPy integers included; ValueError for any other value."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise ValueError(f"{op}: {name} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{op}: {name} must be positive, got {value}")
    return int(value)


def not_negative(op: str, name: str, value: Any) -> float:
    """A finite number of 0 or more; ValueError for any other value."""
    if not _is_real(value) or not 0 <= float(value) < math.inf:
        raise ValueError(f"{op}: {name} must be a finite number, 0 or more, got {value!r}")
    return float(value)


def above_zero(op: str, name: str, value: Any) -> float:
    """A finite number above 0; ValueError for any other value."""
    if not _is_real(value) or not 0 < float(value) < math.inf:
        raise ValueError(f"{op}: {name} must be positive and finite, got {value!r}")
    return float(value)


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def described(value: Any) -> str:
    """A value as error messages show it."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return "none" if value is None else type(value).__name__


def _is_grid(grid: Any) -> bool:
    pair = isinstance(grid, Sequence) and len(grid) == 2
    return pair and all(isinstance(side, int) and side > 0 for side in grid)


# --------------------------------------------------------------------------------- features to maps


def checked_maps(
    student_features: Features, teacher_features: Features, channels: Sequence[tuple[int, int]],
    layouts: Sequence[tuple[Layout, Layout]], parameters: Sequence[Tensor | None],
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """The layers' features as maps (student, teacher), the teacher's detached.

    Args:
        student_features, teacher_features: as `sokd.loss` takes them.
        channels, layouts: those of student and teacher in each layer.
        parameters: for each layer the parameter that the student's map is multiplied by first,
            whose device and dtype it must have; None: any.

    Raises:
        TypeError, ValueError: `loss: {argument} must {rule}, got {value}`.
    """
    students = _as_list("student_features", student_features, len(channels))
    teachers = _as_list("teacher_features", teacher_features, len(channels))
    maps = []
    for index, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        which = f"[{index}]" if len(channels) > 1 else ""
        _check_features(f"student_features{which}", student, channels[index][0])
        _check_features(f"teacher_features{which}", teacher, channels[index][1])
        _check_match(f"teacher_features{which}", student, teacher)
        ranks = student.dim(), teacher.dim()
        student = _as_map(f"student_features{which}", student, layouts[index][0])
        _check_parameter(f"student_features{which}", student, parameters[index])
        teacher = _as_map(f"teacher_features{which}", teacher.detach(), layouts[index][1])
        if not torch.compiler.is_compiling():
            _check_aspects(which, (student, teacher), ranks, layouts[index])
        maps.append((student, teacher))
    return maps


def same_aspect(one: Size, other: Size) -> bool:
    """Whether one size times a factor is the other, within a cell of either."""
    (h, w), (high, wide) = one, other
    return abs(high * w / wide - h) <= 1 or abs(h * wide / w - high) <= 1


def both_sides_at_once(height: int, width: int) -> bool:
    """Whether a computation of both sides at once may save kernels.

    Not in compiled code: a compiler fuses kernels, and comparing its symbolic sizes adds guards.
    """
    return not torch.compiler.is_compiling() and height == width > 0


def total(terms: Sequence[Tensor]) -> Tensor:
    """The sum of the layers' terms."""
    return functools.reduce(operator.add, terms)


def of_one_dtype(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider of their dtypes, which differ under autocast only."""
    if student.dtype == teacher.dtype:
        return student, teacher
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    return student.to(dtype), teacher.to(dtype)


def tensors_of(features: Features) -> list[Tensor]:
    """The features of all layers as a list; a tensor is that of a single layer."""
    return [features] if isinstance(features, Tensor) else list(features)


def mixed_dtypes_allowed(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device: both sides are then promoted to one dtype."""
    return torch.is_autocast_enabled(tensor.device.type)


def tokens_to_map(
    features: Tensor, *, tokens: int | None = None, grid: Size | None = None,
    op: str = "tokens_to_map", name: str = "features",
) -> Tensor:  # fmt: skip
    """Tokens [B, N, C] as a map [B, C, H, W]: a view, in channels_last order. Maps stay as is.

        tokens = torch.randn(2, 197, 384)             # a class token and 14 x 14 patches
        tokens_to_map(tokens).shape                   # [2, 384, 14, 14]

    Args:
        features: [B, N, C]; the first `tokens` of the N are class, distillation and register
            tokens.
        tokens: how many to drop; None: N - H*W with a `grid`, else the 0, 1, 2, 4 or 5 that leave a
            square.
        grid: (H, W); None: the square.
        op, name: for the error message.

    Raises:
        ValueError: N does not fit. A grid that is not square must be given, it is never guessed:
            [8, 7] with 56 tokens would pass for a 7 x 7 grid with 7 registers.
    """
    if features.dim() == 4:
        return features
    count = features.shape[1]
    prefix, (height, width) = _token_layout(count, tokens, grid, op, name)
    maps: Tensor = features[:, prefix:].transpose(1, 2).unflatten(2, (height, width))  # type: ignore[no-untyped-call]
    return maps


def _as_list(name: str, features: Features, layers: int) -> list[Tensor]:
    if not isinstance(features, (Tensor, list, tuple)):
        rule = "be a tensor or a list of tensors"
        raise TypeError(f"loss: {name} must {rule}, got {type(features).__name__}")
    found = tensors_of(features)
    if len(found) != layers:
        rule = f"have one tensor for each of kd's layers ({layers})"
        raise ValueError(f"loss: {name} must {rule}, got {len(found)}")
    return found


def _as_map(name: str, features: Tensor, layout: Layout) -> Tensor:
    return tokens_to_map(features, tokens=layout.tokens, grid=layout.grid, op="loss", name=name)


def _check_features(name: str, features: Tensor, channels: int) -> None:
    if not isinstance(features, Tensor):
        raise TypeError(f"loss: {name} must be a tensor, got {type(features).__name__}")
    if not features.is_floating_point():
        raise TypeError(f"loss: {name} must be floating point, got {features.dtype}")
    rank = features.dim()
    if rank in (3, 4) and 0 in features.shape[1:]:
        raise ValueError(f"loss: {name} must have at least one cell, got {list(features.shape)}")
    if rank not in (3, 4) or features.shape[1 if rank == 4 else 2] != channels:
        rule = f"be [B, {channels}, H, W] or [B, N, {channels}]"
        raise ValueError(f"loss: {name} must {rule}, got {list(features.shape)}")


def _check_match(name: str, student: Tensor, teacher: Tensor) -> None:
    if teacher.shape[0] != student.shape[0]:
        rule = f"have the student's batch size {student.shape[0]}"
        raise ValueError(f"loss: {name} must {rule}, got {teacher.shape[0]}")
    if teacher.device != student.device:
        rule = f"be on the student's device {student.device}"
        raise ValueError(f"loss: {name} must {rule}, got {teacher.device}")
    if teacher.dtype != student.dtype and not mixed_dtypes_allowed(student):
        rule = f"have the student's dtype {student.dtype}"
        raise TypeError(f"loss: {name} must {rule}, got {teacher.dtype}")


def _check_aspects(
    which: str, maps: tuple[Tensor, Tensor], ranks: tuple[int, int], of: tuple[Layout, Layout]
) -> None:
    """Raise for tokens guessed to be a square beside a map of another aspect, and a transposed map.

    Args:
        ranks, of: of the features behind the maps, and their layouts.
    """
    (h, w), (high, wide) = sizes = [(side.shape[2], side.shape[3]) for side in maps]
    found = f"{h} x {w} and {high} x {wide}"
    if ranks == (4, 4) and h != w and (h, w) == (wide, high):
        rule = "have the student's height and width, not transposed"
        raise ValueError(f"loss: teacher_features{which} must {rule}, got {found}")
    for at, side in enumerate(("student", "teacher")):
        guessed = ranks[at] == 3 and of[at].grid is None and ranks[1 - at] == 4
        if guessed and not same_aspect(*sizes):
            rule = f"have the aspect of the other side's map (see {side}_grid= of SoKD)"
            raise ValueError(f"loss: {side}_features{which} must {rule}, got {found}")


def _check_parameter(name: str, student: Tensor, parameter: Tensor | None) -> None:
    """Device and dtype of the first parameter, in place of the convolution's own message."""
    if parameter is None:
        return
    if student.device != parameter.device:
        rule = f"be on the device of kd's parameters, {parameter.device} (see kd.to)"
        raise ValueError(f"loss: {name} must {rule}, got {student.device}")
    if student.dtype != parameter.dtype and not mixed_dtypes_allowed(student):
        rule = f"have the dtype {parameter.dtype} of kd's parameters (see kd.to and torch.autocast)"
        raise TypeError(f"loss: {name} must {rule}, got {student.dtype}")


def _token_layout(
    count: int, tokens: int | None, grid: Size | None, op: str, name: str
) -> tuple[int, Size]:
    """Number of prefix tokens, and the grid of the others."""
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


def kept(features: Tensor, cells: Tensor | None) -> Tensor:
    """The features [B, C, H, W] with zeros where `cells` [B, 1, H, W] are 0; None: as given."""
    return features if cells is None else features * cells.to(features.dtype)
