"""Inputs of legal shapes of which a method's loss is constant, and channels of another kind."""

import re

import pytest
import torch
import torch.nn.functional as F
from support.distiller_cases import Shaped, batch, make, models, objective
from support.raises import raises
from torch import nn

from sokd import methods


@pytest.mark.parametrize("name", ["kd", "dkd", "lskd", "dist"])
def test_one_logit_and_a_method_of_classes(name):
    """Its softmax is 1 on both sides."""
    pair = models()
    for net in pair:
        net.head = nn.Linear(net.head.in_features, 1)
    distiller = make(models=pair, method=name, sokd=False, task=None)
    y = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match=f"{name}: student_logits must be .*K >= 2.*, got "):
        distiller(batch()[0], y)


ONE_CELL = {
    "at": (lambda s, t: methods.at(s, t), (2, 4, 1, 1), (2, 6, 7, 7)),
    "at, teacher": (lambda s, t: methods.at(s, t), (2, 4, 7, 7), (2, 4, 1, 1)),
    "catkd": (lambda s, t: methods.catkd(s, t), (2, 4, 1, 1), (2, 4, 1, 1)),
    "catkd, pooled": (lambda s, t: methods.catkd(s, t, resolution=1), (2, 4, 7, 7), (2, 4, 7, 7)),
}


@pytest.mark.parametrize(("call", "student", "teacher"), ONE_CELL.values(), ids=ONE_CELL)
def test_a_map_of_one_cell_has_no_attention(call, student, teacher):
    """Divided by its length it is 1 or -1, whatever the network computes."""
    given = torch.rand(student, requires_grad=True), torch.rand(teacher)
    rule = "have 2 cells or more where the maps are compared"
    got = f"got {list(student)} and the teacher's {list(teacher)}"
    with pytest.raises(ValueError, match=re.escape(f": student must {rule}, {got}")):
        call(*given)


@pytest.mark.parametrize("method", ["at", "catkd"])
def test_vectors_have_no_attention_either(method):
    pair = [Shaped(lambda maps: maps.mean((2, 3))) for _ in range(2)]
    options = {} if method == "at" else {"student_head": pair[1].head, "teacher_head": pair[0].head}
    distiller = make(models=pair, layers="here", method=method, sokd=False, **options)
    with pytest.raises(ValueError, match=f"{method}: student must have 2 cells or more"):
        objective(distiller)


def test_class_maps_without_their_length_may_be_pooled_to_one_cell():
    student, teacher = torch.rand(2, 4, 7, 7, requires_grad=True), torch.rand(2, 4, 7, 7)
    loss = methods.catkd(student, teacher, resolution=1, normalise=False)
    torch.testing.assert_close(loss, F.mse_loss(student.mean((2, 3)), teacher.mean((2, 3))))
    loss.backward()
    assert student.grad.any()


@pytest.mark.parametrize(("channels", "text"), [
    (([(16, 8, 8)], [(32, 8, 8)]), "student_channels must be a whole number, got (16, 8, 8)"),
    ((16, 32), "student_channels must be a list of numbers, got 16"),
    (([16], [32.0]), "teacher_channels must be a whole number, got 32.0"),
], ids=["shapes", "numbers", "a fraction"])  # fmt: skip
def test_channels_of_another_kind(channels, text):
    with raises(TypeError, f"reviewkd: {text}"):
        methods.reviewkd(*channels)
