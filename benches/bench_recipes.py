"""A step of the recipes against what it should cost.

cifar100.py: the same step in a loop written by hand. Both train in one process, step by step in
turns: the recipe is paused between its steps, where the hand-written loop takes one. Counted is
processor time, of all threads: of reading and augmenting the batch, both networks, the losses, the
optimiser, and what the recipe does beside (seeds of the augmentation, clocks, means of the losses,
the watch on NaN and SIGTERM). FitNet without the search.

coco.py: a distilled step of Faster R-CNN with FPN, P2 to P6, against the student's step and the
teacher's backbone by themselves, in turns, on batches that are prepared.

A ratio is the median of the turns' own ratios: the machine's speed differs less within a turn.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from torchvision.transforms import v2  # type: ignore[import-untyped]

import sokd
from benches import harness

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
BATCH, SAMPLES, LIMIT = 64, 1024, 1.05
IMAGES = (256, 320), (224, 288)  # height and width of those in a detector's batch
DETECTOR_LIMIT = 1.1
WITHIN = ("fitnet", "fgd", "fitnet with SoKD")  # mgd has two convolutions of its own a level
HAND = "written by hand"
ALONE = "student's step and teacher's backbone"
OPTIONS: dict[str, dict[str, Any]] = {"mgd": {"over": "cells"}}


def write_data(folder: Path) -> None:
    """Fashion-MNIST's files with random images."""
    random = np.random.default_rng(0)
    for part, count in (("train", SAMPLES), ("t10k", 10)):
        images = random.integers(0, 255, (count, 28, 28), dtype=np.uint8)
        labels = random.integers(0, 10, count, dtype=np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
            (folder / f"{part}-{kind}-ubyte").write_bytes(head + array.tobytes())


def by_hand(recipe: Any, folder: Path, teacher_file: Path) -> Iterator[None]:
    """A training loop as a researcher writes it; each step is one `next`."""
    train, _ = recipe.fashion_mnist(str(folder), False)
    transform = v2.Compose([
        v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.219,) * 3, (0.3318,) * 3),
    ])  # fmt: skip

    class Augmented(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(train)

        def __getitem__(self, index: int) -> Any:
            image, label = train[index]
            return transform(image), label

    student, teacher = recipe.build("resnet8", 10), recipe.build("resnet20", 10)
    teacher.load_state_dict(torch.load(teacher_file)["model"])
    distiller = sokd.Distiller(
        student=student, teacher=teacher, layers="layer2", method={"fitnet": 1.0}, sokd=False,
        example=torch.zeros(2, 3, 32, 32), check_finite=False,
    )  # fmt: skip
    optimizer = torch.optim.SGD(distiller.parameters(), 0.05, 0.9, weight_decay=5e-4)
    loader = torch.utils.data.DataLoader(Augmented(), BATCH, shuffle=True, drop_last=True)
    distiller.train()
    while True:
        for x, y in loader:
            _, losses = distiller(x, y)
            torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            yield


def measure(steps: int) -> dict[str, list[float]]:
    """Milliseconds of processor time of each step, by side."""
    torch.set_num_threads(1)  # a thread that spins counts as processor time
    sys.path.insert(0, str(RECIPES))
    import cifar100  # type: ignore[import-not-found]
    from parts import data, networks, run  # type: ignore[import-not-found]

    cifar100.fashion_mnist, cifar100.build = data.fashion_mnist, networks.build
    times: dict[str, list[float]] = {"sokd": [], HAND: []}
    original = run.Run.steps

    def in_turns(self: Any, train: Any) -> Iterator[Any]:
        own = original(self, train)
        while True:
            for side in ("sokd", HAND)[:: 1 if len(times[HAND]) % 2 else -1]:
                begun = time.process_time()
                if side == HAND:
                    next(hand)
                else:
                    batches = next(own, None)
                    if batches is None:
                        return
                    yield batches
                times[side].append((time.process_time() - begun) * 1e3)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        teacher = folder / "teacher.pt"
        torch.save({"model": networks.build("resnet20", 10).state_dict()}, teacher)
        hand = by_hand(cifar100, folder, teacher)
        run.Run.steps = in_turns
        try:
            cifar100.main([
                *("--dataset", "fashion-mnist", "--data", name, "--out", f"{name}/out"),
                *("--teacher", "resnet20", "--teacher-weights", str(teacher)),
                *("--student", "resnet8", "--method", "fitnet=1", "--no-sokd", "--workers", "0"),
                *("--max-steps", str(steps), "--batch-size", str(BATCH)),
            ])  # fmt: skip
        finally:
            run.Run.steps = original
            torch.set_num_threads(harness.THREADS)
    return {side: spent[2:] for side, spent in times.items()}  # the first ones warm up


def detection(steps: int) -> dict[str, list[float]]:
    """Milliseconds of processor time of each step of a detector, by side."""
    torch.set_num_threads(1)
    sys.path.insert(0, str(RECIPES))
    import coco  # type: ignore[import-not-found]
    from parts import detection as parts

    torch.manual_seed(0)
    student, teacher = (
        parts.build(name, 91, [min(map(min, IMAGES))], 1333) for name in ("resnet18", "resnet50")
    )
    transform = student.transform.train()
    student.transform = parts.Once(transform)
    images = [torch.rand(3, *size) for size in IMAGES]
    boxes = torch.tensor([[20.0, 30.0, 90.0, 150.0], [100.0, 40.0, 200.0, 200.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2])} for _ in IMAGES]
    x, y, where = coco.prepare(transform, images, targets)
    guide = parts.BackboneAlone(teacher).eval()
    student.train()

    def distilled(method: str, plugged: Any) -> Callable[[], None]:
        distiller = sokd.Distiller(
            copy.deepcopy(student), copy.deepcopy(guide), method=method, sokd=plugged,
            layers=parts.levels(student, teacher, ("student", "teacher")), adapter="linear",
            task="model", example=x, check_finite=False, **OPTIONS.get(method, {}),
        )  # fmt: skip
        optimizer = torch.optim.SGD(distiller.parameters(), 0.0, 0.9)  # the same step each time
        return lambda: update(distiller(x, y, **where)[1], optimizer)

    own = copy.deepcopy(student)
    optimizer = torch.optim.SGD(own.parameters(), 0.0, 0.9)

    def alone() -> None:
        with torch.no_grad():
            guide(x)
        update(own(x, y), optimizer)

    sides = {ALONE: alone} | {name: distilled(name, False) for name in ("fitnet", "fgd", "mgd")}
    sides["fitnet with SoKD"] = distilled("fitnet", True)
    times: dict[str, list[float]] = {side: [] for side in sides}
    try:
        for turn in range(steps + 1):  # the first one warms up
            for side in list(sides)[:: 1 if turn % 2 else -1]:
                begun = time.process_time()
                sides[side]()
                times[side].append((time.process_time() - begun) * 1e3)
    finally:
        torch.set_num_threads(harness.THREADS)
    return {side: spent[1:] for side, spent in times.items()}


