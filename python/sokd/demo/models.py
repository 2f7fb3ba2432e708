"""Teacher and student networks. Each returns `(logits [B, classes], feature map [B, C, H, W])`.

A teacher is a residual network whose last map goes through a 1x1 neck to `channels` before it is pooled:
DAM's heads cost the square of the channels they read, and with the neck a student run fits into seconds.
A student is three plain convolutions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn


@dataclass(frozen=True)
class TeacherSize:
    """Widths of the two stages, blocks in each, and channels of the feature map."""

    widths: tuple[int, int]
    blocks: tuple[int, int]
    channels: int


TEACHERS: dict[str, TeacherSize] = {
    "tiny": TeacherSize((16, 32), (1, 1), 16),
    "small": TeacherSize((24, 48), (1, 2), 24),
    "base": TeacherSize((32, 80), (2, 3), 24),
    "large": TeacherSize((48, 112), (2, 3), 32),
}
STUDENTS: dict[str, tuple[int, int, int]] = {
    "tiny": (6, 10, 12),
    "small": (8, 16, 22),
    "base": (12, 24, 32),
}


def _conv(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs)
    )


class _Block(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(inputs, outputs, stride=stride), nn.ReLU(inplace=True), _conv(outputs, outputs)
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else _conv(inputs, outputs, kernel=1, stride=stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class Net(nn.Module):
    """A body that makes the feature map and a linear classifier on its mean.

    `channels` is the feature map's, `side` its height and width for square images of side `image_side`.
    """

    def __init__(self, body: nn.Sequential, channels: int, classes: int, image_side: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(channels, classes)
        self.channels = channels
        with torch.no_grad():
            probe = body.eval()(torch.zeros(1, 1, image_side, image_side))
        body.train()
        self.side = int(probe.shape[-1])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.body(x)
        return self.head(features.mean((2, 3))), features


class Recorded(nn.Module):
    """A teacher whose word on the training images is looked up: `rows` [B], set before a call, says which.

    Images are not augmented here, so it would say the same in every epoch. With `rows` None it is asked.
    """

    def __init__(
        self, teacher: Net, images: torch.Tensor, logits: torch.Tensor, maps: torch.Tensor
    ) -> None:
        super().__init__()
        self.body = nn.Identity()  # where the feature map is taken
        self.head = teacher.head  # which some methods read
        self.rows: torch.Tensor | None = None
        self._said = (teacher, images, logits, maps)

    @property
    def count(self) -> int:
        """Training images."""
        return len(self._said[2])

    def example(self) -> torch.Tensor:
        """The first training images, as the next call's."""
        self.rows = torch.arange(2)
        return self._said[1][self.rows]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        teacher, _, logits, maps = self._said
        logits, maps = teacher(x) if self.rows is None else (logits[self.rows], maps[self.rows])
        return logits, self.body(maps)


def saved_teacher(path: Path, size: str, *, classes: int, image_side: int) -> Net | None:
    """The teacher whose `state_dict` the file holds, in eval mode and frozen; None where there is no file."""
    if not path.exists():
        return None
    teacher = build_teacher(size, classes=classes, image_side=image_side)
    teacher.load_state_dict(torch.load(path, weights_only=True))
    return teacher.requires_grad_(False).eval()


def _stem_stride(image_side: int) -> int:
    return (
        2 if image_side > 16 else 1
    )  # 28x28 and 8x8 images both end in a map that can be looked at


def build_teacher(size: str, *, classes: int, image_side: int) -> Net:
    """A teacher by name: a key of `TEACHERS`."""
    if size not in TEACHERS:
        raise ValueError(f"build_teacher: size must be one of {', '.join(TEACHERS)}, got {size!r}")
    spec = TEACHERS[size]
    layers: list[nn.Module] = [
        _conv(1, spec.widths[0], stride=_stem_stride(image_side)),
        nn.ReLU(inplace=True),
    ]
    inputs = spec.widths[0]
    for stage, (width, blocks) in enumerate(zip(spec.widths, spec.blocks, strict=True)):
        for block in range(blocks):
            layers.append(_Block(inputs, width, 2 if stage and not block else 1))
            inputs = width
    layers += [_conv(inputs, spec.channels, kernel=1), nn.ReLU(inplace=True)]
    return Net(nn.Sequential(*layers), spec.channels, classes, image_side)


def build_student(size: str, *, classes: int, image_side: int) -> Net:
    """A student by name: a key of `STUDENTS`."""
    if size not in STUDENTS:
        raise ValueError(f"build_student: size must be one of {', '.join(STUDENTS)}, got {size!r}")
    first, second, third = STUDENTS[size]
    body = nn.Sequential(
        *(_conv(1, first, stride=_stem_stride(image_side)), nn.ReLU(inplace=True)),
        *(_conv(first, second, stride=2), nn.ReLU(inplace=True)),
        *(_conv(second, third), nn.ReLU(inplace=True)),
    )
    return Net(body, third, classes, image_side)


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
