"""Faults to seed into the kernels' source, each with the check that must catch it."""

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
    check: Callable[[MockMemory], None]
    text: str
    other: str


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
TOTALS = "__syncthreads(); if ((int)threadIdx.x > slot)"  # of refine_dots, not of the squares
FAULTS = [
    Fault("missing barrier: sums of the warps", "masked_mse", 3, COMMON, mse,
          "room[threadIdx.x / 32] = of_warp;\n    __syncthreads();",
          "room[threadIdx.x / 32] = of_warp;"),
    Fault("skipped tail: last position", "masked_mse", 3, COMMON, mse,
          "(unsigned)(all - first < grid.positions_per_block ? all :",
          "(unsigned)(all - first < grid.positions_per_block ? all - 1 :"),
    Fault("skipped tail: channels past a step", "masked_mse", 3, KERNEL, mse_wide,
          "c < tile.channels; c += STEPS * rows)",
          "c + (STEPS - 1) * rows < tile.channels; c += STEPS * rows)"),
    Fault("wrong stride: the teacher has the student's", "masked_mse", 3, KERNEL, mse,
          "to_acc(teacher[c * args.teacher.c]), weight", "to_acc(teacher[c]), weight"),
    Fault("wrong stride: blocks of the weights' sum overlap", "masked_mse", 3, KERNEL, mse,
          "i < all; i += args.area_blocks * THREADS",
          "i < all; i += args.area_blocks * THREADS / 2"),
    Fault("off by one: a run past the channels", "masked_mse", 3, KERNEL, mse_lanes,
          "if (spot.channel >= tile.channels) return 0;",
          "if (spot.channel > tile.channels) return 0;"),
    Fault("skipped tail: elements past the last vector", "masked_mse", 4, KERNEL, scale,
          "long long i = runs * E + first; i < args.count",
          "long long i = runs * E + first; i < runs * E"),
    Fault("wrong stride: runs left out between two steps", "masked_mse", 4, KERNEL, scale,
          "i < runs; i += STEPS * step", "i < runs; i += (STEPS + 1) * step"),
    Fault("a factor of one that is not tested for", "masked_mse", 4, KERNEL, scale,
          "if (factor == Acc<T>(1)) return;", ""),
    Fault("missing barrier: the table of corners", "refine", 1, SAMPLING, forward_lanes,
          "return !__syncthreads_or(!wide", "return !(!wide"),
    Fault("missing barrier: the plan", "refine", 1, SAMPLING, forward,
          "return __syncthreads_or(moves);", "return moves || plan.theta.pointer;"),
    Fault("off by one: a corner right of the map", "refine", 1, SAMPLING, forward,
          "near && corners.x + 1 < grid.width", "near && corners.x + 1 <= grid.width"),
    Fault("off by one: the hole's last row", "refine", 1, SAMPLING, forward,
          "y < plan.hole[2]", "y <= plan.hole[2]"),
    Fault("wrong stride: rows stepped by columns", "refine", 1, SAMPLING, forward,
          "(long long)(at.y + (corner >> 1)) * map.y", "(long long)(at.y + (corner >> 1)) * map.x"),
    Fault("wrong channel: not permuted", "refine", 1, KERNEL, copy,
          "features + source * args.features.c)", "features + c * args.features.c)"),
    Fault("a round too few", "refine", 1, "philox.cuh", noise, "round < 10", "round < 9"),
    Fault("wrong exchange of the noise", "refine", 1, SAMPLING, noise,
          "if (i & step) continue;", "if (i & step || i == 1) continue;"),
    Fault("wrong key of the noise: plane of another sample", "refine", 1, SAMPLING, forward,
          "(unsigned long long)(n * grid.channels + c)",
          "(unsigned long long)(n * grid.height + c)"),
    Fault("missing barrier: the sums of a block", "refine", 14, BACKWARD, backward,
          "threadIdx.x % 32 / 4] = sum;\n    __syncthreads();", "threadIdx.x % 32 / 4] = sum;"),
    Fault("half a warp's sums lost", "refine", 14, COMMON, backward,
          "for (int count = 4, step = 16;", "for (int count = 4, step = 8;"),
    Fault("wrong group: all samples' blocks", "refine", 14, KERNEL, backward,
          "(all ? 0 : g * each)", "0"),
    Fault("wrong slope", "refine", 14, BACKWARD, backward_lanes,
          "fused(1 - at.right, c - a,", "fused(at.right, c - a,"),
    Fault("adjoint: last column of the box skipped", "refine", 14, ADJOINT, backward,
          "(int)x1 + 1, y0", "(int)x1, y0"),
    Fault("adjoint: dropped channels not cleared", "refine", 14, ADJOINT, backward,
          "if (source != INVALID) from_acc(sums[i],", "if (source >= 0) from_acc(sums[i],"),
    Fault("adjoint: unnamed channels not cleared", "refine", 14, ADJOINT, check_unnamed_channels,
          "if (!__syncthreads_or(!named[threadIdx.x])) return;", "return;"),
    Fault("adjoint: entries past a block skipped", "refine", 14, ADJOINT, check_unnamed_channels,
          "c < (int)args.grid.channels; c += THREADS) {",
          "c < THREADS && c < (int)args.grid.channels; c += THREADS) {"),
    Fault("one plan's buffer for two plans", "refine", 24, DOTS, dots,
          "const SamplePlan& plan = read[v & 1]; const bool moves = read_plan(read[v & 1], "
          "args.plan, args.grid, tile, v); A sum;",
          "const SamplePlan& plan = read[0]; const bool moves = read_plan(read[0], "
          "args.plan, args.grid, tile, v); A sum;"),
    Fault("skipped tail: the last plans", "refine", 24, DOTS, dots,
          f"if (slot + 1 < BATCH && v + 1 < args.plans) continue; {TOTALS}",
          f"if (slot + 1 < BATCH) continue;\n{TOTALS}"),
    Fault("missing barrier: plans written together", "refine", 24, DOTS, dots,
          f"v + 1 < args.plans) continue; {TOTALS}",
          "v + 1 < args.plans) continue;\nif ((int)threadIdx.x > slot)"),
    Fault("missing barrier: squares written together", "refine", 40, DOTS, squares,
          "v + 1 < args.plans) continue; __syncthreads(); if ((int)threadIdx.x >= 2",
          "v + 1 < args.plans) continue;\nif ((int)threadIdx.x >= 2"),
    Fault("missing barrier: squares' table of corners", "refine", 40, DOTS, squares_lanes,
          "fill_table(table, plan, args.grid, tile); __syncthreads();",
          "fill_table(table, plan, args.grid, tile);"),
    Fault("another sample's blocks", "refine", 40, KERNEL, squares,
          "rest * args.blocks + n * each,", "rest * args.blocks,"),
    Fault("missing barrier: the list is read while it is rewritten", "areas", 3, KERNEL, areas,
          "own[i] = list[at];\n    }\n    __syncthreads();", "own[i] = list[at];\n    }"),
    Fault("ties to the greater index", "areas", 3, KERNEL, areas,
          "flat < other.flat)", "flat > other.flat)"),
    Fault("off by one: the window's last row", "areas", 3, KERNEL, areas,
          "below = at.y + reach + 1", "below = at.y + reach"),
    Fault("a bound that is too high", "areas", 3, KERNEL, areas,
          "if (bound.beats(bests[warp])) bound", "if (bests[warp].beats(bound)) bound"),
    Fault("a barrier that not all threads reach", "areas", 3, KERNEL, areas,
          "    if (threadIdx.x >= 32) return;\n    Peak<A> last",
          "    if (threadIdx.x >= 32) return;\n    __syncthreads();\n    Peak<A> last"),
    Fault("skipped tail: words past a four", "draw", 1, KERNEL, draws,
          "|| first + i >= args.count", ""),
    Fault("off by one: the first block of words", "draw", 1, KERNEL, draws,
          "block - 1) * 4", "block) * 4"),
]
# fmt: on
