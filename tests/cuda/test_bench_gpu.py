"""`python -m benches.bench_gpu` on the CPU: what it counts and what it refuses."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytest import MonkeyPatch

import sokd
from benches import bench_gpu
from benches.harness import Case

CPU = ["--device", "cpu", "--quick"]
MAP = torch.Size(bench_gpu.TINY).numel() * 4
CELLS = bench_gpu.TINY[0] * bench_gpu.TINY[2] * bench_gpu.TINY[3]
# docs/gpu.md's floors: maps read and written, in bytes; the weight; the coverage
MOVED = {
    "refine forward, nothing resampled": 2 * MAP,
    "refine forward, affine only": 2 * MAP,
    "refine forward, five parts": 2 * MAP,
    "refine backward, theta and sigma": 2 * MAP,
    "refine backward, features": 2 * MAP,
    "refine_dots, 4 plans": 2 * MAP,
    "masked_mse, loss and gradient": 3 * MAP + 4 * CELLS,
    "masked_mse, forward + backward": 3 * MAP + 4 * CELLS,
    "areas, k = 8": 100 * CELLS * 4 + 4 * CELLS,
}


@pytest.fixture(autouse=True)
def _one_dtype_in_a_folder(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a quick run writes below the current folder
    monkeypatch.setattr(bench_gpu, "DTYPES", (torch.float32,))


def written(tmp_path: Path) -> list[dict[str, str]]:
    with (tmp_path / "out" / "bench" / "gpu-cpu.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_work_has_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_gpu.main(CPU) == 0
    rows = written(tmp_path)
    actual = [row for row in rows if row["side"] == "sokd"]
    assert {(row["work"], row["layout"]) for row in actual} == {
        (work, layout) for work in MOVED for layout in ("contiguous", "channels_last")
    }
    for row in rows:
        assert not row["ratio"].startswith("failed"), row
        assert int(row["bytes_moved"]) == MOVED[row["work"]], row["work"]
        copy = float(row["copy_gb_per_s"])
        share, rounding = float(row["gb_per_s"]) / copy, 0.1 / copy  # of two and one decimals
        assert float(row["share_of_copy"]) == pytest.approx(share, abs=1e-3 + rounding)
        assert row["device"] == "cpu" and row["torch"] == torch.__version__ and row["commit"]
    assert {row["side"] for row in rows} == {"sokd", "eager"}
    assert capsys.readouterr().out.count("| refine forward, five parts |") == 4


def test_a_wrong_answer_is_not_timed(
    tmp_path: Path, monkeypatch: MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = sokd.ops.areas

    def wrong(*heads: Any, **options: Any) -> Any:
        found = right(*heads, **options)
        return found._replace(coverage=found.coverage + 1)

    monkeypatch.setattr(sokd.ops, "areas", wrong)
    assert bench_gpu.main(CPU) == 1
    failed = [row for row in written(tmp_path) if row["ratio"].startswith("failed")]
    assert {row["work"] for row in failed} == {"areas, k = 8"} and len(failed) == 2
    assert all(row["ratio"] == "failed: AssertionError" and not row["median_ms"] for row in failed)
    assert "bench_gpu: areas, k = 8" in capsys.readouterr().err


def test_a_case_too_large_is_left_out(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    def large(*heads: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(sokd.ops, "areas", large)
    assert bench_gpu.main(CPU) == 0
    assert [row["ratio"] for row in written(tmp_path) if row["work"] == "areas, k = 8"] == [
        "left out: out of memory"
    ] * len(bench_gpu.DTYPES) * len(bench_gpu.LAYOUTS)


@pytest.mark.parametrize(("work", "channels", "dtype", "rate", "goal"), [
    ("refine forward, five parts", 256, "float32", "900.00", ">= 0.85 met"),
    ("refine forward, five parts", 256, "float16", "849.00", ">= 0.85 MISSED"),
    ("refine forward, five parts", 1, "float32", "900.00", None),  # a cache holds the map
    ("refine_dots, 4 plans", 256, "float32", "900.00", None),
    ("masked_mse, forward + backward", 256, "bfloat16", "900.00", ">= 0.85 met"),
    ("masked_mse, forward + backward", 256, "float16", "900.00", None),
])  # fmt: skip
def test_the_goal_is_for_large_maps(
    work: str, channels: int, dtype: str, rate: str, goal: str | None
) -> None:
    case = Case(work, (64, channels, 56, 56), {}, dtype=dtype)
    rows = [
        {"side": "sokd", "gb_per_s": rate},
        {"side": "eager", "gb_per_s": rate},
        {"side": "compile"},
    ]
    actual, eager, failed = bench_gpu.with_share(rows, case, 1000.0)
    assert actual["share_of_copy"] == f"{float(rate) / 1000:.3f}" and actual.get("goal") == goal
    assert "goal" not in eager and "share_of_copy" not in failed


def test_the_device_is_busy_for_as_long_as_python_launches(monkeypatch: MonkeyPatch) -> None:
    """Otherwise the events would measure Python's time; the first call measures it."""
    slept: list[int] = []
    event = SimpleNamespace(
        record=lambda: None, synchronize=lambda: None, elapsed_time=lambda other: 1.5
    )
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(bench_gpu, "FLUSHED", 8)
    host = iter([5.0, 8.0, 4.0, 4.0])
    monkeypatch.setattr(bench_gpu, "timed", lambda side: next(host))
    clock = bench_gpu.cuda_clock(torch.device("cpu"))

    def side() -> None: ...

    assert [clock(side) for _ in range(4)] == [1.5] * 4
    assert slept == [bench_gpu.AHEAD * milliseconds for milliseconds in (1, 6, 6, 5)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_gpu.main([]) == 1
    printed = capsys.readouterr()
    assert printed.err == f"bench_gpu: no CUDA device that torch {torch.__version__} can use\n"
    assert not printed.out and not list(tmp_path.iterdir())


def test_another_device_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_gpu.main(["--device", "mps"]) == 1
    assert capsys.readouterr().err == "bench_gpu: device must be cuda or cpu, got mps\n"
