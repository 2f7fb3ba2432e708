"""The policy search: its gradients against explicit ones, and that a step leaves no trace."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.kd_cases import trained
from test_gumbel import dense
from torch import Tensor, nn

from sokd.kd.policy import Policy
from sokd.kd.search import PolicySearch
from sokd.kd.sokd import SoKD

SHAPE = (3, 4, 6, 5)
PAIRS = [("shear_x", "rotate"), ("translate_x", "noise"), ("cutout", "channel_drop")]


class Student(nn.Module):
    """With everything that could leave a trace: BatchNorm, Dropout, an optimiser with momentum."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.body = nn.Sequential(*first, nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return self.head(features.mean((2, 3))), features


class Linear(nn.Module):
    """features = weight * x: with squared losses, a problem whose every derivative is exact."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 1, 1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


def batch_of(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and the teacher's features."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(3, 2, 6, 5, generator=generator)
    return (
        images,
        torch.randint(5, (3,), generator=generator),
        torch.randn(SHAPE, generator=generator),
    )


def step(model: Student, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    logits, features = model(batch[0])
    return F.cross_entropy(logits, batch[1]), features, batch[2]


def made(**options: Any) -> tuple[Student, SoKD, PolicySearch]:
    torch.manual_seed(0)
    student = Student()
    kd = trained(3, 4, heat_channels=3, policies=PAIRS, lambda_agreement=1.0, lambda_areas=1.0)
    with torch.no_grad():
        kd.policy.magnitude.uniform_()
    return student, kd, PolicySearch(kd, student, **{"lr": 0.01, **options})


def hypergradient(search: PolicySearch) -> list[Tensor]:
    """The gradients of Adam's first step: its first moment is (1 - 0.5) times them."""
    return [state["exp_avg"] * 2 for state in search.state_dict()["adam"]["state"].values()]


# ------------------------------------------------------------------------------------ its gradients
def planted_linear(**options: Any) -> tuple[Linear, SoKD, PolicySearch]:
    student = Linear()
    policy = Policy(policies=PAIRS, magnitude_gradient="pathwise").double()
    with torch.no_grad():
        policy.alpha.normal_(std=0.3)
        policy.magnitude.uniform_(0.6, 0.95)
    kd = trained(4, 4, adapter=None, dam=None, policy=policy, lambda_areas=1.0)
    return student, kd, PolicySearch(kd, student, unroll=0.1, **options)


