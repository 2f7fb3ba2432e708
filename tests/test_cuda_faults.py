"""Tests of the tests: what checks the kernels must catch each fault of faults.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from emulated import SCHEDULES, EmulatorError, Library, build, library
from faults import FAULTS, Fault


def test_the_number_of_faults_is_that_of_the_docs() -> None:
    page = (Path(__file__).parent.parent / "docs" / "gpu.md").read_text()
    (count,) = re.findall(r"`tests/test_cuda_faults.py` changes the source in (\d+) places", page)
    assert int(count) == len(FAULTS)
    kinds = page.split("### Seeded faults")[1].split("## The mock driver")[0]
    assert sum(map(int, re.findall(r"^\|[^|]+\| (\d+) \|", kinds, re.M))) == len(FAULTS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.operator}: {fault.name}")
def test_is_caught(fault: Fault) -> None:
    torch.manual_seed(1)
    fault.check(library(fault.operator))  # the source as it is passes
    flags = ("-DSOKD_DTYPES=1", f"-DSOKD_KERNELS={fault.kernels}", "-O0")
    kernels = Library(
        build(fault.operator, mutate=(fault.file, fault.text, fault.other), flags=flags)
    )
    for schedule in SCHEDULES:
        kernels.schedule = schedule
        torch.manual_seed(1)
        try:
            fault.check(kernels)
        except (AssertionError, EmulatorError) as error:
            print(
                f"caught | {fault.operator} | {fault.name} | {schedule} | {str(error).splitlines()[0]}"
            )
            return
    pytest.fail(f"not caught under any schedule: {fault.name}")
