"""A training step of `sokd.Distiller` against the same step written by hand.

Step: ResNet32x4 -> ResNet8x4, batch 8 of 32x32 images, the maps of the second stages (8x128x16x16):
teacher forward, student forward, losses, backward, SGD. By hand, the models return their maps, and
adapter and loss are called on them; the Distiller takes the maps by hooks from unmodified models.
Both compute the same. The Distiller's overhead does not grow with the batch: a small batch shows it
best, and many turns separate three per cent from the machine's noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sokd
from benches.harness import Case, Options, check_close
from benches.models import ResNet
from sokd.distiller import Distiller
from sokd.methods import METHODS

BATCH = 8
SHAPE = (BATCH, 128, 16, 16)
HAND = "written by hand"
Losses = Callable[[Tensor, Tensor], Tensor]
WEIGHT = METHODS["fitnet"].default_weight


def distiller(plugged: bool) -> Distiller:
    """A Distiller with the same models and modules on every call."""
    torch.manual_seed(0)
    teacher, student = ResNet(32), ResNet(8)
    method = None if plugged else "fitnet"
    return Distiller(
        student, teacher, layers="stage2", method=method, sokd=plugged,
        example=torch.randn(2, 3, 32, 32),
    )  # fmt: skip


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(BATCH, 3, 32, 32), torch.randint(0, 100, (BATCH,))


def by_distiller(subject: Distiller) -> Callable[[Tensor, Tensor], Tensor]:
    def objective(x: Tensor, y: Tensor) -> Tensor:
        _, losses = subject(x, y)
        return torch.stack(list(losses.values())).sum()

    return objective


def by_hand(subject: Distiller) -> Callable[[Tensor, Tensor], Tensor]:
    """The same objective from the Distiller's modules, by a user who can change the models."""
    teacher, student = subject.teacher, subject.student
    loss = (
        fitnet_loss(subject.adapters[0]) if subject.adapters is not None else sokd_loss(subject.kd)
    )

    def objective(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            _, f_t = teacher(x)
        logits, f_s = student(x)
        return F.cross_entropy(logits, y) + loss(f_s, f_t)

    return objective


def fitnet_loss(adapter: nn.Module) -> Losses:
    return lambda f_s, f_t: WEIGHT * sokd.ops.masked_mse(adapter(f_s, (16, 16)), f_t)


def sokd_loss(kd: sokd.SoKD | None) -> Losses:
    assert kd is not None
    return lambda f_s, f_t: sokd.loss(f_s, f_t, kd)


def training_step(
    subject: Distiller, objective: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[], None]:
    optimizer = torch.optim.SGD(subject.parameters(), lr=0.001, momentum=0.9, weight_decay=5e-4)
    x, y = batch()

    def step() -> None:
        optimizer.zero_grad()
        objective(x, y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def step_case(plugged: bool) -> Case:
    ours, theirs = distiller(plugged), distiller(plugged)

    def check() -> None:
        one, other = distiller(plugged), distiller(plugged)
        check_close(by_distiller(one)(*batch()), by_hand(other)(*batch()), rtol=1e-4)

    return Case(
        f"Distiller: a training step, {'SoKD' if plugged else 'FitNet'}",
        SHAPE,
        {
            "sokd": training_step(ours, by_distiller(ours)),
            HAND: training_step(theirs, by_hand(theirs)),
        },
        limits={HAND: 1.03},
        check=check,
        fewest=50,
    )


def cases(options: Options) -> Iterator[Case]:
    yield step_case(False)
    if not options.quick:
        yield step_case(True)
