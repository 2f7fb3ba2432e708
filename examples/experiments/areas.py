"""`python -m examples.experiments.areas`: where the areas lie after training; areas.csv, a picture.

One student run on the cluttered scenes for each kind of heads and learning rate. The figures are
taken on the training scenes, whose masks the loss has, and on the test scenes, with the clean
teacher and everything in eval mode, for the mask of `areas="teacher"`, "student" and "mutual":

The picture has the first two kinds. Two are trials against the collapse of trained heads: in
"bounded-fixed" they are not trained, in "bounded-stopped" the teacher's side of the agreement is a
constant.

    share    of the mask's weight inside the animal's box, mean over the scenes
    covered  share of the box's cells that have any weight
    chance   share of the map that the box is
"""

import argparse
import csv
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sokd
from examples.experiments.compare import SETTINGS
from examples.experiments.data import scenes_with_boxes
from sokd.demo.data import DataSet
from sokd.demo.networks import predict
from sokd.demo.train import WEIGHTS, Run, Solver, Task, build, fit, train_teacher
from sokd.inspect.pictures import areas_on_images

TRAINED = {
    "adapter": "conv", "areas": "mutual", "base": "replace",
    "lambda_agreement": 1.0, "lambda_areas": 1.0,
}  # fmt: skip
BOUNDED = {**TRAINED, "heads": "bounded", "search": None}
HEADS = {
    "attention": WEIGHTS,
    "bounded": BOUNDED,
    "bounded-fixed": BOUNDED,
    "bounded-stopped": BOUNDED,
    "paper": {**BOUNDED, "heads": "paper"},
}
SHOWN = 6  # scenes of the picture


def inside(boxes: Tensor, cells: int, side: int) -> Tensor:
    """Cells that overlap the boxes [N, 4] of images of `side` pixels: [N, cells, cells]."""
    edges = torch.arange(cells + 1) * side / cells
    y0, x0, y1, x1 = (edge[:, None] for edge in boxes.unbind(1))
    rows, columns = ((edges[1:] > low) & (edges[:-1] < high) for low, high in ((y0, y1), (x0, x1)))
    return (rows[:, :, None] & columns[:, None]).float()


def figures(coverage: Tensor, boxes: Tensor, side: int) -> dict[str, float]:
    """Share of the weight in the boxes, share of the boxes' cells that have any, and chance."""
    none = coverage.amax((1, 2), keepdim=True) == 0
    weight = coverage.masked_fill(none, 1)  # as in the loss: all of a scene without an area
    box = inside(boxes, coverage.shape[-1], side)
    within = (weight * box).sum((1, 2))
    return {
        "share": float((within / weight.sum((1, 2))).mean()),
        "covered": float((((weight > 0) * box).sum((1, 2)) / box.sum((1, 2))).mean()),
        "chance": float(box.mean()),
    }


class Stopped(sokd.DAM):
    """The teacher's side of the agreement is a constant, as in SimSiam."""

    def _agreement(self, student: Any, teacher: Any, scale: float) -> Tensor:
        return super()._agreement(student, tuple(map(torch.detach, teacher)), scale)


def trained(heads: str, lr: float, task: Task, seed: int = 0) -> sokd.Distiller:
    """The Distiller after a student run with these heads."""
    run = Run(heads, {"method": None, "sokd": HEADS[heads]}, seed)
    distiller, (images, labels) = build(run, task), task.data.train
    if heads == "bounded-fixed":
        distiller.kd.dam.requires_grad_(False)
    if heads == "bounded-stopped":
        distiller.kd.dam.__class__ = Stopped

    def loss_of(rows: Tensor) -> Tensor:
        distiller.teacher.rows = rows
        return torch.stack([*distiller(images[rows], labels[rows])[1].values()]).sum()

    solver, order = task.solver._replace(lr=lr), torch.Generator().manual_seed(seed)
    for _ in fit(distiller.train().parameters(), loss_of, len(labels), solver, order):
        pass
    distiller.eval().teacher.rows = None  # type: ignore[assignment]
    return distiller


def draw(runs: dict[str, sokd.Distiller], data: DataSet, lr: float, path: Path) -> None:
    """Test scenes with the areas of the loss at the end of each run."""
    images, labels = (part[:SHOWN] for part in data.test)
    found = {
        f"{heads} heads:": sokd.inspect.areas(distiller, images)[0][distiller.kd.dam.areas]
        for heads, distiller in [*runs.items()][:2]
    }
    titles = [data.class_names[label] for label in labels]
    ink = 1 - (images * data.std + data.mean).clamp(0, 1)
    caption = (
        f"Cluttered scenes with one whole animal each: the areas of the loss, last epoch, lr {lr:g}"
    )
    shares = sokd.inspect.shares(found)
    areas_on_images(ink, found, shares, path, titles=titles, caption=caption)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m examples.experiments.areas", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--heads", choices=HEADS, nargs="+", default=[*HEADS])
    add("--lr", type=float, nargs="+", default=[0.1, 0.4])
    add("--epochs", type=int, default=SETTINGS["scenes"].student.epochs)
    add("--save", type=Path, default=Path("out/areas"), help="folder of areas.csv and areas.png")
    options = parser.parse_args(arguments)
    options.save.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    data, boxes = scenes_with_boxes()
    solver = SETTINGS["scenes"].teacher
    teacher = train_teacher(data, "base", solver, options.save / f"teacher-{data.name}.pt")
    task = Task(data, teacher, predict(teacher, data.train[0]), "small", Solver(options.epochs))
    runs: dict[str, sokd.Distiller] = {}
    with (options.save / "areas.csv").open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        for heads, lr in itertools.product(options.heads, options.lr):
            runs[heads] = trained(heads, lr, task)
            for part, where in (("train", boxes[0]), ("test", boxes[2])):
                images = getattr(data, part)[0]
                for areas, found in sokd.inspect.areas(runs[heads], images)[0].items():
                    row = figures(found.coverage, where, images.shape[-1])
                    if file.tell() == 0:
                        out.writerow(("heads", "lr", "scenes", "areas", *row))
                    shown = (f"{value:.3f}" for value in row.values())
                    out.writerow((heads, lr, part, areas, *shown))
                    print(heads, lr, part, areas, row, flush=True)
                file.flush()
    draw(runs, data, options.lr[-1], options.save / "areas.png")


if __name__ == "__main__":
    main()
