"""A step of examples/recipes/cifar100.py against the same step in a loop written by hand.

Both train in one process, step by step in turns: the recipe is paused between its steps, where the
hand-written loop takes one. Counted is processor time, of all threads: of reading and augmenting
the batch, both networks, the losses, the optimiser, and what the recipe does beside (seeds of the
augmentation, clocks, means of the losses, the watch on NaN and SIGTERM). FitNet without the search.
"""

import sys
import tempfile
import time
from collections.abc import Iterator
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
HAND = "written by hand"


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


def cases(options: harness.Options) -> Iterator[harness.Case | dict[str, Any]]:
    times = measure(6 if options.quick else 32)
    medians = {side: median(spent) for side, spent in times.items()}
    for side, spent in times.items():
        first, _, third = quantiles(spent, n=4)
        row: dict[str, Any] = {
            "work": "recipes: a training step of cifar100.py, FitNet, processor time",
            "shape": f"{BATCH}x3x32x32", "dtype": "float32", "layout": "contiguous", "side": side,
            "median_ms": f"{medians[side]:.4f}", "quarter_ms": f"{first:.4f}",
            "three_quarters_ms": f"{third:.4f}", "turns": len(spent), "note": "one thread",
        }  # fmt: skip
        if side == HAND:
            row |= {"ratio": f"{medians['sokd'] / medians[HAND]:.3f}", "target": f"<= {LIMIT:g}"}
        yield row
