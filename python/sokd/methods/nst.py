"""Neuron selectivity transfer: channels respond to the same cells on both sides.

    f = sqrt(omega) F, each channel of each sample divided by its length over the cells
    k(a, b) = <a, b>^2;   mmd = mean_{i,j} k(t_i, t_j) + mean_{i,j} k(s_i, s_j)
                                - 2 mean_{i,j} k(s_i, t_j)      over pairs of channels
    nst = sum over layers of  1 / B * sum_b mmd

Source: Huang, Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer" (arXiv
1707.01219, section 4: the maximum mean discrepancy with the polynomial kernel of degree 2, which
the paper prefers). omega, 1 without a mask: settled here.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from sokd.kd.adapter import resize
from sokd.methods.checks import layer_pairs
from sokd.methods.common import (
    Maps,
    Method,
    Step,
    Weights,
    masked,
    shared_size,
    total,
    unit,
    unmixed,
    wide,
)

__all__ = ["NST", "nst"]


def nst(student: Maps, teacher: Maps, weight: Weights = None) -> Tensor:
    """The squared maximum mean discrepancy of the channels' patterns.

        f_s, f_t = torch.randn(2, 4, 14, 14, requires_grad=True), torch.randn(2, 8, 7, 7)
        sokd.methods.nst(f_s, f_t).backward()

    Args:
        student: [B, C_s, H_s, W_s], any channels, any size, or a list of them, one a layer.
        teacher: [B, C, H, W], constant, or an equally long list.
        weight: omega [B, H, W] at the teacher's size, or one (or None) for each layer.

    Returns:
        [] float32 (float64 for float64), the sum over the layers; 0 for an empty batch. The usual
        weight is 50.

    Where the sizes differ the larger map is averaged down to the smaller first, as in the usual
    code bases (on each axis by itself: settled here). A channel of zeros counts as a pattern of
    zeros, with gradient 0.
    """
    return total([_discrepancy(*pair) for pair in layer_pairs("nst", student, teacher, weight)])


def _discrepancy(student: Tensor, teacher: Tensor, weight: Tensor | None) -> Tensor:
    size = shared_size(student, teacher)
    with unmixed(student):
        own, other = (
            unit(masked(resize(wide(features), size), weight).flatten(2), 2)
            for features in (student, teacher)
        )
        return _kernels(own, other) / max(own.shape[0], 1)


def _kernels(own: Tensor, other: Tensor) -> Tensor:
    """own [B, C_s, N], other [B, C, N] -> the sum over the batch.

    With A = sum_i s_i s_i^T / C_s, and T likewise, it is |A - T|^2, [N, N] for each sample; with
    more cells than channels the products between channels are the smaller matrices.
    """
    channels, cells = own.shape[1] + other.shape[1], own.shape[2]
    if cells <= channels:
        difference = own.mT @ (own / own.shape[1]) - other.mT @ (other / other.shape[1])
        return difference.square().sum()
    pairs = ((own, own, 1.0), (other, other, 1.0), (own, other, -2.0))
    return total(
        [(a @ b.mT).square().sum() * (scale / (a.shape[1] * b.shape[1])) for a, b, scale in pairs]
    )


class NST(Method):
    """`nst` as a `Method`, on the student's own maps."""

    name: ClassVar[str] = "nst"
    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    default_weight: ClassVar[float] = 50.0

    def forward(self, step: Step) -> Tensor:
        return nst(step.student, step.teacher, step.weight)
