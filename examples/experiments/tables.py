"""The tables of README.md and docs/results.md from the CSV files that demo, tune and compare write.

`python -m benches.report` puts them into the pages.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from examples.experiments.compare import DATASETS, SEEDS, Row, chosen, read_rows, rows_of
from examples.experiments.methods import DEMO_LABELS, LABELS
from sokd.demo.__main__ import HEADER, spread, table

DOCS = Path(__file__).parent.parent.parent / "docs"
DONE = "all runs are there"


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
    """What the demo's settings were chosen from: validation accuracy in %, the chosen one bold."""
    found: dict[str, list[str]] = {}
    for row in read_rows(path):
        text = f"{row['setting'].replace('lambda_', '')}: {float(row['validation_mean']):.2f}"
        found.setdefault(row["method"], []).append(f"**{text}**" if row["best"] else text)
    lines = [(DEMO_LABELS[name], "; ".join(texts)) for name, texts in found.items()]
    return markdown(("method", "setting: validation %"), lines)


def results(path: Path = DOCS / "results" / "runs.csv") -> dict[str, str]:
    """The tables of the comparison, by the names of their markers in the page."""
    rows = read_rows(path)
    tables = {name: f"{compared(rows, name)}\n\n{summary(rows, name)}" for name in DATASETS}
    return {**tables, "trials": trials(rows, DATASETS[0])}


def by_seed(rows: Sequence[Row], dataset: str, method: str, column: str) -> dict[str, float]:
    """A method's figures in the table's runs."""
    found = rows_of(rows, dataset, "table", method)
    return {row["seed"]: float(row[column]) for row in found if row[column]}


def differences(rows: Sequence[Row], dataset: str, method: str) -> list[float]:
    """With SoKD minus without, at the last epoch, for each seed that has both."""
    plain, plugged = (
        by_seed(rows, dataset, name, "last_test") for name in (method, f"{method}+sokd")
    )
    return [100 * plugged[seed] - 100 * plain[seed] for seed in sorted(plain) if seed in plugged]


def compared(rows: Sequence[Row], dataset: str) -> str:
    """One line for each method; test accuracy in %, mean ± standard deviation over the seeds."""

    def cells(*names: str) -> list[str]:
        columns = ("last_test", "best_test", "cpu_seconds")
        return [_cell(rows, dataset, name, column) for column in columns for name in names]

    header = ["method", "last epoch", "+ SoKD", "difference", "of each seed"]
    header += ["best epoch", "+ SoKD", "CPU s", "+ SoKD"]
    lines = []
    for label, method in (("teacher", "teacher"), ("student alone", "student")):
        last, best, seconds = cells(method)
        lines.append([label, last, "", "", "", best, "", seconds, ""])
    for method, label in LABELS.items():
        last, plugged, *rest = cells(method, f"{method}+sokd")
        less = differences(rows, dataset, method)
        each = ", ".join(f"{value:+.2f}" for value in less)
        lines.append([label, last, plugged, _signed(less), each, *rest])
    return markdown(header, lines)


def _cell(rows: Sequence[Row], dataset: str, method: str, column: str) -> str:
    values = list(by_seed(rows, dataset, method, column).values())
    if not values:
        return ""
    return f"{fmean(values):.1f}" if column == "cpu_seconds" else spread(values)


def _signed(values: Sequence[float]) -> str:
    deviation = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{fmean(values):+.2f}{deviation}" if values else ""


def summary(rows: Sequence[Row], dataset: str) -> str:
    """How often SoKD helped, and whether runs are missing, as a sentence."""
    found = [less for method in LABELS if (less := differences(rows, dataset, method))]
    whole = [less for less in found if len(less) == len(SEEDS)]
    better, worse = sum(min(less) > 0 for less in whole), sum(max(less) < 0 for less in whole)
    methods = ["student", *LABELS, *(f"{name}+sokd" for name in LABELS)]
    done = sum(len(by_seed(rows, dataset, name, "last_test")) for name in methods)
    wanted = len(SEEDS) * len(methods)
    state = DONE if done == wanted else f"**only {done} of {wanted} runs are there**"
    if not found:
        return f"{state[0].upper()}{state[1:]}."
    means = [fmean(less) for less in found]
    return (
        f"With SoKD the mean is higher for {sum(mean > 0 for mean in means)} of {len(means)} "
        f"methods; it is higher with every seed for {better}, lower with every seed for {worse}; "
        f"the mean of all differences is {fmean(means):+.2f} points ({state})."
    )


def trials(rows: Sequence[Row], dataset: str) -> str:
    """What the settings were chosen from: validation accuracy in % at the last epoch."""
    lines: list[tuple[str, ...]] = [("student alone", _tried(rows, dataset, "student", "lr"), "")]
    for method, label in LABELS.items():
        cells = [_tried(rows, dataset, name, "share") for name in (method, f"{method}+sokd")]
        lines.append((label, *cells))
    return markdown(("method", "share (or learning rate): validation %", "+ SoKD"), lines)


def _tried(rows: Sequence[Row], dataset: str, method: str, column: str) -> str:
    best = chosen(rows, dataset, method)
    texts = []
    for row in sorted(rows_of(rows, dataset, "trial", method), key=lambda row: float(row[column])):
        text = f"{row[column]}: {100 * float(row['last_validation']):.2f}"
        texts.append(f"**{text}**" if row is best else text)
    return "; ".join(texts)
