"""A training step with `sokd.loss` against the same step with a plain FitNet loss, and the memory.

Step: ResNet32x4 -> ResNet8x4, batch 64 of 32x32 images, maps of the second stages (64x128x16x16):
teacher forward, student forward, loss, backward, SGD. Both sides have the same adapter; the time of
DAM's convolutions alone (forward and backward, measured in the same run) is subtracted from SoKD's.
The policy's search is not part of a step.

Memory: the peak of live tensors in forward and backward of the loss, features and parameters not
counted, minus that of the adapter and DAM's convolutions alone; in feature maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sokd
from benches.bench_refine import MAIN
from benches.harness import Case, Options
from benches.models import ResNet

IMAGES = (64, 3, 32, 32)
CONVOLUTIONS = "DAM's convolutions"
Loss = Callable[[Tensor, Tensor], Tensor]


def training_step(
    teacher: nn.Module, loss: Loss, parameters: list[nn.Parameter]
) -> Callable[[], None]:
    """One whole step with a new student."""
    torch.manual_seed(0)
    student = ResNet(8)
    optimizer = torch.optim.SGD(
        [*student.parameters(), *parameters], lr=0.01, momentum=0.9, weight_decay=5e-4
    )
    images, labels = torch.randn(IMAGES), torch.randint(0, 100, IMAGES[:1])

    def step() -> None:
        with torch.no_grad():
            _, f_t = teacher(images)
        logits, f_s = student(images)
        total = F.cross_entropy(logits, labels) + loss(f_s, f_t)
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def new_kd(channels: int) -> Any:
    torch.manual_seed(0)
    return sokd.SoKD(student_channels=channels, teacher_channels=channels)


def heads_alone(dam: Any, both: Tensor) -> Tensor:
    """DAM's two convolutions on student and teacher as one batch, and nothing else of DAM."""
    hidden = F.relu(dam.first(both), inplace=True)
    heads = (dam.heat, dam.offset, dam.size)
    weight = torch.cat(
        [F.pad(head.weight, (0, 0, 0, 0, *_place(i, head))) for i, head in enumerate(heads)]
    )
    return F.conv2d(hidden, weight, torch.cat([head.bias for head in heads]))


def _place(index: int, head: nn.Conv2d) -> tuple[int, int]:
    """Empty channels before and after those of the head."""
    return index * head.in_channels, (2 - index) * head.in_channels


def convolutions_alone(dam: Any, shape: tuple[int, ...]) -> Callable[[], None]:
    student, teacher = torch.randn(shape).requires_grad_(), torch.randn(shape)
    wanted = [student, *dam.parameters()]
    upstream = torch.randn_like(heads_alone(dam, torch.cat((student, teacher))))

    def work() -> None:
        torch.autograd.grad(heads_alone(dam, torch.cat((student, teacher))), wanted, upstream)

    return work


def step_case() -> Case:
    teacher = ResNet(32).eval().requires_grad_(False)
    channels = MAIN[1]
    kd, plain, regressor = (
        new_kd(channels),
        new_kd(channels).adapter,
        nn.Conv2d(channels, channels, 1),
    )

    def counted(medians: dict[str, float]) -> dict[str, float]:
        ours = medians["sokd"] - medians[CONVOLUTIONS]
        return {"sokd": ours} | {
            name: time for name, time in medians.items() if name.startswith("FitNet")
        }

    losses: dict[str, tuple[Loss, nn.Module]] = {
        "sokd": (lambda s, t: sokd.loss(s, t, kd), kd),
        "FitNet, same adapter": (lambda s, t: F.mse_loss(plain(s), t), plain),
        "FitNet, 1x1 regressor": (lambda s, t: F.mse_loss(regressor(s), t), regressor),
    }
    sides = {
        name: training_step(teacher, loss, [*part.parameters()])
        for name, (loss, part) in losses.items()
    }
    sides[CONVOLUTIONS] = convolutions_alone(kd.dam, MAIN)
    limits = {"FitNet, same adapter": 1.1}
    note = "ratio: sokd less DAM's convolutions / side"
    return Case(
        "training step, batch 64", MAIN, sides, limits=limits, check=_check_loss, counted=counted,
        note=note,
    )  # fmt: skip


def _check_loss() -> None:
    """The loss is a finite scalar that trains the adapter, DAM and the student."""
    kd = new_kd(8)
    f_s, f_t = torch.randn(4, 8, 6, 6).requires_grad_(), torch.randn(4, 8, 6, 6)
    loss = sokd.loss(f_s, f_t, kd)
    gradients = torch.autograd.grad(loss, [f_s, *kd.parameters()])
    if loss.dim() or not all(gradient.isfinite().all() for gradient in (loss, *gradients)):
        raise AssertionError(f"the loss is {loss}, or a gradient is not finite")


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that tensors made by `work` hold at one time, by the profiler's record."""
    work()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    memory = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    live = peak = 0
    for _, size in memory:
        live += size
        peak = max(peak, live)
    return peak


def memory_row() -> dict[str, Any]:
    kd = new_kd(MAIN[1])
    f_s, f_t = torch.randn(MAIN).requires_grad_(), torch.randn(MAIN)
    wanted = [f_s, *kd.parameters()]

    def ours() -> None:
        torch.autograd.grad(sokd.loss(f_s, f_t, kd), wanted)

    def convolutions() -> None:
        # no name keeps a tensor alive: the backward frees what it can, as it does for the loss
        torch.autograd.grad(heads_alone(kd.dam, torch.cat((kd.adapter(f_s), f_t))).sum(), wanted)

    full, alone = peak_bytes(ours), peak_bytes(convolutions)
    row: dict[str, Any] = {
        "work": "sokd.loss, extra memory in maps",
        "shape": "x".join(map(str, MAIN)),
    }
    row |= {"dtype": "float32", "layout": "contiguous", "side": "adapter and DAM's convolutions"}
    note = f"peak {full} bytes with sokd.loss, {alone} with the convolutions alone"
    return row | {"ratio": f"{(full - alone) / f_t.nbytes:.3f}", "target": "<= 2", "note": note}


def cases(options: Options) -> Iterator[Case | dict[str, Any]]:
    yield memory_row()
    yield step_case()
