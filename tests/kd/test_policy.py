"""The policy: plans of each operation against values by hand, draws, state as a module."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re

import pytest
import torch
from support.cases import compiles, skip_without_fake_cuda
from support.raises import raises
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import sokd
from sokd.kd.policy import Draw, Policy, manual_seed
from sokd.kd.policy.plan import OPERATIONS, PAIRS

stats = pytest.importorskip("scipy.stats", reason="needs scipy")

NAMES = [op.name for op in OPERATIONS]
SHAPE = (2, 4, 10, 20)  # H/W = 1/2: shows errors in the aspect ratio


def policy_of(
    first: str, second: str, *magnitudes: float, fired: tuple[bool, bool] = (True, True), **options
) -> Policy:
    """A policy of one sub-policy whose gates are (all but) certain."""
    policy = Policy(policies=[(first, second)], **options)
    with torch.no_grad():
        policy.magnitude.copy_(torch.tensor([magnitudes]))
        policy.beta.copy_(torch.tensor([[1 - 1e-7 if gate else 1e-7 for gate in fired]]))
    return policy


def draw_of(policy: Policy, *centre: float, seed: int = 3, groups: int = 1) -> Draw:
    """Middling uniforms, and the centre of the hole."""
    uniforms = torch.full((groups, 3 * len(policy.policies) + 2), 0.5)
    if centre:
        uniforms[:, -2:] = torch.tensor(centre)
    return Draw(uniforms, torch.tensor([seed]))


def plan_of(policy: Policy, *centre: float) -> sokd.ops.Plan:
    return policy.plan(draw_of(policy, *centre), SHAPE)


# --------------------------------------------------------------------------------------- operations

ROTATION = [
    [math.cos(math.pi / 6), 0.5 * 0.5, 0],
    [-0.5 * 2, math.cos(math.pi / 6), 0],
]  # 30 degrees, H/W = 1/2


@pytest.mark.parametrize(("name", "magnitude", "theta"), [
    ("shear_x", 1.0, [[1, 0.3, 0], [0, 1, 0]]),
    ("shear_x", 0.25, [[1, -0.15, 0], [0, 1, 0]]),
    ("shear_y", 0.0, [[1, 0, 0], [-0.3, 1, 0]]),
    ("translate_x", 1.0, [[1, 0, 0.9], [0, 1, 0]]),
    ("translate_y", 0.0, [[1, 0, 0], [0, 1, -0.9]]),
    ("rotate", 1.0, ROTATION),
])  # fmt: skip
def test_theta_of_each_operation(name: str, magnitude: float, theta: list[list[float]]) -> None:
    plan = plan_of(policy_of(name, "noise", magnitude, 0.0))
    torch.testing.assert_close(plan.theta, torch.tensor([theta], dtype=torch.float32))
    assert plan.hole is None and plan.perm is None and plan.keep is None


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair[1] < 5])
def test_two_geometric_operations_compose_in_canonical_order(pair: tuple[int, int]) -> None:
    first, second = NAMES[pair[0]], NAMES[pair[1]]

    def square(*fired: bool) -> Tensor:
        theta = plan_of(policy_of(first, second, 0.9, 0.2, fired=fired)).theta
        return torch.cat([theta[0], torch.tensor([[0.0, 0.0, 1.0]])])

    composed = square(True, False) @ square(False, True)
    torch.testing.assert_close(square(True, True), composed)
    assert torch.equal(square(False, False), torch.eye(3))
    assert not torch.allclose(composed, torch.eye(3))


def test_the_order_of_a_pair_as_given_does_not_matter() -> None:
    policy = Policy(policies=[("rotate", "shear_x"), (8, 5)])
    assert policy.policies == ((0, 4), (5, 8))


@pytest.mark.parametrize("name", NAMES[:5])
def test_magnitude_one_half_is_the_identity_to_the_bit(name: str) -> None:
    theta = plan_of(policy_of(name, "noise", 0.5, 0.5)).theta
    assert torch.equal(theta, torch.eye(3)[:2].unsqueeze(0))
    assert not torch.signbit(theta).any()


@pytest.mark.parametrize(
    ("magnitude", "centre", "hole"),
    [
        (1.0, (0.5, 0.5), [4, 8, 6, 12]),  # 0.2 of 10 and 20: 2 by 4 about the cells 5 and 10
        (0.3, (0.5, 0.5), [5, 10, 6, 11]),  # 0.06: 0.6 and 1.2 round to 1 by 1
        (0.01, (0.5, 0.5), [5, 10, 6, 11]),  # rounds to 0 by 0: at least one cell
        (0.0, (0.5, 0.5), [0, 0, 0, 0]),  # v = 0: no hole
        (1.0, (0.01, 0.99), [0, 17, 1, 20]),  # at a corner: clipped
    ],
)
def test_hole(magnitude: float, centre: tuple[float, float], hole: list[int]) -> None:
    plan = plan_of(policy_of("cutout", "noise", magnitude, 0.0), *centre)
    assert plan.hole.tolist() == [hole] and plan.hole.dtype == torch.int64
    assert plan.theta is None and plan.perm is None and plan.keep is None


def test_noise() -> None:
    assert plan_of(policy_of("shear_x", "noise", 0.5, 1.0)).sigma.tolist() == pytest.approx([0.1])
    assert plan_of(policy_of("shear_x", "noise", 0.5, 1.0, fired=(True, False))).sigma.tolist() == [
        0.0
    ]


def test_channel_shuffle_is_a_permutation_when_it_fires() -> None:
    shape = (2, 64, 3, 3)
    policy = policy_of("shear_x", "channel_shuffle", 0.5, 0.5)
    perm = policy.plan(draw_of(policy), shape).perm[0].tolist()
    assert sorted(perm) == list(range(64)) and perm != list(range(64))
    other = policy.plan(draw_of(policy, seed=4), shape).perm[0].tolist()
    assert sorted(other) == list(range(64)) and other != perm
    quiet = policy_of("shear_x", "channel_shuffle", 0.5, 0.5, fired=(True, False))
    assert quiet.plan(draw_of(quiet), shape).perm[0].tolist() == list(range(64))


def test_channel_drop_keeps_with_the_right_probability() -> None:
    policy = policy_of("shear_x", "channel_drop", 0.5, 0.6)  # v = 0.3
    keep = policy.plan(draw_of(policy), (2, 20_000, 1, 1)).keep
    assert keep.dtype == torch.bool
    dropped = int((~keep).sum())
    assert stats.binomtest(dropped, 20_000, 0.3).pvalue > 1e-3
    quiet = policy_of("shear_x", "channel_drop", 0.5, 0.6, fired=(True, False))
    assert quiet.plan(draw_of(quiet), SHAPE).keep.all()


@pytest.mark.parametrize("shape", [(1, 2, 1, 9), (1, 2, 9, 1), (1, 1, 1, 1), (0, 3, 4, 4)])
def test_narrow_and_empty_maps(shape: tuple[int, int, int, int]) -> None:
    policy = Policy(granularity="sample")
    with torch.no_grad():
        policy.magnitude.fill_(0.9)
    for _ in range(20):
        refined = policy(torch.randn(shape))
        assert refined.shape == shape and refined.isfinite().all()


def test_layers_share_the_choice_but_not_noise_or_channels() -> None:
    policy = policy_of("noise", "channel_shuffle", 1.0, 0.5)
    draw = draw_of(policy)
    first, second = (policy.plan(draw, (1, 32, 4, 4), layer=layer) for layer in (0, 1))
    assert torch.equal(first.sigma, second.sigma)
    assert not torch.equal(first.perm, second.perm) and not torch.equal(first.seed, second.seed)


# -------------------------------------------------------------------------------------------- draws


def test_choices_follow_their_probabilities() -> None:
    policy = Policy(granularity="sample", generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        policy.alpha.copy_(torch.linspace(-1, 1, 36))
        policy.beta.copy_(torch.rand(36, 2) * 0.8 + 0.1)
    draws, sample = 20_000, None
    sample = policy.sample(policy.draw(draws))
    counts = torch.bincount(sample.chosen, minlength=36).numpy()
    expected = (policy.alpha.detach().double().softmax(0) * draws).numpy()
    assert stats.chisquare(counts, expected).pvalue > 1e-3
    # gates: one binomial for each; the sum of squared standard scores has 72 degrees of freedom
    beta = policy.beta.detach().double()
    scores = (sample.gates.double().sum(0) - draws * beta) / (draws * beta * (1 - beta)).sqrt()
    assert stats.chi2.sf(scores.square().sum().item(), 72) > 1e-3
    # and independent of each other
    together = torch.corrcoef(sample.gates.flatten(1).double().T)
    assert (together - torch.eye(72)).abs().max() < 5 / math.sqrt(draws)
    chosen = torch.nn.functional.one_hot(sample.chosen, 36).double()
    with_choice = torch.corrcoef(torch.cat([chosen, sample.gates.flatten(1).double()], dim=1).T)[
        :36, 36:
    ]
    assert with_choice.abs().max() < 5 / math.sqrt(draws)


def test_draws_follow_one_another_and_leave_torch_alone() -> None:
    policy, finer = Policy(), Policy(granularity="sample")
    state = torch.get_rng_state()
    first, second = policy.draw(4), policy.draw(4)
    assert policy.counter.tolist() == [2]
    assert not torch.equal(first.uniforms, second.uniforms) and not torch.equal(
        first.seed, second.seed
    )
    assert first.uniforms.shape == (1, 110) and finer.draw(4).uniforms.shape == (4, 110)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(policy.draw_at(policy.seed, torch.tensor([1]), 4).uniforms, second.uniforms)


def test_the_draw_for_fewer_samples_is_the_start_of_that_for_more() -> None:
    policy = Policy(granularity="sample")
    many, few = (policy.draw_at(policy.seed, policy.counter, batch) for batch in (7, 3))
    assert torch.equal(many.uniforms[:3], few.uniforms)
    full, part = policy.plan(many, (7, 5, 4, 4)), policy.plan(few, (3, 5, 4, 4))
    assert torch.equal(full.perm[:3], part.perm) and torch.equal(full.keep[:3], part.keep)


def test_seeds() -> None:
    def seeds() -> list[int]:
        return [Policy().seed.item(), Policy().seed.item()]

    try:
        manual_seed(5)
        first = seeds()
        manual_seed(5)
        assert seeds() == first and first[0] != first[1]
        manual_seed(6)
        assert seeds() != first
    finally:
        sokd.kd.policy.policy._source = None
    torch.manual_seed(1)
    first = seeds()
    torch.manual_seed(1)
    assert seeds() == first
    own = [Policy(generator=torch.Generator().manual_seed(2)).seed.item() for _ in range(2)]
    assert own[0] == own[1] not in first


# ------------------------------------------------------------------------------------------- passes


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_pass_is_refine_of_the_plan_in_both_modes(granularity: str, dtype: torch.dtype) -> None:
    policy = Policy(granularity=granularity)
    with torch.no_grad():
        policy.magnitude.uniform_()
    features = torch.randn(3, 5, 6, 4).to(dtype).to(memory_format=torch.channels_last)
    for _ in range(8):
        draw = policy.draw(3)
        refined = policy(features, draw)
        plan = policy.plan(draw, features.shape)
        assert plan.straight is None and not any(p is not None and p.requires_grad for p in plan)
        expected = sokd.reference.refine(
            features, plan.theta, hole=plan.hole, sigma=plan.sigma, perm=plan.perm, keep=plan.keep,
            seed=plan.seed,
        )  # fmt: skip
        torch.testing.assert_close(refined, expected)
        assert refined.dtype == dtype and refined.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(refined, policy(features, draw, differentiable=True))


def test_a_training_pass_has_no_gradient() -> None:
    features = torch.randn(2, 3, 4, 4, requires_grad=True)
    assert not Policy()(features).requires_grad
    refined = Policy()(features, differentiable=True)
    refined.sum().backward()
    assert features.grad is None


def test_samples_have_their_own_plans() -> None:
    policy = Policy(granularity="sample")
    plan = policy.plan(policy.draw(6), (6, 3, 8, 8))
    assert plan.theta.shape == (6, 2, 3) and plan.hole.shape == (6, 4) and plan.sigma.shape == (6,)
    assert plan.perm.shape == plan.keep.shape == (6, 3)
    assert len(policy.sample(policy.draw(60)).chosen.unique()) > 5


@pytest.mark.filterwarnings("ignore:sokd. no kernels for cuda")
@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_reads_no_value_and_mixes_no_devices(granularity: str) -> None:
    """Fake tensors have no values to read and cannot be mixed with those of another device."""
    skip_without_fake_cuda()
    with FakeTensorMode(), torch.device("cuda"):
        policy = Policy(granularity=granularity)
        features = torch.randn(3, 4, 6, 6)
        for differentiable in (False, True):
            assert policy(features, differentiable=differentiable).device.type == "cuda"
        assert all(value.device.type == "cuda" for value in policy.diagnostics().values())


@compiles
def test_compiles_in_one_graph() -> None:
    policy = Policy()
    with torch.no_grad():
        policy.magnitude.uniform_()
    twin = copy.deepcopy(policy)
    compiled = torch.compile(policy, fullgraph=True, dynamic=False)
    features = torch.randn(2, 5, 6, 4)
    for _ in range(6):
        torch.testing.assert_close(compiled(features), twin(features))
    assert policy.counter.tolist() == [6]


# -------------------------------------------------------------------------------------- as a module


def test_checkpoint_copies_and_pickles_go_on_alike() -> None:
    policy = Policy(granularity="sample")
    features = torch.randn(3, 4, 5, 5)
    for _ in range(3):
        policy(features)
    file = io.BytesIO()
    torch.save(policy.state_dict(), file)
    loaded = Policy(granularity="sample")
    loaded.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
    others = [loaded, copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))]
    for _ in range(3):
        refined = policy(features)
        assert all(torch.equal(other(features), refined) for other in others)
    assert set(policy.state_dict()) == {
        "alpha",
        "beta",
        "magnitude",
        "seed",
        "counter",
        "operations",
    }


def test_a_state_of_other_operations_is_refused() -> None:
    one = Policy(policies=[("rotate", "noise")])
    text = "policies must be those of the state, rotate + noise, got shear_x + cutout"
    with pytest.raises(RuntimeError, match=re.escape(text)):
        Policy(policies=[("shear_x", "cutout")]).load_state_dict(one.state_dict())


@pytest.mark.parametrize("assign", [False, True])
def test_a_policy_made_on_meta_is_whole_after_loading(assign: bool) -> None:
    policy, features = Policy(granularity="sample"), torch.randn(3, 4, 5, 5)
    with torch.device("meta"):
        made = Policy(granularity="sample")
    made = made if assign else made.to_empty(device="cpu")
    made.load_state_dict(copy.deepcopy(policy.state_dict()), assign=assign)
    torch.testing.assert_close(made(features), policy(features), rtol=0, atol=0)


def test_a_draw_inside_a_transform_is_refused() -> None:
    policy = Policy()
    with pytest.raises(RuntimeError, match="draw must be called outside"):
        torch.func.grad(lambda f: policy(f).sum())(torch.randn(2, 4, 5, 5))


def test_ranges_survive_a_cast() -> None:
    policy = policy_of("shear_x", "translate_x", 1.0, 0.0, fired=(True, True)).bfloat16()
    policy.beta.data.fill_(0.99)
    theta = policy.plan(draw_of(policy), SHAPE).theta
    torch.testing.assert_close(
        theta, torch.tensor([[[1, 0.3, -0.9], [0, 1, 0]]], dtype=theta.dtype)
    )


def test_table_and_diagnostics() -> None:
    policy = Policy()
    row = policy.table()[PAIRS.index((2, 4))]
    assert row == {
        "operations": ("translate_x", "rotate"),
        "probability": pytest.approx(1 / 36),
        "beta": (0.5, 0.5),
        "magnitude": (0.5, 0.5),
        "value": (0.0, 0.0),
        "unit": ("of the width", "degrees"),
    }
    policy.magnitude.data.fill_(1.0)
    assert policy.table()[PAIRS.index((4, 8))]["value"] == pytest.approx((30.0, 0.5))
    found = policy.diagnostics()
    assert found["entropy"].item() == pytest.approx(math.log(36))
    assert found["beta"].item() == 0.5 and found["magnitude"].item() == 1.0


def test_projection() -> None:
    policy = Policy()
    policy.beta.data.copy_(torch.linspace(-1, 2, 72).reshape(36, 2))
    policy.magnitude.data.copy_(torch.linspace(-1, 2, 72).reshape(36, 2))
    policy.project()
    assert (policy.beta.min(), policy.beta.max()) == (torch.tensor(0.01), torch.tensor(0.99))
    assert (policy.magnitude.min(), policy.magnitude.max()) == (0, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"estimator": "reinforce"},
            "Policy: estimator must be 'gumbel' or 'relax', got 'reinforce'",
        ),
        (
            {"magnitude_gradient": "none"},
            "Policy: magnitude_gradient must be 'straight_through' or 'pathwise', got 'none'",
        ),
        ({"granularity": "layer"}, "Policy: granularity must be 'batch' or 'sample', got 'layer'"),
        ({"temperature": 0.0}, "Policy: temperature must be positive and finite, got 0.0"),
        ({"temperature": math.inf}, "Policy: temperature must be positive and finite, got inf"),
        ({"policies": []}, "Policy: policies must hold at least one pair, got none"),
        *(
            (
                {"policies": [entry]},
                "Policy: policies must be pairs of two distinct operations of "
                f"{', '.join(NAMES)}, got {entry!r}",
            )
            for entry in [("shear_x", "blur"), ("noise", "noise"), ("noise",), (1, 9), (3, -1), 7]
        ),
    ],
)
def test_options_are_checked(options: dict, message: str) -> None:
    with raises(ValueError, message):
        Policy(**options)
