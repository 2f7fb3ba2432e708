"""Reductions and gathers over the ranks of torch.distributed; no-ops on a single rank."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["agreed", "averaged", "everyones", "is_sharded", "place"]


def place() -> tuple[int, int]:
    """This rank, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_sharded(parameters: Iterable[Tensor]) -> bool:
    """Whether any of them is spread over the ranks (`fully_shard`): each holds a part."""
    module = sys.modules.get(
        "torch.distributed.tensor"
    )  # a second of import, and without it there are none
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
    """The first rank's, put into every rank's."""
    if place()[1] > 1:
        dist.broadcast(tensor, src=0)
    return tensor


def everyones(rows: Tensor) -> Tensor:
    """rows [B, ...] of all ranks, in the ranks' order; B may differ among them. Without a gradient.

    All ranks have to call it, and wait for each other; each then waits for its device too, to read
    the Bs.
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
