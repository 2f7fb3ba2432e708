"""The distillation losses, forward and backward, against their formulas in eager PyTorch.

Logits 64x100 and 128x1000; features 64x256x8x8 (the last stage of a ResNet32x4) of student and
teacher; ReviewKD with its three stages; CRD with 50,000 samples, 16,384 negatives and batches of 32
(for which eager makes 0.27 GB of rows, twice), a step and the update of the banks alone.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from support import eager_methods as eager
from torch import Tensor, nn

from benches.harness import Case, Options, Side, check_close
from sokd import methods

MAP = (64, 256, 8, 8)
LEVEL = (2, 256, 50, 76)  # P4 of two images of 800 x 1216
STAGES = [(64, 64, 32, 32), (64, 128, 16, 16), MAP]
CLASSES, SAMPLES, BATCH, WIDTH = 100, 50_000, 32, 256
Loss = Callable[..., Tensor]


def case(
    name: str, actual: Loss, other: Loss, inputs: Sequence[Any], *, rtol: float = 1e-4
) -> Case:
    """Both on the same inputs; the first, a tensor or a list of tensors, is the student's."""
    students: list[Tensor] = list(inputs[0]) if isinstance(inputs[0], list) else [inputs[0]]
    students = [student.requires_grad_() for student in students]

    def side(loss: Loss) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(loss(*inputs), students)

    def check() -> None:
        check_close(actual(*inputs), other(*inputs), rtol=rtol)
        for one, two in zip(side(actual)(), side(other)(), strict=True):
            scale = two.abs().max()
            check_close(one / scale, two / scale, rtol=rtol, atol=rtol)

    sides = {"sokd": side(actual), "eager": side(other)}
    # these are the same convolutions or products on both sides: a difference below 5 % is noise
    targets = {"eager": 0.95 if name in ("mgd", "vid", "ofd", "pkt") else 1.0}
    work, shape = f"{name}, forward + backward", students[-1].shape
    return Case(work, shape, sides, targets=targets, check=check)


def logit_cases(batch: int, classes: int) -> Iterator[Case]:
    student, teacher = (3 * torch.randn(batch, classes) for _ in range(2))
    target = torch.randint(0, classes, (batch,))
    for name in ("kd", "lskd", "dist"):
        yield case(name, getattr(methods, name), getattr(eager, name), (student, teacher))
    yield case("dkd", methods.dkd, eager.dkd, (student, teacher, target))
    distances = torch.rand(classes, classes).fill_diagonal_(0)
    inputs = (student, teacher, target, distances)
    yield case("wkd_logits", methods.wkd_logits, eager.wkd_logits, inputs, rtol=1e-3)


def feature_cases() -> Iterator[Case]:
    student, teacher = (torch.randn(MAP) for _ in range(2))
    for name in ("fitnet", "at", "sp", "nst", "wkd_features"):
        yield case(name, getattr(methods, name), getattr(eager, name), (student, teacher))
    pooled = student.detach().mean((2, 3)), teacher.mean((2, 3))
    for name in ("rkd", "pkt", "cc"):
        inputs = pooled[0].clone(), pooled[1]
        yield case(name, getattr(methods, name), getattr(eager, name), inputs)
    yield from _module_cases(student.detach(), teacher)
    yield _fgd_case()
    yield _catkd_case(student.detach(), teacher)
    yield _mgd_case(student.detach(), teacher)
    yield _reviewkd_case()


def _catkd_case(student: Tensor, teacher: Tensor) -> Case:
    heads = [nn.Linear(MAP[1], CLASSES).requires_grad_(False) for _ in range(2)]
    shape = [(MAP[1], *MAP[2:])]
    options: dict[str, Any] = {"student_head": heads[0], "teacher_head": heads[1]}
    method = methods.build("catkd", student_shapes=shape, teacher_shapes=shape, **options)
    logits = torch.empty(MAP[0], CLASSES)

    def actual(student: Tensor, teacher: Tensor) -> Tensor:
        step = methods.Step(logits, logits, None, [student], [teacher], [], [None], None)
        return method(step)  # type: ignore[no-any-return]

    def other(student: Tensor, teacher: Tensor) -> Tensor:
        return eager.catkd(student, teacher, heads[0].weight, heads[1].weight)

    return case("catkd, from features", actual, other, (student, teacher))


def _module_cases(student: Tensor, teacher: Tensor) -> Iterator[Case]:
    norm = nn.BatchNorm2d(MAP[1])
    losses: dict[str, nn.Module] = {
        "vid": methods.vid(MAP[1], MAP[1]),
        "ofd": methods.ofd(MAP[1], MAP[1], margin=methods.ofd_margin(norm)),
    }
    for name, loss in losses.items():
        loss.requires_grad_(False)
        usual = partial(getattr(eager, name), like=loss)
        yield case(name, loss, usual, (student.clone(), teacher))


def _fgd_case() -> Case:
    """One level of two images with ten boxes each, cells of 16 x 16 pixels."""
    batch, _, height, width = LEVEL
    corners = torch.rand(batch, 10, 2, 2).sort(2).values * torch.tensor([width, height]) * 14
    boxes = list((corners + torch.tensor([[0.0], [8.0]])).flatten(2))
    loss = methods.fgd(LEVEL[1]).requires_grad_(False)
    student, teacher = (torch.randn(LEVEL) for _ in range(2))

    def fgd(student: Tensor, teacher: Tensor) -> Tensor:
        return loss(student, teacher, boxes, (16 * height, 16 * width))  # type: ignore[no-any-return]

    usual = partial(eager.fgd, boxes=boxes, stride=16, like=loss)
    return case("fgd", fgd, usual, (student, teacher), rtol=1e-3)


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
        actual, other = methods.crd(WIDTH, WIDTH, SAMPLES, negatives=100), eager.CRD(loss)
        actual.load_state_dict(loss.state_dict())
        check_close(
            actual(student, teacher, index, others),
            other(student, teacher, index, others),
            rtol=1e-4,
        )
        check_close(actual.student_bank, other.student_bank)

    sides = {
        "sokd": lambda: loss(student, teacher, index),
        "eager": lambda: usual(student, teacher, index),
    }
    trained = {name: _trained(side, student.requires_grad_()) for name, side in sides.items()}
    shape = (BATCH, WIDTH)
    yield Case("crd, a step", shape, trained, targets={"eager": 1}, check=check)
    rows = F.normalize(torch.randn(BATCH, 128))
    updates: dict[str, Side] = {
        "sokd": lambda: loss._remember(index, rows, rows),
        "eager": lambda: usual.remember(index, rows, rows),
    }
    yield Case("crd, update of both banks", (SAMPLES, 128), updates, targets={"eager": 1})


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
