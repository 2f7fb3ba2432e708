"""Checks of the methods' arguments, which return layers as lists and teachers as constants."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sokd.methods.common import Maps, Weights, constant, wide
from sokd.ops.runtime import is_eager, warn_user

__all__ = ["check_cells", "check_target", "layer_pairs", "logits_pair", "number", "wrong_class"]

Pair = tuple[Tensor, Tensor, Tensor | None]  # student, teacher, omega

SWAPPED = (
    "sokd: {op} got a {teacher} that requires grad and a {student} that does not, so nothing is "
    "trained by it; the order is (student, teacher)"
)


def logits_pair(
    op: str, student: Tensor, teacher: Tensor, *, dense: bool = True
) -> tuple[Tensor, Tensor]:
    """Check both sides' logits; return them as [B, K], float32 or float64, the teacher's constant.

    Args:
        dense: whether [B, K, H, W] (or [B, K, D, H, W]) is accepted too, as [B * H * W, K]. [B, K,
            N] is not, because many models put K last there.
    """
    _check_tensors(op, "student_logits", student, "teacher_logits", teacher)
    rank = student.dim()
    if rank not in ((2, 4, 5) if dense else (2,)) or student.shape[1] < 2:
        shapes = "[B, K >= 2] or [B, K >= 2, H, W]" if dense else "[B, K >= 2]"
        raise ValueError(f"{op}: student_logits must be {shapes}, got {list(student.shape)}")
    if teacher.shape != student.shape:
        rule = f"have the student's shape {list(student.shape)}"
        raise ValueError(f"{op}: teacher_logits must {rule}, got {list(teacher.shape)}")
    if rank > 2:
        student, teacher = (each.movedim(1, -1).flatten(0, -2) for each in (student, teacher))
    return wide(student), wide(constant(teacher))


def layer_pairs(
    op: str, student: Maps, teacher: Maps, weight: Weights = None, *, embeddings: bool = False,
    same: str = "",
) -> list[Pair]:  # fmt: skip
    """Check the layers' features and weights and return them as lists, the teacher's constant.

    Args:
        embeddings: whether [B, D] is accepted too.
        same: "shape" or "channels", what the two sides must share besides the batch size.
    """
    students, teachers = _as_list(student), _as_list(teacher)
    weights = (
        [weight] * len(students) if weight is None or isinstance(weight, Tensor) else list(weight)
    )
    for name, given in (("teacher", teachers), ("weight", weights)):
        if len(given) != len(students):
            rule = f"have one entry for each of the {len(students)} student maps"
            raise ValueError(f"{op}: {name} must {rule}, got {len(given)}")
    triples = zip(students, teachers, weights, strict=True)
    return [_layer_pair(op, *triple, embeddings, same) for triple in triples]


def number(
    op: str, name: str, value: Any, *, above: float | None = None, least: float | None = None,
    below: float = math.inf, whole: bool = False,
) -> Any:  # fmt: skip
    """Check an option that is a number; a tensor, such as a learned temperature, is not read.

    Args:
        above, least, below: bounds; `least` is inclusive, the others are exclusive.
        whole: whether it must be a whole number.

    Raises:
        TypeError: it is not a number.
        ValueError: it is out of range or not finite.
    """
    if isinstance(value, Tensor) or torch.compiler.is_compiling():
        return value
    kinds: Any = numbers.Integral if whole else numbers.Real
    if not isinstance(value, kinds) or isinstance(value, bool):
        kind = "a whole number" if whole else "a number"
        raise TypeError(f"{op}: {name} must be {kind}, got {value!r}")
    is_above = value > above if above is not None else least is None or value >= least
    if is_above and value < below:
        return value
    if below < math.inf:
        rule = f"in {'(' if least is None else '['}{above if least is None else least}, {below})"
    elif least is None:
        rule = "positive and finite"
    else:
        rule = f"{least} or more" + ("" if whole else " and finite")
    raise ValueError(f"{op}: {name} must be {rule}, got {value!r}")


def check_target(op: str, target: Any, logits: Tensor, ignored: int) -> None:
    """Raise for a target that is not the class indices of logits [B, K]; read on the CPU only."""
    number(op, "ignore_index", ignored, least=-math.inf, whole=True)
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        got = str(target.dtype) if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"{op}: target must be an int64 tensor [B], got {got}")
    if target.shape != logits.shape[:1]:
        raise ValueError(f"{op}: target must be [{logits.shape[0]}], got {list(target.shape)}")
    if target.device.type == "cpu" and is_eager(target) and target.numel():
        text = wrong_class(target, logits.shape[1], ignored)
        if text:
            raise ValueError(f"{op}: {text}")


def check_cells(op: str, pair: tuple[Tensor, Tensor], compared: int) -> None:
    """Refuse maps that are compared in one cell, where a map divided by its length is 1 or -1."""
    if compared < 2:
        student, teacher = (list(each.shape) for each in pair)
        rule = "have 2 cells or more where the maps are compared"
        raise ValueError(f"{op}: student must {rule}, got {student} and the teacher's {teacher}")


def wrong_class(target: Tensor, classes: int, ignored: int = -100) -> str:
    """The rule for class indices and the first index that breaks it; "" if none does."""
    wrong = target[((target < 0) | (target >= classes)) & (target != ignored)]
    rule = f"be class indices 0 .. {classes - 1} ({ignored} is ignored)"
    return f"target must {rule}, got {int(wrong[0])}" if wrong.numel() else ""


def _layer_pair(
    op: str, student: Tensor, teacher: Tensor, weight: Tensor | None, embeddings: bool, same: str
) -> Pair:
    _check_tensors(op, "student", student, "teacher", teacher)
    _check_rank(op, "student", student, embeddings)
    _check_rank(op, "teacher", teacher, embeddings)
    if same == "shape" and student.shape != teacher.shape:
        rule = f"have the teacher's shape {list(teacher.shape)} (see sokd.Adapter)"
        raise ValueError(f"{op}: student must {rule}, got {list(student.shape)}")
    if same == "channels" and student.shape[1] != teacher.shape[1]:
        raise ValueError(f"{op}: student must have the teacher's {teacher.shape[1]} channels, "
                         f"got {student.shape[1]}")  # fmt: skip
    if weight is None:
        return student, constant(teacher), None
    return student, constant(teacher), _checked_weight(op, weight, teacher)


def _checked_weight(op: str, weight: Tensor, teacher: Tensor) -> Tensor:
    """omega as [B, H, W]."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = str(weight.dtype) if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{op}: weight must be a floating-point tensor or None, got {got}")
    if teacher.dim() != 4:
        raise ValueError(f"{op}: weight must be None for features [B, D], got a weight")
    if weight.dim() == 4 and weight.shape[1] == 1:
        weight = weight.squeeze(1)
    wanted = [teacher.shape[0], teacher.shape[2], teacher.shape[3]]
    if list(weight.shape) != wanted:
        raise ValueError(
            f"{op}: weight must be of the teacher's size {wanted}, got {list(weight.shape)}"
        )
    return constant(weight)


