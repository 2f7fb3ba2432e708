"""Two processes of torch.distributed (gloo, CPU)."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2


def of_ranks(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """The results of `work(rank)` of each process: tensors, numbers, text, in dicts and lists."""
    mp.spawn(_one, (work, str(folder)), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def _one(rank: int, work: Callable[[int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    try:
        torch.save(work(rank), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
    # DDP's destructor holds the GIL and may deadlock with gloo's thread, which needs it
    os._exit(0)
