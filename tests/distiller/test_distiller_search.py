"""`sokd.PolicySearch` with a Distiller: its step, virtual weights in the hooks, no trace."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.distiller_cases import batch, make, models, objective
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
            theirs = teacher.stage1(teacher.stem(x))
            theirs = [theirs, teacher.stage2(theirs)]
        return F.cross_entropy(model.head(second.mean((2, 3))), y), [first, second], theirs

    return step


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("objective_", ["consistency", "total"])
def test_the_step_is_the_one_written_by_hand(order, objective_):
    moved = []
    for own in (True, False):
        distiller = make()
        torch.manual_seed(5)
        search = sokd.PolicySearch(
            distiller.kd, distiller.student, order=order, objective=objective_, lr=0.1
        )
        upper = [
            search.step(distiller.step if own else by_hand(distiller), batch()) for _ in range(2)
        ]
        moved.append([*upper, *(p.detach() for p in distiller.kd.policy.parameters())])
    for ours, theirs in zip(*moved, strict=True):
        torch.testing.assert_close(ours, theirs)


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
