"""`layers="auto"`: what it takes, what it leaves."""

import warnings
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from support.distiller_cases import CLASSES, Answering, Net, Shaped, batch, make, models
from support.raises import raises
from torch import nn

from sokd.distiller import Distiller
from sokd.distiller.auto import auto_layers


def test_auto_takes_the_last_map_of_each_resolution():
    assert make(layers="auto").pairs == [(name, name) for name in ("stem", "stage1", "stage2")]


def test_auto_pairs_resolutions_that_both_have():
    teacher, student = models()
    student.stage1 = nn.Sequential(student.stage1, nn.AvgPool2d(2))  # 4 x 4, as stage2 was
    student.stage2 = Net._stage(6, 12, 1, True, False)
    assert make(models=(teacher, student), layers="auto").pairs == [
        ("stem", "stem"),
        ("stage1.0", "stage1"),
        ("stage2", "stage2"),
    ]


def test_auto_falls_back_on_the_two_last_maps():
    teacher, _ = models()
    student = Shaped(lambda maps: maps[:, :, :5, :5])
    student.conv = nn.Conv2d(3, 4, 3, 3, 1)  # 6 x 6
    assert make(models=(teacher, student), layers="auto").pairs == [("here", "stage2")]


def test_auto_passes_over_what_a_convolution_pads():
    """EfficientNets pad in a module of its own: a "resolution" of 9x9 that no layer has."""

    class Padded(Net):
        def __init__(self, width):
            super().__init__(width)
            self.stage2 = torch.nn.Sequential(torch.nn.ZeroPad2d((0, 1, 0, 1)), self.stage2)

    pairs = make(models=(Padded(12), Padded(8)), layers="auto").pairs
    assert pairs == [(name, name) for name in ("stem", "stage1", "stage2")]


class Inverted(nn.Module):
    """Widens, then strides, as MobileNets do: its first map has the resolution of its input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        wide = nn.Sequential(nn.Conv2d(inputs, 4 * outputs, 1), nn.ReLU(inplace=True))
        narrow = nn.Conv2d(4 * outputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs)
        self.conv = nn.Sequential(wide, *narrow)

    def forward(self, x):
        return self.conv(x)


def test_auto_takes_what_stages_give():
    def net(width):
        made = Net(width)
        rest = Net._stage(2 * width, 2 * width, 1, True, False)
        made.stage1 = nn.Sequential(Inverted(width, 2 * width), rest)
        made.stage2 = Inverted(2 * width, 4 * width)
        return made

    pairs = make(models=(net(6), net(3)), layers="auto").pairs
    assert pairs == [(name, name) for name in ("stem", "stage1", "stage2")]


class Segmenting(nn.Module):
    """A U-Net: its map of logits is as large as its first and its last features."""

    def __init__(self, width: int, act: nn.Module | None = None, classes: int = CLASSES) -> None:
        super().__init__()
        self.enc, self.mid = (
            Net._stage(3, width, 1, True, True),
            Net._stage(width, 2 * width, 2, True, True),
        )
        self.up, self.dec = (
            nn.ConvTranspose2d(2 * width, width, 2, 2),
            Net._stage(2 * width, width, 1, True, True),
        )
        self.head = nn.Conv2d(width, classes, 1)
        self.act = nn.Identity() if act is None else act

    def forward(self, x):
        enc = self.enc(x)
        return self.act(self.head(self.dec(torch.cat([enc, self.up(self.mid(enc))], 1))))


class Summed(nn.Module):
    """Logits that are the sum of two convolutions' maps: no layer's own, but the head's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.head = (
            Net(width).stem,
            nn.ModuleDict({k: nn.Conv2d(width, 5, 1) for k in "ab"}),
        )
        self.head.forward = lambda z: self.head["a"](z) + self.head["b"](z)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.parametrize(("net", "layers"), [
    (Segmenting, ["mid", "dec"]),
    (lambda width: Segmenting(width, nn.Sigmoid()), ["mid", "dec"]),
    (lambda width: nn.Sequential(OrderedDict(net=Segmenting(width, nn.Softmax(1)))),
     ["net.mid", "net.dec"]),
    (lambda width: Answering(Segmenting(width), lambda z: {"aux": z.mean((1, 2, 3)), "out": z}),
     ["net.mid", "net.dec"]),
    (Summed, ["body"]),
], ids=["unet", "sigmoid", "inside", "dict", "sum"])  # fmt: skip
def test_auto_does_not_take_the_logits(net, layers):
    pairs = make(models=(net(6), net(3)), layers="auto", method="at").pairs
    assert pairs == [(name, name) for name in layers]


def test_auto_takes_the_output_of_models_that_give_features():
    """With a norm or an activation behind the convolution, or by `task=None`."""

    def net(*last):
        return nn.Sequential(Net._stage(3, 4, 1, True, False), nn.Conv2d(4, 8, 3, 2, 1), *last)

    def last(make_net, method="at", **options):
        given = {"models": (make_net(), make_net()), "layers": "auto", "method": method}
        return make(**given, **options).pairs[-1]

    assert last(lambda: net(nn.ReLU())) == ("2", "2")
    assert last(lambda: net(nn.BatchNorm2d(8))) == ("2", "2")
    assert last(net) == ("0", "0")
    assert last(net, task=None) == ("1", "1")
    assert last(net, task=None, method={"at": 1.0, "kd": 1.0}) == ("0", "0")


