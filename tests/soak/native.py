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


def property_tests(cases: int) -> dict[str, Any]:
    """Every operator against its naive loops, with so many random cases for each property.

    Shapes, strides, offsets, dtypes, special values; no byte around an output may change.
    """
    environment = {**os.environ, "SOKD_PROPTEST_CASES": str(cases)}
    command = ["cargo", "test", "--release", "--features", "cuda", "--lib", "naive"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    passed = re.search(r"(\d+) passed; (\d+) failed", done.stdout)
    counts = passed.groups() if passed else ("0", "build failed")
    return {"cases": cases, "passed": counts[0], "failed": counts[1], "ok": done.returncode == 0}


def test_binary() -> str:
    """The compiled `cargo test` program."""
    command = ["cargo", "test", "--features", "cuda", "--lib", "--no-run", "--message-format=json"]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    messages = [json.loads(line) for line in built.stdout.splitlines()]
    return next(m["executable"] for m in messages if m.get("executable") and m["profile"]["test"])


def valgrind(tool: str, level: str, pattern: str) -> dict[str, Any]:
    """Run the Rust tests that match `pattern` under a valgrind tool at one SIMD level."""
    command = ["valgrind", f"--tool={tool}", "--error-exitcode=9", "--quiet"]
    command += [test_binary(), pattern]
    # few cases: valgrind is fifty times slower
    environment = {**os.environ, "SOKD_SIMD": level, "SOKD_PROPTEST_CASES": "8"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    errors = len(re.findall(r"^==\d+== \S", done.stderr, re.MULTILINE))
    report = {"tool": tool, "level": level, "pattern": pattern, "ok": done.returncode == 0}
    return report if not errors else {**report, "first lines": done.stderr[:500]}


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
