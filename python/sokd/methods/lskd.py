"""Knowledge distillation of standardised logits, which does not depend on their range.

    z = (logits - mean) / std, over the classes;   p = softmax(z / T)
    lskd = T^2 / B * sum_b KL(p_t || p_s)

Source: Sun, Ren, Li, Wang, Cao, "Logit Standardization in Knowledge Distillation" (CVPR 2024, arXiv
2403.01427, section 4).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sokd.methods.checks import logits_pair, number
from sokd.methods.common import Method, Shapes, Step
from sokd.methods.kd import softened_kl

__all__ = ["LSKD", "lskd"]

_SMALLEST_VARIANCE = 1e-14  # the square of the 1e-7 that the authors' code adds to the deviation


def lskd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 2.0) -> Tensor:
    """`kd` of logits that have mean 0 and standard deviation 1 over the classes, on both sides.

        student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
        sokd.methods.lskd(student, teacher, temperature=2.0).backward()

    Args:
        student_logits, teacher_logits: [B, K] or, for each position, [B, K, H, W]; K >= 2, any
            floating-point dtypes.
        temperature: the base temperature. The paper uses 2 (3 or 4 for some pairs) and a weight of
            9 (12 for ResNet110 -> ResNet20), with 0.1 for the cross entropy, 1 on ImageNet.

    Returns:
        [] float32 (float64 for float64); 0 for an empty batch. Finite for logits up to 1e18 in
        float32.

    The deviation divides by K - 1, as the authors' code does. Settled here: equal logits for all
    classes count as a uniform prediction, with gradient 0. The formula would give a gradient of 1e7
    there, at the first step of a classifier that is initialised to zero.
    """
    number("lskd", "temperature", temperature, above=0)
    student, teacher = logits_pair("lskd", student_logits, teacher_logits)
    return softened_kl(_standardised(student), _standardised(teacher), temperature)


def _standardised(logits: Tensor) -> Tensor:
    """Standardise by `layer_norm`, whose deviation divides by K; the factor makes it K - 1."""
    classes = logits.shape[1]
    low, high = logits.detach().aminmax(dim=1, keepdim=True)
    logits = torch.where(low < high, logits, 0.0)
    return F.layer_norm(logits, (classes,), eps=_SMALLEST_VARIANCE) * math.sqrt(
        (classes - 1) / classes
    )


class LSKD(Method):
    """`lskd` as a `Method`. SoKD's mask applies to features and is not used."""

    name: ClassVar[str] = "lskd"
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    default_weight: ClassVar[float] = 9.0

    def __init__(
        self, student_shapes: Shapes = (), teacher_shapes: Shapes = (), *, temperature: float = 2.0
    ) -> None:
        super().__init__(student_shapes, teacher_shapes)
        self.temperature = number("lskd", "temperature", temperature, above=0)

    def forward(self, step: Step) -> Tensor:
        return lskd(*self.logits(step), temperature=self.temperature)
