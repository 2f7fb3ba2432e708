"""Probabilistic knowledge transfer: samples are neighbours with the same probabilities.

    k_ij = (1 + cosine(x_i, x_j)) / 2;   p_ij = k_ij / sum_l k_il          (the sample itself too)
    pkt = sum over layers of  1 / B^2 * sum_ij p_ij^t log ((p_ij^t + 1e-7) / (p_ij^s + 1e-7))

Source: Passalis, Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer" (ECCV
2018, arXiv 1803.10837, section 3; the mean over all pairs and the 1e-7 as in the authors' code).
omega, 1 without a mask: settled here.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sokd.methods.checks import layer_pairs
from sokd.methods.common import Maps, Method, Step, Weights, total, unmixed
from sokd.methods.rkd import embedding

__all__ = ["PKT", "pkt"]

_EPS = 1e-7


def pkt(student: Maps, teacher: Maps, weight: Weights = None) -> Tensor:
    """The divergence of the neighbours' probabilities within the batch.

        f_s, f_t = torch.randn(8, 4, requires_grad=True), torch.randn(8, 16)
        sokd.methods.pkt(f_s, f_t).backward()

    Args:
        student: [B, D_s], or maps [B, C_s, H_s, W_s], which are averaged over their cells; or a
            list of them. The paper: the layer before the classifier.
        teacher: [B, D] or [B, C, H, W], constant, or an equally long list.
        weight: omega [B, H, W] at the teacher's size (maps only), or one (or None) for each layer:
            both sides are multiplied by its root before the average.

    Returns:
        [] float32 (float64 for float64), the sum over the layers; 0 for batches of none and one.
        The usual weight is 30000. An embedding of zeros has the cosine 0 to every sample, with
        gradient 0.
    """
    pairs = layer_pairs("pkt", student, teacher, weight, embeddings=True)
    return total([_divergence(*pair) for pair in pairs])


def _divergence(student: Tensor, teacher: Tensor, weight: Tensor | None) -> Tensor:
    with unmixed(student):
        p_s, p_t = (_neighbours(embedding(each, weight)) for each in (student, teacher))
        share = p_t / max(p_t.numel(), 1)
        return (share * ((p_t + _EPS) / (p_s + _EPS)).log()).sum()


def _neighbours(points: Tensor) -> Tensor:
    """points [B, D] -> each one's probabilities [B, B].

    Row i is k times 2 |x_i|, which the division by its sum cancels: the points are not scaled.
    """
    products = points @ points.mT
    square = products.diagonal()
    length = torch.where(square > 0, square, 1.0).sqrt()  # the root has no finite gradient at 0
    near = products / length + length.unsqueeze(1)
    return near / near.sum(1, keepdim=True)


class PKT(Method):
    """`pkt` as a `Method`, on the student's own maps."""

    name: ClassVar[str] = "pkt"
    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    default_weight: ClassVar[float] = 30000.0

    def forward(self, step: Step) -> Tensor:
        return pkt(step.student, step.teacher, step.weight)
