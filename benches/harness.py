"""Shared by the benches: a case with its sides, interleaved timing, the table and the CSV.

All sides of a case are timed in one run in alternating order: a slow second of the machine affects
each of them. Medians are over the turns. A ratio is a side's median divided by that of sokd: above
1, sokd is faster. With a limit ("<=") as target it is the inverse, the cost of sokd relative to it.
"""

import csv
import gc
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

import sokd

THREADS = 2
# Each turn of a short case begins with an untimed call, so that no side pays for the caches and the
# spinning threads of the previous side. It does not matter to a training step of seconds.
UNTIMED_BELOW = 2000.0  # ms, all sides together
RESULTS = Path(__file__).parent / "results"
QUICK_RESULTS = Path("out") / "bench"
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
Side = Callable[[], object]
# The bytes of a case read and written by PyTorch's simplest operations, which compute nothing: code
# that moves these bytes can hardly be faster. Measured for the cases that have a target.
MEMORY = "memory alone"


@dataclass(frozen=True)
class Case:
    """One piece of work at one shape, done by several sides; the first is sokd."""

    work: str
    shape: Sequence[int]
    sides: Mapping[str, Side]
    moved: int = 0  # bytes: what the work must read and write at least; 0: not stated
    targets: dict[str, float] = field(default_factory=dict)  # side -> the ratio to reach
    check: Callable[[], None] = lambda: None  # raises when sokd's answer is wrong
    dtype: str = "float32"
    layout: str = "contiguous"
    limits: dict[str, float] = field(default_factory=dict)  # side -> highest cost relative to it
    # From the medians to the times that are compared, if these are not the whole times; see `note`.
    counted: Callable[[dict[str, float]], dict[str, float]] = lambda medians: medians
    note: str = ""
    fewest: int = 0  # turns, more if the sides differ by little; ignored in a quick run


def timed(side: Side) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    side()
    return (time.perf_counter() - start) * 1e3


@dataclass(frozen=True)
class Options:
    """The options of a bench run."""

    quick: bool = False
    clock: Callable[[Side], float] = timed  # milliseconds of one call

    @property
    def seconds(self) -> float:
        """Timed turns for a case, in all."""
        return 0.5 if self.quick else 2.5

    @property
    def turns(self) -> tuple[int, int]:
        """Fewest and most turns."""
        return (3, 20) if self.quick else (9, 200)

    @property
    def results(self) -> Path:
        """A quick run does not overwrite the results."""
        return QUICK_RESULTS if self.quick else RESULTS


