"""The Rust host: every way to fail.

Each test runs in a fork of the child process, which has loaded no kernel, and calls `_core` on
fakes of CUDA tensors.
"""

import re

import pytest
import torch
from support.cuda.calls import draw, error_of, masked_mse
from support.cuda.emulator import ROOT
from support.cuda.mock import INVALID_VALUE, OUT_OF_MEMORY, Driver, forked, fresh

# Out of memory in one of these leads to a second try, after torch has freed its cached memory.
LOADING = ("cuThreadExchangeStreamCaptureMode", "cuModuleLoadData", "cuModuleGetFunction")


def _fails_at(position: int, code: int) -> tuple[str, int]:
    """An operator's first call while a call of the driver fails: the error, the contexts left."""
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
    masked_mse()  # the failure left nothing behind
    return text, depth


@pytest.mark.parametrize("code, name", [
    (OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY (out of memory)"),
    (INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE (no explanation)"),
    (99999, "error 99999 (no explanation)"),  # of a driver newer than anything here
])  # fmt: skip
def test_each_call_fails_in_turn(code: int, name: str) -> None:
    fresh(masked_mse)  # compiled, so that NVRTC makes no calls of its own
    for position, call in enumerate(fresh(_calls)):
        text, depth = fresh(_fails_at, position, code)
        function = call.removesuffix("_v2")
        if code == OUT_OF_MEMORY and function in LOADING:
            assert (text, depth) == ("", 0), "it is tried once more"
            continue
        assert text == f"masked_mse: the CUDA driver failed in {function}: {name}"
        assert depth == int(function == "cuCtxPopCurrent"), "the thread's context was left behind"
    assert fresh(_fails_at, position + 1, code) == ("", 0), "there is no further call"


@pytest.mark.parametrize("gains", [True, False])
@forked
def test_torchs_cached_memory_is_freed(gains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    driver, emptied = Driver(), []

    def empty_cache() -> None:
        emptied.append(1)
        if gains:
            driver.fail_call("", 0)

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    driver.fail_call("cuModuleLoadData", OUT_OF_MEMORY)
    if gains:
        draw()
    else:
        failure = "cuModuleLoadData: CUDA_ERROR_OUT_OF_MEMORY (out of memory)"
        assert error_of(draw) == f"draw: the CUDA driver failed in {failure}"
    assert len(emptied) == 1 and len(driver.calls("cuModuleLoadData")) == 2


def _calls() -> list[str]:
    before = len(Driver().calls())  # pytest's header has called cuDriverGetVersion
    masked_mse()
    return Driver().functions(before)


@forked
def test_a_stream_of_another_device() -> None:
    assert "CUDA_ERROR_INVALID_HANDLE" in error_of(lambda: draw(0, Driver().stream(1)))


@forked
def test_no_devices() -> None:
    Driver().api.mock_device_count(0)
    assert error_of(draw) == "draw: device cuda:0 must be one of the 0 that the CUDA driver has"


def fields(structure: str, text: str) -> int:
    """The number of fields of a structure in CUDA source, those of its parts included."""
    body = re.findall(rf"^struct {structure} {{\n(.*?)^}};", text, re.M | re.S)[0]
    declared = re.findall(r"^ +([\w ]+) (\w+(?:, \w+)*);", body, re.M)
    return sum(
        len(names.split(",")) * (fields(of, text) if of[0].isupper() else 1)
        for of, names in declared
    )


@pytest.mark.parametrize("operator, kernel, structure", [
    ("masked_mse", "masked_mse_finish", "MaskedMse"),
    ("masked_mse", "masked_mse_scale_f32", "Scale"),
    ("draw", "draw", "Draw"),
])  # fmt: skip
def test_every_field_of_a_structure_is_8_bytes(operator: str, kernel: str, structure: str) -> None:
    """Names and types are compared by the tests in Rust."""
    paths = ROOT / "src/cuda/common.cuh", ROOT / "src/ops" / operator / "kernel.cu"
    text = "".join(path.read_text() for path in paths)
    assert Driver().api.mock_argument_bytes(kernel.encode()) == 8 * fields(structure, text)


def test_this_process_has_loaded_nothing() -> None:
    """Each test runs in a fork of this process."""
    assert "cuInit" not in Driver().functions()
