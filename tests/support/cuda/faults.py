"""Faults to seed into the kernels' source, each with the check that must catch it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from support.cuda.checks import (
    check_areas,
    check_backward,
    check_dots,
    check_draw,
    check_forward,
    check_masked_mse,
    check_scale,
    check_unnamed_channels,
)
from support.cuda.memory import MockMemory

F32 = torch.float32


class Fault(NamedTuple):
    """One change of the source: `text` becomes `other` in `file`; `check` must then fail."""

    name: str
    operator: str
    kernels: int  # the bits of SOKD_KERNELS that the check needs
    file: str
    text: str
    other: str
    check: Callable[[MockMemory], None]


def mse(cuda: MockMemory) -> None:
    check_masked_mse(cuda, (2, 40, 5, 7), F32, "transposed", F32, "area")
    check_masked_mse(cuda, (2, 3, 17, 20), F32, "transposed", F32, "area")


def mse_lanes(cuda: MockMemory) -> None:
    check_masked_mse(cuda, (2, 12, 5, 7), F32, "channels_last", F32, "elements")


def mse_wide(cuda: MockMemory) -> None:
    check_masked_mse(cuda, (2, 19, 8, 8), F32, "contiguous", None, "elements")


def scale(cuda: MockMemory) -> None:
    check_scale(cuda, 9001, F32)


def forward(cuda: MockMemory) -> None:
    check_forward(cuda, (2, 9, 17, 18), F32, "transposed", 2, "thspk")


def forward_lanes(cuda: MockMemory) -> None:
    check_forward(cuda, (2, 12, 9, 8), F32, "channels_last", 2, "th")


def noise(cuda: MockMemory) -> None:
    check_forward(cuda, (1, 6, 5, 7), F32, "contiguous", 1, "s")


def copy(cuda: MockMemory) -> None:
    check_forward(cuda, (1, 6, 8, 8), F32, "contiguous", 1, "hp")


def backward(cuda: MockMemory) -> None:
    check_backward(cuda, (3, 9, 9, 8), F32, "contiguous", 3, "thspk")


def backward_lanes(cuda: MockMemory) -> None:
    check_backward(cuda, (2, 8, 9, 8), F32, "channels_last", 2, "ths")


def dots(cuda: MockMemory) -> None:
    check_dots(cuda, (2, 9, 9, 8), F32, "contiguous", 2, 35)


def squares(cuda: MockMemory) -> None:
    check_dots(cuda, (2, 9, 9, 8), F32, "contiguous", 2, 35, by_sample=True)


def squares_lanes(cuda: MockMemory) -> None:
    check_dots(cuda, (2, 8, 9, 8), F32, "channels_last", 2, 3, by_sample=True)


def areas(cuda: MockMemory) -> None:
    check_areas(cuda, (2, 40, 9, 8), F32, "contiguous", 8, 3, True, 3)
    check_areas(cuda, (1, 40, 9, 8), F32, "contiguous", 60, 3, False, 0)
    check_areas(cuda, (1, 40, 9, 8), F32, "contiguous", 60, 1, False, 3)


def draws(cuda: MockMemory) -> None:
    for n in (1021, 4):
        check_draw(cuda, n)


# fmt: off
COMMON, SAMPLING, KERNEL = "common.cuh", "sampling.cuh", "kernel.cu"
BACKWARD, ADJOINT, DOTS = "backward.cuh", "adjoint.cuh", "dots.cuh"
FAULTS = [
    Fault(
        "missing barrier: sums of the warps", "masked_mse", 3, COMMON,
        "room[threadIdx.x / 32] = of_warp;\n    __syncthreads();",
        "room[threadIdx.x / 32] = of_warp;",
        mse,
    ),
    Fault(
        "skipped tail: last position", "masked_mse", 3, COMMON,
        "(unsigned)(all - first < grid.positions_per_block ? all :",
        "(unsigned)(all - first < grid.positions_per_block ? all - 1 :",
        mse,
    ),
    Fault(
        "skipped tail: channels past a step", "masked_mse", 3, KERNEL,
        "c < tile.channels; c += STEPS * rows)",
        "c + (STEPS - 1) * rows < tile.channels; c += STEPS * rows)",
        mse_wide,
    ),
    Fault(
        "wrong stride: the teacher has the student's", "masked_mse", 3, KERNEL,
        "to_acc(teacher[c * args.teacher.c]), weight",
        "to_acc(teacher[c]), weight",
        mse,
    ),
    Fault(
        "wrong stride: blocks of the weights' sum overlap", "masked_mse", 3, KERNEL,
        "i < all; i += args.area_blocks * THREADS",
        "i < all; i += args.area_blocks * THREADS / 2",
        mse,
    ),
    Fault(
        "off by one: a run past the channels", "masked_mse", 3, KERNEL,
        "if (spot.channel >= tile.channels) return 0;",
        "if (spot.channel > tile.channels) return 0;",
        mse_lanes,
    ),
    Fault(
        "skipped tail: elements past the last vector", "masked_mse", 4, KERNEL,
        "long long i = runs * E + first; i < args.count",
        "long long i = runs * E + first; i < runs * E",
        scale,
    ),
    Fault(
        "wrong stride: runs left out between two steps", "masked_mse", 4, KERNEL,
        "i < runs; i += STEPS * step",
        "i < runs; i += (STEPS + 1) * step",
        scale,
    ),
    Fault(
        "a factor of one that is not tested for", "masked_mse", 4, KERNEL,
        "if (factor == Acc<T>(1)) return;",
        "",
        scale,
    ),
    Fault(
        "missing barrier: the table of corners", "refine", 1, SAMPLING,
        "return !__syncthreads_or(!wide",
        "return !(!wide",
        forward_lanes,
    ),
    Fault(
        "missing barrier: the plan", "refine", 1, SAMPLING,
        "return __syncthreads_or(moves);",
        "return moves || plan.theta.pointer;",
        forward,
    ),
    Fault(
        "off by one: a corner right of the map", "refine", 1, SAMPLING,
        "near && corners.x + 1 < grid.width",
        "near && corners.x + 1 <= grid.width",
        forward,
    ),
    Fault(
        "off by one: the hole's last row", "refine", 1, SAMPLING,
        "y < plan.hole[2]",
        "y <= plan.hole[2]",
        forward,
    ),
    Fault(
        "wrong stride: rows stepped by columns", "refine", 1, SAMPLING,
        "(long long)(at.y + (corner >> 1)) * map.y",
        "(long long)(at.y + (corner >> 1)) * map.x",
        forward,
    ),
    Fault(
        "wrong channel: not permuted", "refine", 1, KERNEL,
        "features + source * args.features.c)",
        "features + c * args.features.c)",
        copy,
    ),
    Fault("a round too few", "refine", 1, "philox.cuh", "round < 10", "round < 9", noise),
    Fault(
        "wrong exchange of the noise", "refine", 1, SAMPLING,
        "if (i & step) continue;",
        "if (i & step || i == 1) continue;",
        noise,
    ),
    Fault(
        "wrong key of the noise: plane of another sample", "refine", 1, SAMPLING,
        "(unsigned long long)(n * grid.channels + c)",
        "(unsigned long long)(n * grid.height + c)",
        forward,
    ),
    Fault(
        "missing barrier: the sums of a block", "refine", 14, BACKWARD,
        "threadIdx.x % 32 / 4] = sum;\n    __syncthreads();",
        "threadIdx.x % 32 / 4] = sum;",
        backward,
    ),
    Fault(
        "half a warp's sums lost", "refine", 14, COMMON,
        "for (int count = 4, step = 16;",
        "for (int count = 4, step = 8;",
        backward,
    ),
    Fault(
        "wrong group: all samples' blocks", "refine", 14, KERNEL,
        "(all ? 0 : g * each)",
        "0",
        backward,
    ),
    Fault(
        "wrong slope", "refine", 14, BACKWARD,
        "fused(1 - at.right, c - a,",
        "fused(at.right, c - a,",
        backward_lanes,
    ),
    Fault(
        "adjoint: last column of the box skipped", "refine", 14, ADJOINT,
        "(int)x1 + 1, y0",
        "(int)x1, y0",
        backward,
    ),
    Fault(
        "adjoint: dropped channels not cleared", "refine", 14, ADJOINT,
        "if (source != INVALID) from_acc(sums[i],",
        "if (source >= 0) from_acc(sums[i],",
        backward,
    ),
    Fault(
        "adjoint: channels that perm does not name not cleared", "refine", 14, ADJOINT,
        "if (!__syncthreads_or(!named[threadIdx.x])) return;",
        "return;",
        check_unnamed_channels,
    ),
    Fault(
        "adjoint: perm's entries past a block skipped", "refine", 14, ADJOINT,
        "c < (int)args.grid.channels; c += THREADS) {",
        "c < THREADS && c < (int)args.grid.channels; c += THREADS) {",
        check_unnamed_channels,
    ),
    Fault(
        "one plan's buffer for two plans", "refine", 24, DOTS,
        "const SamplePlan& plan = read[v & 1];\n        const bool moves = read_plan("
        "read[v & 1], args.plan, args.grid, tile, v);\n        A sum;",
        "const SamplePlan& plan = read[0];\n        const bool moves = read_plan("
        "read[0], args.plan, args.grid, tile, v);\n        A sum;",
        dots,
    ),
    Fault(
        "skipped tail: the last plans", "refine", 24, DOTS,
        "if (slot + 1 < BATCH && v + 1 < args.plans) continue;\n        __syncthreads();\n"
        "        if ((int)threadIdx.x > slot)",
        "if (slot + 1 < BATCH) continue;\n        __syncthreads();\n"
        "        if ((int)threadIdx.x > slot)",
        dots,
    ),
    Fault(
        "missing barrier: plans written together", "refine", 24, DOTS,
        "v + 1 < args.plans) continue;\n        __syncthreads();\n"
        "        if ((int)threadIdx.x > slot)",
        "v + 1 < args.plans) continue;\n        if ((int)threadIdx.x > slot)",
        dots,
    ),
    Fault(
        "missing barrier: squares written together", "refine", 40, DOTS,
        "v + 1 < args.plans) continue;\n        __syncthreads();\n"
        "        if ((int)threadIdx.x >= 2",
        "v + 1 < args.plans) continue;\n        if ((int)threadIdx.x >= 2",
        squares,
    ),
    Fault(
        "missing barrier: the table of corners", "refine", 40, DOTS,
        "fill_table(table, plan, args.grid, tile);\n        __syncthreads();",
        "fill_table(table, plan, args.grid, tile);",
        squares_lanes,
    ),
    Fault(
        "another sample's blocks", "refine", 40, KERNEL,
        "rest * args.blocks + n * each,",
        "rest * args.blocks,",
        squares,
    ),
    Fault(
        "missing barrier: the list is read while it is rewritten", "areas", 3, KERNEL,
        "own[i] = list[at];\n    }\n    __syncthreads();",
        "own[i] = list[at];\n    }",
        areas,
    ),
    Fault(
        "ties to the greater index", "areas", 3, KERNEL,
        "flat < other.flat)",
        "flat > other.flat)",
        areas,
    ),
    Fault(
        "off by one: the window's last row", "areas", 3, KERNEL,
        "below = at.y + reach + 1",
        "below = at.y + reach",
        areas,
    ),
    Fault(
        "a bound that is too high", "areas", 3, KERNEL,
        "if (bound.beats(bests[warp])) bound",
        "if (bests[warp].beats(bound)) bound",
        areas,
    ),
    Fault(
        "a barrier that not all threads reach", "areas", 3, KERNEL,
        "    if (threadIdx.x >= 32) return;\n    Peak<A> last",
        "    if (threadIdx.x >= 32) return;\n    __syncthreads();\n    Peak<A> last",
        areas,
    ),
    Fault(
        "skipped tail: words past a four", "draw", 1, KERNEL,
        "|| first + i >= args.count",
        "",
        draws,
    ),
    Fault(
        "off by one: the first block of words", "draw", 1, KERNEL,
        "block - 1) * 4",
        "block) * 4",
        draws,
    ),
]
# fmt: on
