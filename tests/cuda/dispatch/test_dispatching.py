"""CUDA tensors in the mock driver's memory: PyTorch's dispatch, both readers, checks, outputs.

PyTorch cannot record gradients of such tensors, because its engine asks for the device's streams:
test_operators_on_fakes.py tests gradients. Anything else that PyTorch does with such a tensor (a
copy to the host, say) fails for want of a device.
"""

from __future__ import annotations

import pytest
import torch
from support.cases import everything, laid_out
from support.cuda import device_cases
from support.cuda.memory import MockMemory

from sokd import ops

SHAPE = (2, 16, 8, 8)
pytestmark = pytest.mark.usefixtures("reader")


layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


def test_a_copy_to_the_host_would_fail(memory: MockMemory) -> None:
    """What the tests below rely on."""
    with pytest.raises(RuntimeError):
        memory.on(torch.zeros(1)).cpu()


@layouts
@dtypes
def test_refine(layout: str, dtype: torch.dtype, memory: MockMemory) -> None:
    features, plan = laid_out(SHAPE, layout, dtype), everything(SHAPE, 2, torch.float32)
    there = device_cases.moved(memory, plan)
    seed = torch.tensor([2**40 - 3])
    found = ops.refine(memory.on(features), **there, seed=memory.on(seed))
    device_cases.close(memory.back(found), ops.refine(features, **plan, seed=seed))


@layouts
@dtypes
def test_gradients_of_refine(layout: str, dtype: torch.dtype, memory: MockMemory) -> None:
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


@pytest.mark.parametrize("by_sample", [False, True])
@layouts
def test_refine_dots(layout: str, by_sample: bool, memory: MockMemory) -> None:
    device_cases.refine_dots(memory, SHAPE, layout, torch.float32, 3, by_sample=by_sample)


@pytest.mark.parametrize("teacher", [False, True])
@layouts
def test_areas(layout: str, teacher: bool, memory: MockMemory) -> None:
    device_cases.areas(memory, SHAPE, layout, torch.float32, 8, teacher=teacher)


@layouts
@dtypes
def test_masked_mse(layout: str, dtype: torch.dtype, memory: MockMemory) -> None:
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
def test_masked_mse_scale(layout: str, dtype: torch.dtype, memory: MockMemory) -> None:
    gradient = laid_out(SHAPE, layout, dtype)
    for upstream in (torch.tensor(2.5), torch.tensor(1.0)):
        upstream = upstream.to(torch.promote_types(dtype, torch.float32))
        there = memory.on(gradient.clone(memory_format=torch.preserve_format))
        torch.ops.sokd.masked_mse_scale(there, memory.on(upstream))
        assert torch.equal(memory.back(there), gradient * upstream)


def test_draw(memory: MockMemory) -> None:
    device_cases.draw(memory, 9)


def test_the_tensors_device_and_torchs_stream_are_used(
    memory: MockMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = memory.driver
    streams = {index: driver.stream(index) for index in (0, 1)}
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", streams.get)
    for index in (1, 0):
        ops.masked_mse(*(memory.on(torch.zeros(SHAPE), index) for _ in range(2)))
        kernel, finish = driver.calls("cuLaunchKernel")[-2:]
        for call in (kernel, finish):
            assert call.endswith(f"device={index} stream={streams[index]:#x}")


def test_arguments_are_checked_before_any_call_of_the_driver(memory: MockMemory) -> None:
    features, before = memory.on(torch.zeros(SHAPE)), len(memory.driver.calls())
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
    assert len(memory.driver.calls()) == before
