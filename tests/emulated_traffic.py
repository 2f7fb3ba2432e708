"""Emulated kernels whose accesses to their maps are counted."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any, NamedTuple

from emulated import ROOT, Library, Map, build, compiled


class Traffic(NamedTuple):
    """Bytes of one map in one launch, as tests/cuda/traffic.cpp counts them."""

    read: int
    fetched: int
    distinct: int
    written: int
    kept: int


@functools.cache
def traced(operator: str) -> Path:
    """A library of the operator's kernels in float32 and bfloat16."""
    flags = ("-fsanitize=thread", "-fno-threadsafe-statics", "-DSOKD_DTYPES=5", "-c")
    kernels, hooks = build(operator, flags=flags), ROOT / "tests/cuda/traffic.cpp"
    target = kernels.with_suffix(".traced.so")
    compiled("-std=c++17", "-O1", "-fPIC", "-shared", kernels, hooks, "-o", target)
    return target


class TracedLibrary(Library):
    """Keeps, for each kernel launched, the traffic of every map of its structure."""

    def __init__(self, operator: str, map_bytes: int, **others: int) -> None:
        """`map_bytes`: of every map but those that are named with their own."""
        super().__init__(traced(operator))
        self.map_bytes, self.others = map_bytes, others
        self.seen: dict[str, dict[str, Traffic]] = {}

    def launch(self, name: str, blocks: Any, args: ctypes.Structure, threads: int = 256) -> None:
        watched = self._watched(args)
        pairs = [word for address, size in watched.values() for word in (address, size)]
        self.api.sokd_traffic_watch((ctypes.c_uint64 * len(pairs))(*pairs), len(watched))
        super().launch(name, blocks, args, threads)
        kernel = name.replace("_f32", "").replace("_bf16", "")
        self.seen[kernel] = {field: self._counts(i) for i, field in enumerate(watched)}

    def _watched(self, args: ctypes.Structure) -> dict[str, tuple[int, int]]:
        fields = {field[0]: getattr(args, field[0]) for field in args._fields_}
        maps = {name: value.pointer for name, value in fields.items() if isinstance(value, Map)}
        maps |= {
            name: value
            for name, value in fields.items()
            if name in self.others and name not in maps
        }
        return {
            name: (pointer, self.others.get(name, self.map_bytes))
            for name, pointer in maps.items()
            if pointer
        }

    def _counts(self, index: int) -> Traffic:
        counts = (ctypes.c_uint64 * 5)()
        self.api.sokd_traffic_counts(index, counts)
        return Traffic(*counts)
