"""Imports sokd with another list of places where NVRTC can be."""

import importlib.util
import sys
from types import ModuleType


def replace(names: list[str]) -> None:
    """Replaces `config.nvrtc_names`. Call it before `import sokd`, which opens NVRTC."""
    folders = importlib.util.find_spec("sokd").submodule_search_locations
    packages = {"sokd": list(folders), "sokd.ops": [f"{folder}/ops" for folder in folders]}
    for name, path in packages.items():  # without running their __init__.py
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = path
    from sokd.ops import config

    config.nvrtc_names = lambda release: names
    for name in packages:
        del sys.modules[name]
    import sokd.ops  # noqa: F401

    for name, module in list(sys.modules.items()):  # imported before their packages
        package, _, child = name.rpartition(".")
        if package in packages and not hasattr(sys.modules[package], child):
            setattr(sys.modules[package], child, module)
