"""What `import sokd` adds to `import torch`: processor time, in fresh processes one by one."""

import os
import subprocess
import sys
from collections.abc import Iterator
from statistics import median, quantiles
from typing import Any

from benches.harness import Options

CODE = """
import time
start = time.process_time()
import torch
middle = time.process_time()
import sokd
print((middle - start) * 1e3, (time.process_time() - middle) * 1e3)
"""


def cases(options: Options) -> Iterator[dict[str, Any]]:
    """sokd's part and torch's, of the same processes. The first process fills the caches."""
    turns = 3 if options.quick else 15
    times = [_process() for _ in range(turns + 1)][1:]
    for side, taken in zip(("import torch", "sokd"), zip(*times, strict=True), strict=True):
        first, _, third = quantiles(taken, n=4)
        yield {
            "work": "import sokd", "shape": "-", "dtype": "float32", "layout": "contiguous",
            "side": side, "turns": turns, "note": "on top of import torch; processor time",
            "median_ms": f"{median(taken):.1f}", "quarter_ms": f"{first:.1f}",
            "three_quarters_ms": f"{third:.1f}", "ratio": "", "gb_per_s": "",
        }  # fmt: skip


def _process() -> tuple[float, ...]:
    # An installed package is compiled to bytecode once.
    caching = {key: text for key, text in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, env=caching, capture_output=True, text=True, check=True)
    return tuple(map(float, done.stdout.split()))