def check_close(actual: Any, truth: Any, *, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    """Refuse to time a wrong answer."""
    torch.testing.assert_close(actual, truth, rtol=rtol, atol=atol, check_dtype=False)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` by torch.compile, for one shape, in one graph."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def warm_up(sides: Mapping[str, Side]) -> tuple[dict[str, Side], dict[str, str]]:
    """Run each side three times; the sides that work, and the errors of the others."""
    alive, failures = {}, {}
    for name, side in sides.items():
        try:
            for _ in range(3):
                side()
            alive[name] = side
        except Exception as error:
            if name == "sokd":
                raise
            failures[name] = f"failed: {type(error).__name__}"
    return alive, failures


def measure(sides: Mapping[str, Side], options: Options, least: int = 0) -> dict[str, list[float]]:
    """Milliseconds of every turn, by side; the order of the sides rotates from turn to turn."""
    names = list(sides)
    fewest, most = options.turns
    fewest = fewest if options.quick else max(fewest, least)
    turn_ms = sum(options.clock(side) for side in sides.values())
    turns = int(min(max(options.seconds * 1e3 / turn_ms, fewest), most))
    samples: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for turn in range(turns):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                if turn_ms < UNTIMED_BELOW:
                    sides[name]()
                samples[name].append(options.clock(sides[name]))
    finally:
        gc.enable()
    return samples


def run_case(case: Case, options: Options) -> list[dict[str, Any]]:
    """Check, warm up, measure; one row for each side."""
    case.check()
    sides, failures = warm_up(case.sides)
    samples = measure(sides, options, case.fewest)
    counted = case.counted({name: median(times) for name, times in samples.items()})
    rows = []
    for name in case.sides:
        row = case_columns(case) | {"side": name}
        if name in failures:
            row["ratio"] = failures[name]
        else:
            row |= _time_columns(samples[name], counted.get(name), counted["sokd"], case, name)
        rows.append(row)
    return rows


def case_columns(case: Case) -> dict[str, Any]:
    """The columns of a row that describe its case."""
    shape = "x".join(map(str, case.shape))
    return {
        "work": case.work, "shape": shape, "dtype": case.dtype, "layout": case.layout,
        "note": case.note,
    }  # fmt: skip


def _time_columns(
    times: list[float], counted: float | None, actual: float, case: Case, name: str
) -> dict[str, Any]:
    first, _, third = quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
    row: dict[str, Any] = {"median_ms": f"{median(times):.4f}", "turns": len(times)}
    row |= {"quarter_ms": f"{first:.4f}", "three_quarters_ms": f"{third:.4f}"}
    if case.moved:
        row |= {"bytes_moved": case.moved, "gb_per_s": f"{case.moved / median(times) / 1e6:.2f}"}
    if counted is not None:
        row["counted_ms"] = f"{counted:.4f}"
        if name != "sokd":
            row["ratio"] = f"{actual / counted if name in case.limits else counted / actual:.3f}"
    if name in case.targets:
        row["target"] = f">= {case.targets[name]:g}"
    if name in case.limits:
        row["target"] = f"<= {case.limits[name]:g}"
    return row


COLUMNS = (
    *("work", "shape", "dtype", "layout", "side"),
    *("median_ms", "quarter_ms", "three_quarters_ms", "turns", "counted_ms", "ratio", "target"),
    *("bytes_moved", "gb_per_s", "note", "cpu", "threads", "load", "torch", "sokd", "commit"),
)


def machine() -> dict[str, Any]:
    """The machine and the versions that the rows were measured with."""
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "load": f"{os.getloadavg()[0]:.1f}",  # of the last minute, these threads included
        "torch": torch.__version__,
        "sokd": sokd.__version__,
        "commit": _commit(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "../src", "../python", "../Cargo.toml")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "none"


def write(
    name: str, rows: Iterable[dict[str, Any]], options: Options, columns: Sequence[str] = COLUMNS
) -> Path:
    """Write results/<name>.csv."""
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"{name}.csv"
    where = machine()
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **where} for row in rows)
    return path


def show(rows: Sequence[dict[str, Any]], *further: str) -> None:
    """The rows as one Markdown table, with further columns; a target stands beside its ratio."""
    heads = ["work", "shape", "side", "median ms", "GB/s", "ratio", "target", *further]
    print("| " + " | ".join(heads) + " |")
    print("|" + "---|" * len(heads))
    for row in rows:
        kind = [
            row["shape"],
            *(row[key] for key in ("dtype", "layout") if row[key] not in ("float32", "contiguous")),
        ]
        cells = [row["work"], " ".join(kind), row["side"]]
        cells += [str(row.get(key, "")) for key in ("median_ms", "gb_per_s", "ratio")]
        cells += [verdict(row), *(str(row.get(key, "")) for key in further)]
        print("| " + " | ".join(cells) + " |")
    print(flush=True)


def verdict(row: Mapping[str, Any]) -> str:
    """A row's target and whether its ratio reaches it; empty without a target."""
    if "target" not in row:
        return ""
    relation, bound = row["target"].split()
    try:
        ratio = float(row["ratio"])
    except ValueError:  # the side failed
        return str(row["target"])
    met = ratio >= float(bound) if relation == ">=" else ratio <= float(bound)
    return f"{row['target']} {'met' if met else 'MISSED'}"


def run(
    name: str, cases: Callable[[Options], Iterable[Case | dict[str, Any]]], options: Options
) -> bool:
    """Measure every case (a dict is a finished row), print and write the rows; all targets met?"""
    torch.set_num_threads(THREADS)
    rows: list[dict[str, Any]] = []
    for case in cases(options):
        rows += [case] if isinstance(case, dict) else run_case(case, options)
    show(rows)
    print(f"{name}: {write(name, rows, options)}\n", flush=True)
    return not any("MISSED" in verdict(row) for row in rows)
