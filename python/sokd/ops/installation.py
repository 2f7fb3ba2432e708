"""Checks of torch, NumPy and the compiled module, before any other import."""

from __future__ import annotations

import re
import struct
import sys
import sysconfig
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

try:
    import torch
except ImportError as error:
    raise ImportError(f"sokd: PyTorch must be installed ({error}): pip install torch") from error

__all__ = ["VERSION", "check", "release_of", "whole"]

VERSION = "0.2.0"  # as in Cargo.toml; `check` compares it with the compiled module
OLDEST_TORCH = (2, 5)
# --no-deps: pip would install torch again, too.
_REPAIR = "pip install --force-reinstall --no-deps sokd-*.whl, or `make build` in a clone"


def check() -> None:
    """Raise ImportError for an installation that does not work.

    >>> import sokd
    >>> sokd.ops.installation.check()
    """
    installed = str(getattr(torch, "__version__", "a folder of that name"))
    if release_of(installed) < OLDEST_TORCH:
        raise ImportError(f"sokd: torch must be 2.5 or newer, got {installed}")
    try:
        import_module("numpy")
    except ImportError as error:
        raise ImportError(f"sokd: NumPy must be installed ({error}): pip install numpy") from error
    try:
        compiled = whole("sokd._core").build_info()["version"]
    except (ImportError, AttributeError) as error:
        advice = f"install the wheel for {sysconfig.get_platform()}: {_REPAIR}"
        raise ImportError(f"sokd: the compiled module does not load ({error}): {advice}") from error
    if compiled != VERSION:
        raise ImportError(
            f"sokd: two versions are installed over each other, {VERSION} and {compiled} "
            f"(the compiled module): {_REPAIR}"
        )


def release_of(version: str) -> tuple[int, int]:
    """The first two numbers of a version, (0, 0) if it starts with none.

    >>> release_of("2.9.0a0+git1234")
    (2, 9)
    """
    found = re.match(r"(\d+)(?:\.(\d+))?", version)
    return (int(found[1]), int(found[2] or 0)) if found else (0, 0)


def whole(name: str) -> ModuleType:
    """Import a compiled module; ImportError if its file is cut off, which ends the process else."""
    spec = None if name in sys.modules else find_spec(name)
    path = Path(spec.origin) if spec is not None and spec.origin else None
    if path is not None and path.is_file() and _is_cut_off(path):
        raise ImportError(f"{path.name} is cut off")
    return import_module(name)


def _is_cut_off(path: Path) -> bool:
    """Whether an ELF file of 64 bits, little-endian, ends before its last segment does."""
    with path.open("rb") as file:
        head = file.read(64)
        if len(head) < 64 or head[:6] != b"\x7fELF\2\1":
            return False  # the loader of the system tells what is wrong
        file.seek(struct.unpack_from("<Q", head, 32)[0])
        size, count = struct.unpack_from("<2H", head, 54)
        table = file.read(size * count)
    if len(table) < size * count:
        return True
    # of each segment the offset, two addresses, and the size in the file
    segments = (struct.unpack_from("<4Q", table, size * i + 8) for i in range(count))
    return path.stat().st_size < max((start + length for start, *_, length in segments), default=0)


check()
