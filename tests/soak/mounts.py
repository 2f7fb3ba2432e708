"""File systems that are full or read-only, where the user may mount them."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

FULL = "size=4k"  # less than a compiled kernel
READ_ONLY = "ro"


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[bool]:
    """A small file system on the folder; False, and none, for a user who may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        done = False
    try:
        yield done
    finally:
        if done:
            subprocess.run(["umount", str(folder)], check=True)
