"""Python blocks of Markdown pages, and the names of a training script that they continue."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sokd


class Network(nn.Module):
    """The pages' `student` and `teacher`: logits and a feature map [B, channels, 4, 4]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.classifier = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.relu(self.features(x))
        return self.classifier(features.mean((2, 3))), features


def prelude() -> dict[str, Any]:
    """The names of a training script that exists already."""
    torch.manual_seed(0)
    teacher = Network(256).eval().requires_grad_(False)
    return {
        "torch": torch,
        "F": nn.functional,
        "sokd": sokd,
        "student": Network(64),
        "teacher": teacher,
        "teacher_features": lambda x: teacher(x)[1],
        "held_out": [(torch.randn(4, 3, 8, 8), torch.randint(0, 10, (4,))) for _ in range(2)],
        "loader": [(torch.randn(4, 3, 8, 8), torch.randint(0, 10, (4,))) for _ in range(2)],
    }


def run_blocks(page: Path, names: dict[str, Any]) -> int:
    """Run each ```python block of the page in order; how many there were.

    Each is shifted down, so that a traceback names the page's own line.
    """
    text = page.read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    for block in blocks:
        shifted = "\n" * text.count("\n", 0, block.start(1)) + block[1]
        exec(compile(shifted, str(page), "exec"), names)
    return len(blocks)
