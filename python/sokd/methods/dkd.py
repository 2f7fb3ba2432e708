"""Decoupled knowledge distillation: separate terms for the target class and the other classes.

    b = (p_y, 1 - p_y);   q = softmax over the classes except y        (of logits / T, on each side)
    dkd = T^2 / B * sum_b  alpha * KL(b_t || b_s) + beta * KL(q_t || q_s)

Source: Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation" (CVPR 2022, arXiv
2203.08679, section 3).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sokd.methods.checks import check_target, logits_pair, number
from sokd.methods.common import Method, Shapes, Step, given

__all__ = ["DKD", "dkd"]


def dkd(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, alpha: float = 1.0,
    beta: float = 8.0, temperature: float = 4.0, ignore_index: int = -100,
) -> Tensor:  # fmt: skip
    """TCKD and NCKD, each with its weight.

        student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
        sokd.methods.dkd(student, teacher, torch.randint(0, 10, (8,)), beta=8.0).backward()

    Args:
        student_logits, teacher_logits: [B, K], K >= 2, any floating-point dtypes.
        target: [B] int64, the true classes, or `ignore_index`.
        alpha, beta: weights of the two parts. The paper uses 1 and 8 for most CIFAR-100 pairs (beta
            from 0.25 to 8), 1 and 0.5 on ImageNet.
        temperature: T; the paper uses 4 on CIFAR-100 and 1 on ImageNet.
        ignore_index: samples with this label are left out of the loss and its mean, as in
            `F.cross_entropy`.

    Returns:
        [] float32 (float64 for float64); 0 for an empty batch. Computed in log space, so that it is
        finite for a probability of 1. The paper increases the weight linearly over the first 20
        epochs.
    """
    _check_options(alpha, beta, temperature)
    student, teacher = logits_pair("dkd", student_logits, teacher_logits, dense=False)
    check_target("dkd", target, student, ignore_index)
    counted = (target != ignore_index).to(student.dtype)
    target = torch.where(target != ignore_index, target, 0).unsqueeze(1)
    (log_s, rest_s), (log_t, rest_t) = (
        _in_two(logits / temperature, target) for logits in (student, teacher)
    )
    true_s, true_t = log_s.gather(1, target).squeeze(1), log_t.gather(1, target).squeeze(1)
    binary = true_t.exp() * (true_t - true_s) + rest_t.exp() * (rest_t - rest_s)
    # q_t is 0 at the target, where both logarithms are finite: the column drops out
    q_t = (log_t.scatter(1, target, _never(log_t)) - rest_t.unsqueeze(1)).exp()
    others = (q_t * (log_t - log_s)).sum(1) - (rest_t - rest_s)
    loss = ((alpha * binary + beta * others) * counted).sum()
    return loss * (temperature**2 / counted.sum().clamp(min=1))


def _in_two(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """log p [B, K], and log (1 - p_y) [B] from the other classes, exact where p_y rounds to 1."""
    log = F.log_softmax(logits, dim=1)
    return log, log.scatter(1, target, _never(log)).logsumexp(1)


def _never(log: Tensor) -> float:
    """The logarithm used for probability 0: finite, also after another one is subtracted."""
    return torch.finfo(log.dtype).min / 2


def _check_options(alpha: float, beta: float, temperature: float) -> None:
    number("dkd", "alpha", alpha, least=0)
    number("dkd", "beta", beta, least=0)
    number("dkd", "temperature", temperature, above=0)


class DKD(Method):
    """`dkd` as a `Method`. SoKD's mask applies to features and is not used."""

    name: ClassVar[str] = "dkd"
    needs: ClassVar[frozenset[str]] = frozenset({"logits", "target"})
    default_weight: ClassVar[float] = 1.0

    def __init__(
        self, student_shapes: Shapes = (), teacher_shapes: Shapes = (), *, alpha: float = 1.0,
        beta: float = 8.0, temperature: float = 4.0, ignore_index: int = -100,
    ) -> None:  # fmt: skip
        super().__init__(student_shapes, teacher_shapes)
        _check_options(alpha, beta, temperature)
        self.ignore_index = number("dkd", "ignore_index", ignore_index, whole=True, least=-math.inf)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def forward(self, step: Step) -> Tensor:
        target = given(self.name, "target", step.target, "the target class has its own term")
        student, teacher = self.logits(step)
        return dkd(
            student, teacher, target, alpha=self.alpha, beta=self.beta,
            temperature=self.temperature, ignore_index=self.ignore_index,
        )  # fmt: skip
