"""Checks of arguments in Python; the kernels check the metadata of the tensors."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

# A tensor or a NumPy array: an operator returns what it was given.
Array = TypeVar("Array", Tensor, "np.ndarray[Any, Any]")


def split_seed(op: str, seed: int | Tensor, features: Any) -> tuple[int, Tensor | None]:
    """A seed as the schema's pair: (int in the range of int64, None) or (0, tensor)."""
    if isinstance(seed, Tensor):
        check_word(op, "seed", seed)
        if isinstance(features, np.ndarray):
            return int(seed), None
        # the dispatcher would select the kernel of the seed's device, meta for example
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
    """Raise unless the tensor is int64 [1]."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be an int64 tensor [1], got {type(tensor).__name__}")
    if tensor.dtype != torch.int64:
        raise TypeError(
            f"{op}: {name} must be int64, got {str(tensor.dtype).removeprefix('torch.')}"
        )
    if tensor.shape != (1,):
        raise ValueError(f"{op}: {name} must have the shape [1], got shape {list(tensor.shape)}")


def check_device(op: str, name: str, tensor: Tensor, of: str, other: Any) -> None:
    """Raise for tensors on two devices; other checks reject what is not a tensor."""
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
