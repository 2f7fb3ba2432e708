"""Every operator on a GPU: `pytest -m gpu tests/cuda/test_gpu_*.py`, for a checkout or a wheel.

Values and gradients are compared with the CPU's kernels (device_cases.py) and with sokd.reference
in float64 on the same device; noise, draws and areas must be equal. SOKD_TEST_DEVICE=cpu runs these
tests on the CPU, where there is no GPU.
"""

import math
from typing import Any

import pytest
import torch
from support.cases import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    DType,
    Shape,
    everything,
    laid_out,
    neutral_plan,
    same_bits,
)
from support.cuda import device_cases
from support.cuda.device_cases import (
    TorchDevice,
    everything_on,
    heads,
    loss_and_gradient,
    moved,
    refine_and_gradients,
)
from torch import Tensor

import sokd
from sokd import ops, reference
from sokd.ops.runtime import has_kernel

DEVICE = device_cases.chosen_device()
pytestmark = pytest.mark.gpu

ALIGNED = (2, 16, 8, 8)  # vectors alone
LARGE = (2, 96, 17, 19)  # many blocks, no vector fits
WIDE = (2, 128, 16, 16)  # many blocks of vectors
EVERYWHERE = [
    (shape, layout, dtype)
    for shape in [*SHAPES, ALIGNED, LARGE, WIDE]
    for layout in LAYOUTS
    for dtype in DTYPES
]
everywhere = pytest.mark.parametrize("shape, layout, dtype", EVERYWHERE)

# rtol, atol against float64. The noise is float32, whatever the map is; half precision rounds once.
CLOSE = {
    torch.float64: (1e-10, 2e-6),
    torch.float32: (1e-5, 1e-5),
    torch.float16: (2.0**-10, 1e-5),
    torch.bfloat16: (2.0**-7, 1e-5),
}


@pytest.fixture(scope="module")
def device() -> TorchDevice:
    """A device with kernels: the tests below would pass on the reference path, too."""
    assert has_kernel(torch.empty(0, device=DEVICE.device)), sokd.ops.config.why_no_cuda()
    return DEVICE


def near(found: Tensor, exact: Tensor, *, scale: float = 1.0, times: float = 1.0) -> None:
    """Compares within the rounding of the dtype; `scale` is the size of a long sum's terms."""
    rtol, atol = CLOSE[found.dtype]
    found, exact = found.double() / scale, exact.double() / scale
    torch.testing.assert_close(found, exact, rtol=times * rtol, atol=times * atol)


def plan_dtype(dtype: DType) -> DType:
    return torch.float64 if dtype == torch.float64 else torch.float32


def groups_of(shape: Shape) -> list[int]:
    return [1, shape[0]] if shape[0] > 1 else [1]


def has_cells(shape: Shape) -> bool:
    return 0 not in shape[1:]


# --- refine and refine_dots
@everywhere
def test_refine(shape: Shape, layout: str, dtype: DType, device: TorchDevice) -> None:
    """The value and all four gradients."""
    for groups in groups_of(shape):
        device_cases.refine(device, shape, layout, dtype, groups)
        features, upstream = (device.on(laid_out(shape, layout, dtype)) for _ in range(2))
        plan = moved(device, everything(shape, groups, plan_dtype(dtype)))
        straight = torch.zeros(groups, dtype=plan_dtype(dtype), device=device.device)
        found = refine_and_gradients(ops.refine, features, plan, straight, upstream)
        exact = refine_and_gradients(
            reference.refine, features.double(), plan, straight.double(), upstream.double()
        )
        assert found[0].dtype == found[1].dtype == dtype and found[0].device == device.device
        for one, two in zip(found[:2], exact[:2], strict=True):
            near(one, two)
        for one, two in zip(found[2:], exact[2:], strict=True):
            largest = float(two.abs().max()) if two.numel() else 0.0
            near(one, two, scale=max(largest, 1.0), times=20)


