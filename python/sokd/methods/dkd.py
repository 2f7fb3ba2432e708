"""Decoupled knowledge distillation: the target's probability and the distribution over the others, apart.

    b = (p_y, 1 - p_y);   q = softmax over the classes but y           (of logits / T, on each side)
    dkd = T^2 / B * sum_b  alpha * KL(b_t || b_s) + beta * KL(q_t || q_s)

Source: Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation" (CVPR 2022, arXiv 2203.08679,
section 3).
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sokd.methods.checks import logits_pair
from sokd.methods.common import Method, Shapes, Step, given

__all__ = ["DKD", "dkd"]


def dkd(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, alpha: float = 1.0, beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:  # fmt: skip
    """TCKD and NCKD, weighted apart.

    Args:
        student_logits, teacher_logits: [B, K], K >= 2, any floating-point dtypes.
        target: [B] int64, the true classes.
        alpha, beta: weights of the two parts; the paper: 1 and 8 for most CIFAR-100 pairs (0.25 to 8), 1 and
            0.5 on ImageNet.
        temperature: T; the paper: 4 on CIFAR-100, 1 on ImageNet.

    Returns:
        [] float32 (float64 for float64); 0 for an empty batch. All in logarithms, so that predictions without
        doubt (p_y = 1) stay finite. The paper raises the weight linearly over the first 20 epochs.
    """
    student, teacher = logits_pair("dkd", student_logits, teacher_logits, dense=False)
    target = _checked_target(target, student).unsqueeze(1)
    (log_s, rest_s), (log_t, rest_t) = (
        _in_two(logits / temperature, target) for logits in (student, teacher)
    )
    true_s, true_t = log_s.gather(1, target).squeeze(1), log_t.gather(1, target).squeeze(1)
    binary = true_t.exp() * (true_t - true_s) + rest_t.exp() * (rest_t - rest_s)
    # q_t is 0 at the target, where both logarithms are finite: the column drops out
    q_t = (log_t.scatter(1, target, _never(log_t)) - rest_t.unsqueeze(1)).exp()
    others = (q_t * (log_t - log_s)).sum(1) - (rest_t - rest_s)
    return (alpha * binary + beta * others).sum() * (temperature**2 / max(student.shape[0], 1))


def _in_two(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """log p [B, K], and log (1 - p_y) [B] from the other classes' p, exact where p_y rounds to 1."""
    log = F.log_softmax(logits, dim=1)
    return log, log.scatter(1, target, _never(log)).logsumexp(1)


def _never(log: Tensor) -> float:
    """The logarithm of no probability at all; finite, and still so when another one is taken off."""
    return torch.finfo(log.dtype).min / 2


def _checked_target(target: Tensor, logits: Tensor) -> Tensor:
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        got = str(target.dtype) if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"dkd: target must be an int64 tensor [B], got {got}")
    if target.shape != logits.shape[:1]:
        raise ValueError(f"dkd: target must be [{logits.shape[0]}], got {list(target.shape)}")
    return target


class DKD(Method):
    """`dkd` by name. SoKD's mask is about features and does not enter."""

    name: ClassVar[str] = "dkd"
    needs: ClassVar[frozenset[str]] = frozenset({"logits", "target"})
    default_weight: ClassVar[float] = 1.0

    def __init__(
        self, student_shapes: Shapes = (), teacher_shapes: Shapes = (), *, alpha: float = 1.0,
        beta: float = 8.0, temperature: float = 4.0,
    ) -> None:  # fmt: skip
        super().__init__(student_shapes, teacher_shapes)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def forward(self, step: Step) -> Tensor:
        target = given(
            self.name, "target", step.target, "it tells the target class from the others"
        )
        student, teacher = self.logits(step)
        return dkd(
            student, teacher, target, alpha=self.alpha, beta=self.beta, temperature=self.temperature
        )
