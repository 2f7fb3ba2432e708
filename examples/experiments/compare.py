"""`python -m examples.experiments.compare`: every method, plain and with SoKD, on two data sets.

Equal effort: on the validation part of the first set, with another seed than the table's, the
student alone tries three learning rates (the best is used for all methods), and every method tries
three weights, plain and with SoKD. The unit of the weights is `methods.balance`, so that no method
profits from a hand-picked range. The choices are used on the other set too, where nothing is tried.
Each run is a line of runs.csv as soon as it is done and is not repeated: an interrupted comparison
resumes where it stopped.
"""

import argparse
import csv
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from examples.experiments import methods
from examples.experiments.data import SOURCES, few
from sokd.demo.__main__ import CORES
from sokd.demo.data import DataSet, MissingData
from sokd.demo.networks import Net, accuracy, predict
from sokd.demo.train import Run, Solver, Task, train_all, train_teacher

DATASETS = ("animal-mnist", "mnist-small")
IMAGES = 500  # to train with; the validation and test parts are whole
SOLVER = Solver(epochs=12, batch=32)
TEACHER = Solver(epochs=30, batch=32, lr=0.4)
RATES = ("0.2", "0.4", "0.8")
SHARES = ("0.1", "0.5", "2")
TRIAL_SEED = "100"
SEEDS = ("0", "1", "2")
NOTES = ("weight", "heat_variance", "covered_share", "entropy")  # of a run, at the last epoch
COLUMNS = (
    "dataset", "part", "method", "share", "weight", "lr", "seed", "last_validation", "last_test",
    "best_test", "best_epoch", "cpu_seconds", *NOTES[1:],
)  # fmt: skip
Row = dict[str, str]


class Key(NamedTuple):
    """What identifies a run. `share` is empty for the student alone."""

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


def append(path: Path, row: Row) -> None:
    """One more line, after the header in a new file."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        out = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if new:
            out.writeheader()
        out.writerow(row)


def rows_of(rows: Iterable[Row], dataset: str, part: str, method: str) -> list[Row]:
    """A method's rows in one part of a data set."""
    return [r for r in rows if (r["dataset"], r["part"], r["method"]) == (dataset, part, method)]


def chosen(rows: Iterable[Row], dataset: str, method: str) -> Row | None:
    """The trial with the best validation accuracy; of equals, the smallest share and rate."""

    def rank(row: Row) -> tuple[float, float, float]:
        return -float(row["last_validation"]), float(row["share"] or 0), float(row["lr"])

    return min(rows_of(rows, dataset, "trial", method), key=rank, default=None)


class Comparison:
    """The runs of one data set, and the file they go to."""

    def __init__(
        self, name: str, task: Task, path: Path, *, names: Sequence[str], workers: int
    ) -> None:
        self.name, self.task, self.path, self.workers = name, task, path, workers
        self.names = names
        self._balance = cache(lambda method: methods.balance(method, task))

    def tune(self) -> None:
        """The trials: of the learning rate, then of the weights."""
        for rate in RATES:
            self._run([Key(self.name, "trial", "student", "", rate, TRIAL_SEED)])
        rate = self._best("student", self.name)["lr"]
        self._run(
            [
                Key(self.name, "trial", name, share, rate, TRIAL_SEED)
                for name in self.names
                for share in SHARES
            ]
        )

    def fill(self, tuned_on: str) -> None:
        """The table's runs, with the settings chosen on a data set."""
        best = {name: self._best(name, tuned_on)["share"] for name in ("student", *self.names)}
        rate = self._best("student", tuned_on)["lr"]
        self._run(
            [Key(self.name, "table", *each, rate, seed) for seed in SEEDS for each in best.items()]
        )

    def _best(self, method: str, tuned_on: str) -> Row:
        best = chosen(read_rows(self.path), tuned_on, method)
        assert best is not None, "its trials have been run"
        return best

    def _run(self, keys: Sequence[Key]) -> None:
        """The runs that are missing, all of one part and with one learning rate."""
        done = {key_of(row) for row in read_rows(self.path)}
        left = [key for key in keys if key not in done]
        if not left:
            return
        solver, test = self.task.solver._replace(lr=float(left[0].lr)), left[0].part == "table"
        task, runs = self.task._replace(solver=solver), [self._planned(key) for key in left]
        for key, run in zip(left, train_all(runs, task, self.workers, test=test), strict=True):
            append(self.path, key._asdict() | _figures(run))

    def _planned(self, key: Key) -> Run:
        unit = self._balance(key.method.partition("+")[0]) if key.share else 0.0
        images, weight = len(self.task.data.train[1]), float(key.share or 0) * unit
        return Run(key.method, methods.arguments(key.method, weight, images), int(key.seed))


def _figures(run: Run) -> Row:
    figures = {"last_validation": f"{run.validation[-1]:.5f}"}
    figures |= {"best_epoch": str(run.best_epoch + 1), "cpu_seconds": f"{run.seconds:.1f}"}
    if run.test:
        last, best = run.test[len(run.validation) - 1], run.test[run.best_epoch]
        figures |= {"last_test": f"{last:.5f}", "best_test": f"{best:.5f}"}
    return figures | {name: f"{run.notes[name]:.4g}" for name in NOTES if name in run.notes}


def _teacher(data: DataSet, folder: Path) -> Net:
    """The teacher from the folder, or a new one and its line in runs.csv."""
    path = folder / f"teacher-{data.name}.pt"
    new = not path.exists()
    teacher = train_teacher(data, "base", TEACHER, path)
    if new:
        key = Key(data.name, "table", "teacher", "", f"{TEACHER.lr:g}", "0")
        scores = {f"last_{name}": f"{accuracy(teacher, getattr(data, name)):.5f}"
                  for name in ("validation", "test")}  # fmt: skip
        append(folder / "runs.csv", key._asdict() | scores)
    return teacher


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m examples.experiments.compare", description=__doc__)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add = parser.add_argument
    known = methods.names()[: len(methods.LABELS)]
    add("--dataset", nargs="+", choices=SOURCES, default=[*DATASETS], help="the first is tuned on")
    add("--method", nargs="+", choices=known, default=known, help="each plain and with SoKD")
    add("--workers", type=int, default=CORES, help="runs at a time, one thread each")
    add("--save", type=Path, default=Path("out/compare"), help="folder of runs.csv")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if all runs are there, 2 with one line on stderr if a data set is missing."""
    options = _parser().parse_args(arguments)
    options.save.mkdir(parents=True, exist_ok=True)
    path, names = options.save / "runs.csv", methods.names(options.method)
    torch.set_num_threads(1)  # as the runs: the numbers do not depend on the machine's cores
    for name in options.dataset:
        try:
            data = few(SOURCES[name](), IMAGES)
        except MissingData as error:
            print(f"compare: {error}", file=sys.stderr)
            return 2
        teacher = _teacher(data, options.save)
        task = Task(data, teacher, predict(teacher, data.train[0]), "small", SOLVER)
        comparison = Comparison(name, task, path, names=names, workers=options.workers)
        if name == options.dataset[0]:
            comparison.tune()
        comparison.fill(options.dataset[0])
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
