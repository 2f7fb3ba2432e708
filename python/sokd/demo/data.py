"""The images: read safely from the package animal-mnist, without duplicates, split once for all.

Duplicates are dropped before the split: no test image is a training image too. Weights, learning
rates and best epochs are chosen on the validation part; the test part is for tables.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
INSTALL = "pip install --no-deps animal-mnist==0.4"
SHA256 = {
    "data": "0a13908291891bf5b97b18427cf0eceedcb720959826cc85f7e06dc89e5eaf77",
    "label": "3d826227c39b7dba09abb8273cf07928443fec2c56b6396b4872741b7b332f93",
}
Part = tuple[torch.Tensor, torch.Tensor]  # images [N, 1, H, W] float32, labels [N] int64


class MissingData(RuntimeError):
    """A package is missing, or its data are not those expected; the message gives the command."""


class DataSet(NamedTuple):
    """Images are (pixels in [0, 1] - mean) / std, by those of the training part."""

    name: str
    train: Part
    validation: Part
    test: Part
    class_names: tuple[str, ...]
    duplicates: int  # dropped before the split
    mean: float
    std: float


def packaged(package: str, file: str, install: str) -> Path:
    """The path of a file in an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    folders = (spec and spec.submodule_search_locations) or []
    for path in (Path(folder) / file for folder in folders):
        if path.exists():
            return path
    raise MissingData(f"data: package {package} must be installed: {install}")


def unpickle(path: Path, sha256: str) -> Any:
    """The object in a compressed pickle of known content; another pickle could run code."""
    content = gzip.decompress(path.read_bytes())
    if hashlib.sha256(content).hexdigest() != sha256:
        raise MissingData(f"data: {path.name} must be that of version 0.4, got another: {INSTALL}")
    return pickle.loads(content)


def stratified_split(
    labels: npt.NDArray[np.int64], sizes: tuple[int, int], *, seed: int = 2024
) -> tuple[npt.NDArray[np.int64], ...]:
    """Indices of a train, a validation and a test part with equal class shares, up to one image.

    The images of each class, shuffled, are spread evenly over (0, 1); their order is then cut.
    """
    if min(sizes) < 1 or sum(sizes) >= len(labels):
        rule = f"be positive and leave some of {len(labels)} images"
        raise ValueError(f"stratified_split: sizes must {rule}, got {sizes}")
    rng, position = np.random.default_rng(seed), np.empty(len(labels))
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        position[members] = (np.arange(len(members)) + rng.random()) / len(members)
    order = np.argsort(position, kind="stable")
    return tuple(rng.permutation(part) for part in np.split(order, np.cumsum(sizes)))


def from_arrays(
    name: str, arrays: Sequence[npt.NDArray[Any]], sizes: tuple[int, int], names: tuple[str, ...]
) -> DataSet:
    """A data set of pixels [N, H, W] in 0 to 255 and labels [N], the first of duplicates kept."""
    images, labels = arrays[0].astype(np.uint8), arrays[1].astype(np.int64)
    keep = np.sort(np.unique(images.reshape(len(images), -1), axis=0, return_index=True)[1])
    parts = [torch.from_numpy(part) for part in stratified_split(labels[keep], sizes)]
    unit = torch.from_numpy(images[keep]).float().div_(255).unsqueeze_(1)
    targets, train = torch.from_numpy(labels[keep]), unit[parts[0]]
    mean, std = train.mean().item(), max(train.std().item(), 1e-6)
    first, second, third = (((unit[part] - mean) / std, targets[part]) for part in parts)
    return DataSet(name, first, second, third, names, len(images) - len(keep), mean, std)


def animal_mnist() -> DataSet:
    """10,000 silhouettes of ten animals, 28x28 (MIT): 4,000 train, 1,500 validation, rest test."""
    arrays = []
    for what, sha256 in SHA256.items():
        file = f"data/Animal_MNIST/animal_{what}_version_3.gz"
        arrays.append(unpickle(packaged("animal_mnist", file, INSTALL), sha256))
    return from_arrays("animal-mnist", arrays, (4000, 1500), ANIMALS)
