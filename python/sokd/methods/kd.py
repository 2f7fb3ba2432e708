"""Knowledge distillation: KL divergence of the softened class probabilities.

    p = softmax(logits / T) [B, K];   kd = T^2 / B * sum_b KL(p_t || p_s)
    d_student = T / B * (p_s - p_t)

Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531,
section 2).
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from sokd.methods.checks import logits_pair, number
from sokd.methods.common import Method, Shapes, Step

__all__ = ["KD", "kd"]


def kd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 4.0) -> Tensor:
    """KL divergence of the softened predictions, times T^2, the mean over the batch.

        student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
        sokd.methods.kd(student, teacher, temperature=4.0).backward()

    Args:
        student_logits, teacher_logits: [B, K] or [B, K, H, W] (segmentation), K >= 2, any
            floating-point dtypes. For a single logit z with a sigmoid pass
            torch.stack([z, 0 * z], 1).
        temperature: T. The usual CIFAR-100 recipe uses T = 4 and a weight of 0.9, with 0.1 for the
            cross entropy.

    Returns:
        [] float32 (float64 for float64): exactly 0 for equal logits; 0 for an empty batch. Dense
        logits are averaged over the positions too, as in Liu et al., "Structured Knowledge
        Distillation for Dense Prediction" (arXiv 1903.04197, pixel-wise distillation, times T^2).
    """
    number("kd", "temperature", temperature, above=0)
    student, teacher = logits_pair("kd", student_logits, teacher_logits)
    return softened_kl(student, teacher, temperature)


def softened_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) of float32 or float64 logits [B, K], the mean over the batch."""
    log_s, log_t = (F.log_softmax(logits / temperature, dim=1) for logits in (student, teacher))
    # log_target: a probability that underflows to 0 would give 0 * -inf
    divergence = F.kl_div(log_s, log_t, reduction="sum", log_target=True)
    return divergence * (temperature**2 / max(student.shape[0], 1))


class KD(Method):
    """`kd` as a `Method`. SoKD's mask applies to features and is not used."""

    name: ClassVar[str] = "kd"
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    default_weight: ClassVar[float] = 0.9

    def __init__(
        self, student_shapes: Shapes = (), teacher_shapes: Shapes = (), *, temperature: float = 4.0
    ) -> None:
        super().__init__(student_shapes, teacher_shapes)
        self.temperature = number("kd", "temperature", temperature, above=0)

    def forward(self, step: Step) -> Tensor:
        return kd(*self.logits(step), temperature=self.temperature)
