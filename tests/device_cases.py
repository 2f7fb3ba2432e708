"""Every operator on another device against the CPU's kernels.

A device is an object with `on(tensor)`: the same values and strides there, and `back(tensor)`: a CPU tensor.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from cases import everything, laid_out
from torch import Tensor

from sokd import ops

# of a value near one, in units of the dtype's own rounding; sums of products are allowed more
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class Device(Protocol):
    def on(self, tensor: Tensor) -> Tensor: ...

    def back(self, tensor: Tensor) -> Tensor: ...


def close(found: Tensor, expected: Tensor, *, times: float = 1.0, dtype: torch.dtype | None = None) -> None:
    """Within rounding, and in the same layout."""
    assert found.dtype == expected.dtype and found.stride() == expected.stride()
    tolerance = times * ROUNDING[dtype or expected.dtype]
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * max(largest, 1.0))


def moved(device: Device, parts: dict[str, Any]) -> dict[str, Any]:
    return {name: device.on(part) if isinstance(part, Tensor) else part for name, part in parts.items()}


def refine(device: Device, shape: tuple[int, ...], layout: str, dtype: torch.dtype, groups: int) -> None:
    """Value and all four gradients, with an upstream gradient of the same layout."""
    features, plan = laid_out(shape, layout, dtype), everything(shape, groups, torch.float32)
    straight = torch.zeros(groups)
    upstream = laid_out(shape, layout, dtype)

    def run(features: Tensor, plan: dict[str, Tensor], straight: Tensor, upstream: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (features, plan["theta"], plan["sigma"], straight)]
        parts = plan | {"theta": leaves[1], "sigma": leaves[2]}
        refined = ops.refine(leaves[0], **parts, seed=2**63 + 5, straight=leaves[3])
        return [refined.detach(), *torch.autograd.grad(refined, leaves, upstream)]

    expected = run(features, plan, straight, upstream)
    there = run(device.on(features), moved(device, plan), device.on(straight), device.on(upstream))
    found = [device.back(each) for each in there]
    for one, other in zip(found[:2], expected[:2], strict=True):
        close(one, other)
    for one, other in zip(found[2:], expected[2:], strict=True):
        close(one, other, times=20.0)


def noise(device: Device, shape: tuple[int, ...], seed: Tensor) -> None:
    """The same normals, bit for bit, from a seed that lies on the device."""
    features, sigma = torch.zeros(shape), torch.ones(1)
    expected = ops.refine(features, sigma=sigma, seed=seed)
    found = ops.refine(device.on(features), sigma=device.on(sigma), seed=device.on(seed))
    assert torch.equal(device.back(found), expected)


def refine_dots(device: Device, shape: tuple[int, ...], layout: str, dtype: torch.dtype, plans: int) -> None:
    features, upstream = laid_out(shape, layout, dtype), laid_out(shape, layout, dtype)
    each = [everything(shape, 1, torch.float32) for _ in range(plans)]
    stacked = {name: torch.stack([plan[name] for plan in each]) for name in each[0]}
    expected = ops.refine_dots(features, upstream, stacked)
    found = ops.refine_dots(device.on(features), device.on(upstream), moved(device, stacked))
    # sums of products of the size of 1, one for each element
    scale = max(features.numel(), 1) ** 0.5
    close(
        device.back(found) / scale, expected / scale, dtype=torch.float32 if dtype != torch.float64 else None
    )


def areas(
    device: Device, shape: tuple[int, ...], layout: str, dtype: torch.dtype, k: int, *, teacher: bool
) -> None:
    """Scores, boxes and coverage: exactly."""

    def heads() -> tuple[Tensor, ...]:
        pair = (shape[0], 2, *shape[2:])
        heat = laid_out(shape, layout, dtype).sigmoid()
        return heat, laid_out(pair, layout, dtype).abs() * 2, laid_out(pair, layout, dtype).sigmoid()

    own, other = heads(), heads() if teacher else None
    expected = ops.areas(*own, k=k, teacher=other)
    there = None if other is None else tuple(map(device.on, other))
    found = ops.areas(*map(device.on, own), k=k, teacher=there)
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(device.back(one), two)


def masked_mse(
    device: Device,
    shape: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
    weight: Tensor | None,
    normalise: str,
) -> None:
    """Loss and gradient; an upstream gradient other than one."""
    student, teacher = laid_out(shape, layout, dtype), laid_out(shape, layout, dtype)

    def run(student: Tensor, teacher: Tensor, weight: Tensor | None) -> list[Tensor]:
        student = student.detach().requires_grad_()
        loss = ops.masked_mse(student, teacher, weight, normalise=normalise)
        return [loss.detach(), torch.autograd.grad(loss * 3, student)[0]]

    expected = run(student, teacher, weight)
    found = run(device.on(student), device.on(teacher), None if weight is None else device.on(weight))
    close(device.back(found[0]), expected[0], dtype=None if dtype == torch.float64 else torch.float32)
    scale = max(student.numel(), 1)
    close(device.back(found[1]) * scale, expected[1] * scale)


def draw(device: Device, n: int) -> None:
    """The same bits."""
    seed, counter = torch.tensor([-(2**40) + 3]), torch.tensor([2**33 + 1])
    expected = ops.draw(seed, counter, n)
    found = ops.draw(device.on(seed), device.on(counter), n)
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(device.back(one), two)
