"""Fakes of CUDA tensors in host memory: the operators' gradients without a GPU.

A fake is a wrapper subclass around a CPU tensor. Its `device` is a CUDA device to Python code, and
the CPU to autograd's engine, which would look for CUDA streams. The mode sends sokd's operators to
the functions registered for CUDA, and all others to the CPU. Not covered: PyTorch's dispatch to
these functions (see test_dispatching.py), its CUDA streams, its CUDA allocator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


class HostCuda(Tensor):
    """A CPU tensor under the name of a CUDA device."""

    host: Tensor
    index: int

    @staticmethod
    def __new__(cls, host: Tensor, index: int = 0) -> HostCuda:
        wrapper: HostCuda = Tensor._make_wrapper_subclass(
            cls, host.shape, host.stride(), host.storage_offset(), dtype=host.dtype
        )
        wrapper.host, wrapper.index = host, index
        return wrapper

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", self.index)

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def __repr__(self, **_: Any) -> str:
        return f"HostCuda({self.host!r}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return on_host(func, args, kwargs or {})


def on_host(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    found: list[int] = []

    def device_of(item: Any) -> Any:
        if isinstance(item, HostCuda):
            found.append(item.index)
            return item.host
        return item

    to_device = kwargs.get("device")
    if to_device is not None:
        kwargs = kwargs | {"device": "cpu"}
    args, kwargs = tree_map(device_of, (args, kwargs))
    result = func(*args, **kwargs)
    if to_device is not None:
        wanted = torch.device(to_device)
        index = (wanted.index or 0) if wanted.type == "cuda" else None
    else:
        index = found[0] if found else None
    if index is None:
        return result
    return tree_map(lambda item: HostCuda(item, index) if type(item) is Tensor else item, result)


class FakeCuda(TorchDispatchMode):
    """A mode in which CUDA tensors are in host memory and sokd's operators run as on CUDA."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:
            if func.namespace == "sokd":
                return func.redispatch(CUDA, *args, **(kwargs or {}))
        return on_host(func, args, kwargs or {})
