"""Around a run: interrupts, an unwritable home, forked workers, a broken kernel cache."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from soak.mounts import READ_ONLY, mounted

STEPS = """
import torch, sokd
kd = sokd.SoKD(4, 6)
f_s, f_t = torch.randn(2, 4, 4, 4, requires_grad=True), torch.randn(2, 6, 4, 4)
print("ready", flush=True)
for _ in range({steps}):
    sokd.loss(f_s, f_t, kd).backward()
print("done", flush=True)
"""


def _start(steps: int, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", STEPS.format(steps=steps)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip


def interrupted(rounds: int) -> dict[str, Any]:
    """SIGINT in the middle of steps ends in KeyboardInterrupt, never in a crash; the next run
    works."""
    wrong = []
    for index in range(rounds):
        process = _start(10**9)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.05 + 0.01 * (index % 7))
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        if process.returncode != -signal.SIGINT and "KeyboardInterrupt" not in error:
            wrong.append(f"{process.returncode}: {error[-200:]}")
    if not _start(3).communicate()[0].endswith("done\n"):
        wrong.append("the next run failed")
    return {"rounds": rounds, "wrong": wrong}


def unwritable_home() -> dict[str, Any]:
    """Home and caches that cannot be written to: the run works."""
    outputs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        blocked = folder / "file"
        blocked.write_text("not a folder")
        outputs.append(_at_home(blocked))
        with mounted(folder / "home", READ_ONLY) as done:
            if done:
                outputs.append(_at_home(folder / "home"))
    wrong = [error[-300:] for out, error in outputs if not out.endswith("done\n")]
    return {"runs": len(outputs), "wrong": wrong}


def _at_home(home: Path) -> tuple[str, str]:
    """A few steps with this home; what they print, and their errors."""
    names = ("HOME", "XDG_CACHE_HOME", "SOKD_CACHE_DIR")
    out, error = _start(3, **dict.fromkeys(names, str(home))).communicate(timeout=300)
    return out, error


def forked(rounds: int) -> dict[str, Any]:
    """DataLoader workers that call operators, after the parent used its threads."""
    code = """
import torch, sokd
from torch.utils.data import DataLoader, Dataset
class Refined(Dataset):
    def __len__(self): return 16
    def __getitem__(self, i):
        return sokd.ops.refine(torch.randn(1, 4, 8, 8), sigma=torch.ones(1), seed=i)
sokd.ops.refine(torch.randn(8, 64, 16, 16), sigma=torch.ones(1))
print(sum(len(b) for b in DataLoader(Refined(), 4, num_workers=2)))
"""
    outputs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
        for _ in range(rounds)
    ]
    return {"rounds": rounds, "ok": sum(done.stdout == "16\n" for done in outputs)}


def kernel_cache(rounds: int) -> dict[str, Any]:
    """The cache of compiled CUDA kernels: kill -9, a full and a read-only disk, three processes
    at once.

    With the mock driver of the tests; needs a PyTorch built for CUDA, whose NVRTC compiles.
    """
    import torch
    from support.cuda.emulator import SOURCES, build
    from support.cuda.mock import library

    from sokd import _core

    if not _core.build_info()["cuda"] or torch.version.cuda is None:
        return {"ran": "nothing: this build or this PyTorch has no CUDA"}
    with tempfile.TemporaryDirectory() as folder:
        library(SOURCES / "driver.cpp", Path(folder) / "libcuda.so.1")
        paths = [folder, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        environment = {
            "LD_LIBRARY_PATH": ":".join(paths),
            "SOKD_MOCK_EMULATORS": str(build("draw")),
            "SOKD_CACHE_DIR": f"{folder}/cache",
        }
        command = [sys.executable, "-m", "soak.cache", str(rounds)]
        done = subprocess.run(
            command, env=os.environ | environment, capture_output=True, text=True, timeout=7200
        )
    if done.returncode:
        return {"rounds": rounds, "wrong": [done.stderr[-500:]]}
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report
