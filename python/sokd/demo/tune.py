"""Choosing loss weights: as many trials for every method, on the validation part, never on the test part.

A trial is the mean validation accuracy at the last epoch over `SEEDS`, which are not those of the table. What
was tried and what came of it goes to tune.csv; the winners are written by hand into `methods.METHODS`.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sokd.demo.methods import METHODS
from sokd.demo.train import Job, Run, Task, run_all

SEEDS = (100, 101)


@dataclass(frozen=True)
class Trial:
    """One setting of one method; accuracies in per cent on the validation part, last epoch."""

    method: str
    setting: dict[str, float]
    accuracies: tuple[float, ...]
    seconds: float

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def words(self) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in self.setting.items())


def trials(methods: Sequence[str], task: Task, *, workers: int, folder: Path) -> list[Trial]:
    """Run every trial of the methods."""
    planned = [(method, setting) for method in methods for setting in METHODS[method].trials]
    jobs = [_job(method, setting, seed) for method, setting in planned for seed in SEEDS]
    runs = run_all(jobs, task, workers=workers, folder=folder)
    grouped = [runs[i : i + len(SEEDS)] for i in range(0, len(runs), len(SEEDS))]
    return [
        _trial(method, setting, group)
        for (method, setting), group in zip(planned, grouped, strict=True)
    ]


def _job(method: str, setting: dict[str, float], seed: int) -> Job:
    weights = {name: value for name, value in setting.items() if name != "lr"}
    return Job(method, seed, weights=weights or None, lr=setting.get("lr"), test=False)


def _trial(method: str, setting: dict[str, float], group: Sequence[Run]) -> Trial:
    accuracies = tuple(100 * run.validation[-1] for run in group)
    return Trial(method, setting, accuracies, statistics.fmean(run.seconds for run in group))


def best_of(done: Sequence[Trial]) -> dict[str, Trial]:
    """The best trial of each method; the first of equals."""
    best: dict[str, Trial] = {}
    for trial in done:
        if trial.method not in best or trial.mean > best[trial.method].mean:
            best[trial.method] = trial
    return best


def format_trials(done: Sequence[Trial]) -> str:
    """All trials as text, the best of each method marked."""
    best = best_of(done)
    width = max(len(trial.words) for trial in done)
    lines = [
        f"{trial.method:12}  {trial.words:{width}}  {trial.mean:6.2f}  {trial.seconds:6.1f} s"
        f"{'  <- best' if trial is best[trial.method] else ''}"
        for trial in done
    ]
    what = f"validation %, last epoch, mean of {len(SEEDS)} seeds; seconds a run"
    head = f"{'method':12}  {'setting':{width}}  {what}"
    return "\n".join([head, *lines])


def write_trials(done: Sequence[Trial], path: Path) -> None:
    """All trials as CSV."""
    best = best_of(done)
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        seeds = [f"seed_{seed}" for seed in SEEDS]
        out.writerow(("method", "setting", "validation_mean", *seeds, "seconds_a_run", "best"))
        for trial in done:
            each = [f"{a:.3f}" for a in trial.accuracies]
            chosen = "yes" if trial is best[trial.method] else ""
            seconds = f"{trial.seconds:.2f}"
            out.writerow((trial.method, trial.words, f"{trial.mean:.3f}", *each, seconds, chosen))
