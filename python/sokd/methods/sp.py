"""Similarity-preserving distillation: match the similarity matrices of the batch.

    A = sqrt(omega) F as rows [B, C*H*W];   G = A A^T [B, B]
    G~ = G with each row divided by its norm
    sp = sum over layers of  1 / B^2 * |G~_s - G~_t|^2

Source: Tung, Mori, "Similarity-Preserving Knowledge Distillation" (ICCV 2019, arXiv 1907.09682,
section 3). omega, 1 without a mask: settled here.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from sokd.methods.checks import layer_pairs
from sokd.methods.common import Maps, Method, Step, Weights, masked, total, unit, unmixed, wide
from sokd.ops.runtime import apply

__all__ = ["SP", "products", "sp"]


def sp(student: Maps, teacher: Maps, weight: Weights = None) -> Tensor:
    """The mean squared difference of the batches' similarity matrices.

        f_s, f_t = torch.randn(8, 4, 7, 7, requires_grad=True), torch.randn(8, 16)
        sokd.methods.sp(f_s, f_t).backward()

    Args:
        student: [B, C_s, H_s, W_s] or [B, D_s], any channels, any size, or a list of them, one a
            layer.
        teacher: [B, C, H, W] or [B, D], constant, or an equally long list.
        weight: omega [B, H, W] at the teacher's size (maps only), or one (or None) for each layer.

    Returns:
        [] float32 (float64 for float64), the sum over the layers; 0 for an empty batch, and for a
        batch of one (its only similarity is 1 on both sides). The usual weight is 3000.

    The products are float32 under autocast too, because squared features of a deep layer overflow
    half precision.
    """
    pairs = layer_pairs("sp", student, teacher, weight, embeddings=True)
    return total([_difference(*pair) for pair in pairs])


def _difference(student: Tensor, teacher: Tensor, weight: Tensor | None) -> Tensor:
    with unmixed(student):
        alike_s, alike_t = (
            unit(products(masked(wide(features), weight).flatten(1)), 1)
            for features in (student, teacher)
        )
        return (alike_s - alike_t).square().sum() / max(alike_s.numel(), 1)


def products(rows: Tensor) -> Tensor:
    """rows [..., N, D] -> all their inner products [..., N, N]."""
    return apply(_Products, rows) if rows.requires_grad else rows @ rows.mT


class _Products(torch.autograd.Function):
    """R R^T with the gradient (u + u^T) R, one matrix product instead of autograd's two."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor) -> Tensor:
        return rows @ rows.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        d_rows: Tensor = (upstream + upstream.mT) @ rows
        return d_rows


class SP(Method):
    """`sp` as a `Method`, on the student's maps without an adapter."""

    name: ClassVar[str] = "sp"
    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    default_weight: ClassVar[float] = 3000.0

    def forward(self, step: Step) -> Tensor:
        return sp(step.student, step.teacher, step.weight)