def _check_tensors(op: str, name: str, student: Tensor, other: str, teacher: Tensor) -> None:
    for which, tensor in ((name, student), (other, teacher)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {which} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {which} must be floating point, got {tensor.dtype}")
    swapped = teacher.requires_grad and not student.requires_grad and torch.is_grad_enabled()
    if swapped and is_eager(student, teacher):
        warn_user(SWAPPED.format(op=op, student=name, teacher=other))
    if teacher.device != student.device:
        rule = f"be on the student's device {student.device}"
        raise ValueError(f"{op}: {other} must {rule}, got {teacher.device}")
    if teacher.shape[:1] != student.shape[:1]:
        raise ValueError(f"{op}: {other} must have the student's batch size {_batch(student)}, "
                         f"got {_batch(teacher)}")  # fmt: skip


def _batch(tensor: Tensor) -> int | str:
    return tensor.shape[0] if tensor.dim() else "none"


def _check_rank(op: str, name: str, features: Tensor, embeddings: bool) -> None:
    if features.dim() != 4 and not (embeddings and features.dim() == 2):
        shapes = "[B, C, H, W] or [B, D]" if embeddings else "[B, C, H, W]"
        raise ValueError(f"{op}: {name} must be {shapes}, got {list(features.shape)}")
    if 0 in features.shape[1:]:
        raise ValueError(f"{op}: {name} must have at least one cell, got {list(features.shape)}")


def _as_list(features: Maps) -> list[Tensor]:
    return list(features) if isinstance(features, Sequence) else [features]
