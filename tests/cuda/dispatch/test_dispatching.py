"""CUDA tensors in the mock driver's memory: PyTorch's dispatch, both readers, checks, outputs.

PyTorch cannot record gradients of such tensors, because its engine reads the device's streams:
test_operators_on_fakes.py tests gradients. Anything else that PyTorch does with such a tensor (a
copy to the host, say) fails for want of a device.
"""

import pytest
import torch
from support.cases import DType, laid_out
from support.cuda import checks
from support.cuda.memory import MockMemory
from support.raises import raises

from sokd import ops

SHAPE = (2, 16, 8, 8)
pytestmark = pytest.mark.usefixtures("reader")


layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


def test_a_copy_to_the_host_would_fail(memory: MockMemory) -> None:
    """The tests below rely on this error."""
    with pytest.raises(RuntimeError):
        memory.on(torch.zeros(1)).cpu()


@layouts
@dtypes
def test_every_operator(layout: str, dtype: DType, memory: MockMemory) -> None:
    """Values and gradients, with the checks of the kernels' tests."""
    checks.check_forward(memory, SHAPE, dtype, layout, 2, "thspk")
    checks.check_backward(memory, SHAPE, dtype, layout, 2, "thspk")
    checks.check_dots(memory, SHAPE, dtype, layout, 1, 3)
    checks.check_dots(memory, SHAPE, dtype, layout, 2, 3, by_sample=True)
    for teacher, normalise in ((False, "elements"), (True, "area")):
        checks.check_areas(memory, SHAPE, dtype, layout, 8, 3, teacher, 0)
        checks.check_masked_mse(memory, SHAPE, dtype, layout, torch.float32, normalise)


@layouts
@dtypes
def test_a_seed_on_the_device(layout: str, dtype: DType, memory: MockMemory) -> None:
    features, upstream = (laid_out(SHAPE, layout, dtype) for _ in range(2))
    given, found = {"sigma": torch.rand(2)}, []
    for seed in (2**40 - 3, torch.tensor([2**40 - 3])):
        gradients = checks.refine_backward(memory, upstream, features, seed=seed, **given)
        found.append([checks.refine(memory, features, seed=seed, **given), *gradients.values()])
    assert all(map(torch.equal, *found)) and found[0][2].any()


@layouts
@dtypes
def test_masked_mse_scale(layout: str, dtype: DType, memory: MockMemory) -> None:
    gradient = laid_out(SHAPE, layout, dtype)
    for upstream in (torch.tensor(2.5), torch.tensor(1.0)):
        upstream = upstream.to(torch.promote_types(dtype, torch.float32))
        there = memory.on(gradient.clone(memory_format=torch.preserve_format))
        torch.ops.sokd.masked_mse_scale(there, memory.on(upstream))
        assert torch.equal(memory.back(there), gradient * upstream)


def test_draw(memory: MockMemory) -> None:
    checks.check_draw(memory, 9)


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
    theta, rule = torch.zeros(1, 2, 3), "must be on the device of features, cuda:0, got"
    for plan, text in (
        ({"theta": theta}, f"theta {rule} cpu"),
        ({"theta": memory.on(theta, 1)}, f"theta {rule} cuda:1"),
        ({"seed": torch.tensor([1])}, f"seed {rule} cpu"),
    ):
        with raises(ValueError, f"refine: {text}"):
            ops.refine(features, **plan)
    assert len(memory.driver.calls()) == before
