"""Knowledge review: each teacher stage guides the fusion of a student stage with the deeper ones.

    from the deepest stage up:  x = conv1x1(F_s);   y = the next deeper fused map, upsampled to x
    a = sigmoid(conv1x1([x, y])) [B, 2, H, W];   fused = a_0 * x + a_1 * y, at the teacher's size
    out = conv3x3(fused) [B, C, H, W]                (ABF; BatchNorm after the first and last conv)
    hcl(out, F_t) = (mse + 1/2 mse at 4x4 + 1/4 mse at 2x2 + 1/8 mse at 1x1) / (1 + 1/2 + 1/4 + 1/8)
    reviewkd = sum over stages of  hcl(sqrt(omega) out, sqrt(omega) F_t)

Source: Chen, Liu, Zhao, Jia, "Distilling Knowledge via Knowledge Review" (CVPR 2021, arXiv
2104.09044, section 3). omega, 1 without a mask: docs/method.md 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sokd.methods.checks import layer_pairs, number
from sokd.methods.common import Maps, Method, Shapes, Step, Weights, masked, total, unmixed, wide

__all__ = ["ReviewKD", "ReviewKDLoss", "hcl", "reviewkd"]

_LEVELS = (4, 2, 1)  # cells on a side of the pooled maps


def reviewkd(
    student_channels: Sequence[int], teacher_channels: Sequence[int], *, hidden: int | None = None
) -> ReviewKDLoss:
    """The loss module for stages of these channels, the shallowest first; see `ReviewKDLoss`."""
    return ReviewKDLoss(student_channels, teacher_channels, hidden=hidden)


def hcl(student: Maps, teacher: Maps, weight: Weights = None) -> Tensor:
    """The hierarchical context loss: mean squared differences at several resolutions.

        f_s, f_t = torch.randn(2, 8, 7, 7, requires_grad=True), torch.randn(2, 8, 7, 7)
        sokd.methods.hcl(f_s, f_t).backward()

    Args:
        student: [B, C, H, W] of the teacher's shape, or a list of them, one a stage.
        teacher: [B, C, H, W], constant, or an equally long list.
        weight: omega [B, H, W], or one (or None) for each stage: both sides are multiplied by its
            square root first.

    Returns:
        [] float32 (float64 for float64), the sum over the stages; 0 for an empty batch.

    The levels have 4, 2 and 1 cells on a side; levels that are not smaller than the map are left
    out. Pooling is linear, so the difference is pooled instead of both maps.
    """
    return total(
        [_context(*pair) for pair in layer_pairs("hcl", student, teacher, weight, same="shape")]
    )


def _context(student: Tensor, teacher: Tensor, weight: Tensor | None) -> Tensor:
    difference = masked(wide(student) - wide(teacher), weight)
    loss, norm, factor = _mean_square(difference), 1.0, 1.0
    for side in _LEVELS:
        if side >= min(student.shape[2:]):
            continue
        pooled = F.adaptive_avg_pool2d(difference, side)
        factor /= 2
        norm += factor
        loss = loss + factor * _mean_square(pooled)
        if not any(cells % side for cells in difference.shape[2:]):
            difference = pooled  # equal regions: their averages give the next level
    return loss / norm


def _mean_square(difference: Tensor) -> Tensor:
    return difference.square().sum() / max(difference.numel(), 1)


class ReviewKDLoss(nn.Module):
    """`reviewkd(...)(student_maps, teacher_maps, weight=None)`: fusion and HCL, a scalar.

        loss = sokd.methods.reviewkd([4, 8], [16, 32])
        students = [torch.randn(2, 4, 14, 14), torch.randn(2, 8, 7, 7)]
        teachers = [torch.randn(2, 16, 14, 14), torch.randn(2, 32, 7, 7)]
        loss(students, teachers).backward()

    Args:
        student_channels, teacher_channels: of the stages, the shallowest first, equally many.
        hidden: channels of the fused maps; None: those of the deepest student stage, at most 512
            (the authors').

    The authors' weights are 0.6 to 8 on CIFAR-100 (5 for most pairs) and 1 on ImageNet, increased
    linearly over the first 20 epochs. Their maps are those before the stages' last ReLU, and the
    pooled features are a further stage of 1 x 1 cells.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        *,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        for name, counts in (
            ("student_channels", student_channels),
            ("teacher_channels", teacher_channels),
        ):
            if not isinstance(counts, Sequence):
                raise TypeError(f"reviewkd: {name} must be a list of numbers, got {counts!r}")
            for count in counts:
                number("reviewkd", name, count, least=1, whole=True)
        if not student_channels or len(student_channels) != len(teacher_channels):
            rule = f"be as many as student_channels ({len(student_channels)}), at least one"
            raise ValueError(f"reviewkd: teacher_channels must {rule}, got {len(teacher_channels)}")
        hidden = min(512, student_channels[-1]) if hidden is None else hidden
        number("reviewkd", "hidden", hidden, least=1, whole=True)
        self.student_channels = list(student_channels)
        deepest = len(student_channels) - 1
        self.fusions = nn.ModuleList(
            ABF(of_student, hidden, of_teacher, fuse=stage < deepest)
            for stage, (of_student, of_teacher) in enumerate(
                zip(student_channels, teacher_channels, strict=True)
            )
        )

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], weight: Weights = None
    ) -> Tensor:
        """The stages' HCL.

        Args:
            student: maps [B, C_s, H_s, W_s], the shallowest first; teacher: [B, C, H, W],
                constants.
            weight: omega [B, H, W] at the teacher's sizes, one (or None) for each stage.

        Returns:
            [] float32 (float64 for float64); 0 for an empty batch. Autocast applies to the fusions
            only.
        """
        pairs = layer_pairs("reviewkd", list(student), list(teacher), weight)
        if len(pairs) != len(self.fusions):
            rule = f"have one map for each of the {len(self.fusions)} stages"
            raise ValueError(f"reviewkd: student must {rule}, got {len(pairs)}")
        if not pairs[0][0].shape[0]:
            return total([wide(of_student).sum() for of_student, _, _ in pairs]) * 0
        outputs = self.outputs([pair[0] for pair in pairs], [pair[1] for pair in pairs])
        with unmixed(outputs[0]):
            return hcl(outputs, [pair[1] for pair in pairs], [pair[2] for pair in pairs])

    def outputs(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[Tensor]:
        """The ABF outputs, of the teacher's shapes, the shallowest first."""
        outputs: list[Tensor] = []
        fused: Tensor | None = None
        stages = list(zip(self.fusions, self.student_channels, student, teacher, strict=True))
        for fusion, channels, of_student, of_teacher in reversed(stages):
            self._check(of_student, channels)
            output, fused = fusion(of_student, fused, of_teacher.shape[2:])
            outputs.insert(0, output)
        return outputs

    def _check(self, features: Tensor, channels: int) -> None:
        if features.shape[1] != channels:
            rule = f"have the {channels} channels of its stage (student_channels)"
            raise ValueError(f"reviewkd: student must {rule}, got {list(features.shape)}")
        if self.training and features.shape[0] * features.shape[2] * features.shape[3] == 1:
            rule = "have more than one value per channel in train mode, for BatchNorm"
            rule += " (drop_last=True in the DataLoader)"
            raise ValueError(f"reviewkd: student must {rule}, got {list(features.shape)}")


class ABF(nn.Module):
    """Attention-based fusion of one stage with the fused map of the deeper stages."""

    def __init__(self, channels: int, hidden: int, teacher_channels: int, *, fuse: bool) -> None:
        super().__init__()
        self.reduce = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        )
        self.attention = nn.Conv2d(2 * hidden, 2, 1) if fuse else None
        self.expand = nn.Sequential(
            nn.Conv2d(hidden, teacher_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(teacher_channels),
        )
        for module in (self.reduce[0], self.expand[0]):
            nn.init.kaiming_uniform_(module.weight, a=1)  # type: ignore[arg-type]

    def forward(
        self, features: Tensor, deeper: Tensor | None, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """The output [B, C, *size] and the fused map [B, hidden, *size].

        Args:
            features: [B, C_s, H_s, W_s].
            deeper: the fused map of the next deeper stage [B, hidden, h, w], or None.
        """
        fused = self.reduce(features)
        if self.attention is not None and deeper is not None:
            fused = self._fuse(fused, deeper, self.attention)
        fused = _nearest(fused, size)
        return self.expand(fused), fused

    def _fuse(self, own: Tensor, deeper: Tensor, attention: nn.Conv2d) -> Tensor:
        """Attention over [own, deeper] without concatenating them.

        The deeper half is convolved at its own size: a 1x1 convolution and an upsampling commute.
        """
        for_own, for_deeper = attention.weight.chunk(2, dim=1)
        size = (own.shape[2], own.shape[3])
        logits = F.conv2d(own, for_own, attention.bias)
        share = torch.sigmoid(logits + _nearest(F.conv2d(deeper, for_deeper), size))
        return torch.addcmul(own * share[:, :1], _nearest(deeper, size), share[:, 1:])


def _nearest(features: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(features.shape[2:]) == tuple(size):
        return features
    return F.interpolate(features, size=tuple(size), mode="nearest")


class ReviewKD(Method):
    """`reviewkd` as a `Method`: the layer pairs are the stages, the shallowest first."""

    name: ClassVar[str] = "reviewkd"
    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    default_weight: ClassVar[float] = 1.0

    def __init__(
        self, student_shapes: Shapes = (), teacher_shapes: Shapes = (), *, hidden: int | None = None
    ) -> None:
        super().__init__(student_shapes, teacher_shapes)
        channels = ([shape[0] for shape in shapes] for shapes in (student_shapes, teacher_shapes))
        self.loss = ReviewKDLoss(*channels, hidden=hidden)

    def forward(self, step: Step) -> Tensor:
        loss: Tensor = self.loss(step.student, step.teacher, step.weight)
        return loss
