"""Reductions and gathers over the ranks of torch.distributed; no-ops on a single rank."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["agreed", "all_gathered", "averaged", "is_sharded", "place"]


def place() -> tuple[int, int]:
    """The index of this rank and the number of ranks."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_sharded(parameters: Iterable[Tensor]) -> bool:
    """Whether any of the parameters is sharded over the ranks (`fully_shard`)."""
    # the import takes a second, and without it no parameter is a DTensor
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(
        isinstance(parameter, module.DTensor) for parameter in parameters
    )


def averaged(tensor: Tensor) -> Tensor:
    """The mean over the ranks."""
    _, count = place()
    if count > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        tensor /= count
    return tensor


def agreed(tensor: Tensor) -> Tensor:
    """Broadcast the first rank's tensor, in place."""
    if place()[1] > 1:
        dist.broadcast(tensor, src=0)
    return tensor


def all_gathered(rows: Tensor) -> Tensor:
    """All-gather of rows [B, ...] in the order of the ranks; B may differ. No gradient.

    All ranks must call it. Reading the batch sizes synchronises with the device.
    """
    _, count = place()
    if count == 1:
        return rows
    sizes = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(count)]
    dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
    lengths = [int(size) for size in sizes]
    padded = rows.new_zeros(max(lengths), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(count)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
