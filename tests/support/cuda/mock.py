"""Builds the mock driver with the emulated kernels, and controls it."""

import ctypes
import functools
import os
import pickle
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from support.cuda.emulator import LIBRARY, OPERATORS, SOURCES, build, compiled

INVALID_VALUE, OUT_OF_MEMORY, INVALID_IMAGE = 1, 2, 200
SCHEDULES = {"ascending": 0, "descending": 1, "random": 2, "warps": 3}


def library(source: Path, target: Path, *flags: str) -> None:
    """Compiles a C++ file to a shared library of the target's name."""
    compiled(*LIBRARY, *flags, f"-Wl,-soname,{target.name}", source, "-o", target, "-ldl")


def environment(folder: Path) -> dict[str, str]:
    """Builds a libcuda.so.1 in `folder`; the variables with which a process opens it."""
    library(SOURCES / "driver.cpp", folder / "libcuda.so.1")
    paths = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    with ThreadPoolExecutor(2) as pool:
        kernels = list(pool.map(build, OPERATORS))
    return {
        "LD_LIBRARY_PATH": ":".join(paths),
        "SOKD_MOCK_EMULATORS": ":".join(map(str, kernels)),
        "SOKD_CACHE_DIR": str(folder / "cache"),
    }


class Traffic(NamedTuple):
    """The accesses of one launch to one allocation, in bytes, as traffic.cpp counts them."""

    kernel: str
    size: int
    read: int
    fetched: int
    distinct: int
    written: int
    kept: int


class Driver:
    """The driver of this process."""

    def __init__(self) -> None:
        self.api = ctypes.CDLL("libcuda.so.1")
        self.api.mock_stream.restype = ctypes.c_void_p
        self.api.mock_call.restype = ctypes.c_char_p
        self.api.mock_traffic_line.restype = ctypes.c_char_p
        self.api.mock_argument_bytes.restype = self.api.mock_allocate.restype = ctypes.c_uint64
        self.api.mock_allocate.argtypes = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int)

    def calls(self, function: str = "") -> list[str]:
        every = [self.api.mock_call(i).decode() for i in range(self.api.mock_calls())]
        return [call for call in every if call.startswith(function)]

    def functions(self, since: int = 0) -> list[str]:
        """The names of the functions called after `since` others."""
        return [call.split()[0] for call in self.calls()[since:]]

    def launches(self) -> list[str]:
        """The names of the launched kernels."""
        return [call.split()[1] for call in self.calls("cuLaunchKernel")]

    def use_library(self, path: Path | None) -> None:
        """Launches the kernels of this library where it has them; None: those of the source."""
        self.api.mock_use_library(None if path is None else str(path).encode())

    def schedule(self, name: str) -> None:
        """The order of threads and blocks."""
        self.api.mock_schedule(SCHEDULES[name])

    def blocks(self, count: int | None) -> None:
        """Replaces the number of blocks of every launch."""
        self.api.mock_blocks(count or 0)

    def traffic(self) -> list[Traffic]:
        """The accesses of the launches to each allocation, by a library with counters."""
        lines = [self.api.mock_traffic_line(i).decode() for i in range(self.api.mock_traffic())]
        return [Traffic(name, *map(int, rest)) for name, *rest in map(str.split, lines)]

    def stream(self, device: int = 0) -> int:
        return int(self.api.mock_stream(device))

    def capture(
        self, stream: int, capturing: bool, *, mode: int = 0, blocking: bool = False
    ) -> None:
        """Capture by this thread; mode 0 is global (torch's default), 1 thread-local, 2 relaxed."""
        self.api.mock_capture(ctypes.c_void_p(stream), capturing, mode, blocking)

    def is_invalidated(self, stream: int) -> bool:
        """Whether a call that the capture forbids was attempted."""
        return bool(self.api.mock_invalidated(ctypes.c_void_p(stream)))

    def fail_at(self, number: int, code: int) -> None:
        """The call after `number` others from now on fails; -1: none."""
        self.api.mock_fail_at(number, code)

    def fail_call(self, function: str, code: int) -> None:
        """Every call of this function fails."""
        self.api.mock_fail_call(function.encode(), code)


def start(work: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """Runs `work` in a fork, which shares no state with other tests; the result waits for it.

    This process never initialises the driver, so its forks can.
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
            answer = pipe.read()
        _, status = os.waitpid(child, 0)
        assert status == 0 and answer, f"the fork ended with status {status}"
        succeeded, result = pickle.loads(answer)
        assert succeeded, result
        return result

    return finish


def fresh(work: Callable[..., Any], *arguments: Any) -> Any:
    return start(work, *arguments)()


def forked(test: Callable[..., None]) -> Callable[..., None]:
    """Runs the whole test in a fork."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        fresh(functools.partial(test, **fixtures))

    return run
