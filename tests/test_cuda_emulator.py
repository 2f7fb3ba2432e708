"""The CUDA kernels' own source, run on the CPU thread by thread: every kernel, dtype, layout and odd size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emulated import COMPILER, SCHEDULES, EmulatorError, Grid, build, library
from emulated_areas import areas
from emulated_checks import (
    check_areas,
    check_backward,
    check_dots,
    check_draw,
    check_forward,
    check_masked_mse,
    check_scale,
    heads,
)
from emulated_mse import masked_mse
from emulated_refine import refine, refine_backward
from support.cases import DTYPES, LAYOUTS, laid_out

from sokd import ops, reference

SHAPES = [  # batch, channels, height, width: and what each is for
    (2, 3, 5, 7),  # odd sides: no vector fits
    (1, 1, 1, 1),  # a single cell
    (3, 2, 1, 9),  # a single row
    (2, 16, 8, 8),  # vectors in both orders
    (1, 260, 4, 5),  # more channels than a block has, in both orders
    (1, 7, 17, 20),  # a tile and a rest in planes, an odd channel in lanes
    (0, 3, 4, 4),  # an empty batch
    (2, 3, 0, 4),  # an empty map
]
dtypes = pytest.mark.parametrize(
    "dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch.")
)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@layouts
@dtypes
def test_masked_mse(dtype: torch.dtype, layout: str) -> None:
    for index, shape in enumerate(SHAPES):
        align = 16 if layout != "offset" else dtype.itemsize
        check_masked_mse(shape, dtype, layout, None, "elements", align=align)
        check_masked_mse(shape, dtype, layout, DTYPES[index % 4], "elements", align=align)
        check_masked_mse(shape, dtype, layout, torch.float32, "area", align=align)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 1031, 9001])
@dtypes
def test_masked_mse_scale(dtype: torch.dtype, count: int) -> None:
    for align in (16, dtype.itemsize):
        check_scale(count, dtype, align=align)


@layouts
@dtypes
def test_refine_forward(dtype: torch.dtype, layout: str) -> None:
    for shape in SHAPES:
        align = 16 if layout != "offset" else dtype.itemsize
        for groups, parts in (
            (1, "thspk"),
            (shape[0], "thspk"),
            (1, "ihs"),
            (1, "k"),
            (shape[0], "sp"),
            (1, "th"),
            (1, ""),
        ):
            check_forward(shape, dtype, layout, groups, parts, align=align)


@layouts
@dtypes
def test_refine_backward(dtype: torch.dtype, layout: str) -> None:
    for shape in SHAPES:
        align = 16 if layout != "offset" else dtype.itemsize
        for groups, parts in (
            (1, "thspk"),
            (shape[0], "thspk"),
            (1, "ihsk"),
            (shape[0], "ts"),
            (1, "p"),
        ):
            check_backward(shape, dtype, layout, groups, parts, align=align)


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 16, 8, 8), (1, 260, 4, 5)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_channel_that_no_entry_of_perm_names_has_gradient_zero(
    layout: str, shape: tuple[int, ...]
) -> None:
    """A perm that is no permutation is refused on the CPU; here nothing may be left as it was."""
    batch, channels = shape[:2]
    perm = torch.arange(channels).expand(batch, -1).clone()
    perm[:, 1], perm[-1, 0] = channels - 1, -5  # nobody names 1, nor 0 in the last sample
    upstream = laid_out(shape, layout, torch.float32)
    found = refine_backward(upstream, upstream, wants_features=True, perm=perm)["features"]
    times = (perm.unsqueeze(2) == torch.arange(channels)).sum(1)
    assert found[times == 0].eq(0).all() and found.isfinite().all()
    in_place = (times == 1) & (perm == torch.arange(channels))
    assert torch.equal(found[in_place], upstream[in_place])


@layouts
@dtypes
def test_refine_dots(dtype: torch.dtype, layout: str) -> None:
    for shape in SHAPES:
        align = 16 if layout != "offset" else dtype.itemsize
        check_dots(shape, dtype, layout, 1, 2, align=align)
    check_dots((2, 5, 3, 4), dtype, layout, 2, 35, align=16)  # more plans than are written together


@layouts
@dtypes
def test_areas(dtype: torch.dtype, layout: str) -> None:
    for shape in [shape for shape in SHAPES if 0 not in shape] + [(1, 40, 9, 16)]:
        align = 16 if layout != "offset" else dtype.itemsize
        cells = shape[1] * shape[2] * shape[3]
        for k, kernel, mutual, levels in (
            (8, 3, False, 0),
            (8, 3, True, 3),
            (1, 1, False, 2),
            (70, 5, True, 0),
            (3, 2**31 - 1, False, 4),
        ):
            check_areas(shape, dtype, layout, min(k, cells), kernel, mutual, levels, align=align)


@pytest.mark.parametrize(
    "n", [0, 1, 3, 4, 5, 1019, 1020, 1021, 3000]
)  # about a block's end, and several
def test_draw(n: int) -> None:
    check_draw(n)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_noise_has_the_bits_of_the_cpu_kernel(layout: str) -> None:
    zeros = laid_out((2, 12, 9, 8), layout, torch.float32) * 0
    noise = refine(zeros, sigma=torch.ones(1), seed=-(2**62) - 5)
    assert torch.equal(noise, ops.refine(zeros, sigma=torch.ones(1), seed=-(2**62) - 5))
    assert (noise - reference.normals(zeros.shape, -(2**62) - 5)).abs().max() < 1e-6
    assert torch.equal(noise, refine(zeros, sigma=torch.ones(1), seed=torch.tensor([-(2**62) - 5])))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_no_order_of_threads_and_blocks_changes_a_bit(layout: str) -> None:
    shape, results = (2, 12, 9, 8), []
    torch.manual_seed(3)
    features, upstream = (
        laid_out(shape, layout, torch.float32),
        laid_out(shape, layout, torch.float32),
    )
    theta, sigma = torch.eye(2, 3)[None] + 0.1 * torch.randn(1, 2, 3), torch.ones(1)
    maps = heads((1, 30, 9, 8), torch.float32, layout, 2)
    try:
        for schedule in SCHEDULES:
            for operator in ("refine", "areas", "masked_mse"):
                library(operator).schedule = schedule
            gradients = refine_backward(
                upstream, features, theta, sigma, wants_features=True, seed=1
            )
            loss, d_student = masked_mse(features, upstream)
            results.append(
                [
                    refine(features, theta, sigma=sigma),
                    *gradients.values(),
                    loss,
                    d_student,
                    *areas(*maps, k=9),
                ]
            )
    finally:
        for operator in ("refine", "areas", "masked_mse"):
            library(operator).schedule = "random"
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_an_identity_copies_bits_and_nan_stays_where_it_is() -> None:
    features = torch.randn(1, 8, 4, 8)
    features[0, 3, 2, 5] = torch.nan
    identity = torch.eye(2, 3)[None]
    for maps in (features, features.to(memory_format=torch.channels_last)):
        assert refine(maps, identity).isnan().sum() == 1
        assert torch.equal(refine(maps, identity).nan_to_num(7.0), maps.nan_to_num(7.0))
    half = (
        torch.arange(-(2**15), 2**15, dtype=torch.int32)
        .to(torch.int16)
        .view(torch.float16)
        .view(1, 64, 32, 32)
    )
    assert torch.equal(refine(half, identity).view(torch.int16), half.view(torch.int16))


def test_corners_outside_count_nothing_whatever_lies_there() -> None:
    features = torch.full((1, 4, 4, 4), torch.inf)
    features[:, :, 1:3, 1:3] = 1.0
    away = torch.tensor([[[1.0, 0.0, 4.0], [0.0, 1.0, 0.0]]])
    for maps in (features, features.to(memory_format=torch.channels_last)):
        assert torch.equal(refine(maps, away), torch.zeros_like(maps))
        assert torch.equal(
            refine(maps, torch.zeros(1, 2, 3)), torch.ones_like(maps)
        )  # one point, between the ones


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("entry", [-1, 4, 2**40])
def test_a_perm_outside_the_channels_makes_nan_of_its_channel_alone(
    entry: int, layout: str
) -> None:
    features = laid_out((1, 4, 4, 4), layout, torch.float32)
    perm = torch.tensor([[2, 1, entry, 0]])
    refined = refine(features, perm=perm, sigma=torch.ones(1))
    assert refined[:, 2].isnan().all() and not refined[:, [0, 1, 3]].isnan().any()
    assert (
        refine_backward(features, features, torch.eye(2, 3)[None], perm=perm)["theta"].isnan().any()
    )


@pytest.mark.parametrize(
    "theta",
    [
        [[0, 0, 0], [0, 0, 0]],
        [[1, 1, 0], [1, 1, 0]],
        [[1e-7, 0, 0], [0, 1, 0]],
        [[3, 0, 0.2], [0, 0.1, 0]],
    ],
)
def test_the_adjoint_of_a_theta_without_a_good_inverse(theta: list[list[float]]) -> None:
    features, matrix = (
        torch.randn(1, 4, 6, 8, dtype=torch.float64),
        torch.tensor([theta], dtype=torch.float64),
    )
    upstream, leaf = torch.randn_like(features), features.clone().requires_grad_()
    expected = torch.autograd.grad(ops.refine(leaf, matrix), leaf, upstream)[0]
    for maps in (upstream, upstream.to(memory_format=torch.channels_last)):
        actual = refine_backward(maps, features, matrix, wants_features=True)["features"]
        assert (actual - expected).abs().max() < 1e-12


def test_an_area_of_nothing_has_no_difference_even_of_nan() -> None:
    student = torch.full((1, 4, 4, 4), torch.nan)
    loss, d_student = masked_mse(student, student, torch.zeros(1, 4, 4), normalise="area")
    assert loss == 0 and d_student is not None and torch.equal(d_student, torch.zeros_like(student))


def test_a_structure_of_another_size_is_refused() -> None:
    with pytest.raises(EmulatorError, match=r"masked_mse_finish takes \d+ bytes, got 72"):
        library("masked_mse").launch("masked_mse_finish", 1, Grid())


SANITISED = """
import sys; sys.path.insert(0, {tests!r})
import torch
from emulated import Library, SCHEDULES
from emulated_checks import *
refine_kernels, areas_kernels, mse_kernels = (Library({paths!r}[i]) for i in range(3))
for layout in ("contiguous", "channels_last", "sliced"):
    for shape in ((2, 3, 5, 7), (1, 8, 4, 8)):
        check_forward(shape, torch.float32, layout, 1, "thspk", refine_kernels)
        check_forward(shape, torch.float32, layout, 1, "hs", refine_kernels)
        check_backward(shape, torch.float32, layout, 1, "thspk", refine_kernels)
        check_dots(shape, torch.float32, layout, 1, 3, refine_kernels)
        check_areas(shape, torch.float32, layout, 8, 3, True, 2, areas_kernels)
        check_masked_mse(shape, torch.float32, layout, torch.float32, "area", mse_kernels)
check_scale(1031, torch.float32, mse_kernels)
print("clean")
"""


def test_the_address_sanitiser_finds_nothing() -> None:
    asan = subprocess.run(
        [COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True
    ).stdout.strip()
    if not os.path.isabs(asan):
        pytest.skip("the C++ compiler has no address sanitiser")
    flags = ("-fsanitize=address", "-g1", "-DSOKD_DTYPES=1")
    paths = [str(build(operator, flags=flags)) for operator in ("refine", "areas", "masked_mse")]
    script = SANITISED.format(tests=str(Path(__file__).parent), paths=paths)
    environment = os.environ | {
        "LD_PRELOAD": asan,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:handle_segv=0",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0 and "clean" in done.stdout, done.stderr[-3000:]
