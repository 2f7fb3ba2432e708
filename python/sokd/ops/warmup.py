"""Compile the CUDA kernels before they are needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sokd import _core
from sokd.ops.runtime import KERNELS, stream_of

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LAYOUTS = ("contiguous", "channels_last")


def warmup(
    device: torch.device | str | int | None = None, *, dtypes: Sequence[torch.dtype] = _DTYPES,
    layouts: Sequence[str] = _LAYOUTS,
) -> None:  # fmt: skip
    """Compile every CUDA kernel, or fetch it from the cache on disk, and load it.

    Without this, a kernel is compiled on first use, which takes up to a second once per machine and
    is forbidden while a CUDA graph is captured. Call this function before a capture.

    Args:
        device: a CUDA device; None: the current one.
        dtypes: of the feature maps: float64, float32, float16, bfloat16.
        layouts: of the feature maps: "contiguous", "channels_last" (these two also run for any
            other layout).

    Without CUDA kernels (see `sokd.show_config`) this is a no-op.

    Raises:
        ValueError: a dtype or layout not listed above.
        RuntimeError: a kernel does not compile or load.

    Source: settled here.
    """
    for name, given, known in (
        ("dtypes", dtypes, (torch.float64, *_DTYPES)),
        ("layouts", layouts, _LAYOUTS),
    ):
        for each in given:
            if each not in known:
                raise ValueError(
                    f"warmup: {name} must be of {', '.join(map(str, known))}, got {each}"
                )
    if "cuda" not in KERNELS or not torch.cuda.is_available():
        return
    chosen = torch.device("cuda") if device is None else torch.device(device)
    if chosen.type != "cuda":
        return
    index = torch.cuda.current_device() if chosen.index is None else chosen.index
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    with torch.cuda.device(index):
        stream = stream_of(torch.device("cuda", index))
        _core.cuda_warmup(index, names, list(layouts), torch.get_num_threads(), stream)
