"""Targets and logits of which a cross entropy has no meaning are refused, with the way out."""

import re

import pytest
import torch
import torch.nn.functional as F
from support.distiller_cases import Net, batch, make
from support.raises import raises
from torch import nn

import sokd
from sokd.compat import MDistiller

OTHERS = (
    "task=F.mse_loss for numbers, task=F.binary_cross_entropy_with_logits for several labels "
    "per sample"
)


def with_outputs(count: int, *, dense: bool = False) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    pair = Net(6), Net(3)
    for net in pair:
        net.head = nn.Linear(net.head.in_features, count)
        if dense:
            net.head = nn.Conv2d(net.head.in_features, count, 1)
            net.forward = lambda x, net=net: F.interpolate(
                net.head(net.features(x)), scale_factor=4
            )
    return pair


ONE_LOGIT = {
    "numbers": (False, torch.randn(4, 1)),
    "a float class": (False, torch.tensor([0.0, 1.0, 1.0, 0.0])[:, None]),
    "an integer class": (False, torch.tensor([0, 1, 1, 0])),
    "all zeros": (False, torch.zeros(4, dtype=torch.long)),
    "a binary mask": (True, torch.rand(4, 1, 16, 16).round()),
    "an integer mask": (True, torch.randint(0, 2, (4, 16, 16))),
    "depth": (True, torch.rand(4, 1, 16, 16)),
}


@pytest.mark.parametrize(("dense", "target"), ONE_LOGIT.values(), ids=ONE_LOGIT)
@pytest.mark.parametrize("way", ["train", "eval", "search", "mdistiller"])
def test_one_logit_is_refused(dense, target, way):
    pair = with_outputs(1, dense=dense)
    x, shape = batch()[0], [4, 1, 16, 16] if dense else [4, 1]
    rule = f"have 2 classes or more for the cross entropy ({OTHERS})"
    text = f"Distiller: logits must {rule}, got {shape}"
    with pytest.raises(ValueError, match=re.escape(text)):
        if way == "mdistiller":
            MDistiller(pair[1], pair[0], layers="stage1", example=x)(image=x, target=target)
        elif way == "search":
            distiller = make(models=pair)
            search = sokd.PolicySearch(distiller.kd, distiller.student, objective="task")
            search.step(distiller.step, (x, target))
        else:
            make(models=pair).train(way == "train")(x, target)


@pytest.mark.parametrize(("task", "target"), [
    (F.mse_loss, torch.randn(4, 1)),
    (F.binary_cross_entropy_with_logits, torch.tensor([0.0, 1.0, 1.0, 0.0])[:, None]),
])  # fmt: skip
def test_the_way_out_trains_the_head(task, target):
    distiller = make(models=with_outputs(1), task=task)
    output, losses = distiller(batch()[0], target)
    torch.testing.assert_close(losses["loss_task"], task(output, target))
    losses["loss_task"].backward()
    assert distiller.student.head.weight.grad.any()


ROWS = {
    "multi-hot": (torch.tensor([[1.0, 0, 1, 0, 0]] * 4), "from 0 to 1 with the sum 2"),
    "no label": (torch.zeros(4, 5), "from 0 to 0 with the sum 0"),
    "logits": (torch.tensor([[3.0, -2, 0, 0, 0]] * 4), "from -2 to 3 with the sum 1"),
    "numbers": (torch.full((4, 5), 0.5), "from 0.5 to 0.5 with the sum 2.5"),
    "one row of four": (
        torch.cat([torch.eye(5)[:3], torch.ones(1, 5)]),
        "from 1 to 1 with the sum 5",
    ),
}


@pytest.mark.parametrize(("target", "row"), ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("training", [True, False])
def test_rows_that_are_not_probabilities(target, row, training):
    rule = f"hold rows of probabilities, which sum to 1, where it is floating point ({OTHERS})"
    text = re.escape(f"Distiller: target must {rule}, got a row {row}")
    with pytest.raises(ValueError, match=text):
        make().train(training)(batch()[0], target)


def test_dense_rows_are_read_along_the_classes():
    distiller = make(models=with_outputs(3, dense=True))
    good = torch.rand(4, 3, 16, 16).softmax(1)
    logits, losses = distiller(batch()[0], good)
    torch.testing.assert_close(losses["loss_ce"], F.cross_entropy(logits, good))
    with pytest.raises(ValueError, match="hold rows of probabilities"):
        make(models=with_outputs(3, dense=True))(batch()[0], good * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_soft_labels_are_taken(dtype):
    """Mixup and label smoothing, whose rows sum to 1 up to the rounding of the dtype."""
    y = batch()[1]
    mixed = 0.3 * F.one_hot(y, 5) + 0.7 * F.one_hot(y.flip(0), 5)
    smooth = (0.9 * mixed + 0.1 / 5).to(dtype)
    logits, losses = make()(batch()[0], smooth.float())
    torch.testing.assert_close(losses["loss_ce"], F.cross_entropy(logits, smooth.float()))


def test_only_the_first_batch_is_read(monkeypatch):
    distiller, (x, y) = make(), batch()
    good = F.one_hot(y, 5).float()
    distiller(x, good)
    checks = "sokd.distiller.outputs._check_probabilities"
    monkeypatch.setattr(checks, lambda target: pytest.fail("read again"))
    distiller(x, good)
    with pytest.raises(pytest.fail.Exception):
        make()(x, good)


def test_an_ignored_label_and_one_that_is_no_class():
    distiller, (x, y) = make(), batch()
    ignored = y.clone()
    ignored[1] = -100
    logits, losses = distiller(x, ignored)
    torch.testing.assert_close(losses["loss_ce"], F.cross_entropy(logits, ignored))
    for wrong in (-1, 5, 255):
        given = ignored.clone()
        given[2] = wrong
        text = f"target must be class indices 0 .. 4 (-100 is ignored), got {wrong}"
        with pytest.raises(ValueError, match=re.escape(f"Distiller: {text}")):
            distiller(x, given)


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_without_any_label(training):
    distiller, (x, y) = make(method={"fitnet": 1.0, "kd": 1.0}).train(training), batch()
    rule = "hold a label (None for a batch without any)"
    with raises(ValueError, f"Distiller: target must {rule}, got -100 in every place"):
        distiller(x, torch.full_like(y, -100))
    losses = make(method={"fitnet": 1.0, "kd": 1.0})(x, None)[1]
    assert "loss_ce" not in losses and {"loss_fitnet", "loss_kd"} <= losses.keys()


def test_other_labels_are_ignored_by_a_task():
    y = batch()[1].clone()
    y[0] = -1
    task = nn.CrossEntropyLoss(ignore_index=-1)
    logits, losses = make(task=task)(batch()[0], y)
    torch.testing.assert_close(losses["loss_task"], F.cross_entropy(logits[1:], y[1:]))
