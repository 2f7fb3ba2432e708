"""Errors of a policy search: options, the step function, states of other searches."""

import copy
from typing import Any

import pytest
import torch
from support.cases import compiles
from support.raises import raises
from test_search import Student, batch_of, made, same, step
from torch import nn

from sokd.kd.policy import Policy
from sokd.kd.search import PolicySearch
from sokd.kd.sokd import SoKD


@pytest.mark.parametrize(("options", "message"), [
    ({"objective": "loss"},
     "PolicySearch: objective must be 'consistency' or 'task' or 'total', got 'loss'"),
    ({"estimator": "none"}, "PolicySearch: estimator must be 'gumbel' or 'relax', got 'none'"),
    ({"order": 3}, "PolicySearch: order must be 1 or 2, got 3"),
    ({"order": 1, "objective": "task"},
     "PolicySearch: order must be 2 for objective 'task', got 1"),
    ({"unroll": -1}, "PolicySearch: unroll must be a finite number, 0 or more, got -1"),
    ({"unroll": float("nan")}, "PolicySearch: unroll must be a finite number, 0 or more, got nan"),
    ({"epochs": -1}, "PolicySearch: epochs must be a whole number, 0 or more, got -1"),
    ({"epochs": "a"}, "PolicySearch: epochs must be a whole number, 0 or more, got 'a'"),
])  # fmt: skip
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with raises(ValueError, message):
        made(**options)


def test_a_policy_is_needed() -> None:
    text = "PolicySearch: kd must have a Policy as kd.policy, got SoKD with NoneType"
    with raises(ValueError, text):
        PolicySearch(SoKD(3, 4, policy=None), Student())


@compiles
def test_a_compiled_policy_is_searched_as_it_is() -> None:
    (*_, search), (other, wrapped, _) = made(), made()
    wrapped.policy = torch.compile(wrapped.policy, backend="eager")
    again = PolicySearch(wrapped, other, lr=0.01)
    again.load_state_dict(search.state_dict())
    for each in (search, again):
        each.step(step, batch_of(0))
    assert same(search.policy.state_dict(), again.policy.state_dict())


STEP = "PolicySearch: step must return (loss, student features, teacher features), got "


@pytest.mark.parametrize(("result", "kind", "message"), [
    (lambda task, f_s, f_t: task, TypeError, STEP + "Tensor"),
    (lambda task, f_s, f_t: (task, f_s), TypeError, STEP + "2 values"),
    (lambda task, f_s, f_t: (f_s, f_s, f_t), TypeError,
     "PolicySearch: loss must be a scalar tensor, got shape [3, 3, 6, 5]"),
    (lambda task, f_s, f_t: (1.0, f_s, f_t), TypeError,
     "PolicySearch: loss must be a scalar tensor, got float"),
    (lambda task, f_s, f_t: (task, f_s, None), TypeError,
     "PolicySearch: teacher features must be a tensor or a list of tensors, got NoneType"),
    (lambda task, f_s, f_t: (task, [f_s, 1], f_t), TypeError,
     "PolicySearch: student features must be a tensor or a list of tensors, got a list with int"),
    (lambda task, f_s, f_t: (task, f_s, f_t.requires_grad_()), ValueError,
     "PolicySearch: teacher features must not require grad, got a tensor that requires grad"),
])  # fmt: skip
def test_what_a_step_returns_is_checked(result: Any, kind: type[Exception], message: str) -> None:
    _, _, search = made()
    with raises(kind, message):
        search.step(lambda model, batch: result(*step(model, batch)), batch_of())


def test_a_loss_cut_off_from_the_weights_is_refused() -> None:
    _, _, search = made(objective="task")

    def cut(model: Student, batch: Any) -> Any:
        task, f_s, f_t = step(model, batch)
        return task.detach(), f_s, f_t

    text = "PolicySearch: loss must depend on the weights, got one without a gradient"
    with raises(ValueError, text):
        search.step(cut, batch_of())


@pytest.mark.parametrize("name", ["alpha", "magnitude"])
def test_a_frozen_policy_is_not_searched(name: str) -> None:
    _, kd, search = made()
    getattr(kd.policy, name).requires_grad_(False)
    text = f"PolicySearch: kd.policy.{name} must require grad, got one that is frozen"
    with raises(ValueError, text):
        search.step(step, batch_of())


