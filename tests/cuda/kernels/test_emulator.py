"""The CUDA kernels, run on the CPU thread by thread: every kernel, dtype, layout and odd sizes."""

import os
import subprocess
import sys

import pytest
import torch
from support.cases import DTYPES, LAYOUTS, DType, laid_out
from support.cuda.checks import (
    areas,
    check_areas,
    check_backward,
    check_dots,
    check_draw,
    check_forward,
    check_masked_mse,
    check_scale,
    heads,
    masked_mse,
    refine,
    refine_backward,
)
from support.cuda.emulator import COMPILER, build
from support.cuda.memory import MockMemory
from support.cuda.mock import SCHEDULES

from sokd import ops, reference

SHAPES = [  # batch, channels, height, width: each with its purpose
    (2, 3, 5, 7),  # odd sides: no vector fits
    (1, 1, 1, 1),  # a single cell
    (3, 2, 1, 9),  # a single row
    (2, 5, 9, 1),  # a single column
    (2, 16, 8, 8),  # vectors in both orders
    (1, 260, 4, 5),  # more channels than a block has, in both orders
    (1, 7, 17, 20),  # a tile and a rest in planes, an odd channel in lanes
    (0, 3, 4, 4),  # an empty batch
    (2, 0, 4, 4),  # no channels
    (2, 3, 0, 4),  # an empty map
]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@layouts
@dtypes
def test_masked_mse(dtype: DType, layout: str, cuda: MockMemory) -> None:
    for index, shape in enumerate(SHAPES):
        check_masked_mse(cuda, shape, dtype, layout, None, "elements")
        check_masked_mse(cuda, shape, dtype, layout, DTYPES[index % 4], "elements")
        check_masked_mse(cuda, shape, dtype, layout, torch.float32, "area")


@pytest.mark.parametrize("count", [0, 1, 7, 8, 1031, 9001])
@dtypes
def test_masked_mse_scale(dtype: DType, count: int, cuda: MockMemory) -> None:
    for odd in (False, True):
        check_scale(cuda, count, dtype, odd=odd)


@layouts
@dtypes
def test_refine_forward(dtype: DType, layout: str, cuda: MockMemory) -> None:
    for shape in SHAPES:
        check_forward(cuda, shape, dtype, layout, 1, "thspk")
        check_forward(cuda, shape, dtype, layout, shape[0], "thspk")
        check_forward(cuda, shape, dtype, layout, shape[0], "sp")
        for parts in ("ihs", "k", "th", ""):
            check_forward(cuda, shape, dtype, layout, 1, parts)


@layouts
@dtypes
def test_refine_backward(dtype: DType, layout: str, cuda: MockMemory) -> None:
    for shape in SHAPES:
        for groups, parts in (
            (1, "thspk"),
            (shape[0], "thspk"),
            (1, "ihsk"),
            (shape[0], "ts"),
            (1, "p"),
        ):
            check_backward(cuda, shape, dtype, layout, groups, parts)


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 16, 8, 8), (1, 260, 4, 5)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_channel_that_no_entry_of_perm_names_has_gradient_zero(
    layout: str, shape: tuple[int, ...], cuda: MockMemory
) -> None:
    """The CPU raises for a perm that is no permutation; here every channel must be written."""
    batch, channels = shape[:2]
    perm = torch.arange(channels).expand(batch, -1).clone()
    perm[:, 1], perm[-1, 0] = channels - 1, -5  # without 1, and without 0 in the last sample
    upstream = laid_out(shape, layout, torch.float32)
    found = refine_backward(cuda, upstream, upstream, perm=perm)["features"]
    times = (perm.unsqueeze(2) == torch.arange(channels)).sum(1)
    assert found[times == 0].eq(0).all() and found.isfinite().all()
    in_place = (times == 1) & (perm == torch.arange(channels))
    assert torch.equal(found[in_place], upstream[in_place])


@layouts
@dtypes
def test_refine_dots(dtype: DType, layout: str, cuda: MockMemory) -> None:
    for shape in SHAPES:
        check_dots(cuda, shape, dtype, layout, 1, 2)
    cuda.odd = False
    check_dots(cuda, (2, 5, 3, 4), dtype, layout, 2, 35)  # more plans than are written together


