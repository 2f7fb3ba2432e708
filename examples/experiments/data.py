"""The sets of the comparison: silhouettes, articles, and silhouettes in cluttered scenes."""

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sokd.demo.data import DataSet, MissingData, Part, animal_mnist, stratified_split

FASHION = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package
ARTICLES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
            "boot")  # fmt: skip
SIDE, CUTS = 56, 10  # of a scene: its height and width; crops of other animals in it


def standardised(name: str, parts: list[Part], names: tuple[str, ...]) -> DataSet:
    """A data set of three parts with pixels in [0, 1]."""
    mean, std = parts[0][0].mean().item(), parts[0][0].std().item()
    first, second, third = (((images - mean) / std, labels) for images, labels in parts)
    return DataSet(name, first, second, third, names, 0, mean, std)


def fashion_mnist(folder: Path = FASHION) -> DataSet:
    """Fashion-MNIST (Zalando, MIT): 20,000 of its training images, 2,000 to validate, its test."""

    def read(file: str) -> npt.NDArray[np.uint8]:
        path = folder / f"{file}-ubyte.gz"
        if not path.exists():
            fetch = "apt-get install dataset-fashion-mnist, or --data FOLDER of the idx files"
            raise MissingData(f"data: {path} must exist: {fetch}")
        return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8)

    def part(name: str) -> Part:
        images, labels = read(f"{name}-images-idx3")[16:], read(f"{name}-labels-idx1")[8:]
        pixels = torch.from_numpy(images.reshape(-1, 1, 28, 28).astype(np.float32) / 255)
        return pixels, torch.from_numpy(labels.astype(np.int64))

    (images, labels), test = part("train"), part("t10k")
    rows = [*map(torch.from_numpy, stratified_split(labels.numpy(), (20_000, 2_000)))][:2]
    return standardised("fashion-mnist", [*((images[row], labels[row]) for row in rows), test],
                        ARTICLES)  # fmt: skip


def scene(part: Part, count: int, generator: torch.Generator) -> tuple[Part, Tensor]:
    """Canvases [N, 1, 56, 56] of one whole animal and crops of ten others, and its box [N, 4].

    The label is that of the whole animal; a box is y0, x0, y1, x1 in pixels, half open.
    """

    def below(limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=generator))

    animals, labels = part[0][:count], part[1][:count]
    canvas, boxes = torch.zeros(len(animals), 1, SIDE, SIDE), []
    for image, animal in zip(canvas[:, 0], animals[:, 0], strict=True):
        for _ in range(CUTS):
            side, other = 8 + below(7), animals[below(len(animals)), 0]
            y, x, to_y, to_x = (
                *(below(29 - side) for _ in "yx"),
                *(below(SIDE + 1 - side) for _ in "yx"),
            )
            window = image[to_y : to_y + side, to_x : to_x + side]
            torch.maximum(window, other[y : y + side, x : x + side], out=window)
        y, x = below(SIDE - 27), below(SIDE - 27)
        image[y : y + 28, x : x + 28] = animal
        boxes.append((y, x, y + 28, x + 28))
    return (canvas, labels), torch.tensor(boxes)


def scenes() -> DataSet:
    """Cluttered scenes of animal-mnist's silhouettes: 2,000 to train, 1,000, 2,000 to test."""
    return scenes_with_boxes()[0]


def scenes_with_boxes() -> tuple[DataSet, list[Tensor]]:
    """The scenes, and the animals' boxes [N, 4] of each part."""
    data, generator = animal_mnist(), torch.Generator().manual_seed(7)
    parts, boxes = [], []
    for (images, labels), count in zip(data[1:4], (2000, 1000, 2000), strict=True):
        pixels = images * data.std + data.mean
        ink = 1 - pixels if pixels.mean() > 0.5 else pixels
        made, found = scene((ink, labels), count, generator)
        parts.append(made)
        boxes.append(found)
    return standardised("scenes", parts, data.class_names), boxes


SOURCES: dict[str, Callable[[], DataSet]] = {
    "animal-mnist": animal_mnist, "fashion-mnist": fashion_mnist, "scenes": scenes,
}  # fmt: skip
