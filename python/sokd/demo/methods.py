"""The six ways to train the student that the demo compares.

    student      L_task                                                       cross entropy alone
    kd           L_task + w * T^2 * KL(softmax(teacher/T) || softmax(student/T))      (Hinton et al., 2015)
    fitnet       L_task + w * mean (Phi(F_s) - F_t)^2                                 (Romero et al., 2015)
    fitnet-dafa  the same with refined teacher features, the policy being searched
    fitnet-dam   L_task + lambda_D * L_D + lambda_DA * L_DA on the teacher's own features
    sokd         the same with refined teacher features, the policy being searched

Every feature method has the same adapter Phi, so that what differs is only what its name says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sokd
from sokd.demo.models import Net

TEMPERATURE = 4.0
# The policy's learning rate. The usual 3e-4 goes with some 16,000 search steps; the demo makes hundreds, and
# how far Adam moves is rate times steps.
POLICY_LR = 2e-2
SEARCH_SHARE = 1.0  # of the epochs, from the first on; then the policy is frozen and sampling goes on
SEARCH_EVERY = 4  # training steps: a second-order search step costs some four training steps
SNAPSHOTS = 100  # of the policy in a run


@dataclass(frozen=True)
class Batch:
    """Images and labels, and what the teacher says of them: logits [B, classes], features [B, C, H, W]."""

    images: Tensor
    labels: Tensor
    logits: Tensor
    features: Tensor


@dataclass(frozen=True)
class Snapshot:
    """The policy at one step: what policy_over_time.png draws."""

    step: int
    probabilities: list[float]  # [K], softmax(alpha)
    fire: list[list[float]]  # [K, 2], beta
    magnitude: list[list[float]]  # [K, 2]


class Method(nn.Module):
    """A way to train: `search` and `loss` for each batch, `snapshot` for the record. Here: L_task alone."""

    def loss(self, logits: Tensor, features: Tensor, batch: Batch) -> Tensor:
        """The objective of one batch, from the student's logits and features."""
        return F.cross_entropy(logits, batch.labels)

    def trained_with_student(self) -> Iterator[nn.Parameter]:
        """The parameters that the student's optimiser has to hold too."""
        return self.parameters()

    def search(self, batch: Batch) -> None:
        """One step of the policy's own optimiser, where there is one."""

    def end_epoch(self) -> None:
        """Called when all batches of an epoch are done."""

    def snapshot(self) -> Snapshot | None:
        """The policy now, where one is being learned and it is time for another picture of it."""
        return None

    def notes(self) -> dict[str, float]:
        """Figures worth keeping of the last step: diagnostics."""
        return {}


