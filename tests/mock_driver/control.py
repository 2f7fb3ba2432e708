"""Builds the mock driver with the emulated kernels, and speaks to it."""

from __future__ import annotations

import ctypes
import os
import pickle
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from emulated import COMPILER, build

HERE = Path(__file__).parent
OPERATORS = ("refine", "areas", "masked_mse", "draw")
INVALID_VALUE, OUT_OF_MEMORY, INVALID_IMAGE = 1, 2, 200


def library(source: Path, target: Path) -> None:
    """Compiles a C++ file to a shared library of the target's name."""
    flags = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared")
    command = [COMPILER, *flags, f"-Wl,-soname,{target.name}", source, "-o", target, "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]


def environment(folder: Path) -> dict[str, str]:
    """A libcuda.so.1 in `folder`, and the variables under which a new process takes it for the driver."""
    library(HERE / "driver.cpp", folder / "libcuda.so.1")
    paths = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {
        "LD_LIBRARY_PATH": ":".join(paths),
        "SOKD_MOCK_EMULATORS": ":".join(str(build(operator)) for operator in OPERATORS),
        "SOKD_CACHE_DIR": str(folder / "cache"),
    }


class Driver:
    """The driver of this process."""

    def __init__(self) -> None:
        self.api = ctypes.CDLL("libcuda.so.1")
        self.api.mock_stream.restype = ctypes.c_void_p
        self.api.mock_call.restype = ctypes.c_char_p
        self.api.mock_argument_bytes.restype = ctypes.c_uint64

    def calls(self, function: str = "") -> list[str]:
        every = [self.api.mock_call(i).decode() for i in range(self.api.mock_calls())]
        return [call for call in every if call.startswith(function)]

    def launches(self) -> list[str]:
        """The kernels launched, by name."""
        return [call.split()[1] for call in self.calls("cuLaunchKernel")]

    def stream(self, device: int = 0) -> int:
        return int(self.api.mock_stream(device))

    def capture(
        self, stream: int, capturing: bool, *, mode: int = 0, blocking: bool = False
    ) -> None:
        """By this thread; mode 0 is global, as torch's, 1 is of this thread alone, 2 is relaxed."""
        self.api.mock_capture(ctypes.c_void_p(stream), capturing, mode, blocking)

    def spoilt(self, stream: int) -> bool:
        """Whether something that a capture forbids was tried."""
        return bool(self.api.mock_invalidated(ctypes.c_void_p(stream)))

    def fail_at(self, number: int, code: int) -> None:
        """The call after `number` others from now on fails; -1: none."""
        self.api.mock_fail_at(number, code)

    def fail_call(self, function: str, code: int) -> None:
        """Every call of this function fails."""
        self.api.mock_fail_call(function.encode(), code)


def start(work: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """Runs `work` in a child that shares nothing with other tests; the function waits for its result.

    The parent never initialises the driver, so its child may.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            try:
                answer = (True, work(*arguments))
            except BaseException:
                answer = (False, traceback.format_exc())
            with os.fdopen(write, "wb") as pipe:
                pickle.dump(answer, pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(write)

    def finish() -> Any:
        with os.fdopen(read, "rb") as pipe:
            said = pipe.read()
        _, status = os.waitpid(child, 0)
        assert status == 0 and said, f"the child ended with status {status}"
        well, result = pickle.loads(said)
        assert well, result
        return result

    return finish


def fresh(work: Callable[..., Any], *arguments: Any) -> Any:
    return start(work, *arguments)()
