"""search="online": the gradient against explicit ones, when it steps and when not, its state."""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.cases import compiles
from support.kd_cases import features, make, pair
from support.ranks import RANKS, of_ranks
from test_gumbel import PAIRS, made, plain
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import sokd
from sokd.kd.policy import Draw, Policy
from sokd.kd.policy.online import SAMPLES, Layer, OnlineSearch, gradient
from sokd.kd.policy.plan import theta, theta_gradient
from sokd.kd.search import PolicySearch
from sokd.ops.torch_internals import RELEASE

CHI = ("alpha", "beta", "magnitude")


def online(*channels: Any, every: int = 1, **options: Any) -> sokd.SoKD:
    """A SoKD whose policy moves in each loss."""
    kd = make(*channels, search="online", **options)
    kd.search.every = every
    return kd


distributed = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no torch.distributed"
)
shards = pytest.mark.skipif(RELEASE < (2, 6), reason="fully_shard is public since torch 2.6")
granularities = pytest.mark.parametrize("granularity", ["batch", "sample"])


def chi(kd: sokd.SoKD) -> list[Tensor]:
    return [getattr(kd.policy, name).detach().clone() for name in CHI]


def moved(kd: sokd.SoKD, call: Callable[[], Any]) -> bool:
    """Whether a call changes the policy; the search's counter must agree."""
    before, steps = chi(kd), int(kd.search.steps)
    call()
    changed = any(not torch.equal(*each) for each in zip(before, chi(kd), strict=True))
    assert changed == (int(kd.search.steps) > steps)
    return changed


# ------------------------------------------------------------------------------------- the gradient


def explicit(policy: Policy, draw: Draw, teacher: Tensor, student: Tensor) -> list[Tensor]:
    """L_aug's gradients from whole maps, one alternative after the other, by autograd."""
    rows = len(draw.uniforms)
    sample = policy.sample(draw)

    def losses(index: int, gates: tuple[bool, bool]) -> Tensor:
        refined = plain(teacher, policy, draw, index, gates)
        each = (refined - student).square().flatten(1).mean(1) / 2
        return each if rows == len(each) > 1 else each.mean(0, keepdim=True)  # [G]

    alpha = policy.alpha.detach().clone().requires_grad_()
    expected = torch.zeros((), dtype=alpha.dtype)
    beta = torch.zeros_like(policy.beta)
    for row in range(rows):
        for index, chance in enumerate(alpha.softmax(0)):
            gates = tuple(sample.gates[row, index].tolist())
            expected = expected + chance * losses(index, gates)[row] / rows
        drawn = int(sample.chosen[row])
        now = sample.gates[row, drawn].tolist()
        for i in range(2):
            on, off = ([*now[:i], state, *now[i + 1 :]] for state in (True, False))
            beta[drawn, i] += (losses(drawn, tuple(on)) - losses(drawn, tuple(off)))[row] / rows
    twin = copy.deepcopy(policy)
    twin.estimator = "relax"  # the magnitudes' gradients alone
    refined = twin(teacher, draw, differentiable=True)
    loss = (refined - student).square().mean() / 2
    return [
        torch.autograd.grad(expected, alpha)[0],
        beta,
        torch.autograd.grad(loss, twin.magnitude)[0],
    ]


@granularities
def test_the_gradient_is_that_of_the_losses_of_all_alternatives(granularity: str) -> None:
    policy = made(granularity, "pathwise")
    teacher, student = (features(3, 4, 5, 6, seed=seed, dtype=torch.float64) for seed in (1, 2))
    seen = set()
    for _ in range(12):
        draw = policy.draw(3)
        seen |= set(policy.sample(draw).chosen.tolist())
        found = gradient(policy, draw, Layer(teacher, policy(teacher, draw), student))
        for one, other in zip(
            found.split([4, 8, 8]), explicit(policy, draw, teacher, student), strict=True
        ):
            # noise is float32 for all dtypes
            torch.testing.assert_close(one.view_as(other), other, atol=1e-6, rtol=1e-6)
    assert seen == set(range(len(PAIRS)))


