"""The Rust host: what it launches where, and what it refuses.

Each test runs in a fork of the child process, which has loaded no kernel, and calls `_core` on
fakes of CUDA tensors.
"""

import re
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cuda.calls import SHAPE, draw, error_of, loaded, masked_mse
from support.cuda.fake import FakeCuda, HostCuda
from support.cuda.mock import Driver, forked, fresh
from support.raises import raises

from sokd import _core, ops, reference


@forked
def test_a_call_initialises_loads_and_launches_in_order() -> None:
    masked_mse()
    first, *rest = Driver().functions()
    of_nvrtc = {"cuInit", "cuDriverGetVersion"}
    mode = "cuThreadExchangeStreamCaptureMode"
    load = [mode, "cuModuleLoadData", "cuModuleGetFunction", mode, "cuLaunchKernel"]
    assert [first, *(call for call in rest if call not in of_nvrtc)] == [
        "cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetAttribute", "cuDeviceGetAttribute",
        "cuDevicePrimaryCtxRetain", "cuCtxGetCurrent", "cuCtxPushCurrent_v2",
        "cuStreamIsCapturing", *load, "cuStreamIsCapturing", *load, "cuCtxPopCurrent_v2",
    ]  # fmt: skip


@forked
def test_the_second_call_only_launches() -> None:
    masked_mse()
    before = len(Driver().calls())
    masked_mse()
    around = ["cuCtxGetCurrent", "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2"]
    launches = ["cuLaunchKernel"] * 2
    assert Driver().functions(before) == [*around[:2], *launches, around[2]]


@forked
def test_torchs_own_context_is_used_as_it_is() -> None:
    """The usual case: torch has made the device's context current."""
    masked_mse()
    driver = Driver()
    driver.api.mock_enter(0)
    before = len(driver.calls())
    masked_mse()
    assert driver.api.mock_depth() == 1
    assert driver.functions(before) == ["cuCtxGetCurrent", *["cuLaunchKernel"] * 2]


@forked
def test_grids_and_blocks() -> None:
    masked_mse(shape=(3, 20, 40, 40))
    kernel, finish = Driver().calls("cuLaunchKernel")
    # 3 samples x 2 chunks of 16 channels x 7 tiles of 256 positions
    assert kernel.startswith(
        "cuLaunchKernel masked_mse_f32_planes grid=42,1,1 block=256,1,1 device=0 stream="
    )
    assert finish.startswith("cuLaunchKernel masked_mse_finish grid=1,1,1 block=256,1,1")


@forked
def test_streams_and_devices() -> None:
    """Each device has its own context and its own architecture, hence its own modules."""
    driver = Driver()
    for device in (0, 0, 1):
        stream, before = driver.stream(device), len(driver.launches())
        masked_mse(device, stream)
        launches = driver.calls("cuLaunchKernel")[before:]
        found = [call.split("device=")[1] for call in launches]
        assert found == [f"{device} stream={hex(stream)}"] * 2


def _architectures(capability: tuple[int, int]) -> str | None:
    Driver().api.mock_capability(1, *capability)
    draw()
    try:
        draw(1)
    except RuntimeError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "capability, name", [((8, 6), "sm_86"), ((8, 8), "sm_88"), ((12, 5), "sm_121")]
)
def test_each_device_gets_code_for_its_architecture(
    capability: tuple[int, int], name: str, own_cache: Path
) -> None:
    assert fresh(_architectures, capability) is None
    found = {path.name.split("-")[2] for path in own_cache.iterdir()}
    assert found == {"sm_90", name}


def test_a_generation_that_nvrtc_does_not_know_gets_ptx(own_cache: Path) -> None:
    """The driver translates PTX; the mock driver accepts machine code only."""
    error = fresh(_architectures, (13, 0))
    assert error is not None and "cuModuleLoadData: CUDA_ERROR_INVALID_IMAGE" in error
    ptx = next(own_cache.glob("draw-1-compute_*")).read_bytes()
    assert b".visible .entry draw(" in ptx and ptx.endswith(b"\0")


@pytest.mark.parametrize("capability", [(3, 5), (6, 1), (7, 0)])
def test_a_device_too_old(capability: tuple[int, int]) -> None:
    version, (major, minor) = _core.cuda_info()["nvrtc"], capability
    why = f"cuda:1 has compute capability {major}.{minor}, and the kernels need 7.0"
    if capability >= (7, 0):  # NVRTC 12 compiles for it, 13 does not
        why = f"NVRTC {version} compiles for no device of compute capability 7.0"
        if int(version.split(".")[0]) < 13:
            pytest.skip("this NVRTC serves it")
    assert fresh(_architectures, capability) == f"draw: {why}"
    assert fresh(_on_an_old_device, capability) == (why, 0)


def _on_an_old_device(capability: tuple[int, int]) -> tuple[str, int]:
    driver, maps = Driver(), [torch.randn(SHAPE) for _ in range(2)]
    driver.api.mock_capability(1, *capability)
    with FakeCuda(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            loss = ops.masked_mse(*(HostCuda(each, 1) for each in maps))
    assert isinstance(loss, HostCuda) and torch.equal(loss.host, reference.masked_mse(*maps))
    (warning,) = [str(each.message) for each in caught]
    used = r"the plain PyTorch path \(sokd.reference\) is used"
    said = re.fullmatch(rf"sokd: no kernels for cuda in this build \((.*)\); {used}", warning)
    assert said is not None, warning
    return said[1], len(driver.launches())


@forked
def test_no_such_device() -> None:
    text = "draw: device cuda:2 must be one of the 2 that the CUDA driver has"
    assert error_of(lambda: draw(2)) == text


@forked
def test_threads_share_what_one_has_compiled() -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for device in (0, 1):
                draw(device)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert loaded() == 2  # one for each device


# --- the views
@forked
def test_tensors_of_another_device_never_reach_a_kernel() -> None:
    here, there = HostCuda(torch.zeros(SHAPE)), HostCuda(torch.zeros(SHAPE), 1)
    loss, on_cpu = HostCuda(torch.zeros(())), torch.zeros(())
    resources = (1, 0, None)
    rest = (None, "elements", 1.0, resources)
    plan = (*[None] * 5, HostCuda(torch.zeros(1, dtype=torch.int64), 1), 0)
    allocate = "allocate must be given for a kernel that needs scratch memory, got None"
    text = "masked_mse: teacher must be on the device of student, cuda:0, got cuda:1"
    with raises(ValueError, text):
        _core.masked_mse(loss, None, here, there, *rest)
    with raises(ValueError, "masked_mse: loss must be on the device of student, cuda:0, got cpu"):
        _core.masked_mse(on_cpu, None, here, here, *rest)
    with raises(ValueError, f"masked_mse: {allocate}"):
        _core.masked_mse(loss, None, here, here, *rest)
    with raises(ValueError, "refine: seed must be on the device of features, cuda:0, got cuda:1"):
        _core.refine_forward(here, here, plan, resources)
    assert Driver().launches() == []


class _NoRoom(Exception):
    pass


@forked
def test_the_allocators_own_exception_comes_back() -> None:
    """PyTorch's allocator raises torch.OutOfMemoryError."""

    def allocate(size: int) -> Any:
        raise _NoRoom(size)

    with pytest.raises(_NoRoom, match=r"^40$"):  # a sum for each of 2 blocks, and three numbers
        masked_mse(allocate=allocate)
    assert Driver().launches() == []
