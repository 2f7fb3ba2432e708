"""The code in README.md runs; the numbers on the pages are those of the measured files."""

from pathlib import Path

import pytest
import torch
from support.pages import prelude, run_blocks

from benches import report

README = Path(__file__).parents[2] / "README.md"


def test_examples_run_in_order() -> None:
    names = prelude()
    del names["sokd"]  # README imports it
    before = names["student"].features.weight.clone()
    assert run_blocks(README, names) >= 3
    assert not torch.equal(before, names["student"].features.weight), "the examples trained nothing"


@pytest.mark.parametrize(
    ("page", "table"),
    [(page, name) for page, blocks in report.rendered().items() for name in blocks],
)
def test_table_is_that_of_its_files(page: Path, table: str) -> None:
    expected = report.rendered()[page][table]
    assert report.between(page.read_text(), table)[1] == expected, "run `python -m benches.report`"
