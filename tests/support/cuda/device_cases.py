"""Every operator on another device against the CPU's kernels.

A device is an object with two methods: `on(tensor)` copies a tensor there, with its strides;
`back(tensor)` copies it to the CPU.
"""

import os
from collections.abc import Callable
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor

import sokd
from sokd import ops
from support import kd_cases
from support.cases import DType, Shape, everything, laid_out

# of a value near one, in units of the dtype's own rounding; sums of products are allowed more
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class Device(Protocol):
    def on(self, tensor: Tensor) -> Tensor: ...

    def back(self, tensor: Tensor) -> Tensor: ...


class TorchDevice:
    """A device of PyTorch: copies keep values, strides and the offset in memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def on(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        count = tensor.untyped_storage().nbytes() // tensor.element_size()
        whole = tensor.as_strided((count,), (1,), 0)
        place = tensor.shape, tensor.stride(), tensor.storage_offset()
        return whole.to(self.device).as_strided(*place)

    def back(self, tensor: Tensor) -> Tensor:
        assert tensor.device == self.device, f"it is on {tensor.device}"
        here = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        return here.copy_(tensor)


def chosen_device() -> TorchDevice:
    """The device of SOKD_TEST_DEVICE, else the first CUDA device; skips the file without one."""
    device = torch.device(os.environ.get("SOKD_TEST_DEVICE", "cuda"))
    if device.type == "cuda" and not torch.cuda.is_available():
        why = "no CUDA device (SOKD_TEST_DEVICE=cpu runs what needs none)"
        pytest.skip(why, allow_module_level=True)
    return TorchDevice(torch.device("cuda", device.index or 0) if device.type == "cuda" else device)


def close(
    found: Tensor, expected: Tensor, *, times: float = 1.0, dtype: DType | None = None
) -> None:
    """Compares within rounding; the layout must be the same."""
    assert found.dtype == expected.dtype and found.stride() == expected.stride()
    tolerance = times * ROUNDING[dtype or expected.dtype]
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * max(largest, 1.0))


def moved(device: Device, parts: dict[str, Any]) -> dict[str, Any]:
    return {k: device.on(part) if isinstance(part, Tensor) else part for k, part in parts.items()}


def refine_and_gradients(
    refine: Callable[..., Tensor], features: Tensor, plan: dict[str, Any], straight: Tensor,
    upstream: Tensor,
) -> list[Tensor]:  # fmt: skip
    """The value, then the gradients of features, theta, sigma and straight."""
    tracked = features, plan["theta"], plan["sigma"], straight
    leaves = [each.detach().requires_grad_() for each in tracked]
    parts = plan | {"theta": leaves[1], "sigma": leaves[2]}
    refined = refine(leaves[0], **parts, seed=2**63 + 5, straight=leaves[3])
    return [refined.detach(), *torch.autograd.grad(refined, leaves, upstream)]


def loss_and_gradient(
    masked_mse: Callable[..., Tensor], upstream: float, student: Tensor, *rest: Any, **options: Any
) -> list[Tensor]:
    student = student.detach().requires_grad_()
    loss = masked_mse(student, *rest, **options)
    return [loss.detach(), torch.autograd.grad(loss * upstream, student)[0]]


def heads(shape: Shape, layout: str, dtype: DType) -> tuple[Tensor, ...]:
    """Heat, size and offset."""
    pair = (shape[0], 2, *shape[2:])
    heat = laid_out(shape, layout, dtype).sigmoid()
    return heat, laid_out(pair, layout, dtype).abs() * 2, laid_out(pair, layout, dtype).sigmoid()


def refine(device: Device, shape: Shape, layout: str, dtype: DType, groups: int) -> None:
    """Value and all four gradients, with an upstream gradient of the same layout."""
    features, plan = laid_out(shape, layout, dtype), everything(shape, groups, torch.float32)
    straight = torch.zeros(groups)
    upstream = laid_out(shape, layout, dtype)
    expected = refine_and_gradients(ops.refine, features, plan, straight, upstream)
    features, straight, upstream = map(device.on, (features, straight, upstream))
    there = refine_and_gradients(ops.refine, features, moved(device, plan), straight, upstream)
    found = [device.back(each) for each in there]
    for one, other in zip(found[:2], expected[:2], strict=True):
        close(one, other)
    for one, other in zip(found[2:], expected[2:], strict=True):
        close(one, other, times=20.0)


def refine_dots(
    device: Device,
    shape: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
    plans: int,
    *,
    by_sample: bool = False,
) -> None:
    features, upstream = laid_out(shape, layout, dtype), laid_out(shape, layout, dtype)
    each = [everything(shape, 1, torch.float32) for _ in range(plans)]
    stacked = {name: torch.stack([plan[name] for plan in each]) for name in each[0]}
    expected = ops.refine_dots(features, upstream, stacked, by_sample=by_sample)
    there = device.on(features), device.on(upstream), moved(device, stacked)
    found = ops.refine_dots(*there, by_sample=by_sample)
    # sums of products of the size of 1, one for each element
    scale = max(features.numel(), 1) ** 0.5
    close(
        device.back(found) / scale,
        expected / scale,
        dtype=torch.float32 if dtype != torch.float64 else None,
    )


def areas(
    device: Device, shape: Shape, layout: str, dtype: DType, k: int, *,
    teacher: bool,
) -> None:  # fmt: skip
    """Scores, boxes and coverage: exactly."""
    own, other = heads(shape, layout, dtype), heads(shape, layout, dtype) if teacher else None
    expected = ops.areas(*own, k=k, teacher=other)
    there = None if other is None else tuple(map(device.on, other))
    found = ops.areas(*map(device.on, own), k=k, teacher=there)
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(device.back(one), two)


def masked_mse(
    device: Device, shape: Shape, layout: str, dtype: DType, weight: Tensor | None,
    normalise: str,
) -> None:  # fmt: skip
    """Loss and gradient; an upstream gradient other than one."""
    student, teacher = laid_out(shape, layout, dtype), laid_out(shape, layout, dtype)
    maps = (student, teacher, weight)
    there = [None if part is None else device.on(part) for part in maps]
    expected = loss_and_gradient(ops.masked_mse, 3.0, *maps, normalise=normalise)
    found = loss_and_gradient(ops.masked_mse, 3.0, *there, normalise=normalise)
    wide = None if dtype == torch.float64 else torch.float32
    close(device.back(found[0]), expected[0], dtype=wide)
    scale = max(student.numel(), 1)
    close(device.back(found[1]) * scale, expected[1] * scale)


def draw(device: Device, n: int) -> None:
    """The same bits."""
    seed, counter = torch.tensor([-(2**40) + 3]), torch.tensor([2**33 + 1])
    expected = ops.draw(seed, counter, n)
    found = ops.draw(device.on(seed), device.on(counter), n)
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(device.back(one), two)


def everything_on(
    device: Device,
    shape: Shape,
    dtype: DType = torch.float32,
    layout: str = "contiguous",
) -> Callable[[], list[Tensor]]:
    """All operators and their gradients, run again at each call, on inputs that are made once."""
    generator = torch.random.get_rng_state()
    torch.manual_seed(0)
    plan = moved(device, everything(shape, 1, torch.float32))
    features, student, upstream = (device.on(laid_out(shape, layout, dtype)) for _ in range(3))
    maps = tuple(map(device.on, heads(shape, layout, dtype)))
    seed, straight = device.on(torch.tensor([5])), device.on(torch.zeros(1))
    stacked = {name: torch.stack([part, part]) for name, part in plan.items()}
    torch.random.set_rng_state(generator)

    def run() -> list[Tensor]:
        refined = refine_and_gradients(ops.refine, features, plan, straight, upstream)
        found = ops.areas(*maps, k=4)
        loss = loss_and_gradient(ops.masked_mse, 3.0, student, features, found.coverage)
        dots = ops.refine_dots(features, upstream, stacked)
        return [*refined, *found, *loss, dots, *ops.draw(seed, seed, 9)]

    return run


def loss_steps(
    device: torch.device, dtype: DType = torch.float32, search: str | None = None
) -> Callable[..., list[Tensor]]:
    """The loss and its gradients at each call: of the next draw, or of that at `counter`.

    With search="online" every second call moves the policy.
    """
    kd = kd_cases.make(lambda_agreement=1.0, lambda_areas=1.0, search=search).to(device, dtype)
    kd.train(search is not None)
    if search is not None:
        kd.search.every = 2
    with torch.no_grad():
        kd.policy.magnitude.fill_(0.9)  # at its initial 0.5 nothing is sheared, shifted or rotated
    student, teacher = (side.detach().to(device) for side in kd_cases.pair(dtype=dtype))
    student.requires_grad_()

    def step(loss: Callable[..., Tensor] = sokd.loss, counter: int | None = None) -> list[Tensor]:
        if counter is not None:
            kd.policy.counter.fill_(counter)
        value = loss(student, teacher, kd)
        return [value.detach(), *torch.autograd.grad(value, [student, *kd.parameters()])]

    return step
