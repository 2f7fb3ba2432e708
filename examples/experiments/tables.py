"""The tables of README.md and docs/results.md from the CSV files that demo, tune and compare write.

`python -m benches.report` puts them into the pages.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TypeVar

from examples.experiments.compare import (
    SETTINGS,
    Difference,
    Row,
    accuracies,
    by_pair,
    chosen,
    difference,
    paired,
    read_rows,
)
from examples.experiments.methods import ADAPTERS, ARMS
from sokd.demo.__main__ import HEADER, spread, table

T = TypeVar("T")
DOCS = Path(__file__).parent.parent.parent / "docs"
DEMO_LABELS = {
    "student": "student alone", "kd": "KD", "fitnet": "FitNet", "fitnet-dafa": "FitNet + DAFA",
    "fitnet-dam": "FitNet + DAM", "sokd": "SoKD",
}  # fmt: skip
ADAPTED = [f"fitnet-{kind}" for kind in ADAPTERS]
COMPARED = ("row", "runs", "last epoch", "best epoch", "against", "difference, 95 %", "pairs",
            "p (Holm)", "", "CPU s", "time / against")  # fmt: skip


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table; empty cells have one space."""
    rows = [[f" {cell} " if cell else " " for cell in row] for row in (header, *lines)]
    rows.insert(1, ["---"] * len(header))
    return "\n".join("|".join(["", *row, ""]) for row in rows)


def demo(path: Path = DOCS / "demo" / "runs.csv") -> str:
    """The demo's table: test accuracy in %, mean and standard deviation over the seeds."""
    lines = [(DEMO_LABELS[name], *cells) for name, *cells in table(read_rows(path))]
    return markdown(HEADER, lines)


def tried(path: Path = DOCS / "demo" / "tune.csv") -> str:
    """The trials of the demo's settings: validation accuracy in %, the chosen one bold."""
    found: dict[str, list[str]] = {}
    for row in read_rows(path):
        text = f"{row['setting'].replace('lambda_', '')}: {float(row['validation_mean']):.2f}"
        found.setdefault(row["method"], []).append(f"**{text}**" if row["best"] else text)
    lines = [(DEMO_LABELS[name], "; ".join(texts)) for name, texts in found.items()]
    return markdown(("method", "setting: validation %"), lines)


def policy(path: Path = DOCS / "results" / "policy.csv") -> str:
    """Where the online search took the policy: L_aug relative to that of the uniform policy."""
    header = (
        "parts", "search", "draws", "lr", "every", "samples", "learned",
        "clean teacher", r"\|F'\|^2 / \|F\|^2", "an operation acts", "channel_shuffle", "CPU s",
    )  # fmt: skip
    columns = ("learned", "clean", "energy", "acts", "channel_shuffle")
    lines = [
        (row["parts"], row["search"], f"a {row['granularity']}", row["lr"], row["every"],
         "" if row["search"] == "bilevel" else row["samples"],
         *(f"{float(row[name]):.2f}" for name in columns), f"{float(row['seconds']):.0f}")
        for row in read_rows(path)
    ]  # fmt: skip
    return markdown(header, lines)


def areas(path: Path = DOCS / "results" / "areas.csv") -> str:
    """Where the areas of each kind of heads lie after a run on the scenes."""
    header = (
        "heads", "lr", "scenes", "areas", "weight in the box", "cells of the box covered",
        "box / map",
    )  # fmt: skip
    lines = [tuple(row.values()) for row in read_rows(path)]
    return markdown(header, lines)


def results(path: Path = DOCS / "results" / "runs.csv") -> dict[str, str]:
    """The tables of the comparison, by the names of their markers in the page."""
    rows = read_rows(path)
    found = {(dataset, arm): difference(rows, dataset, arm)
             for dataset in SETTINGS for arm in ARMS if ARMS[arm].against}  # fmt: skip
    adjusted = holm({key: each.p for key, each in found.items() if each.seeds > 1})
    return {
        **{name: compared(rows, name, adjusted) for name in SETTINGS},
        "adapters": adapters(rows), "trials": trials(rows),
    }  # fmt: skip


