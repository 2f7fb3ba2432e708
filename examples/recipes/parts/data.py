"""Data sets, and loaders in which a sample's augmentation depends on (seed, epoch, index) alone."""

from __future__ import annotations

import gzip
import os
import signal
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import datasets
from torchvision.datasets.utils import check_integrity
from torchvision.transforms import v2

Key = tuple[int, int]  # epoch and index
FASHION = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist


class Data(NamedTuple):
    """A data set as the recipes use it."""

    train: Seeded
    test: Seeded
    classes: int
    labels: Tensor  # [N] int64, of the training samples


class Seeded(Dataset):
    """`data[epoch, index]` is (image, label, index); (seed, epoch, index) seeds the transform.

    The transform may use PyTorch's random numbers, as transforms.v2 do. Neither the number of
    workers nor the place where a run stopped changes what a sample looks like in an epoch.
    """

    def __init__(
        self, samples: Any, transform: Any, seed: int, subset: Tensor | None = None
    ) -> None:
        self.samples, self.transform, self.seed = samples, transform, seed
        self.subset = None if subset is None else subset.tolist()

    def __len__(self) -> int:
        return len(self.samples) if self.subset is None else len(self.subset)

    def __getitem__(self, key: Key) -> tuple[Any, Any, int]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[tuple[Any, Any, int]]:
        """A batch, for a DataLoader: PyTorch's own random state is kept once for all of it."""
        before = torch.get_rng_state()
        try:
            return [self._seeded(*key) for key in keys]
        finally:
            torch.set_rng_state(before)

    def _seeded(self, epoch: int, index: int) -> tuple[Any, Any, int]:
        own = np.random.SeedSequence((self.seed, epoch, index)).generate_state(1)[0]
        torch.default_generator.manual_seed(int(own))
        sample = self.samples[index if self.subset is None else self.subset[index]]
        return *self.transformed(*sample), index

    def transformed(self, image: Any, label: Any) -> tuple[Any, Any]:
        return self.transform(image), label


class TrainOrder:
    """One rank's batches, as keys, from batch `first` of `epoch` on, by a `DistributedSampler`.

    Over all ranks together a step's samples do not depend on the number of ranks. What is left over
    after the last full step of an epoch is not used in it.
    """

    def __init__(self, samples: int, step: int, accumulate: int, seed: int, rank: int, ranks: int):
        if step % (accumulate * ranks):
            parts = f"--accumulate {accumulate} x {ranks} ranks"
            raise SystemExit(f"--batch-size must be divisible by {parts}, got {step}")
        if samples < step:
            raise SystemExit(f"--batch-size must be at most the {samples} samples, got {step}")
        self.size, self.steps = step // (accumulate * ranks), samples // step
        self.batches = self.steps * accumulate
        self.sampler = DistributedSampler(range(samples), ranks, rank, seed=seed)
        self.epoch = self.first = 0

    def __len__(self) -> int:
        return self.batches - self.first

    def __iter__(self) -> Iterator[list[Key]]:
        self.sampler.set_epoch(self.epoch)
        order = list(self.sampler)
        for start in range(self.first * self.size, self.batches * self.size, self.size):
            yield [(self.epoch, index) for index in order[start : start + self.size]]


def test_order(samples: int, batch: int, rank: int, ranks: int) -> list[list[Key]]:
    """Batches of one rank, as keys: every sample in one rank's batches, once."""
    keys = [(0, index) for index in range(rank, samples, ranks)]
    return [keys[start : start + batch] for start in range(0, len(keys), batch)]


def loaders(
    data: Any, args: Namespace, rank: int, ranks: int, device: torch.device, *,
    test_batch: int = 250, collate: Callable[[list[Any]], Any] | None = None,
) -> tuple[DataLoader, DataLoader]:  # fmt: skip
    """Batches (images, labels, indices) of `data.train` and `data.test`, prepared by workers ahead
    of time and pinned for a GPU."""
    workers = args.workers
    if workers is None:
        workers = min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    train = TrainOrder(len(data.train), args.batch_size, args.accumulate, args.seed, rank, ranks)
    test = test_order(len(data.test), test_batch, rank, ranks)
    return tuple(
        DataLoader(
            part,
            batch_sampler=order,
            collate_fn=collate,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            prefetch_factor=4 if workers else None,
            worker_init_fn=_ignore_sigterm,
            generator=torch.Generator(),  # a resumed epoch draws nothing from the default one
        )
        for part, order in ((data.train, train), (data.test, test))
    )


