"""Gradients of refined maps: choices against a sum over all plans, magnitudes numerically."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import sokd
from sokd.kd.policy import Draw, Policy

SHAPE = (3, 4, 5, 6)
PAIRS = [
    ("shear_x", "rotate"),
    ("translate_y", "noise"),
    ("cutout", "channel_drop"),
    ("noise", "channel_shuffle"),
]


def made(
    granularity: str = "batch", gradient: str = "straight_through", policies: list = PAIRS
) -> Policy:
    policy = Policy(
        policies=policies, granularity=granularity, magnitude_gradient=gradient
    ).double()
    with torch.no_grad():
        policy.alpha.normal_(std=0.3)
        policy.beta.uniform_(0.2, 0.8)
        policy.magnitude.uniform_(0.6, 0.95)
    return policy


def plain(
    features: Tensor, policy: Policy, draw: Draw, index: int, gates: tuple[bool, bool]
) -> Tensor:
    """T_index(features; gates): the reference with a policy of that sub-policy, gates certain."""
    alone = Policy(policies=[policy.policies[index]], granularity=policy.granularity).double()
    with torch.no_grad():
        alone.magnitude.copy_(policy.magnitude[index : index + 1])
        alone.beta.copy_(torch.tensor([[1 - 1e-9 if gate else 1e-9 for gate in gates]]))
    own = Draw(
        torch.cat([torch.full_like(draw.uniforms[:, :3], 0.5), draw.uniforms[:, -2:]], dim=1),
        draw.seed,
    )
    plan = alone.plan(own, features.shape)
    return sokd.reference.refine(
        features, plan.theta, hole=plan.hole, sigma=plan.sigma, perm=plan.perm, keep=plan.keep,
        seed=plan.seed,
    )  # fmt: skip


def dense(features: Tensor, policy: Policy, draw: Draw) -> Tensor:
    """The sum over all sub-policies and gates at the hard sample, with the relaxed values'
    gradient.
    """
    sample = policy.sample(draw)
    soft = (sample.z_choice / policy.temperature).softmax(1)
    hard = torch.nn.functional.one_hot(sample.chosen, soft.shape[1]).to(soft.dtype)
    choice = hard + soft - soft.detach()  # [G, K]
    relaxed = (sample.z_gates / policy.temperature).sigmoid()
    gates = sample.gates.to(soft.dtype) + relaxed - relaxed.detach()  # [G, K, 2]
    total = torch.zeros_like(features)
    for index, pattern in itertools.product(
        range(len(policy.policies)), itertools.product((False, True), repeat=2)
    ):
        weight = choice[:, index]
        for gate, on in zip(gates[:, index].unbind(1), pattern, strict=True):
            weight = weight * (gate if on else 1 - gate)
        total = total + weight[:, None, None, None] * plain(features, policy, draw, index, pattern)
    return total


def loss_of(refined: Tensor) -> Tensor:
    return (
        refined.sin()
        * torch.linspace(-1, 1, refined.numel(), dtype=refined.dtype).reshape(refined.shape)
    ).sum()


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_choices_and_gates_against_the_sum_over_all_plans(granularity: str) -> None:
    policy = made(granularity)
    features = torch.randn(SHAPE, dtype=torch.float64)
    seen = set()
    for _ in range(16):
        draw = policy.draw(SHAPE[0])
        seen |= set(policy.sample(draw).chosen.tolist())
        refined, expected = (
            policy(features, draw, differentiable=True),
            dense(features, policy, draw),
        )
        # noise is float32 for all dtypes; kernel and reference differ by up to 1e-6
        torch.testing.assert_close(refined, expected, atol=1e-6, rtol=0)
        chi = [policy.alpha, policy.beta]
        got = torch.autograd.grad(loss_of(refined), chi)
        want = torch.autograd.grad(loss_of(expected), chi)
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
        assert want[0].abs().max() > 1e-3
    assert seen == set(range(len(PAIRS)))


def test_the_two_granularities_agree_on_one_sample() -> None:
    batch = made("batch")
    finer = made("sample")
    finer.load_state_dict(batch.state_dict())
    features = torch.randn(1, 4, 5, 6, dtype=torch.float64)
    for _ in range(5):
        results = []
        for policy in (batch, finer):
            policy.zero_grad()
            loss_of(policy(features, differentiable=True)).backward()
            results.append([p.grad for p in policy.parameters()])
        torch.testing.assert_close(*results)


def test_all_36_in_single_precision() -> None:
    policy = Policy()
    with torch.no_grad():
        policy.magnitude.uniform_()
    twin = Policy().double()
    features = torch.randn(SHAPE)
    for _ in range(3):
        twin.load_state_dict(policy.state_dict())
        draw = policy.draw(SHAPE[0])
        got = torch.autograd.grad(
            loss_of(policy(features, draw, differentiable=True)), policy.alpha
        )[0]
        want = torch.autograd.grad(loss_of(dense(features.double(), twin, draw)), twin.alpha)[0]
        torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_straight_through_is_the_sum_of_the_upstream(granularity: str) -> None:
    policy = made(granularity)
    features = torch.randn(SHAPE, dtype=torch.float64)
    upstream = torch.randn(SHAPE, dtype=torch.float64)
    for _ in range(10):
        draw = policy.draw(SHAPE[0])
        sample = policy.sample(draw)
        expected = torch.zeros_like(policy.magnitude)
        sums = upstream.sum((1, 2, 3)) if granularity == "sample" else upstream.sum().reshape(1)
        for group, chosen in enumerate(sample.chosen.tolist()):
            for slot in range(2):
                if sample.gates[group, chosen, slot] and PAIRS[chosen][slot] != "channel_shuffle":
                    expected[chosen, slot] += sums[group]
        refined = policy(features, draw, differentiable=True)
        torch.testing.assert_close(
            torch.autograd.grad(refined, policy.magnitude, upstream)[0], expected
        )


def test_pathwise_against_finite_differences() -> None:
    pairs = [
        ("shear_x", "rotate"),
        ("shear_y", "translate_x"),
        ("translate_y", "noise"),
        ("rotate", "noise"),
    ]
    policy = made(gradient="pathwise", policies=pairs)
    features = torch.randn(SHAPE, dtype=torch.float64)
    step, checked = 1e-6, 0
    for _ in range(10):
        draw = policy.draw(SHAPE[0])
        got = torch.autograd.grad(
            loss_of(policy(features, draw, differentiable=True)), policy.magnitude
        )[0]
        chosen = policy.sample(draw).chosen.item()
        for slot in range(2):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    policy.magnitude[chosen, slot] += sign * step
                    ends.append(loss_of(policy(features, draw)).item())
                    policy.magnitude[chosen, slot] -= sign * step
            assert got[chosen, slot].item() == pytest.approx(
                (ends[0] - ends[1]) / (2 * step), rel=1e-4, abs=1e-5
            )
            checked += got[chosen, slot].item() != 0
        got[chosen] = 0
        assert not got.any()
    assert checked > 5


def test_pathwise_passes_straight_where_the_effect_steps() -> None:
    policy = made(gradient="pathwise", policies=[("cutout", "channel_drop")])
    features, upstream = (torch.randn(SHAPE, dtype=torch.float64) for _ in range(2))
    draw = policy.draw(SHAPE[0])
    gates = policy.sample(draw).gates[0, 0]
    got = torch.autograd.grad(
        policy(features, draw, differentiable=True), policy.magnitude, upstream
    )[0]
    torch.testing.assert_close(got, (gates * upstream.sum()).unsqueeze(0))


def test_a_second_derivative_is_refused() -> None:
    policy = made()
    refined = policy(torch.randn(SHAPE, dtype=torch.float64), differentiable=True)
    first = torch.autograd.grad(loss_of(refined), policy.alpha, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_relax_leaves_the_choices_to_the_search() -> None:
    policy = Policy(estimator="relax")
    refined = policy(torch.randn(SHAPE), policy.draw(3), differentiable=True)
    refined.sum().backward()
    assert (
        policy.alpha.grad is None and policy.beta.grad is None and policy.magnitude.grad is not None
    )
