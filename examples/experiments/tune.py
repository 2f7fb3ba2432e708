"""`python -m examples.experiments.tune`: the trials behind the demo's weights; writes tune.csv.

Five settings of every method, each judged by the mean validation accuracy at the last epoch over
`SEEDS`, which are not those of the table. The test part is not used. The best settings are written
by hand into `sokd.demo.train.METHODS`.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from sokd.demo.__main__ import CORES, at_least_one
from sokd.demo.data import animal_mnist
from sokd.demo.networks import predict
from sokd.demo.train import METHODS, WEIGHTS, Run, Solver, Task, train_all, train_teacher

SEEDS = (100, 101)


def _each(name: str, *values: float) -> tuple[dict[str, float], ...]:
    return tuple({name: value} for value in values)


TRIALS = {
    "student": _each("lr", 0.2, 0.4, 0.8, 1.2, 1.6),
    "kd": _each("weight", 0.1, 0.2, 0.3, 0.5, 1.0),
    "fitnet": _each("weight", 0.3, 0.5, 1.0, 2.0, 3.0),
    "fitnet-dafa": _each("scale", 0.2, 0.5, 1.0, 1.5, 2.0),
    "fitnet-dam": _each("scale", 0.2, 0.5, 1.0, 1.5, 2.0),
    "sokd": _each("scale", 0.2, 0.5, 1.0, 1.5, 2.0),
}


class Trial(NamedTuple):
    """One setting of one method; accuracies in [0, 1], one for each seed."""

    method: str
    setting: dict[str, float]
    accuracies: list[float]
    seconds: float


def arguments(method: str, setting: dict[str, float]) -> dict[str, Any]:
    """The method's arguments of `sokd.Distiller` with the setting in place of the chosen one."""
    found = dict(METHODS[method])
    if "weight" in setting:
        found["method"] = {method: setting["weight"]}
    if found["sokd"]:
        weights = {name: setting["scale"] * weight for name, weight in WEIGHTS.items()}
        found["sokd"] = {**found["sokd"], **weights}
    return found


def trials(methods: Sequence[str], task: Task, workers: int) -> list[Trial]:
    """Run every trial of the methods."""
    found = []
    for method in methods:
        for setting in TRIALS[method]:
            solver = task.solver._replace(lr=setting.get("lr", task.solver.lr))
            runs = [Run(method, arguments(method, setting), seed) for seed in SEEDS]
            done = list(train_all(runs, task._replace(solver=solver), workers, test=False))
            accuracies = [run.validation[-1] for run in done]
            found.append(Trial(method, setting, accuracies, fmean(run.seconds for run in done)))
    return found


def best_of(done: Sequence[Trial]) -> dict[str, Trial]:
    """The best trial of each method, the first of equals."""
    best: dict[str, Trial] = {}
    for trial in done:
        before = best.setdefault(trial.method, trial)
        if fmean(trial.accuracies) > fmean(before.accuracies):
            best[trial.method] = trial
    return best


def write(done: Sequence[Trial], path: Path) -> None:
    """All trials as CSV, accuracies in %, the best of each method marked."""
    best = best_of(done)
    with path.open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        seeds = [f"seed_{seed}" for seed in SEEDS]
        out.writerow(("method", "setting", "validation_mean", *seeds, "seconds_a_run", "best"))
        for trial in done:
            setting = ", ".join(f"{name} {value:g}" for name, value in trial.setting.items())
            mean, *each = (
                f"{100 * value:.3f}" for value in (fmean(trial.accuracies), *trial.accuracies)
            )
            chosen = "yes" if trial is best[trial.method] else ""
            out.writerow((trial.method, setting, mean, *each, f"{trial.seconds:.2f}", chosen))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m examples.experiments.tune", description=__doc__)
    parser.add_argument("--method", choices=TRIALS, nargs="+", default=[*TRIALS])
    parser.add_argument("--workers", type=at_least_one, default=CORES, help="runs at a time")
    parser.add_argument("--save", type=Path, default=Path("out/tune"), help="folder of tune.csv")
    options = parser.parse_args(arguments)
    options.save.mkdir(parents=True, exist_ok=True)
    data = animal_mnist()
    path = options.save / f"teacher-{data.name}-base-8.pt"  # the demo's
    teacher = train_teacher(data, "base", Solver(8, lr=0.4), path)
    task = Task(data, teacher, predict(teacher, data.train[0]), "small", Solver())
    write(trials(options.method, task, options.workers), options.save / "tune.csv")
    print((options.save / "tune.csv").read_text())


if __name__ == "__main__":
    main()
