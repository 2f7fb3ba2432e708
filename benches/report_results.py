"""The tables of docs/results.md, from docs/results/runs.csv, which `python -m sokd.demo.compare` writes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from sokd.demo.compare import DATASETS, SEEDS, Row, chosen, read_rows
from sokd.demo.methods import LABELS

RUNS = Path(__file__).parent.parent / "docs" / "results" / "runs.csv"
DONE = "all runs are there"


def rendered(path: Path = RUNS) -> dict[str, str]:
    """What stands between the page's markers, by their name."""
    rows = read_rows(path)
    tables = {name: f"{table(rows, name)}\n\n{summary(rows, name)}" for name in DATASETS}
    return {**tables, "trials": trials(rows, DATASETS[0])}


def by_seed(rows: Sequence[Row], dataset: str, method: str, column: str) -> dict[str, float]:
    """A method's figures in the table's runs, accuracies in per cent."""
    scale = 1 if column == "cpu_seconds" else 100
    return {
        row["seed"]: scale * float(row[column])
        for row in rows
        if (row["dataset"], row["part"], row["method"]) == (dataset, "table", method)
        and row[column]
    }


def differences(rows: Sequence[Row], dataset: str, method: str) -> list[float]:
    """With SoKD less without, at the last epoch, for each seed that has both."""
    plain, plugged = (
        by_seed(rows, dataset, name, "last_test") for name in (method, f"{method}+sokd")
    )
    return [plugged[seed] - plain[seed] for seed in sorted(plain) if seed in plugged]


def table(rows: Sequence[Row], dataset: str) -> str:
    """One line a method; test accuracy in per cent, mean ± standard deviation over the seeds."""
    lines = [
        "| method | last epoch | + SoKD | difference | of each seed | best epoch | + SoKD | CPU s | + SoKD |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for label, method in (("teacher", "teacher"), ("student alone", "student")):
        cells = [
            _spread(rows, dataset, method, c) for c in ("last_test", "best_test", "cpu_seconds")
        ]
        lines.append(f"| {label} | {cells[0]} | | | | {cells[1]} | | {cells[2]} | |")
    for method, label in LABELS.items():
        found = [
            _spread(rows, dataset, name, column)
            for column in ("last_test", "best_test", "cpu_seconds")
            for name in (method, f"{method}+sokd")
        ]
        less = differences(rows, dataset, method)
        each = ", ".join(f"{value:+.2f}" for value in less)
        middle = f"{_mean(less, signed=True)} | {each}"
        lines.append(f"| {label} | {' | '.join(found[:2])} | {middle} | {' | '.join(found[2:])} |")
    return "\n".join(lines)


def _spread(rows: Sequence[Row], dataset: str, method: str, column: str) -> str:
    values = list(by_seed(rows, dataset, method, column).values())
    if column == "cpu_seconds":
        return f"{statistics.fmean(values):.1f}" if values else ""
    return _mean(values)


def _mean(values: Sequence[float], *, signed: bool = False) -> str:
    if not values:
        return ""
    mean = f"{statistics.fmean(values):{'+' if signed else ''}.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def summary(rows: Sequence[Row], dataset: str) -> str:
    """In words: how often SoKD helped, and whether runs are missing."""
    means, clear = [], {"better": 0, "worse": 0}
    for method in LABELS:
        less = differences(rows, dataset, method)
        if not less:
            continue
        means.append(statistics.fmean(less))
        if len(less) == len(SEEDS) and min(map(abs, less)) > 0:
            clear["better"] += min(less) > 0
            clear["worse"] += max(less) < 0
    wanted = len(SEEDS) * (1 + 2 * len(LABELS))
    there = sum(len(by_seed(rows, dataset, m, "last_test")) for m in _methods())
    state = DONE if there == wanted else f"**only {there} of {wanted} runs are there**"
    if not means:
        return f"{state[0].upper()}{state[1:]}."
    return (
        f"With SoKD the mean is higher for {sum(mean > 0 for mean in means)} of {len(means)} methods; it is "
        f"higher with every seed for {clear['better']}, lower with every seed for {clear['worse']}; the mean "
        f"of all differences is {statistics.fmean(means):+.2f} points ({state})."
    )


def _methods() -> list[str]:
    return ["student", *LABELS, *(f"{name}+sokd" for name in LABELS)]


def trials(rows: Sequence[Row], dataset: str) -> str:
    """What the settings were chosen from: validation accuracy in per cent at the last epoch."""
    lines = ["| method | share (or learning rate): validation % | + SoKD |", "|---|---|---|"]
    lines.append(f"| student alone | {_tried(rows, dataset, 'student', 'lr')} | |")
    for method, label in LABELS.items():
        cells = [_tried(rows, dataset, name, "share") for name in (method, f"{method}+sokd")]
        lines.append(f"| {label} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def _tried(rows: Sequence[Row], dataset: str, method: str, column: str) -> str:
    best = chosen(rows, dataset, method)
    found = [
        r for r in rows if (r["dataset"], r["part"], r["method"]) == (dataset, "trial", method)
    ]
    found.sort(key=lambda row: float(row[column]))
    texts = [f"{row[column]}: {100 * float(row['last_validation']):.2f}" for row in found]
    return "; ".join(
        f"**{text}**" if row is best else text for text, row in zip(texts, found, strict=True)
    )
