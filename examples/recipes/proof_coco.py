"""A proof that coco.py runs, on a small set of real articles; no ranking of the methods.

    python examples/recipes/proof_coco.py --out out/proof-coco     # resumes after an interruption

The set is what articles.py writes. A teacher (small32), then a narrower student (small16) alone
and by each method, plain and with SoKD, on every seed. Each run is a line of OUT/runs.csv;
OUT/areas.png shows the boxes beside the areas of student and teacher, and the mask.
"""

from __future__ import annotations

import argparse
import shutil
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import articles
import coco
import torch
from parts import detection
from parts.run import FREE
from proof import once, publish, table
from torchvision.utils import draw_bounding_boxes

from sokd import inspect

# At these weights each term is of the size of the detector's own losses.
METHODS = ("none", "fitnet=0.3", "fgd", "mgd=2e-5")
SOKD = ["--sokd-option", "areas=mutual", "lambda_areas=0.3", "lambda_agreement=0.15"]
DRAWN = "fitnet+sokd"  # the run whose areas are drawn


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/proof-coco"))
    parser.add_argument("--source", default="data", help="folder of Fashion-MNIST")
    parser.add_argument("--train", type=int, default=300, help="images")
    parser.add_argument("--val", type=int, default=100, help="images")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--teacher-epochs", type=int, default=14)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--docs", type=Path, help="folder whose results.md gets the table")
    args = parser.parse_args(argv)
    data = args.out / "set"
    if not (data / "annotations" / "instances_val2017.json").exists():
        counts = ["--train", str(args.train), "--val", str(args.val)]
        articles.main(["--out", str(data), "--source", args.source, *counts])
    common = [
        *("--data", str(data), "--resume", "auto", "--workers", "0", "--batch-size", "4"),
        *("--min-size", "128", "--max-size", "128", "--lr", "0.03", "--lr-warmup-steps", "50"),
        *("--teacher", "small32", "--student", "small16"),
    ]
    teacher = args.out / "teacher"
    options = [*common, "--teacher-only", *schedule(args.teacher_epochs)]
    once(coco, teacher, "teacher (small32)", 0, options, ["AP50"])
    common += [*schedule(args.epochs), "--teacher-weights", str(teacher / "teacher.pt")]
    common += SOKD
    for seed in range(args.seeds):
        for method in METHODS:
            for sokd in (False, True)[: 1 if method == "none" else 2]:
                name = f"{method.split('=')[0]}{'+sokd' if sokd else ''}"
                more = ["--method", method, "--sokd" if sokd else "--no-sokd", "--seed", str(seed)]
                more += ["--method-option", "ratio=0.65"] if "mgd" in method else []
                once(coco, args.out / f"{name}-{seed}", name, seed, [*common, *more], ["AP50"])
    shown = table(args.out, {"last_AP": "AP", "last_AP50": "AP50", "best_AP": "best epoch's AP"})
    print(shown)
    if (args.out / f"{DRAWN}-0").exists():
        draw(args.out / f"{DRAWN}-0", data, args.out / "areas.png")
    if args.docs is not None:
        picture = "![boxes and areas](results/detection.png)"
        publish(f"{shown}\n\n{picture}\n", args.out, args.docs, "detection")
        shutil.copy(args.out / "areas.png", args.docs / "results" / "detection.png")


def schedule(epochs: int) -> list[str]:
    return ["--epochs", str(epochs), "--milestones", str(max(1, epochs * 4 // 5))]


def draw(run: Path, data: Path, path: Path, count: int = 6) -> None:
    """The areas on the first test images, at P2; the boxes are drawn into the images."""
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    args = Namespace(**dict.fromkeys(FREE), **saved["options"])
    found = detection.coco(str(data), None, 0, True, print)
    student = detection.build(args.student, found.classes, args.min_size, args.max_size)
    transform, student.transform = student.transform.eval(), detection.Once(student.transform)
    learner = coco.with_teacher(args, student, found.classes)
    learner.load_state_dict(saved["parts"]["model"])
    shown = range(min(count, len(found.test)))
    images, targets, _ = detection.as_lists([found.test[0, index] for index in shown])
    x, _, _ = coco.prepare(transform, images, targets)
    areas = inspect.areas(learner, x)
    with_boxes = [
        draw_bounding_boxes(image, target["boxes"], colors="yellow").float()
        for image, target in zip(images, targets, strict=True)
    ]
    caption = f"{run.name}: boxes, and the areas at P2 of teacher, student and both (the mask)"
    inspect.draw_areas(torch.stack(with_boxes), areas, path, layer=0, caption=caption)


if __name__ == "__main__":
    main()
