"""Compiles the CUDA kernels with NVRTC; reads registers, memory and instructions of the result."""

import ctypes
import functools
import re
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[3]
OPTIONS = ("--std=c++17", "--fmad=false", "-default-device")


def _packages() -> list[Path]:
    """Folders of wheels beside torch that carry CUDA's libraries and tools."""
    site = Path(torch.__file__).parent.parent
    return [*site.glob("nvidia/*"), site / "triton/backends/nvidia"]


@functools.cache
def nvrtc() -> Any:
    """PyTorch's NVRTC, or None; its builtins, which it looks up by name, are opened first."""
    for folder in _packages():
        for path in sorted(folder.glob("lib/libnvrtc.so.*")):
            for half in folder.glob("lib/libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(half), ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(str(path))
    return None


def tool(name: str) -> str | None:
    """cuobjdump or nvdisasm: of a wheel, or of the path."""
    for folder in _packages():
        if (folder / "bin" / name).is_file():
            return str(folder / "bin" / name)
    return shutil.which(name)


def headers() -> list[Path]:
    """Folders with the headers of torch's own CUDA, beside its libraries."""
    found = [folder / "include" for folder in _packages() if folder.parent.name == "nvidia"]
    return [
        folder
        for folder in found
        if (folder / "cuda.h").is_file() or (folder / "nvrtc.h").is_file()
    ]


def architectures() -> list[int]:
    """The architectures that this NVRTC supports: 75, 80, .. ."""
    count = ctypes.c_int()
    nvrtc().nvrtcGetNumSupportedArchs(ctypes.byref(count))
    found = (ctypes.c_int * count.value)()
    nvrtc().nvrtcGetSupportedArchs(found)
    return list(found)


def compile_cubin(operator: str, architecture: int, *defines: str) -> bytes:
    """The cubin of an operator's kernels; RuntimeError with NVRTC's log."""
    folder = ROOT / "src/ops" / operator
    paths = [*(ROOT / "src/cuda").glob("*.cuh"), *folder.glob("*.cuh")]
    library, program, strings = nvrtc(), ctypes.c_void_p(), ctypes.c_char_p * len(paths)
    texts = strings(*(path.read_bytes() for path in paths))
    names = strings(*(path.name.encode() for path in paths))
    source = (folder / "kernel.cu").read_bytes()
    library.nvrtcCreateProgram(
        ctypes.byref(program), source, b"kernel.cu", len(paths), texts, names
    )
    options = [
        *OPTIONS,
        f"--gpu-architecture=sm_{architecture}",
        *(f"-D{define}" for define in defines),
    ]
    failed = library.nvrtcCompileProgram(
        program,
        len(options),
        (ctypes.c_char_p * len(options))(*(option.encode() for option in options)),
    )
    log = _fetch(program, "ProgramLog").decode(errors="replace").strip("\0\n")
    if failed or log:
        raise RuntimeError(f"{operator} for sm_{architecture}: {log}")
    cubin = _fetch(program, "CUBIN")
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin


def _fetch(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc(), f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc(), f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


# Threads of a multiprocessor; 2048 where not listed.
MOST_THREADS = {75: 1024, 86: 1536, 87: 1536, 88: 1536, 89: 1536, 110: 1536, 120: 1536, 121: 1536}


@dataclass
class Resources:
    """The resources of one kernel. `stack` is local memory: spilled registers, other arrays."""

    registers: int = 0
    stack: int = 0
    shared: int = 0
    # instructions by name and width, where disassembled
    loads: Counter[str] = field(default_factory=Counter)

    def occupancy(self, architecture: int, threads: int = 256) -> float:
        """Share of a multiprocessor's warps that the registers leave room for."""
        most = MOST_THREADS.get(architecture, 2048)
        blocks = 65536 // (-(-self.registers // 8) * 8 * threads)
        return min(blocks * threads / most, 1.0)


_INFO = {0x2F: "registers", 0x11: "stack"}  # EIATTR_REGCOUNT, EIATTR_FRAME_SIZE


def resources(cubin: bytes) -> dict[str, Resources]:
    """Registers, frame and static shared memory of each kernel, read from the ELF itself."""
    sections = _sections(cubin)
    strings, symbols = sections[".strtab"], sections[".symtab"]
    names = [
        _text(strings, struct.unpack_from("<I", symbols, at)[0])
        for at in range(0, len(symbols), 24)
    ]
    texts = [name for name in sections if name.startswith(".text.")]
    found = {name.removeprefix(".text."): Resources() for name in texts}
    info, at = sections[".nv.info"], 0
    while at + 4 <= len(info):
        kind, attribute, size = struct.unpack_from("<BBH", info, at)
        if kind == 4 and attribute in _INFO:
            symbol, value = struct.unpack_from("<II", info, at + 4)
            if names[symbol] in found:  # else a subroutine of the compiler
                setattr(found[names[symbol]], _INFO[attribute], value)
        at += 4 + (size if kind == 4 else 0)
    for name, kernel in found.items():
        kernel.shared = _sizes(cubin).get(f".nv.shared.{name}", 0)
    return found


def _text(table: bytes, at: int) -> str:
    return table[at : table.index(b"\0", at)].decode()


def _headers(cubin: bytes) -> list[tuple[str, int, int, int]]:
    """(name, kind, offset, size) of every section of a 64-bit ELF."""
    start, (size, count, names) = (
        struct.unpack_from("<Q", cubin, 40)[0],
        struct.unpack_from("<HHH", cubin, 58),
    )
    rows = [struct.unpack_from("<IIQQQQ", cubin, start + i * size) for i in range(count)]
    table = cubin[rows[names][4] : rows[names][4] + rows[names][5]]
    return [(_text(table, row[0]), row[1], row[4], row[5]) for row in rows]


def _sections(cubin: bytes) -> dict[str, bytes]:
    return {name: cubin[at : at + size] for name, kind, at, size in _headers(cubin) if kind != 8}


def _sizes(cubin: bytes) -> dict[str, int]:
    return {name: size for name, _, _, size in _headers(cubin)}


_FUNCTION = re.compile(r"^\s*Function : (\S+)")
_ACCESS = re.compile(r"(?<![\w.])(LDG|STG|LDL|STL|ATOM|ATOMG|RED|REDG)\b\.?([\w.]*)")


def disassembled(cubin: bytes) -> dict[str, Resources]:
    """The same, with each kernel's loads and stores: Counter({"LDG.128": 8, "STG.128": 4, ..})."""
    found, current = resources(cubin), None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool("cuobjdump")), "-sass", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True)
    for line in listing.stdout.splitlines():
        if function := _FUNCTION.match(line):
            current = found[function[1]]
        elif (access := _ACCESS.search(line)) and current is not None:
            parts = access[2].split(".")
            widths = {"128", "64", "U8", "S8", "U16", "S16"}
            width = next((part for part in parts if part in widths), "32")
            current.loads[f"{access[1]}.{width}"] += 1
    return found
