"""The distillation loss in one line, and what it asks of its arguments.

loss = F.cross_entropy(logits, y) + sokd.loss(student_features, teacher_features, kd)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor, nn

__all__ = ["Features", "Terms", "loss"]

Features = Tensor | Sequence[Tensor]
Terms = dict[str, Tensor]


@overload
def loss(
    student_features: Features,
    teacher_features: Features,
    kd: nn.Module,
    *,
    return_terms: Literal[False] = False,
) -> Tensor: ...
@overload
def loss(
    student_features: Features,
    teacher_features: Features,
    kd: nn.Module,
    *,
    return_terms: Literal[True],
) -> Terms: ...
def loss(
    student_features: Features,
    teacher_features: Features,
    kd: nn.Module,
    *,
    return_terms: bool = False,
) -> Tensor | Terms:
    """lambda_D * L_D + lambda_DA * L_DA: what SoKD adds to the task's loss [docs/method.md section 4].

    Args:
        student_features: [B, C_s, H_s, W_s], tokens [B, N, C_s], or a list, one for each layer of `kd`.
        teacher_features: [B, C, H, W], tokens [B, N, C], or an equally long list. Never gets a gradient.
        kd: a `sokd.SoKD`, also wrapped by DistributedDataParallel or torch.compile.
        return_terms: a dict of "agreement", "areas" and their sum "total" in place of the sum alone.

    Returns:
        A scalar, float32 (float64 for float64 features), whatever autocast says. An empty batch gives 0.

    Call the teacher in eval mode and under torch.no_grad(). A teacher with gradients is warned of; one in
    train mode under no_grad is not, for its features show nothing of it.

    Nothing here waits for the device; compiles with `torch.compile(fullgraph=True)`.

    Raises:
        TypeError: not tensors, not floating point, or dtypes mixed outside autocast.
        ValueError: rank, channels, batch, device or the number of layers do not fit.
    """
    if not isinstance(kd, nn.Module) or not (torch.compiler.is_compiling() or _holds_sokd(kd)):
        raise TypeError(f"loss: kd must be a sokd.SoKD, got {type(kd).__name__}")
    result: Tensor | Terms = kd(student_features, teacher_features, return_terms=return_terms)
    return result


def checked_pairs(
    student_features: Features,
    teacher_features: Features,
    student_channels: Sequence[int],
    teacher_channels: Sequence[int],
) -> list[tuple[Tensor, Tensor]]:
    """The layers' (student, teacher) features, each as [B, C, H, W] or [B, N, C] of the channels given."""
    students = _as_list("student_features", student_features, len(student_channels))
    teachers = _as_list("teacher_features", teacher_features, len(teacher_channels))
    pairs = list(zip(students, teachers, strict=True))
    for index, (student, teacher) in enumerate(pairs):
        which = f"[{index}]" if len(pairs) > 1 else ""
        _check_features(f"student_features{which}", student, student_channels[index])
        _check_features(f"teacher_features{which}", teacher, teacher_channels[index])
        _check_match(f"teacher_features{which}", student, teacher)
    return pairs


def _holds_sokd(kd: nn.Module) -> bool:
    from sokd.kd.sokd import SoKD  # which is made of this module

    return any(isinstance(module, SoKD) for module in kd.modules())


def mixed_dtypes_allowed(tensor: Tensor) -> bool:
    """Whether autocast runs on the tensor's device: then the two sides meet in the wider of their dtypes."""
    return torch.is_autocast_enabled(tensor.device.type)


def _as_list(name: str, features: Features, layers: int) -> list[Tensor]:
    if isinstance(features, Tensor):
        features = [features]
    elif not isinstance(features, (list, tuple)):
        raise TypeError(
            f"loss: {name} must be a tensor or a list of tensors, got {type(features).__name__}"
        )
    if len(features) != layers:
        rule = f"have one tensor for each of kd's layers ({layers})"
        raise ValueError(f"loss: {name} must {rule}, got {len(features)}")
    return list(features)


def _check_features(name: str, features: Tensor, channels: int) -> None:
    if not isinstance(features, Tensor):
        raise TypeError(f"loss: {name} must be a tensor, got {type(features).__name__}")
    if not features.is_floating_point():
        raise TypeError(f"loss: {name} must be floating point, got {features.dtype}")
    rank = features.dim()
    if rank in (3, 4) and 0 in features.shape[1:]:
        raise ValueError(f"loss: {name} must have at least one cell, got {list(features.shape)}")
    if rank not in (3, 4) or features.shape[1 if rank == 4 else 2] != channels:
        raise ValueError(
            f"loss: {name} must be [B, {channels}, H, W] or [B, N, {channels}], got {list(features.shape)}"
        )


def _check_match(name: str, student: Tensor, teacher: Tensor) -> None:
    if teacher.shape[0] != student.shape[0]:
        raise ValueError(
            f"loss: {name} must have the student's batch size {student.shape[0]}, got {teacher.shape[0]}"
        )
    if teacher.device != student.device:
        raise ValueError(
            f"loss: {name} must be on the student's device {student.device}, got {teacher.device}"
        )
    if teacher.dtype != student.dtype and not mixed_dtypes_allowed(student):
        raise TypeError(
            f"loss: {name} must have the student's dtype {student.dtype}, got {teacher.dtype}"
        )
