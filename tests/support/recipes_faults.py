"""cifar100.py with a fault: `FAULTS` is a JSON list of [rank, batch, signal], one for each start.

Started anew by torchrun (or by a test, which then sets `FAULTS` anew) a run has the next fault, and
none when the list is at its end. A batch of -1: never.
"""

import json
import os
import sys
from typing import Any

import cifar100
import torch

START = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
FAULTS = json.loads(os.environ["FAULTS"])
RANK, BATCH, SIGNAL = FAULTS[START] if len(FAULTS) > START else (0, -1, 0)
objective, batches = cifar100.objective, 0


def faulty(*args: Any) -> torch.Tensor:
    global batches
    batches += 1
    if batches == BATCH and int(os.environ.get("RANK", "0")) == RANK:
        os.kill(os.getpid(), SIGNAL)
    return objective(*args)


if __name__ == "__main__":
    torch.set_num_threads(1)
    cifar100.objective = faulty
    cifar100.main(sys.argv[1:])