@layouts
@dtypes
def test_refine_dots_by_sample(dtype: torch.dtype, layout: str, cuda: MockMemory) -> None:
    for shape in SHAPES:
        check_dots(cuda, shape, dtype, layout, 1, 2, by_sample=True)
        check_dots(cuda, shape, dtype, layout, shape[0], 2, by_sample=True)
    cuda.odd = False
    check_dots(cuda, (2, 5, 3, 4), dtype, layout, 2, 35, by_sample=True)


@layouts
@dtypes
def test_areas(dtype: torch.dtype, layout: str, cuda: MockMemory) -> None:
    for shape in [shape for shape in SHAPES if 0 not in shape] + [(1, 40, 9, 16)]:
        cells = shape[1] * shape[2] * shape[3]
        for k, kernel, mutual, levels in (
            (8, 3, False, 0),
            (8, 3, True, 3),
            (1, 1, False, 2),
            (70, 5, True, 0),
            (3, 2**31 - 1, False, 4),
            (70, 1, False, 1),  # fewer cells above 0 than areas
        ):
            check_areas(cuda, shape, dtype, layout, min(k, cells), kernel, mutual, levels)


# around the end of a block, and several blocks
@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 1019, 1020, 1021, 3000])
def test_draw(n: int, cuda: MockMemory) -> None:
    check_draw(cuda, n)


either = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
IDENTITY = torch.eye(2, 3)[None]


@either
def test_noise_has_the_bits_of_the_cpu_kernel(layout: str, cuda: MockMemory) -> None:
    zeros, seed = laid_out((2, 12, 9, 8), layout, torch.float32) * 0, -(2**62) - 5
    noise = refine(cuda, zeros, sigma=torch.ones(1), seed=seed)
    assert torch.equal(noise, ops.refine(zeros, sigma=torch.ones(1), seed=seed))
    assert (noise - reference.normals(zeros.shape, seed)).abs().max() < 1e-6
    assert torch.equal(noise, refine(cuda, zeros, sigma=torch.ones(1), seed=torch.tensor([seed])))


