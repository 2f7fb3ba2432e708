"""The code in README.md runs, and the numbers on the pages are those of the measured files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benches import report

README = Path(__file__).parents[2] / "README.md"
TEXT = README.read_text()


class Network(nn.Module):
    """README's `student` and `teacher`: logits and a feature map [B, channels, 4, 4]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.classifier = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.relu(self.features(x))
        return self.classifier(features.mean((2, 3))), features


def prelude() -> dict[str, object]:
    """The names that an existing training script has."""
    torch.manual_seed(0)
    loader = [(torch.randn(4, 3, 8, 8), torch.randint(0, 10, (4,))) for _ in range(2)]
    teacher = Network(256).eval().requires_grad_(False)
    return {
        "torch": torch,
        "F": nn.functional,
        "student": Network(64),
        "teacher": teacher,
        "teacher_features": lambda x: teacher(x)[1],
        "loader": loader,
    }


def python_blocks() -> list[str]:
    """Each ```python block, shifted down so that a traceback names the README's own line."""
    found = re.finditer(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    return ["\n" * TEXT.count("\n", 0, match.start(1)) + match[1] for match in found]


def test_examples_run_in_order() -> None:
    blocks = python_blocks()
    assert len(blocks) >= 3
    names = prelude()
    before = names["student"].features.weight.clone()  # type: ignore[attr-defined]
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert not torch.equal(before, names["student"].features.weight), "the examples trained nothing"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("page", "table"),
    [(page, name) for page, blocks in report.rendered().items() for name in blocks],
)
def test_table_is_that_of_its_files(page: Path, table: str) -> None:
    expected = report.rendered()[page][table]
    assert report.between(page.read_text(), table)[1] == expected, "run `python -m benches.report`"


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:|#)([^)#]+)", TEXT))))
def test_linked_file_exists(link: str) -> None:
    assert (README.parent / link).exists()