class LogitDistillation(Method):
    """KD: the teacher's softened probabilities as targets."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def loss(self, logits: Tensor, features: Tensor, batch: Batch) -> Tensor:
        student = F.log_softmax(logits / TEMPERATURE, dim=1)
        teacher = F.log_softmax(batch.logits / TEMPERATURE, dim=1)
        divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        return F.cross_entropy(logits, batch.labels) + self.weight * TEMPERATURE**2 * divergence


class FitNet(Method):
    """The mean squared difference of the feature maps, through the adapter."""

    def __init__(self, student: Net, teacher: Net, weight: float) -> None:
        super().__init__()
        self.weight = weight
        self.adapter = sokd.Adapter(
            student.channels, teacher.channels, student_size=student.side, teacher_size=teacher.side
        )

    def loss(self, logits: Tensor, features: Tensor, batch: Batch) -> Tensor:
        hint = F.mse_loss(self.adapter(features), batch.features)
        return F.cross_entropy(logits, batch.labels) + self.weight * hint


class Plugged(Method):
    """FitNet with SoKD plugged in, whole or in part: `sokd.loss`, and `sokd.PolicySearch` for a policy."""

    def __init__(
        self,
        student: Net,
        teacher: Net,
        weights: dict[str, float],
        *,
        dafa: bool,
        dam: bool,
        steps: int,
        epochs: int,
    ) -> None:
        super().__init__()
        self.kd = sokd.SoKD(
            student.channels,
            teacher.channels,
            student_size=student.side,
            teacher_size=teacher.side,
            lambda_agreement=weights.get("lambda_agreement", 0.0),
            lambda_areas=weights["lambda_areas"],
            policy="default" if dafa else None,
            dam="default" if dam else None,
        )
        search_epochs = max(1, round(SEARCH_SHARE * epochs))
        self._searching = (
            sokd.PolicySearch(self.kd, student, lr=POLICY_LR, epochs=search_epochs) if dafa else None
        )
        self._steps = 0
        self._every = max(1, steps // SNAPSHOTS)

    def loss(self, logits: Tensor, features: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(logits, batch.labels) + sokd.loss(features, batch.features, self.kd)

    def trained_with_student(self) -> Iterator[nn.Parameter]:
        return self.kd.parameters()

    def search(self, batch: Batch) -> None:
        if self._searching is not None and self._steps % SEARCH_EVERY == 0:
            self._searching.step(_search_step, batch)
        self._steps += 1

    def end_epoch(self) -> None:
        if self._searching is not None:
            self._searching.end_epoch()

    def notes(self) -> dict[str, float]:
        return {name: value.item() for name, value in self.kd.diagnostics().items()}

    def snapshot(self) -> Snapshot | None:
        policy = self.kd.policy
        if policy is None or (self._steps - 1) % self._every:
            return None
        with torch.no_grad():
            return Snapshot(
                self._steps, policy.alpha.softmax(0).tolist(), policy.beta.tolist(), policy.magnitude.tolist()
            )


def _search_step(student: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """What the search asks of the student, at its own or at virtual weights: task loss, both feature maps."""
    logits, features = student(batch.images)
    return F.cross_entropy(logits, batch.labels), features, batch.features


# -- the table of methods -----------------------------------------------------------------------------------

Make = Callable[[Net, Net, dict[str, float], int, int], Method]


def _make_student(student: Net, teacher: Net, weights: dict[str, float], steps: int, epochs: int) -> Method:
    return Method()


def _make_kd(student: Net, teacher: Net, weights: dict[str, float], steps: int, epochs: int) -> Method:
    return LogitDistillation(weights["weight"])


def _make_fitnet(student: Net, teacher: Net, weights: dict[str, float], steps: int, epochs: int) -> Method:
    return FitNet(student, teacher, weights["weight"])


def _plugged(*, dafa: bool, dam: bool) -> Make:
    def make(student: Net, teacher: Net, weights: dict[str, float], steps: int, epochs: int) -> Method:
        return Plugged(student, teacher, weights, dafa=dafa, dam=dam, steps=steps, epochs=epochs)

    return make


@dataclass(frozen=True)
class Recipe:
    """A method of the table.

    `weights` are the loss weights in use, `trials` what they were chosen from: as many for every method, by
    validation accuracy at the last epoch (`--tune`).
    """

    label: str
    build: Make
    weights: dict[str, float]
    trials: tuple[dict[str, float], ...]

    def make(
        self, student: Net, teacher: Net, *, steps: int, epochs: int, weights: dict[str, float] | None = None
    ) -> Method:
        """The method for one run of `steps` steps in `epochs` epochs."""
        return self.build(student, teacher, self.weights if weights is None else weights, steps, epochs)


def _one(name: str, *values: float) -> tuple[dict[str, float], ...]:
    return tuple({name: value} for value in values)


_BOTH = tuple(
    {"lambda_agreement": agreement, "lambda_areas": areas}
    for agreement, areas in ((0.01, 1.0), (0.01, 3.0), (0.1, 3.0), (1.0, 1.0), (1.0, 3.0))
)
# The weights in use were chosen on the validation part of animal-mnist: last epoch, mean of two seeds (100
# and 101, not those of the table), five trials a method. The learning rate was chosen for the student alone
# and serves all.
METHODS: dict[str, Recipe] = {
    "student": Recipe("student alone", _make_student, {}, _one("lr", 0.2, 0.4, 0.8, 1.2, 1.6)),
    "kd": Recipe("KD", _make_kd, {"weight": 0.3}, _one("weight", 0.1, 0.2, 0.3, 0.5, 1.0)),
    "fitnet": Recipe("FitNet", _make_fitnet, {"weight": 1.0}, _one("weight", 0.3, 0.5, 1.0, 2.0, 3.0)),
    "fitnet-dafa": Recipe(
        "FitNet + DAFA",
        _plugged(dafa=True, dam=False),
        {"lambda_areas": 2.0},
        _one("lambda_areas", 0.5, 1.0, 2.0, 3.0, 5.0),
    ),
    "fitnet-dam": Recipe(
        "FitNet + DAM", _plugged(dafa=False, dam=True), {"lambda_agreement": 1.0, "lambda_areas": 3.0}, _BOTH
    ),
    "sokd": Recipe(
        "SoKD", _plugged(dafa=True, dam=True), {"lambda_agreement": 1.0, "lambda_areas": 1.0}, _BOTH
    ),
}