@either
def test_no_order_of_threads_and_blocks_changes_a_bit(layout: str, cuda: MockMemory) -> None:
    shape, results = (2, 12, 9, 8), []
    torch.manual_seed(3)
    features, upstream = (laid_out(shape, layout, torch.float32) for _ in range(2))
    plan = {"theta": torch.eye(2, 3)[None] + 0.1 * torch.randn(1, 2, 3), "sigma": torch.ones(1)}
    maps = heads((1, 30, 9, 8), torch.float32, layout, 2)
    for schedule in SCHEDULES:
        cuda.driver.schedule(schedule)
        gradients = refine_backward(cuda, upstream, features, seed=1, **plan)
        loss = masked_mse(cuda, features, upstream)
        refined = refine(cuda, features, **plan)
        results.append([refined, *gradients.values(), *loss, *areas(cuda, *maps, k=9)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_an_identity_copies_bits_and_nan_stays_in_its_place(cuda: MockMemory) -> None:
    features = torch.randn(1, 8, 4, 8)
    features[0, 3, 2, 5] = torch.nan
    for maps in (features, features.to(memory_format=torch.channels_last)):
        refined = refine(cuda, maps, theta=IDENTITY)
        assert refined.isnan().sum() == 1
        assert torch.equal(refined.nan_to_num(7.0), maps.nan_to_num(7.0))
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    half = every.view(torch.float16).view(1, 64, 32, 32)
    refined = refine(cuda, half, theta=IDENTITY)
    assert torch.equal(refined.view(torch.int16), half.view(torch.int16))


def test_corners_outside_the_map_count_nothing_whatever_they_hold(cuda: MockMemory) -> None:
    features = torch.full((1, 4, 4, 4), torch.inf)
    features[:, :, 1:3, 1:3] = 1.0
    away = torch.tensor([[[1.0, 0.0, 4.0], [0.0, 1.0, 0.0]]])
    point = torch.zeros(1, 2, 3)  # between the ones
    for maps in (features, features.to(memory_format=torch.channels_last)):
        assert torch.equal(refine(cuda, maps, theta=away), torch.zeros_like(maps))
        assert torch.equal(refine(cuda, maps, theta=point), torch.ones_like(maps))


@either
@pytest.mark.parametrize("entry", [-1, 4, 2**40])
def test_a_perm_outside_the_channels_makes_nan_of_its_channel_alone(
    entry: int, layout: str, cuda: MockMemory
) -> None:
    features = laid_out((1, 4, 4, 4), layout, torch.float32)
    perm = torch.tensor([[2, 1, entry, 0]])
    refined = refine(cuda, features, perm=perm, sigma=torch.ones(1))
    assert refined[:, 2].isnan().all() and not refined[:, [0, 1, 3]].isnan().any()
    gradients = refine_backward(cuda, features, features, theta=IDENTITY, perm=perm)
    assert gradients["theta"].isnan().any()


@pytest.mark.parametrize("theta", [
    [[0, 0, 0], [0, 0, 0]], [[1, 1, 0], [1, 1, 0]], [[1e-7, 0, 0], [0, 1, 0]],
    [[3, 0, 0.2], [0, 0.1, 0]],
])  # fmt: skip
def test_the_adjoint_of_a_theta_without_inverse(theta: list[list[float]], cuda: MockMemory) -> None:
    features = torch.randn(1, 4, 6, 8, dtype=torch.float64)
    matrix = torch.tensor([theta], dtype=torch.float64)
    upstream, leaf = torch.randn_like(features), features.clone().requires_grad_()
    expected = torch.autograd.grad(ops.refine(leaf, matrix), leaf, upstream)[0]
    for maps in (upstream, upstream.to(memory_format=torch.channels_last)):
        actual = refine_backward(cuda, maps, features, theta=matrix)["features"]
        assert (actual - expected).abs().max() < 1e-12


def test_an_empty_area_has_no_difference_even_of_nan(cuda: MockMemory) -> None:
    student = torch.full((1, 4, 4, 4), torch.nan)
    loss, d_student = masked_mse(cuda, student, student, torch.zeros(1, 4, 4), "area")
    assert loss == 0 and torch.equal(d_student, torch.zeros_like(student))


def test_an_access_past_a_tensor_is_an_error(cuda: MockMemory) -> None:
    """The other tests rely on this error."""
    short = cuda.on(torch.randn(1, 4, 4, 4))
    shape, strides = (1, 5, 4, 4), (80, 16, 4, 1)
    longer = cuda.at(short.data_ptr(), 4 * 80, shape, strides, torch.float32, 0)
    with pytest.raises(RuntimeError, match="an access to memory that is not mapped"):
        ops.refine(longer)


SANITISED = """
from support.cuda.checks import *
from support.cuda.memory import cuda_memory

with cuda_memory() as cuda:
    cuda.driver.schedule("random")
    for layout in ("contiguous", "channels_last", "sliced"):
        for shape in ((2, 3, 5, 7), (1, 8, 4, 8)):
            check_forward(cuda, shape, torch.float32, layout, 1, "thspk")
            check_forward(cuda, shape, torch.float32, layout, 1, "hs")
            check_backward(cuda, shape, torch.float32, layout, 1, "thspk")
            check_dots(cuda, shape, torch.float32, layout, 1, 3)
            check_areas(cuda, shape, torch.float32, layout, 8, 3, True, 2)
            check_masked_mse(cuda, shape, torch.float32, layout, torch.float32, "area")
    check_scale(cuda, 1031, torch.float32)
print("clean")
"""


def test_the_address_sanitiser_finds_nothing() -> None:
    command = [COMPILER, "-print-file-name=libasan.so"]
    asan = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(asan):
        pytest.skip("the C++ compiler has no address sanitiser")
    flags = ("-fsanitize=address", "-g1", "-DSOKD_DTYPES=1")
    paths = [str(build(operator, flags=flags)) for operator in ("refine", "areas", "masked_mse")]
    environment = os.environ | {
        "LD_PRELOAD": asan,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:handle_segv=0",
        "SOKD_MOCK_EMULATORS": ":".join(paths),
    }
    script = "import support.cuda.in_child\n" + SANITISED
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "clean" in done.stdout, done.stderr[-3000:]
