"""What must hold of every kernel, for any build of it: for the kernels as they are, and with seeded faults.

Truth: the CPU kernels, which src/ops/*/naive.rs proves, in float64 wherever the kernels round.
"""

from __future__ import annotations

from typing import Any

import torch
from emulated import Library
from emulated_areas import areas
from emulated_draw import draw
from emulated_mse import masked_mse, scale
from emulated_refine import refine, refine_backward, refine_dots
from support.cases import everything, laid_out
from torch import Tensor

from sokd import ops

Shape = tuple[int, int, int, int]
# Relative to 1 + the largest value: one rounding to the dtype, and sums in float32 before it
ROUNDING = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SUMMING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}


def assert_near(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape, name
    if actual.numel() == 0:
        return
    actual, expected = actual.double(), expected.double()
    error = (actual - expected).abs().max() / (1 + expected.abs().max())
    assert error <= tolerance, (
        f"{name}: off by {error:.2e}, allowed are {tolerance:.0e}"
    )  # a NaN is not, too


def check_masked_mse(
    shape: Shape,
    dtype: torch.dtype,
    layout: str,
    weight: torch.dtype | None,
    normalise: str,
    kernels: Library | None = None,
    align: int = 16,
) -> None:
    """Loss and gradient, then the loss alone."""
    student, teacher = laid_out(shape, layout, dtype), laid_out(shape, layout, dtype)
    weights = None if weight is None else torch.randint(0, 4, (shape[0], 1, *shape[2:])).to(weight)
    arguments: dict[str, Any] = {"normalise": normalise, "kernels": kernels, "align": align}
    loss, d_student = masked_mse(student, teacher, weights, **arguments)
    leaf = student.double().requires_grad_()
    truth = ops.masked_mse(
        leaf, teacher.double(), None if weights is None else weights.double(), normalise=normalise
    )
    assert d_student is not None
    assert_near("loss", loss, truth.detach(), SUMMING[dtype])
    share = float(student.numel() or 1)  # the gradient is of the order of 1 / elements
    assert_near(
        "d_student",
        d_student.double() * share,
        torch.autograd.grad(truth, leaf)[0] * share,
        ROUNDING[dtype],
    )
    alone, _ = masked_mse(student, teacher, weights, gradient=False, **arguments)
    assert_near("loss without gradient", alone, loss, SUMMING[dtype])


def check_scale(
    count: int, dtype: torch.dtype, kernels: Library | None = None, align: int = 16
) -> None:
    """The bits of PyTorch's product, by any number of blocks; for a factor of one, memory is not touched."""
    gradient = torch.randn(count).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    for factor in (-3.3, 0.0, torch.nan):
        expected = (gradient.to(wide) * torch.tensor(factor, dtype=wide)).to(dtype)
        for blocks in (None, 1, 3):
            found = scale(gradient, factor, kernels, align=align, blocks=blocks)
            assert torch.allclose(found, expected, 0, 0, equal_nan=True), (
                f"{factor}, {blocks} blocks"
            )
    scale(gradient, 1.0, kernels, align=align, nowhere=True)


def plan_of(shape: Shape, groups: int, parts: str) -> dict[str, Any]:
    """`parts`: which of theta, hole, sigma, perm, keep, by first letters; "i" for an identity theta."""
    plan = {name: part for name, part in everything(shape, groups).items() if name[0] in parts}
    if "i" in parts:
        plan["theta"] = torch.eye(2, 3, dtype=torch.float64).repeat(groups, 1, 1)
    return plan


def check_forward(
    shape: Shape,
    dtype: torch.dtype,
    layout: str,
    groups: int,
    parts: str,
    kernels: Library | None = None,
    align: int = 16,
) -> None:
    """The bits of the CPU kernel where nothing is resampled, its number else."""
    features, plan = laid_out(shape, layout, dtype), plan_of(shape, groups, parts)
    actual, expected = (
        refine(features, seed=7, kernels=kernels, align=align, **plan),
        ops.refine(features, seed=7, **plan),
    )
    assert actual.stride() == expected.stride() or actual.numel() == 0
    if "t" in parts:
        assert_near("refined", actual, expected, ROUNDING[dtype])
    else:
        assert torch.equal(actual, expected), "refined has other bits than the CPU kernel"


def check_backward(
    shape: Shape,
    dtype: torch.dtype,
    layout: str,
    groups: int,
    parts: str,
    kernels: Library | None = None,
    align: int = 16,
) -> None:
    """d_theta, d_sigma, d_straight and d_features against the CPU's in float64."""
    features, upstream = laid_out(shape, layout, dtype), laid_out(shape, layout, dtype)
    plan = plan_of(shape, groups, parts)
    leaves = {name: plan.pop(name) for name in ("theta", "sigma") if name in plan}
    leaves["straight"] = torch.zeros(groups, dtype=torch.float64)
    actual = refine_backward(
        upstream,
        features,
        **leaves,
        **plan,
        wants_features=True,
        seed=7,
        kernels=kernels,
        align=align,
    )
    tracked = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    tracked["features"] = features.double().requires_grad_()
    refined = ops.refine(**tracked, **plan, seed=7)
    expected = torch.autograd.grad(refined, list(tracked.values()), upstream.double())
    for (name, leaf), truth in zip(tracked.items(), expected, strict=True):
        if leaf.numel():
            assert_near(
                f"d_{name}",
                actual[name],
                truth,
                (ROUNDING if name == "features" else SUMMING)[dtype],
            )


def check_dots(
    shape: Shape,
    dtype: torch.dtype,
    layout: str,
    groups: int,
    plans: int,
    kernels: Library | None = None,
    align: int = 16,
) -> None:
    """All plans at once; among them one that moves nothing and one without noise."""
    features, upstream = laid_out(shape, layout, dtype), laid_out(shape, layout, dtype)
    each = [everything(shape, groups) for _ in range(plans)]
    plan = ops.Plan(**{name: torch.stack([one[name] for one in each]) for name in each[0]}, seed=5)
    assert plan.theta is not None and plan.sigma is not None
    plan.theta[plans // 2], plan.sigma[plans - 1] = torch.eye(2, 3), 0
    actual = refine_dots(features, upstream, plan, kernels=kernels, align=align)
    assert_near(
        "dots", actual, ops.refine_dots(features.double(), upstream.double(), plan), SUMMING[dtype]
    )


def heads(
    shape: Shape, dtype: torch.dtype, layout: str, levels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Heat of so many levels (0: any), so that there are ties; sizes, offsets."""
    pairs = (shape[0], 2, *shape[2:])
    heat = (
        laid_out(shape, layout, dtype).abs_()
        if layout != "expanded"
        else laid_out(shape, layout, dtype)
    )
    if levels and layout != "expanded":
        heat.clamp_(max=2).mul_(levels / 2).round_().div_(levels)
    return heat, laid_out(pairs, layout, dtype, 3.0), laid_out(pairs, layout, dtype)


def check_areas(
    shape: Shape,
    dtype: torch.dtype,
    layout: str,
    k: int,
    kernel: int,
    mutual: bool,
    levels: int,
    kernels: Library | None = None,
    align: int = 16,
) -> None:
    """Every number as the CPU kernel has it."""
    own, teacher = (
        heads(shape, dtype, layout, levels),
        heads(shape, dtype, layout, levels) if mutual else None,
    )
    actual = areas(*own, k=k, kernel=kernel, teacher=teacher, kernels=kernels, align=align)
    expected = ops.areas(*own, k=k, kernel=kernel, teacher=teacher)
    for name, one, other in zip(actual._fields, actual, expected, strict=True):
        assert torch.equal(one, other), f"{name} is not the CPU kernel's"


def check_draw(n: int, kernels: Library | None = None) -> None:
    """The bits of the CPU's, from words that fill all 64 bits."""
    seed, counter = -(2**62) - 5, 2**40 + 3
    actual = draw(seed, counter, n, kernels)
    expected = ops.draw(torch.tensor([seed]), torch.tensor([counter]), n)
    for name, one, other in zip(("uniforms", "noise_seed"), actual, expected, strict=True):
        assert torch.equal(one, other), f"{name} are not the CPU's"
