"""Streams, graphs, several devices, no synchronisation, the cache, the sanitiser; needs a GPU.

Run by `pytest -m gpu tests/cuda/test_gpu_*.py`.
"""

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.cuda import device_cases
from support.cuda.device_cases import TorchDevice, everything_on, loss_steps
from torch import Tensor

import sokd
from sokd import _core, ops
from sokd.ops import runtime

DEVICE = device_cases.chosen_device()
if DEVICE.device.type != "cuda":
    pytest.skip("needs a CUDA device", allow_module_level=True)
SHAPE, LARGE = (2, 16, 8, 8), (8, 96, 57, 61)

pytestmark = pytest.mark.gpu
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
# PyTorch's own warnings, about streams and about its mode that detects synchronisations
prototypes = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def device() -> torch.device:
    assert runtime.has_kernel(torch.empty(0, device=DEVICE.device)), sokd.ops.config.why_no_cuda()
    return DEVICE.device


def fresh(code: str, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the code in a new process, which can import tests/support."""
    here = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
    own = os.environ | variables
    whole = [*command, sys.executable, "-c", here + textwrap.dedent(code)]
    return subprocess.run(whole, env=own, capture_output=True, text=True)


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(one, two, strict=True))


# --- the kernels are used, and the host never synchronises
def test_the_kernels_are_used(device: torch.device) -> None:
    everything_on(DEVICE, SHAPE)()
    assert "cuda" in runtime.KERNELS and "cuda" not in runtime._warned
    (line,) = [line for line in sokd.ops.config.describe().splitlines() if line.startswith("cuda")]
    assert "no kernels" not in line and "NVRTC" in line
    info = _core.cuda_info()
    assert info["compiled"] + info["cached"] > 0


@prototypes
@pytest.mark.parametrize("search", [None, "online"])
def test_nothing_waits(search: str | None, device: torch.device) -> None:
    """Neither an operator nor the loss synchronises, forward and backward; nor does the search."""
    run, step = everything_on(DEVICE, SHAPE), loss_steps(device, search=search)
    run(), step(), step()  # what is done once
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device=device).item()  # the mode is on
        run(), step(), step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_values_are_not_looked_at(device: torch.device) -> None:
    """A perm that is no permutation is an error on the CPU; here it gives NaN."""
    perm = torch.tensor([[0, 5, -1]], device=device)
    refined = ops.refine(torch.ones(1, 3, 2, 2, device=device), perm=perm)
    assert refined.isnan().flatten(2).all(2).tolist() == [[False, True, True]]


# --- streams and devices
def test_torchs_current_stream_is_used(device: torch.device) -> None:
    """A wait on a side stream delays the operators on it, and on no other."""
    run, side = everything_on(DEVICE, SHAPE), torch.cuda.Stream(device)
    expected = run()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # its memory is allocated before the wait
        torch.cuda._sleep(1_000_000_000)
        delayed = run()
        done = torch.cuda.Event()
        done.record()
    run()
    torch.cuda.current_stream().synchronize()
    assert not done.query(), "the side stream's work is not behind its wait"
    side.synchronize()
    assert same(delayed, expected)


def test_scratch_is_not_shared_between_streams(device: torch.device) -> None:
    run, streams = everything_on(DEVICE, LARGE), [torch.cuda.Stream(device) for _ in range(4)]
    expected = run()
    torch.cuda.synchronize()
    results = []
    for turn in range(20):
        with torch.cuda.stream(streams[turn % 4]):
            results.append(run())
    torch.cuda.synchronize()
    assert all(same(result, expected) for result in results)


@two_devices
def test_a_device_that_is_not_the_current_one(device: torch.device) -> None:
    other = TorchDevice(torch.device("cuda", 1))
    with torch.cuda.device(0):
        device_cases.refine(other, SHAPE, "contiguous", torch.float32, 2)
        device_cases.areas(other, SHAPE, "channels_last", torch.float32, 8, teacher=True)
        devices = [TorchDevice(torch.device("cuda", index)) for index in (0, 1)]
        results = [everything_on(device, SHAPE)() for device in devices]
        assert torch.cuda.current_device() == 0
    assert results[1][0].device.index == 1 and same(*results)


def test_tensors_of_two_devices_do_not_mix(device: torch.device) -> None:
    features = torch.zeros(SHAPE, device=device)
    sentence = f"refine: theta must be on the device of features, {device}, got cpu"
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        ops.refine(features, torch.zeros(1, 2, 3))


def test_more_than_2_31_elements(device: torch.device) -> None:
    shape = (33, 64, 1024, 1024)
    if torch.cuda.mem_get_info(device)[0] < 16e9:
        pytest.skip("needs 16 GB of free device memory")
    features = torch.zeros(shape, device=device, dtype=torch.float16)
    features[-1, -1, -1, -1] = 3
    refined = ops.refine(features, perm=torch.arange(64, device=device)[None])
    assert refined[-1, -1, -1, -1] == 3 and refined.count_nonzero() == 1
    loss = ops.masked_mse(features, features.new_zeros(()).expand(shape))
    assert loss.item() * features.numel() == pytest.approx(9.0, rel=1e-4)


# --- CUDA graphs
def captured(run: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """Captures a graph after a run on a side stream, as PyTorch requires."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


@prototypes
def test_a_graph_of_all_operators(device: torch.device) -> None:
    sokd.warmup(device, dtypes=[torch.float32])
    run = everything_on(DEVICE, SHAPE)
    expected = run()
    graph, results = captured(run)
    for _ in range(2):
        for each in results:
            each.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert same(results, expected)


@prototypes
@pytest.mark.parametrize("search", [None, "online"])
def test_a_graph_of_the_loss_draws_anew_at_each_replay(
    search: str | None, device: torch.device
) -> None:
    """The policy moves in each second replay, as in each second call."""
    sokd.warmup(device)
    step, own = (loss_steps(device, search=search) for _ in range(2))
    graph, results = captured(step)  # the run before it made one draw, the capture none
    step_at = [own() for _ in range(4)]
    for expected in step_at[1:]:
        graph.replay()
        torch.testing.assert_close(results, expected, rtol=1e-3, atol=1e-4)
    assert len({values[0].item() for values in step_at}) > 1


def test_a_kernel_that_is_not_loaded_cannot_be_captured() -> None:
    """Warmed up alone, without a run before the capture, it can."""
    code = """
        import torch, sokd
        x = torch.randn(2, 3, 4, 4, device="cuda")
        for _ in range(2):
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                y = x + 1
                try:
                    sokd.ops.masked_mse(x, y)
                    print("captured")
                except RuntimeError as error:
                    print(error)
            sokd.warmup(dtypes=[torch.float32])
    """
    done = fresh(code)
    assert done.returncode == 0, done.stderr
    refused, taken = done.stdout.splitlines()
    assert refused.startswith("masked_mse: kernel ") and taken == "captured"
    advice = 'call sokd.warmup("cuda:0") before the capture'
    assert refused.endswith(f"a CUDA graph is being captured; {advice}")


def test_from_the_cache_a_process_compiles_nothing(tmp_path: Path) -> None:
    """`pytest -rP` shows how long loading takes."""
    code = """
        import time, torch, sokd
        torch.zeros(1, device="cuda")
        start = time.perf_counter()
        sokd.warmup()
        torch.cuda.synchronize()
        seconds, info = time.perf_counter() - start, sokd._core.cuda_info()
        print(info["compiled"], info["cached"], f"{1e3 * seconds:.1f} ms")
    """
    runs = [fresh(code, SOKD_CACHE_DIR=str(tmp_path)) for _ in range(2)]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr + runs[1].stderr
    first, second = (run.stdout.split() for run in runs)
    assert first[1] == second[0] == "0" and first[0] == second[1] != "0"
    compiled, cached = (" ".join(run[2:]) for run in (first, second))
    print(f"warmup of all kernels: {compiled} compiled, {cached} from the cache")


@pytest.mark.skipif(
    shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed"
)
def test_no_access_is_out_of_bounds() -> None:
    code = """
        import torch
        from support.cuda.device_cases import TorchDevice, everything_on
        everything_on(TorchDevice(torch.device("cuda", 0)), (2, 3, 5, 7))()
        torch.cuda.synchronize()
        print("ran")
    """
    tool = "compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 9"
    done = fresh(code, *tool.split(), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    assert done.returncode == 0 and "ran" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
