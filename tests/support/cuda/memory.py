"""PyTorch's CUDA tensors in the mock driver's memory, where an access past a tensor is an error."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from support.cuda.mock import Driver


class MockMemory:
    """A device (see device_cases.py) whose tensors PyTorch takes for CUDA tensors.

    Nothing but sokd's operators can work on them. `odd`: maps are not aligned to 16 bytes.
    """

    def __init__(self) -> None:
        self.driver, self.odd = Driver(), False

    def make(
        self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, index: int | None
    ) -> Tensor:
        """A tensor of NaN; only maps are aligned to more than an element."""
        is_map, size = len(shape) == 4, span(shape, strides) * dtype.itemsize
        align = 8 if dtype == torch.uint8 else dtype.itemsize  # scratch memory is uint8
        address = self.driver.api.mock_allocate(
            size, align if self.odd or not is_map else 16, self.odd and is_map
        )
        return self.at(address, size, shape, strides, dtype, index)

    def at(
        self,
        address: int,
        size: int,
        shape: Any,
        strides: Any,
        dtype: torch.dtype,
        index: int | None,
    ) -> Tensor:
        device = torch.device("cuda", index or 0)
        storage = torch._C._construct_storage_from_data_pointer(address, device, size)
        about = {"size": shape, "stride": strides, "dtype": dtype, "storage_offset": 0}
        return torch._C._construct_CUDA_Tensor_From_Storage_And_Metadata(
            about | {"device": device}, storage
        )

    def on(self, tensor: Tensor, index: int = 0) -> Tensor:
        made = self.make(tensor.shape, tensor.stride(), tensor.dtype, index)
        size = span(tensor.shape, tensor.stride()) * tensor.element_size()
        ctypes.memmove(made.data_ptr(), tensor.data_ptr(), size)
        return made

    def back(self, tensor: Tensor) -> Tensor:
        assert type(tensor) is Tensor and tensor.device.type == "cuda", "it never left the CPU"
        flat = torch.empty(span(tensor.shape, tensor.stride()), dtype=tensor.dtype)
        ctypes.memmove(flat.data_ptr(), tensor.data_ptr(), flat.nbytes)
        return flat.as_strided(tensor.shape, tensor.stride())

    def empty(
        self, size: Any, *, device: torch.device, dtype: Any = None, **options: Any
    ) -> Tensor:
        layout = options.get("memory_format") or torch.contiguous_format
        like = torch.empty(size, dtype=dtype, memory_format=layout, device="meta")
        return self.make(like.shape, like.stride(), like.dtype, device.index)

    def empty_strided(
        self, size: Any, stride: Any, *, device: torch.device, dtype: Any = None, **_: Any
    ) -> Tensor:
        return self.make(size, stride, dtype or torch.get_default_dtype(), device.index)


def span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """The number of elements from the first to the last of a tensor."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


@contextmanager
def cuda_memory() -> Iterator[MockMemory]:
    """Makes PyTorch allocate CUDA tensors in the mock driver's memory; frees them at the end."""
    memory = MockMemory()
    with (
        patch.object(torch.cuda, "_lazy_init", lambda: None),
        patch.object(torch._C, "_cuda_getCurrentRawStream", lambda index: 0),
        torch.library._scoped_library("aten", "IMPL") as library,
    ):
        with warnings.catch_warnings():
            # these kernels have been registered before
            warnings.simplefilter("ignore", UserWarning)
            library.impl("empty.memory_format", memory.empty, "CUDA")
            library.impl("empty_strided", memory.empty_strided, "CUDA")
        yield memory
    memory.driver.api.mock_free()
