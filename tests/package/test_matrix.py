"""`make matrix`: which CPython and which wheel a row runs with, and the page it leaves."""

from __future__ import annotations

import json
import os
import platform
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MATRIX = runpy.run_path(str(ROOT / "tests" / "matrix" / "__main__.py"))


def row(python: str):
    return MATRIX["Row"](torch="torch==2.5.1", python=python, numpy="numpy==1.26.*", ci=True)


def test_the_page_is_that_of_its_record() -> None:
    page = MATRIX["page"](json.loads(MATRIX["RECORD"].read_text()))
    assert MATRIX["PAGE"].read_text() == page, "run `make matrix`"


def test_every_row_is_listed_and_ci_has_the_oldest_and_the_newest_torch() -> None:
    listed = list(MATRIX["rows"]())
    assert len({row.name for row in listed}) == len(listed)
    assert [row.torch for row in listed if row.ci] == [listed[0].torch, "torch"]


@pytest.mark.parametrize(
    ("python", "chosen"),
    [("3.10", "sokd-2-cp310-abi3-x.whl"), ("3.14t", "sokd-1-cp314-cp314t-x.whl"), ("3.13t", None)],
)
def test_a_row_gets_the_newest_wheel_of_its_abi(
    tmp_path: Path, python: str, chosen: str | None
) -> None:
    names = "sokd-1-cp310-abi3-x.whl", "sokd-2-cp310-abi3-x.whl", "sokd-1-cp314-cp314t-x.whl"
    for age, name in enumerate(names):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (age, age))
    found = MATRIX["wheel_for"](row(python), list(tmp_path.iterdir()))
    assert (found and found.name) == chosen


def test_a_missing_cpython_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    missing = row("3.99")
    MATRIX["check"](missing, [], anywhere=False)
    assert missing.cells["bits"] == "not run: no CPython 3.99 here"
    assert MATRIX["substitute"](missing) == sys.executable
    running = platform.python_version()
    assert (missing.python, missing.numpy, missing.listed) == (running, "numpy", False)
    said = f"matrix: NO CPYTHON 3.99 HERE: torch==2.5.1 runs on {running}\n"
    assert capsys.readouterr().out == said
