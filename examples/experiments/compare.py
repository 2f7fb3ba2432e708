"""`python -m examples.experiments.compare`: what each part of SoKD brings, on three data sets.

Equal effort: on each set's validation part every row tries the same three weights with two seeds
that the table does not use. The unit of the weights is `methods.balance`, so that no row profits
from a hand-picked range. The table's seeds come in blocks of ten: a row stops when the 95 %
interval of its difference, paired by seed, reaches no further than the set's margin to either side,
or at 40 seeds. Each run is a line of runs.csv as soon as it is done and is not repeated: an
interrupted comparison resumes where it stopped.

A processor with other instructions trains another teacher. A pair has one teacher, so on another
machine a row goes on with pairs of its own.
"""

import argparse
import csv
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import torch
from scipy.stats import t as student_t  # type: ignore[import-untyped]

from examples.experiments import methods
from examples.experiments.data import FASHION, SOURCES, fashion_mnist
from examples.experiments.methods import ARMS
from sokd.demo.__main__ import CORES, at_least_one
from sokd.demo.data import DataSet, MissingData
from sokd.demo.networks import Net, accuracy, predict
from sokd.demo.train import Run, Solver, Task, train_all, train_teacher


class Setting(NamedTuple):
    """How a set is trained on, and the difference in points that counts as none."""

    teacher: Solver
    student: Solver
    margin: float


SETTINGS = {
    "animal-mnist": Setting(Solver(8, lr=0.4), Solver(10), 0.3),
    "fashion-mnist": Setting(Solver(5, lr=0.4), Solver(5), 0.3),
    "scenes": Setting(Solver(12, lr=0.4), Solver(12, lr=0.4), 1.0),
}
SHARES = ("0.1", "0.5", "2")
TRIAL_SEEDS = ("100", "101")
BLOCK, MOST = 10, 40  # seeds
NOTES = ("weight", "heat_variance", "covered_share", "entropy")  # of a run, at the last epoch
COLUMNS = (
    "dataset", "part", "arm", "share", "seed", "teacher", "last_validation", "last_test",
    "best_test", "best_epoch", "cpu_seconds", *NOTES,
)  # fmt: skip
Row = dict[str, str]


class Key(NamedTuple):
    """The key of a run. `share` is empty for the student alone."""

    dataset: str
    part: str  # "trial" or "table"
    arm: str
    share: str
    seed: str
    teacher: str  # its accuracy on the validation and the test part, which tells two apart


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


def rows_of(rows: Iterable[Row], dataset: str, part: str, arm: str) -> list[Row]:
    """An arm's rows in one part of a data set."""
    return [r for r in rows if (r["dataset"], r["part"], r["arm"]) == (dataset, part, arm)]


def accuracies(rows: Iterable[Row], dataset: str, arm: str) -> dict[str, float]:
    """The mean validation accuracy of each share of an arm's trials."""
    found: dict[str, list[float]] = {}
    for row in rows_of(rows, dataset, "trial", arm):
        found.setdefault(row["share"], []).append(float(row["last_validation"]))
    return {share: fmean(values) for share, values in found.items()}


def chosen(rows: Iterable[Row], dataset: str, arm: str) -> str:
    """The share with the best mean validation accuracy; of equals, the smallest."""
    found = accuracies(rows, dataset, arm)
    return min(found, key=lambda share: (-found[share], float(share)), default="")


def by_pair(
    rows: Iterable[Row], dataset: str, arm: str, column: str
) -> dict[tuple[str, str], float]:
    """An arm's figures in the table's runs, by seed and teacher."""
    return {(row["seed"], row["teacher"]): float(row[column])
            for row in rows_of(rows, dataset, "table", arm) if row[column]}  # fmt: skip


class Difference(NamedTuple):
    """A paired difference in points of test accuracy at the last epoch."""

    mean: float
    half_width: float  # of the 95 % interval
    p: float  # two-sided t-test of no difference
    seeds: int


def difference(rows: Sequence[Row], dataset: str, arm: str) -> Difference:
    """An arm minus the arm it is compared with, over the pairs that both have."""
    one, other = (by_pair(rows, dataset, name, "last_test") for name in (arm, ARMS[arm].against))
    return paired([100 * (one[pair] - other[pair]) for pair in one if pair in other])


def paired(values: Sequence[float]) -> Difference:
    """The mean of the pairs' differences, its interval and its p-value."""
    if len(values) < 2:
        return Difference(math.nan, math.inf, 1.0, len(values))
    freedom, error = len(values) - 1, max(stdev(values), 1e-9) / math.sqrt(len(values))
    p = 2 * float(student_t.sf(abs(fmean(values)) / error, freedom))
    return Difference(fmean(values), float(student_t.ppf(0.975, freedom)) * error, p, len(values))


