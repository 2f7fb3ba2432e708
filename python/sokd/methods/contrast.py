"""CRD's loss for one side, with its gradient, from a bank of embeddings.

s_bk = <anchor_b, bank[picked_bk]> / tau;   log Z = log(N * mean exp s), unless known;   c = K / N
x = s - log Z - log c;   loss = 1/B * sum_b [softplus(-x_b0) + sum_{k > 0} softplus(x_bk)]
d_x = 1/B * (-sigmoid(-x_b0), sigmoid(x_bk));   d_anchor_b = 1/tau * sum_k d_x_bk * bank[picked_bk]
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sokd.methods.common import once

__all__ = ["noise_contrast"]

# Up to this many rows of the bank for each picked row, a product with the whole bank is faster than
# a gather of the picked rows. Measured for 64 x 16385 rows of 128: 18 against 66 ms at a ratio of
# 3, 500 against 200 ms at 78.
_DENSE_UP_TO = 8


def noise_contrast(
    anchor: Tensor, bank: Tensor, picked: Tensor, known: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The loss, a scalar with a gradient for the anchor, and the log Z it used.

    Args:
        anchor: [B, D], of norm 1; bank: [N, D], constant.
        picked: [B, K + 1] int64, rows of the bank: the positive first, then the negatives.
        known: [] log Z; NaN: it is estimated from these scores.
    """
    loss, _, log_z = _NoiseContrast.apply(  # type: ignore[no-untyped-call]
        anchor, bank, picked, known, temperature
    )
    return loss, log_z


class _NoiseContrast(torch.autograd.Function):
    """(loss, d_anchor, log Z). The forward computes the gradient and keeps no B x K scores.

    The backward cannot compute it, because the bank has been updated by then.
    """

    @staticmethod
    def forward(
        anchor: Tensor, bank: Tensor, picked: Tensor, known: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        (batch, count), rows = picked.shape, bank.shape[0]
        similarities = _Similarities(anchor, bank, picked)
        scores = similarities.values() / temperature
        fresh = scores.logsumexp((0, 1)) + (math.log(rows) - math.log(batch * count))
        log_z = torch.where(known.isnan(), fresh, known)
        x = scores.sub_(log_z + math.log((count - 1) / rows))
        x[:, 0].neg_()
        loss = F.softplus(x).sum() / batch
        d_x = x.sigmoid_().div_(batch * temperature)
        d_x[:, 0].neg_()
        return loss, similarities.pull(d_x), log_z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(output[1], inputs[0])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return (upstream * once("crd", *ctx.saved_tensors), None, None, None, None)


class _Similarities:
    """<anchor_b, bank[picked_bk]> [B, K + 1] and its backward; no rows [B, K + 1, D] are stored."""

    def __init__(self, anchor: Tensor, bank: Tensor, picked: Tensor) -> None:
        self.anchor, self.bank, self.picked = anchor, bank, picked
        self.dense = bank.shape[0] <= _DENSE_UP_TO * picked.shape[1]

    def values(self) -> Tensor:
        if self.dense:
            return (self.anchor @ self.bank.T).gather(1, self.picked)
        # these products are the gradient of a weighted sum of rows with respect to its weights
        with torch.enable_grad():
            ones = self.anchor.new_zeros(self.picked.shape).requires_grad_()
            (dots,) = torch.autograd.grad(self._weighted(ones), ones, self.anchor)
        return dots

    def pull(self, d_values: Tensor) -> Tensor:
        if not self.dense:
            return self._weighted(d_values)
        everywhere = self.anchor.new_zeros(self.anchor.shape[0], self.bank.shape[0])
        return everywhere.scatter_add_(1, self.picked, d_values) @ self.bank

    def _weighted(self, weights: Tensor) -> Tensor:
        return F.embedding_bag(self.picked, self.bank, per_sample_weights=weights, mode="sum")