@granularities
def test_the_gradient_is_read_from_the_first_samples(granularity: str) -> None:
    policy, batch = made(granularity), SAMPLES + 3
    teacher, student = (features(batch, 4, 5, 6, seed=seed).double() for seed in (1, 2))
    draw = policy.draw(batch)
    whole = Layer(teacher, policy(teacher, draw), student)
    found = gradient(policy, draw, whole)
    first = Draw(draw.uniforms[:SAMPLES], draw.seed)
    fewer = Layer(*(part[:SAMPLES] for part in whole))
    torch.testing.assert_close(found, gradient(policy, first, fewer), rtol=0, atol=0)


def test_the_layers_gradients_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    kd = online([3, 3], [4, 5], policies=PAIRS)
    layers: list[Layer] = []
    monkeypatch.setattr(
        OnlineSearch, "step", lambda self, policy, draw, given: layers.extend(given)
    )
    draw = kd.policy.draw_at(kd.policy.seed, kd.policy.counter, 2)
    student, _ = pair()
    sokd.loss([student, student], [features(2, 4, 6, 6), features(2, 5, 6, 6, seed=1)], kd)
    monkeypatch.undo()
    alone = [gradient(kd.policy, draw, layer, index) for index, layer in enumerate(layers)]
    kd.search.step(kd.policy, draw, layers)
    torch.testing.assert_close(kd.search.moments[0], 0.5 * sum(alone))
    assert all(each.abs().max() > 0 for each in alone)


@pytest.mark.parametrize("height, width", [(5, 7), (4, 4), (1, 3)])
def test_the_gradient_of_theta(height: int, width: int) -> None:
    value = torch.randn(7, 9, dtype=torch.float64) * 0.4
    value[:, 4] *= 40  # degrees
    value.requires_grad_()
    d_theta = torch.randn(7, 2, 3, dtype=torch.float64)
    (expected,) = torch.autograd.grad(theta(value, height, width), value, d_theta)
    found = theta_gradient(value.detach(), d_theta, height, width)
    torch.testing.assert_close(found, expected[:, :5])


def test_devices_without_a_kernel_get_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = made("sample")
    teacher, student = (features(3, 4, 5, 6, seed=seed).double() for seed in (1, 2))
    draw = policy.draw(3)
    layer = Layer(teacher, policy(teacher, draw), student)
    found = gradient(policy, draw, layer)
    module = sys.modules["sokd.ops.refine"]  # the attribute of the package is the function
    monkeypatch.setattr(module, "has_kernel", lambda _: False)
    torch.testing.assert_close(gradient(policy, draw, layer), found, atol=1e-6, rtol=1e-6)


def test_adam_is_that_of_torch() -> None:
    policy = made("batch")
    search, twin = OnlineSearch(policy, lr=0.03, every=1), copy.deepcopy(policy)
    adam = torch.optim.Adam(twin.parameters(), lr=0.03, betas=(0.5, 0.999))
    teacher, student = (features(3, 4, 5, 6, seed=seed).double() for seed in (1, 2))
    for _ in range(6):
        draw = policy.draw(3)
        layer = Layer(teacher, policy(teacher, draw), student)
        for parameter, part in zip(
            twin.parameters(), gradient(twin, draw, layer).split([4, 8, 8]), strict=True
        ):
            parameter.grad = part.view_as(parameter)
        adam.step()
        twin.project()
        search.step(policy, draw, [layer])
        torch.testing.assert_close(list(policy.parameters()), list(twin.parameters()))
    assert int(search.steps) == 6


