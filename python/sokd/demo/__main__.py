"""`python -m sokd.demo`: train a teacher, distil students, print one table, draw two pictures."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

import torch

import sokd
from sokd.demo.data import DataSet, MissingData, animal_mnist
from sokd.demo.networks import STUDENTS, TEACHERS, accuracy, predict
from sokd.demo.train import METHODS, Run, Solver, Task, build, train_all, train_teacher

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
HEADER = ("method", "last epoch, test %", "best epoch, test %", "runs", "seconds a run")


def demo(data: DataSet, options: argparse.Namespace) -> list[Run]:
    """Train, print, write, draw; returns the runs."""
    folder, name = options.save, f"teacher-{data.name}-{options.teacher}-{options.teacher_epochs}"
    print(data.name, [len(part[1]) for part in data[1:4]], "images to train, validate and test")
    solver = Solver(options.teacher_epochs, lr=0.4)
    teacher = train_teacher(data, options.teacher, solver, folder / f"{name}.pt")
    outputs, seeds = predict(teacher, data.train[0]), range(options.seeds)
    task = Task(data, teacher, outputs, options.student, Solver(options.epochs))
    runs = [Run(name, METHODS[name], seed) for name in options.method for seed in seeds]
    runs = [*train_all(runs[::-1], task, options.workers)][::-1]  # the costliest first
    rows = [figures(run) for run in runs]
    with (folder / "runs.csv").open("w", newline="") as file:
        columns = dict.fromkeys(name for row in rows for name in row)
        out = csv.DictWriter(file, [*columns], restval="", lineterminator="\n")
        out.writeheader()
        out.writerows(rows)
    draw(runs, task, folder)
    for line in (HEADER, ("teacher", f"{100 * accuracy(teacher, data.test):.2f}"), *table(rows)):
        print("".join(f"{cell:>20}" for cell in line))
    print("mean ± standard deviation over the seeds; best epoch: by validation accuracy; one core\n"
          f"written to {folder}: the runs and the pictures")  # fmt: skip
    return runs


def figures(run: Run) -> dict[str, str]:
    """A line of runs.csv."""
    last, best = run.test[len(run.validation) - 1], run.test[run.best_epoch]
    found = {"method": run.name, "seed": str(run.seed), "last_test": f"{last:.5f}"}
    found |= {"best_test": f"{best:.5f}", "best_epoch": str(run.best_epoch + 1)}
    found |= {"last_validation": f"{run.validation[-1]:.5f}", "seconds": f"{run.seconds:.2f}"}
    return found | {name: f"{value:.5g}" for name, value in run.notes.items()}


def table(rows: Sequence[Mapping[str, str]]) -> list[tuple[str, ...]]:
    """The cells of the table, a line for each method in the lines of runs.csv."""
    found: list[tuple[str, ...]] = []
    for name in dict.fromkeys(row["method"] for row in rows):
        group = [row for row in rows if row["method"] == name]
        columns = ("last_test", "best_test", "seconds")
        last, best, seconds = ([float(row[key]) for row in group] for key in columns)
        found.append((name, spread(last), spread(best), f"{len(group)}", f"{fmean(seconds):.1f}"))
    return found


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation of accuracies, in %."""
    return f"{100 * fmean(values):.2f}" + (f" ± {100 * stdev(values):.2f}" if values[1:] else "")


def draw(runs: Sequence[Run], task: Task, folder: Path) -> None:
    """The policy over time and the areas on test images, of the last method that has them."""
    for run in [run for run in runs if run.seed == 0]:
        distiller, caption = build(run, task), f"{run.name} on {task.data.name}, seed 0"
        distiller.load_state_dict(run.state)
        distiller.eval().teacher.rows = None  # type: ignore[assignment]
        if run.policy:
            trajectory = sokd.inspect.Trajectory(distiller)
            trajectory.snapshots = run.policy
            trajectory.draw(folder / "policy_over_time.png", caption=f": {caption}")
        if distiller.kd is not None and distiller.kd.dam is not None:
            draw_areas(distiller, task.data, folder / "areas.png", f"{caption}, last epoch")


def draw_areas(distiller: sokd.Distiller, data: DataSet, path: Path, caption: str) -> None:
    """Test images of the first classes with the areas of teacher, student and both."""
    labels, names = data.test[1], data.class_names
    index = torch.tensor([labels.tolist().index(label) for label in range(len(names))][:6])
    images, guesses = data.test[0][index], predict(distiller.student, data.test[0][index])[0]
    pairs = zip(labels[index].tolist(), guesses.argmax(1).tolist(), strict=True)
    titles = [names[x] if x == y else f"{names[x]}\n(student: {names[y]})" for x, y in pairs]
    paper = 1 - (images * data.std + data.mean).clamp(0, 1)  # dark on white
    found = sokd.inspect.areas(distiller, images)
    sokd.inspect.draw_areas(paper, found, path, titles=titles, caption=caption)


def at_least_one(text: str) -> int:
    """The number of an option, 1 or more."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; 2, and one line on stderr, if a package is missing."""
    parser = argparse.ArgumentParser("python -m sokd.demo", description=__doc__)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add = parser.add_argument
    add("--method", choices=METHODS, nargs="+", default=[*METHODS], help="what to compare")
    add("--seeds", type=at_least_one, default=3, help="runs of each method, with seeds 0, 1, ...")
    add("--epochs", type=at_least_one, default=10, help="of every student run")
    add("--teacher", choices=TEACHERS, default="base", help="size of the teacher")
    add("--teacher-epochs", type=at_least_one, default=8, help="of the teacher")
    add("--student", choices=STUDENTS, default="small", help="size of the students")
    add("--workers", type=at_least_one, default=CORES, help="student runs at a time, a thread each")
    add("--save", type=Path, default=Path("out/demo"), help="folder for all that is written")
    options = parser.parse_args(arguments)
    try:
        options.save.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --save: {error}")
    try:
        if importlib.util.find_spec("matplotlib") is None:
            raise MissingData("package matplotlib must be installed: pip install matplotlib")
        demo(animal_mnist(), options)
    except MissingData as error:
        print(f"sokd.demo: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
