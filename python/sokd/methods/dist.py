"""DIST: correlations over the classes of a sample and over the samples of a class.

    p = softmax(logits / T) [B, K]
    r(u, v) = <u - mean u, v - mean v> / (|u - mean u| |v - mean v| + 1e-8)
    dist = T^2 * (beta  * (1 - mean_b r(p_s[b, :], p_t[b, :]))           inter-class
                + gamma * (1 - mean_k r(p_s[:, k], p_t[:, k])))          intra-class

Source: Huang, You, Wang, Qian, Xu, "Knowledge Distillation from A Stronger Teacher" (NeurIPS 2022,
arXiv 2205.10536, section 3).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from sokd.methods.checks import logits_pair, number
from sokd.methods.common import Method, Shapes, Step, once
from sokd.ops.runtime import apply

__all__ = ["DIST", "dist"]

_EPS = 1e-8
_ROUNDINGS = 4  # the rounding error of a constant minus its mean, in units in the last place


def dist(
    student_logits: Tensor, teacher_logits: Tensor, *, beta: float = 1.0, gamma: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    """One minus Pearson's correlation of the predictions, by rows and by columns.

        student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
        sokd.methods.dist(student, teacher).backward()

    Args:
        student_logits, teacher_logits: [B, K], K >= 2, any floating-point dtypes; [B, K, H, W]
            is B * H * W samples, as in the authors' code for segmentation.
        beta, gamma: weights of the two relations; the paper's 2 and 2 are `default_weight` times
            these.
        temperature: T; the paper uses 4 on CIFAR-100 and 1 on ImageNet. The factor T^2 is that of
            the authors' code.

    Returns:
        [] float32 (float64 for float64); 0 for an empty batch. A second derivative raises.

    A correlation without variance (a batch of one, or the same prediction for every sample) counts
    as 0, with gradient 0. The formula would give a gradient of 1e8 there, at the first step of a
    classifier that is initialised to zero.
    """
    _check_options(beta, gamma, temperature)
    student, teacher = logits_pair("dist", student_logits, teacher_logits)
    if student.shape[0] == 0:
        return student.sum() * 0
    if temperature != 1:
        student, teacher = student / temperature, teacher / temperature
    scale = temperature**2
    loss: Tensor = apply(
        _Relations, student.softmax(1), teacher.softmax(1), scale * beta, scale * gamma
    )[0]
    return loss


def _check_options(beta: float, gamma: float, temperature: float) -> None:
    number("dist", "beta", beta, least=0)
    number("dist", "gamma", gamma, least=0)
    number("dist", "temperature", temperature, above=0)


class _Relations(torch.autograd.Function):
    """(loss, d_p_s), with a the student's and b the teacher's centred vector.

    r = <a, b> / (|a| |b| + 1e-8) has d_a = (b - r |b| / |a| a) / (|a| |b| + 1e-8), which is
    centred, so it is d_p too.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(p_s: Tensor, p_t: Tensor, beta: float, gamma: float) -> tuple[Tensor, Tensor]:
        (batch, classes), mean_s = p_s.shape, p_s.mean(0)
        rounding = _ROUNDINGS * torch.finfo(p_s.dtype).eps
        inter, d_inter = _correlation(
            p_s - 1 / classes, p_t - 1 / classes, 1, rounding * classes**-0.5
        )
        intra, d_intra = _correlation(
            p_s - mean_s, p_t - p_t.mean(0), 0, rounding * batch**0.5 * mean_s
        )
        loss = beta + gamma - inter * (beta / batch) - intra * (gamma / classes)
        return loss, d_inter.mul_(-beta / batch).add_(d_intra, alpha=-gamma / classes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], inputs[0])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        return upstream * once("dist", *ctx.saved_tensors), None, None, None


def _correlation(a: Tensor, b: Tensor, dim: int, noise: Tensor | float) -> tuple[Tensor, Tensor]:
    """The sum of the cosines along `dim`, and its gradient; both 0 where |a| is at most `noise`."""
    length_a, length_b = ((each * each).sum(dim, keepdim=True).sqrt_() for each in (a, b))
    varies = length_a > noise
    lengths = torch.where(varies, length_a * length_b + _EPS, torch.inf)
    cosine = (a * b).sum(dim, keepdim=True).div_(lengths)
    share = cosine * length_b / (torch.where(varies, length_a, 1.0) * lengths)
    return cosine.sum(), (b / lengths).addcmul_(a, share, value=-1)


class DIST(Method):
    """`dist` as a `Method`. SoKD's mask applies to features and is not used."""

    name: ClassVar[str] = "dist"
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    default_weight: ClassVar[float] = 2.0

    def __init__(
        self, student_shapes: Shapes = (), teacher_shapes: Shapes = (), *, beta: float = 1.0,
        gamma: float = 1.0, temperature: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(student_shapes, teacher_shapes)
        _check_options(beta, gamma, temperature)
        self.beta, self.gamma, self.temperature = beta, gamma, temperature

    def forward(self, step: Step) -> Tensor:
        student, teacher = self.logits(step)
        return dist(
            student, teacher, beta=self.beta, gamma=self.gamma, temperature=self.temperature
        )
