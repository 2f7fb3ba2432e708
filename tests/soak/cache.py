"""The cache of compiled kernels under kill, a limit of file sizes, and several processes at once.

`soak.faults.kernel_cache` runs this module with the mock driver. Each run of the operator happens
in a fork, which has loaded nothing yet.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from support.cuda.calls import counts, draw
from support.cuda.mock import fresh, start

from soak.mounts import FULL, READ_ONLY, mounted
from sokd import _core

SMALL = 512  # bytes: less than any compiled kernel


def compiled_and_cached() -> tuple[int, int]:
    """Runs the operator, checks its numbers; how many kernels were compiled and how many cached."""
    draw()
    return counts()


def limited() -> tuple[int, int]:
    """The same where no file may become larger than a few bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, SMALL))
    return compiled_and_cached()


def killed_in_a_write() -> None:
    """The same, but the write ends the process: what it had written stays."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limited()


def killed(work: Any, after: float, with_signal: int) -> bool:
    """Runs `work` in a fork and kills it; whether the signal ended it."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    if after:
        time.sleep(after)
        os.kill(child, with_signal)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


class Cache:
    """A folder of kernels, and what was wrong with it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.wrong = folder, list[str]()

    def files(self) -> list[str]:
        return sorted(os.listdir(self.folder)) if self.folder.is_dir() else []

    def empty(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def check(self, what: str, holds: bool) -> None:
        if not holds:
            self.wrong.append(f"{what}: {self.files()}")

    def serves(self, after: str) -> None:
        """The next run works, and the one after it finds the kernel on disk."""
        self.check(f"the run after {after}", sum(fresh(compiled_and_cached)) == 1)
        self.check(f"the second run after {after}", fresh(compiled_and_cached) == (0, 1))


def run(rounds: int, folder: Path) -> dict[str, Any]:
    cache, rng = Cache(folder), random.Random(0)
    began = time.perf_counter()
    fresh(compiled_and_cached)
    usual, ended, mounts = time.perf_counter() - began, 0, 0
    for _ in range(rounds):
        cache.empty()
        ended += killed(compiled_and_cached, rng.uniform(0.1, 1.1) * usual, signal.SIGKILL)
        cache.serves("SIGKILL")
        cache.empty()
        cache.check("the kill in a write", killed(killed_in_a_write, 0, 0) and bool(cache.files()))
        cache.serves("the kill in a write")
        cache.empty()
        cache.check("a limit of file sizes", fresh(limited) == (1, 0) and not cache.files())
        cache.serves("a limit of file sizes")
        for kind, options in (("a full disk", FULL), ("a read-only disk", READ_ONLY)):
            cache.empty()
            with mounted(folder, options) as done:
                mounts += done
                kept = fresh(compiled_and_cached) == (1, 0) and not cache.files()
                cache.check(kind, kept or not done)
            cache.serves(kind)
        cache.empty()
        at_once = [start(compiled_and_cached) for _ in range(3)]
        cache.check("three at once", all(sum(each()) == 1 for each in at_once))
        cache.check("after three at once", len(cache.files()) == 1)
    return {
        "rounds": rounds, "ended by SIGKILL": ended, "mounted disks": mounts, "wrong": cache.wrong,
    }  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)  # threads do not survive a fork
    _core.select_reader("portable")  # reads fakes of CUDA tensors
    print(json.dumps(run(int(sys.argv[1]), Path(os.environ["SOKD_CACHE_DIR"]))))
