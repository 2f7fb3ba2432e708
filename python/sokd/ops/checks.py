"""Checks of an operator's arguments that Python makes; the kernels check the tensors' metadata."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def split_seed(op: str, seed: int | Tensor, features: Any) -> tuple[int, Tensor | None]:
    """A seed as the pair a schema can carry: an int in int64's range, or 0 and the tensor."""
    if isinstance(seed, Tensor):
        check_word(op, "seed", seed)
        if isinstance(features, np.ndarray):
            return int(seed), None
        # a seed on another device, meta for one, would dispatch the call to that device's kernel
        check_device(op, "seed", seed, "features", features)
        return 0, seed
    if not isinstance(seed, (int, np.integer)):
        raise TypeError(
            f"{op}: seed must be an int or an int64 tensor [1], got {type(seed).__name__}"
        )
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"{op}: seed must fit in 64 bits, got {seed}")
    return int(seed) - (2**64 if seed >= 2**63 else 0), None


def check_word(op: str, name: str, tensor: Tensor) -> None:
    """Whether it is one 64-bit word, int64 [1]."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be an int64 tensor [1], got {type(tensor).__name__}")
    if tensor.dtype != torch.int64:
        raise TypeError(
            f"{op}: {name} must be int64, got {str(tensor.dtype).removeprefix('torch.')}"
        )
    if tensor.shape != (1,):
        raise ValueError(f"{op}: {name} must have the shape [1], got shape {list(tensor.shape)}")


def check_device(op: str, name: str, tensor: Tensor, of: str, other: Any) -> None:
    """Whether the two are on one device; what is no tensor is for other checks to judge."""
    if isinstance(other, Tensor) and tensor.device != other.device:
        raise ValueError(
            f"{op}: {name} must be on the device of {of}, {other.device}, got {tensor.device}"
        )


def refuse_gradients(op: str, **constants: Tensor | None) -> None:
    """Raise for an input that requires grad but gets no gradient; allowed under torch.no_grad()."""
    for name, tensor in constants.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: {name} must not require grad, got a tensor that requires grad")


def check_kind(op: str, of: str, first: Any, **others: Any) -> None:
    """Raise where `first` is a tensor and another argument a NumPy array."""
    if not isinstance(first, Tensor):
        return
    for name, other in others.items():
        if isinstance(other, np.ndarray):
            raise TypeError(f"{op}: {name} must be a torch.Tensor like {of}, got ndarray")
