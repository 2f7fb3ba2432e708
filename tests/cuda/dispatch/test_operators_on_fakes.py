"""The operators with gradients, from public function to kernel, on fakes of CUDA tensors.

test_emulator.py tests those without gradients, and all kernels, in all dtypes and orders.
"""

from collections.abc import Iterator

import pytest
import torch
from support.cases import LAYOUTS, SHAPES, Shape
from support.cuda import device_cases
from support.cuda.fake import FakeCuda, HostCuda
from support.cuda.mock import Driver
from torch import Tensor

from sokd import _core, ops, reference

ODD, ALIGNED, DEEP = (2, 3, 5, 7), (2, 16, 8, 8), (1, 130, 3, 4)
SOME = [
    (ODD, "contiguous"),
    (ALIGNED, "contiguous"),
    (ALIGNED, "channels_last"),
    (DEEP, "channels_last"),
]
SOME += [(ODD, layout) for layout in LAYOUTS[1:]]
SOME += [(shape, "contiguous") for shape in SHAPES if (shape, "contiguous") not in SOME]
# what differs on the way to a kernel
CASES = [(shape, layout, torch.float32) for shape, layout in SOME]
CASES += [(ODD, "contiguous", torch.float64), (ALIGNED, "contiguous", torch.float16)]
CASES += [(ALIGNED, "channels_last", torch.bfloat16)]


class Fake:
    """The device "cuda" (see device_cases.py)."""

    def on(self, tensor: Tensor) -> Tensor:
        return HostCuda(tensor.detach())

    def back(self, tensor: Tensor) -> Tensor:
        assert isinstance(tensor, HostCuda), "it never left the CPU"
        return tensor.host


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    _core.select_reader("portable")  # the other one does not read fakes
    torch.set_num_threads(1)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)
    driver = Driver()
    before = len(driver.launches())
    with FakeCuda():
        yield Fake()
    assert len(driver.launches()) > before, "nothing was launched"


def groups_of(shape: Shape) -> list[int]:
    return [1, shape[0]] if shape[0] > 1 else [1]


@pytest.mark.parametrize("shape, layout, dtype", CASES)
def test_refine(shape: Shape, layout: str, dtype: torch.dtype, fake: Fake) -> None:
    for groups in groups_of(shape):
        device_cases.refine(fake, shape, layout, dtype, groups)


@pytest.mark.parametrize("normalise", ["elements", "area"])
@pytest.mark.parametrize("shape, layout, dtype", CASES)
def test_masked_mse(
    shape: Shape, layout: str, dtype: torch.dtype, normalise: str, fake: Fake
) -> None:
    batch, _, height, width = shape
    transposed = torch.rand(batch, 1, width, height).mT.to(dtype)
    for weight in (None, torch.rand(batch, height, width), transposed):
        device_cases.masked_mse(fake, shape, layout, dtype, weight, normalise)


@pytest.mark.parametrize("kept", [False, True])
def test_the_gradient_is_scaled_in_place(kept: bool, fake: Fake) -> None:
    """The product is in place if the graph is freed; the kernel reads upstream, not the host."""
    student, teacher = torch.randn(2, *ODD)
    leaf = fake.on(student).requires_grad_()
    loss = ops.masked_mse(leaf, fake.on(teacher))
    (found,) = torch.autograd.grad(loss, leaf, retain_graph=kept)
    device_cases.close(fake.back(found), 2 * (student - teacher) / student.numel())
    assert Driver().launches()[-1].startswith("masked_mse_scale_f32") != kept


def test_a_backward_that_failed_is_not_repeated_on_a_gradient_already_scaled(fake: Fake) -> None:
    student, teacher = torch.randn(2, *ODD)
    loss = ops.masked_mse(fake.on(student).requires_grad_(), fake.on(teacher))

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    handle = loss.grad_fn.register_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        (loss * 3).backward()
    handle.remove()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss * 3).backward()


def test_values_are_not_read_by_the_host(fake: Fake) -> None:
    """The CPU raises for a perm that is no permutation; reading it here would synchronise."""
    perm = torch.tensor([[0, 5, -1]])
    refined = fake.back(ops.refine(fake.on(torch.ones(1, 3, 2, 2)), perm=fake.on(perm)))
    assert refined.isnan().flatten(2).all(2).tolist() == [[False, True, True]]
    assert torch.equal(refined[:, 0], reference.refine(torch.ones(1, 3, 2, 2))[:, 0])
