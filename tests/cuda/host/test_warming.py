"""The Rust host: graph capture, `sokd.warmup()`, `sokd.show_config()`.

Each test runs in a fork of the child process, which has loaded no kernel, and calls `_core` on
fakes of CUDA tensors.
"""

import ctypes
import os
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from pytest import MonkeyPatch
from support.cuda.calls import draw, error_of, loaded, masked_mse
from support.cuda.fake import HostCuda
from support.cuda.mock import Driver, forked

import sokd
from sokd import _core
from sokd.ops import config

CAPTURED = "and a CUDA graph is being captured; "


@forked
def test_a_kernel_that_is_not_loaded_cannot_be_captured() -> None:
    driver = Driver()
    stream = driver.stream()
    driver.capture(stream, True)
    advice = 'call sokd.warmup("cuda:0") before the capture'
    text = f"draw: kernel draw is not loaded on cuda:0, {CAPTURED}{advice}"
    assert error_of(lambda: draw(0, stream)) == text
    assert driver.calls("cuModuleLoadData") == []
    driver.capture(stream, False)
    _core.cuda_warmup(0, ["float32"], ["contiguous"], 1, stream)
    driver.capture(stream, True)
    before = len(driver.calls())
    draw(0, stream)
    # after the warm-up: what a capture allows, and nothing else
    allowed = ["cuCtxGetCurrent", "cuCtxPushCurrent_v2", "cuLaunchKernel", "cuCtxPopCurrent_v2"]
    assert driver.functions(before) == allowed


@forked
def test_a_kernel_beside_a_loaded_one_cannot_be_captured_either() -> None:
    """The driver loads the kernels of a module one by one."""
    driver = Driver()
    stream = driver.stream()
    masked_mse(0, stream)  # loads the module of all second stages, and one of its kernels
    driver.capture(stream, True)
    here = HostCuda(torch.zeros(1, 1, 2, 2))
    loss, weight = HostCuda(torch.zeros(())), HostCuda(torch.ones(1, 2, 2))
    rest = ("area", 1.0, (1, stream, partial(torch.empty, dtype=torch.uint8)))
    text = error_of(lambda: _core.masked_mse(loss, None, here, here, weight, *rest))
    start = "masked_mse: kernel masked_mse_area is not loaded on cuda:0, and a CUDA graph"
    assert text.startswith(start)


@forked
def test_the_advice_names_the_device_and_float64() -> None:
    """`sokd.warmup` leaves out float64 by default."""
    driver = Driver()
    stream = driver.stream(1)
    driver.capture(stream, True)
    maps = [HostCuda(torch.zeros(1, 1, 2, 2, dtype=torch.float64), 1) for _ in range(2)]
    loss = HostCuda(torch.zeros((), dtype=torch.float64), 1)
    rest = ("elements", 1.0, (1, stream, partial(torch.empty, dtype=torch.uint8)))
    text = error_of(lambda: _core.masked_mse(loss, None, *maps, None, *rest))
    advice = 'call sokd.warmup("cuda:1", dtypes=[torch.float64]) before the capture'
    assert text.endswith(advice)


@pytest.mark.parametrize("thread", [True, False], ids=["another thread", "this thread"])
@pytest.mark.parametrize("mode", [0, 1])
@forked
def test_a_kernel_is_loaded_beside_a_capture_of_another_stream(mode: int, thread: bool) -> None:
    """The capture stays valid, and the thread's own mode is as before."""
    driver = Driver()
    captured = driver.stream()

    def begin() -> None:
        driver.capture(captured, True, mode=mode)

    if thread:
        other = threading.Thread(target=begin)
        other.start()
        other.join()
    else:
        begin()
    draw(0, driver.stream())
    own = ctypes.c_int(1)
    driver.api.cuThreadExchangeStreamCaptureMode(ctypes.byref(own))
    assert own.value == 0 and not driver.is_invalidated(captured)


@forked
def test_the_mock_forbids_what_a_capture_forbids() -> None:
    """The test above relies on this error."""
    driver, module = Driver(), ctypes.c_void_p()
    stream = driver.stream()
    driver.api.cuInit(0)
    driver.api.mock_enter(0)
    driver.capture(stream, True)
    assert driver.api.cuModuleLoadData(ctypes.byref(module), b"none") == 900
    assert driver.is_invalidated(stream)


@forked
def test_the_default_stream_beside_a_capture_that_it_would_wait_for() -> None:
    driver = Driver()
    driver.capture(driver.stream(), True, blocking=True)
    start = f"draw: kernel draw is not loaded on cuda:0, {CAPTURED}"
    assert error_of(draw).startswith(start)


@forked
def test_warmup_compiles_every_kernel_once() -> None:
    _core.cuda_warmup(0, ["float32"], ["contiguous"], 2)
    # refine: 5 kernels with a dtype and an order, second stages; areas: 2; masked_mse: 1, scale,
    # second stages; draw
    assert loaded() == 12
    assert len(Driver().calls("cuModuleGetFunction")) == 15
    _core.cuda_warmup(0, ["float32"], ["contiguous"], 2)
    masked_mse()
    draw()
    assert loaded() == 12
    _core.cuda_warmup(0, ["float32"], ["contiguous", "channels_last"], 1)
    assert loaded() == 12 + 7  # those with an order


def test_warmup_refuses_what_it_does_not_know() -> None:
    """The error is the same with and without CUDA."""
    known = "torch.float64, torch.float32, torch.float16, torch.bfloat16"
    with pytest.raises(ValueError, match=rf"^warmup: dtypes must be of {known}, got torch.int64$"):
        sokd.warmup(dtypes=[torch.int64])
    with pytest.raises(ValueError, match=r"^warmup: layouts must be of contiguous, .* sliced$"):
        sokd.warmup("cpu", layouts=["sliced"])


@forked
def test_sokd_warmup(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda.device, "__enter__", lambda self: None)
    monkeypatch.setattr(torch.cuda.device, "__exit__", lambda *_: None)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)
    sokd.warmup("cpu")
    assert loaded() == 0
    sokd.warmup(dtypes=[torch.float32], layouts=["contiguous"])
    assert loaded() == 12
    draw(1)
    assert loaded() == 12


# --- sokd.show_config()
def test_show_config(monkeypatch: MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    sokd.show_config()
    line = capsys.readouterr().out.splitlines()[-1]
    folder, nvrtc = os.environ["SOKD_CACHE_DIR"], _core.cuda_info()["nvrtc"]
    kept = f"kernel cache {folder}"
    assert line == f"cuda     driver for 13.0, NVRTC {nvrtc}, {kept}; 2 devices visible"
    monkeypatch.setenv("SOKD_CACHE_DIR", "")
    assert "no kernel cache; 2 devices" in config.describe()


@pytest.mark.parametrize("variables, folder", [
    ({"SOKD_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
    ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/sokd"),
    ({"XDG_CACHE_HOME": "relative", "HOME": "/c"}, "/c/.cache/sokd"),
    ({"HOME": "/c"}, "/c/.cache/sokd"),
    ({}, None),
])  # fmt: skip
def test_where_compiled_kernels_are_kept(
    variables: dict[str, str], folder: str | None, monkeypatch: MonkeyPatch
) -> None:
    for name in ("SOKD_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert _core.cuda_info()["cache"] == (None if folder is None else Path(folder))
