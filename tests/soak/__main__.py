"""A long soak: `make soak` takes minutes, `make soak SOAK="--scale 100"` hours.

Writes docs/reliability.md from what it ran. The counts of all runs add up on the page until one
finds something; of the memory over steps the longest run is kept. The exit status is 1 where
anything was found.
"""

import argparse
import contextlib
import fcntl
import json
import os
import platform
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import sokd
from soak import faults, leaks, native, programs

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
RECORD = ROOT / "docs" / "results" / "reliability.json"
ABOUT = """# Reliability

The parts of `make soak` and their findings. The command writes this page; it takes minutes,
and a run of hours is

```bash
make soak SOAK="--scale 100"    # a hundred times as much
make soak SOAK="--only memcheck"   # the parts with this text in their names; the others stay
```

The counts of all runs add up here, of random cases that differ from run to run, until a run finds
something; of the memory the longest run is shown. Ctrl-C ends the random programs, or the steps of
one loop, and the part reports what it did. The exit status is 1 where a part found anything.

"""
PROGRAMS = "random programs of the public API"
MEMORY = "memory over steps"
PARTS = """
What each part does:

- **random programs**: twelve calls in a row of the public API on random small models (make,
  train, evaluate, save and load, copy, cast, freeze, replace a part, search, export, compile in
  one program of 200). Each call works, with finite losses and the right parameters moving, or
  raises an error of sokd (`refused`).
- **memory**: the slope of the resident memory over the steps of one process after a tenth of
  them, by least squares; 10 bytes a step or more, if they make a megabyte, count as found.
- **property tests**: every operator against its loops in float64, on random shapes, dtypes,
  strides (0, negative and overlapping too), offsets and special values. Every tensor lies between
  pages that fault, and no byte around an output may change.
- **memcheck, address and thread sanitizer**: the Rust tests under valgrind, which does not support
  AVX-512, and compiled with the sanitizers. Valgrind's helgrind and DRD report every lock of
  Rust's standard library, so the thread sanitizer looks for data races; `tests/soak/thread.supp`
  lists what it cannot detect.
- **bits**: one operator's result while the number of OpenMP threads changes from call to call,
  beside PyTorch's own use of them.
- **faults**: SIGINT in a step; a home and caches that cannot be written, and on a read-only disk;
  forked workers of a DataLoader; for the cache of compiled CUDA kernels (with a mock driver)
  SIGKILL at any time and in the middle of a write, a limit of file sizes, three processes at once,
  and where the user may mount them (root) a full and a read-only disk.

Not covered: GPUs, whose kernels the tests emulate on the CPU and `tests/cuda` runs where there is
one; other systems than Linux; several machines; models of full size; runs longer than the steps
above.
"""


