"""Tensors that say they are on CUDA and lie in host memory: the operators' gradients without a GPU.

A wrapper subclass around a CPU tensor, whose `device` is a CUDA one to all Python code (to autograd's engine,
which would look for CUDA streams, it is the CPU). The mode sends sokd's operators to the functions that are
registered for CUDA, and everything else to the CPU. It leaves out PyTorch's own choice of the registered
function (see dispatching.py), its CUDA streams and its CUDA allocator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from sokd.ops import areas, draw, masked_mse, refine  # noqa: F401  (the modules, by sys.modules below)


def _registered() -> dict[Any, Any]:
    import sys

    modules = {
        name: sys.modules[f"sokd.ops.{name}"] for name in ("areas", "draw", "masked_mse", "refine")
    }
    ops = torch.ops.sokd
    return {
        ops.refine.default: modules["refine"]._forward_kernel,
        ops.refine_backward.default: modules["refine"]._backward_kernel,
        ops.refine_dots.default: modules["refine"]._dots_kernel,
        ops.areas.default: modules["areas"]._kernel,
        ops.masked_mse.default: modules["masked_mse"]._kernel,
        ops.masked_mse_scale.default: modules["masked_mse"]._scale_kernel,
        ops.draw.default: modules["draw"]._kernel,
    }


class HostCuda(Tensor):
    """A CPU tensor under the name of a CUDA device."""

    host: Tensor
    index: int

    @staticmethod
    def __new__(cls, host: Tensor, index: int = 0) -> HostCuda:
        wrapper: HostCuda = Tensor._make_wrapper_subclass(
            cls, host.shape, host.stride(), host.storage_offset(), dtype=host.dtype, layout=host.layout,
        )  # fmt: skip
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
    """While it is on, CUDA tensors are made in host memory, and sokd's operators run as on CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = _registered()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:
            if func in self.kernels:
                return self.kernels[func](*args, **(kwargs or {}))
        return on_host(func, args, kwargs or {})
