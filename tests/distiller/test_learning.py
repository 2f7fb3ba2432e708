"""A student that cannot learn, and a pair in the wrong order, are warned of once."""

import copy
import warnings

import pytest
import torch
from support.distiller_cases import Answering, Net, batch, make, models, objective
from torch import nn

from sokd.distiller import Distiller

FROZEN = (
    "sokd: no parameter of the student requires grad, so the student does not learn; call "
    "student.requires_grad_() (a Distiller freezes its teacher; for two networks that teach "
    "each other, pass a copy.deepcopy as each teacher)"
)
DETACHED = (
    "sokd: the student's logits have no gradient, so their losses do not train the student; "
    "compute them without .detach() and torch.no_grad()"
)


def said(*distillers: Distiller, steps: int = 3) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            for distiller in distillers:
                objective(distiller)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("options", [
    {}, {"method": "kd"}, {"method": "kd", "sokd": False}, {"layers": "auto"}, {"method": None},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_frozen_student(options, when):
    teacher, student = models()
    if when == "before":
        student.requires_grad_(False)
    distiller = make(models=(teacher, student), **options)
    student.requires_grad_(False)
    assert said(distiller) == [FROZEN]
    student.requires_grad_(True)
    assert said(distiller) == []


def test_two_distillers_that_teach_each_other():
    one, other = Net(3), Net(3)
    first, second = make(models=(other, one)), make(models=(one, other))
    assert said(first, second)[0] == FROZEN, "the second froze the first one's student"
    apart = [
        make(models=(copy.deepcopy(other), one.requires_grad_())),
        make(models=(copy.deepcopy(one), other.requires_grad_())),
    ]
    assert said(*apart) == []


def test_nothing_is_said_in_a_validation():
    teacher, student = models()
    distiller = make(models=(teacher, student.requires_grad_(False)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distiller.eval()(*batch())
        with torch.no_grad():
            objective(distiller.train())


def test_logits_without_a_gradient():
    teacher, student = models()
    distiller = make(models=(teacher, Answering(student, lambda z: z.detach())), layers={
        "net.stage1": "stage1"
    })  # fmt: skip
    assert said(distiller) == [DETACHED]
    teacher, student = models()
    task = make(
        models=(teacher, Answering(student, lambda z: z.detach())),
        layers={"net.stage1": "stage1"}, task=None,
    )  # fmt: skip
    assert said(task) == [], "where no loss needs them"


def test_a_student_that_is_trained_in_part():
    teacher, student = models()
    student.stem.requires_grad_(False)
    assert said(make(models=(teacher, student))) == []


def test_a_student_without_parameters():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.mean((2, 3)).tile(1, 2)[:, :5]

    assert said(make(models=(Net(3), Fixed()), method="kd", sokd=False)) == []


@pytest.mark.parametrize("where", ["averaged", "copied"])
def test_a_teacher_that_is_a_moving_average_of_the_student(where):
    torch.manual_seed(0)
    student = Net(3)
    if where == "averaged":
        average = torch.optim.swa_utils.AveragedModel(
            student, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
        )
        layers = {"stage1": "module.stage1"}
    else:
        average, layers = copy.deepcopy(student), "stage1"
    distiller = make(models=(average, student), layers=layers, method={"fitnet": 1.0, "kd": 1.0})
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    before = [each.detach().clone() for each in average.state_dict().values()]
    for _ in range(3):
        optimizer.zero_grad()
        objective(distiller).backward()
        optimizer.step()
        if where == "averaged":
            average.update_parameters(student)
        else:
            with torch.no_grad():
                for own, other in zip(average.parameters(), student.parameters(), strict=True):
                    own.lerp_(other, 0.5)
    assert not all(map(torch.equal, before, average.state_dict().values()))
    assert not any(p.requires_grad or p.grad is not None for p in average.parameters())
    assert all(p.grad is not None for p in student.parameters())