def test_a_step_that_runs_another_student_is_refused() -> None:
    _, _, search = made()
    other = Student()
    text = (
        "PolicySearch: step must run the model it is called with, with gradients, got a loss "
        "that does not depend on the student's parameters"
    )
    with raises(ValueError, text):
        search.step(lambda _, batch: step(other, batch), batch_of())


def test_a_student_without_anything_to_train() -> None:
    """The adapter's virtual step is enough; without an adapter there is nothing to unroll."""
    student, kd, search = made()
    student.requires_grad_(False)
    assert search.step(step, batch_of()).isfinite()
    kd.requires_grad_(False)
    text = (
        "PolicySearch: student must have parameters that require grad (or kd.adapter or kd.dam "
        "some), for its virtual step, got none; order=1 needs none"
    )
    with raises(ValueError, text):
        search.step(step, batch_of())
    assert PolicySearch(kd, student, order=1).step(step, batch_of()).isfinite()


@pytest.mark.parametrize(("option", "value", "text"), [
    ("estimator", "relax", "estimator must be the state's, 'gumbel', got 'relax'"),
    ("objective", "total", "objective must be the state's, 'consistency', got 'total'"),
    ("order", 1, "order must be the state's, 2, got 1"),
])  # fmt: skip
def test_a_state_of_another_search_is_refused(option: str, value: Any, text: str) -> None:
    state, search = made()[2].state_dict(), made(**{option: value})[2]
    before = copy.deepcopy(search.state_dict())
    with pytest.raises(ValueError) as caught:
        search.load_state_dict(state)
    assert str(caught.value) == f"PolicySearch: {text}" and same(before, search.state_dict())


def test_a_state_that_lacks_something_is_refused() -> None:
    search = made()[2]
    state = search.state_dict()
    names = ", ".join(state)
    del state["order"]
    with raises(ValueError, f"PolicySearch: state must have {names}, got {', '.join(state)}"):
        search.load_state_dict(state)


@pytest.mark.parametrize(("estimator", "adam"), [("gumbel", "adam"), ("relax", "control_adam")])
def test_a_state_of_another_policy_is_refused_whole(estimator: str, adam: str) -> None:
    search = made(estimator=estimator)[2]
    state, before = search.state_dict(), copy.deepcopy(search.state_dict())
    state["seed"] += 1
    state[adam] = {
        "state": {0: {"exp_avg": torch.zeros(2)}},
        "param_groups": [{"params": [0, 1, 2]}],
    }
    text = "PolicySearch: state must have Adam's moments of the shapes"
    with pytest.raises(ValueError, match=text):
        search.load_state_dict(state)
    assert same(before, search.state_dict())


def test_a_state_of_another_policy_is_refused_before_its_first_step() -> None:
    """Before the first step, when Adam has no moments whose shapes could differ."""
    policy = Policy(policies=[(0, 1), (2, 3)], estimator="relax")
    kd = SoKD(3, 4, policy=policy, search=None)
    state = PolicySearch(kd, Student()).state_dict()
    search = made(estimator="relax")[2]
    before = copy.deepcopy(search.state_dict())
    text = "PolicySearch: state must have a control variate of the shapes"
    with pytest.raises(ValueError, match=text):
        search.load_state_dict(state)
    assert same(before, search.state_dict())


@pytest.mark.parametrize("form", [lambda x: x, lambda x: {"x": x}, lambda x: [x]])
def test_a_step_that_changes_its_batch(form):
    student, kd = nn.Conv2d(3, 4, 3), SoKD(4, 6, search=None)
    search = PolicySearch(kd, student)

    def step(model, given):
        x = given["x"] if isinstance(given, dict) else given[0] if len(given) == 1 else given
        features = model(x.sub_(0.5))
        return features.square().mean(), features, torch.ones(4, 6, 14, 14)

    with pytest.raises(ValueError, match=r"leave the batch as it is, .* \(x.clone\(\)\)"):
        search.step(step, form(torch.ones(4, 3, 16, 16)))
