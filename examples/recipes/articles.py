"""A small detection set with exact boxes, in COCO's form: Fashion-MNIST's articles on clutter.

    apt-get install dataset-fashion-mnist     # or --source DIR with the four idx files
    python examples/recipes/articles.py --out data/articles

Each canvas of 128x128 holds one to four articles of 16 to 64 pixels that do not cover each other,
over a background of grey bars, discs and pieces of articles. A box is the smallest one around the
article's pixels. What is drawn depends on --seed and the image's number alone.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from parts.data import fashion_mnist
from torch import Tensor
from torchvision.io import write_png

SIDE = 128
NAMES = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
VISIBLE = 24  # an article's pixel, of 255; below it cloth and background are indistinguishable


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data/articles"))
    parser.add_argument("--source", default="data", help="folder of Fashion-MNIST")
    parser.add_argument("--train", type=int, default=300, help="images")
    parser.add_argument("--val", type=int, default=100, help="images")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    parts = fashion_mnist(args.source, False)  # articles of the test part are in val only
    for part, count, articles in zip(("train", "val"), (args.train, args.val), parts, strict=True):
        write(args.out, f"{part}2017", count, articles, args.seed)


def write(out: Path, part: str, count: int, articles: Any, seed: int) -> None:
    """`count` canvases in OUT/PART, and their annotation file."""
    (out / part).mkdir(parents=True, exist_ok=True)
    (out / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for number in range(count):
        random = torch.Generator().manual_seed(1_000_003 * seed + 7919 * number + len(part))
        canvas, found = draw(articles, random)
        name = f"{number:06}.png"
        write_png(canvas.expand(3, -1, -1).contiguous(), str(out / part / name))
        images.append({"id": number, "file_name": name, "height": SIDE, "width": SIDE})
        for box, label in found:
            annotations.append({
                "id": len(annotations) + 1, "image_id": number, "category_id": label + 1,
                "bbox": box, "area": box[2] * box[3], "iscrowd": 0,
            })  # fmt: skip
    content = {
        "images": images, "annotations": annotations,
        "categories": [{"id": index + 1, "name": name} for index, name in enumerate(NAMES)],
    }  # fmt: skip
    (out / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))


def draw(articles: Any, random: torch.Generator) -> tuple[Tensor, list[tuple[list[int], int]]]:
    """A canvas [1, H, W] uint8, and (x, y, width, height) and the class of each article on it."""
    canvas = clutter(articles, random)
    taken = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    found = []
    for _ in range(whole(1, 5, random)):
        image, label = articles[whole(0, len(articles), random)]
        side = whole(16, 65, random)
        article = scaled(image, side)
        rows, columns = (article > VISIBLE).nonzero().T
        top, left = (whole(0, SIDE - side + 1, random) for _ in range(2))
        box = [int(rows.min()) + top, int(columns.min()) + left,
               int(rows.max()) + 1 + top, int(columns.max()) + 1 + left]  # fmt: skip
        place = slice(box[0], box[2]), slice(box[1], box[3])
        if taken[place].any():
            continue
        taken[place] = True
        under = canvas[top : top + side, left : left + side]
        under.copy_(torch.where(article > VISIBLE, article, under))
        found.append(([box[1], box[0], box[3] - box[1], box[2] - box[0]], label))
    return canvas.round().to(torch.uint8)[None], found


def clutter(articles: Any, random: torch.Generator) -> Tensor:
    """A dark background [H, W] with bars, discs, torn pieces of articles and noise."""
    canvas = torch.full((SIDE, SIDE), float(whole(0, 60, random)))
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    for _ in range(6):
        top, left, height, width = (whole(0, 100, random) for _ in range(4))
        canvas[top : top + height // 4 + 1, left : left + width // 4 + 1] = whole(20, 140, random)
        disc = (y - whole(0, SIDE, random)) ** 2 + (x - whole(0, SIDE, random)) ** 2
        canvas[disc < whole(4, 12, random) ** 2] = whole(20, 140, random)
        image, _ = articles[whole(0, len(articles), random)]
        piece = scaled(image, whole(20, 50, random))[8:18, 8:18] * 0.5
        top, left = whole(0, SIDE - 10, random), whole(0, SIDE - 10, random)
        canvas[top : top + piece.shape[0], left : left + piece.shape[1]] = piece
    return (canvas + 12 * torch.randn(SIDE, SIDE, generator=random)).clamp(0, 255)


def scaled(image: Tensor, side: int) -> Tensor:
    """An article [3, 32, 32] uint8 without its padding, [side, side] float32."""
    grey = image[:1, 2:-2, 2:-2].to(torch.float32)[None]
    return F.interpolate(grey, (side, side), mode="bilinear", antialias=True)[0, 0]


def whole(low: int, high: int, random: torch.Generator) -> int:
    return int(torch.randint(low, high, (), generator=random))


if __name__ == "__main__":
    main()
