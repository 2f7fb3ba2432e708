"""The checks of the kernels: the source must pass them, a source with a seeded fault must not.

The expected values are the CPU kernels', in float64 wherever the CUDA kernels round.
"""

from typing import Any

import torch
from torch import Tensor

from sokd import ops
from support.cases import DType, everything, laid_out
from support.cuda.device_cases import moved
from support.cuda.memory import MockMemory

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
    # false for NaN, too
    assert error <= tolerance, f"{name}: off by {error:.2e}, allowed are {tolerance:.0e}"


# --- one call each, CPU tensors in and out
def refine(cuda: MockMemory, features: Tensor, **plan: Any) -> Tensor:
    return cuda.back(ops.refine(cuda.on(features), **moved(cuda, plan)))


def refine_backward(
    cuda: MockMemory, upstream: Tensor, features: Tensor, *, straight: Tensor | None = None,
    seed: int | Tensor = 0, **plan: Tensor | None,
) -> dict[str, Tensor]:  # fmt: skip
    """The gradients of the features, and of those of theta, sigma and straight that are given."""
    given = moved(cuda, {"features": features, "straight": straight, **plan})
    parts = [given.get(name) for name in ("theta", "hole", "sigma", "perm", "keep")]
    names = ("features", "theta", "sigma", "straight")
    wanted = [given.get(name) is not None for name in names]
    seeds = (cuda.on(seed), 0) if isinstance(seed, Tensor) else (None, seed)
    found = torch.ops.sokd.refine_backward(
        cuda.on(upstream), given["features"], *parts, *seeds, given["straight"], wanted
    )
    every = zip(names, found, wanted, strict=True)
    return {name: cuda.back(gradient) for name, gradient, want in every if want}


def refine_dots(
    cuda: MockMemory,
    features: Tensor,
    upstream: Tensor,
    plans: ops.Plan,
    *,
    by_sample: bool = False,
) -> Tensor:
    there = ops.Plan(**moved(cuda, plans._asdict()))
    maps = cuda.on(features), cuda.on(upstream)
    return cuda.back(ops.refine_dots(*maps, there, by_sample=by_sample))