def _ignore_sigterm(worker: int) -> None:
    """A scheduler signals every process; the rank still needs its workers to end the step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def subset(samples: int, size: int | None) -> Tensor | None:
    """The same random samples for every seed of the run."""
    if size is None:
        return None
    if not 0 < size <= samples:
        raise SystemExit(f"--train-samples must be 1 .. {samples}, got {size}")
    return torch.randperm(samples, generator=torch.Generator().manual_seed(0))[:size]


# -------------------------------------------------------------------------------- images of 32 x 32


class Images(Dataset):
    """Images [N, 3, 32, 32] uint8 and labels [N] in memory."""

    def __init__(self, images: Tensor, labels: Sequence[int] | Tensor) -> None:
        self.images, self.labels = images, torch.as_tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


def cifar100(root: str, download: bool) -> tuple[Images, Images]:
    """CIFAR-100, as torchvision keeps it."""
    kind = datasets.CIFAR100
    folder = Path(root) / kind.base_folder
    files = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
    if download:
        fetch(kind, root)
    for name, md5 in files:
        if not check_integrity(str(folder / name), md5):
            state = "is damaged" if (folder / name).exists() else "is not there"
            raise SystemExit(
                f"--data: {folder / name} {state}; --download fetches it, or unpack "
                f"{kind.url} in {root}"
            )
    parts = [kind(root, train=train) for train in (True, False)]
    return tuple(Images(torch.from_numpy(p.data).permute(0, 3, 1, 2), p.targets) for p in parts)


def fetch(kind: Any, root: str) -> None:
    """Download a data set of torchvision unless it is there."""
    try:
        kind(root, download=True)
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"--download: {kind.__name__} was not fetched: {error}") from None


def fashion_mnist(root: str, download: bool) -> tuple[Images, Images]:
    """Fashion-MNIST from idx files (.gz or not) in `root`, in torchvision's folder below it, or as
    Debian installs them; 28x28 grey is padded to 32x32 and repeated to three channels."""
    if download:
        fetch(datasets.FashionMNIST, root)
    folders = [Path(root), Path(root) / "FashionMNIST" / "raw", FASHION]
    names = [
        f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
    ]
    folder = next((f for f in folders if any(f.glob("*-idx?-ubyte*"))), folders[0])
    read = [_idx(folder / f"{name}-ubyte") for name in names]
    return tuple(
        Images(F.pad(images, (2, 2, 2, 2)).unsqueeze(1).expand(-1, 3, -1, -1), labels)
        for images, labels in (read[:2], read[2:])
    )


def _idx(path: Path) -> Tensor:
    """The uint8 array of an idx file."""
    packed = path.with_name(f"{path.name}.gz")
    if not path.exists() and not packed.exists():
        fetch = "--download fetches it, and so does apt-get install dataset-fashion-mnist"
        raise SystemExit(f"--data: {packed} is not there; {fetch}")
    try:
        raw = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
        shape = np.frombuffer(raw, ">u4", raw[3], 4)
        values = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError) as error:
        found = path if path.exists() else packed
        raise SystemExit(f"--data: {found} is damaged ({error}); fetch it again") from None
    return torch.from_numpy(values.copy())


def of_32x32(name: str, root: str, download: bool, size: int | None, seed: int) -> Data:
    """The data set with the tables' augmentation: crop after a padding of 4, flip, normalise."""
    read, mean, std = {
        "cifar100": (cifar100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
        "fashion-mnist": (fashion_mnist, (0.2190,) * 3, (0.3318,) * 3),  # of the padded images
    }[name]
    train, test = read(root, download)
    plain = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    moved = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), *plain]
    chosen = subset(len(train), size)
    return Data(
        Seeded(train, v2.Compose(moved), seed, chosen),
        Seeded(test, v2.Compose(plain), seed),
        int(train.labels.max()) + 1,
        train.labels if chosen is None else train.labels[chosen],
    )


# -------------------------------------------------------------------------------- folders of images


def imagenet(root: str, image: int, size: int | None, seed: int) -> Data:
    """DIR/train/CLASS/* and DIR/val/CLASS/*, with ImageNet's usual augmentation at this size."""
    folders = [Path(root) / part for part in ("train", "val")]
    for folder in folders:
        if not folder.is_dir():
            raise SystemExit(
                f"--data: {folder} is not there; ImageNet is given out at image-net.org, "
                "and torchvision.datasets.ImageNet unpacks its archives into train/ and val/"
            )
    try:
        train, test = (datasets.ImageFolder(str(folder)) for folder in folders)
    except FileNotFoundError as error:
        raise SystemExit(f"--data: {error}") from None
    if train.classes != test.classes:
        one_sided = sorted(set(train.classes) ^ set(test.classes))
        raise SystemExit(f"--data: train and val differ in the classes {', '.join(one_sided[:5])}")
    plain = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    moved = [v2.RandomResizedCrop(image), v2.RandomHorizontalFlip(), *plain]
    centred = [v2.Resize(image * 256 // 224), v2.CenterCrop(image), *plain]
    chosen, labels = subset(len(train), size), torch.tensor(train.targets)
    return Data(
        Seeded(train, v2.Compose(moved), seed, chosen),
        Seeded(test, v2.Compose(centred), seed),
        len(train.classes),
        labels if chosen is None else labels[chosen],
    )
