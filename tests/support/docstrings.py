"""Docstring examples."""

import inspect
import itertools
import textwrap
from typing import Any


def run_example(subject: Any, names: dict[str, Any]) -> None:
    """Run the first indented block of the docstring: at most eight lines."""
    lines = (inspect.getdoc(subject) or "").splitlines()
    after = itertools.dropwhile(lambda line: not line.startswith("    "), lines)
    block = itertools.takewhile(lambda line: line.startswith("    ") or not line, after)
    example = textwrap.dedent("\n".join(block))
    assert 1 <= len(example.splitlines()) <= 8, f"{subject.__qualname__} has no short example"
    exec(example, names)