@everywhere
def test_refine_dots(shape: Shape, layout: str, dtype: DType, device: TorchDevice) -> None:
    device_cases.refine_dots(device, shape, layout, dtype, 5)
    device_cases.refine_dots(device, shape, layout, dtype, 5, by_sample=True)
    features, upstream = (device.on(laid_out(shape, layout, dtype)) for _ in range(2))
    each = [everything(shape, shape[0], torch.float32) for _ in range(3)]
    stacked = {name: device.on(torch.stack([p[name] for p in each])) for name in each[0]}
    stacked["seed"] = 8
    found = ops.refine_dots(features, upstream, stacked)
    exact = reference.refine_dots(features.double(), upstream.double(), stacked)
    assert found.shape == (3,) and found.dtype == plan_dtype(dtype)
    near(found, exact, scale=math.sqrt(max(features.numel(), 1)), times=5)
    found = ops.refine_dots(features, upstream, stacked, by_sample=True)
    exact = reference.refine_dots(features.double(), upstream.double(), stacked, by_sample=True)
    assert found.shape == (2, 3, shape[0]) and found.dtype == plan_dtype(dtype)
    near(found, exact, scale=max(features[:1].numel(), 1), times=5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_neutral_values_copy_bit_for_bit(dtype: DType, layout: str, device: TorchDevice) -> None:
    features = laid_out((2, 3, 6, 5), layout, dtype)
    if layout != "expanded":
        features[0, 0, 0, :3] = torch.tensor([math.nan, -0.0, math.inf])
    neutral, there = moved(device, neutral_plan()), device.on(features)
    for plan in [{}, neutral, *({name: part} for name, part in neutral.items())]:
        assert same_bits(device.back(ops.refine(there, **plan, seed=1)), features)


@pytest.mark.parametrize("shape", [(2, 5, 7, 9), ALIGNED, LARGE])
@pytest.mark.parametrize(
    "seed", [0, -5, 2**63 + 1, torch.tensor([77])], ids=["0", "-5", "2^63+1", "tensor"]
)
def test_the_noise_is_the_cpus(shape: Shape, seed: Any, device: TorchDevice) -> None:
    there = device.on(seed) if isinstance(seed, Tensor) else seed
    features, sigma = torch.zeros(shape), torch.ones(1)
    found = device.back(ops.refine(device.on(features), sigma=device.on(sigma), seed=there))
    expected = ops.refine(features, sigma=sigma, seed=seed)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 6, 9, 7), ALIGNED, LARGE])
def test_the_noise_has_the_same_bits_everywhere(shape: Shape, device: TorchDevice) -> None:
    def noise(features: Tensor, groups: int) -> Tensor:
        sigma = torch.ones(groups, device=device.device)
        return ops.refine(device.on(features * 0), sigma=sigma, seed=3)

    expected = noise(torch.zeros(shape), 1)
    for layout in LAYOUTS:
        assert torch.equal(noise(laid_out(shape, layout, torch.float32), shape[0]), expected)
    for dtype in DTYPES:
        for layout in ("contiguous", "channels_last"):
            assert torch.equal(noise(laid_out(shape, layout, dtype), 1), expected.to(dtype))


# --- areas
@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize(
    "shape, layout, dtype", [case for case in EVERYWHERE if has_cells(case[0])]
)
def test_areas(shape: Shape, layout: str, dtype: DType, teacher: bool, device: TorchDevice) -> None:
    """Scores, boxes and coverage: exactly, ties included."""
    cells = math.prod(shape[1:])
    for k in {1, min(8, cells), min(100, cells)}:
        device_cases.areas(device, shape, layout, dtype, k, teacher=teacher)
    own, other = (list(map(device.on, heads(shape, layout, dtype))) for _ in range(2))
    for maps in (own, other):
        maps[0] = (maps[0] * 6).round() / 6  # many are equal
    options: dict[str, Any] = {"k": min(8, cells), "teacher": tuple(other) if teacher else None}
    for kernel in (1, 3, 5):
        found, exact = (path.areas(*own, kernel=kernel, **options) for path in (ops, reference))
        for name, one, two in zip(found._fields, found, exact, strict=True):
            assert one.dtype == two.dtype and torch.equal(one, two), name


