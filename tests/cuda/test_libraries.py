"""CUDA libraries that are missing or broken."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.cuda.emulator import ROOT, SOURCES
from support.cuda.mock import environment, library

from sokd import _core
from sokd.ops import config

pytestmark = [
    pytest.mark.skipif(not _core.build_info()["cuda"], reason="this build has no CUDA kernels"),
    pytest.mark.skipif(torch.version.cuda is None, reason="this torch is not built for CUDA"),
    pytest.mark.skipif(sys.platform != "linux", reason="the mock driver is a libcuda.so.1"),
]


@pytest.fixture(scope="module")
def mock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return environment(tmp_path_factory.mktemp("driver"))


def _fresh(code: str, **variables: str) -> str:
    """The output of the code in a new process."""
    paths = [str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = os.environ | {"PYTHONPATH": ":".join(paths)} | variables
    done = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip()


def with_nvrtc(*names: str) -> str:
    """Code that imports sokd with these places of NVRTC, and prints what it has found."""
    return f"""
from support.cuda import nvrtc_names
nvrtc_names.replace({list(names)!r})
import sokd
print(sorted(sokd.ops.runtime.KERNELS), sokd.ops.config.why_no_cuda())
"""


def test_without_a_driver_the_reference_serves(tmp_path: Path) -> None:
    """A file that is not a library hides the machine's driver."""
    for name in ("libcuda.so.1", "libcuda.so"):
        (tmp_path / name).write_text("no library")
    code = "import sokd; sokd.warmup(); print(sorted(sokd.ops.runtime.KERNELS)); sokd.show_config()"
    kernels, *lines = _fresh(code, LD_LIBRARY_PATH=str(tmp_path)).splitlines()
    assert kernels == "['cpu']"
    # PyTorch takes the number of devices from NVML, which may be there all the same
    found = re.fullmatch(
        r"cuda +no kernels \((.*)\); the reference path is used; \d+ devices visible", lines[-1]
    )
    assert found is not None and found[1].startswith("no CUDA driver here: ")


def test_a_driver_that_lacks_a_function_is_no_driver(tmp_path: Path) -> None:
    """The library is too old, or another one of that name."""
    source = tmp_path / "driver.cpp"
    source.write_text('extern "C" int cuInit(unsigned flags) { return (int)flags; }\n')
    library(source, tmp_path / "libcuda.so.1")
    code = "import sokd; from sokd.ops import config, runtime; sokd.warmup(); "
    code += "print(config.why_no_cuda(), sorted(runtime.KERNELS))"
    printed = _fresh(code, LD_LIBRARY_PATH=str(tmp_path))
    assert printed == "the CUDA driver lacks cuDriverGetVersion ['cpu']"


def test_without_nvrtc_the_reference_serves(mock: dict[str, str]) -> None:
    printed = _fresh(with_nvrtc("libnvrtc.so.nowhere", "/nowhere/libnvrtc.so"), **mock)
    missing = "libnvrtc.so.nowhere: cannot open shared object file"
    assert printed.startswith(f"['cpu'] no NVRTC here: {missing}")


def test_a_kernel_that_does_not_compile_shows_the_log(mock: dict[str, str], tmp_path: Path) -> None:
    library(SOURCES / "nvrtc.cpp", tmp_path / "nvrtc.so", "-DFAILS")
    code = (
        with_nvrtc(str(tmp_path / "nvrtc.so"))
        + "from support.cuda import calls; sokd._core.select_reader('portable')\n"
        + "print(calls.error_of(calls.draw))"
    )
    _, *text = _fresh(code, **mock).splitlines()
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
    """The tensors of ROCm are on "cuda", too."""
    monkeypatch.setattr(torch.version, "cuda", None)
    config.why_no_cuda.cache_clear()
    try:
        assert config.why_no_cuda() == "this torch is not built for CUDA"
        assert (
            "no kernels (this torch is not built for CUDA); the reference path is used"
            in config.describe()
        )
    finally:
        config.why_no_cuda.cache_clear()
