"""The distillation losses, forward and backward, against their formulas in eager PyTorch.

Logits 64x100 and 128x1000; features 64x256x8x8 (the last stage of a ResNet32x4) of student and
teacher; ReviewKD with its three stages; CRD with 50,000 samples, 16,384 negatives and batches of 32
(for which eager makes 0.27 GB of rows, twice), a step and the update of the banks alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from support import eager_methods as eager
from torch import Tensor, nn

from benches.harness import Case, Options, check_close
from sokd import methods

MAP = (64, 256, 8, 8)
STAGES = [(64, 64, 32, 32), (64, 128, 16, 16), MAP]
CLASSES, SAMPLES, BATCH, WIDTH = 100, 50_000, 32, 256
Loss = Callable[..., Tensor]


def case(name: str, ours: Loss, theirs: Loss, inputs: Sequence[Any], *, rtol: float = 1e-4) -> Case:
    """Both on the same inputs; the first, a tensor or a list of tensors, is the student's."""
    students: list[Tensor] = list(inputs[0]) if isinstance(inputs[0], list) else [inputs[0]]
    students = [student.requires_grad_() for student in students]

    def side(loss: Loss) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(loss(*inputs), students)

    def check() -> None:
        check_close(ours(*inputs), theirs(*inputs), rtol=rtol)
        for one, two in zip(side(ours)(), side(theirs)(), strict=True):
            scale = two.abs().max()
            check_close(one / scale, two / scale, rtol=rtol, atol=rtol)

    sides = {"sokd": side(ours), "eager": side(theirs)}
    # mgd is two convolutions on both sides: a difference below 5 % is noise
    targets = {"eager": 0.95 if name == "mgd" else 1.0}
    return Case(
        f"{name}, forward + backward", students[-1].shape, sides, targets=targets, check=check
    )


def logit_cases(batch: int, classes: int) -> Iterator[Case]:
    student, teacher = (3 * torch.randn(batch, classes) for _ in range(2))
    target = torch.randint(0, classes, (batch,))
    for name in ("kd", "lskd", "dist"):
        yield case(name, getattr(methods, name), getattr(eager, name), (student, teacher))
    yield case("dkd", methods.dkd, eager.dkd, (student, teacher, target))


def feature_cases() -> Iterator[Case]:
    student, teacher = (torch.randn(MAP) for _ in range(2))
    for name in ("fitnet", "at", "sp"):
        yield case(name, getattr(methods, name), getattr(eager, name), (student, teacher))
    yield case("rkd", methods.rkd, eager.rkd, (student.detach().mean((2, 3)), teacher.mean((2, 3))))
    yield _catkd_case(student.detach(), teacher)
    yield _mgd_case(student.detach(), teacher)
    yield _reviewkd_case()


def _catkd_case(student: Tensor, teacher: Tensor) -> Case:
    heads = [nn.Linear(MAP[1], CLASSES).requires_grad_(False) for _ in range(2)]
    shape = [(MAP[1], *MAP[2:])]
    options: dict[str, Any] = {"student_head": heads[0], "teacher_head": heads[1]}
    method = methods.build("catkd", student_shapes=shape, teacher_shapes=shape, **options)
    logits = torch.empty(MAP[0], CLASSES)

    def ours(student: Tensor, teacher: Tensor) -> Tensor:
        step = methods.Step(logits, logits, None, [student], [teacher], [], [None], None)
        return method(step)  # type: ignore[no-any-return]

    def theirs(student: Tensor, teacher: Tensor) -> Tensor:
        return eager.catkd(student, teacher, heads[0].weight, heads[1].weight)

    return case("catkd, from features", ours, theirs, (student, teacher))


def _mgd_case(student: Tensor, teacher: Tensor) -> Case:
    # nothing masked: the same on both sides
    loss = methods.mgd(MAP[1], ratio=0.0).requires_grad_(False)
    return case(
        "mgd",
        loss,
        lambda student, teacher: eager.mgd(student, teacher, loss.generation),
        (student, teacher),
    )


def _reviewkd_case() -> Case:
    channels = [shape[1] for shape in STAGES]
    loss = methods.reviewkd(channels, channels).requires_grad_(False)
    students, teachers = ([torch.randn(shape) for shape in STAGES] for _ in range(2))
    return case(
        "reviewkd",
        loss,
        lambda *maps: eager.reviewkd(*maps, fusions=loss.fusions),
        (students, teachers),
    )


def crd_cases() -> Iterator[Case]:
    torch.manual_seed(0)
    loss = methods.crd(WIDTH, WIDTH, SAMPLES)
    student, teacher = torch.randn(2, BATCH, WIDTH)
    index = torch.randperm(SAMPLES)[:BATCH]
    usual = eager.CRD(loss)

    def check() -> None:
        """The first batch by both, with the same negatives, from the same banks."""
        others = torch.randint(0, SAMPLES, (BATCH, 100))
        ours, theirs = methods.crd(WIDTH, WIDTH, SAMPLES, negatives=100), eager.CRD(loss)
        ours.load_state_dict(loss.state_dict())
        check_close(
            ours(student, teacher, index, others),
            theirs(student, teacher, index, others),
            rtol=1e-4,
        )
        check_close(ours.student_bank, theirs.student_bank)

    sides = {
        "sokd": lambda: loss(student, teacher, index),
        "eager": lambda: usual(student, teacher, index),
    }
    trained = {name: _trained(side, student.requires_grad_()) for name, side in sides.items()}
    shape = (BATCH, WIDTH)
    yield Case("crd, a step", shape, trained, targets={"eager": 1}, check=check)
    rows = F.normalize(torch.randn(BATCH, 128))
    yield Case(
        "crd, update of both banks",
        (SAMPLES, 128),
        {
            "sokd": lambda: loss._remember(index, rows, rows),
            "eager": lambda: usual.remember(index, rows, rows),
        },
        targets={"eager": 1},
    )


def _trained(loss: Callable[[], Tensor], student: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(loss(), student)


def cases(options: Options) -> Iterator[Case]:
    """No loss may be slower than its formula in eager PyTorch."""
    torch.manual_seed(0)
    yield from logit_cases(64, CLASSES)
    if not options.quick:
        yield from logit_cases(128, 1000)
    yield from feature_cases()
    if not options.quick:
        yield from crd_cases()
