"""Gradients of the discrete choices: refined features are multilinear in choice and gates.

    refined = sum_k w_k sum_{b in {0,1}^2} T_k(features; b)
                                           * prod_i gate_{k,i}^{b_i} (1 - gate_{k,i})^{1 - b_i}

with one-hot w and gates in {0, 1}. At a sample (k, b), for upstream u and T_j at its own sampled
gates:

    d w_j    = <u, T_j(features; b_j)>                                     for all K sub-policies
    d gate_i = <u, T_k(features; b_i = 1)> - <u, T_k(features; b_i = 0)>   for the chosen one's

so K + 2 inner products with `refine_dots`, in the backward alone; no tensor of that size is stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sokd.ops import Plans, refine_dots

__all__ = ["with_choices"]


def with_choices(
    refined: Tensor, features: Tensor, choice: Tensor, gates: Tensor, chosen: Tensor, fired: Tensor,
    flips: Plans,
) -> Tensor:  # fmt: skip
    """A view of `refined` whose graph also carries the gradients of the choice and the gates.

    Args:
        refined, features: [B, C, H, W], the result of the sampled plan and its input.
        choice: [G, K] and gates [G, 2]: the relaxed values that receive the gradients
            (straight-through).
        chosen: [G] int64, fired [G, 2] bool: the sample. G is 1 or B.
        flips: V = K + 2 plans: all sub-policies at their gates, then the chosen one with either
            gate flipped.
    """
    inputs = (refined, choice, gates, features, chosen, fired, *flips)
    return _Choices.apply(*inputs)  # type: ignore[no-any-return, no-untyped-call]


class _Choices(torch.autograd.Function):
    @staticmethod
    def forward(refined: Tensor, *_: Any) -> Tensor:
        return refined.view_as(refined)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[3:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        features, chosen, fired, *flips = ctx.saved_tensors
        plans = Plans(*flips)
        if chosen.shape[0] == 1:
            dots = refine_dots(features, upstream, plans)[None]  # [G, K + 2]
        else:
            dots = refine_dots(features, upstream, plans, by_sample=True)[0].T
        subpolicies = dots.shape[1] - 2
        d_choice, flipped = dots[:, :subpolicies], dots[:, subpolicies:]
        current = d_choice.gather(1, chosen.unsqueeze(1))
        d_gates = torch.where(fired, current - flipped, flipped - current)
        return upstream, d_choice, d_gates, *[None] * 9
