"""Inputs that several test files share: plans for each operation, memory layouts, tolerances."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sokd import ops, reference

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "channels_last", "sliced", "expanded", "transposed", "offset"]

# torch.compile itself warns (deprecated calls inside PyTorch); not what these tests are about
compiles = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)

# the kernels and their twin in plain PyTorch
both = pytest.mark.parametrize("module", [ops, reference], ids=["kernel", "reference"])

SHAPES = [  # batch, channels, height, width: and what each is for
    (2, 3, 5, 7),  # odd sides, no vector fits
    (1, 1, 1, 1),  # a single cell: W/H terms, neighbours all outside
    (3, 2, 1, 9),  # a single row: no lower neighbour
    (2, 5, 9, 1),  # a single column
    (2, 17, 8, 8),  # a vector of channels and a rest
    (1, 4, 33, 18),  # a vector of columns and a rest
    (0, 3, 4, 4),  # an empty batch
    (2, 0, 4, 4),  # no channels
    (2, 3, 0, 4),  # an empty map
]


def skip_without_fake_cuda() -> None:
    """Skip a test of fake CUDA tensors where an older torch opens the CUDA driver to slice one."""
    with FakeTensorMode():
        try:
            torch.zeros(2, device="cuda")[:1]
        except RuntimeError:
            pytest.skip("this torch needs a CUDA driver to slice a fake CUDA tensor")


def laid_out(shape: tuple[int, ...], layout: str, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """A random map of this logical shape in one of LAYOUTS."""
    batch, channels, height, width = shape

    def rand(*sizes: int) -> Tensor:
        return (torch.randn(sizes, dtype=torch.float64) * scale).to(dtype)

    if layout == "channels_last":
        return rand(*shape).to(memory_format=torch.channels_last)
    if layout == "sliced":
        return rand(batch, channels + 2, height + 1, 2 * width)[:, 1 : channels + 1, :height, ::2]
    if layout == "expanded":
        return rand(batch, 1, height, width).expand(shape)
    if layout == "transposed":
        return rand(batch, channels, width, height).transpose(2, 3)
    if layout == "offset":  # not aligned to a vector
        return rand(batch * channels * height * width + 1)[1:].view(shape)
    return rand(*shape)


def operation(index: int, shape: tuple[int, ...], m: float) -> dict[str, Any]:
    """The plan of one operation of the policy, alone, at magnitude m; G = 1, float64."""
    _, channels, height, width = shape
    low, high = (
        [(-0.3, 0.3), (-0.3, 0.3), (-0.9, 0.9), (-0.9, 0.9), (-30, 30)][index]
        if index < 5
        else (0, 1)
    )
    v = low + m * (high - low)
    cos, sin = math.cos(math.radians(v)), math.sin(math.radians(v))
    thetas = [
        [[1, v, 0], [0, 1, 0]],
        [[1, 0, 0], [v, 1, 0]],
        [[1, 0, v], [0, 1, 0]],
        [[1, 0, 0], [0, 1, v]],
        [[cos, sin * height / max(width, 1), 0], [-sin * width / max(height, 1), cos, 0]],
    ]
    if index < 5:
        return {"theta": torch.tensor([thetas[index]], dtype=torch.float64)}
    if index == 5:
        return {"hole": torch.tensor([[height // 3, width // 4, height // 3 + 2, width // 4 + 2]])}
    if index == 6:
        return {"sigma": torch.tensor([0.1 * m], dtype=torch.float64)}
    if index == 7:
        return {"perm": torch.randperm(channels).unsqueeze(0)}
    return {"keep": torch.rand(1, channels) < 0.7}


def pair(first: int, second: int, shape: tuple[int, ...]) -> dict[str, Any]:
    """The plan of a pair of operations; two affine ones compose, the first applied first."""
    one, two = operation(first, shape, 0.8), operation(second, shape, 0.3)
    if "theta" in one and "theta" in two:
        last = torch.tensor([[[0, 0, 1]]], dtype=torch.float64)
        square = [torch.cat((part["theta"], last), 1) for part in (one, two)]
        return {"theta": (square[0] @ square[1])[:, :2]}
    return one | two


def everything(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """All five parts, active and different for each group."""
    _, channels, height, width = shape
    theta = torch.eye(2, 3, dtype=torch.float64) + 0.2 * torch.randn(
        groups, 2, 3, dtype=torch.float64
    )
    y0, x0 = torch.randint(0, height + 1, (groups,)), torch.randint(0, width + 1, (groups,))
    return {
        "theta": theta.to(dtype),
        "hole": torch.stack((y0, x0, y0 + 2, x0 + 3), 1),
        "sigma": torch.rand(groups, dtype=torch.float64).to(dtype),
        "perm": torch.stack([torch.randperm(channels) for _ in range(groups)])
        if groups
        else torch.zeros(0, channels).long(),
        "keep": torch.rand(groups, channels) < 0.7,
    }


def same_bits(one: Tensor, two: Tensor) -> bool:
    """Equal including the sign of zero and NaN."""
    return (
        one.shape == two.shape
        and one.dtype == two.dtype
        and one.tolist().__repr__() == two.tolist().__repr__()
    )
