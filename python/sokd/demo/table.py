"""The demo's table: mean and standard deviation over the seeds, on the test part; last and best epoch."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sokd.demo.methods import METHODS
from sokd.demo.train import Run

HEADER = ("method", "last epoch, test %", "best epoch, test %", "runs", "seconds a run")
NOTE = (
    "mean +- sample standard deviation over the seeds; best epoch: the one with the highest validation\n"
    "accuracy; seconds: training and search of one run on one core"
)


@dataclass(frozen=True)
class Row:
    """A method's line. Accuracies in per cent on the test part."""

    method: str
    last: float
    last_sd: float
    best: float
    best_sd: float
    runs: int
    seconds: float


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else float("nan")


def summarise(runs: Iterable[Run]) -> list[Row]:
    """One row for each method, in the order of first appearance."""
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        by_method.setdefault(run.job.method, []).append(run)
    rows = []
    for method, group in by_method.items():
        last, best = [100 * r.last for r in group], [100 * r.best for r in group]
        seconds = statistics.fmean(r.seconds for r in group)
        means = (statistics.fmean(last), _spread(last), statistics.fmean(best), _spread(best))
        rows.append(Row(method, *means, len(group), seconds))
    return rows


def _plus_minus(mean: float, spread: float) -> str:
    return f"{mean:.2f}" if spread != spread else f"{mean:.2f} +- {spread:.2f}"


def format_table(rows: Sequence[Row], *, teacher: float | None = None) -> str:
    """The table as text. `teacher`: its test accuracy in [0, 1], a first line of its own."""
    cells = [HEADER]
    if teacher is not None:
        cells.append(("teacher", f"{100 * teacher:.2f}", "", "1", ""))
    for row in rows:
        last, best = _plus_minus(row.last, row.last_sd), _plus_minus(row.best, row.best_sd)
        cells.append((METHODS[row.method].label, last, best, str(row.runs), f"{row.seconds:.1f}"))
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEADER))]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, NOTE])


def write_table(rows: Sequence[Row], path: Path) -> None:
    """The rows as CSV; accuracies and standard deviations in per cent, a single run's deviation empty."""
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(
            ("method", "last_mean", "last_sd", "best_mean", "best_sd", "runs", "seconds_a_run")
        )
        for row in rows:
            numbers = (row.last, row.last_sd, row.best, row.best_sd)
            text = ["" if n != n else f"{n:.3f}" for n in numbers]
            out.writerow((row.method, *text, row.runs, f"{row.seconds:.2f}"))


def write_runs(runs: Sequence[Run], path: Path) -> None:
    """Every run on its own line, so that the table can be checked and paired by seed."""
    notes = sorted({name for run in runs for name in run.notes})
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        names = (
            "method",
            "seed",
            "last_test",
            "best_test",
            "best_epoch",
            "last_validation",
            "seconds",
        )
        out.writerow((*names, *notes))
        for run in runs:
            last, best, validation = (
                f"{value:.5f}" for value in (run.last, run.best, run.validation[-1])
            )
            figures = (last, best, run.best_epoch + 1, validation, f"{run.seconds:.2f}")
            extra = [f"{run.notes[name]:.5g}" if name in run.notes else "" for name in notes]
            out.writerow((run.job.method, run.job.seed, *figures, *extra))
