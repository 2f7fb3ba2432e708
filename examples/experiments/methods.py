"""The rows of the comparison: each part of SoKD on FitNet, and each base method with the whole."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sokd.demo.train import Run, Task, build

ADAPTERS = {
    "linear": "1x1", "regressor": "1x1 + BN + ReLU", "separable": "separable",
    "conv": "three convolutions",
}  # fmt: skip
DEFAULT = "separable"  # the adapter of `sokd.SoKD()`
# The defaults of `sokd.SoKD()` but for the adapter, each replaced by what it was chosen over.
OTHERWISE: dict[str, tuple[str, dict[str, Any]]] = {
    "replace": ("base replaced", {"base": "replace"}),
    "uniform": ("no search", {"search": None, "granularity": "sample"}),
    "batch": ("one draw a batch", {"granularity": "batch"}),
    "bounded": ("trained heads", {"heads": "bounded"}),
}
BASES = {"at": "AT", "crd": "CRD", "reviewkd": "ReviewKD", "kd": "KD"}
NEGATIVES = 256  # of crd: the paper's 16,384 are more than the training images
# SoKD's own weights are parts of FitNet's: one number, the share, scales every term of a row.
AREAS, AGREEMENT = 0.2, 0.1


class Arm(NamedTuple):
    """A row of the table: what is trained, and the row that differs by one thing."""

    label: str
    method: str  # of `sokd.methods`; "" for the student alone
    against: str  # the arm that it is compared with; "" for none
    plug: dict[str, Any] | None = None  # `Distiller(sokd=...)`; None: not plugged in
    adapter: str = DEFAULT
    search: bool = False  # whether a `sokd.PolicySearch` runs too, as in the paper


def _arms() -> dict[str, Arm]:
    arms = {"student": Arm("student alone", "", "")}
    for name, label in ADAPTERS.items():
        against = "" if name == DEFAULT else f"fitnet-{DEFAULT}"
        arms[f"fitnet-{name}"] = Arm(f"FitNet, {label}", "fitnet", against, adapter=name)
    base = f"fitnet-{DEFAULT}"
    dafa = {"dam": None, "search": None, "base": "replace"}
    arms["fitnet+dafa"] = Arm("+ DAFA, uniform", "fitnet", base, dafa)
    arms["fitnet+search"] = Arm("+ DAFA, search", "fitnet", base, {"dam": None, "base": "replace"})
    arms["fitnet+dam"] = Arm("+ DAM", "fitnet", base, {"policy": None, "search": None})
    paper: dict[str, Any] = {"preset": "paper"}
    arms["fitnet+paper"] = Arm("+ SoKD, preset paper", "fitnet", "fitnet-conv", paper, "conv", True)
    arms["fitnet+sokd"] = Arm("+ SoKD", "fitnet", base, {})
    for name, (label, plug) in OTHERWISE.items():
        arms[f"fitnet+{name}"] = Arm(f"+ SoKD, {label}", "fitnet", "fitnet+sokd", plug)
    for name, label in BASES.items():
        arms[name] = Arm(label, name, "student")
        arms[f"{name}+paper"] = Arm(
            f"{label} + SoKD, preset paper", name, name, paper, "conv", True
        )
        arms[f"{name}+sokd"] = Arm(f"{label} + SoKD", name, name, {})
    return arms


ARMS = _arms()


def arguments(arm: Arm, share: float, units: dict[str, float], images: int) -> dict[str, Any]:
    """The arguments of `sokd.Distiller` at a share of the units; `images` in the training part."""
    if not arm.method:
        return {"method": None, "sokd": False}
    found: dict[str, Any] = {"method": {arm.method: share * units[arm.method]}}
    if arm.method == "crd":
        found |= {"num_samples": images, "negatives": NEGATIVES}
    if arm.plug is None:
        return found | {"sokd": False, "adapter": arm.adapter}
    own = {"lambda_areas": AREAS, "lambda_agreement": AGREEMENT}
    own = {name: part * share * units["fitnet"] for name, part in own.items()}
    return found | {"sokd": {"adapter": arm.adapter, **own, **arm.plug}}


def balance(method: str, task: Task, *, seed: int = 100, count: int = 256) -> float:
    """The weight at which a method's gradient is as long as that of the cross entropy.

    For a new student without SoKD, on the first `count` training images, with respect to the
    student's parameters. The values of the methods differ by orders of magnitude; in units of this
    weight one grid of trials is enough for all of them.
    """
    images = len(task.data.train[1])
    arm = Arm(method, method, "")
    run = Run(method, arguments(arm, 1.0, {method: 1.0}, images), seed)
    distiller, rows = build(run, task), torch.arange(min(count, images))
    distiller.teacher.rows = rows
    _, losses = distiller(*(part[rows] for part in task.data.train), index=rows)
    own, added = (_length(losses[key], distiller.student) for key in ("loss_ce", f"loss_{method}"))
    return own / added


def _length(loss: Tensor, student: nn.Module) -> float:
    parameters = list(student.parameters())
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return math.sqrt(sum(float(part.square().sum()) for part in gradients if part is not None))