def masked_mse(
    cuda: MockMemory, student: Tensor, teacher: Tensor, weight: Tensor | None = None,
    normalise: str = "elements", *, gradient: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss and gradient; the gradient is empty where it is not wanted."""
    maps = [None if map is None else cuda.on(map) for map in (student, teacher, weight)]
    loss, d_student = torch.ops.sokd.masked_mse(*maps, normalise, 1.0, gradient)
    return cuda.back(loss), cuda.back(d_student)


def masked_mse_scale(cuda: MockMemory, gradient: Tensor, upstream: Tensor) -> Tensor:
    there = cuda.on(gradient)
    torch.ops.sokd.masked_mse_scale(there, cuda.on(upstream))
    return cuda.back(there)


def areas(
    cuda: MockMemory, *maps: Tensor, teacher: tuple[Tensor, ...] | None = None, **options: int
) -> ops.Areas:
    there = None if teacher is None else tuple(map(cuda.on, teacher))
    found = ops.areas(*map(cuda.on, maps), teacher=there, **options)
    return ops.Areas(*map(cuda.back, found))


# --- what holds
def check_masked_mse(
    cuda: MockMemory, shape: Shape, dtype: DType, layout: str, weight: DType | None,
    normalise: str,
) -> None:  # fmt: skip
    """Loss and gradient, then the loss alone."""
    cuda.odd = layout == "offset"
    student, teacher = laid_out(shape, layout, dtype), laid_out(shape, layout, dtype)
    weights = None if weight is None else torch.randint(0, 4, (shape[0], 1, *shape[2:])).to(weight)
    arguments = (student, teacher, weights, normalise)
    loss, d_student = masked_mse(cuda, *arguments)
    leaf = student.double().requires_grad_()
    wide = None if weights is None else weights.double()
    truth = ops.masked_mse(leaf, teacher.double(), wide, normalise=normalise)
    assert_near("loss", loss, truth.detach(), SUMMING[dtype])
    share = float(student.numel() or 1)  # the gradient is of the order of 1 / elements
    expected = torch.autograd.grad(truth, leaf)[0] * share
    assert_near("d_student", d_student.double() * share, expected, ROUNDING[dtype])
    alone, _ = masked_mse(cuda, *arguments, gradient=False)
    assert_near("loss without gradient", alone, loss, SUMMING[dtype])


def check_scale(cuda: MockMemory, count: int, dtype: DType, *, odd: bool = False) -> None:
    """PyTorch's bits for any number of blocks; a factor of one leaves the gradient alone."""
    cuda.odd = odd
    gradient = torch.randn(1, 1, 1, count).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    for factor in (-3.3, 0.0, torch.nan):
        upstream = torch.tensor(factor, dtype=wide)
        expected = (gradient.to(wide) * upstream).to(dtype)
        for blocks in (None, 1, 3):
            cuda.driver.blocks(blocks)
            found = masked_mse_scale(cuda, gradient, upstream)
            same = torch.allclose(found, expected, 0, 0, equal_nan=True)
            assert same, f"{factor}, {blocks} blocks"
    cuda.driver.blocks(None)
    unmapped = cuda.at(4096, gradient.nbytes, gradient.shape, gradient.stride(), dtype, 0)
    torch.ops.sokd.masked_mse_scale(unmapped, cuda.on(torch.tensor(1.0, dtype=wide)))


def plan_of(shape: Shape, groups: int, parts: str) -> dict[str, Any]:
    """`parts`: the initials of theta, hole, sigma, perm, keep; "i" for an identity theta."""
    plan = {name: part for name, part in everything(shape, groups).items() if name[0] in parts}
    if "i" in parts:
        plan["theta"] = torch.eye(2, 3, dtype=torch.float64).repeat(groups, 1, 1)
    return plan


def check_forward(
    cuda: MockMemory, shape: Shape, dtype: DType, layout: str, groups: int, parts: str
) -> None:
    """The CPU kernel's value, bit by bit where nothing is resampled."""
    cuda.odd = layout == "offset"
    features, plan = laid_out(shape, layout, dtype), plan_of(shape, groups, parts)
    actual, expected = refine(cuda, features, seed=7, **plan), ops.refine(features, seed=7, **plan)
    assert actual.stride() == expected.stride() or actual.numel() == 0
    if "t" in parts:
        assert_near("refined", actual, expected, ROUNDING[dtype])
    else:
        assert torch.equal(actual, expected), "refined differs from the CPU kernel's bits"


def check_backward(
    cuda: MockMemory, shape: Shape, dtype: DType, layout: str, groups: int, parts: str
) -> None:
    """d_theta, d_sigma, d_straight and d_features against the CPU's in float64."""
    cuda.odd = layout == "offset"
    features, upstream = laid_out(shape, layout, dtype), laid_out(shape, layout, dtype)
    plan = plan_of(shape, groups, parts)
    leaves = {name: plan.pop(name) for name in ("theta", "sigma") if name in plan}
    leaves["straight"] = torch.zeros(groups, dtype=torch.float64)
    actual = refine_backward(cuda, upstream, features, seed=7, **leaves, **plan)
    tracked = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    tracked["features"] = features.double().requires_grad_()
    refined = ops.refine(**tracked, **plan, seed=7)
    expected = torch.autograd.grad(refined, list(tracked.values()), upstream.double())
    for (name, leaf), truth in zip(tracked.items(), expected, strict=True):
        if leaf.numel():
            tolerance = (ROUNDING if name == "features" else SUMMING)[dtype]
            assert_near(f"d_{name}", actual[name], truth, tolerance)


def check_dots(
    cuda: MockMemory,
    shape: Shape,
    dtype: torch.dtype,
    layout: str,
    groups: int,
    plans: int,
    *,
    by_sample: bool = False,
) -> None:
    """All plans at once; one of them moves nothing, one has no noise."""
    cuda.odd = layout == "offset"
    features, upstream = laid_out(shape, layout, dtype), laid_out(shape, layout, dtype)
    each = [everything(shape, groups) for _ in range(plans)]
    plan = ops.Plan(**{name: torch.stack([one[name] for one in each]) for name in each[0]}, seed=5)
    assert plan.theta is not None and plan.sigma is not None
    plan.theta[plans // 2], plan.sigma[plans - 1] = torch.eye(2, 3), 0
    actual = refine_dots(cuda, features, upstream, plan, by_sample=by_sample)
    wide = features.double(), upstream.double()
    expected = ops.refine_dots(*wide, plan, by_sample=by_sample)
    assert_near("dots", actual, expected, SUMMING[dtype])


def heads(shape: Shape, dtype: DType, layout: str, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Heat of at most 2 * levels + 1 values (0: any), so that there are ties; sizes, offsets."""
    pairs = (shape[0], 2, *shape[2:])
    heat = laid_out(shape, layout, dtype)
    if layout != "expanded":
        heat.abs_()
        if levels:
            heat.clamp_(max=2).mul_(levels / 2).round_().div_(levels)
    return heat, laid_out(pairs, layout, dtype, 3.0), laid_out(pairs, layout, dtype)


def check_areas(
    cuda: MockMemory, shape: Shape, dtype: DType, layout: str, k: int, kernel: int,
    mutual: bool, levels: int,
) -> None:  # fmt: skip
    """Equal to the CPU kernel's."""
    cuda.odd = layout == "offset"
    own = heads(shape, dtype, layout, levels)
    teacher = heads(shape, dtype, layout, levels) if mutual else None
    actual = areas(cuda, *own, k=k, kernel=kernel, teacher=teacher)
    expected = ops.areas(*own, k=k, kernel=kernel, teacher=teacher)
    for name, one, other in zip(actual._fields, actual, expected, strict=True):
        assert torch.equal(one, other), f"{name} differ from the CPU kernel's"


def check_draw(cuda: MockMemory, n: int) -> None:
    """The CPU's bits, from words that fill all 64 bits."""
    words = torch.tensor([-(2**62) - 5]), torch.tensor([2**40 + 3])
    actual = map(cuda.back, ops.draw(*map(cuda.on, words), n))
    names, expected = ("uniforms", "noise_seed"), ops.draw(*words, n)
    for name, one, other in zip(names, actual, expected, strict=True):
        assert torch.equal(one, other), f"{name} differ from the CPU's"


def check_unnamed_channels(cuda: MockMemory) -> None:
    """A perm whose last entry is channel 0, and that has no entry for channel 1."""
    perm = torch.arange(260)[None]
    perm[:, 0], perm[:, 1], perm[:, 259] = 259, 2, 0
    upstream = torch.randn(1, 260, 2, 3)
    found = refine_backward(cuda, upstream, upstream, perm=perm)["features"]
    assert found.isfinite().all(), "channels are left unwritten"
    named = torch.equal(found[:, 0], upstream[:, 259])
    assert named and found[:, 1].eq(0).all(), "the wrong channels are cleared"