def linear_step(model: Linear, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    features = model(batch[0])
    return features.square().mean(), features, batch[1]


@pytest.mark.parametrize("objective", ["consistency", "task", "total"])
@pytest.mark.parametrize("held_out", [False, True])
def test_second_order_against_autograd_through_the_step(objective: str, held_out: bool) -> None:
    student, kd, search = planted_linear(objective=objective)
    batches = [
        tuple(torch.randn(SHAPE, dtype=torch.float64) for _ in range(2))
        for _ in range(1 + held_out)
    ]
    policy = copy.deepcopy(kd.policy)
    upper = search.step(linear_step, *batches)
    # the same, twice differentiable: choices by the sum over all plans, magnitudes by the plan
    draw = policy.draw_at(search.seed, torch.zeros(1, dtype=torch.int64), 3)
    through_magnitude = copy.copy(policy)
    through_magnitude.estimator = "relax"

    def refined(teacher: Tensor) -> Tensor:
        path = through_magnitude(teacher, draw, differentiable=True)
        return dense(teacher, policy, draw) + path - path.detach()

    def total(weight: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        features = weight * batch[0]
        return features.square().mean() + F.mse_loss(features, refined(batch[1]))

    weight = student.weight.detach().requires_grad_()
    slope = torch.autograd.grad(total(weight, batches[0]), weight, create_graph=True)[0]
    virtual, (x, teacher) = weight - 0.1 * slope, batches[-1]
    levels = {
        "consistency": lambda: F.mse_loss(virtual * x, refined(teacher)) / 2,
        "task": lambda: (virtual * x).square().mean(),
        "total": lambda: total(virtual, batches[-1]),
    }
    expected = levels[objective]()
    torch.testing.assert_close(upper, expected.detach(), rtol=1e-6, atol=1e-9)
    chi = [policy.alpha, policy.beta, policy.magnitude]
    wanted = torch.autograd.grad(expected, chi)
    torch.testing.assert_close(hypergradient(search), list(wanted), rtol=1e-5, atol=1e-9)
    assert all(part.abs().max() > 1e-6 for part in wanted[:2])


def test_first_order_is_the_direct_gradient() -> None:
    student, kd, search = planted_linear(order=1)
    x, teacher = (torch.randn(SHAPE, dtype=torch.float64) for _ in range(2))
    policy = copy.deepcopy(kd.policy)
    calls = []

    def recording(model: Linear, batch: Any) -> Any:
        calls.append(batch)
        return linear_step(model, batch)

    search.step(recording, None, (x, teacher))
    draw = policy.draw_at(search.seed, torch.zeros(1, dtype=torch.int64), 3)
    loss = F.mse_loss(student.weight.detach() * x, policy(teacher, draw, differentiable=True)) / 2
    wanted = torch.autograd.grad(loss, [policy.alpha, policy.beta, policy.magnitude])
    torch.testing.assert_close(hypergradient(search), list(wanted))
    assert len(calls) == 1


@pytest.mark.parametrize("order", [1, 2])
def test_float16_loses_no_gradient_of_a_large_map(order: int) -> None:
    """An element's share of a mean underflows in float16: 1e-8 here."""
    found = []
    for dtype in (torch.float32, torch.float16):
        torch.manual_seed(0)
        policy = Policy(policies=PAIRS, magnitude_gradient="pathwise")
        kd = trained(4, 4, adapter=None, dam=None, policy=policy, lambda_areas=1.0).to(dtype)
        search = PolicySearch(kd, Linear().to(dtype), order=order, unroll=0.1)
        batch = tuple((torch.randn(8, 4, 64, 64) * 4e-3).to(dtype) for _ in range(2))
        search.step(linear_step, batch)
        found.append(hypergradient(search))
    for half, single in zip(*found, strict=True):
        torch.testing.assert_close(half, single, rtol=0.05, atol=0.05 * single.abs().max().item())


@pytest.mark.parametrize("order", [1, 2])
def test_relax_learns_by_its_estimate(order: int) -> None:
    """With Q = 0 the estimate is f * score, f with the unrolled step's first-order change."""
    student, kd, search = planted_linear(estimator="relax", order=order)
    for parameter in search._control.parameters():
        nn.init.zeros_(parameter)
    batch = tuple(torch.randn(SHAPE, dtype=torch.float64) for _ in range(2))
    policy = copy.deepcopy(kd.policy)
    search._control.double()
    upper = search.step(linear_step, batch)
    draw = policy.draw_at(search.seed, torch.zeros(1, dtype=torch.int64), 3)
    refined = policy(batch[1], draw)
    weight = student.weight.detach().requires_grad_()

    def total(weight: Tensor) -> Tensor:
        return (weight * batch[0]).square().mean() + F.mse_loss(weight * batch[0], refined)

    zero = torch.zeros_like(weight)
    slope = torch.autograd.grad(total(weight), weight)[0] if order == 2 else zero
    virtual = (weight - 0.1 * slope).detach().requires_grad_()
    loss = F.mse_loss(virtual * batch[0], refined) / 2
    v = torch.autograd.grad(loss, virtual)[0]
    torch.testing.assert_close(upper, loss.detach())
    value = loss.detach() - 0.1 * (slope * v).sum()
    sample = policy.sample(draw)
    beta = policy.beta.log().where(sample.gates[0], (1 - policy.beta).log()).sum()
    logs = policy.alpha.log_softmax(0)[sample.chosen].sum() + beta
    wanted = [value * grad for grad in torch.autograd.grad(logs, [policy.alpha, policy.beta])]
    torch.testing.assert_close(hypergradient(search)[:2], wanted, rtol=1e-5, atol=1e-8)
    # Q has learned
    assert any(parameter.abs().max() > 0 for parameter in search._control.parameters())


# ----------------------------------------------------------------------------------------- no trace
def everything(student: nn.Module, kd: SoKD, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    chi = {"policy.alpha", "policy.beta", "policy.magnitude"}
    tensors = {f"student.{n}": value for n, value in student.state_dict(keep_vars=True).items()}
    own = kd.state_dict(keep_vars=True)
    tensors |= {f"kd.{name}": value for name, value in own.items() if name not in chi}
    tensors |= {f"kd.buffer.{name}": value for name, value in kd.named_buffers()}
    found: dict[str, Any] = {name: value.detach().clone() for name, value in tensors.items()}
    found |= {f"{n}.grad": None if v.grad is None else v.grad.clone() for n, v in tensors.items()}
    found |= {
        f"{name}.id": (id(value), value.requires_grad, value._version)
        for name, value in tensors.items()
    }
    found["policy.grad"] = [parameter.grad for parameter in kd.policy.parameters()]
    found["optimizer"] = copy.deepcopy(optimizer.state_dict())
    found["rng"] = torch.get_rng_state()
    found["modes"] = [module.training for module in [*student.modules(), *kd.modules()]]
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("estimator", ["gumbel", "relax"])
@pytest.mark.parametrize(
    ("order", "objective"),
    [(1, "consistency"), (2, "consistency"), (2, "task"), (2, "total"), (1, "total")],
)
def test_a_step_leaves_no_trace(order: int, objective: str, estimator: str) -> None:
    student, kd, search = made(order=order, objective=objective, estimator=estimator)
    optimizer = torch.optim.SGD([*student.parameters(), *kd.parameters()], lr=0.1, momentum=0.9)
    for _ in range(2):
        task, f_s, f_t = step(student, batch_of())
        (task + kd(f_s, f_t)).backward()
        optimizer.step()
    before = everything(student, kd, optimizer)
    chi = [parameter.detach().clone() for parameter in kd.policy.parameters()]
    search.step(step, batch_of(1), held_out=batch_of(2))
    after = everything(student, kd, optimizer)
    assert not [name for name in before if not same(before[name], after[name])]
    moved = [not torch.equal(a, b) for a, b in zip(chi, kd.policy.parameters(), strict=True)]
    assert any(moved)


def test_a_failing_step_leaves_no_trace() -> None:
    student, kd, search = made()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    before = everything(student, kd, optimizer), search.state_dict()
    calls = []

    def fails(model: Student, batch: Any) -> Any:
        calls.append(torch.rand(1))
        if len(calls) == 3:
            raise KeyError("the loader broke")
        return step(model, batch)

    with pytest.raises(KeyError, match="the loader broke"):
        search.step(fails, batch_of())
    assert same(before, (everything(student, kd, optimizer), search.state_dict()))


def test_all_evaluations_see_one_random_state_and_the_right_batch() -> None:
    student, _, search = made()
    seen: list[tuple[Any, Tensor, Tensor]] = []
    train, held_out = batch_of(1), batch_of(2)

    def recording(model: Student, batch: Any) -> Any:
        seen.append((batch, torch.rand(3), model.body[0].weight.detach().clone()))
        return step(model, batch)

    search.step(recording, train, held_out=held_out)
    assert [batch is train for batch, _, _ in seen] == [True, False, True, True]
    assert seen[1][0] is held_out
    assert all(torch.equal(numbers, seen[0][1]) for _, numbers, _ in seen)
    weights = [weight for _, _, weight in seen]
    assert torch.equal(weights[0], student.body[0].weight)
    torch.testing.assert_close((weights[2] + weights[3]) / 2, weights[0])
    assert len({tuple(weight.flatten().tolist()) for weight in weights}) == 4


def test_one_draw_for_a_step_and_another_for_the_next() -> None:
    _, kd, search = made()
    draws: list[Tensor] = []
    terms, consistency = kd.terms, kd.consistency
    kd.terms = lambda *args, draw, **kw: (
        draws.append(draw.uniforms),
        terms(*args, draw=draw, **kw),
    )[1]
    kd.consistency = lambda *args, draw, **kw: (
        draws.append(draw.uniforms),
        consistency(*args, draw=draw, **kw),
    )[1]
    search.step(step, batch_of())
    assert len(draws) == 4 and all(torch.equal(draw, draws[0]) for draw in draws)
    search.step(step, batch_of())
    assert len(draws) == 8 and not torch.equal(draws[4], draws[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_search_by_relax_in_the_dtype_of_kd(dtype):
    student, kd = nn.Conv2d(3, 4, 3).to(dtype), SoKD(4, 6, search=None).to(dtype)
    search = PolicySearch(kd, student, estimator="relax")
    before = kd.policy.alpha.detach().clone()

    def step(model, x):
        features = model(x)
        return features.square().mean(), features, torch.ones(4, 6, 14, 14, dtype=dtype)

    search.step(step, torch.randn(4, 3, 16, 16, dtype=dtype))
    assert kd.policy.alpha.isfinite().all() and not torch.equal(kd.policy.alpha, before)
