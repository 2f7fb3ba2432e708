"""A made-up data set, and student runs in this process: what the tests of the demo start from."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sokd.demo.data import DataSet, from_arrays
from sokd.demo.networks import predict
from sokd.demo.train import Run, Solver, Task, train, train_teacher


def synthetic(*, count: int = 240, side: int = 24, classes: int = 3, seed: int = 0) -> DataSet:
    """A bright bar at a place that depends on the class, plus noise; half of it trains."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    images = rng.integers(0, 90, (count, side, side))
    for i, label in enumerate(labels):
        row = int(label) * side // classes
        images[i, row : row + max(1, side // classes - 1), rng.integers(0, side // 2) :] += 150
    names = tuple(f"bar {i}" for i in range(classes))
    return from_arrays("synthetic", (images, labels), (count // 2, count // 4), names)


def small_task(data: DataSet, solver: Solver, folder: Path) -> Task:
    """The smallest networks, the teacher trained as long as the students."""
    teacher = train_teacher(data, "tiny", solver, folder / "teacher.pt")
    return Task(data, teacher, predict(teacher, data.train[0]), "tiny", solver)


def in_process(
    runs: Sequence[Run], task: Task, workers: int, *, test: bool = True
) -> Iterator[Run]:
    """Replaces `train_all` and starts no processes."""
    return (train(run, task, test=test) for run in runs)


def state_of(run: Run) -> dict[str, Any]:
    return {name: value.tolist() for name, value in run.state.items()}
