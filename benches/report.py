"""The tables of README.md and docs/results.md, made from CSV files: no number without its row.

`make bench` writes them after a full run, `python -m benches.report` at any time; tests/test_readme.py fails
where a page says something else.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from benches import report_results
from benches.harness import RESULTS, verdict
from sokd.demo.methods import METHODS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGE = ROOT / "docs" / "results.md"
DEMO = ROOT / "docs" / "demo" / "table.csv"
TRIED = ROOT / "docs" / "demo" / "tune.csv"
FILES = ("refine", "masked_mse", "areas", "loss", "methods", "distiller")
Row = dict[str, str]


def read_rows(folder: Path = RESULTS) -> list[list[Row]]:
    """The rows of results/*.csv, one list for each case."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for name in FILES:
        with (folder / f"{name}.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                case = (row["work"], row["shape"], row["dtype"], row["layout"])
                found.setdefault(case, []).append(row)
    return list(found.values())


def table(cases: Iterable[list[Row]]) -> str:
    """One line a case: sokd's time, then each side's, how it compares, and the target if there is one."""
    lines = ["| work | features | sokd | against |", "|---|---|---|---|"]
    for rows in cases:
        ours = next((row for row in rows if row["side"] == "sokd"), None)
        others = "; ".join(_side(row) for row in rows if row is not ours)
        shape = " ".join([rows[0]["shape"], *_unusual(rows[0])])
        note = f" ({rows[0]['note']})" if rows[0]["note"] else ""
        lines.append(
            f"| {rows[0]['work']}{note} | {shape} | {_ms(ours) if ours else ''} | {others} |"
        )
    return "\n".join(lines)


def _unusual(row: Row) -> list[str]:
    return [row[key] for key in ("dtype", "layout") if row[key] not in ("float32", "contiguous")]


def _ms(row: Row) -> str:
    rate = f", {float(row['gb_per_s']):.1f} GB/s" if row["gb_per_s"] else ""
    return f"{_time(row)}{rate}"


def _time(row: Row) -> str:
    milliseconds = float(row["median_ms"])
    return f"{milliseconds:.3g} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.2f} s"


def _side(row: Row) -> str:
    if row["ratio"].startswith("failed"):
        return f"{row['side']} {row['ratio']}"
    time = f" {_time(row)}" if row["median_ms"] else ""
    ratio = f": **{float(row['ratio']):.2f}**" if row["ratio"] else ""
    judged = (
        verdict(row).removesuffix(" met").replace(" MISSED", ", missed") if row["target"] else ""
    )
    target = f" (target {judged})" if judged else ""
    return f"{row['side']}{time}{ratio}{target}"


def report(cases: list[list[Row]]) -> str:
    """The bench tables: the cases with a target, and the others folded away."""
    named = [rows for rows in cases if any(_is_target(row) for row in rows)]
    rest = [rows for rows in cases if rows not in named]
    where = cases[0][0]
    measured = f"{where['cpu']}, {where['threads']} threads, torch {where['torch']}, commit {where['commit']}."
    title = f"<summary>{len(rest)} further cases (none may be slower than eager)</summary>"
    more = f"<details>{title}\n\n{table(rest)}\n\n</details>"
    return f"{table(named)}\n\nMeasured on: {measured}\n\n{more}"


def _is_target(row: Row) -> bool:
    return bool(row["target"]) and row["target"] != ">= 1"


def demo_report(path: Path = DEMO) -> str:
    """The demo's table: test accuracy in per cent, mean and standard deviation over the seeds."""
    lines = [
        "| method | last epoch, test % | best epoch, test % | runs | seconds a run |",
        "|---|---|---|---|---|",
    ]
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            last, best = _spread(row, "last"), _spread(row, "best")
            seconds = f"{float(row['seconds_a_run']):.1f}"
            lines.append(
                f"| {METHODS[row['method']].label} | {last} | {best} | {row['runs']} | {seconds} |"
            )
    return "\n".join(lines)


def tried_report(path: Path = TRIED) -> str:
    """What the demo's settings were chosen from: validation accuracy in per cent, the chosen one in bold."""
    tried: dict[str, list[str]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            text = f"{row['setting'].replace('lambda_', '')}: {float(row['validation_mean']):.2f}"
            tried.setdefault(row["method"], []).append(f"**{text}**" if row["best"] else text)
    lines = ["| method | setting: validation % |", "|---|---|"]
    return "\n".join(
        [*lines, *(f"| {METHODS[name].label} | {'; '.join(of)} |" for name, of in tried.items())]
    )


def _spread(row: Row, name: str) -> str:
    mean, deviation = row[f"{name}_mean"], row[f"{name}_sd"]
    return f"{float(mean):.2f} ± {float(deviation):.2f}" if deviation else f"{float(mean):.2f}"


def rendered() -> dict[Path, dict[str, str]]:
    """What stands between the markers of each page, by their name."""
    readme = {"bench": report(read_rows()), "demo": demo_report(), "tried": tried_report()}
    return {README: readme, PAGE: report_results.rendered()}


def between(text: str, name: str) -> tuple[str, str, str]:
    """What stands before, between and after the markers <!-- name ... --> and <!-- /name -->."""
    before, opening, rest = text.partition(f"<!-- {name}")
    comment, end, rest = rest.partition("-->\n")
    inside, closing, after = rest.partition(f"\n<!-- /{name} -->")
    if not closing:
        raise ValueError(f"the page must have the markers <!-- {name} --> and <!-- /{name} -->")
    return before + opening + comment + end, inside, closing + after


def write_pages() -> None:
    """Put the tables of the CSV files into the pages."""
    for page, blocks in rendered().items():
        text = page.read_text()
        for name, tables in blocks.items():
            before, _, after = between(text, name)
            text = before + tables + after
        page.write_text(text)


if __name__ == "__main__":
    write_pages()
