"""The ways to train the student that the demo compares: a `sokd.Distiller` each.

    student      L_task: cross entropy alone
    kd, fitnet, at, ...          L_task + weight * the method of that name (`sokd.methods`)
    kd+sokd, fitnet+sokd, ...    the same with SoKD plugged in, the policy being searched
    fitnet-dafa, fitnet-dam      FitNet with one half of SoKD: the refined teacher, or the mutual areas
    sokd                         FitNet with both, its weights tuned on their own

All take the last feature map of both networks. Every method that compares maps of one shape has the same
adapter, so that what differs is only what its name says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import sokd
from sokd.demo.models import Net, Recorded
from sokd.inspect import Snapshot, Trajectory
from sokd.methods import METHODS as NAMES

# The policy's learning rate. The usual 3e-4 goes with some 16,000 search steps; the demo makes hundreds, and
# how far Adam moves is rate times steps.
POLICY_LR = 2e-2
SEARCH_EVERY = 4  # training steps: a second-order search step costs some four training steps
SNAPSHOTS = 100  # of the policy in a run
LAYERS = {"body": "body"}
NEGATIVES = 256  # of crd: the paper's 16,384 are more than there are images here


@dataclass(frozen=True)
class Batch:
    """Images [B, 1, H, W], labels [B], and the images' places in the training part [B]."""

    images: Tensor
    labels: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Recipe:
    """A method of the table.

    `method` is a name of `sokd.methods`, `plug` the Distiller's `sokd=` (without a method its own masked term
    is FitNet's). `weights` are those in use, `trials` what they were chosen from: as many for every method,
    by validation accuracy at the last epoch. Of their entries, "weight" is the method's, "share" the same in
    units of `train.balance`, others are SoKD's.
    """

    label: str
    method: str | None
    plug: Mapping[str, Any] | None
    weights: dict[str, float]
    trials: tuple[dict[str, float], ...]

    @property
    def masked(self) -> bool:
        """Whether there is a DAM, and so areas to draw."""
        return self.plug is not None and self.plug.get("dam", "default") is not None


class Method:
    """One run's Distiller and, where there is a policy, its search and the record of its way."""

    def __init__(
        self, recipe: Recipe, student: Net, teacher: Recorded, weights: Mapping[str, float],
        *, steps: int, epochs: int,
    ) -> None:  # fmt: skip
        own = {name: value for name, value in weights.items() if name.startswith("lambda_")}
        plug = False if recipe.plug is None else {**recipe.plug, **own}
        method = None if recipe.method is None else {recipe.method: weights["weight"]}
        crd = {"num_samples": teacher.count, "negatives": NEGATIVES}
        options: dict[str, Any] = crd if recipe.method == "crd" else {}
        self.distiller = sokd.Distiller(
            teacher,
            student,
            layers=LAYERS,
            method=method,
            sokd=plug,
            example=teacher.example(),
            **options,
        )
        self.student, self.teacher = student, teacher
        self._steps = 0
        self._search: sokd.PolicySearch | None = None
        self._way: Trajectory | None = None
        kd = self.distiller.kd
        if kd is not None and kd.policy is not None:
            self._search = sokd.PolicySearch(kd, student, lr=POLICY_LR, epochs=epochs)
            self._way = Trajectory(kd, every=max(1, steps // SNAPSHOTS))

    def loss(self, batch: Batch) -> Tensor:
        """The objective of one batch; before it, now and then, a step of the search."""
        self.teacher.rows = batch.rows
        if self._search is not None and self._way is not None:
            if self._steps % SEARCH_EVERY == 0:
                self._search.step(self.distiller.step, (batch.images, batch.labels))
            self._way.record(self._steps)
        self._steps += 1
        _, losses = self.distiller(batch.images, batch.labels, index=batch.rows)
        return torch.stack(list(losses.values())).sum()

    def end_epoch(self) -> None:
        """Called when all batches of an epoch are done."""
        if self._search is not None:
            self._search.end_epoch()

    @property
    def way(self) -> list[Snapshot]:
        """The policy over the steps; empty without one."""
        return [] if self._way is None else self._way.snapshots

    def notes(self) -> dict[str, float]:
        """Figures worth keeping: the method's weight, and SoKD's diagnostics of the last step."""
        kd, weights = self.distiller.kd, list(self.distiller.weights.values())
        found = {"weight": weights[0]} if weights else {}
        return (
            found
            if kd is None
            else found | {name: v.item() for name, v in kd.diagnostics().items()}
        )


# -- the table of methods -----------------------------------------------------------------------------------


def _one(name: str, *values: float) -> tuple[dict[str, float], ...]:
    return tuple({name: value} for value in values)


LABELS = {
    "fitnet": "FitNet", "at": "AT", "crd": "CRD", "reviewkd": "ReviewKD", "kd": "KD", "dkd": "DKD",
    "lskd": "LS-KD", "dist": "DIST", "sp": "SP", "rkd": "RKD", "catkd": "CAT-KD", "mgd": "MGD",
}  # fmt: skip
SHARES = _one("share", 0.1, 0.5, 2.0)
_WHOLE: dict[str, Any] = {"lambda_agreement": 1.0, "lambda_areas": 1.0}
_BOTH = tuple(
    {"lambda_agreement": agreement, "lambda_areas": areas}
    for agreement, areas in ((0.01, 1.0), (0.01, 3.0), (0.1, 3.0), (1.0, 1.0), (1.0, 3.0))
)
# Their weights were chosen on the validation part of animal-mnist: last epoch, mean of two seeds (100 and
# 101, not those of the table), five trials a method. The learning rate was chosen for the student alone and
# serves all.
SIX: dict[str, Recipe] = {
    "student": Recipe("student alone", None, None, {}, _one("lr", 0.2, 0.4, 0.8, 1.2, 1.6)),
    "kd": Recipe("KD", "kd", None, {"weight": 0.2}, _one("weight", 0.1, 0.2, 0.3, 0.5, 1.0)),
    "fitnet": Recipe("FitNet", "fitnet", None, {"weight": 2.0}, _one("weight", 0.3, 0.5, 1.0, 2.0, 3.0)),
    "fitnet-dafa": Recipe(
        "FitNet + DAFA", None, {"dam": None}, {"lambda_areas": 2.0},
        _one("lambda_areas", 0.5, 1.0, 2.0, 3.0, 5.0),
    ),
    "fitnet-dam": Recipe(
        "FitNet + DAM", None, {"policy": None}, {"lambda_agreement": 1.0, "lambda_areas": 1.0}, _BOTH
    ),
    "sokd": Recipe("SoKD", None, {}, {"lambda_agreement": 1.0, "lambda_areas": 1.0}, _BOTH),
}  # fmt: skip
PLAIN = {name: Recipe(LABELS[name], name, None, {"share": 0.5}, SHARES) for name in NAMES}
ON_TOP = {
    f"{name}+sokd": Recipe(f"{LABELS[name]} + SoKD", name, _WHOLE, {"share": 0.5}, SHARES)
    for name in NAMES
}
METHODS: dict[str, Recipe] = {**PLAIN, **ON_TOP, **SIX}
