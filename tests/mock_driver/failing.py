"""The host side under the mock driver: every way to fail.

Run by test_cuda_host.py in a process of its own. Every case runs in a fork of that process, which has loaded
nothing yet; what it calls is `_core`, with tensors that lie in host memory and say they are on CUDA.
"""

from __future__ import annotations

import pytest
import torch
from control import INVALID_VALUE, OUT_OF_MEMORY, Driver, fresh
from work import draw, error_of, masked_mse

# Out of memory in one of these is no failure yet: torch gives back what it keeps for itself.
LOADING = ("cuThreadExchangeStreamCaptureMode", "cuModuleLoadData", "cuModuleGetFunction")


def _fails_at(position: int, code: int) -> tuple[str, int]:
    """An operator's first call, with one of the driver's failing: the error, the depth of the contexts."""
    driver = Driver()
    driver.fail_at(position, code)
    try:
        masked_mse()
    except RuntimeError as error:
        text = str(error)
    else:
        return "", driver.api.mock_depth()
    depth = driver.api.mock_depth()
    driver.fail_at(-1, 0)
    masked_mse()  # nothing of the failure was remembered
    return text, depth


@pytest.mark.parametrize(
    "code, name",
    [
        (OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY (out of memory)"),
        (INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE (no explanation)"),
        (99999, "error 99999 (no explanation)"),  # of a driver newer than anything here
    ],
)
def test_each_call_fails_in_turn(code: int, name: str) -> None:
    fresh(masked_mse)  # compiled, so that NVRTC makes no calls of its own
    for position, call in enumerate(fresh(_calls)):
        text, depth = fresh(_fails_at, position, code)
        function = call.removesuffix("_v2")
        if code == OUT_OF_MEMORY and function in LOADING:
            assert (text, depth) == ("", 0), "it is tried once more"
            continue
        assert text == f"masked_mse: the CUDA driver failed in {function}: {name}"
        assert depth == (1 if function == "cuCtxPopCurrent" else 0), (
            "the thread's context was left behind"
        )
    assert fresh(_fails_at, position + 1, code) == ("", 0), "there is no further call"


def _short_of_memory(monkeypatch: pytest.MonkeyPatch, gains: bool) -> tuple[str, int, int]:
    driver, emptied = Driver(), []

    def empty_cache() -> None:
        emptied.append(1)
        if gains:
            driver.fail_call("", 0)

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    driver.fail_call("cuModuleLoadData", OUT_OF_MEMORY)
    text = ""
    try:
        draw()
    except RuntimeError as error:
        text = str(error)
    return text, len(emptied), len(driver.calls("cuModuleLoadData"))


def test_torchs_unused_memory_is_given_back_for_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fresh(_short_of_memory, monkeypatch, True) == ("", 1, 2)
    failure = (
        "draw: the CUDA driver failed in cuModuleLoadData: CUDA_ERROR_OUT_OF_MEMORY (out of memory)"
    )
    assert fresh(_short_of_memory, monkeypatch, False) == (failure, 1, 2)


def _calls() -> list[str]:
    before = len(
        Driver().calls()
    )  # the page that pytest shows at the top has asked for the version
    masked_mse()
    return [call.split()[0] for call in Driver().calls()[before:]]


def _wrong_stream() -> str:
    return error_of(lambda: draw(0, Driver().stream(1)))


def test_a_stream_of_another_device() -> None:
    assert "CUDA_ERROR_INVALID_HANDLE" in fresh(_wrong_stream)


def _no_devices() -> str:
    Driver().api.mock_device_count(0)
    return error_of(draw)


def test_no_devices() -> None:
    assert fresh(_no_devices) == "draw: device cuda:0 must be one of the 0 that the CUDA driver has"


def test_the_structures_have_the_size_that_the_kernels_take() -> None:
    """Every field is 8 bytes, so the number of fields says it; their names are compared in Rust."""
    driver = Driver()
    sizes = {
        name: driver.api.mock_argument_bytes(name.encode())
        for name in ("masked_mse_finish", "masked_mse_scale_f32", "draw")
    }
    assert sizes == {
        "masked_mse_finish": 8 * (4 * 5 + 9 + 13),
        "masked_mse_scale_f32": 8 * 6,
        "draw": 8 * 5,
    }


def test_this_process_has_loaded_nothing() -> None:
    """So every case began at the beginning."""
    assert "cuInit" not in [call.split()[0] for call in Driver().calls()]
