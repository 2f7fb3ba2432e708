"""Tiny data and runs for the tests of examples/recipes."""

import gzip
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
if str(RECIPES) not in sys.path:
    sys.path.insert(0, str(RECIPES))

TRAIN, TEST = 24, 20  # three steps of 8 an epoch; a test part that 2 ranks share evenly


def write_idx(folder: Path, *, packed: bool = True) -> Path:
    """Fashion-MNIST's four files with a few random images: the label is how bright a quarter is."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for part, count in (("train", TRAIN), ("t10k", TEST)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = random.integers(0, 120, (count, 28, 28), dtype=np.uint8)
        images[:, :14, :14] += (labels * 13)[:, None, None]
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
            path = folder / f"{part}-{kind}-ubyte{'.gz' if packed else ''}"
            raw = head + array.tobytes()
            path.write_bytes(gzip.compress(raw) if packed else raw)
    return folder


def options(data: Path, out: Path, *more: str) -> list[str]:
    """The smallest run of cifar100.py: two epochs of three steps, no worker."""
    small = "--dataset fashion-mnist --epochs 2 --batch-size 8 --milestones 1 --workers 0"
    return [*small.split(), "--data", str(data), "--out", str(out), *more]


DISTIL = [
    "--teacher", "resnet8", "--student", "resnet8w8", "--search-epochs", "1", "--search-every", "2",
    "--sokd-option", "search=None", "--ema", "0.9",
]  # fmt: skip


def checkpoint(out: Path) -> dict[str, Any]:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def load_without_sokd(path: Path, imports: str, network: str) -> None:
    """Load a student's file into `network`, in a process where importing sokd raises."""
    code = f"""import sys
sys.modules["sokd"] = None
import torch
{imports}
{network}.load_state_dict(torch.load(sys.argv[1], weights_only=True)["model"])"""
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, cwd=RECIPES, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def differences(one: Any, other: Any, name: str = "") -> list[str]:
    """The entries in which two checkpoints differ in any bit, without the seconds."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted({k for k in {*one, *other} if "seconds" not in str(k)}, key=str)
        return [d for k in keys for d in differences(one.get(k), other.get(k), f"{name}.{k}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            return [name]
        pairs = enumerate(zip(one, other, strict=True))
        return [d for i, pair in pairs for d in differences(*pair, f"{name}.{i}")]
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.dtype == other.dtype and torch.equal(
            one.nan_to_num(7) if one.is_floating_point() else one,
            other.nan_to_num(7) if other.is_floating_point() else other,
        )
    else:
        same = one == other
    return [] if same else [name]
