"""Orders, seeds and files of the recipes' data."""

import pickle
from argparse import Namespace

import numpy as np
import pytest
import torch
from parts import data
from PIL import Image
from support.recipes import TEST, TRAIN, write_idx
from torchvision.datasets import CIFAR100, FashionMNIST
from torchvision.transforms import v2

CPU = torch.device("cpu")


@pytest.fixture
def idx(tmp_path):
    return write_idx(tmp_path / "idx")


def fashion(root, seed=0, size=None):
    return data.of_32x32("fashion-mnist", str(root), False, size, seed)


def epoch(loader, number, first=0):
    loader.batch_sampler.epoch, loader.batch_sampler.first = number, first
    return [tuple(part.clone() for part in batch) for batch in loader]


def loaders(of, workers=0, rank=0, ranks=1, step=8, accumulate=1, seed=0):
    args = Namespace(workers=workers, batch_size=step, accumulate=accumulate, seed=seed)
    return data.loaders(of, args, rank, ranks, CPU)


def test_a_sample_depends_on_seed_epoch_and_index_alone(idx):
    here = epoch(loaders(fashion(idx))[0], 1)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    in_workers = epoch(loaders(fashion(idx), workers=2)[0], 1)
    assert torch.equal(torch.get_rng_state(), before), "PyTorch's own state is left alone"
    later = epoch(loaders(fashion(idx))[0], 1, first=2)
    for mine, others in zip(here, in_workers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))
    assert len(later) == 1
    assert all(torch.equal(a, b) for a, b in zip(here[2], later[0], strict=True))
    of = fashion(idx).train
    assert not torch.equal(of[1, 0][0], of[2, 0][0])
    assert not torch.equal(of[1, 0][0], fashion(idx, seed=1).train[1, 0][0])


def test_a_step_has_the_same_samples_on_any_number_of_ranks(idx):
    def steps(ranks, accumulate):
        of = fashion(idx)
        parts = [epoch(loaders(of, 0, r, ranks, 8, accumulate)[0], 3) for r in range(ranks)]
        per_step = [
            torch.cat([b[2] for part in parts for b in part[s * accumulate : (s + 1) * accumulate]])
            for s in range(TRAIN // 8)
        ]
        return [sorted(indices.tolist()) for indices in per_step]

    assert steps(1, 1) == steps(2, 1) == steps(2, 2) == steps(4, 1)
    order = [index for step in steps(1, 1) for index in step]
    assert sorted(order) == list(range(TRAIN)) != order


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_test_image_is_in_one_rank_once(ranks):
    orders = [data.test_order(TEST, 7, rank, ranks) for rank in range(ranks)]
    assert sorted(i for order in orders for batch in order for _, i in batch) == list(range(TEST))


def test_the_test_part_is_not_augmented(idx):
    of = fashion(idx).test
    assert torch.equal(of[0, 3][0], of[5, 3][0])
    assert of[0, 3][0].shape == (3, 32, 32) and of[0, 3][0].dtype == torch.float32


def test_idx_files_packed_unpacked_and_in_torchvisions_folder(idx, tmp_path):
    plain = write_idx(tmp_path / "other" / "FashionMNIST" / "raw", packed=False)
    first, second = fashion(idx), fashion(plain.parents[1])
    assert torch.equal(first.train.samples.images, second.train.samples.images)
    assert first.classes == 10 and len(first.train) == TRAIN and len(first.test) == TEST


def test_a_subset_is_fixed_and_has_its_own_labels(idx):
    one, other = fashion(idx, seed=0, size=10), fashion(idx, seed=5, size=10)
    assert len(one.train) == 10 and torch.equal(one.labels, other.labels)
    assert [one.train[0, i][1] for i in range(10)] == one.labels.tolist()
    with pytest.raises(SystemExit, match=r"--train-samples must be 1 \.\. 24, got 25"):
        fashion(idx, size=25)


def test_fashion_mnist_missing_and_half_there(idx, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "FASHION", tmp_path / "nowhere")
    with pytest.raises(SystemExit, match=r"train-images-idx3-ubyte.gz is not there; --download"):
        fashion(tmp_path / "empty")
    (idx / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(SystemExit, match=r"t10k-labels-idx1-ubyte.gz is not there"):
        fashion(idx)
    whole = (idx / "train-images-idx3-ubyte.gz").read_bytes()
    (idx / "train-images-idx3-ubyte.gz").write_bytes(whole[:200])
    with pytest.raises(SystemExit, match=r"train-images-idx3-ubyte.gz is damaged"):
        fashion(idx)


def test_cifar100_missing_half_there_and_read(tmp_path, monkeypatch):
    def read():
        return data.of_32x32("cifar100", str(tmp_path), False, None, 0)

    with pytest.raises(SystemExit, match=r"cifar-100-python/train is not there; --download"):
        read()
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    (folder / "train").write_bytes(b"half")
    with pytest.raises(SystemExit, match="cifar-100-python/train is damaged"):
        read()
    fetched = []
    monkeypatch.setattr(CIFAR100, "download", lambda self: fetched.append(self.root))
    monkeypatch.setattr(FashionMNIST, "download", lambda self: None)
    for name, root in (("cifar100", tmp_path), ("fashion-mnist", tmp_path / "none")):
        with pytest.raises(SystemExit, match=r"--download: .* was not fetched: .*not found"):
            data.of_32x32(name, str(root), True, None, 0)
    assert fetched == [str(tmp_path)]
    for name in ("train", "test"):
        pixels = np.arange(4 * 3072, dtype=np.uint8).reshape(4, 3072)
        content = {"data": pixels, "fine_labels": [0, 99, 3, 4]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}))
    monkeypatch.setattr(CIFAR100, "train_list", [["train", None]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", None]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": None})
    of = read()
    assert of.classes == 100 and of.labels.tolist() == [0, 99, 3, 4]
    assert of.train.samples[0][0].flatten().tolist() == list(np.arange(3072, dtype=np.uint8))


def test_imagenet_folders(tmp_path):
    def read():
        return data.imagenet(str(tmp_path), 32, None, 0)

    with pytest.raises(SystemExit, match="train is not there; ImageNet is given out at"):
        read()
    for part, kinds in (("train", "ab"), ("val", "a")):
        for kind in kinds:
            (tmp_path / part / kind).mkdir(parents=True)
            Image.new("RGB", (50, 40), (9, 9, 9)).save(tmp_path / part / kind / "1.png")
    with pytest.raises(SystemExit, match="train and val differ in the classes b"):
        read()
    (tmp_path / "val" / "b").mkdir()
    with pytest.raises(SystemExit, match="Found no valid file for the classes b"):
        read()
    Image.new("RGB", (50, 40)).save(tmp_path / "val" / "b" / "1.png")
    of = read()
    assert of.classes == 2 and of.train[0, 1][0].shape == of.test[0, 1][0].shape == (3, 32, 32)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(SystemExit, match=r"must be divisible by --accumulate 3 x 2 ranks, got 8"):
        data.TrainOrder(24, 8, 3, 0, 0, 2)
    with pytest.raises(SystemExit, match="at most the 24 samples, got 32"):
        data.TrainOrder(24, 32, 1, 0, 0, 1)


def test_a_transform_of_ones_own_is_seeded_too():
    def noisy(x):
        return x + torch.rand(1)

    own = data.Seeded([(torch.zeros(1), 0)] * 3, v2.Lambda(noisy), seed=4)
    assert own[0, 1][0] == own[0, 1][0] != own[0, 2][0]
