"""Class attention transfer: match class activation maps instead of features.

    A[b,k,y,x] = sum_c head[k,c] * F[b,c,y,x]          class activation maps
    P = averages of A over r x r regions
    catkd = 1 / (B K r^2) * sum_{b,k} | P_s / |P_s| - P_t / |P_t| |^2

Source: Guo, Yan, Li, Lin, "Class Attention Transfer Based Knowledge Distillation" (CVPR 2023, arXiv
2304.12777, section 3).
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sokd.methods.checks import check_cells, layer_pairs, number
from sokd.methods.common import (
    Maps,
    Method,
    Shapes,
    Step,
    Weights,
    given,
    masked,
    total,
    unit,
    unmixed,
    wide,
)

__all__ = ["CATKD", "Head", "catkd", "class_maps", "head_weight"]

Head = nn.Module | Tensor


def catkd(
    student: Maps,
    teacher: Maps,
    weight: Weights = None,
    *,
    resolution: int = 2,
    normalise: bool = True,
) -> Tensor:
    """The mean squared difference of pooled class activation maps.

        f_s, f_t = torch.randn(2, 10, 7, 7, requires_grad=True), torch.randn(2, 10, 7, 7)
        sokd.methods.catkd(f_s, f_t, resolution=2).backward()

    Args:
        student: class activation maps [B, K, H_s, W_s] (see `class_maps`), or a list of them.
        teacher: [B, K, H, W], constant, or an equally long list.
        weight: omega [B, H, W] at the teacher's size: both sides are multiplied by its square root
            before pooling.
        resolution: r; the authors' configurations have 2 or, for ShuffleNets on CIFAR-100, 4.
        normalise: whether each pooled map is divided by its norm; the authors do so for some pairs.
            Their weights go from 0.5 to 600: 40 with normalisation (ResNet50 -> MobileNetV2), 15
            without (ResNet32x4 -> ResNet8x4). With it, maps of one cell and resolution=1 are
            refused: only the sign would be left.

    Returns:
        [] float32 (float64 for float64), the sum over the pairs; 0 for an empty batch.
    """
    number("catkd", "resolution", resolution, least=1, whole=True)
    pairs = layer_pairs("catkd", student, teacher, weight, same="channels")
    return total([_transfer(*pair, resolution, normalise) for pair in pairs])


def _transfer(
    student: Tensor, teacher: Tensor, weight: Tensor | None, resolution: int, normalise: bool
) -> Tensor:
    _check_compared(student, teacher, resolution, normalise)
    pooled_s, pooled_t = (_pooled(features, weight, resolution) for features in (student, teacher))
    return _distance(pooled_s, pooled_t, normalise)


def _check_compared(student: Tensor, teacher: Tensor, resolution: int, normalise: bool) -> None:
    """Refuse what would be compared in one cell, of which `normalise` leaves the sign."""
    if normalise:
        cells = (each.shape[2] * each.shape[3] for each in (student, teacher))
        check_cells("catkd", (student, teacher), min(resolution**2, *cells))


def _pooled(features: Tensor, weight: Tensor | None, resolution: int) -> Tensor:
    return F.adaptive_avg_pool2d(masked(wide(features), weight), resolution)


def _distance(student: Tensor, teacher: Tensor, normalise: bool) -> Tensor:
    if normalise:
        student, teacher = (unit(each.flatten(2), 2) for each in (student, teacher))
    return (student - teacher).square().sum() / max(student.numel(), 1)


def class_maps(features: Tensor, head: Head) -> Tensor:
    """features [B, C, H, W] -> class activation maps [B, K, H, W].

        maps = sokd.methods.class_maps(torch.randn(2, 16, 7, 7), torch.nn.Linear(16, 10))
        assert maps.shape == (2, 10, 7, 7)

    Args:
        head: the linear layer or 1x1 convolution that follows the global average pooling, or its
            weight [K, C]. Its bias is constant over positions and is left out (settled here).
    """
    with unmixed(features):
        weight = wide(head_weight("catkd", head, features.shape[1]))
        maps: Tensor = F.conv2d(wide(features), weight[:, :, None, None])
        return maps


def head_weight(op: str, head: Head, channels: int) -> Tensor:
    """The weight [K, C] of a classifier of `channels`."""
    weight: Tensor | None = head if isinstance(head, Tensor) else getattr(head, "weight", None)
    if not isinstance(weight, Tensor):
        rule = "be a linear layer, a 1x1 convolution or a weight [K, C]"
        raise TypeError(f"{op}: head must {rule}, got {type(head).__name__}")
    if weight.dim() == 4 and weight.shape[2:] == (1, 1):
        weight = weight.flatten(1)
    if weight.dim() != 2 or weight.shape[1] != channels:
        raise ValueError(
            f"{op}: head must have the weight [K, {channels}], got {list(weight.shape)}"
        )
    return weight


class CATKD(Method):
    """`catkd` as a `Method`, on the last layer pair.

    Options:
        student_head, teacher_head: the models' classifiers (see `class_maps`). Gradients reach the
            student's classifier through its maps, as in the paper; neither becomes a submodule.
            Without classifiers the last maps must be class activation maps already, with one
            channel for each logit.
        resolution, normalise: see `catkd`.
    """

    name: ClassVar[str] = "catkd"
    needs: ClassVar[frozenset[str]] = frozenset({"logits", "features"})
    default_weight: ClassVar[float] = 40.0

    def __init__(
        self, student_shapes: Shapes = (), teacher_shapes: Shapes = (), *,
        student_head: Head | None = None, teacher_head: Head | None = None,
        resolution: int = 2, normalise: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(student_shapes, teacher_shapes)
        # in a tuple, which hides the modules: the models own and save them
        self.heads = (student_head, teacher_head)
        self.resolution = number("catkd", "resolution", resolution, least=1, whole=True)
        self.normalise = normalise
        for head, shapes in zip(self.heads, (student_shapes, teacher_shapes), strict=True):
            if head is not None and shapes:
                head_weight("catkd", head, shapes[-1][0])

    def forward(self, step: Step) -> Tensor:
        classes = given(
            self.name, "student_logits", step.student_logits, "for the number of classes"
        ).shape[1]
        pairs = layer_pairs(self.name, step.student[-1], step.teacher[-1], step.weight[-1])
        (student, teacher, weight), (head_s, head_t) = pairs[0], self.heads
        _check_compared(student, teacher, self.resolution, self.normalise)
        # pooling and the head commute, so the head runs on r x r cells instead of the whole map
        pooled_s = self._maps("student", _pooled(student, weight, self.resolution), head_s, classes)
        with torch.no_grad():
            pooled_t = self._maps(
                "teacher", _pooled(teacher, weight, self.resolution), head_t, classes
            )
        return _distance(pooled_s, pooled_t, self.normalise)

    def _maps(self, side: str, pooled: Tensor, head: Head | None, classes: int) -> Tensor:
        maps = pooled if head is None else class_maps(pooled, head)
        if maps.shape[1] != classes:
            rule = (
                f"be given unless the {side}'s last map has {classes} channels, one for each class"
            )
            raise ValueError(f"catkd: {side}_head must {rule}, got {maps.shape[1]}")
        return maps
