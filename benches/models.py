"""The CIFAR ResNets of the distillation papers (ResNet32x4, ResNet8x4)."""

import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (32, 64, 128, 256)  # the "x4" networks: four times the usual 16, 32, 64 after the stem


class Block(nn.Module):
    """conv-BN-ReLU-conv-BN and the shortcut; the ReLU after the sum."""

    def __init__(self, narrow: int, wide: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(narrow, wide, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(wide)
        self.second = nn.Conv2d(wide, wide, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(wide)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or narrow != wide:
            smaller = nn.Conv2d(narrow, wide, 1, stride, bias=False)
            self.shortcut = nn.Sequential(smaller, nn.BatchNorm2d(wide))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.first(x)))
        return F.relu(self.norm2(self.second(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """6n + 2 layers for 32x32 images; returns logits and the second stage's map."""

    def __init__(self, depth: int, classes: int = 100) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        first = nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False)
        self.stem = nn.Sequential(first, nn.BatchNorm2d(WIDTHS[0]), nn.ReLU())
        stages = zip(WIDTHS[:-1], WIDTHS[1:], (1, 2, 2), strict=True)
        self.stage1, self.stage2, self.stage3 = (_stage(*stage, blocks) for stage in stages)
        self.classifier = nn.Linear(WIDTHS[-1], classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.stage2(self.stage1(self.stem(x)))
        return self.classifier(self.stage3(features).mean((2, 3))), features


def _stage(narrow: int, wide: int, stride: int, blocks: int) -> nn.Sequential:
    rest = (Block(wide, wide, 1) for _ in range(blocks - 1))
    return nn.Sequential(Block(narrow, wide, stride), *rest)
