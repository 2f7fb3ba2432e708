"""Correlation congruence: the samples of a batch correlate alike on both sides.

    x = the embedding divided by its length
    K_ij = sum_{p = 0}^{order} exp(-2 gamma) (2 gamma)^p / p! <x_i, x_j>^p
    cc = sum over layers of  1 / B^2 * |K^s - K^t|^2

K is the Taylor expansion of the Gaussian kernel exp(-gamma |x_i - x_j|^2).

Source: Peng, Jin, Liu, Zhou, Wu, Liu, Li, Zhang, "Correlation Congruence for Knowledge
Distillation" (ICCV 2019, arXiv 1904.01802, section 3; the weight: Knowledge-Distillation-Zoo's).
RepDistiller's loss of that name, weighted 0.02, is another one. omega, 1 without a mask: settled
here.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from sokd.methods.checks import layer_pairs, number
from sokd.methods.common import Maps, Method, Shapes, Step, Weights, total, unit, unmixed
from sokd.methods.rkd import embedding
from sokd.methods.sp import products

__all__ = ["CC", "cc"]


def cc(
    student: Maps, teacher: Maps, weight: Weights = None, *, gamma: float = 0.4, order: int = 2
) -> Tensor:
    """The mean squared difference of the batches' kernel matrices.

        f_s, f_t = torch.randn(8, 4, requires_grad=True), torch.randn(8, 16)
        sokd.methods.cc(f_s, f_t).backward()

    Args:
        student: [B, D_s], or maps [B, C_s, H_s, W_s], which are averaged over their cells; or a
            list of them.
        teacher: [B, D] or [B, C, H, W], constant, or an equally long list.
        weight: omega [B, H, W] at the teacher's size (maps only), or one (or None) for each layer:
            both sides are multiplied by its root before the average.
        gamma, order: of the kernel and of its expansion; the paper: 0.4 and 2.

    Returns:
        [] float32 (float64 for float64), the sum over the layers; 0 for batches of none and one.
        The usual weight is 100. An embedding of zeros has the product 0 with every sample, with
        gradient 0.
    """
    _check_options(gamma, order)
    pairs = layer_pairs("cc", student, teacher, weight, embeddings=True)
    return total([_difference(*pair, gamma, order) for pair in pairs])


def _check_options(gamma: float, order: int) -> None:
    number("cc", "gamma", gamma, above=0)
    number("cc", "order", order, least=1, whole=True)


def _difference(
    student: Tensor, teacher: Tensor, weight: Tensor | None, gamma: float, order: int
) -> Tensor:
    with unmixed(student):
        kernel_s, kernel_t = (
            _kernel(products(unit(embedding(each, weight), 1)), gamma, order)
            for each in (student, teacher)
        )
        return (kernel_s - kernel_t).square().sum() / max(kernel_s.numel(), 1)


def _kernel(cosines: Tensor, gamma: float, order: int) -> Tensor:
    """The kernel matrix, by Horner's rule from the highest power down."""
    powers = range(order + 1)
    factors = [math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) for p in powers]
    kernel = torch.full_like(cosines, factors[-1])
    for factor in factors[-2::-1]:
        kernel = kernel * cosines + factor
    return kernel


class CC(Method):
    """`cc` as a `Method`, on the student's own maps."""

    name: ClassVar[str] = "cc"
    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    default_weight: ClassVar[float] = 100.0

    def __init__(
        self, student_shapes: Shapes = (), teacher_shapes: Shapes = (), *, gamma: float = 0.4,
        order: int = 2,
    ) -> None:  # fmt: skip
        super().__init__(student_shapes, teacher_shapes)
        _check_options(gamma, order)
        self.gamma, self.order = gamma, order

    def forward(self, step: Step) -> Tensor:
        return cc(step.student, step.teacher, step.weight, gamma=self.gamma, order=self.order)
