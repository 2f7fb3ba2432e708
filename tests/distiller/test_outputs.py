"""The task receives the model's output unchanged; logits are selected, and errors name them."""

from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from support.distiller_cases import Answering, Net, batch, make, models, objective
from support.raises import raises, warns
from torch import Tensor, nn

import sokd


class Detector(nn.Module):
    """Three maps, as a detector with three levels returns, in several forms."""

    def __init__(self, form=list) -> None:
        super().__init__()
        self.stem, self.mid = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)
        self.heads = nn.ModuleList(nn.Conv2d(4, 5, 1) for _ in range(3))
        self.form = form

    def forward(self, x: Tensor):
        first = self.stem(x)
        second = self.mid(first)
        maps = (first, second, second[:, :, ::2, ::2])
        return self.form([head(each) for head, each in zip(self.heads, maps, strict=True)])


def as_boxes(maps: list[Tensor]) -> dict[str, Tensor]:
    flat = torch.cat([each.flatten(2) for each in maps], 2).mT
    return {"cls": flat[..., :1], "box": flat[..., 1:]}


def levels(output) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for each in values for tensor in levels(each)]


def squares(output, y) -> Tensor:
    """A detector's loss, which runs over the levels."""
    return sum(each.square().mean() for each in levels(output))


FORMS = {
    "list": list,
    "tuple": tuple,
    "boxes in a dict": as_boxes,
    "boxes in a tuple": lambda maps: tuple(as_boxes(maps).values()),
    "nested": lambda maps: [maps[0], tuple(maps[1:])],
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("way", ["train", "eval", "search"])
def test_a_callable_task_gets_the_whole_output(form, way):
    torch.manual_seed(0)
    pair, seen, (x, _) = (Detector(form), Detector(form)), [], batch()

    def task(output, y):
        seen.append(output)
        return squares(output, y)

    distiller = make(models=pair, layers="mid", task=task)
    if way == "search":
        loss = distiller.step(distiller.student, (x, torch.zeros(4)))[0]
    else:
        output, losses = distiller.train(way == "train")(x, torch.zeros(4))
        loss = losses["loss_task"]
        assert output is seen[-1], "and so does the caller"
    loss.backward()
    assert type(seen[-1]) is type(distiller.student(x))
    torch.testing.assert_close(loss, task(distiller.student(x), None))
    assert all(head.weight.grad.any() for head in distiller.student.heads)


@pytest.mark.parametrize(("where", "count"), [
    (0, 1), (lambda maps: maps, 3), (lambda maps: maps[:2], 2),
], ids=["a level", "all", "two levels"])  # fmt: skip
def test_logits_picks_the_part_that_the_task_gets(where, count):
    pair = (Detector(), Detector())
    seen = []

    def task(output, y):
        seen.append(1 if isinstance(output, Tensor) else len(output))
        return squares(output, y)

    distiller = make(models=pair, layers="mid", task=task, logits=where)
    output, losses = distiller(batch()[0], torch.zeros(4))
    assert seen == [count] and len(output) == 3
    losses["loss_task"].backward()
    trained = [head.weight.grad is not None for head in distiller.student.heads]
    assert trained == [True] * count + [False] * (3 - count)


def test_a_part_that_is_no_tensor_serves_no_logits():
    pair = (Detector(), Detector())
    distiller = make(models=pair, layers="mid", logits=lambda maps: maps)
    text = "logits must select a tensor of the list that the model returns, got list"
    with pytest.raises(TypeError, match=text):
        distiller(*batch())


def test_a_task_that_takes_a_tensor_alone():
    pair = tuple(Answering(net, lambda z: (z, z.detach())) for net in models())
    distiller = make(models=pair, layers="net.stage1", task=nn.CrossEntropyLoss())
    with pytest.raises(TypeError) as caught:
        objective(distiller)
    rule = "accept the student's output (logits= selects a part of it)"
    assert str(caught.value).startswith(f"Distiller: task must {rule}, got tuple: ")
    named = make(models=pair, layers="net.stage1", task=nn.CrossEntropyLoss(), logits=0)
    x, y = batch()
    (logits, _), losses = named(x, y)
    torch.testing.assert_close(losses["loss_task"], F.cross_entropy(logits, y))


@pytest.mark.parametrize(("reduction", "got"), [("none", "shape [4]"), (None, "tuple")])
def test_a_task_that_returns_no_scalar(reduction, got):
    def task(output, y):
        loss = F.cross_entropy(output, y, reduction=reduction or "mean")
        return loss if reduction else (loss, {"items": 1})

    with raises(TypeError, f"Distiller: task must return a scalar tensor, got {got}"):
        objective(make(task=task))
    one = make(task=lambda output, y: F.cross_entropy(output, y)[None])
    assert one(*batch())[1]["loss_task"].dim() == 0


# ---------------------------------------------------------------- one of several tensors of a width
class TwoHeads(Net):
    """Two classifiers, as DeiT's class and distillation heads."""

    def __init__(self, width: int, form) -> None:
        super().__init__(width)
        self.second, self.form = nn.Linear(4 * width, 5), form

    def forward(self, x: Tensor):
        pooled = self.features(x).mean((2, 3))
        one, two = self.head(pooled), self.second(pooled)
        return self.form(one, two) if self.training else (one + two) / 2


Named = namedtuple("Named", "logits aux_logits")
TEXT = (
    "sokd: the student returns several outputs of one width; {!r} is taken as the logits, and "
    "losses of the logits do not train {!r} (logits= selects another one, task= a loss of all)"
)


@pytest.mark.parametrize(("form", "taken", "rest"), [
    (lambda one, two: (one, two), "0", "1"),
    (lambda one, two: {"out": one, "aux": two}, "out", "aux"),
    (Named, "logits", "aux_logits"),
    (lambda one, two: {"cls": one, "dist": two}, "cls", "dist"),
], ids=["deit", "segmentation", "googlenet", "dict"])  # fmt: skip
@pytest.mark.parametrize("method", ["fitnet", "kd"])
def test_the_choice_of_logits_is_reported_once(form, taken, rest, method):
    student = TwoHeads(3, form)
    distiller = make(models=(Net(6), student), layers={"stage1": "stage1"}, method=method)
    with warns(TEXT.format(taken, rest)):
        for _ in range(2):
            objective(distiller).backward()
    assert student.head.weight.grad is not None and student.second.weight.grad is None


@pytest.mark.parametrize("options", [
    {"logits": 1}, {"logits": lambda output: output[0]},
    {"task": lambda output, y: F.cross_entropy(output[0], y) + F.cross_entropy(output[1], y)},
], ids=["index", "function", "task"])  # fmt: skip
def test_a_choice_that_was_made_is_not_reported(options):
    student = TwoHeads(3, lambda one, two: (one, two))
    objective(make(models=(Net(6), student), layers="stage1", **options)).backward()


def test_an_output_without_parameters_of_its_own_is_not_reported():
    pair = tuple(Answering(net, lambda z: {"aux": 2 * z, "logits": z}) for net in models())
    objective(make(models=pair, layers="net.stage1"))


def test_both_heads_learn_with_a_task_of_both():
    """DeiT: the class head follows the labels, the distillation head the teacher."""
    torch.manual_seed(0)
    student = TwoHeads(3, lambda one, two: (one, two))
    distiller = sokd.Distiller(
        teacher=Net(6), student=student, method={"kd": 1.0}, sokd=False, logits=1,
        task=lambda output, y: F.cross_entropy(output, y),
    )  # fmt: skip
    (one, two), losses = distiller(*batch())
    torch.testing.assert_close(losses["loss_task"], F.cross_entropy(two, batch()[1]))
    (losses["loss_kd"] + F.cross_entropy(one, batch()[1])).backward()
    assert student.head.weight.grad.any() and student.second.weight.grad.any()
