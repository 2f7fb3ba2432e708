"""PyTorch's own CUDA tensors, on host memory: its choice of the function, both readers, checks and outputs.

Made by DLPack, which takes any pointer at its word. PyTorch cannot allocate such memory here, so its two
functions that do are replaced; and it cannot record gradients of such tensors (its engine asks for the
device's streams), which operators.py does with fakes. Run by test_cuda_host.py in a process of its own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import device_cases
import pytest
import torch
from control import Driver
from support.cases import everything, laid_out
from torch import Tensor

from sokd import ops

SHAPE = (2, 16, 8, 8)


class _Device(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("index", ctypes.c_int32))


class _Type(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("rank", ctypes.c_int32),
        ("dtype", _Type),
        ("sizes", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("offset", ctypes.c_uint64),
        # of the structure around it
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


CUDA = 2
CODES = {torch.float64: 2, torch.float32: 2, torch.float16: 2, torch.bfloat16: 4}
CODES |= {torch.int64: 0, torch.bool: 6, torch.uint8: 1}
_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = (
    ctypes.py_object,
    (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p),
)


class HostMemory:
    """Makes CUDA tensors, and remembers which CPU tensor lies behind each."""

    def __init__(self) -> None:
        self.behind: dict[int, Tensor] = {}
        self.kept: list[Any] = []

    def on(self, tensor: Tensor, index: int = 0) -> Tensor:
        words = ctypes.c_int64 * max(tensor.dim(), 1)
        sizes, strides = words(*tensor.shape), words(*tensor.stride())
        dtype = _Type(CODES[tensor.dtype], 8 * tensor.element_size(), 1)
        about = _Tensor(
            tensor.data_ptr(), _Device(CUDA, index), tensor.dim(), dtype, ctypes.addressof(sizes),
            ctypes.addressof(strides), 0, None, None,
        )  # fmt: skip
        self.kept.append((about, sizes, strides, tensor))
        self.behind[tensor.data_ptr()] = tensor
        made: Tensor = torch._C._from_dlpack(_capsule(ctypes.addressof(about), b"dltensor", None))
        return made

    def back(self, tensor: Tensor) -> Tensor:
        assert type(tensor) is Tensor and tensor.device.type == "cuda", "it never left the CPU"
        return self.behind[tensor.data_ptr()]

    def empty(
        self, size: Any, *, device: torch.device, dtype: Any = None, **options: Any
    ) -> Tensor:
        options = {"memory_format": options.get("memory_format") or torch.contiguous_format}
        return self.on(torch.empty(size, dtype=dtype, **options), device.index or 0)

    def empty_strided(
        self, size: Any, stride: Any, *, device: torch.device, dtype: Any = None, **_: Any
    ) -> Tensor:
        return self.on(torch.empty_strided(size, stride, dtype=dtype), device.index or 0)


@pytest.fixture
def memory(reader: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostMemory]:
    """Whatever else PyTorch does with a CUDA tensor (a copy to the host, say) fails for want of a device."""
    memory = HostMemory()
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("empty.memory_format", memory.empty, "CUDA")
        library.impl("empty_strided", memory.empty_strided, "CUDA")
        yield memory


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*Overriding a previously registered kernel:UserWarning"
)
layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


def test_a_copy_to_the_host_would_fail(memory: HostMemory) -> None:
    """What the cases below rest on."""
    with pytest.raises(RuntimeError):
        memory.on(torch.zeros(1)).cpu()


@layouts
@dtypes
def test_refine(layout: str, dtype: torch.dtype, memory: HostMemory) -> None:
    features, plan = laid_out(SHAPE, layout, dtype), everything(SHAPE, 2, torch.float32)
    there = device_cases.moved(memory, plan)
    seed = torch.tensor([2**40 - 3])
    found = ops.refine(memory.on(features), **there, seed=memory.on(seed))
    device_cases.close(memory.back(found), ops.refine(features, **plan, seed=seed))


@layouts
@dtypes
def test_gradients_of_refine(layout: str, dtype: torch.dtype, memory: HostMemory) -> None:
    upstream, features = laid_out(SHAPE, layout, dtype), laid_out(SHAPE, layout, dtype)
    plan, straight = everything(SHAPE, 2, torch.float32), torch.zeros(2)
    seed, wanted = torch.tensor([7]), [True] * 4
    backward = torch.ops.sokd.refine_backward
    expected = backward(upstream, features, *plan.values(), seed, 0, straight, wanted)
    parts = device_cases.moved(memory, plan).values()
    maps = map(memory.on, (upstream, features))
    found = backward(*maps, *parts, memory.on(seed), 0, memory.on(straight), wanted)
    for one, other in zip(found, expected, strict=True):
        device_cases.close(memory.back(one), other, times=20.0)


@layouts
def test_refine_dots(layout: str, memory: HostMemory) -> None:
    device_cases.refine_dots(memory, SHAPE, layout, torch.float32, 3)


@pytest.mark.parametrize("teacher", [False, True])
@layouts
def test_areas(layout: str, teacher: bool, memory: HostMemory) -> None:
    device_cases.areas(memory, SHAPE, layout, torch.float32, 8, teacher=teacher)


@layouts
@dtypes
def test_masked_mse(layout: str, dtype: torch.dtype, memory: HostMemory) -> None:
    student, teacher = laid_out(SHAPE, layout, dtype), laid_out(SHAPE, layout, dtype)
    maps, weight = (student, teacher), torch.rand(2, 8, 8)
    loss = ops.masked_mse(*map(memory.on, maps), memory.on(weight))
    device_cases.close(memory.back(loss), ops.masked_mse(*maps, weight))
    both = torch.ops.sokd.masked_mse
    scale = float(student.numel())
    expected = both(*maps, weight, "area", scale, True)
    found = both(*map(memory.on, maps), memory.on(weight), "area", scale, True)
    for one, other in zip(found, expected, strict=True):
        device_cases.close(memory.back(one), other)


@layouts
@dtypes
def test_masked_mse_scale(layout: str, dtype: torch.dtype, memory: HostMemory) -> None:
    gradient = laid_out(SHAPE, layout, dtype)
    for upstream in (torch.tensor(2.5), torch.tensor(1.0)):
        upstream = upstream.to(torch.promote_types(dtype, torch.float32))
        there = memory.on(gradient.clone(memory_format=torch.preserve_format))
        torch.ops.sokd.masked_mse_scale(there, memory.on(upstream))
        assert torch.equal(memory.back(there), gradient * upstream)


def test_draw(memory: HostMemory) -> None:
    device_cases.draw(memory, 9)


def test_the_tensors_device_and_torchs_stream_are_used(
    memory: HostMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver()
    streams = {index: driver.stream(index) for index in (0, 1)}
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", streams.get)
    for index in (1, 0):
        ops.masked_mse(*(memory.on(torch.zeros(SHAPE), index) for _ in range(2)))
        kernel, finish = driver.calls("cuLaunchKernel")[-2:]
        for call in (kernel, finish):
            assert call.endswith(f"device={index} stream={streams[index]:#x}")


def test_arguments_are_judged_before_anything_is_launched(memory: HostMemory) -> None:
    features, before = memory.on(torch.zeros(SHAPE)), len(Driver().calls())
    for theta, other in (
        (torch.zeros(1, 2, 3), "cpu"),
        (memory.on(torch.zeros(1, 2, 3), 1), "cuda:1"),
    ):
        sentence = f"refine: theta must be on the device of features, cuda:0, got {other}"
        with pytest.raises(ValueError, match=f"^{sentence}$"):
            ops.refine(features, theta)
    with pytest.raises(
        ValueError, match=r"^refine: seed must be on the device of features, cuda:0, got cpu$"
    ):
        ops.refine(features, seed=torch.tensor([1]))
    assert len(Driver().calls()) == before
