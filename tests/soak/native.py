"""The Rust core under more cases, under valgrind, and its threads under stress."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import sokd

ROOT = Path(__file__).parents[2]
CHEAP = {"draw": 20}  # how many more cases of an operator run in the same time
RELEASE = ("--release", "--features", "cuda")


def property_tests(cases: int) -> dict[str, Any]:
    """Every operator against its naive loops, with so many random cases for each property.

    Shapes, strides (negative and overlapping ones too), offsets, dtypes, special values. Every
    tensor lies between pages that fault, and no byte around an output may change.
    """
    binary, report, wrong = test_binary(*RELEASE), dict[str, Any](), list[str]()
    for operator, test in properties():
        count = cases * CHEAP.get(operator, 1)
        environment = {**os.environ, "SOKD_PROPTEST_CASES": str(count)}
        begun, command = os.times(), [binary, f"ops::{operator}::naive::{test}", "--exact"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        seconds = os.times().children_user - begun.children_user
        own = report.setdefault(operator, {"properties": 0, "cases": 0, "CPU seconds": 0.0})
        own["properties"] += 1
        own["cases"] += count
        own["CPU seconds"] = round(own["CPU seconds"] + seconds, 1)
        if done.returncode or "1 passed" not in done.stdout:
            wrong.append(f"{operator}, {test}: {done.stdout[-500:]}")
    return {**report, "wrong": wrong}


def properties() -> list[tuple[str, str]]:
    """The operators' property tests, which take arguments, by operator and name."""
    return [
        (path.parent.name, test)
        for path in sorted((ROOT / "src" / "ops").glob("*/*.rs"))
        for test in re.findall(r"#\[test\]\s+fn (\w+)\((?!\))", path.read_text())
    ]


def test_binary(*options: str, **variables: str) -> str:
    """The compiled `cargo test` program."""
    command = ["cargo", "test", *options, "--lib", "--no-run", "--message-format=json"]
    built = subprocess.run(
        command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=True
    )
    messages = [json.loads(line) for line in built.stdout.splitlines()]
    return next(m["executable"] for m in messages if m.get("executable") and m["profile"]["test"])


def memcheck(level: str) -> dict[str, Any]:
    """The Rust tests under valgrind at one SIMD level."""
    command = ["valgrind", "--error-exitcode=9", "--quiet", test_binary(*RELEASE)]
    return _checked(command, SOKD_SIMD=level)


def sanitized(kind: str, level: str) -> dict[str, Any]:
    """The Rust tests compiled with a sanitizer ("address" or "thread").

    Of the nightly compiler; RUSTC_BOOTSTRAP lets the stable one compile it too.
    """
    host = re.search(r"host: (\S+)", subprocess.check_output(["rustc", "-vV"], text=True))
    assert host is not None
    binary = test_binary(
        "--target", host[1], RUSTC_BOOTSTRAP="1", CARGO_TARGET_DIR=str(ROOT / "target" / kind),
        RUSTFLAGS=f"-Zsanitizer={kind} -Cunsafe-allow-abi-mismatch=sanitizer",
    )  # fmt: skip
    known = Path(__file__).with_name("thread.supp")
    return _checked([binary], SOKD_SIMD=level, TSAN_OPTIONS=f"suppressions={known} exitcode=9")


def _checked(command: list[str], **variables: str) -> dict[str, Any]:
    """A program of tests under a checker; few cases of each property, for it is slow."""
    environment = {**os.environ, "SOKD_PROPTEST_CASES": "8", **variables}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    passed = re.search(r"(\d+) passed", done.stdout)
    report = {"tests": int(passed[1]) if passed else 0, "ok": done.returncode == 0}
    return report if report["ok"] else {**report, "output": done.stderr[-1000:]}


def thread_bits(rounds: int) -> dict[str, Any]:
    """The same bits from 1 to 16 threads, changed between calls, beside torch's own use."""
    torch.manual_seed(0)
    features = torch.randn(8, 33, 17, 19)
    theta = torch.tensor([[[0.9, 0.1, 0.05], [-0.1, 1.1, 0.0]]])
    arguments: dict[str, Any] = {"sigma": torch.tensor([0.1]), "seed": 7}
    torch.set_num_threads(1)
    expected = sokd.ops.refine(features, theta, **arguments)
    different = 0
    for index in range(rounds):
        torch.set_num_threads(1 + index % 16)
        torch.mm(torch.randn(64, 64), torch.randn(64, 64))  # the hand-over of OpenMP's threads
        different += not torch.equal(sokd.ops.refine(features, theta, **arguments), expected)
    return {"rounds": rounds, "different": different}
