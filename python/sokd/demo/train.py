"""Training: the teacher once, then student runs, all with the same epochs, optimiser, schedule and seeds.

The images are not augmented, so the teacher, in eval mode, says the same of an image every time: its logits
and features of the training images are computed once and read from there. That is exact, no approximation.

Two cores serve two student runs at a time, one thread each: networks this small gain nothing from a second
thread. What a run computes does not depend on how many run beside it.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Empty
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

import sokd
from sokd.demo.data import DataSet, Part
from sokd.demo.methods import METHODS, Batch, Method
from sokd.demo.models import Net, Recorded, build_student, build_teacher
from sokd.inspect import Snapshot


@dataclass(frozen=True)
class Solver:
    """SGD with Nesterov momentum under one cycle (warm-up over 15 % of the steps, then cosine to zero)."""

    epochs: int = 10
    batch: int = 64
    lr: float = (
        0.8  # chosen for the student alone (1.2 does as well), see tune.py; serves all methods
    )
    momentum: float = 0.9
    weight_decay: float = 5e-4


@dataclass(frozen=True)
class Task:
    """All that a student run needs but the method and the seed. `teacher` is in eval mode and frozen."""

    data: DataSet
    teacher: Net
    student: str  # a key of models.STUDENTS
    solver: Solver
    logits: Tensor  # the teacher's, of the training images [N, classes]
    features: Tensor  # [N, C, H, W]

    def recorded(self) -> Recorded:
        """The teacher for a student run."""
        return Recorded(self.teacher, self.data.train[0], self.logits, self.features)


@dataclass(frozen=True)
class Job:
    """One student run. `weights` and `lr` override the chosen ones: that is how they are chosen."""

    method: str
    seed: int
    weights: dict[str, float] | None = None
    lr: float | None = None
    test: bool = True  # False while choosing: then the test part is not looked at


@dataclass
class Run:
    """What came of a job. Accuracies in [0, 1]; "best" is the epoch with the best *validation* accuracy."""

    job: Job
    validation: list[float] = field(default_factory=list)  # after each epoch
    test: list[float | None] = field(
        default_factory=list
    )  # at a best validation so far, and at the last
    seconds: float = 0.0  # training and search; without the evaluations
    policy: list[Snapshot] = field(default_factory=list)
    state: dict[str, Tensor] = field(
        default_factory=dict
    )  # the Distiller's state_dict at the last epoch
    notes: dict[str, float] = field(
        default_factory=dict
    )  # the method's own figures at the last epoch

    @property
    def best_epoch(self) -> int:
        """Index of the epoch with the best validation accuracy, the first of equals."""
        return max(range(len(self.validation)), key=lambda i: (self.validation[i], -i))

    @property
    def last(self) -> float:
        return self._at(-1)

    @property
    def best(self) -> float:
        return self._at(self.best_epoch)

    def _at(self, epoch: int) -> float:
        found = self.test[epoch]
        assert found is not None, (
            "the test part is looked at whenever the validation is at its best"
        )
        return found


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """`count` threads for PyTorch inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def predict(model: Net, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and features of any number of images, in eval mode, without gradients."""
    training = model.training
    model.eval()
    with torch.no_grad():
        parts = [model(images[start : start + 500]) for start in range(0, len(images), 500)]
    model.train(training)
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def accuracy(model: Net, part: Part) -> float:
    """Share of a part's images that the model gets right."""
    images, labels = part
    return (predict(model, images)[0].argmax(1) == labels).float().mean().item()


def batches(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Shuffled indices in equal batches; the remainder is left out, so BatchNorm never sees a tiny batch."""
    size = min(size, count)
    shuffled = torch.randperm(count, generator=generator)[: count // size * size]
    return shuffled.view(-1, size).unbind()


def optimiser_for(
    parameters: Sequence[nn.Parameter], solver: Solver, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimiser = torch.optim.SGD(
        parameters,
        lr=solver.lr,
        momentum=solver.momentum,
        weight_decay=solver.weight_decay,
        nesterov=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, solver.lr, total_steps=steps, pct_start=0.15, cycle_momentum=False
    )
    return optimiser, schedule


def train_teacher(
    data: DataSet, size: str, solver: Solver, *, seed: int = 0, quiet: bool = False
) -> Net:
    """A teacher trained on the training part by cross entropy, in eval mode and frozen."""
    torch.manual_seed(seed)
    teacher = build_teacher(size, classes=data.classes, image_side=data.side)
    images, labels = data.train
    order = torch.Generator().manual_seed(seed)
    per_epoch = len(batches(len(labels), solver.batch, order))
    optimiser, schedule = optimiser_for(
        list(teacher.parameters()), solver, solver.epochs * per_epoch
    )
    bar = tqdm(range(solver.epochs), desc=f"teacher {size}", unit="epoch", disable=quiet or None)
    for _ in bar:
        teacher.train()
        for index in batches(len(labels), solver.batch, order):
            loss = F.cross_entropy(teacher(images[index])[0], labels[index])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
        bar.set_postfix_str(f"validation {accuracy(teacher, data.validation):.1%}")
    return teacher.requires_grad_(False).eval()


def prepare(data: DataSet, teacher: Net, student: str, solver: Solver) -> Task:
    """The task of all student runs, the teacher's word on the training images included."""
    logits, features = predict(teacher, data.train[0])
    return Task(data, teacher, student, solver, logits, features.contiguous())


def run(job: Job, task: Task, tick: Callable[[str], None] = lambda _: None) -> Run:
    """Train one student. `tick(text)` is called after each epoch."""
    solver = task.solver if job.lr is None else replace(task.solver, lr=job.lr)
    per_epoch = len(task.data.train[1]) // min(solver.batch, len(task.data.train[1]))
    steps = solver.epochs * per_epoch
    method = _method(job, task, steps=steps, epochs=solver.epochs)
    optimiser, schedule = optimiser_for(list(method.distiller.parameters()), solver, steps)
    order = torch.Generator().manual_seed(job.seed)  # the same batches for every method
    result = Run(job)
    for epoch in range(1, solver.epochs + 1):
        started = time.process_time()  # of the processor: what else the machine does is left out
        _train_epoch(method, task, solver, optimiser, schedule, order)
        result.seconds += time.process_time() - started
        result.validation.append(accuracy(method.student, task.data.validation))
        if job.test:
            wanted = epoch == solver.epochs or result.best_epoch == epoch - 1
            result.test.append(accuracy(method.student, task.data.test) if wanted else None)
        tick(f"{job.method} seed {job.seed}: validation {result.validation[-1]:.1%}")
    result.state = {name: tensor.clone() for name, tensor in method.distiller.state_dict().items()}
    result.policy, result.notes = method.way, method.notes()
    return result


def _method(job: Job, task: Task, *, steps: int, epochs: int) -> Method:
    recipe = METHODS[job.method]
    weights = dict(recipe.weights if job.weights is None else job.weights)
    if "share" in weights:
        weights["weight"] = weights.pop("share") * balance(job.method, task)
    torch.manual_seed(job.seed)  # the same first weights for every method
    student = build_student(task.student, classes=task.data.classes, image_side=task.data.side)
    sokd.manual_seed(job.seed)
    return Method(recipe, student, task.recorded(), weights, steps=steps, epochs=epochs)


def balance(name: str, task: Task, *, seed: int = 100, count: int = 256) -> float:
    """The weight with which a method's gradient is as long as the cross entropy's, for a fresh student.

    Gradients of the student's own parameters on the first `count` training images, without SoKD. Methods'
    values differ by orders of magnitude; in units of this weight one grid of trials serves all of them.
    """
    recipe = replace(METHODS[name], plug=None)
    torch.manual_seed(seed)
    sokd.manual_seed(seed)
    student = build_student(task.student, classes=task.data.classes, image_side=task.data.side)
    teacher = task.recorded()
    method = Method(recipe, student, teacher, {"weight": 1.0}, steps=1, epochs=1)
    teacher.rows = torch.arange(min(count, teacher.count))
    images, labels = (part[teacher.rows] for part in task.data.train)
    _, losses = method.distiller(images, labels, index=teacher.rows)
    own, added = (_length(losses[key], student) for key in ("loss_ce", f"loss_{recipe.method}"))
    return own / added


def _length(loss: Tensor, student: nn.Module) -> float:
    parts = torch.autograd.grad(
        loss, list(student.parameters()), retain_graph=True, allow_unused=True
    )
    return math.sqrt(sum(part.square().sum().item() for part in parts if part is not None))


def restore(result: Run, task: Task) -> Method:
    """The method of a finished run as it was at its last epoch, in eval mode; its teacher is asked."""
    method = _method(result.job, task, steps=1, epochs=1)
    method.distiller.load_state_dict(result.state)
    method.teacher.rows = None
    method.distiller.eval()
    return method


def _train_epoch(
    method: Method,
    task: Task,
    solver: Solver,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    order: torch.Generator,
) -> None:
    images, labels = task.data.train
    method.distiller.train()
    for rows in batches(len(labels), solver.batch, order):
        loss = method.loss(Batch(images[rows], labels[rows], rows))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    method.end_epoch()


# -- many runs, several at a time ---------------------------------------------------------------------------

_worker: dict[str, Any] = {}


def _start_worker(path: str, ticks: Any) -> None:
    torch.set_num_threads(1)
    _worker["task"] = torch.load(
        path, weights_only=False
    )  # written by this very program a moment ago
    _worker["ticks"] = ticks


def _work(job: Job) -> Run:
    return run(job, _worker["task"], _worker["ticks"].put)


def run_all(
    jobs: Sequence[Job], task: Task, *, workers: int, folder: Path, quiet: bool = False,
    keep: Callable[[Run], None] = lambda _: None,
) -> list[Run]:  # fmt: skip
    """All jobs in their order, `workers` at a time, under one progress bar that counts epochs.

    `keep` is called with each run when it is done, in any order.
    """
    total = len(jobs) * task.solver.epochs
    with tqdm(
        total=total, desc=f"{len(jobs)} student runs", unit="epoch", disable=quiet or None
    ) as bar:

        def tick(text: str) -> None:
            bar.set_postfix_str(text, refresh=False)
            bar.update()

        if workers <= 1 or len(jobs) == 1:
            with threads(1):
                return [_kept(run(job, task, tick), keep) for job in jobs]
        return _run_side_by_side(jobs, task, min(workers, len(jobs)), folder, tick, keep)


def _kept(done: Run, keep: Callable[[Run], None]) -> Run:
    keep(done)
    return done


def _run_side_by_side(
    jobs: Sequence[Job], task: Task, workers: int, folder: Path, tick: Callable[[str], None],
    keep: Callable[[Run], None],
) -> list[Run]:  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "task.pt"
    torch.save(task, path)
    spawn = multiprocessing.get_context("spawn")  # a forked PyTorch may hang in its thread pool
    try:
        with spawn.Manager() as manager:
            ticks = manager.Queue()
            with ProcessPoolExecutor(workers, spawn, _start_worker, (str(path), ticks)) as pool:
                futures: list[Future[Run]] = [pool.submit(_work, job) for job in jobs]
                waiting = list(futures)
                while waiting:
                    with contextlib.suppress(Empty):
                        tick(ticks.get(timeout=0.2))
                    for future in [future for future in waiting if future.done()]:
                        waiting.remove(future)
                        keep(future.result())
                while not ticks.empty():
                    tick(ticks.get())
                return [future.result() for future in futures]
    finally:
        path.unlink()
