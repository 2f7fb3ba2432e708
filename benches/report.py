"""The tables of README.md and docs/*.md from CSV files; no number without its row.

`make bench` writes them after a full run, `python -m benches.report` at any time; the tests fail if
a page has other numbers.
"""

import csv
from collections.abc import Iterable
from pathlib import Path

from benches.harness import RESULTS, verdict
from examples.experiments import tables

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
EXPERIMENTS = ROOT / "docs" / "results.md"
METHOD = ROOT / "docs" / "method.md"
FILES = (
    "refine", "masked_mse", "areas", "loss", "methods", "distiller", "readers", "recipes", "import",
)  # fmt: skip
Row = dict[str, str]


def read_rows(folder: Path = RESULTS) -> list[list[Row]]:
    """The rows of results/*.csv, one list for each case."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for name in FILES:
        with (folder / f"{name}.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                case = (row["work"], row["shape"], row["dtype"], row["layout"])
                found.setdefault(case, []).append({**row, "bench": name})
    return list(found.values())


def table(cases: Iterable[list[Row]]) -> str:
    """One line for each case: sokd's time, then each side's time, ratio and target."""
    lines = ["| work | features | sokd | against |", "|---|---|---|---|"]
    for rows in cases:
        actual = next((row for row in rows if row["side"] == "sokd"), None)
        others = "; ".join(_side(row) for row in rows if row is not actual)
        shape = " ".join([rows[0]["shape"], *_unusual(rows[0])])
        note = f" ({rows[0]['note']})" if rows[0]["note"] else ""
        lines.append(
            f"| {rows[0]['work']}{note} | {shape} | {_ms(actual) if actual else ''} | {others} |"
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
    met = verdict(row) if row["target"] else ""
    judged = met.removesuffix(" met").replace(" MISSED", ", missed")
    target = f" (target {judged})" if judged else ""
    return f"{row['side']}{time}{ratio}{target}"


def report(cases: list[list[Row]]) -> str:
    """The bench tables: the cases with a target, and the others folded away."""
    named = [rows for rows in cases if any(_is_target(row) for row in rows)]
    rest = [rows for rows in cases if rows not in named]
    title = f"<summary>{len(rest)} further cases (none may be slower than eager)</summary>"
    more = f"<details>{title}\n\n{table(rest)}\n\n</details>"
    return f"{table(named)}\n\n{_machines(cases)}\n\n{more}"


def _machines(cases: Iterable[list[Row]]) -> str:
    """Where each bench was measured, one line for each machine and commit."""
    benches: dict[str, dict[str, None]] = {}
    for row in (rows[0] for rows in cases):
        where = f"{row['cpu']}, {row['threads']} threads, torch {row['torch']}"
        benches.setdefault(f"{where}, commit {row['commit']}", {})[row["bench"]] = None
    return "\n".join(
        f"- {', '.join(names)}: measured on {where}" for where, names in benches.items()
    )


def _is_target(row: Row) -> bool:
    return bool(row["target"]) and row["target"] != ">= 1"


def rendered() -> dict[Path, dict[str, str]]:
    """The text between the markers of each page, by the markers' names."""
    return {
        README: {"demo": tables.demo()},
        BENCHMARKS: {"bench": report(read_rows())},
        METHOD: {"policy": tables.policy()},
        EXPERIMENTS: {"tried": tables.tried(), "areas": tables.areas(), **tables.results()},
    }


def between(text: str, name: str) -> tuple[str, str, str]:
    """The text before, between and after the markers <!-- name ... --> and <!-- /name -->."""
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
        for name, block in blocks.items():
            before, _, after = between(text, name)
            text = before + block + after
        page.write_text(text)


if __name__ == "__main__":
    write_pages()
