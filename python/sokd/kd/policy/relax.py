"""RELAX (Grathwohl, Choi, Wu, Roeder, Duvenaud, 2018): an unbiased gradient of E[f(choice, gates)].

    estimate = [f(b) - Q(z~)] * grad log P(b) + grad Q(z) - grad Q(z~)

b is the hard sample, z its perturbed logits, z~ perturbed logits drawn given b. Q is a small
network trained to minimise the mean squared estimate; the estimate is unbiased for any Q.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sokd.kd.policy.policy import Draw, Policy, Sample
from sokd.ops import draw as draw_uniforms

__all__ = ["ControlVariate", "estimate", "score"]

_HIDDEN = 100
_STREAM = 2**61  # counters that no step of the search reaches


class ControlVariate(nn.Module):
    """Q(z): 100 tanh units, fed sigmoid(z / T) of the gates and softmax(z / T) of the choice."""

    def __init__(
        self, subpolicies: int, *, temperature: float, seed: Tensor,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__()
        self.temperature = temperature
        inputs = 3 * subpolicies
        count = _HIDDEN * (inputs + 2) + 1
        # nn.Linear's own distribution, uniform in -+1/sqrt(inputs), but from the search's seed
        signed = 2 * draw_uniforms(seed, torch.full_like(seed, _STREAM), count)[0].to(dtype) - 1
        hidden, out = signed[: _HIDDEN * (inputs + 1)], signed[_HIDDEN * (inputs + 1) :]
        # weight | bias
        self.hidden = nn.Parameter(hidden.reshape(_HIDDEN, inputs + 1) * inputs**-0.5)
        self.out = nn.Parameter(out.reshape(1, _HIDDEN + 1) * _HIDDEN**-0.5)

    def forward(self, z_choice: Tensor, z_gates: Tensor) -> Tensor:
        """z_choice [G, K], z_gates [G, K, 2] -> scalar: the mean over the groups, 0 without any."""
        choice = (z_choice / self.temperature).softmax(1)
        gates = (z_gates / self.temperature).sigmoid().flatten(1)
        hidden = torch.tanh(_linear(torch.cat([gates, choice], dim=1), self.hidden))
        values = _linear(hidden, self.out)
        return values.sum() / max(len(values), 1)


def _linear(values: Tensor, weight_and_bias: Tensor) -> Tensor:
    return F.linear(values, weight_and_bias[:, :-1], weight_and_bias[:, -1])


def log_probability(policy: Policy, sample: Sample) -> Tensor:
    """log P(b) of the choices and all gates, summed over the groups."""
    choice = policy.alpha.log_softmax(0)[sample.chosen].sum()
    beta = policy.beta
    return choice + torch.where(sample.gates, beta.log(), (-beta).log1p()).sum()


def conditional(policy: Policy, sample: Sample, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """z~ [G, K] and [G, K, 2]: perturbed logits given the sample; uniforms [G, >= 3K]."""
    count = len(policy.policies)
    v, w = uniforms[:, :count], uniforms[:, count : 3 * count].reshape(-1, count, 2)
    z_choice = _given_choice(policy.alpha.log_softmax(0), sample.chosen, v)
    return z_choice, _given_gates(policy.beta, sample.gates, w)


def _given_choice(log_p: Tensor, chosen: Tensor, v: Tensor) -> Tensor:
    """z~_c = -log(-log v_c);  z~_i = -log(-log v_i / p_i - log v_c)  for i != c."""
    top = -v.gather(1, chosen.unsqueeze(1)).log()  # -log v_c
    others = -(-v.log() * (-log_p).exp() + top).log()
    is_chosen = torch.arange(v.shape[1], device=v.device) == chosen.unsqueeze(1)
    return torch.where(is_chosen, -top.log(), others)


def _given_gates(beta: Tensor, gates: Tensor, v: Tensor) -> Tensor:
    """z~ = logit(beta) + logit(v'), with v' = v (b - 1)(q - 1) + b (v q + 1 - q) and q = beta.

    1 - v' is computed for each b, q (1 - v) and 1 - v (1 - q): 1 minus a v' that rounds to 1 would
    give infinity.
    """
    below = (v * (1 - beta), 1 - v * (1 - beta))
    above = (v * beta + 1 - beta, beta * (1 - v))
    conditioned, rest = (torch.where(gates, on, off) for on, off in zip(above, below, strict=True))
    return beta.logit() + conditioned.log() - rest.log()


def score(policy: Policy, draw: Draw) -> tuple[Tensor, Tensor]:
    """grad log P(b) with respect to alpha [K] and beta [K, 2]."""
    with torch.enable_grad():
        logs = log_probability(policy, policy.sample(draw))
        d_alpha, d_beta = torch.autograd.grad(logs, [policy.alpha, policy.beta])
    return d_alpha, d_beta


def estimate(
    value: Tensor, policy: Policy, control: ControlVariate, draw: Draw, conditional_draw: Draw
) -> Sequence[Tensor]:
    """The estimate for alpha [K] and beta [K, 2], differentiable in Q's parameters.

    Args:
        value: f(b), a scalar without gradient, for the sample of `draw`.
        conditional_draw: independent of `draw`; its uniforms give z~.
    """
    chi = [policy.alpha, policy.beta]
    with torch.enable_grad():
        sample = policy.sample(draw)
        tilde = control(*conditional(policy, sample, conditional_draw.uniforms))
        scores = torch.autograd.grad(log_probability(policy, sample), chi)
        difference = control(sample.z_choice, sample.z_gates) - tilde
        through = torch.autograd.grad(difference, chi, create_graph=True)
        surplus = value.detach() - tilde
        # as a factor of the estimate Q(z~) is constant in chi; its graph is for the gradient of Q's
        # weights
        return [surplus * grad + path for grad, path in zip(scores, through, strict=True)]
