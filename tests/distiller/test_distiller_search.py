"""`sokd.PolicySearch` with a Distiller: its step, virtual weights in the hooks, no trace."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.distiller_cases import SMALL, Net, batch, make, models, objective
from support.raises import raises
from torch import Tensor
from torch.func import functional_call

import sokd


def by_hand(distiller):
    """The step a user would write for a Net."""

    def step(model, given):
        x, y = given
        first = model.stage1(model.stem(x))
        second = model.stage2(first)
        teacher = distiller.teacher
        with torch.no_grad():
            other = teacher.stage1(teacher.stem(x))
            other = [other, teacher.stage2(other)]
        return F.cross_entropy(model.head(second.mean((2, 3))), y), [first, second], other

    return step


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("objective_", ["consistency", "total"])
def test_the_step_is_the_one_written_by_hand(order, objective_):
    moved = []
    for own in (True, False):
        distiller = make()
        torch.manual_seed(5)
        options = {"order": order, "objective": objective_, "lr": 0.1}
        search = sokd.PolicySearch(distiller.kd, distiller.student, **options)
        step = distiller.step if own else by_hand(distiller)
        upper = [search.step(step, batch()) for _ in range(2)]
        moved.append([*upper, *(p.detach() for p in distiller.kd.policy.parameters())])
    for actual, other in zip(*moved, strict=True):
        torch.testing.assert_close(actual, other)


def test_virtual_weights_reach_the_hooks():
    distiller = make()
    weights = {name: torch.zeros_like(p) for name, p in distiller.student.named_parameters()}

    class Virtual(torch.nn.Module):
        def forward(self, x):
            return functional_call(distiller.student, weights, (x,))

    _, maps, _ = distiller.step(Virtual(), batch())
    assert all(not features.any() for features in maps)
    _, maps, _ = distiller.step(distiller.student, batch())
    assert all(features.any() for features in maps)


def test_a_search_leaves_no_trace_in_the_training():
    distiller = make(method={"fitnet": 1.0, "mgd": None})
    search = sokd.PolicySearch(distiller.kd, distiller.student)
    objective(distiller).backward()
    grads = {name: p.grad.clone() for name, p in distiller.named_parameters()}
    before, rng = copy.deepcopy(distiller.state_dict()), torch.get_rng_state()
    search.step(distiller.step, batch())
    changed = {
        name
        for name, value in distiller.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert changed <= {"kd.policy.alpha", "kd.policy.beta", "kd.policy.magnitude"}
    assert changed
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(p.grad, grads[name]) for name, p in distiller.named_parameters())


def test_a_compiled_student_is_searched_through():
    teacher, student = models()
    distiller = make(models=(teacher, torch.compile(student, backend="eager")))
    search = sokd.PolicySearch(distiller.kd, distiller.student, lr=0.1)
    before = distiller.kd.policy.alpha.detach().clone()
    assert search.step(distiller.step, batch()).isfinite()
    assert not torch.equal(before, distiller.kd.policy.alpha)


def test_without_a_target_the_task_is_nothing():
    distiller = make()
    task, maps, teacher = distiller.step(distiller.student, batch()[0])
    assert task == 0 and task.requires_grad
    assert [features.shape for features in maps] == [(4, 6, 8, 8), (4, 12, 4, 4)]
    assert not any(features.requires_grad for features in teacher)


def test_an_online_search_steps_with_each_call_of_a_training_step():
    distiller = make(sokd={**SMALL, "search": "online"})
    policy, search = distiller.kd.policy, distiller.kd.search
    assert int(search.steps) == 0
    objective(distiller).backward()
    assert int(search.steps) == 1 and policy.alpha.any() and policy.alpha.grad is None
    with torch.no_grad():
        distiller(*batch())
    distiller.eval()(*batch())
    assert int(search.steps) == 1
    assert "uniform" not in repr(distiller)


def test_without_an_adapted_map_an_online_search_never_steps_and_repr_says_so():
    distiller = make(method="at", sokd={**SMALL, "search": "online"})
    distiller(*batch())
    assert int(distiller.kd.search.steps) == 0 and not distiller.kd.policy.alpha.any()
    said = "search: no method reads an adapted map, so the policy stays uniform"
    assert said in repr(distiller)
    assert said not in repr(make(method="at"))


def test_with_the_base_kept_an_online_search_follows_the_adapter_made_for_it():
    distiller = make(method="at", sokd={**SMALL, "base": "keep", "search": "online"})
    distiller(*batch())
    assert int(distiller.kd.search.steps) == 1 and "uniform" not in repr(distiller)


class Normalising(Net):
    """Normalises its input in place, and keeps the mean of the pixels that it saw."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = [*getattr(self, "seen", []), x.mean().item()]
        return super().forward(x.sub_(0.5).div_(0.25))


@pytest.mark.parametrize("order", [1, 2])
def test_a_search_of_a_student_that_normalises_in_place(order):
    distiller = make(models=(Net(6), Normalising(3)), sokd={"search": None, **SMALL})
    search = sokd.PolicySearch(distiller.kd, distiller.student, order=order)
    x, y = torch.ones(4, 3, 16, 16), batch()[1]
    distiller.student.seen = []
    search.step(distiller.step, (x, y))
    assert distiller.student.seen == [1.0] * (4 if order == 2 else 1)
    assert torch.equal(x, torch.ones(4, 3, 16, 16)), "the batch changed"


def test_a_search_of_another_model():
    distiller = make(sokd={"search": None, **SMALL})
    rule = "Distiller: model must be the Distiller's student, as in PolicySearch(distiller.kd, "
    for model, got in ((distiller.teacher, "its teacher"), (Net(3), "another Net")):
        search = sokd.PolicySearch(distiller.kd, model)
        with raises(ValueError, f"{rule}distiller.student), got {got}"):
            search.step(distiller.step, batch())
