"""Attention transfer: the student's spatial attention maps match the teacher's.

    E[b,y,x] = omega[b,y,x] * sum_c F[b,c,y,x]^2;   Q = E / |E|_2 for each sample
    d_F = 2 * omega * F * d_E
    at = sum over layers of  mean_{b,y,x} (Q_s - Q_t)^2

Source: Zagoruyko, Komodakis, "Paying More Attention to Attention" (ICLR 2017, arXiv 1612.03928,
section 3.1, p = 2). omega, 1 without a mask: docs/method.md 4.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from sokd.kd.adapter import resize
from sokd.methods.checks import check_cells, layer_pairs
from sokd.methods.common import (
    Maps,
    Method,
    Step,
    Weights,
    resized,
    shared_size,
    squares,
    total,
    unit,
    wide,
)

__all__ = ["AT", "at"]


def at(student: Maps, teacher: Maps, weight: Weights = None) -> Tensor:
    """The mean squared difference of normalised attention maps.

        f_s, f_t = torch.randn(2, 4, 14, 14, requires_grad=True), torch.randn(2, 8, 7, 7)
        sokd.methods.at(f_s, f_t).backward()

    Args:
        student: [B, C_s, H_s, W_s], any channels, any size, or a list of them, one a layer.
        teacher: [B, C, H, W], constant, or an equally long list.
        weight: omega [B, H, W] at the teacher's size, or one (or None) for each layer.

    Returns:
        [] float32 (float64 for float64), the sum over the layers; 0 for an empty batch. The usual
        weight is 1000.

    Where the sizes differ, the larger map is average-pooled to the smaller size first, as in the
    usual code bases (each axis separately: settled here), and so is omega. An all-zero map has the
    attention 0, with gradient 0. Maps of one cell, whose attention is always 1, are refused.
    """
    return total([_transfer(*pair) for pair in layer_pairs("at", student, teacher, weight)])


def _transfer(student: Tensor, teacher: Tensor, weight: Tensor | None) -> Tensor:
    size = shared_size(student, teacher)
    check_cells("at", (student, teacher), size[0] * size[1])
    student, teacher = (resize(wide(features), size) for features in (student, teacher))
    energies = [squares(student, 1), squares(teacher, 1)]
    if weight is not None:
        at_size = resized(weight, student)
        energies = [energy * at_size for energy in energies]
    attention_s, attention_t = (unit(energy.flatten(1), 1) for energy in energies)
    return (attention_s - attention_t).square().sum() / max(attention_s.numel(), 1)


class AT(Method):
    """`at` as a `Method`, on the student's maps without an adapter."""

    name: ClassVar[str] = "at"
    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    default_weight: ClassVar[float] = 1000.0

    def forward(self, step: Step) -> Tensor:
        return at(step.student, step.teacher, step.weight)
