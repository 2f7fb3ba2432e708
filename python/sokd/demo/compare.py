"""`python -m sokd.demo.compare`: every method, plain and with SoKD on top, on two data sets with few images.

Equal effort: on the first set's validation part, with another seed than the table's, the student alone tries
three learning rates (the best serves all), and every method three weights, with and without SoKD. Their unit
is `train.balance`, so that no method profits from a hand-picked range, and the choice can be carried over to
the other set, on which nothing is tried. Each run is a line of runs.csv as soon as it is done; what is there
is not run again, so a run that was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from sokd.demo.data import DataSet, MissingData, few, load
from sokd.demo.methods import ON_TOP, PLAIN, SHARES
from sokd.demo.models import Net, saved_teacher
from sokd.demo.train import (
    Job,
    Run,
    Solver,
    Task,
    accuracy,
    cores,
    prepare,
    run_all,
    threads,
    train_teacher,
)

DATASETS = ("animal-mnist", "mnist-small")  # settings are chosen on the first, for both
IMAGES = 500  # to train with; validation and test parts are whole
SOLVER = Solver(epochs=12, batch=32)
TEACHER = Solver(epochs=30, batch=32, lr=0.4)
RATES = (0.2, 0.4, 0.8)
TRIAL_SEED = 100
SEEDS = (0, 1, 2)
NOTES = ("heat_variance", "covered_share", "entropy")  # of SoKD, at the last epoch
COLUMNS = (
    "dataset", "part", "method", "share", "weight", "lr", "seed", "last_validation", "last_test", "best_test",
    "best_epoch", "cpu_seconds", *NOTES,
)  # fmt: skip
Row = dict[str, str]


class Key(NamedTuple):
    """What tells one run from another. `share` is empty for the student alone."""

    dataset: str
    part: str  # "trial" or "table"
    method: str
    share: str
    lr: str
    seed: str


def key_of(row: Row) -> Key:
    return Key(*(row[name] for name in Key._fields))


def read_rows(path: Path) -> list[Row]:
    """The lines of runs.csv; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def chosen(rows: Iterable[Row], dataset: str, method: str) -> Row | None:
    """The trial with the best validation accuracy, the first in `Key`'s order of equals."""
    tried = [
        r for r in rows if (r["dataset"], r["part"], r["method"]) == (dataset, "trial", method)
    ]
    tried.sort(
        key=lambda row: (-float(row["last_validation"]), float(row["share"] or 0), float(row["lr"]))
    )
    return tried[0] if tried else None


class Comparison:
    """One data set's runs, and the file they go to."""

    def __init__(
        self, name: str, task: Task, folder: Path, *, workers: int, quiet: bool = False
    ) -> None:
        self.name, self.task, self.folder, self.workers, self.quiet = (
            name,
            task,
            folder,
            workers,
            quiet,
        )
        self.path = folder / "runs.csv"

    def tune(self) -> None:
        """The trials: of the learning rate, then of the weights."""
        self._do([self._job("trial", "student", "", str(rate), TRIAL_SEED) for rate in RATES])
        rate = self._best("student", self.name)["lr"]
        names = [*PLAIN, *ON_TOP]
        shares = [f"{trial['share']:g}" for trial in SHARES]
        self._do(
            [
                self._job("trial", name, share, rate, TRIAL_SEED)
                for name in names
                for share in shares
            ]
        )

    def fill(self, tuned_on: str) -> None:
        """The table's runs, with the settings chosen on a data set."""
        best = {name: self._best(name, tuned_on) for name in ("student", *PLAIN, *ON_TOP)}
        table = {name: row["share"] for name, row in best.items()}
        rate = best["student"]["lr"]
        self._do(
            [self._job("table", *each, rate, seed) for seed in SEEDS for each in table.items()]
        )

    def _best(self, method: str, tuned_on: str) -> Row:
        best = chosen(read_rows(self.path), tuned_on, method)
        assert best is not None, "its trials have been run"
        return best

    def _job(self, part: str, method: str, share: str, lr: str, seed: int) -> Job:
        weights = {"share": float(share)} if share else {}
        return Job(method, seed, weights=weights, lr=float(lr), test=part == "table")

    def _key(self, job: Job) -> Key:
        share = f"{job.weights['share']:g}" if job.weights else ""
        part = "table" if job.test else "trial"
        return Key(self.name, part, job.method, share, f"{job.lr:g}", str(job.seed))

    def _do(self, jobs: Sequence[Job]) -> None:
        done = {key_of(row) for row in read_rows(self.path)}
        left = [job for job in jobs if self._key(job) not in done]
        if left:
            workers = {"workers": self.workers, "folder": self.folder, "quiet": self.quiet}
            run_all(left, self.task, **workers, keep=self._keep)  # type: ignore[arg-type]

    def _keep(self, run: Run) -> None:
        figures = {
            "last_validation": f"{run.validation[-1]:.5f}", "best_epoch": str(run.best_epoch + 1),
            "cpu_seconds": f"{run.seconds:.1f}",
        }  # fmt: skip
        if run.job.test:
            figures |= {"last_test": f"{run.last:.5f}", "best_test": f"{run.best:.5f}"}
        figures |= {
            name: f"{run.notes[name]:.4g}" for name in ("weight", *NOTES) if name in run.notes
        }
        append(self.path, self._key(run.job)._asdict() | figures)


def append(path: Path, row: Row) -> None:
    """One more line; the header first where there is no file."""
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        out = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if fresh:
            out.writeheader()
        out.writerow(row)


def _teacher(data: DataSet, folder: Path) -> Net:
    """The teacher from the folder, or a new one and its line in runs.csv."""
    path = folder / f"teacher-{data.name}.pt"
    saved = saved_teacher(path, "base", classes=data.classes, image_side=data.side)
    if saved is not None:
        return saved
    teacher = train_teacher(data, "base", TEACHER)
    scores = {
        "last_validation": accuracy(teacher, data.validation),
        "last_test": accuracy(teacher, data.test),
    }
    figures = {name: f"{value:.5f}" for name, value in scores.items()}
    key = Key(data.name, "table", "teacher", "", f"{TEACHER.lr:g}", "0")
    append(folder / "runs.csv", key._asdict() | figures)
    torch.save(teacher.state_dict(), path)
    return teacher


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sokd.demo.compare", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Tune and train every method, plain and with SoKD on top; go on where it was cut off.",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, default=cores(), help="runs at a time, one thread each"
    )
    parser.add_argument(
        "--save", type=Path, default=Path("out/compare"), metavar="DIR", help="of runs.csv"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if all runs are there, 2 with one line on stderr if a data set is missing."""
    options = _parser().parse_args(arguments)
    options.save.mkdir(parents=True, exist_ok=True)
    for name in DATASETS:
        try:
            data = few(load(name), IMAGES)
        except MissingData as error:
            print(f"sokd.demo.compare: {error}", file=sys.stderr)
            return 2
        with threads(1):  # as the runs: what comes of it does not depend on the machine's cores
            task = prepare(data, _teacher(data, options.save), "small", SOLVER)
        comparison = Comparison(name, task, options.save, workers=options.workers)
        if name == DATASETS[0]:
            comparison.tune()
        comparison.fill(DATASETS[0])
    print(f"written: {options.save / 'runs.csv'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
