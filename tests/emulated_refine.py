"""`refine`, its backward and `refine_dots` through the emulator: what the host does, in Python."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from emulated import (
    DTYPES,
    I64,
    NAMES,
    REAL,
    U64,
    Grid,
    Library,
    Map,
    Out,
    Part,
    Placed,
    grid_of,
    is_lanes,
    is_wide,
    library,
    map_of,
    scratch,
    structure,
)
from torch import Tensor

from sokd.reference import layout_of

Plan = structure(
    "Plan",
    theta=Part,
    hole=Part,
    sigma=Part,
    perm=Part,
    keep=Part,
    seed_pointer=U64,
    seed=I64,
    width_by_height=REAL,
    height_by_width=REAL,
)
Refine = structure("Refine", refined=Map, features=Map, grid=Grid, plan=Plan, wide=I64)
RefineBackward = structure(
    "RefineBackward",
    upstream=Map,
    features=Map,
    d_features=Map,
    grid=Grid,
    plan=Plan,
    d_theta=Out,
    d_sigma=Out,
    d_straight=Out,
    partials=U64,
    blocks=I64,
    wide=I64,
)
RefineDots = structure(
    "RefineDots",
    features=Map,
    upstream=Map,
    grid=Grid,
    plan=Plan,
    plans=I64,
    partials=U64,
    dots=U64,
    dots_dtype=I64,
    dots_stride=I64,
    blocks=I64,
    wide=I64,
)
_NAMES = ("theta", "hole", "sigma", "perm", "keep")


class _Parts:
    """A plan's parts in guarded memory, and the structure that names them."""

    def __init__(
        self, features: Tensor, parts: dict[str, Any], seed: int | Tensor, *, stacked: bool = False
    ) -> None:
        self.kept: list[Placed] = []
        height, width = features.shape[2:]
        self.plan = Plan(
            width_by_height=width / max(height, 1), height_by_width=height / max(width, 1)
        )
        for name in _NAMES:
            if parts.get(name) is not None:
                setattr(self.plan, name, self._part(parts[name], stacked))
        if isinstance(seed, Tensor):
            self.plan.seed_pointer = self._placed(seed).pointer
        else:
            self.plan.seed = ctypes.c_int64(seed).value

    def _placed(self, tensor: Tensor) -> Placed:
        self.kept.append(Placed(tensor, align=tensor.element_size()))
        return self.kept[-1]

    def _part(self, tensor: Tensor, stacked: bool) -> Any:
        sizes, strides = list(tensor.shape), [*tensor.stride()]
        plan, *strides = strides if stacked else [0, *strides]
        group, a, b = (*strides, 0, 0)[:3]
        groups = sizes[1 if stacked else 0]
        return Part(
            self._placed(tensor).pointer,
            DTYPES.index(tensor.dtype),
            plan,
            0 if groups == 1 else group,
            a,
            b,
        )


def refine(
    features: Tensor,
    theta: Tensor | None = None,
    *,
    seed: int | Tensor = 0,
    kernels: Library | None = None,
    align: int = 16,
    **parts: Tensor | None,
) -> Tensor:
    """The forward kernel."""
    kernels = kernels or library("refine")
    source = Placed(features, align=align)
    target = Placed(
        torch.empty_like(features, memory_format=layout_of(features)), align=align, fill=False
    )
    order = "lanes" if is_lanes(target.like) else "planes"
    grid, blocks = grid_of(order, features)
    plan = _Parts(features, {"theta": theta, **parts}, seed)
    args = Refine(map_of(target), map_of(source), grid, plan.plan, is_wide(order, [target, source]))
    kernels.launch(f"refine_forward_{NAMES[features.dtype]}_{order}", blocks, args)
    return target.read()


def _out(like: Tensor | None) -> tuple[Placed | None, Any]:
    if like is None:
        return None, Out()
    placed = Placed(torch.empty_like(like), fill=False)
    group, a, b = (*placed.like.stride(), 0, 0)[:3]
    return placed, Out(placed.pointer, DTYPES.index(like.dtype), like.shape[0], group, a, b)


def refine_backward(
    upstream: Tensor,
    features: Tensor,
    theta: Tensor | None = None,
    sigma: Tensor | None = None,
    straight: Tensor | None = None,
    *,
    wants_features: bool = False,
    seed: int | Tensor = 0,
    kernels: Library | None = None,
    align: int = 16,
    **parts: Tensor | None,
) -> dict[str, Tensor]:
    """The gradients of those of theta, sigma and straight that are given, and of the features if wanted."""
    kernels = kernels or library("refine")
    name = NAMES[features.dtype]
    maps = [Placed(upstream, align=align), Placed(features, align=align)]
    plan = _Parts(features, {"theta": theta, "sigma": sigma, **parts}, seed)
    outs = {
        key: _out(like)
        for key, like in (("theta", theta), ("sigma", sigma), ("straight", straight))
    }
    structures = [out[1] for out in outs.values()]
    results = {key: placed for key, (placed, _) in outs.items() if placed is not None}
    if results:
        order = "lanes" if is_lanes(upstream) else "planes"
        grid, blocks = grid_of(order, features)
        room = scratch(8 * blocks)
        args = RefineBackward(
            map_of(maps[0]),
            map_of(maps[1]),
            Map(),
            grid,
            plan.plan,
            *structures,
            room.pointer,
            blocks,
            is_wide(order, maps),
        )
        kernels.launch(f"refine_backward_{name}_{order}", blocks, args)
        kernels.launch(
            "refine_finish", (max(placed.like.shape[0] for placed in results.values()), 8), args
        )
    if wants_features:
        like = torch.empty_like(features, memory_format=layout_of(features))
        results["features"] = target = Placed(like, align=align, fill=False)
        order = "lanes" if is_lanes(like) else "planes"
        grid, blocks = grid_of(order, features)
        args = RefineBackward(
            map_of(maps[0]),
            map_of(maps[1]),
            map_of(target),
            grid,
            plan.plan,
            *structures,
            0,
            blocks,
            is_wide(order, [target, maps[0]]),
        )
        kernels.launch(f"refine_adjoint_{name}_{order}", blocks, args)
    return {key: placed.read() for key, placed in results.items()}


def refine_dots(
    features: Tensor,
    upstream: Tensor,
    plans: Any,
    *,
    kernels: Library | None = None,
    align: int = 16,
) -> Tensor:
    """<upstream, refine(features; plan_v)> for a `sokd.ops.Plan` of V plans."""
    kernels = kernels or library("refine")
    maps = [Placed(features, align=align), Placed(upstream, align=align)]
    order = "lanes" if is_lanes(upstream) else "planes"
    grid, blocks = grid_of(order, features, dots=True)
    plan = _Parts(features, plans.parts(), plans.seed, stacked=True)
    count = next(iter(plans.parts().values())).shape[0]
    room = scratch(count * blocks)
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    dots = Placed(torch.empty(count, dtype=dtype), fill=False)
    args = RefineDots(
        map_of(maps[0]),
        map_of(maps[1]),
        grid,
        plan.plan,
        count,
        room.pointer,
        dots.pointer,
        DTYPES.index(dtype),
        1,
        blocks,
        is_wide(order, [maps[1], maps[0]]),
    )
    if count:
        kernels.launch(f"refine_dots_{NAMES[features.dtype]}_{order}", blocks, args)
    kernels.launch("refine_dots_finish", count, args)
    return dots.read()
