"""The cases of bench_gpu.py: the passes of each operator, with the bytes of docs/gpu.md's floors.

Everything is created on torch's default device.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from support import eager
from torch import Tensor

import sokd
from benches.bench_areas import HEATS
from benches.bench_refine import SEED, Shape, gradients, make, random_map
from benches.harness import LAYOUTS, Case, Side, check_close, compiled, name_of
from sokd import reference

PLANS = 4  # of refine_dots
# The floors are not a goal for these: trials in float64, many plans for one read.
NO_GOAL = ("refine backward, features", "refine_dots")


def has_goal(case: Case) -> bool:
    """Whether the floor applies; not for a gradient in float16, which a second pass scales."""
    scaled = case.work == "masked_mse, forward + backward" and case.dtype == "float16"
    return not (scaled or case.work.startswith(NO_GOAL))


def works(shape: Shape, dtype: torch.dtype, layout: str, *, compile_too: bool) -> Iterator[Case]:
    """Every operator at one shape, also compiled if `compile_too`."""
    compiler = compiled if compile_too else None
    plan = make(shape, dtype, layout, 1)
    yield from _refine_forward(plan, layout, compiler)
    yield from _refine_backward(plan, layout)
    yield _refine_dots(plan, layout)
    yield from _masked_mse(shape, dtype, layout, compiler)
    yield _areas((shape[0], HEATS, *shape[2:]), dtype, layout)


def _case(
    work: str, features: Tensor, layout: str, sides: dict[str, Side], moved: int,
    check: Callable[[], None],
) -> Case:  # fmt: skip
    dtype = name_of(features.dtype)
    return Case(work, features.shape, sides, moved, check=check, dtype=dtype, layout=layout)


def _loose(dtype: torch.dtype) -> dict[str, float]:
    bound = 1e-4 if dtype == torch.float32 else 4e-2
    return {"rtol": bound, "atol": bound}


def _refine_forward(
    plan: dict[str, Tensor], layout: str, compiler: Callable[..., Any] | None
) -> Iterator[Case]:
    """Bytes: the features read, the refined map written."""
    kinds: dict[str, tuple[tuple[str, ...], Callable[..., Tensor] | None]] = {
        "nothing resampled": (("hole", "perm", "keep"), None),
        "affine only": (("theta",), eager.affine),
        "five parts": (("theta", "hole", "sigma", "perm", "keep"), eager.refine),
    }
    features = plan["features"]
    for kind, (names, baseline) in kinds.items():
        part = {name: plan[name] for name in ("features", *names)}
        sides: dict[str, Side] = {"sokd": _call(sokd.ops.refine, part | {"seed": SEED})}
        if baseline is not None:
            sides["eager"] = _call(baseline, part)
            if compiler is not None:
                sides["compile"] = _call(compiler(baseline), part)

        def check(part: dict[str, Any] = part) -> None:
            actual, truth = (
                refine(**part, seed=SEED) for refine in (sokd.ops.refine, reference.refine)
            )
            check_close(actual, truth, **_loose(features.dtype))

        yield _case(f"refine forward, {kind}", features, layout, sides, 2 * features.nbytes, check)


def _call(function: Callable[..., Any], arguments: dict[str, Any]) -> Side:
    return lambda: function(**arguments)


def _refine_backward(plan: dict[str, Tensor], layout: str) -> Iterator[Case]:
    """The backward alone. Bytes: two maps read for the plan; one read, one written for maps."""
    upstream = torch.randn_like(plan["features"])
    for kind, names in {"theta and sigma": ("theta", "sigma"), "features": ("features",)}.items():
        leaves = {name: plan[name].detach().clone().requires_grad_() for name in names}
        arguments = plan | leaves
        refined = sokd.ops.refine(**arguments, seed=SEED)
        sides = {"sokd": _backward(refined, [*leaves.values()], upstream)}
        sides["eager"] = _backward(eager.refine(**arguments), [*leaves.values()], upstream)

        def check(
            actual: Side = sides["sokd"], arguments: Any = arguments, leaves: Any = leaves
        ) -> None:
            truth = reference.refine(**arguments, seed=SEED)
            expected = torch.autograd.grad(truth, [*leaves.values()], upstream)
            for one, other in zip(actual(), expected, strict=True):  # type: ignore[call-overload]
                bound = _loose(upstream.dtype)
                check_close(
                    one,
                    other,
                    rtol=10 * bound["rtol"],
                    atol=bound["atol"] * float(other.abs().max()),
                )

        work, features = f"refine backward, {kind}", plan["features"]
        yield _case(work, features, layout, sides, 2 * upstream.nbytes, check)


def _backward(refined: Tensor, wanted: list[Tensor], upstream: Tensor) -> Side:
    return lambda: torch.autograd.grad(refined, wanted, upstream, retain_graph=True)


def _refine_dots(plan: dict[str, Tensor], layout: str) -> Case:
    """Bytes: two maps read, whatever the number of plans."""
    features, upstream = plan["features"], torch.randn_like(plan["features"])
    stacked = {
        name: torch.stack([part] * PLANS)
        for name, part in plan.items()
        if name not in ("features", "sigma")
    }

    def one_by_one() -> Tensor:
        one = plan | {"sigma": torch.zeros_like(plan["sigma"])}
        return torch.stack([(upstream * eager.refine(**one)).sum() for _ in range(PLANS)])

    def check() -> None:
        scale = features.numel() ** 0.5
        actual, truth = (
            dots(features, upstream, stacked) / scale
            for dots in (sokd.ops.refine_dots, reference.refine_dots)
        )
        check_close(actual, truth, **_loose(features.dtype))

    sides: dict[str, Side] = {
        "sokd": lambda: sokd.ops.refine_dots(features, upstream, stacked),
        "eager": one_by_one,
    }
    return _case("refine_dots, 4 plans", features, layout, sides, 2 * features.nbytes, check)


def _masked_mse(
    shape: Shape, dtype: torch.dtype, layout: str, compiler: Callable[..., Any] | None
) -> Iterator[Case]:
    """The kernel, then with autograd. Bytes: two maps and the weight read, a gradient written."""
    student, teacher = (random_map(shape, dtype, layout) for _ in range(2))
    weight = torch.randint(0, 4, (shape[0], *shape[2:])).float()
    student.requires_grad_()
    given = student.detach(), teacher, weight
    # gradients are about 1 / numel: compared where the tolerance means something
    scale = student.numel()

    def both(loss: Callable[..., Tensor]) -> Side:
        return lambda: gradients(loss, [student], student, teacher, weight)

    def kernel() -> Any:
        return torch.ops.sokd.masked_mse(*given, "elements", float(scale), True)

    def truth() -> tuple[Tensor, Tensor]:
        wide = student.detach().float().requires_grad_()
        loss = reference.masked_mse(wide, teacher.float(), weight) * scale
        return loss.detach(), torch.autograd.grad(loss, wide)[0]

    def check_kernel() -> None:
        for one, other in zip(kernel(), truth(), strict=True):
            check_close(one.float(), other, **_loose(dtype))

    def check_both() -> None:
        loss = sokd.ops.masked_mse(student, teacher, weight)
        bound = _loose(dtype)
        # the gradient is below its normal numbers: to two steps of the others
        if dtype == torch.float16:
            bound["atol"] += 2 * scale * 2.0**-24
        actual = loss.detach() * scale, torch.autograd.grad(loss, student)[0].float() * scale
        for one, other in zip(actual, truth(), strict=True):
            check_close(one, other, **bound)

    sides = {"sokd": both(sokd.ops.masked_mse), "eager": both(eager.masked_mse)}
    if compiler is not None:
        sides["compile"] = both(compiler(eager.masked_mse))
    moved = 3 * student.nbytes + weight.nbytes
    work, of_kernel = "masked_mse, loss and gradient", {"sokd": kernel}
    yield _case(work, student, layout, of_kernel, moved, check_kernel)
    yield _case("masked_mse, forward + backward", student, layout, sides, moved, check_both)


def _areas(shape: Shape, dtype: torch.dtype, layout: str) -> Case:
    """Bytes: the heat read, the coverage written; of size and offset only the cells of boxes."""
    batch, _, height, width = shape
    heat = torch.rand(shape).to(dtype).to(memory_format=LAYOUTS[layout])
    size = (torch.rand(batch, 2, height, width) * min(height, width) / 2).to(dtype)
    offset = torch.rand(batch, 2, height, width).to(dtype)

    def check() -> None:
        actual, truth = (areas(heat, size, offset) for areas in (sokd.ops.areas, reference.areas))
        check_close(actual.boxes, truth.boxes)
        check_close(actual.coverage, truth.coverage)

    sides: dict[str, Side] = {
        "sokd": lambda: sokd.ops.areas(heat, size, offset),
        "eager": lambda: reference.areas(heat, size, offset),
    }
    moved = heat.nbytes + 4 * batch * height * width
    return _case("areas, k = 8", heat, layout, sides, moved, check)
