"""The CUDA kernels on the CPU: builds a kernel.cu with tests/cuda/emulator.h, launches it on guarded memory.

Guarded: every tensor lies against a page that must not be touched, so a read or a write past it is an error.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import mmap
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX", "g++")
_QUIET = (
    "unknown-pragmas",
    "unused-function",
    "unused-variable",
    "maybe-uninitialized",
    "uninitialized",
)
FLAGS = (
    *(
        "-x",
        "c++",
        "-std=c++17",
        "-O1",
        "-march=native",
        "-ffp-contract=off",
        "-fno-strict-aliasing",
    ),
    *(
        "-fPIC",
        "-shared",
        "-Wall",
        "-Wextra",
        "-Werror",
        *(f"-Wno-{warning}" for warning in _QUIET),
    ),
)
SCHEDULES = {"ascending": 0, "descending": 1, "random": 2, "warps": 3}

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]
NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64"}
_PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)


class EmulatorError(RuntimeError):
    """What the emulator found wrong with a launch."""


@functools.cache
def _folder() -> Path:
    folder = tempfile.mkdtemp(prefix="sokd-emulator-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def build(
    operator: str, *, mutate: tuple[str, str, str] | None = None, flags: tuple[str, ...] = ()
) -> Path:
    """A shared library of an operator's kernels; an object, if `flags` have -c.

    `mutate`: (file, text that is there once, other text).
    """
    parts = [operator, *flags, str(hash(mutate))]
    target = _folder() / ("-".join(parts).replace("/", "_") + ".so")
    if target.exists():
        return target
    include = ROOT / "src/cuda"
    source = ROOT / "src/ops" / operator / "kernel.cu"
    if mutate is not None:
        work = Path(tempfile.mkdtemp(dir=_folder()))
        for path in (*include.glob("*.cuh"), *source.parent.glob("*.cuh"), source):
            shutil.copy(path, work / path.name)
        name, text, other = mutate
        before = (work / name).read_text()
        assert before.count(text) == 1, f"{name} has {before.count(text)} times {text!r}"
        (work / name).write_text(before.replace(text, other))
        include, source = work, work / source.name
    emulator = ROOT / "tests/cuda/emulator.h"
    compiled(*FLAGS, *flags, "-include", emulator, "-I", include, source, "-o", target)
    return target


def compiled(*arguments: str | Path) -> None:
    """Runs the compiler."""
    done = subprocess.run([COMPILER, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]


class Library:
    """The kernels of one operator. Every launch goes through `schedule`."""

    def __init__(self, path: Path, schedule: str = "random") -> None:
        self.api = ctypes.CDLL(str(path))
        self.api.sokd_emulator_error.restype = ctypes.c_char_p
        self.api.sokd_emulator_name.restype = ctypes.c_char_p
        self.schedule, self.launches = schedule, 0

    def names(self) -> list[str]:
        return [
            self.api.sokd_emulator_name(i).decode() for i in range(self.api.sokd_emulator_count())
        ]

    def launch(
        self, name: str, blocks: int | tuple[int, ...], args: ctypes.Structure, threads: int = 256
    ) -> None:
        grid = (*((blocks,) if isinstance(blocks, int) else blocks), 1, 1)[:3]
        if 0 in grid:
            return
        self.launches += 1
        words = ctypes.c_uint * 3
        failed = self.api.sokd_emulator_launch(
            name.encode(),
            words(*grid),
            words(threads, 1, 1),
            ctypes.byref(args),
            ctypes.c_uint64(ctypes.sizeof(args)),
            SCHEDULES[self.schedule],
            ctypes.c_uint64(self.launches),
        )
        if failed:
            raise EmulatorError(f"{name}: {self.api.sokd_emulator_error().decode()}")


@functools.cache
def library(operator: str) -> Library:
    return Library(build(operator))


# --- memory


class Memory:
    """`size` bytes, all bits set, that end where a forbidden page begins (`front`: begin where one ends)."""

    def __init__(self, size: int, *, front: bool = False, align: int = 1) -> None:
        pages = (size + 2 * align + _PAGE - 1) // _PAGE + 2
        self._map = mmap.mmap(-1, pages * _PAGE)
        first = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.size = size
        room = (pages - 2) * _PAGE
        self.pointer = first + _PAGE if front else (first + _PAGE + room - size) // align * align
        if align < 16 and not front and self.pointer % 16 == 0:
            self.pointer -= align  # asked for without alignment: then really without
        for page in (first, first + _PAGE + room):
            if _libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(_PAGE), 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        ctypes.memset(self.pointer, 0xFF, size)

    def tensor(self, shape: Any, strides: Any, dtype: torch.dtype) -> Tensor:
        """A copy of what lies here, with these strides, as a tensor of its own."""
        flat = torch.empty(max(self.size // dtype.itemsize, 1), dtype=dtype)
        ctypes.memmove(flat.data_ptr(), self.pointer, self.size)
        return torch.as_strided(flat, tuple(shape), tuple(strides))


def span(tensor: Tensor) -> int:
    """Elements from the first to the last that a tensor reaches."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


