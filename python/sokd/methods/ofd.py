"""A comprehensive overhaul: features before the ReLU, and only what the ReLU lets through.

    S = BN(conv1x1(F_s));   m_c = E[F_t | F_t < 0], the margin of channel c;   T = max(F_t, m)
    ofd = sum over layers l of  2^(l - last) / B * sum_{b,c,y,x} omega[b,y,x] * d(T, S)
    d(T, S) = 0 where S <= T <= 0, else (T - S)^2

Source: Heo, Kim, Yun, Park, Kwak, Choi, "A Comprehensive Overhaul of Feature Distillation" (ICCV
2019, arXiv 1904.01866, section 3; the connector's start and the halved weights of shallower layers
as in the authors' code). omega, 1 without a mask: settled here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from sokd.kd.adapter import resize
from sokd.methods.checks import layer_pairs, number
from sokd.methods.common import Method, Shapes, Step, resized, shared_size, total, wide
from sokd.methods.fitnet import hint

__all__ = ["OFD", "OFDLoss", "ofd", "ofd_margin"]

_RARE = 0.001  # below this share of negative values the expectation is not meaningful


def ofd(student_channels: int, teacher_channels: int, *, margin: Tensor | None = None) -> OFDLoss:
    """The loss module for features of these channels; see `OFDLoss`."""
    return OFDLoss(student_channels, teacher_channels, margin=margin)


def ofd_margin(norm: nn.Module) -> Tensor:
    """E[x | x < 0] of each channel after a BatchNorm, [C], from its weight and bias.

        margin = sokd.methods.ofd_margin(torch.nn.BatchNorm2d(8))
        assert margin.shape == (8,)

    Three deviations below 0 where the channel is negative in less than 0.1 % of the cases.
    """
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if not isinstance(weight, Tensor) or not isinstance(bias, Tensor):
        rule = "be a BatchNorm with weight and bias"
        raise TypeError(f"ofd_margin: norm must {rule}, got {type(norm).__name__}")
    deviation, mean = weight.detach().double().abs(), bias.detach().double()
    deviation = deviation.clamp(min=torch.finfo(torch.float64).tiny)
    share = 0.5 * torch.special.erfc(mean / deviation / math.sqrt(2))  # of negative values
    density = torch.exp(-((mean / deviation) ** 2) / 2) / math.sqrt(2 * math.pi)
    margin = mean - deviation * density / share.clamp(min=_RARE)
    return torch.where(share > _RARE, margin, -3 * deviation).to(weight.dtype)


class OFDLoss(nn.Module):
    """`ofd(C_s, C)(student, teacher, weight=None)` for one layer, both before the ReLU.

        loss = sokd.methods.ofd(4, 8)
        f_s, f_t = torch.randn(2, 4, 7, 7, requires_grad=True), torch.randn(2, 8, 7, 7)
        loss(f_s, f_t).backward()

    Args:
        student_channels, teacher_channels: C_s and C.
        margin: [C], negative (`ofd_margin` of the teacher's BatchNorm before the ReLU); None: the
            mean of each channel's negative values in the batch, 0 where there are none.

    The authors' weights: 1e-3 on CIFAR-100, 1e-4 on ImageNet.
    """

    margin: Tensor | None

    def __init__(
        self, student_channels: int, teacher_channels: int, *, margin: Tensor | None = None
    ) -> None:
        super().__init__()
        channels = {"student_channels": student_channels, "teacher_channels": teacher_channels}
        for name, count in channels.items():
            number("ofd", name, count, least=1, whole=True)
        if margin is not None and (
            not isinstance(margin, Tensor) or margin.shape != (teacher_channels,)
        ):
            got = list(margin.shape) if isinstance(margin, Tensor) else type(margin).__name__
            raise ValueError(f"ofd: margin must be a tensor [{teacher_channels}], got {got}")
        # not persistent: it comes with the options
        self.register_buffer(
            "margin", None if margin is None else margin.detach().clone(), persistent=False
        )
        self.connector = nn.Sequential(
            nn.Conv2d(student_channels, teacher_channels, 1, bias=False),
            nn.BatchNorm2d(teacher_channels),
        )
        nn.init.normal_(cast(Tensor, self.connector[0].weight), std=(2 / teacher_channels) ** 0.5)

    def forward(self, student: Tensor, teacher: Tensor, weight: Tensor | None = None) -> Tensor:
        """The partial squared distance, summed over channels and cells, the mean over the batch.

        Args:
            student: [B, C_s, H_s, W_s], any size; the larger map is averaged down to the smaller.
            teacher: [B, C, H, W], constant.
            weight: omega [B, H, W] at the teacher's size.

        Returns:
            [] float32 (float64 for float64); 0 for an empty batch. Autocast applies to the
            connector.
        """
        ((student, teacher, weight),) = layer_pairs("ofd", student, teacher, weight)
        self._check(student, teacher)
        if not student.shape[0]:
            return wide(student).sum() * 0
        size = shared_size(student, teacher)
        own = wide(self.connector(resize(student, size)))
        target = resize(wide(teacher), size)
        target = torch.maximum(target, self._margin(target)[:, None, None])
        # where a distance does not count, the target is the student's own value
        target = torch.where((own > target) | (target > 0), target, own.detach())
        weight = None if weight is None else resized(weight, own)
        return hint(own, target, weight, scale=own.shape[1] * size[0] * size[1])

    def _margin(self, teacher: Tensor) -> Tensor:
        if self.margin is not None:
            return wide(self.margin).to(teacher.dtype)
        below = teacher < 0
        sums = torch.where(below, teacher, 0.0).sum((0, 2, 3))
        return sums / below.sum((0, 2, 3)).clamp(min=1)

    def _check(self, student: Tensor, teacher: Tensor) -> None:
        convolution = cast(nn.Conv2d, self.connector[0])
        sides = (
            ("student", student, convolution.in_channels),
            ("teacher", teacher, convolution.out_channels),
        )
        for name, features, channels in sides:
            if features.shape[1] != channels:
                rule = f"have {channels} channels ({name}_channels)"
                raise ValueError(f"ofd: {name} must {rule}, got {list(features.shape)}")


class OFD(Method):
    """`ofd` as a `Method`, on the student's own maps, the layer pairs from shallow to deep.

    The layers are the last ones before a ReLU, BatchNorms as a rule. `margins`: one [C] for each
    layer pair (`ofd_margin` of the teacher's BatchNorm), or None.
    """

    name: ClassVar[str] = "ofd"
    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    default_weight: ClassVar[float] = 1e-3

    def __init__(
        self, student_shapes: Shapes = (), teacher_shapes: Shapes = (), *,
        margins: Sequence[Tensor] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(student_shapes, teacher_shapes)
        if margins is not None and len(margins) != len(teacher_shapes):
            rule = f"have one entry for each of the {len(teacher_shapes)} layers"
            raise ValueError(f"ofd: margins must {rule}, got {len(margins)}")
        each = [None] * len(teacher_shapes) if margins is None else margins
        self.layers = nn.ModuleList(
            OFDLoss(of_student[0], of_teacher[0], margin=margin)
            for of_student, of_teacher, margin in zip(
                student_shapes, teacher_shapes, each, strict=True
            )
        )

    def forward(self, step: Step) -> Tensor:
        maps = zip(self.layers, step.student, step.teacher, step.weight, strict=True)
        terms = [cast(Tensor, layer(*each)) for layer, *each in maps]
        return total([term / 2.0**deeper for deeper, term in enumerate(reversed(terms))])
