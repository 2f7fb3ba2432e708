"""Fixtures of all tests: seeds, threads, readers of tensors; a count of skips with reasons."""

import random
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

import sokd
from sokd import _core
from sokd.kd.policy import policy

THREADS = 2

try:
    import hypothesis
except ModuleNotFoundError:  # the tests of a GPU, on any PyTorch, do without
    pass
else:
    hypothesis.settings.register_profile("sokd", deadline=None, derandomize=True, max_examples=40)
    hypothesis.settings.load_profile("sokd")


def pytest_report_header() -> list[str]:
    return [f"sokd: {line}" for line in sokd.ops.config.describe().splitlines()]


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Every test starts from the same generators and leaves the thread count as it was."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    torch.set_flush_denormal(False)  # what inductor of torch 2.5 compiles sets it
    policy._source = None
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture
def one_thread(_same_start: None) -> None:
    """Many small steps gain nothing from a second thread."""
    torch.set_num_threads(1)


@pytest.fixture
def with_threads() -> Callable[..., object]:
    """with_threads(n, function): the function's result under n threads."""

    def run(threads: int, function: Callable[[], object]) -> object:
        torch.set_num_threads(threads)
        return function()

    return run


@pytest.fixture(params=["tch", "dlpack", "portable"])
def reader(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each reader of torch tensors in turn."""
    name, before = request.param, _core.build_info()["reader"]
    try:
        _core.select_reader(name)
    except ValueError:
        pytest.skip(f"no reader {name} here; see sokd.show_config()")
    yield name
    _core.select_reader(before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The number of skipped tests with their reasons, as the last lines of every run."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(str(report.longrepr[2]) for report in skipped)
    terminalreporter.write_line(f"skipped: {sum(reasons.values())}")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"  {count} x {reason.removeprefix('Skipped: ')}")
