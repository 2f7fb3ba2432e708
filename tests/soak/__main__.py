"""A long soak: `make soak` takes minutes, `make soak SOAK="--scale 100"` hours. Writes
docs/reliability.md.

Each part reports what it ran and what it found; the exit status is 1 where anything was found.
"""

import argparse
import json
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import sokd
from soak import faults, leaks, native, programs

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
RECORD = ROOT / "docs" / "results" / "reliability.json"


def parts(scale: float) -> dict[str, Callable[[], Any]]:
    def times(base: int) -> int:
        return max(1, round(base * scale))

    work: dict[str, Callable[[], Any]] = {
        "random programs of the public API": lambda: programs.run(times(100)),
        "memory over steps": lambda: leaks.run(times(1000)),
        "property tests against naive loops": lambda: native.property_tests(times(10_000)),
        "bits under changing threads": lambda: native.thread_bits(times(2000)),
        "SIGINT in a step": lambda: faults.interrupted(times(3)),
        "unwritable home and cache": faults.unwritable_home,
        "forked DataLoader workers": lambda: faults.forked(times(2)),
    }
    if shutil.which("valgrind"):
        for level in ("scalar", "avx2"):
            work[f"memcheck, {level}"] = lambda level=level: native.valgrind(
                "memcheck", level, "ops::"
            )
        work["helgrind, pool"] = lambda: native.valgrind("helgrind", "scalar", "parallel")
    return work


def found(report: Any) -> list[str]:
    """What a part's report says went wrong."""
    if "failures" in report:
        return list(report["failures"])
    wrong = [
        f"{key}: {value}"
        for key, value in report.items()
        if key in ("wrong", "different") and value
    ]
    if report.get("ok") in (False, 0):
        wrong.append(json.dumps(report))
    slopes = (value for value in report.values() if isinstance(value, dict))
    return wrong + [
        f"{value['bytes_a_step']} bytes a step"
        for value in slopes
        if value.get("bytes_a_step", 0) >= 10
    ]


def page(record: dict[str, Any]) -> str:
    lines = [
        "# Reliability", "",
        "What `make soak` ran and found; the command writes this page. `make soak SOAK=\"--scale "
        "100\"` runs",
        "a hundred times as much.", "",
        f"sokd {record['sokd']} at commit {record['commit']}, torch {record['torch']}, Python "
        f"{record['python']}, SIMD {record['simd']}, scale {record['scale']:g}.", "",
        "| part | ran | found | seconds |", "|---|---|---|---|",
    ]  # fmt: skip
    for name, part in record["parts"].items():
        ran = json.dumps(
            {k: v for k, v in part["report"].items() if k not in ("failures", "wrong")}
        )
        wrong = "; ".join(part["found"]) or "nothing"
        lines.append(f"| {name} | {ran.replace('|', '/')} | {wrong} | {part['seconds']} |")
    return "\n".join(lines) + "\n"


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
    )
    record: dict[str, Any] = {
        "sokd": sokd.__version__, "commit": commit.stdout.strip(), "torch": torch.__version__,
        "python": platform.python_version(), "simd": sokd._core.build_info()["simd"],
        "scale": options.scale, "parts": {},
    }  # fmt: skip
    chosen = {name: run for name, run in parts(options.scale).items() if options.only in name}
    progress = tqdm(chosen.items(), unit="part")
    for name, run in progress:
        progress.set_postfix_str(name)
        start = time.perf_counter()
        report = run()
        seconds = round(time.perf_counter() - start, 1)
        record["parts"][name] = {"report": report, "found": found(report), "seconds": seconds}
        print(f"{name}: {json.dumps(report)[:400]} ({seconds} s)")
    if not options.no_page:
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        PAGE.write_text(page(record))
    return int(any(part["found"] for part in record["parts"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
