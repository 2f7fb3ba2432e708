"""A tiny detection set of COCO's form, with images of unequal size, and runs of coco.py on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torchvision.io import write_png

SIZES = ((64, 96), (96, 64), (64, 64), (80, 48))  # height and width


def write_set(folder: Path, train: int = 8, val: int = 4) -> Path:
    """Bright squares of category 1 and bars of category 3 on noise."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(0)
    for part, count in (("train2017", train), ("val2017", val)):
        (folder / part).mkdir(exist_ok=True)
        images, annotations = [], []
        for number in range(count):
            height, width = SIZES[number % len(SIZES)]
            canvas = torch.randint(0, 60, (3, height, width), dtype=torch.uint8, generator=random)
            for category, (h, w) in ((1, (16, 16)), (3, (8, 24))):
                y, x = number % 3 * 8, 4 + category * 4
                canvas[:, y : y + h, x : x + w] = 120 + 40 * category
                annotations.append({
                    "id": len(annotations) + 1, "image_id": number + 10, "iscrowd": 0,
                    "category_id": category, "bbox": [x, y, w, h], "area": h * w,
                })  # fmt: skip
            name = f"{number}.png"
            write_png(canvas, str(folder / part / name))
            entry = {"file_name": name, "height": height, "width": width}
            images.append({"id": number + 10, **entry})
        names = [{"id": 1, "name": "square"}, {"id": 3, "name": "bar"}]
        content = {"images": images, "annotations": annotations, "categories": names}
        (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    return folder


def changed(folder: Path, part: str, change: Any) -> None:
    """Rewrite an annotation file by `change(content)`."""
    path = folder / "annotations" / f"instances_{part}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def options(data: Path, out: Path, *more: str) -> list[str]:
    """The smallest run of coco.py: two epochs of two steps, no worker."""
    small = "--epochs 2 --batch-size 4 --milestones 1 --workers 0 --min-size 64 --max-size 96"
    nets = "--teacher small8 --student small4 --lr-warmup-steps 2 --lr 0.002"
    return [*small.split(), *nets.split(), "--data", str(data), "--out", str(out), *more]
