"""Runs the tests of three folders in child processes whose libcuda.so.1 is the mock driver.

`import sokd` opens the driver, and a process keeps the one that it has opened. So pytest collects
and reports these tests like any others, but a child process for each folder runs them:
  host/       the Rust host with PyTorch's NVRTC, each test in a fork that has loaded nothing yet
  dispatch/   the operators from their public functions, with PyTorch's NVRTC
  kernels/    the emulated kernels, launched by the Rust host; a mock NVRTC saves compile time
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cuda.emulator import ROOT, SOURCES
from support.cuda.memory import MockMemory, cuda_memory
from support.cuda.mock import environment, library

from sokd import _core

FOLDERS = {"host": False, "dispatch": False, "kernels": True}  # whether NVRTC is mocked
CHILDREN = pytest.StashKey[dict[str, "Child"]]()


def why_not() -> str | None:
    """Why the mock driver cannot be used here."""
    if not _core.build_info()["cuda"]:
        return "this build has no CUDA kernels"
    if torch.version.cuda is None:
        return "this torch is not built for CUDA"
    return None if sys.platform == "linux" else "the mock driver is a libcuda.so.1"


class Child:
    """A process that runs tests in their order."""

    def __init__(self, tests: list[str], mock: dict[str, str], folder: Path) -> None:
        read, write = os.pipe()
        given = folder / "child.json"
        given.write_text(json.dumps({"tests": tests, "pipe": write}))
        paths = [str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        own = os.environ | mock | {"PYTHONPATH": ":".join(paths), "SOKD_CHILD": str(given)}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-p", "support.cuda.in_child", *dict.fromkeys(t.split("::")[0] for t in tests)]
        self.output = (folder / "output").open("w+")
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=own, pass_fds=[write], text=True,
            stdout=self.output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        os.close(write)
        self.reports, self.finished = os.fdopen(read), dict[str, list[dict[str, str]]]()

    def reports_of(self, test: str) -> list[dict[str, str]]:
        """Reports of a test and its teardown that failed or were skipped, once it has ended."""
        while True:
            known = self.finished.get(test, [])
            if known and known[-1]["when"] == "teardown":
                return known
            if not (line := self.reports.readline()):
                self.output.seek(0)
                pytest.fail(f"the child process ended\n{self.output.read()[-4000:]}", pytrace=False)
            report = json.loads(line)
            self.finished.setdefault(report["test"], []).append(report)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.reports.close()
        self.output.close()


class InChild(pytest.Item):
    """A test that a child process runs."""

    def __init__(self, *, test: pytest.Function, **options: Any) -> None:
        super().__init__(**options)
        self.own_markers, self.location_of = test.own_markers, test.reportinfo()
        self.keywords.update(test.keywords)

    def setup(self) -> None:
        if reason := why_not():
            pytest.skip(reason)

    def runtest(self) -> None:
        if CHILDREN not in self.session.stash:
            self.session.stash[CHILDREN] = started(self.session)
        for report in self.session.stash[CHILDREN][self.path.parent.name].reports_of(self.nodeid):
            if report["outcome"] == "failed":
                pytest.fail(f"{report['when']} in the child\n{report['text']}", pytrace=False)
            if report["outcome"] == "skipped":
                pytest.skip(report["text"].removeprefix("Skipped: "))

    def reportinfo(self) -> Any:
        return self.location_of


def started(session: pytest.Session) -> dict[str, Child]:
    """The processes of all folders that have tests in this run."""
    folder = Path(tempfile.mkdtemp(prefix="sokd-mock-"))
    session.config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    mock, children = environment(folder), {}
    library(SOURCES / "nvrtc.cpp", folder / "nvrtc.so")
    for name, mocks_nvrtc in FOLDERS.items():
        items = [item for item in session.items if isinstance(item, InChild)]
        if tests := [item.nodeid for item in items if item.path.parent.name == name]:
            (folder / name).mkdir()
            nvrtc = {"SOKD_MOCK_NVRTC": str(folder / "nvrtc.so"), "SOKD_CACHE_DIR": ""}
            own = mock | nvrtc if mocks_nvrtc else mock
            children[name] = Child(tests, own, folder / name)
    return children


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem(collector: Any) -> Generator[None, Any, Any]:
    found = yield
    in_parent = "SOKD_CHILD" not in os.environ and collector.path.parent.name in FOLDERS
    if not in_parent or not isinstance(found, list):
        return found
    return [InChild.from_parent(collector, name=test.name, test=test) for test in found]


def pytest_sessionfinish(session: pytest.Session) -> None:
    for child in session.stash.get(CHILDREN, {}).values():
        child.stop()


@pytest.fixture
def memory() -> Iterator[MockMemory]:
    """CUDA tensors in the mock driver's memory: for tests that run in a child process."""
    torch.set_num_threads(1)  # several children share the cores
    with cuda_memory() as memory:
        yield memory