# --- masked_mse
@pytest.mark.parametrize("normalise", ["elements", "area"])
@everywhere
def test_masked_mse(
    shape: Shape, layout: str, dtype: DType, normalise: str, device: TorchDevice
) -> None:
    """The loss and the student's gradient; the upstream gradient scales the latter to about one."""
    batch, _, height, width = shape
    strided = torch.rand(batch, 1, width, height).to(dtype).mT
    for weight in (None, torch.randint(0, 3, (batch, height, width)).float(), strided):
        device_cases.masked_mse(device, shape, layout, dtype, weight, normalise)
        student, teacher = (device.on(laid_out(shape, layout, dtype)) for _ in range(2))
        there = None if weight is None else device.on(weight)
        upstream, options = float(student.numel()), {"normalise": normalise}
        loss, d_student = loss_and_gradient(
            ops.masked_mse, upstream, student, teacher, there, **options
        )
        wide = [None if part is None else part.double() for part in (student, teacher, there)]
        exact = loss_and_gradient(reference.masked_mse, upstream, *wide, **options)
        assert loss.shape == () and loss.dtype == plan_dtype(dtype) and d_student.dtype == dtype
        near(loss, exact[0])
        # the gradient is rounded before and after the upstream's factor
        near(d_student, exact[1], times=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_mse_of_two_layouts(dtype: DType, device: TorchDevice) -> None:
    for student, teacher in (
        ("contiguous", "channels_last"),
        ("channels_last", "sliced"),
        ("offset", "expanded"),
    ):
        maps = [device.on(laid_out((2, 18, 7, 8), layout, dtype)) for layout in (student, teacher)]
        loss, d_student = loss_and_gradient(ops.masked_mse, 2016.0, *maps)
        exact = loss_and_gradient(reference.masked_mse, 2016.0, *(part.double() for part in maps))
        near(loss, exact[0])
        near(d_student, exact[1], times=2)


# --- draw, and what holds for all
@pytest.mark.parametrize("n", [0, 1, 3, 4, 9, 5000])
def test_draw(n: int, device: TorchDevice) -> None:
    """The same bits as the CPU's."""
    device_cases.draw(device, n)
    for seed, counter in ((0, 0), (-3, 2**40), (2**62, -1)):
        words = torch.tensor([seed]), torch.tensor([counter])
        found = ops.draw(*map(device.on, words), n)
        for one, two in zip(found, reference.draw(*words, n), strict=True):
            assert torch.equal(device.back(one), two)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), LARGE])
def test_same_bits_on_every_run(
    shape: Shape, dtype: DType, layout: str, device: TorchDevice
) -> None:
    run = everything_on(device, shape, dtype, layout)
    first = run()
    assert all(each.isfinite().all() for each in first)
    for _ in range(3):
        assert all(torch.equal(one, two) for one, two in zip(first, run(), strict=True))


def test_gradcheck(device: TorchDevice) -> None:
    shape = (2, 3, 4, 5)
    for groups, layout in ((1, "contiguous"), (2, "channels_last")):
        plan = moved(device, everything(shape, groups))
        theta, sigma = plan.pop("theta").requires_grad_(), plan.pop("sigma").requires_grad_()
        features, other = (device.on(laid_out(shape, layout, torch.float64)) for _ in range(2))
        weight = torch.rand(2, 4, 5, dtype=torch.float64, device=device.device)
        features.requires_grad_()

        def refine(
            features: Tensor, theta: Tensor, sigma: Tensor, plan: dict[str, Any] = plan
        ) -> Tensor:
            return ops.refine(features, theta, sigma=sigma, **plan)

        def loss(features: Tensor, other: Tensor = other, weight: Tensor = weight) -> Tensor:
            return ops.masked_mse(features, other, weight, normalise="area")

        assert torch.autograd.gradcheck(refine, (features, theta, sigma))
        assert torch.autograd.gradcheck(loss, (features,))
        # the second derivative is PyTorch's own, which adds in any order on a GPU
        assert torch.autograd.gradgradcheck(refine, (features, theta, sigma), nondet_tol=1e-9)
        assert torch.autograd.gradgradcheck(loss, (features,), nondet_tol=1e-9)
