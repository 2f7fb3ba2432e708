"""CUDA without a GPU: the host side and the Python dispatch, on a mock driver that emulates the kernels.

A process has the driver that it started with, so the cases run in processes of their own (tests/mock_driver):
  launches.py, warming.py, caching.py, failing.py   the host side, each case from the beginning
  operators.py     every operator from its public function, gradients included, on fakes of CUDA tensors
  dispatching.py   the same on PyTorch's own CUDA tensors, as far as they go without a device
What no case covers is in docs/gpu.md.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mock_driver.control import environment, library

from sokd import _core
from sokd.ops import config

HERE = Path(__file__).parent / "mock_driver"

pytestmark = [
    pytest.mark.skipif(not _core.build_info()["cuda"], reason="this build has no CUDA kernels"),
    pytest.mark.skipif(
        torch.version.cuda is None, reason="this torch is not built for CUDA and brings no NVRTC"
    ),
    pytest.mark.skipif(sys.platform != "linux", reason="the mock driver is a libcuda.so.1"),
]

# The files of a process, and how many cases they have: as docs/gpu.md says.
CASES = {
    ("launches.py", "warming.py", "caching.py", "failing.py"): 55,
    ("operators.py", "dispatching.py"): 178,
}


@pytest.fixture(scope="module")
def mock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return environment(tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="module")
def running(mock: dict[str, str]) -> Iterator[dict[tuple[str, ...], subprocess.Popen[str]]]:
    """Both at once: most of their time is NVRTC's, on one core."""
    paths = [str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = os.environ | mock | {"PYTHONPATH": ":".join(paths)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "work"]
    started = {
        files: subprocess.Popen(
            [*command, *(str(HERE / file) for file in files)], cwd=HERE.parent.parent, env=own, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for files in CASES
    }  # fmt: skip
    yield started
    for process in started.values():
        with process:  # closes its pipe, and waits
            process.kill()


@pytest.mark.parametrize("files", CASES, ids="-".join)
def test_under_the_mock_driver(
    files: tuple[str, ...], running: dict[tuple[str, ...], subprocess.Popen[str]]
) -> None:
    printed, _ = running[files].communicate()
    assert running[files].returncode == 0, printed[-8000:]
    counts = re.findall(r"(\d+) (?:passed|skipped)", printed.splitlines()[-1])
    assert sum(map(int, counts)) == CASES[files], printed[-2000:]


def test_the_number_of_cases_is_that_of_the_docs() -> None:
    page = (HERE.parent.parent / "docs" / "gpu.md").read_text()
    assert f"(`tests/test_cuda_host.py`, {sum(CASES.values())} cases)" in page


# --- libraries that are missing, or not what they seem


def _fresh(code: str, **variables: str) -> str:
    own = os.environ | variables
    done = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip()


# Imports sokd with these places of NVRTC: `config` alone at first, then the package around it.
WITH_NVRTC = """
import importlib.util, sys, types, torch
package = types.ModuleType("sokd")
package.__path__ = importlib.util.find_spec("sokd").submodule_search_locations
sys.modules["sokd"] = package
from sokd.ops import config
config.nvrtc_names = lambda release: {names!r}
del sys.modules["sokd"]
import sokd
print(sorted(sokd.ops.runtime.KERNELS), config.why_no_cuda())
"""


def test_without_a_driver_the_reference_serves(tmp_path: Path) -> None:
    """The machine's own is hidden behind something that is none."""
    for name in ("libcuda.so.1", "libcuda.so"):
        (tmp_path / name).write_text("no library")
    code = "import sokd; sokd.warmup(); print(sorted(sokd.ops.runtime.KERNELS)); sokd.show_config()"
    kernels, *lines = _fresh(code, LD_LIBRARY_PATH=str(tmp_path)).splitlines()
    assert kernels == "['cpu']"
    # NVML, which PyTorch asks for the number, may be there all the same
    found = re.fullmatch(
        r"cuda +no kernels \((.*)\): the reference path serves; \d+ devices visible", lines[-1]
    )
    assert found is not None and found[1].startswith("no CUDA driver here: ")


def test_a_driver_that_lacks_a_function_is_no_driver(tmp_path: Path) -> None:
    """Too old, or something else by that name."""
    source = tmp_path / "driver.cpp"
    source.write_text('extern "C" int cuInit(unsigned flags) { return (int)flags; }\n')
    library(source, tmp_path / "libcuda.so.1")
    code = "import sokd; print(sokd.ops.config.why_no_cuda(), sorted(sokd.ops.runtime.KERNELS)); sokd.warmup()"
    printed = _fresh(code, LD_LIBRARY_PATH=str(tmp_path))
    assert printed == "the CUDA driver lacks cuDriverGetVersion ['cpu']"


def test_without_nvrtc_the_reference_serves(mock: dict[str, str]) -> None:
    printed = _fresh(
        WITH_NVRTC.format(names=["libnvrtc.so.nowhere", "/nowhere/libnvrtc.so"]), **mock
    )
    assert printed.startswith(
        "['cpu'] no NVRTC here: libnvrtc.so.nowhere: cannot open shared object file"
    )


def test_a_kernel_that_does_not_compile_shows_the_log(mock: dict[str, str], tmp_path: Path) -> None:
    library(HERE / "nvrtc.cpp", tmp_path / "nvrtc.so")
    code = (
        WITH_NVRTC.format(names=[str(tmp_path / "nvrtc.so")])
        + "import work; sokd._core.select_reader('portable'); print(work.error_of(work.draw))"
    )
    paths = f"{HERE}:{HERE.parent}"
    _, *text = _fresh(code, **mock, PYTHONPATH=paths).splitlines()
    assert text == [
        "draw: NVRTC 13.7 could not compile draw.cu for sm_90: NVRTC_ERROR_COMPILATION",
        'draw.cu(24): error: identifier "philox" is undefined',
    ]


def test_nvrtc_is_looked_for_in_torch_first_and_then_in_the_wheels() -> None:
    for release in ("12.8", str(torch.version.cuda)):
        first, *paths = config.nvrtc_names(release)
        assert first == f"libnvrtc.so.{release.split('.')[0]}"
        assert all(Path(path).is_file() for path in paths)
        assert not any("builtins" in Path(path).name or ".alt." in path for path in paths)


def test_other_vendors_keep_the_reference_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """ROCm's tensors are on "cuda", too."""
    monkeypatch.setattr(torch.version, "cuda", None)
    config.why_no_cuda.cache_clear()
    try:
        assert config.why_no_cuda() == "this torch is not built for CUDA"
        assert (
            "no kernels (this torch is not built for CUDA): the reference path serves"
            in config.describe()
        )
    finally:
        config.why_no_cuda.cache_clear()
