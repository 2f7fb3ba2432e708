"""The demo's two pictures: the learned policy over time, and test images with the areas that DAM finds."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import sokd
from sokd.demo.methods import METHODS
from sokd.demo.train import Run, Task, predict, restore
from sokd.inspect.pictures import policy_over_time as draw_policy
from sokd.kd.policy.plan import PAIRS

__all__ = ["areas", "policy_over_time"]


def policy_over_time(run: Run, task: Task, path: Path) -> None:
    """Write the policy's way in a run as a picture."""
    caption = f": {METHODS[run.job.method].label} on {task.data.name}, seed {run.job.seed}"
    draw_policy(run.policy, PAIRS, path, caption=caption)


def areas(run: Run, task: Task, path: Path, *, count: int = 6) -> None:
    """Write test images with the areas of teacher, student and both drawn on them."""
    method = restore(run, task)
    index = _pick(task, count)
    images, labels = (part[index] for part in task.data.test)
    guesses = predict(method.student, images)[0].argmax(1)
    names = task.data.class_names
    titles = [
        names[label] if label == guess else f"{names[label]}\n(student: {names[guess]})"
        for label, guess in zip(labels.tolist(), guesses.tolist(), strict=True)
    ]
    found = sokd.inspect.areas(method.distiller, images)
    caption = (
        f"{METHODS[run.job.method].label} on {task.data.name}, seed {run.job.seed}, last epoch"
    )
    paper = 1 - task.data.pixels(images)  # dark on white
    sokd.inspect.draw_areas(paper, found, path, titles=titles, caption=caption)


def _pick(task: Task, count: int) -> Tensor:
    """Indices of `count` test images, each of another class where there are enough."""
    labels = task.data.test[1]
    chosen = [
        int(torch.nonzero(labels == c)[0]) for c in range(task.data.classes) if (labels == c).any()
    ]
    step = max(1, len(chosen) // count)
    return torch.tensor(chosen[::step][:count])
