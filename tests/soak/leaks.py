"""Resident memory over many steps of `sokd.loss`, a Distiller and a search: slope
after a warm-up."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import sokd

_PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    """Bytes of this process in memory (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * _PAGE


def slope(step: Callable[[], None], steps: int) -> dict[str, Any]:
    """Bytes a step by least squares, after a tenth of the steps; fewer steps after Ctrl-C."""
    readings, done = [], 0
    with contextlib.suppress(KeyboardInterrupt):
        for index in range(steps):
            step()
            done += 1
            if index >= steps // 10 and index % max(steps // 50, 1) == 0:
                gc.collect()
                readings.append((float(index), float(resident())))
    if len(readings) < 3:
        return {"steps": done, "bytes a step": "too few readings"}
    x, y = torch.tensor(readings, dtype=torch.float64).unbind(1)
    x, y = x - x.mean(), y - y.mean()
    return {"steps": done, "bytes a step": round(float((x * y).sum() / (x * x).sum()), 2)}


def loss_step() -> Callable[[], None]:
    kd = sokd.SoKD(4, 6)
    optimizer = torch.optim.SGD(kd.parameters(), lr=1e-4)
    f_s, f_t = torch.randn(2, 4, 4, 4, requires_grad=True), torch.randn(2, 6, 4, 4)

    def step() -> None:
        optimizer.zero_grad()
        sokd.loss(f_s, f_t, kd).backward()
        optimizer.step()

    return step


def _small(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(width, 3),
    )  # fmt: skip


def distiller_step() -> Callable[[], None]:
    x, y = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2,))
    distiller = sokd.Distiller(
        student=_small(4), teacher=_small(6), layers="1", method={"fitnet": 1.0, "kd": 1.0},
        example=x,
    )  # fmt: skip
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        sum(distiller(x, y)[1].values()).backward()
        optimizer.step()

    return step


def search_step() -> Callable[[], None]:
    student = nn.Conv2d(3, 4, 3, padding=1)
    kd = sokd.SoKD(4, 6, search=None)
    search = sokd.PolicySearch(kd, student)
    x, f_t = torch.randn(2, 3, 4, 4), torch.randn(2, 6, 4, 4)

    def run(model: nn.Module, batch: Any) -> Any:
        features = model(batch)
        return F.mse_loss(features, torch.zeros_like(features)), features, f_t

    return lambda: search.step(run, x)


STEPS: dict[str, Callable[[], Callable[[], None]]] = {
    "loss": loss_step, "distiller": distiller_step, "search": search_step,
}  # fmt: skip


def run(name: str, steps: int) -> dict[str, Any]:
    """The slope of one kind of step, in bytes a step."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    report = slope(STEPS[name](), steps)
    return {**report, "wrong": [name] if leaks(report) else []}


def leaks(report: dict[str, Any]) -> bool:
    """10 bytes a step or more, and a megabyte in all: an allocator's own growth is less."""
    by_step = report["bytes a step"]
    return isinstance(by_step, float) and by_step >= 10 and by_step * report["steps"] >= 10**6
