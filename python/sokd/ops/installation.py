"""Checks of torch, NumPy and the compiled module, before any other import."""

from __future__ import annotations

import sysconfig
from importlib import import_module

import torch

__all__ = ["VERSION", "check"]

VERSION = "0.2.0"  # as in Cargo.toml; `check` compares it with the compiled module
OLDEST_TORCH = (2, 5)


def check() -> None:
    """Raise ImportError for an installation that does not work.

    >>> import sokd
    >>> sokd.ops.installation.check()
    """
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if release < OLDEST_TORCH:
        raise ImportError(f"sokd: torch must be 2.5 or newer, got {torch.__version__}")
    try:
        import_module("numpy")
    except ImportError as error:
        raise ImportError(f"sokd: NumPy must be installed ({error}): pip install numpy") from error
    try:
        core = import_module("sokd._core")
    except ImportError as error:
        advice = f"install the wheel for {sysconfig.get_platform()}"
        raise ImportError(f"sokd: the compiled module does not load ({error}): {advice}") from error
    compiled = core.build_info()["version"]
    if compiled != VERSION:
        raise ImportError(
            f"sokd: two versions are installed over each other, {VERSION} and {compiled} "
            "(the compiled module): pip install --force-reinstall sokd"
        )


check()
