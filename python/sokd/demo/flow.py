"""What `python -m sokd.demo` does, from the data to the pictures."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from sokd.demo import pictures, tune
from sokd.demo.data import DataSet
from sokd.demo.methods import METHODS
from sokd.demo.models import Net, build_student, parameter_count, saved_teacher
from sokd.demo.table import format_table, summarise, write_runs, write_table
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

TEACHER_LR = 0.4


def demo(data: DataSet, options: argparse.Namespace) -> list[Run]:
    """Teacher, students, table and pictures; with `options.tune` the trials instead. Returns the runs."""
    started = time.perf_counter()
    folder: Path = options.save
    folder.mkdir(parents=True, exist_ok=True)
    print(_about(data), flush=True)
    with threads(cores()):
        teacher = _teacher(data, options, folder)
        task = prepare(data, teacher, options.student, Solver(epochs=options.epochs))
    test = accuracy(teacher, data.test)
    student = build_student(options.student, classes=data.classes, image_side=data.side)
    print(f"teacher {options.teacher}: {parameter_count(teacher):,} parameters, {test:.2%} on the test part; "
          f"student {options.student}: {parameter_count(student):,} parameters", flush=True)  # fmt: skip
    workers = options.workers or cores()
    if options.tune:
        _tune(task, options, workers, folder)
        return []
    # the costliest methods first: then no core waits long for the last one
    jobs = [
        Job(method, seed) for method in reversed(options.method) for seed in range(options.seeds)
    ]
    runs = run_all(jobs, task, workers=workers, folder=folder)
    runs.sort(key=lambda run: (options.method.index(run.job.method), run.job.seed))
    _report(runs, task, test, folder)
    print(f"all together: {time.perf_counter() - started:.0f} s, {workers} runs at a time")
    return runs


def _about(data: DataSet) -> str:
    parts = ", ".join(
        f"{len(part[1]):,} {name}"
        for name, part in (
            ("train", data.train),
            ("validation", data.validation),
            ("test", data.test),
        )
    )
    return f"{data.name}: {parts}; {data.duplicates} duplicates dropped before the split; {data.classes} classes"


def _teacher(data: DataSet, options: argparse.Namespace, folder: Path) -> Net:
    """The teacher from the folder, if one of this kind is there, else a new one."""
    path = folder / f"teacher-{data.name}-{options.teacher}-{options.teacher_epochs}.pt"
    saved = saved_teacher(path, options.teacher, classes=data.classes, image_side=data.side)
    if saved is not None:
        print(f"teacher: reused from {path}", flush=True)
        return saved
    teacher = train_teacher(
        data, options.teacher, Solver(epochs=options.teacher_epochs, lr=TEACHER_LR)
    )
    torch.save(teacher.state_dict(), path)
    return teacher


def _tune(task: Task, options: argparse.Namespace, workers: int, folder: Path) -> None:
    done = tune.trials(options.method, task, workers=workers, folder=folder)
    tune.write_trials(done, folder / "tune.csv")
    print(tune.format_trials(done))
    print(f"written: {folder / 'tune.csv'}")


def _report(runs: list[Run], task: Task, teacher: float, folder: Path) -> None:
    """Print the table, write it and the pictures."""
    rows = summarise(runs)
    print(format_table(rows, teacher=teacher))
    written = [folder / "table.csv", folder / "runs.csv"]
    write_table(rows, written[0])
    write_runs(runs, written[1])
    for run in reversed(runs):  # SoKD comes last, DAFA alone before it
        if run.policy and run.job.seed == 0:
            written.append(folder / "policy_over_time.png")
            pictures.policy_over_time(run, task, written[-1])
            break
    for run in reversed(runs):
        if METHODS[run.job.method].masked and run.job.seed == 0:
            written.append(folder / "areas.png")
            pictures.areas(run, task, written[-1])
            break
    print("written: " + ", ".join(str(path) for path in written))
