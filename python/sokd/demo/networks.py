"""Teacher and student; each returns `(logits [B, classes], feature map [B, C, H, W])`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from sokd.demo.data import DataSet, Part

# Width and blocks of both stages; channels of the map, few: DAM's cost grows with their square.
TEACHERS = {"tiny": ((16, 1), (32, 1), 16), "base": ((32, 2), (80, 3), 24)}
STUDENTS = {"tiny": (6, 10, 12), "small": (8, 16, 22), "base": (12, 24, 32)}  # three convolutions


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.body = nn.Sequential(*_conv(inputs, outputs, 3, stride), *_conv(outputs, outputs)[:-1])
        shortcut = [] if stride == 1 else _conv(inputs, outputs, 1, stride)[:-1]
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class Net(nn.Module):
    """A body that computes the feature map and a linear classifier on its mean."""

    def __init__(self, layers: Sequence[nn.Module], channels: int, data: DataSet) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(channels, len(data.class_names))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return self.head(features.mean((2, 3))), features


def build_teacher(size: str, data: DataSet) -> Net:
    """A residual network by its key in `TEACHERS`."""
    (first, blocks), (second, more), channels = TEACHERS[size]
    layers, widths = _conv(1, first, 3, 2), [first] * (blocks + 1) + [second] * more
    layers += [_Block(*pair) for pair in pairwise(widths)]
    return Net([*layers, *_conv(second, channels, 1)], channels, data)


def build_student(size: str, data: DataSet) -> Net:
    """A plain network by its key in `STUDENTS`."""
    first, second, third = STUDENTS[size]
    layers = [*_conv(1, first, 3, 2), *_conv(first, second, 3, 2), *_conv(second, third)]
    return Net(layers, third, data)


class Recorded(nn.Module):
    """A teacher with precomputed outputs on the training images, looked up by `rows` [B]."""

    def __init__(self, teacher: Net, outputs: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.body = nn.Identity()  # the layer whose output is distilled
        self.head = teacher.head  # read by some methods
        self.rows: Tensor | None = None  # None: the teacher itself is called
        self._recorded = (teacher, outputs)  # a tuple: the teacher is not a submodule

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        teacher, outputs = self._recorded
        logits, maps = teacher(x) if self.rows is None else (each[self.rows] for each in outputs)
        return logits, self.body(maps)


def predict(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and features of any number of images, in eval mode, without gradients."""
    training = model.training
    model.eval()
    with torch.no_grad():
        parts = [model(images[start : start + 500]) for start in range(0, len(images), 500)]
    model.train(training)
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def accuracy(model: nn.Module, part: Part) -> float:
    """The share of a part's images that the model classifies correctly."""
    return (predict(model, part[0])[0].argmax(1) == part[1]).float().mean().item()