def update(losses: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()


def cases(options: harness.Options) -> Iterator[harness.Case | dict[str, Any]]:
    times = measure(6 if options.quick else 32)
    work = "recipes: a training step of cifar100.py, FitNet, processor time"
    yield from rows(work, f"{BATCH}x3x32x32", times["sokd"], times[HAND], HAND, LIMIT)
    times = detection(2 if options.quick else 12)
    for method, spent in times.items():
        if method != ALONE:
            work = f"recipes: a distilled step of coco.py, {method}, processor time"
            limit = DETECTOR_LIMIT if method in WITHIN else None
            yield from rows(work, f"{len(IMAGES)}x3x256x320", spent, times[ALONE], ALONE, limit)


def rows(
    work: str, shape: str, own: list[float], other: list[float], name: str, limit: float | None
) -> Iterator[dict[str, Any]]:
    """Both sides of a case, with the median of their turns' ratios."""
    for side, spent in (("sokd", own), (name, other)):
        first, _, third = quantiles(spent, n=4)
        row: dict[str, Any] = {
            "work": work, "shape": shape, "dtype": "float32", "layout": "contiguous", "side": side,
            "median_ms": f"{median(spent):.4f}", "quarter_ms": f"{first:.4f}",
            "three_quarters_ms": f"{third:.4f}", "turns": len(spent), "note": "one thread",
        }  # fmt: skip
        if side == name:
            pairs = zip(own, other, strict=False)  # the last turn may lack a side
            row["ratio"] = f"{median(mine / others for mine, others in pairs):.3f}"
            row |= {} if limit is None else {"target": f"<= {limit:g}"}
        yield row
