"""Compiles the CUDA kernels for the CPU (see tests/support/emulator/emulator.h)."""

import atexit
import ctypes
import functools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[3]
SOURCES = ROOT / "tests/support/emulator"
OPERATORS = ("refine", "areas", "masked_mse", "draw")
COMPILER = os.environ.get("CXX", "g++")
LIBRARY = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared")
_QUIET = "unknown-pragmas unused-function unused-variable maybe-uninitialized uninitialized"
FLAGS = (
    *("-x", "c++", *LIBRARY, *(f"-Wno-{warning}" for warning in _QUIET.split())),
    *("-march=native", "-ffp-contract=off", "-fno-strict-aliasing"),
)


def compiled(*arguments: str | Path) -> None:
    """Runs the C++ compiler."""
    done = subprocess.run([COMPILER, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]


@functools.cache
def _folder() -> Path:
    folder = tempfile.mkdtemp(prefix="sokd-emulator-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def build(
    operator: str, *, change: tuple[str, str, str] | None = None, flags: tuple[str, ...] = ()
) -> Path:
    """A shared library of an operator's kernels; an object file if `flags` have -c.

    `change`: a file, a text that occurs in it once (whitespace aside), and its replacement.
    """
    work = Path(tempfile.mkdtemp(dir=_folder()))
    operator_files = (ROOT / "src/ops" / operator).glob("*.cu*")
    for path in (*(ROOT / "src/cuda").glob("*.cuh"), *operator_files):
        shutil.copy(path, work)
    if change is not None:
        name, text, other = change
        pattern = r"\s*".join(map(re.escape, "".join(text.split())))
        changed, count = re.subn(pattern, lambda _: other, (work / name).read_text())
        assert count == 1, f"{name} contains {count} times {text!r}"
        (work / name).write_text(changed)
    target = work / f"{operator}.so"
    emulator = SOURCES / "emulator.h"
    compiled(*FLAGS, *flags, "-include", emulator, work / "kernel.cu", "-o", target)
    return target


@functools.cache
def traced(operator: str) -> Path:
    """A library of the operator's kernels in float32 and bfloat16 that counts their accesses."""
    flags = ("-fsanitize=thread", "-fno-threadsafe-statics", "-DSOKD_DTYPES=5", "-c")
    kernels = build(operator, flags=flags)
    target = kernels.with_suffix(".traced.so")
    compiled(
        "-std=c++17", "-O1", "-fPIC", "-shared", kernels, SOURCES / "traffic.cpp", "-o", target
    )
    return target


def kernel_names(operator: str) -> list[str]:
    """The kernels of an operator's library."""
    library = ctypes.CDLL(str(build(operator)))
    library.sokd_emulator_name.restype = ctypes.c_char_p
    return [library.sokd_emulator_name(i).decode() for i in range(library.sokd_emulator_count())]
