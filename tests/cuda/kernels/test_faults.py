"""The checks of the kernels must catch each seeded fault of support/cuda/faults.py."""

import pytest
import torch
from support.cuda.emulator import build
from support.cuda.faults import FAULTS, Fault
from support.cuda.memory import MockMemory
from support.cuda.mock import SCHEDULES


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.operator}: {fault.name}")
def test_is_caught(fault: Fault, cuda: MockMemory) -> None:
    torch.manual_seed(1)
    fault.check(cuda)  # passes for the source as it is
    flags = ("-DSOKD_DTYPES=1", f"-DSOKD_KERNELS={fault.kernels}", "-O0")
    change = (fault.file, fault.text, fault.other)
    cuda.driver.use_library(build(fault.operator, change=change, flags=flags))
    for schedule in SCHEDULES:
        cuda.driver.schedule(schedule)
        torch.manual_seed(1)
        try:
            fault.check(cuda)
        except (AssertionError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "CUDA_ERROR_LAUNCH_FAILED" not in str(error):
                raise
            return
    pytest.fail(f"not caught under any schedule: {fault.name}")