def test_it_finds_the_shift_of_the_student() -> None:
    """The student's map is the teacher's, one cell further left; other operations only harm."""
    policies = [("translate_x", "translate_y"), ("channel_shuffle", "channel_drop")]
    kd = online(4, 4, adapter=None, dam=None, policies=policies)
    kernel = torch.ones(4, 1, 3, 3) / 3
    for seed in range(120):
        torch.manual_seed(seed)
        teacher = F.conv2d(torch.randn(8, 4, 8, 8), kernel, padding=1, groups=4)
        seen = torch.cat([teacher[..., 1:], torch.zeros(8, 4, 8, 1)], 3)
        sokd.loss(seen.requires_grad_(), teacher, kd)
    good, bad = kd.policy.table()
    assert good["value"] == (pytest.approx(1 / 8, abs=0.03), pytest.approx(0, abs=0.06))
    assert good["beta"][0] > 0.9 and good["probability"] > 0.75 > bad["probability"] * 3


# ------------------------------------------------------------------------------------ when it steps


def test_it_steps_with_each_loss_that_is_trained() -> None:
    kd = online()
    student, teacher = pair()
    draw = kd.policy.draw(2)
    assert moved(kd, lambda: sokd.loss(student, teacher, kd))
    assert moved(kd, lambda: sokd.loss(student, teacher, kd))  # a second micro-batch
    assert moved(kd, lambda: sokd.loss(student, teacher, kd, return_terms=True))
    assert moved(kd, lambda: sokd.wrap(F.mse_loss, kd)(student, teacher))
    assert not moved(kd, lambda: kd.terms(student, teacher, draw=draw))
    assert not moved(kd, lambda: kd.terms(student, teacher, draw=draw, differentiable=True))
    assert not moved(kd, lambda: kd.terms(student, teacher, differentiable=True))
    assert not moved(kd, lambda: kd.consistency(student, teacher))
    assert not moved(kd, lambda: kd.consistency(student, teacher, differentiable=False))
    assert not moved(kd, lambda: kd.match(student, teacher, refine=False))
    assert not moved(kd, lambda: kd.match(student, teacher, adapt=False))
    with torch.no_grad():
        assert not moved(kd, lambda: sokd.loss(student, teacher, kd))
    with torch.inference_mode():
        assert not moved(kd, lambda: sokd.loss(student, teacher, kd))
    assert not moved(kd.eval(), lambda: sokd.loss(student, teacher, kd))
    assert moved(kd.train(), lambda: sokd.loss(student, teacher, kd))
    kd.requires_grad_(False)
    assert moved(kd, lambda: sokd.loss(student, teacher, kd))
    kd.policy.requires_grad_(False)
    assert not moved(kd, lambda: sokd.loss(student, teacher, kd))


def test_it_steps_in_the_first_of_every_few_losses() -> None:
    kd, (student, teacher) = make(search="online"), pair()
    assert kd.search.every == 4
    kd.search.every = 3
    steps = [moved(kd, lambda: sokd.loss(student, teacher, kd)) for _ in range(5)]
    kd.policy.draw(2)  # a draw is no call of the search
    with torch.no_grad():
        sokd.loss(student, teacher, kd)
    steps += [moved(kd, lambda: sokd.loss(student, teacher, kd)) for _ in range(2)]
    assert steps == [True, False, False, True, False, False, True]
    kd.search.every = 1
    assert moved(kd, lambda: sokd.loss(student, teacher, kd))


def test_between_two_steps_nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    kd, (student, teacher) = online(every=2), pair()
    sokd.loss(student, teacher, kd)
    monkeypatch.setattr("sokd.kd.policy.online.gradient", None)
    sokd.loss(student, teacher, kd)
    with pytest.raises(TypeError, match="not callable"):
        sokd.loss(student, teacher, kd)


def test_another_device_is_not_asked_for_the_number_of_calls() -> None:
    kd = trained(5, every=3)
    state, elsewhere = kd.state_dict(), make(search="online")
    elsewhere.load_state_dict(state)
    elsewhere.search.every = 3
    due = copy.deepcopy(elsewhere.search).to("meta")._due  # a meta tensor has no value to read
    assert [due() for _ in range(4)] == [False, True, False, False]


