"""A pytest plugin for the child processes that have the mock driver (see tests/cuda/conftest.py).

SOKD_CHILD names the tests to run, and the pipe that takes their reports; SOKD_MOCK_NVRTC an NVRTC
to use in place of PyTorch's.
"""

import json
import os

import pytest

from support.cuda import nvrtc_names

if "SOKD_MOCK_NVRTC" in os.environ:
    nvrtc_names.replace([os.environ["SOKD_MOCK_NVRTC"]])


def _given() -> dict[str, list[str] | int]:
    with open(os.environ["SOKD_CHILD"]) as file:
        return json.load(file)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = set(_given()["tests"])
    items[:] = [item for item in items if item.nodeid in tests]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.passed and report.when != "teardown":
        return
    text = report.longrepr[2] if report.skipped else report.longreprtext
    line = {"test": report.nodeid, "when": report.when, "outcome": report.outcome, "text": text}
    os.write(_given()["pipe"], (json.dumps(line) + "\n").encode())
