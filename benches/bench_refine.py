"""`refine` against fast PyTorch code, eager and compiled.

Bytes: the forward reads the features and writes the refined map (2 maps). With `masked_mse` and
backward: 2 for the forward, 3 for the loss (two maps read, a gradient written), 2 for the backward
(features, gradient).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from support import eager
from torch import Tensor

import sokd
from benches.harness import LAYOUTS, MEMORY, Case, Options, check_close, compiled, name_of
from sokd import reference
from sokd.ops.masked_mse import scaled_mse as any_mse

MAIN = (64, 128, 16, 16)
LARGE = ((32, 256, 28, 28), (2, 256, 100, 100))
SEED = 7
Shape = tuple[int, ...]


def random_map(shape: Shape, dtype: torch.dtype, layout: str) -> Tensor:
    return torch.randn(shape).to(dtype).to(memory_format=LAYOUTS[layout])


def make(shape: Shape, dtype: torch.dtype, layout: str, groups: int) -> dict[str, Tensor]:
    """Features and a plan with all five parts active."""
    torch.manual_seed(0)
    _, channels, height, width = shape
    angle = torch.empty(groups).uniform_(-0.3, 0.3)
    zero = torch.zeros_like(angle)
    rows = [angle.cos(), angle.sin(), zero + 0.1], [-angle.sin(), angle.cos(), zero - 0.1]
    return {
        "features": random_map(shape, dtype, layout),
        "theta": torch.stack([torch.stack(row, -1) for row in rows], 1),
        "hole": torch.tensor([[height // 4, width // 4, height // 4 + 3, width // 4 + 3]]).repeat(
            groups, 1
        ),
        "sigma": torch.full((groups,), 0.05),
        "perm": torch.stack([torch.randperm(channels) for _ in range(groups)]),
        "keep": torch.rand(groups, channels) > 0.25,
    }


def eager_refined_loss(student: Tensor, weight: Tensor, plan: dict[str, Tensor]) -> Tensor:
    return eager.masked_mse(student, eager.refine(**plan), weight)


def sokd_refined_loss(student: Tensor, weight: Tensor, plan: dict[str, Tensor]) -> Tensor:
    refined = sokd.ops.refine(**plan, seed=SEED)
    return any_mse(student, refined, weight, normalise="elements", scale=1.0, mutual=True)


def gradients(
    loss: Callable[..., Tensor], wanted: list[Tensor], *arguments: Any
) -> tuple[Tensor, ...]:
    """Forward and backward, without accumulation."""
    return torch.autograd.grad(loss(*arguments), wanted)


def forward_case(
    shape: Shape, dtype: torch.dtype, layout: str, groups: int, *, compile_too: bool,
    target: float,
) -> Case:  # fmt: skip
    plan = make(shape, dtype, layout, groups)
    still = plan | {"sigma": torch.zeros(groups)}  # the noise of the two sides differs
    loose = 1e-5 if dtype == torch.float32 else 4e-2

    def check() -> None:
        check_close(
            sokd.ops.refine(**plan, seed=SEED),
            reference.refine(**plan, seed=SEED),
            rtol=loose,
            atol=loose,
        )
        if dtype == torch.float32:
            check_close(sokd.ops.refine(**still), eager.refine(**still), rtol=1e-4, atol=1e-4)

    sides: dict[str, Any] = {
        "sokd": lambda: sokd.ops.refine(**plan, seed=SEED),
        "eager": lambda: eager.refine(**plan),
    }
    if compile_too:
        fast = compiled(eager.refine)
        sides["compile"] = lambda: fast(**plan)
    if target > 1:
        sides[MEMORY] = plan["features"].clone
    moved = 2 * plan["features"].nbytes
    work = "refine forward, five parts" + ("" if groups == 1 else ", a plan per sample")
    targets = {"eager": target}
    return Case(work, shape, sides, moved, targets, check, name_of(dtype), layout)


def affine_case(shape: Shape, dtype: torch.dtype, layout: str, *, target: float) -> Case:
    plan = make(shape, dtype, layout, 1)
    features, theta = plan["features"], plan["theta"]
    loose = 1e-5 if dtype == torch.float32 else 4e-2

    def check() -> None:
        actual = sokd.ops.refine(features, theta)
        check_close(actual, reference.refine(features, theta), rtol=loose, atol=loose)
        if dtype == torch.float32:
            check_close(actual, eager.affine(features, theta), rtol=1e-4, atol=1e-4)

    sides: dict[str, Any] = {
        "sokd": lambda: sokd.ops.refine(features, theta),
        "eager": lambda: eager.affine(features, theta),
    }
    if target > 1:
        sides[MEMORY] = features.clone
    work = "refine forward, affine only"
    moved, targets = 2 * features.nbytes, {"eager": target}
    return Case(work, shape, sides, moved, targets, check, name_of(dtype), layout)


def loss_case(
    shape: Shape, dtype: torch.dtype, layout: str, *, compile_too: bool, target: float
) -> Case:
    plan = make(shape, dtype, layout, 1)
    plan["theta"].requires_grad_()
    plan["sigma"].requires_grad_()
    student = random_map(shape, dtype, layout).requires_grad_()
    weight = torch.randint(0, 4, (shape[0], *shape[2:])).float()
    wanted = [student, plan["theta"], plan["sigma"]]
    loose = 1e-4 if dtype == torch.float32 else 4e-2

    def check() -> None:
        refined = reference.refine(**plan, seed=SEED)
        truth = torch.autograd.grad(
            reference.mutual_mse(student, refined, weight, normalise="elements"), wanted
        )
        actual = gradients(sokd_refined_loss, wanted, student, weight, plan)
        check_close(actual[0], truth[0], rtol=loose, atol=loose)
        for one, other in zip(actual[1:], truth[1:], strict=True):
            check_close(one, other, rtol=100 * loose, atol=100 * loose * float(other.abs().max()))

    def memory() -> None:
        refined = plan["features"].clone()
        gradient = torch.sub(student.detach(), refined)
        gradient.sum(), plan["features"].sum()

    sides: dict[str, Any] = {
        "sokd": lambda: gradients(sokd_refined_loss, wanted, student, weight, plan),
        "eager": lambda: gradients(eager_refined_loss, wanted, student, weight, plan),
    }
    if compile_too:
        fast = compiled(eager_refined_loss)
        sides["compile"] = lambda: gradients(fast, wanted, student, weight, plan)
    if target > 1:
        sides[MEMORY] = memory
    moved = 7 * student.nbytes
    targets = {"eager": target, "compile": target}
    work = "refine + masked_mse, forward + backward"
    return Case(work, shape, sides, moved, targets, check, name_of(dtype), layout)


def cases(options: Options) -> Iterator[Case]:
    """Targets at the main shape in float32; elsewhere no case may be slower than eager."""
    f32, bf16 = torch.float32, torch.bfloat16
    yield forward_case(MAIN, f32, "contiguous", 1, compile_too=True, target=10)
    yield loss_case(MAIN, f32, "contiguous", compile_too=True, target=10)
    yield affine_case(MAIN, f32, "contiguous", target=3)
    yield affine_case(MAIN, f32, "channels_last", target=6)
    if options.quick:
        return
    yield forward_case(MAIN, f32, "channels_last", 1, compile_too=False, target=1)
    yield forward_case(MAIN, f32, "contiguous", MAIN[0], compile_too=False, target=1)
    yield loss_case(MAIN, f32, "channels_last", compile_too=False, target=1)
    for layout in LAYOUTS:
        yield forward_case(MAIN, bf16, layout, 1, compile_too=False, target=1)
        yield loss_case(MAIN, bf16, layout, compile_too=False, target=1)
        yield affine_case(MAIN, bf16, layout, target=1)
    for shape in LARGE:
        for layout in LAYOUTS:
            yield forward_case(shape, f32, layout, 1, compile_too=False, target=1)
            yield loss_case(shape, f32, layout, compile_too=layout == "contiguous", target=1)
            yield affine_case(shape, f32, layout, target=1)
        yield loss_case(shape, bf16, "contiguous", compile_too=False, target=1)
