"""RELAX on a problem small enough to enumerate: unbiased estimates, distribution of z~."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from sokd.kd.policy import Draw, Policy
from sokd.kd.policy.relax import ControlVariate, conditional, estimate, score

stats = pytest.importorskip("scipy.stats", reason="needs scipy")

PAIRS = [("shear_x", "noise"), ("rotate", "cutout"), ("cutout", "channel_drop")]


@pytest.fixture
def policy() -> Policy:
    torch.set_num_threads(1)  # hundreds of estimates too small for a second thread
    policy = Policy(policies=PAIRS, estimator="relax", granularity="sample").double()
    with torch.no_grad():
        policy.alpha.copy_(torch.tensor([0.5, -0.3, 0.1]))
        policy.beta.copy_(torch.tensor([[0.3, 0.6], [0.8, 0.5], [0.2, 0.7]]))
    return policy


def control_variate() -> ControlVariate:
    return ControlVariate(len(PAIRS), temperature=0.5, seed=torch.tensor([3])).double()


def value_of(chosen: int, first: bool, second: bool) -> float:
    """A quadratic in the choice and its two gates."""
    return (0.7 * chosen - 0.4 + 0.9 * first - 0.6 * second) ** 2


def exact_gradients(policy: Policy) -> list[Tensor]:
    """d E[value] / d (alpha, beta) by enumeration."""
    p = policy.alpha.softmax(0)
    total = torch.zeros((), dtype=p.dtype)
    for chosen, first, second in itertools.product(range(len(PAIRS)), (False, True), (False, True)):
        chance = p[chosen]
        for beta, on in zip(policy.beta[chosen], (first, second), strict=True):
            chance = chance * (beta if on else 1 - beta)
        total = total + chance * value_of(chosen, first, second)
    return list(torch.autograd.grad(total, [policy.alpha, policy.beta]))


def estimates(policy: Policy, control: ControlVariate, count: int) -> tuple[Tensor, Tensor]:
    """`count` independent estimates, [count, 3] and [count, 3, 2], each from a draw of one
    group.
    """
    draws, others = policy.draw(count), policy.draw(count)
    alphas, betas = [], []
    for row in range(count):
        one, other = (Draw(d.uniforms[row : row + 1], d.seed) for d in (draws, others))
        sample = policy.sample(one)
        chosen = sample.chosen.item()
        value = torch.tensor(
            value_of(chosen, *sample.gates[0, chosen].tolist()), dtype=torch.float64
        )
        d_alpha, d_beta = estimate(value, policy, control, one, other)
        alphas.append(d_alpha)
        betas.append(d_beta)
    return torch.stack(alphas), torch.stack(betas)


def test_the_estimate_is_unbiased(policy: Policy) -> None:
    count, exact = 600, exact_gradients(policy)
    control = control_variate()
    with torch.no_grad():
        control.out.mul_(5)  # a Q that is neither 0 nor f
    for found, wanted in zip(
        (part.detach() for part in estimates(policy, control, count)), exact, strict=True
    ):
        error = (found.mean(0) - wanted) / (found.std(0) / math.sqrt(count))
        # nine scores: the largest of nine normals exceeds 3.9 once in a thousand runs
        assert error.abs().max() < 3.9, error
        # the test could have failed
        assert (wanted.abs() > 2 * found.std(0) / math.sqrt(count)).any()


def test_training_the_control_variate_lowers_the_spread(policy: Policy) -> None:
    """The search's update after each estimate, on 30 draws at once to average the noise."""
    control = control_variate()
    adam = torch.optim.Adam(control.parameters(), lr=1e-2)
    start = policy.counter.clone()
    spreads = []
    for _ in range(12):
        policy.counter.copy_(start)
        adam.zero_grad()
        spread = (
            torch.cat([part.flatten(1) for part in estimates(policy, control, 30)], 1)
            .square()
            .mean()
        )
        spread.backward(inputs=list(control.parameters()))
        adam.step()
        spreads.append(spread.item())
    assert spreads[-1] < 0.8 * spreads[0], spreads


def test_z_tilde_makes_the_same_choice_and_has_the_distribution_of_z(policy: Policy) -> None:
    draw, other = policy.draw(4000), policy.draw(4000)
    sample = policy.sample(draw)
    with torch.no_grad():
        z_choice, z_gates = conditional(policy, sample, other.uniforms.double())
    assert torch.equal(z_choice.argmax(1), sample.chosen)
    assert torch.equal(z_gates > 0, sample.gates)
    for tilde, z in ((z_choice, sample.z_choice), (z_gates.flatten(1), sample.z_gates.flatten(1))):
        for a, b in zip(tilde.T, z.detach().T, strict=True):
            assert stats.ks_2samp(a.numpy(), b.numpy()).pvalue > 1e-4


def test_z_tilde_is_the_formula(policy: Policy) -> None:
    draw, other = policy.draw(50), policy.draw(50)
    sample, v = policy.sample(draw), other.uniforms.double()
    z_choice, z_gates = conditional(policy, sample, v)
    q, b, gate_v = policy.beta, sample.gates.double(), v[:, 3:9].reshape(-1, 3, 2)
    conditioned = gate_v * (b - 1) * (q - 1) + b * (gate_v * q + 1 - q)
    expected = q.logit() + conditioned.log() - (1 - conditioned).log()
    torch.testing.assert_close(z_gates, expected)
    p = policy.alpha.softmax(0)
    for row, chosen in enumerate(sample.chosen.tolist()):
        for i in range(3):
            top = -v[row, chosen].log()
            want = -top.log() if i == chosen else -(-v[row, i].log() / p[i] + top).log()
            torch.testing.assert_close(z_choice[row, i], want)


def test_extreme_uniforms_stay_finite() -> None:
    policy = Policy(policies=PAIRS, estimator="relax")
    policy.beta.data.copy_(torch.tensor([[0.01, 0.99], [0.99, 0.01], [0.5, 0.5]]))
    control = ControlVariate(len(PAIRS), temperature=0.5, seed=torch.tensor([3]))
    for parameter in control.parameters():
        torch.nn.init.constant_(parameter, 0.1)
    ends = (2.0**-24, 1 - 2.0**-24)
    for first, second in itertools.product(ends, ends):
        draw, other = (Draw(torch.full((1, 11), u), torch.tensor([0])) for u in (first, second))
        found = estimate(torch.tensor(1.0), policy, control, draw, other)
        assert all(part.isfinite().all() for part in found)


def test_the_control_variate_starts_as_linear_layers_do() -> None:
    control, other = (
        ControlVariate(36, temperature=0.5, seed=torch.tensor([seed])) for seed in (1, 2)
    )
    for weights in (control.hidden.detach(), control.out.detach()):
        bound = (weights.shape[1] - 1) ** -0.5
        scaled = (weights.flatten() / bound).numpy()
        assert stats.kstest(scaled, stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert not torch.equal(control.hidden, other.hidden)
    assert control(torch.randn(2, 36), torch.randn(2, 36, 2)).shape == ()


def test_score_has_mean_zero(policy: Policy) -> None:
    total = score(policy, policy.draw(20_000))
    for part, variance in zip(total, (0.25, 1 / (0.2 * 0.8)), strict=True):
        assert part.abs().max() < 5 * math.sqrt(20_000 * variance)
