"""Relational knowledge distillation: distances and angles between samples.

    d_ij = |x_i - x_j| / its mean over the pairs that differ;   e_ij = (x_j - x_i) / |x_j - x_i|
    rkd = distance * mean_{ij} huber(d_ij^s, d_ij^t)
        + angle * mean_{ijk} huber(<e_ij,e_ik>^s, <e_ij,e_ik>^t)

Source: Park, Kim, Lu, Cho, "Relational Knowledge Distillation" (CVPR 2019, arXiv 1904.05068,
section 3). huber is the smooth L1 loss with threshold 1. omega, 1 without a mask: settled here.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sokd.methods.checks import layer_pairs, number
from sokd.methods.common import (
    Maps,
    Method,
    Shapes,
    Step,
    Weights,
    masked,
    squares,
    total,
    unmixed,
    wide,
)
from sokd.methods.sp import products

__all__ = ["RKD", "embedding", "rkd"]


def rkd(
    student: Maps,
    teacher: Maps,
    weight: Weights = None,
    *,
    distance: float = 25.0,
    angle: float = 50.0,
) -> Tensor:
    """Huber losses of the distances and the angles within the batch.

        f_s, f_t = torch.randn(8, 4, requires_grad=True), torch.randn(8, 16)
        sokd.methods.rkd(f_s, f_t).backward()

    Args:
        student: [B, D_s], or maps [B, C_s, H_s, W_s], which are averaged over their cells; or a
            list of them.
        teacher: [B, D] or [B, C, H, W], constant, or an equally long list.
        weight: omega [B, H, W] at the teacher's size (maps only), or one (or None) for each layer:
            both sides are multiplied by its square root before the average.
        distance, angle: weights of the two parts. The paper uses 25 and 50 for classification.

    Returns:
        [] float32 (float64 for float64), the sum over the layers; 0 for a batch of 0 or 1.

    Memory: B^2 D and B^3 numbers. Settled here: two equal samples have the direction 0 and are left
    out of the mean distance; their gradient is bounded.
    """
    _check_options(distance, angle)
    pairs = layer_pairs("rkd", student, teacher, weight, embeddings=True)
    return total([_relations(*pair, distance, angle) for pair in pairs])


def _check_options(distance: float, angle: float) -> None:
    number("rkd", "distance", distance, least=0)
    number("rkd", "angle", angle, least=0)


def _relations(
    student: Tensor, teacher: Tensor, weight: Tensor | None, distance: float, angle: float
) -> Tensor:
    batch = max(student.shape[0], 1)
    with unmixed(student):
        (far_s, turn_s), (far_t, turn_t) = (
            _geometry(embedding(features, weight)) for features in (student, teacher)
        )
        distances = F.smooth_l1_loss(far_s, far_t, reduction="sum")
        angles = F.smooth_l1_loss(turn_s, turn_t, reduction="sum")
        return distance / batch**2 * distances + angle / batch**3 * angles


def embedding(features: Tensor, weight: Tensor | None) -> Tensor:
    """[B, D] as it is, maps [B, C, H, W] times the root of omega as means over cells [B, C]."""
    features = masked(wide(features), weight)
    return features if features.dim() == 2 else features.mean((2, 3))


def _geometry(points: Tensor) -> tuple[Tensor, Tensor]:
    """points [B, D] -> relative distances [B, B], cosines of the angles at each point [B, B, B]."""
    difference = points.unsqueeze(0) - points.unsqueeze(1)
    squared = squares(difference, 2)
    apart = squared > 0
    # sqrt has no finite gradient at 0
    distance = torch.where(apart, squared, 1.0).sqrt()
    direction = difference / distance.unsqueeze(2)
    distance = distance * apart
    # not `distance[apart].mean()`, whose size synchronises with the device
    mean = distance.sum() / apart.sum().clamp(min=1)
    return distance / torch.where(mean > 0, mean, 1.0), products(direction)


class RKD(Method):
    """`rkd` as a `Method`, on the student's maps without an adapter."""

    name: ClassVar[str] = "rkd"
    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    default_weight: ClassVar[float] = 1.0

    def __init__(
        self, student_shapes: Shapes = (), teacher_shapes: Shapes = (), *, distance: float = 25.0,
        angle: float = 50.0,
    ) -> None:  # fmt: skip
        super().__init__(student_shapes, teacher_shapes)
        _check_options(distance, angle)
        self.distance, self.angle = distance, angle

    def forward(self, step: Step) -> Tensor:
        options = {"distance": self.distance, "angle": self.angle}
        return rkd(step.student, step.teacher, step.weight, **options)
