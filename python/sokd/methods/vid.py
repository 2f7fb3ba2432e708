"""Variational information distillation: the student predicts the teacher's features, with doubt.

    m = conv1x1, ReLU, conv1x1, ReLU, conv1x1 of F_s;   v_c = softplus(a_c) + eps, a learned
    vid = sum over layers of  mean_{b,c,y,x} omega[b,y,x] * 1/2 ((F_t - m)^2 / v_c + log v_c)

Source: Ahn, Hu, Damianou, Lawrence, Dai, "Variational Information Distillation for Knowledge
Transfer" (CVPR 2019, arXiv 1904.05835, section 2; regressor, eps 1e-5 and the first variance 5 as
in the authors' code). omega, 1 without a mask: settled here.
"""

from __future__ import annotations

import math
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sokd.kd.adapter import resize
from sokd.methods.checks import layer_pairs, number
from sokd.methods.common import Method, Shapes, Step, resized, shared_size, total, wide

__all__ = ["VID", "VIDLoss", "vid"]

_EPS = 1e-5


def vid(student_channels: int, teacher_channels: int, *, variance: float = 5.0) -> VIDLoss:
    """The loss module for features of these channels; see `VIDLoss`."""
    return VIDLoss(student_channels, teacher_channels, variance=variance)


class VIDLoss(nn.Module):
    """`vid(C_s, C)(student, teacher, weight=None)` for one layer.

        loss = sokd.methods.vid(4, 8)
        f_s, f_t = torch.randn(2, 4, 7, 7, requires_grad=True), torch.randn(2, 8, 7, 7)
        loss(f_s, f_t).backward()

    Args:
        student_channels, teacher_channels: C_s and C.
        variance: v at the start; the authors': 5. Their weight: 1.
    """

    def __init__(
        self, student_channels: int, teacher_channels: int, *, variance: float = 5.0
    ) -> None:
        super().__init__()
        channels = {"student_channels": student_channels, "teacher_channels": teacher_channels}
        for name, count in channels.items():
            number("vid", name, count, least=1, whole=True)
        number("vid", "variance", variance, above=0)
        self.regressor = nn.Sequential(
            nn.Conv2d(student_channels, teacher_channels, 1, bias=False), nn.ReLU(inplace=True),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False), nn.ReLU(inplace=True),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
        )  # fmt: skip
        start = max(variance - _EPS, _EPS)  # then the inverse of softplus, without exp(start)
        self.scale = nn.Parameter(
            torch.full((teacher_channels,), start + math.log(-math.expm1(-start)))
        )

    def forward(self, student: Tensor, teacher: Tensor, weight: Tensor | None = None) -> Tensor:
        """The negative logarithm of the teacher's likelihood, without its constant.

        Args:
            student: [B, C_s, H_s, W_s], any size; the larger map is averaged down to the smaller.
            teacher: [B, C, H, W], constant.
            weight: omega [B, H, W] at the teacher's size.

        Returns:
            [] float32 (float64 for float64); 0 for an empty batch. It can be negative. Autocast
            applies to the convolutions.
        """
        ((student, teacher, weight),) = layer_pairs("vid", student, teacher, weight)
        self._check(student, teacher)
        size = shared_size(student, teacher)
        mean = wide(self.regressor(resize(student, size)))
        target = resize(wide(teacher), size)
        variance = (F.softplus(wide(self.scale)) + _EPS)[:, None, None]
        doubt = (mean - target).square() / variance + variance.log()
        if weight is not None:
            doubt = doubt * resized(weight, mean).unsqueeze(1)
        return doubt.sum() / max(2 * doubt.numel(), 1)

    def _check(self, student: Tensor, teacher: Tensor) -> None:
        first = cast(nn.Conv2d, self.regressor[0])
        sides = (("student", student, first.in_channels), ("teacher", teacher, len(self.scale)))
        for name, features, channels in sides:
            if features.shape[1] != channels:
                rule = f"have {channels} channels ({name}_channels)"
                raise ValueError(f"vid: {name} must {rule}, got {list(features.shape)}")


class VID(Method):
    """`vid` as a `Method`, on the student's own maps: a `VIDLoss` for each layer pair, the sum."""

    name: ClassVar[str] = "vid"
    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    default_weight: ClassVar[float] = 1.0

    def __init__(
        self, student_shapes: Shapes = (), teacher_shapes: Shapes = (), *, variance: float = 5.0
    ) -> None:
        super().__init__(student_shapes, teacher_shapes)
        self.layers = nn.ModuleList(
            VIDLoss(of_student[0], of_teacher[0], variance=variance)
            for of_student, of_teacher in zip(student_shapes, teacher_shapes, strict=True)
        )

    def forward(self, step: Step) -> Tensor:
        maps = zip(self.layers, step.student, step.teacher, step.weight, strict=True)
        return total([cast(Tensor, layer(*each)) for layer, *each in maps])