def test_it_does_not_step_inside_transforms() -> None:
    """With a draw of before there is no step; without one there is no loss."""
    kd = online(4, 4, adapter=None, dam=None)
    student, teacher = pair((2, 4, 6, 6))
    draw = kd.policy.draw(2)

    def value(features: Tensor) -> Tensor:
        return kd.terms(features, teacher, draw=draw)["total"]

    def undrawn() -> None:
        with pytest.raises(RuntimeError, match="must be called outside torch"):
            torch.func.grad(lambda features: kd(features, teacher))(student.detach())

    assert not moved(kd, lambda: torch.func.grad(value)(student.detach()))
    assert not moved(kd, undrawn)


def test_a_captured_call_is_counted_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a CUDA graph, which repeats one call, every call computes a step and a buffer decides."""
    (student, teacher), eager, captured = pair(), online(every=3), online(every=3)
    captured.load_state_dict(eager.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr("sokd.kd.policy.online.is_captured", lambda _: True)
        for _ in range(5):
            sokd.loss(student, teacher, captured)
        assert captured.search._counted == 0
    for _ in range(5):
        sokd.loss(student, teacher, eager)
    assert eager.search._counted == 5 and int(eager.search.steps) == 2
    for name, value in eager.state_dict().items():
        assert torch.equal(captured.state_dict()[name], value), name


def test_loss_scaling_does_not_reach_it() -> None:
    (student, teacher), plain, scaled = pair(), online(), online()
    scaled.load_state_dict(plain.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for kd, scale in ((plain, lambda loss: loss), (scaled, scaler.scale)):
        optimizer = torch.optim.SGD(kd.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            scale(sokd.loss(student, teacher, kd)).backward()
            if kd is scaled:
                scaler.unscale_(optimizer)
            optimizer.step()
            if kd is scaled:
                scaler.update()
    assert int(plain.search.steps) == int(scaled.search.steps) == 3
    for one, two in zip([*chi(plain), plain.search.moments], [*chi(scaled), scaled.search.moments],
                        strict=True):  # fmt: skip
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_a_checkpointed_loss_steps_with_a_draw_of_its_own_alone() -> None:
    kd = online(dam=None)
    student, teacher = pair()
    checkpoint = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    draw = kd.policy.draw(2)

    def drawn() -> None:
        checkpoint(lambda each: kd.terms(each, teacher, draw=draw)["total"], student).backward()

    assert not moved(kd, drawn)
    assert moved(kd, lambda: checkpoint(kd, student, teacher))


def test_the_loss_and_its_gradients_are_those_without_a_search() -> None:
    """The step comes after the draw, and leaves nothing in the graph."""
    kd, twin = online(granularity="sample"), make(granularity="sample")
    student, teacher = pair()
    want = sokd.loss(student, teacher, twin)
    got = sokd.loss(student, teacher, kd)
    assert torch.equal(got, want) and int(kd.search.steps) == 1
    d_got, d_want = (
        torch.autograd.grad(value, [student, *of.parameters()])
        for value, of in ((got, kd), (want, twin))
    )
    assert all(torch.equal(*each) for each in zip(d_got, d_want, strict=True))
    assert [name for name, _ in kd.named_parameters()] == [
        name for name, _ in twin.named_parameters()
    ]


def test_a_policy_search_is_refused() -> None:
    with pytest.raises(ValueError) as caught:
        PolicySearch(online(), nn.Linear(1, 1))
    assert str(caught.value) == (
        "PolicySearch: kd must be made without a search of its own, which moves the policy in each "
        "loss, got one with search='online'"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search": "Online"}, "SoKD: search must be 'online', got 'Online'"),
        (
            {"search": "online", "policy": None},
            "SoKD: search must be None for a SoKD without a policy, got 'online'",
        ),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make(**options)
    assert str(caught.value) == message


def test_draws_are_by_sample_unless_told_otherwise() -> None:
    assert online().policy.granularity == "sample" and make().policy.granularity == "batch"
    assert online(granularity="batch").policy.granularity == "batch"


def test_a_replaced_policy_must_have_as_many_sub_policies() -> None:
    kd = online()
    kd.policy = Policy()
    assert moved(kd, lambda: sokd.loss(*pair(), kd))
    kd.policy = Policy(policies=PAIRS)
    with pytest.raises(ValueError) as caught:
        sokd.loss(*pair(), kd)
    assert str(caught.value) == (
        "SoKD: kd.policy must have as many sub-policies as the search was made for, 36, got 4"
    )
    kd.policy = None
    sokd.loss(*pair(), kd)


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1e30])
def test_a_gradient_that_is_not_finite_changes_nothing(value: float) -> None:
    kd = online(4, 4, adapter=None, dam=None)
    student, teacher = pair((2, 4, 6, 6))
    sokd.loss(student, teacher, kd)
    bad = teacher.clone()
    bad[0, 0, 0, 0] = value
    before = copy.deepcopy(kd.search.state_dict())
    assert not moved(kd, lambda: sokd.loss(student, bad, kd))
    before["calls"] += 1
    assert all(torch.equal(before[name], each) for name, each in kd.search.state_dict().items())
    assert moved(kd, lambda: sokd.loss(student, teacher, kd))


@granularities
def test_an_empty_batch_changes_nothing(granularity: str) -> None:
    kd = online(granularity=granularity).eval()
    kd.training = True  # BatchNorm refuses an empty batch in train mode
    assert not moved(kd, lambda: sokd.loss(*pair((0, 3, 6, 6), (0, 4, 6, 6)), kd))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    kd = online().to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    assert kd.search.moments.dtype == kd.policy.alpha.dtype == wide
    assert moved(kd, lambda: sokd.loss(*pair(dtype=dtype), kd))


def test_autocast() -> None:
    kd, twin = online(), online()
    student, teacher = pair()
    with torch.autocast("cpu", torch.bfloat16):
        assert moved(kd, lambda: sokd.loss(student.bfloat16(), teacher, kd))
    sokd.loss(student, teacher, twin)
    near = zip(kd.search.moments[0], twin.search.moments[0], strict=True)
    assert sum(float((a - b).abs()) for a, b in near) < 0.05 * float(
        twin.search.moments[0].abs().sum()
    )


# ---------------------------------------------------------------------------------------- compilers


# Compiled code of torch 2.9 misses a new `every` otherwise (docs/compatibility.md).
sees_changed_numbers = torch._dynamo.config.patch(
    {"use_recursive_dict_tags_for_guards": False} if RELEASE == (2, 9) else {}
)


@compiles
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@sees_changed_numbers
def test_compiled_whole_it_is_the_same(backend: str) -> None:
    torch._dynamo.reset()
    kd, twin = online(policies=PAIRS), online(policies=PAIRS)
    twin.load_state_dict(kd.state_dict())
    compiled = torch.compile(sokd.loss, fullgraph=True, backend=backend)
    for _ in range(3):
        torch.testing.assert_close(compiled(*pair(), twin), sokd.loss(*pair(), kd))
    torch.testing.assert_close(twin.state_dict(), kd.state_dict(), rtol=1e-4, atol=1e-5)
    assert int(twin.search.steps) == 3
    for each in (kd, twin):  # compiled code computes each step and discards those between
        each.search.every = 2
    for _ in range(2):
        torch.testing.assert_close(compiled(*pair(), twin), sokd.loss(*pair(), kd))
    torch.testing.assert_close(twin.state_dict(), kd.state_dict(), rtol=1e-4, atol=1e-5)
    assert int(twin.search.steps) == 4
    twin.freeze_policy()
    assert not moved(twin, lambda: compiled(*pair(), twin))


def test_no_value_is_read_on_the_host() -> None:
    """Fake tensors have none: a Python branch on a value or an .item() would raise."""
    with FakeTensorMode(allow_non_fake_inputs=False):
        kd = online()
        student, teacher = pair_on_fakes()
        sokd.loss(student, teacher, kd).backward()


def pair_on_fakes() -> tuple[Tensor, Tensor]:
    return torch.empty(2, 3, 6, 6, requires_grad=True), torch.empty(2, 4, 6, 6)


# ---------------------------------------------------------------------------------------- the state


def trained(count: int = 3, **options: Any) -> sokd.SoKD:
    kd = online(**options)
    for _ in range(count):
        sokd.loss(*pair(), kd)
    return kd


def same_future(kd: sokd.SoKD, other: sokd.SoKD) -> None:
    for _ in range(3):
        for each in (kd, other):
            sokd.loss(*pair(), each)
    for name, value in kd.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda kd: pickle.loads(pickle.dumps(kd))],
    ids=["deepcopy", "pickle"],
)
def test_copies_go_on_bit_for_bit(copied: Callable[[sokd.SoKD], sokd.SoKD]) -> None:
    kd = trained()
    same_future(kd, copied(kd))


@pytest.mark.parametrize("every", [1, 3])
def test_a_state_resumes_bit_for_bit(every: int, tmp_path: Any) -> None:
    kd = trained(every=every)
    torch.save(kd.state_dict(), tmp_path / "kd.pt")
    assert {key for key in kd.state_dict() if key.startswith("search.")} == {
        "search.moments",
        "search.calls",
        "search.steps",
        "search.frozen",
    }
    other = online(seed=1, every=every)
    other.load_state_dict(torch.load(tmp_path / "kd.pt"))
    same_future(kd, other)


def test_a_state_without_a_search_starts_it_afresh_with_one_warning() -> None:
    kd, other = make(), trained()
    other.freeze_policy()
    with pytest.warns(UserWarning) as caught:
        other.load_state_dict(kd.state_dict())
    assert [str(each.message) for each in caught] == [
        "SoKD: the state has no policy search, which starts afresh; the policy itself is loaded"
    ]
    assert int(other.search.steps) == 0 and not other.search.moments.any()
    assert moved(other, lambda: sokd.loss(*pair(), other))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(trained().state_dict())


def test_a_frozen_policy_stays_so_in_copies_and_states() -> None:
    kd = trained()
    kd.freeze_policy()
    other = trained(seed=1)
    other.load_state_dict(kd.state_dict())
    for each in (kd, other, copy.deepcopy(kd), pickle.loads(pickle.dumps(kd))):
        assert not moved(each, lambda each=each: sokd.loss(*pair(), each))
        assert repr(each.search) == "OnlineSearch(lr=0.02, every=1, 8 samples a step, frozen)"
    assert torch.equal(kd.search.moments, other.search.moments)
    other.load_state_dict(trained().state_dict())
    assert moved(other, lambda: sokd.loss(*pair(), other))


def test_without_a_search_a_frozen_policy_is_refused_by_a_policy_search() -> None:
    kd = make()
    search = PolicySearch(kd, nn.Linear(1, 1), order=1)
    kd.freeze_policy()
    with pytest.raises(ValueError, match="must require grad, got one that is frozen"):
        search.step(lambda model, _: (model.weight.sum(), *pair()), None)
    make(policy=None).freeze_policy()


def test_the_rate_may_change_at_any_time() -> None:
    kd, twin = online(), online()
    twin.search.lr = 0.0
    assert moved(kd, lambda: sokd.loss(*pair(), kd))
    sokd.loss(*pair(), twin)
    assert not twin.policy.alpha.any() and int(twin.search.steps) == 1


# ------------------------------------------------------------------------------------ two processes


def one_rank(wrapper: str, rank: int) -> dict[str, Tensor]:
    """Two losses on this rank's half of a batch: the states of policy and search."""
    kd = alike() if wrapper == "none" else online(4, 4, seed=rank if wrapper == "ddp" else 0)
    call: nn.Module = kd
    if wrapper == "ddp":  # broadcasts the first rank's seed
        call = nn.parallel.DistributedDataParallel(kd)
    elif wrapper == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (RANKS,))
        fully_shard(kd, mesh=mesh, ignored_params=set(kd.policy.parameters()))
    for seed in range(2):
        student, teacher = (part[2 * rank : 2 * rank + 2] for part in halves(seed))
        sokd.loss(student, teacher, call).backward()
    state = {**kd.policy.state_dict(prefix="policy."), **kd.search.state_dict(prefix="search.")}
    return {name: value.detach() for name, value in state.items()}


