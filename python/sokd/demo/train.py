"""Training: the teacher once, then the student runs, in processes of one thread each.

Runs with one seed start from the same weights and use the same batches, however many run at once.
"""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sokd
from sokd.demo.data import DataSet
from sokd.demo.networks import Net, Recorded, accuracy, build_student, build_teacher

# Adam moves the policy by rate times steps; the paper's 3e-4 belongs to some 16,000 search steps.
POLICY_LR = 2e-2
SEARCH_EVERY = 4  # training steps; one second-order search step costs about four of them

# Arguments of `sokd.Distiller`, the weights chosen on the validation part (docs/results.md).
WEIGHTS = {"lambda_base": 2.0, "lambda_areas": 0.4, "lambda_agreement": 0.2}
METHODS: dict[str, Mapping[str, Any]] = {
    "student": {"method": None, "sokd": False},
    "kd": {"method": {"kd": 0.2}, "sokd": False},
    "fitnet": {"method": {"fitnet": 2.0}, "sokd": False},
    "fitnet-dafa": {"method": None, "sokd": {**WEIGHTS, "dam": None}},
    "fitnet-dam": {"method": None, "sokd": {**WEIGHTS, "policy": None, "search": None}},
    "sokd": {"method": None, "sokd": WEIGHTS},
}


class Solver(NamedTuple):
    """SGD with Nesterov momentum and one cycle: warm-up for 15 % of the steps, cosine to zero."""

    epochs: int = 10
    batch: int = 64
    lr: float = 0.8  # chosen for the student alone, used for all methods


class Task(NamedTuple):
    """The inputs of all student runs."""

    data: DataSet
    teacher: Net  # frozen, in eval mode
    outputs: tuple[Tensor, Tensor]  # the teacher's on the training images
    student: str  # a key of networks.STUDENTS
    solver: Solver


@dataclass
class Run:
    """One student run: its settings, then its results (accuracies in [0, 1])."""

    name: str
    method: Mapping[str, Any]
    seed: int
    validation: list[float] = field(default_factory=list)  # after each epoch
    test: dict[int, float] = field(default_factory=dict)  # after the last and the best so far
    seconds: float = 0.0  # processor time of training and search
    policy: list[sokd.inspect.Snapshot] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)  # of the Distiller, at the end
    notes: dict[str, float] = field(default_factory=dict)  # weight and diagnostics, at the end
    search: bool = False  # whether a second-order `sokd.PolicySearch` runs during the training

    @property
    def best_epoch(self) -> int:
        """The index of the epoch with the best validation accuracy, the first of equals."""
        return max(range(len(self.validation)), key=lambda i: (self.validation[i], -i))


def fit(
    parameters: Iterable[nn.Parameter], loss_of: Callable[[Tensor], Tensor], count: int,
    solver: Solver, order: torch.Generator,
) -> Iterator[int]:  # fmt: skip
    """Minimise `loss_of(rows)` over shuffled batches of `count` images; yields after each epoch."""
    epochs, size, lr = solver.epochs, min(solver.batch, count), solver.lr
    per_epoch = count // size
    sgd = torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        sgd, lr, epochs * per_epoch, pct_start=0.15, cycle_momentum=False
    )
    for epoch in range(epochs):
        for rows in torch.randperm(count, generator=order)[: per_epoch * size].view(-1, size):
            loss = loss_of(rows)
            sgd.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            sgd.step()
            schedule.step()
        yield epoch


def train_teacher(data: DataSet, size: str, solver: Solver, path: Path) -> Net:
    """A frozen teacher in eval mode: loaded from the file if it exists, else trained and saved."""
    torch.manual_seed(0)
    teacher, (images, labels) = build_teacher(size, data), data.train
    order = torch.Generator().manual_seed(0)
    torch.randperm(len(labels), generator=order)  # as when the published numbers were made

    def loss_of(rows: Tensor) -> Tensor:
        return F.cross_entropy(teacher(images[rows])[0], labels[rows])

    if not path.exists():
        print("the teacher is trained once", flush=True)
        for epoch in fit(teacher.parameters(), loss_of, len(labels), solver, order):
            score = accuracy(teacher, data.validation)
            print(f"teacher, epoch {epoch + 1}: validation {score:.2%}", flush=True)
        torch.save(teacher.state_dict(), unfinished := path.with_suffix(".part"))
        unfinished.replace(path)
    teacher.load_state_dict(torch.load(path, weights_only=True))
    return teacher.requires_grad_(False).eval()


def build(run: Run, task: Task) -> sokd.Distiller:
    """The run's Distiller before training; its teacher is a `Recorded`."""
    torch.manual_seed(run.seed)  # the same first weights for every method
    student = build_student(task.student, task.data)
    sokd.manual_seed(run.seed)
    teacher = Recorded(task.teacher, task.outputs)
    teacher.rows = torch.arange(2)
    example = task.data.train[0][teacher.rows]
    return sokd.Distiller(student, teacher, layers={"body": "body"}, example=example, **run.method)


def train(run: Run, task: Task, *, test: bool = True) -> Run:
    """Train the run's student; evaluate it after every epoch, on the test part if `test`."""
    distiller, step, (images, labels) = build(run, task), itertools.count(), task.data.train
    kd, student = distiller.kd, distiller.student
    trajectory = search = None
    if kd is not None and kd.policy is not None:
        trajectory = sokd.inspect.Trajectory(kd)
        run.policy = trajectory.snapshots
    if kd is not None and run.search:
        search = sokd.PolicySearch(kd, student, lr=POLICY_LR, epochs=task.solver.epochs)

    def loss_of(rows: Tensor) -> Tensor:
        distiller.teacher.rows, batch, now = rows, (images[rows], labels[rows]), next(step)
        if trajectory is not None and now % SEARCH_EVERY == 0:
            if search is not None:
                search.step(distiller.step, batch)
            trajectory.record(now)
        return torch.stack([*distiller(*batch, index=rows)[1].values()]).sum()

    started, order = time.process_time(), torch.Generator().manual_seed(run.seed)
    for epoch in fit(distiller.train().parameters(), loss_of, len(labels), task.solver, order):
        if search is not None:
            search.end_epoch()
        run.seconds += time.process_time() - started
        run.validation.append(accuracy(student, task.data.validation))
        if test and epoch in (run.best_epoch, task.solver.epochs - 1):
            run.test[epoch] = accuracy(student, task.data.test)
        started = time.process_time()
    run.state = {name: value.clone() for name, value in distiller.state_dict().items()}
    run.notes = {"weight": sum(distiller.weights.values())} if distiller.weights else {}
    run.notes |= {} if kd is None else {name: v.item() for name, v in kd.diagnostics().items()}
    return run


def _work(task: bytes, test: bool, run: Run) -> Run:
    torch.set_num_threads(1)
    return train(run, pickle.loads(task), test=test)


def train_all(runs: Sequence[Run], task: Task, workers: int, *, test: bool = True) -> Iterator[Run]:
    """Train the runs in their order, `workers` at a time, and yield each when it is done."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for run in pool.map(partial(_work, pickle.dumps(task), test), runs):
            print(f"{run.name}, seed {run.seed}: validation {run.validation[-1]:.2%}", flush=True)
            yield run