class Placed:
    """A tensor's values, strides and all, in guarded memory."""

    def __init__(
        self, tensor: Tensor, *, align: int = 16, front: bool = False, fill: bool = True
    ) -> None:
        self.like = tensor
        size = span(tensor) * tensor.element_size()
        self.memory = Memory(size, align=align, front=front)
        if fill:
            ctypes.memmove(self.memory.pointer, tensor.data_ptr(), size)

    @property
    def pointer(self) -> int:
        return self.memory.pointer

    def read(self) -> Tensor:
        return self.memory.tensor(self.like.shape, self.like.stride(), self.like.dtype)


# --- the host's structures


def structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


U64, I64, REAL = ctypes.c_uint64, ctypes.c_int64, ctypes.c_double
Map = structure("Map", pointer=U64, n=I64, c=I64, y=I64, x=I64)
Part = structure("Part", pointer=U64, dtype=I64, plan=I64, group=I64, a=I64, b=I64)
Out = structure("Out", pointer=U64, dtype=I64, groups=I64, group=I64, a=I64, b=I64)
Grid = structure(
    "Grid",
    batch=I64,
    channels=I64,
    height=I64,
    width=I64,
    positions_per_block=I64,
    channels_per_block=I64,
    lane_bits=I64,
    tiles=I64,
    chunks=I64,
)


def map_of(placed: Placed | None) -> Any:
    """[B, C, H, W], or [B, H, W] without channels."""
    if placed is None:
        return Map()
    strides = placed.like.stride()
    return Map(placed.pointer, *(strides if len(strides) == 4 else (strides[0], 0, *strides[1:])))


def is_lanes(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def is_wide(order: str, maps: list[Placed]) -> bool:
    """Whether 128-bit access is allowed on all of these maps."""
    size, (_, channels, height, width) = maps[0].like.element_size(), maps[0].like.shape
    if any(placed.pointer % 16 for placed in maps):
        return False
    if order == "planes":
        fits = height * width % max(4, 16 // size) == 0
        return fits and all(placed.like.is_contiguous() for placed in maps)
    last = torch.channels_last
    return channels % max(4, 16 // size) == 0 and all(
        p.like.is_contiguous(memory_format=last) for p in maps
    )


def _power_above(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def grid_of(order: str, tensor: Tensor, *, dots: bool = False) -> tuple[Any, int]:
    """The Grid of common.cuh, and the number of blocks."""
    batch, channels, height, width = tensor.shape
    cells = height * width
    if order == "planes":
        positions = min(max(_power_above(cells), 32), 256)
        large = batch * channels * cells >= 2**23 and not dots
        per_block, bits = (8192 if large else 4096) // positions, positions.bit_length() - 1
    else:
        per_block = min(channels, 128)
        lanes = max(4, _power_above(-(-per_block // max(4, 16 // tensor.element_size()))))
        bits, positions = lanes.bit_length() - 1, 1024 // lanes
    tiles, chunks = -(-cells // positions), -(-channels // max(per_block, 1))
    return Grid(
        batch, channels, height, width, positions, per_block, bits, tiles, chunks
    ), batch * chunks * tiles


def scratch(count: int) -> Memory:
    return Memory(count * 8, align=8)