def alike() -> sokd.SoKD:
    """Without noise, whose key is a sample's index; one draw serves both halves of the batch."""
    pairs = [("shear_x", "rotate"), ("cutout", "channel_drop"), ("translate_y", "channel_shuffle")]
    return online(
        4, 4, policies=pairs, granularity="batch", adapter=nn.Identity(), dam=None,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip


def halves(seed: int) -> tuple[Tensor, Tensor]:
    return features(4, 4, 6, 6, seed=seed).requires_grad_(), features(4, 4, 6, 6, seed=seed + 9)


def test_the_gradients_of_all_layers_are_reduced_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kd, reduced = online([3, 3], [4, 4]), []
    monkeypatch.setattr(
        "sokd.kd.policy.online.averaged", lambda found: reduced.append(found.shape) or found
    )
    student, teacher = pair()
    assert moved(kd, lambda: sokd.loss([student] * 2, [teacher] * 2, kd))
    assert reduced == [(5 * len(kd.policy.policies),)]


@distributed
@pytest.mark.parametrize("wrapper", ["ddp", pytest.param("fsdp", marks=shards)])
def test_wrapped_ranks_keep_one_policy(wrapper: str, tmp_path: Path) -> None:
    states = of_ranks(partial(one_rank, wrapper), tmp_path)
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    assert int(states[0]["search.steps"]) == 2 and states[0]["policy.alpha"].any()


def one_loaded(rank: int) -> dict[str, Tensor]:
    """Two losses after the first rank alone has loaded a state: then those of policy and search."""
    states = {}
    for frozen in (False, True):
        former, kd = online(4, 4, seed=0), online(4, 4, seed=0)
        sokd.loss(*halves(0), former)
        if frozen:
            former.freeze_policy()
        if rank == 0:
            kd.load_state_dict(former.state_dict())
        wrapped = nn.parallel.DistributedDataParallel(kd)
        for seed in range(2):
            student, teacher = (part[2 * rank : 2 * rank + 2] for part in halves(seed))
            sokd.loss(student, teacher, wrapped).backward()
        state = {**kd.policy.state_dict(prefix="policy."), **kd.search.state_dict(prefix="search.")}
        states |= {f"{name}, {frozen}": value.detach() for name, value in state.items()}
    return states


@distributed
def test_a_state_that_one_rank_has_loaded_is_that_of_all(tmp_path: Path) -> None:
    states = of_ranks(one_loaded, tmp_path)
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    assert int(states[0]["search.steps, False"]) == 3
    assert int(states[0]["search.steps, True"]) == 1 and states[0]["policy.alpha, True"].any()


@distributed
def test_ranks_find_the_policy_of_the_whole_batch(tmp_path: Path) -> None:
    states, kd = of_ranks(partial(one_rank, "none"), tmp_path), alike()
    for seed in range(2):
        sokd.loss(*halves(seed), kd)
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
        torch.testing.assert_close(value, kd.state_dict()[name])
    assert int(kd.search.steps) == 2
