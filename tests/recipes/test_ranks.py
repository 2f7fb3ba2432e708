"""cifar100.py as its users start it: python and torchrun, killed and gone on with, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from signal import SIGKILL, SIGTERM

import cifar100
import pytest
import torch
import torch.distributed as dist
from support.recipes import DISTIL, RECIPES, checkpoint, differences, options, write_idx

import sokd

FAULTY = Path(__file__).parents[1] / "support" / "recipes_faults.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
TORCHRUN += ["--nproc-per-node", "2", "--max-restarts", "2"]

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_idx(tmp_path_factory.mktemp("idx"))


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher")
    torch.set_num_threads(1)
    cifar100.main(options(data, out, "--teacher-only", "--teacher", "resnet8", "--max-steps", "1"))
    return out / "teacher.pt"


def start(launcher, faults, arguments):
    """A process with these faults: its exit code and what it printed."""
    paths = [str(RECIPES), str(Path(sokd.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    own = {"FAULTS": json.dumps(faults), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *launcher, str(FAULTY), *arguments],
        env=os.environ | own | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


def test_killed_in_the_middle_of_an_epoch(data, teacher, tmp_path):
    """One rank, kill -9: goes on from the epoch's start, to the bits of an uninterrupted run."""
    torch.set_num_threads(1)
    more = (*DISTIL, "--teacher-weights", str(teacher), "--resume", "auto")
    code, said = start([], [[0, 5, SIGKILL]], options(data, tmp_path / "killed", *more))
    assert code == -SIGKILL, said
    assert checkpoint(tmp_path / "killed")["epoch"] == 0
    for name in ("killed", "whole"):
        cifar100.main(options(data, tmp_path / name, *more))
    assert differences(*(checkpoint(tmp_path / n) for n in ("killed", "whole"))) == []


def test_two_ranks_killed_terminated_and_restarted(data, teacher, tmp_path):
    """Rank 1 dies by kill -9 in the second epoch. Restarted, rank 0 alone gets SIGTERM in the same
    epoch: both agree, write a checkpoint in the middle of it and end. Restarted again, the run ends
    with the bits of an uninterrupted one."""
    more = (*DISTIL, "--teacher-weights", str(teacher), "--resume", "auto", "--accumulate", "2")
    faults = [[1, 7, SIGKILL], [0, 2, SIGTERM]]  # two batches a step
    code, said = start(TORCHRUN, faults, options(data, tmp_path / "faulty", *more))
    assert code == 0, said
    assert "epoch 1 after step 3" in said, "after kill -9"
    assert "stopped by SIGTERM after step 2 of epoch 2" in said and "exitcode  : 143" not in said
    assert "epoch 2 after step 2" in said, "after SIGTERM"
    code, said = start(TORCHRUN, [], options(data, tmp_path / "whole", *more))
    assert code == 0, said
    one, other = (checkpoint(tmp_path / name) for name in ("faulty", "whole"))
    # A mean of losses is summed in another order where a checkpoint divides the epoch.
    sums = [[saved.pop("sums"), saved.pop("rows")] for saved in (one, other)]
    assert differences(one, other) == []
    flat = [
        [*of[0].values(), *(v for row in of[1] for k, v in row.items() if "sec" not in k)]
        for of in sums
    ]
    assert flat[0] == pytest.approx(flat[1], rel=1e-12)
    assert len(one["rng"]) == 2 and not torch.equal(*(rank["cpu"] for rank in one["rng"]))


def test_sigterm_on_two_ranks_ends_with_143(data, teacher, tmp_path):
    """Without a restart torchrun reports the ranks' exit code, 143."""
    launcher = [*TORCHRUN[:-1], "0"]
    more = ("--method", "none", "--teacher", "resnet8", "--student", "resnet8w8")
    code, said = start(launcher, [[1, 1, SIGTERM]], options(data, tmp_path / "out", *more))
    assert code != 0 and "exitcode  : 143" in said, said
    saved = checkpoint(tmp_path / "out")
    assert (saved["epoch"], saved["step"]) == (0, 2)
