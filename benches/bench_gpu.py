"""`python -m benches.bench_gpu [--quick]`: the operators and a SoKD step on a CUDA device.

Writes a table and a CSV file. A side's GB/s is the bytes that the work must move (gpu_works.py,
docs/gpu.md) divided by its median time; its share is that divided by the device's copy bandwidth,
measured in the same run on 512 MB. Times are CUDA events around one call; the caches are full of
other memory before it, and the device is kept busy until Python has launched it.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from statistics import median
from typing import Any
from weakref import WeakKeyDictionary

import torch

import sokd
from benches.bench_loss import STEPS, step_case
from benches.gpu_works import has_goal, works
from benches.harness import (
    COLUMNS,
    LAYOUTS,
    Case,
    Options,
    Side,
    case_columns,
    run_case,
    show,
    timed,
    write,
)

SHAPES = ((64, 256, 56, 56), (64, 128, 16, 16), (32, 256, 28, 28), (2, 256, 100, 100))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TINY = (2, 16, 8, 8)  # on the CPU, where the tests run the bench
COPIED = 512 << 20
FLUSHED = 256 << 20  # more than any device's cache
# cycles, about a millisecond; so many for each that Python takes to launch a call
AHEAD = 2_000_000
GOAL, GOAL_FROM = 0.85, 32_000_000  # share of the copy bandwidth; bytes of a map
ADDED = ("share_of_copy", "goal", "device", "copy_gb_per_s", "driver", "nvrtc")


def cuda_clock(device: torch.device) -> Any:
    """A clock of calls: milliseconds on the device."""
    flush = torch.empty(FLUSHED, dtype=torch.uint8, device=device)
    # Weak, because a side holds its maps. The minimum over calls: one may wait for a full queue.
    launching: WeakKeyDictionary[Side, float] = WeakKeyDictionary()

    def clock(side: Side) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(device)
        flush.zero_()
        torch.cuda._sleep(int(AHEAD * (1 + launching.get(side, 0.0))))  # type: ignore[no-untyped-call]
        first.record()
        host = timed(side)
        last.record()
        launching[side] = min(host, launching.get(side, host))
        last.synchronize()
        return float(first.elapsed_time(last))

    return clock


def copy_bandwidth(options: Options, device: torch.device, size: int = COPIED) -> float:
    """GB/s of torch's copy, reads and writes together."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [options.clock(lambda: target.copy_(source)) for _ in range(18)]
    return 2 * size / median(times[3:]) / 1e6  # the first of them warm up


def cases(options: Options, device: torch.device) -> Iterator[Case]:
    """torch.compile for contiguous maps only: the layout hardly changes the time of its code."""
    on_cuda = device.type == "cuda"
    shapes = SHAPES[:1] if options.quick else SHAPES
    for shape in shapes if on_cuda else (TINY,):
        for dtype in DTYPES:
            for layout in LAYOUTS:
                compile_too = on_cuda and layout == "contiguous"
                yield from works(shape, dtype, layout, compile_too=compile_too)
    if on_cuda:
        for step in STEPS:
            yield step_case(*step)


def with_share(rows: list[dict[str, Any]], case: Case, copies: float) -> Iterator[dict[str, Any]]:
    """Each row with its share of the copy bandwidth; sokd's with the goal, where it has one."""
    map_bytes = torch.Size(case.shape).numel() * getattr(torch, case.dtype).itemsize
    for row in rows:
        if "gb_per_s" in row:
            share = float(row["gb_per_s"]) / copies
            row["share_of_copy"] = f"{share:.3f}"
            if row["side"] == "sokd" and map_bytes >= GOAL_FROM and has_goal(case):
                row["goal"] = f">= {GOAL} {'met' if share >= GOAL else 'MISSED'}"
        yield row


def where(device: torch.device, bandwidth: float) -> dict[str, Any]:
    """The device's columns."""
    columns: dict[str, Any] = {"device": device.type, "copy_gb_per_s": f"{bandwidth:.1f}"}
    if device.type == "cuda":
        info = sokd._core.cuda_info()
        columns["device"] = torch.cuda.get_device_name(device)
        columns |= {"driver": info["driver"], "nvrtc": info["nvrtc"]}
    return columns


def why_not(device: torch.device) -> str | None:
    """Why nothing can be measured on this device; None: it can."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"device must be cuda or cpu, got {device}"
    if not torch.cuda.is_available():
        return f"no CUDA device that torch {torch.__version__} can use"
    if (device.index or 0) >= torch.cuda.device_count():
        return f"no device {device}, there are {torch.cuda.device_count()}"
    why = sokd.ops.config.why_no_cuda()
    return f"a CUDA device, but no CUDA kernels ({why})" if why else None


def measure(device: torch.device, options: Options, rows: list[dict[str, Any]]) -> None:
    """Add every case's rows; a failure or a wrong answer adds a row with the reason."""
    bandwidth = copy_bandwidth(options, device, COPIED if device.type == "cuda" else 8 << 20)
    columns = where(device, bandwidth)
    print(f"{columns['device']}: copies at {bandwidth:.1f} GB/s, reads and writes together\n")
    for case in cases(options, device):
        what = f"{case.work}, {'x'.join(map(str, case.shape))} {case.dtype} {case.layout}"
        print(what, file=sys.stderr, flush=True)
        try:
            found = list(with_share(run_case(case, options), case, bandwidth))
        # on a small device; eager and the check take several times sokd's memory
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            found = [case_columns(case) | {"side": "sokd", "ratio": "left out: out of memory"}]
        except Exception as error:
            print(f"bench_gpu: {what}: {error}", file=sys.stderr)
            why = f"failed: {type(error).__name__}"
            found = [case_columns(case) | {"side": "sokd", "ratio": why}]
        rows += [row | columns for row in found]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.bench_gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ..; cpu tries the bench")
    parser.add_argument("--quick", action="store_true", help="one shape, few turns; to out/bench")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    why = why_not(device)
    if why is not None:
        print(f"bench_gpu: {why}", file=sys.stderr)
        return 1
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(device)
        sokd.warmup(device)
    options = Options(given.quick or not on_cuda, cuda_clock(device) if on_cuda else timed)
    rows: list[dict[str, Any]] = []
    try:
        with device:  # the cases allocate there
            measure(device, options, rows)
    finally:  # keep what was measured
        show(rows, "share_of_copy", "goal")
        name = torch.cuda.get_device_name(device) if on_cuda else device.type
        slug = re.sub(r"\W+", "-", name).strip("-").lower()
        print(write(f"gpu-{slug}", rows, options, (*COLUMNS, *ADDED)))
    return int(any(row["side"] == "sokd" and "failed" in row.get("ratio", "") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