def holm(values: dict[T, float]) -> dict[T, float]:
    """The p-values adjusted by Holm's method for as many tests."""
    adjusted, largest = {}, 0.0
    for rank, key in enumerate(sorted(values, key=values.__getitem__)):
        largest = max(largest, min(1.0, values[key] * (len(values) - rank)))
        adjusted[key] = largest
    return adjusted


def verdict(mean: float, half_width: float, p: float, margin: float) -> str:
    """The verdict on a difference in points, given its adjusted p-value."""
    if p < 0.05:
        return "better" if mean > 0 else "worse"
    return "no worse" if mean - half_width > -margin else "not told apart"


def compared(rows: Sequence[Row], dataset: str, adjusted: Mapping[tuple[str, str], float]) -> str:
    """One line for each arm; test accuracy in %, mean ± standard deviation over the seeds."""
    lines: list[tuple[str, ...]] = []
    for arm, label in {"teacher": "teacher", **{k: v.label for k, v in ARMS.items()}}.items():
        last, best, spent = (
            by_pair(rows, dataset, arm, column)
            for column in ("last_test", "best_test", "cpu_seconds")
        )
        if not last:
            continue
        cells, times = [""] * 5, ""
        if (dataset, arm) in adjusted:
            found, p = difference(rows, dataset, arm), adjusted[dataset, arm]
            word = verdict(found.mean, found.half_width, p, SETTINGS[dataset].margin)
            text = f"{found.mean:+.2f} ± {found.half_width:.2f}"
            cells = [ARMS[ARMS[arm].against].label, text, str(found.seeds), f"{p:.2g}", word]
            other = by_pair(rows, dataset, ARMS[arm].against, "cpu_seconds")
            pairs = spent.keys() & other.keys()  # of one machine
            own, others = (sum(of[pair] for pair in pairs) for of in (spent, other))
            times = f"{own / others:.2f}"
        more = [""] * 8  # of a teacher, which has no runs
        if spent:
            more = [spread([*best.values()]), *cells, f"{fmean(spent.values()):.1f}", times]
        lines.append((label, str(len(last)), spread([*last.values()]), *more))
    return markdown(COMPARED, lines)


def adapters(rows: Sequence[Row]) -> str:
    """What FitNet loses by each adapter to the best one of a set, over the pairs that all have.

    On the validation parts, because the default adapter is chosen by this table.
    """
    header, margins = ["adapter"], list[float]()
    losses: dict[str, list[Difference]] = {arm: [] for arm in ADAPTED}
    for dataset in SETTINGS:
        found = {arm: by_pair(rows, dataset, arm, "last_validation") for arm in ADAPTED}
        pairs = sorted(set.intersection(*(set(of) for of in found.values())))
        if not pairs:
            continue
        values = {arm: [100 * of[pair] for pair in pairs] for arm, of in found.items()}
        best = max(ADAPTED, key=lambda arm: fmean(values[arm]))
        header.append(f"{dataset}, {len(pairs)} pairs")
        margins.append(SETTINGS[dataset].margin)
        for arm, own in values.items():
            losses[arm].append(paired([b - a for a, b in zip(own, values[best], strict=True)]))
    lines = [
        (ADAPTERS[arm.removeprefix("fitnet-")],
         *(f"{each.mean:.2f} ± {each.half_width:.2f}" if each.mean else "0" for each in of_sets),
         f"{max(each.mean for each in of_sets):.2f}",
         f"{max(each.mean / margin for each, margin in zip(of_sets, margins, strict=True)):.1f}")
        for arm, of_sets in losses.items() if of_sets
    ]  # fmt: skip
    return markdown((*header, "worst", "worst, in margins"), lines)


def trials(rows: Sequence[Row]) -> str:
    """The trials of the weights: mean validation accuracy in % at the last epoch."""
    lines = []
    for arm in (arm for arm in ARMS if ARMS[arm].method):
        cells = []
        for dataset in SETTINGS:
            found, best = accuracies(rows, dataset, arm), chosen(rows, dataset, arm)
            texts = (f"{share}: {100 * found[share]:.2f}" for share in sorted(found, key=float))
            cells.append("; ".join(
                f"**{text}**" if text.startswith(f"{best}:") else text for text in texts
            ))  # fmt: skip
        lines.append((ARMS[arm].label, *cells))
    return markdown(("row", *SETTINGS), lines)