class ChannelsLast(nn.Module):
    """Maps [B, H, W, C], as a Swin transformer's."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.block = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 6)

    def forward(self, x):
        return self.block(self.patch(x).movedim(1, 3)).mean((1, 2))


def test_auto_reads_maps_in_their_order():
    """[4, 4, 4, 6] is not a map of 4 x 6 cells, for the image is a square; a named order counts."""
    pairs = make(models=(ChannelsLast(), ChannelsLast()), layers="auto", method="at").pairs
    assert pairs == [("patch", "patch")]
    teacher, _ = models()
    pair = teacher, ChannelsLast()
    distiller = make(models=pair, layers="auto", method="at", student_order="BHWC")
    assert distiller.pairs == [("block", "stage2")]
    assert distiller.features(batch()[0])[0][0].shape == (4, 6, 4, 4)


def test_auto_says_nothing_of_maps_overwritten_in_place():
    """No layer was named: the map is distilled as the next layer changed it."""

    class Overwriting(Net):
        def features(self, x):
            return F.relu_(self.stage2(self.stage1(self.stem(x))))

    def net(width):
        made = Overwriting(width)
        made.stage2 = made.stage2[:-1]
        return made

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distiller = make(models=(net(6), net(3)), layers="auto")
    assert distiller.pairs[-1] == ("stage2", "stage2")
    assert all(side[-1].min() == 0 for side in distiller.features(batch()[0]))


class Attending(nn.Module):
    """Tokens beside attention maps [B, heads, N, N], a pooled map and a layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.attention, self.block = (
            nn.Conv2d(3, 4, 4, 4),
            nn.Identity(),
            nn.Linear(4, 4),
        )
        self.twice, self.pool = nn.Identity(), nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        z = self.patch(x).flatten(2).mT
        self.attention((z @ z.mT)[:, None])
        z = self.block(z)
        self.pool(z.mT.unflatten(2, (4, 4)))
        return self.twice(self.twice(z)).mean(1)


def test_auto_on_tokens():
    x = batch()[0]
    found = auto_layers(Attending(), Attending(), lambda model: model(x), x)
    assert found == [("block", "block")]


def test_auto_without_a_map():
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 5))
    rule = "be named, because no layer of the student with a gradient returns a map or a square of "
    rule += "tokens"
    with raises(ValueError, f"Distiller: layers must {rule}, got 'auto'"):
        Distiller(nn.Sequential(nn.Flatten(), nn.Linear(768, 5)), net, example=batch()[0])


# ------------------------------------------------------------------------ layers without a gradient
def chosen(student: nn.Module, **options) -> list[str]:
    """The student's layers, after a step that trains with them."""
    distiller = make(models=(Net(6), student), layers="auto", **options)
    torch.stack(list(distiller(*batch())[1].values())).sum().backward()
    trained = [p for p in distiller.student.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)
    return [layer for layer, _ in distiller.pairs]


@pytest.mark.parametrize(("frozen", "layers"), [
    (["stem"], ["stage1", "stage2"]), (["stem", "stage1"], ["stage2"]),
    (["stage1"], ["stem", "stage1", "stage2"]),  # the gradient passes through
], ids=str)  # fmt: skip
def test_auto_passes_over_layers_without_a_gradient(frozen, layers):
    student = models()[1]
    for name in frozen:
        getattr(student, name).requires_grad_(False)
    assert chosen(student) == layers


class LowRank(nn.Module):
    """A frozen convolution with a trained one of low rank beside it, as LoRA makes it."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Conv2d(base.in_channels, 2, 3, base.stride, 1, bias=False)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_auto_on_a_student_with_adapters():
    student = models()[1].requires_grad_(False)
    student.stage2[0] = LowRank(student.stage2[0])
    assert chosen(student) == ["stage2"]


def test_auto_on_a_student_whose_backbone_runs_without_a_graph():
    class Backbone(Net):
        def features(self, x):
            with torch.no_grad():
                x = self.stem(x)
            return self.stage2(self.stage1(x))

    student = Backbone(3)
    distiller = make(models=(Net(6), student), layers="auto")
    assert [layer for layer, _ in distiller.pairs] == ["stage1", "stage2"]
    assert torch.stack(list(distiller(*batch())[1].values())).sum().isfinite()


def test_auto_where_only_the_head_is_trained():
    student = models()[1].requires_grad_(False)
    student.head.requires_grad_(True)
    rule = "be named, because no layer of the student with a gradient returns a map or a square of "
    rule += "tokens"
    with raises(ValueError, f"Distiller: layers must {rule}, got 'auto'"):
        make(models=(Net(6), student), layers="auto")


def test_auto_on_a_frozen_student_takes_what_it_would_otherwise():
    student = models()[1].requires_grad_(False)
    pairs = make(models=(Net(6), student), layers="auto").pairs
    assert [layer for layer, _ in pairs] == ["stem", "stage1", "stage2"]