def parts(scale: float, record: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """The parts by name. `record`: of earlier runs, whose random programs are not run again."""

    def times(base: int) -> int:
        return max(1, round(base * scale))

    done = counted(record, PROGRAMS).get("programs", 0)
    work: dict[str, Callable[[], Any]] = {
        PROGRAMS: lambda: programs.run(times(150), first_seed=done),
        **{f"{MEMORY}: {each}": lambda each=each: leaks.run(each, times(1000))
           for each in leaks.STEPS},
        "property tests against naive loops": lambda: native.property_tests(times(30_000)),
        "bits under changing threads": lambda: native.thread_bits(times(500)),
        "faults: SIGINT in a step": lambda: faults.interrupted(times(3)),
        "faults: unwritable home and cache": faults.unwritable_home,
        "faults: forked DataLoader workers": lambda: faults.forked(times(2)),
        "faults: the cache of compiled kernels": lambda: faults.kernel_cache(times(3)),
    }  # fmt: skip
    if shutil.which("valgrind"):
        for level in ("scalar", "avx2"):
            work[f"memcheck, {level}"] = lambda level=level: native.memcheck(level)
    simd = sokd._core.build_info()["simd"]
    work[f"address sanitizer, {simd}"] = lambda: native.sanitized("address", simd)
    work["thread sanitizer, scalar"] = lambda: native.sanitized("thread", "scalar")
    return work


def found(report: Any) -> list[str]:
    """The failures in a part's report."""
    named = [f"{key}: {report[key]}" for key in ("wrong", "different") if report.get(key)]
    not_ok = [json.dumps(report)] if report.get("ok") in (False, 0) else []
    return [*report.get("failures", []), *named, *not_ok]


def shown(value: Any) -> str:
    """A report in words: `rounds 3; actions: train 480, make 61`."""
    if not isinstance(value, dict):
        return str(value)
    joint = "; " if any(isinstance(each, dict) for each in value.values()) else ", "
    left_out = ("failures", "wrong", "different", "ok", "error")
    return joint.join(
        f"{name}{':' if isinstance(each, dict) else ''} {shown(each)}"
        for name, each in value.items()
        if name not in left_out
    )


def page(record: dict[str, Any]) -> str:
    """The page of a record of parts."""
    lines = ["| part | ran | found | seconds | at commit |", "|---|---|---|---|---|"]
    for name, part in record["parts"].items():
        ran, wrong = shown(part["report"]), "; ".join(part["found"]) or "nothing"
        cells = [name, ran, wrong, part["seconds"], part["commit"]]
        lines.append(f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |")
    versions = f"torch {record['torch']}, Python {record['python']}, SIMD {record['simd']}"
    return ABOUT + "\n".join(lines) + f"\n\nsokd {record['sokd']}, {versions}.\n" + PARTS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m soak", description=__doc__)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="how much of everything (default 1)"
    )
    parser.add_argument("--only", default="", help="parts whose name holds this text")
    parser.add_argument("--no-page", action="store_true", help="print only, leave docs/ as it is")
    options = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    names = parts(options.scale, read())
    chosen = {name: run for name, run in names.items() if options.only in name}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    wrong, progress = [], tqdm(chosen.items(), unit="part")
    for name, run in progress:
        progress.set_postfix_str(name)
        start = time.perf_counter()
        report = run()
        seconds = round(time.perf_counter() - start, 1)
        part = {"report": report, "found": found(report), "seconds": seconds, "commit": commit}
        wrong += part["found"]
        print(f"{name}: {json.dumps(part)}")
        if not options.no_page:
            write(name, part)
    return int(bool(wrong))


def read() -> dict[str, Any]:
    """The record of the parts that ran."""
    record: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {"parts": {}}
    return record


def counted(record: dict[str, Any], name: str) -> dict[str, Any]:
    """The report of a part that has found nothing so far; empty for others."""
    part = record["parts"].get(name, {"found": ["no run"]})
    return {} if part["found"] else part["report"]


def joined(name: str, old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Two runs of a part as one: their counts added, or the longer one of the memory."""
    if old["found"] or new["found"]:
        return new
    if name.startswith(MEMORY):
        return max(old, new, key=lambda part: int(part["report"]["steps"]))
    commit = new["commit"] if new["commit"] in old["commit"] else f"{old['commit']} {new['commit']}"
    seconds = round(old["seconds"] + new["seconds"], 1)
    return new | {
        "report": added(old["report"], new["report"]), "seconds": seconds, "commit": commit
    }  # fmt: skip


def added(old: Any, new: Any) -> Any:
    """Two reports as one, number by number; the newer of other values."""
    if isinstance(new, dict) and isinstance(old, dict):
        counts = {key for key in new if key in old and key != "properties"}
        return old | new | {key: added(old[key], new[key]) for key in counts}
    numbers = isinstance(new, (int, float)) and isinstance(old, (int, float))
    if not numbers or isinstance(new, bool):
        return new
    return round(old + new, 1) if isinstance(new, float) else old + new


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """One run at a time writes the record: parts may run side by side."""
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(RECORD.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def write(name: str, part: dict[str, Any]) -> None:
    """Adds a part to the record and writes the page: a run that is stopped has what it did."""
    with locked():
        record = read()
        record |= {
            "sokd": sokd.__version__, "torch": torch.__version__,
            "python": platform.python_version(), "simd": sokd._core.build_info()["simd"],
        }  # fmt: skip
        old = record["parts"].get(name)
        record["parts"][name] = part if old is None else joined(name, old, part)
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        PAGE.write_text(page(record))


if __name__ == "__main__":
    raise SystemExit(main())
