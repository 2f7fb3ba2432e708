"""The compared methods, plain and with SoKD on top, as arguments of `sokd.Distiller`."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from sokd.demo.train import Run, Task, build

LABELS = {
    "fitnet": "FitNet", "at": "AT", "crd": "CRD", "reviewkd": "ReviewKD", "kd": "KD", "dkd": "DKD",
    "lskd": "LS-KD", "dist": "DIST", "sp": "SP", "rkd": "RKD", "catkd": "CAT-KD", "mgd": "MGD",
}  # fmt: skip
DEMO_LABELS = {
    **LABELS, "student": "student alone", "fitnet-dafa": "FitNet + DAFA",
    "fitnet-dam": "FitNet + DAM", "sokd": "SoKD",
}  # fmt: skip
NEGATIVES = 256  # of crd: the paper's 16,384 are more than the training images


def names(methods: list[str] | None = None) -> list[str]:
    """The methods of the tables, or those given, plain and then with SoKD."""
    plain = [name for name in LABELS if methods is None or name in methods]
    return [*plain, *(f"{name}+sokd" for name in plain)]


def arguments(name: str, weight: float, images: int) -> dict[str, Any]:
    """The arguments for "at" or "at+sokd"; `images` in the training part. "student": no method."""
    method, _, plugged = name.partition("+")
    if method == "student":
        return {"method": None, "sokd": False}
    options = {"num_samples": images, "negatives": NEGATIVES} if method == "crd" else {}
    plug = {"lambda_agreement": 1.0, "lambda_areas": 1.0} if plugged else False
    return {"method": {method: weight}, "sokd": plug, **options}


def balance(name: str, task: Task, *, seed: int = 100, count: int = 256) -> float:
    """The weight at which a method's gradient is as long as that of the cross entropy.

    For a new student without SoKD, on the first `count` training images, with respect to the
    student's parameters. The values of the methods differ by orders of magnitude; in units of this
    weight one grid of trials serves all of them.
    """
    method = name.partition("+")[0]
    run = Run(name, arguments(method, 1.0, len(task.data.train[1])), seed)
    distiller, rows = build(run, task), torch.arange(min(count, len(task.data.train[1])))
    distiller.teacher.rows = rows
    _, losses = distiller(*(part[rows] for part in task.data.train), index=rows)
    own, added = (_length(losses[key], distiller.student) for key in ("loss_ce", f"loss_{method}"))
    return own / added


def _length(loss: Tensor, student: nn.Module) -> float:
    parameters = list(student.parameters())
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return math.sqrt(sum(float(part.square().sum()) for part in gradients if part is not None))
