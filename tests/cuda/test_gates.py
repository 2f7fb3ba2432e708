"""Every kernel compiled by NVRTC for every architecture: no spills, occupancy, 128-bit access."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support.cuda.cubins import (
    Resources,
    architectures,
    compile_cubin,
    disassembled,
    nvrtc,
    resources,
    tool,
)
from support.cuda.emulator import OPERATORS, kernel_names

NEEDED = (75, 80, 86, 89, 90, 100, 120)
READ = (75, 90, 120)  # whose instructions are read: the oldest, and the two that differ most
Kernels = dict[str, Resources]

# 128-bit access that each fast path must have: (kernel, order if it has any) -> loads and stores.
# Resampled planes, and sums over planes, load 32 neighbours at a time instead.
WIDE = {
    ("refine_forward", "planes"): ("LDG.128", "STG.128"),
    ("refine_forward", "lanes"): ("LDG.128", "STG.128"),
    ("refine_backward", "lanes"): ("LDG.128",),
    ("refine_adjoint", "lanes"): ("LDG.128", "STG.128"),
    ("refine_dots", "lanes"): ("LDG.128",),
    ("areas_scan", "planes"): ("LDG.128",),
    ("areas_scan", "lanes"): ("LDG.128",),
    ("masked_mse", "planes"): ("LDG.128", "STG.128"),
    ("masked_mse", "lanes"): ("LDG.128", "STG.128"),
    ("masked_mse_scale", ""): ("LDG.128", "STG.128"),
}
NAME = re.compile(r"(\w+?)_(?:f32|f16|bf16|f64)(?:_(planes|lanes))?")


@pytest.fixture(scope="module")
def compiled() -> dict[int, Kernels]:
    """Every kernel of every operator for every architecture, two compilations at a time."""
    if nvrtc() is None:
        pytest.skip("this torch brings no NVRTC")
    jobs = [(architecture, operator) for architecture in architectures() for operator in OPERATORS]

    def job(architecture: int, operator: str) -> Kernels:
        cubin = compile_cubin(operator, architecture)
        listed = architecture in READ and tool("cuobjdump")
        return disassembled(cubin) if listed else resources(cubin)

    found: dict[int, Kernels] = {architecture: {} for architecture, _ in jobs}
    with ThreadPoolExecutor(2) as pool:
        for (architecture, _), kernels in zip(
            jobs, pool.map(job, *zip(*jobs, strict=True)), strict=True
        ):
            found[architecture] |= kernels
    return found


def refused(compiled: dict[int, Kernels], by: Callable[[int, str, Resources], bool]) -> list[Any]:
    """Architecture, name and resources of the kernels that `by` finds fault with."""
    every = ((a, *each) for a, kernels in compiled.items() for each in kernels.items())
    return [each for each in every if by(*each)]


def test_every_needed_architecture_is_compiled_for(compiled: dict[int, Kernels]) -> None:
    assert set(NEEDED) <= set(compiled)


def test_every_kernel_is_there_that_the_emulator_runs(compiled: dict[int, Kernels]) -> None:
    names = {name for operator in OPERATORS for name in kernel_names(operator)}
    # dtypes times orders; areas_pick; scale; second stages; draw
    assert len(names) == 7 * 8 + 4 + 4 + 5 + 1
    for architecture, kernels in compiled.items():
        assert set(kernels) == names, architecture


def test_nothing_is_spilled(compiled: dict[int, Kernels]) -> None:
    assert refused(compiled, lambda _, name, kernel: kernel.stack > 0) == []


def test_registers_leave_room_for_half_of_the_warps(compiled: dict[int, Kernels]) -> None:
    """A quarter for float64, which is for gradient checks."""

    def low(architecture: int, name: str, kernel: Resources) -> bool:
        least = 0.25 if "f64" in name else 0.5
        return kernel.registers == 0 or kernel.occupancy(architecture) < least

    assert refused(compiled, low) == []


def test_shared_memory_leaves_room_for_two_blocks(compiled: dict[int, Kernels]) -> None:
    """The smallest multiprocessor here has 64 KiB (sm_75); for float64 one block must fit."""
    room = {True: 48 * 1024, False: 32 * 1024}
    assert refused(compiled, lambda _, name, kernel: kernel.shared > room["f64" in name]) == []


@pytest.mark.parametrize("architecture", READ)
def test_instructions(compiled: dict[int, Kernels], architecture: int) -> None:
    if tool("cuobjdump") is None:
        pytest.skip("no cuobjdump: neither the wheel nvidia-cuda-cuobjdump nor a CUDA toolkit")
    for name, kernel in compiled[architecture].items():
        assert kernel.loads, name
        local = [access for access in kernel.loads if access.startswith(("LDL", "STL"))]
        atomic = [access for access in kernel.loads if access.startswith(("ATOM", "RED"))]
        assert not local and not atomic, (name, kernel.loads)
        variant = NAME.fullmatch(name)
        wanted = WIDE.get((variant[1], variant[2] or ""), ()) if variant else ()
        missing = [access for access in wanted if not kernel.loads[access]]
        assert missing == [], (name, kernel.loads)