class Comparison:
    """The runs of one data set, and the file they go to."""

    def __init__(
        self, name: str, task: Task, path: Path, *, teacher: str, arms: Sequence[str], workers: int
    ) -> None:
        self.name, self.task, self.path, self.workers = name, task, path, workers
        self.teacher = teacher
        self.arms = [*dict.fromkeys(each for arm in arms for each in _chain(arm))]
        self._unit = cache(lambda method: methods.balance(method, task))

    def tune(self) -> None:
        """The trials of every arm's weight."""
        arms = [arm for arm in self.arms if ARMS[arm].method]
        self._run(self._key("trial", arm, share, seed)
                  for arm in arms for share in SHARES for seed in TRIAL_SEEDS)  # fmt: skip

    def fill(self, margin: float) -> None:
        """The table's runs: ten seeds of every arm, then ten more of those that need them."""
        share = {arm: chosen(read_rows(self.path), self.name, arm) for arm in self.arms}
        for start in range(0, MOST, BLOCK):
            rows, seeds = read_rows(self.path), [*map(str, range(start, start + BLOCK))]
            arms = [arm for arm in self.arms if self._needs_more(rows, arm, margin, start)]
            self._run(self._key("table", arm, share[arm], seed)
                      for arm in arms if not ARMS[arm].against for seed in seeds)  # fmt: skip
            lacking = [(arm, seed) for arm in arms for seed in self._unpaired(rows, arm, seeds)]
            self._run([self._key("table", each, share[each], seed)
                       for arm, seed in lacking for each in (ARMS[arm].against, arm)],
                      own=True)  # fmt: skip

    def _unpaired(self, rows: list[Row], arm: str, seeds: Sequence[str]) -> list[str]:
        """The seeds without a pair of the arm and that behind it, by any teacher."""
        if not ARMS[arm].against:
            return []
        found = (by_pair(rows, self.name, each, "last_test") for each in (arm, ARMS[arm].against))
        paired = {seed for seed, _ in set.intersection(*map(set, found))}
        return [seed for seed in seeds if seed not in paired]

    def _needs_more(self, rows: list[Row], arm: str, margin: float, done: int) -> bool:
        """Judged on the first `done` seeds, so that a resumed comparison decides alike."""
        if not done or not ARMS[arm].against:
            return not done
        rows = [row for row in rows if row["part"] == "trial" or int(row["seed"]) < done]
        return difference(rows, self.name, arm).half_width > margin

    def _key(self, part: str, arm: str, share: str, seed: str) -> Key:
        return Key(self.name, part, arm, share, seed, self.teacher)

    def _run(self, keys: Iterable[Key], *, own: bool = False) -> None:
        """The runs that are missing, all of one part; not `own`: with any teacher."""
        done = {key_of(row) for row in read_rows(self.path)}
        if not own:
            done = {key._replace(teacher=self.teacher) for key in done}
        left = [key for key in dict.fromkeys(keys) if key not in done]
        if not left:
            return
        runs = train_all(
            [self._planned(key) for key in left], self.task, self.workers,
            test=left[0].part == "table",
        )  # fmt: skip
        for key, run in zip(left, runs, strict=True):
            append(self.path, key._asdict() | _figures(run))

    def _planned(self, key: Key) -> Run:
        arm, images = ARMS[key.arm], len(self.task.data.train[1])
        units = {name: self._unit(name) for name in {arm.method, "fitnet"}} if arm.method else {}
        options = methods.arguments(arm, float(key.share or 0), units, images)
        return Run(key.arm, options, int(key.seed), search=arm.search)


def _chain(arm: str) -> list[str]:
    """The arm behind that which it is compared with, behind that of the latter, and so on."""
    return [*_chain(ARMS[arm].against), arm] if arm else []


def _figures(run: Run) -> Row:
    figures = {"last_validation": f"{run.validation[-1]:.5f}"}
    figures |= {"best_epoch": str(run.best_epoch + 1), "cpu_seconds": f"{run.seconds:.1f}"}
    if run.test:
        last, best = run.test[len(run.validation) - 1], run.test[run.best_epoch]
        figures |= {"last_test": f"{last:.5f}", "best_test": f"{best:.5f}"}
    return figures | {name: f"{run.notes[name]:.4g}" for name in NOTES if name in run.notes}


def _teacher(data: DataSet, solver: Solver, folder: Path) -> tuple[Net, str]:
    """The teacher from the folder, or a new one and its line in runs.csv; and its name in a key."""
    teacher = train_teacher(data, "base", solver, folder / f"teacher-{data.name}.pt")
    scores = {f"last_{name}": f"{accuracy(teacher, getattr(data, name)):.5f}"
              for name in ("validation", "test")}  # fmt: skip
    key = Key(data.name, "table", "teacher", "", "0", "/".join(scores.values()))
    if key not in map(key_of, read_rows(folder / "runs.csv")):
        append(folder / "runs.csv", key._asdict() | scores)
    return teacher, key.teacher


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m examples.experiments.compare", description=__doc__)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add = parser.add_argument
    add("--dataset", nargs="+", choices=SOURCES, default=[*SOURCES])
    add("--arm", nargs="+", choices=ARMS, default=[*ARMS], help="with those they are compared with")
    add("--data", type=Path, default=FASHION, help="folder of Fashion-MNIST's idx files")
    add("--workers", type=at_least_one, default=CORES, help="runs at a time, one thread each")
    add("--save", type=Path, default=Path("out/compare"), help="folder of runs.csv")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if all runs are there, 2 with one line on stderr if a data set is missing."""
    options = _parser().parse_args(arguments)
    options.save.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # as the runs: the numbers do not depend on the machine's cores
    sources: dict[str, Callable[[], DataSet]] = dict(SOURCES)
    sources["fashion-mnist"] = partial(fashion_mnist, options.data)
    for name in options.dataset:
        setting = SETTINGS[name]
        try:
            data = sources[name]()
        except MissingData as error:
            print(f"compare: {error}", file=sys.stderr)
            return 2
        teacher, of = _teacher(data, setting.teacher, options.save)
        task = Task(data, teacher, predict(teacher, data.train[0]), "small", setting.student)
        comparison = Comparison(
            name, task, options.save / "runs.csv", teacher=of, arms=options.arm,
            workers=options.workers,
        )  # fmt: skip
        comparison.tune()
        comparison.fill(setting.margin)
    print(f"written: {options.save / 'runs.csv'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
