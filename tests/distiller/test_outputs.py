"""The task receives the model's output unchanged; logits are selected, and errors name them."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.distiller_cases import CLASSES, Answering, Net, batch, make, models, objective
from support.raises import raises, warns
from torch import Tensor, nn

import sokd
from sokd import methods


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


# --------------------------------------------------------------------------- outputs in other forms


Heads = namedtuple("Heads", "logits boxes")


@dataclass
class Plain:
    logits: Tensor
    boxes: Tensor


@dataclass(slots=True)
class Slotted:
    logits: Tensor
    boxes: Tensor


class ModelOutput(OrderedDict[str, Tensor]):
    """As of Hugging Face: a dict whose entries are attributes too."""

    def __init__(self, logits: Tensor, boxes: Tensor) -> None:
        super().__init__(logits=logits, boxes=boxes)

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


class Boxes(Net):
    """A classifier and a regression head."""

    def __init__(self, width: int, form: Any) -> None:
        super().__init__(width)
        self.boxes, self.form = nn.Linear(4 * width, 4), form

    def forward(self, x: Tensor) -> Any:
        pooled = self.features(x).mean((2, 3))
        return self.form(self.head(pooled), self.boxes(pooled))


FORMS = [Heads, Plain, Slotted, ModelOutput]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_an_output_with_names(form):
    """The task gets all of it, a method of logits those, and both heads learn."""
    student, (x, y) = Boxes(3, form), batch()

    def task(output, y):
        return F.cross_entropy(output.logits, y) + output.boxes.square().mean()

    distiller = make(models=(Boxes(6, form), student), method="kd", sokd=False, task=task)
    output, losses = distiller(x, y)
    assert type(output) is form and distiller.logits_of(output) is output.logits
    torch.testing.assert_close(losses["loss_task"], task(student(x), y))
    kd = 0.9 * methods.kd(student(x).logits, distiller.teacher(x).logits)
    torch.testing.assert_close(losses["loss_kd"], kd)
    losses["loss_task"].backward()
    assert student.head.weight.grad.any() and student.boxes.weight.grad.any()


class Backbone(Net):
    """A list of maps, as timm's features_only gives."""

    def forward(self, x: Tensor) -> list[Tensor]:
        first = self.stage1(self.stem(x))
        return [first, self.stage2(first)]


@pytest.mark.parametrize("layers", [["stage1", "stage2"], "auto"], ids=str)
def test_backbones_that_return_features(layers):
    distiller = make(models=(Backbone(6), Backbone(3)), layers=layers, task=None, sokd=False)
    output, losses = distiller(batch()[0])
    assert [tuple(each.shape) for each in output] == [(4, 6, 8, 8), (4, 12, 4, 4)]
    if layers != "auto":
        pairs = zip(distiller.adapters, output, strict=True)
        adapted = [adapter(maps, maps.shape[2:]) for adapter, maps in pairs]
        expected = 100 * methods.fitnet(adapted, distiller.teacher(batch()[0]))
        torch.testing.assert_close(losses["loss_fitnet"], expected)
    assert distiller.logits_of(output) is output or distiller.logits_of(output) is output[0]


def test_a_detector_that_decodes_in_eval_mode():
    """YOLO: the maps in train mode, (decoded, maps) in eval mode; each as it is."""

    class Yolo(Backbone):
        def forward(self, x):
            maps = super().forward(x)
            return maps if self.training else (maps[0].flatten(1), maps)

    seen = []

    def task(output, y):
        seen.append(type(output))
        maps = output[1] if isinstance(output, tuple) else output
        return sum(each.square().mean() for each in maps)

    distiller = make(models=(Yolo(6), Yolo(3)), task=task)
    x, y = batch()
    output, losses = distiller(x, y)
    assert isinstance(output, list)
    distiller.eval()
    decoded, losses = distiller(x, y)
    torch.testing.assert_close(losses["loss_task"], task(distiller.student(x), y))
    assert isinstance(decoded, tuple) and seen == [list, tuple, tuple]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_auxiliary_classifiers_of_googlenet():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    student = torchvision.models.googlenet(num_classes=CLASSES, aux_logits=True, init_weights=False)
    x, y = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    teacher = Answering(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64**2, 900), nn.Linear(900, 5)),
                        lambda logits: logits)  # fmt: skip

    def all_three(output, y):
        return sum(F.cross_entropy(each, y) for each in output)

    options = {"models": (teacher, student), "method": "kd", "sokd": False}
    with pytest.warns(UserWarning, match="do not train 'aux_logits2', 'aux_logits1'"):
        make(**options)(x, y)
    output, losses = make(**options, task=all_three)(x, y)
    torch.testing.assert_close(losses["loss_task"], all_three(output, y))
    losses["loss_task"].backward()
    assert student.aux1.fc2.weight.grad.any() and student.aux2.fc2.weight.grad.any()


def test_dense_outputs_of_one_width_are_reported():
    """A segmentation model's auxiliary head."""

    class Dense(Net):
        def __init__(self, width):
            super().__init__(width)
            self.out, self.aux = nn.Conv2d(4 * width, 3, 1), nn.Conv2d(4 * width, 3, 1)

        def forward(self, x):
            maps = self.features(x)
            return {"out": self.out(maps), "aux": self.aux(maps)}

    distiller = make(models=(Dense(6), Dense(3)))
    y = torch.randint(0, 3, (4, 4, 4))
    with pytest.warns(
        UserWarning, match="'out' is taken as the logits, and losses of the logits do not"
    ):
        output, losses = distiller(batch()[0], y)
    torch.testing.assert_close(losses["loss_ce"], F.cross_entropy(output["out"], y))
