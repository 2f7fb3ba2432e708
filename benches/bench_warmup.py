"""The time of a kernel before its first launch: NVRTC on a new machine, later the cache on disk.

Processor time. The host side runs in separate processes under the mock driver of tests/ (no GPU is
needed); the time a real driver takes to load the code is not included.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from itertools import product
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

from benches.harness import Options

ARCHITECTURE = 90
# operator, bit of SOKD_KERNELS, kernel, whether it differs by dtype and layout
UNITS = (
    *(("refine", 1, "refine_forward", True), ("refine", 2, "refine_backward", True)),
    *(("refine", 4, "refine_adjoint", True), ("refine", 16, "refine_dots", True)),
    *(("refine", 8, "second stages of refine", False), ("areas", 1, "areas_scan", True)),
    *(("areas", 2, "areas_pick", False), ("masked_mse", 1, "masked_mse", True)),
    *(
        ("masked_mse", 2, "second stages of masked_mse", False),
        ("masked_mse", 4, "masked_mse_scale", False),
    ),
    ("draw", 1, "draw", False),
)
BITS = {"float32": 1, "bfloat16": 4}
ORDERS = {"contiguous": 1, "channels_last": 2}
# The time of a process's warm-up, divided by the number of units.
WARM_UP = """
import time
from sokd import _core
start = time.process_time()
_core.cuda_warmup(0, ["float32"], ["contiguous"], 1)
info = _core.cuda_info()
units = info["compiled"], info["cached"]
print((time.process_time() - start) * 1e3 / sum(units), *units)
"""


def cases(options: Options) -> Iterator[dict[str, Any]]:
    """One row for each kernel's compilation, then the whole host side, cold and from the cache."""
    times = 1 if options.quick else 3
    for operator, bit, name, varies in UNITS:
        for dtype, layout in product(BITS, ORDERS) if varies else [("float32", "contiguous")]:
            choice = {"DTYPES": BITS[dtype], "ORDERS": ORDERS[layout], "KERNELS": bit}
            defines = [f"SOKD_{what}={bits}" for what, bits in choice.items()]
            taken = [_compiled(operator, *defines) for _ in range(times)]
            yield _row(f"compile {name}", dtype, layout, taken)
    yield from _processes(times)


def _compiled(operator: str, *defines: str) -> float:
    cubins = import_module("support.cuda.cubins")
    start = process_time()
    cubins.compile_cubin(operator, ARCHITECTURE, *defines)
    return (process_time() - start) * 1e3


def _processes(times: int) -> Iterator[dict[str, Any]]:
    environment = import_module("support.cuda.mock").environment
    with tempfile.TemporaryDirectory() as folder:
        mock = os.environ | environment(Path(folder))
        cold, cached = [], []
        for turn in range(times):
            own = mock | {"SOKD_CACHE_DIR": str(Path(folder) / f"cache{turn}")}
            cold.append(_warm_up(own, from_cache=False))
            cached.append(_warm_up(own, from_cache=True))
    yield _row("a kernel's way to the driver, compiled", "float32", "contiguous", cold)
    yield _row("a kernel's way to the driver, from the cache", "float32", "contiguous", cached)


def _warm_up(environment: dict[str, str], *, from_cache: bool) -> float:
    done = subprocess.run(
        [sys.executable, "-c", WARM_UP], env=environment, capture_output=True, text=True, check=True
    )
    each, compiled, cached = done.stdout.split()
    assert (compiled if from_cache else cached) == "0", done.stdout
    return float(each)


def _row(work: str, dtype: str, layout: str, taken: list[float]) -> dict[str, Any]:
    note = f"processor time; sm_{ARCHITECTURE}; no GPU"
    row = {
        "work": work, "shape": "-", "dtype": dtype, "layout": layout, "side": "sokd",
        "turns": len(taken),
    }  # fmt: skip
    return row | {"median_ms": f"{median(taken):.2f}", "note": note}
