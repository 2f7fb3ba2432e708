"""The fallbacks for PyTorch's private names: a torch without any of them gives the same numbers."""

import runpy
import sys
import types

import pytest
import torch
from support.cases import everything
from torch import Tensor

from sokd import ops
from sokd.ops import torch_internals
from sokd.ops.masked_mse import scaled_mse

SHAPE = (2, 3, 5, 6)


@pytest.fixture
def without_private_names(monkeypatch):
    """Replaces every name that `_find` looks up by its fallback."""
    bare = types.ModuleType("torch")
    bare.__version__, bare.Tensor = "2.5.0", Tensor
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", bare)
        found = runpy.run_path(torch_internals.__file__)
    names = [name for name, value in found.items() if getattr(value, "__name__", "") == "<lambda>"]
    assert {"is_transforming", "saved_tensor_hooks", "negative_view"} <= set(names)
    for name in names:
        monkeypatch.setattr(torch_internals, name, found[name])
    monkeypatch.setattr(torch_internals, "TRACES_GUARDS", found["TRACES_GUARDS"])


def numbers() -> list[Tensor]:
    torch.manual_seed(0)
    plan = everything(SHAPE, 2, torch.float32)
    features, student = torch.randn(2, *SHAPE).unbind()
    inputs = [features, student, plan.pop("theta"), plan.pop("sigma")]
    for each in inputs:
        each.requires_grad_()
    refined = ops.refine(inputs[0], inputs[2], sigma=inputs[3], seed=3, **plan)
    loss = scaled_mse(student, refined, None, normalise="elements", scale=2.0, mutual=True)
    gradients = torch.autograd.grad(3 * loss, inputs)
    dots = ops.refine_dots(features.detach(), student.detach(), {"sigma": torch.ones(2, 1)})
    return [refined, loss, *gradients, dots]


def test_the_same_numbers_without_them(request):
    expected = numbers()
    request.getfixturevalue("without_private_names")
    assert torch_internals.is_transforming()  # the fallback assumes this
    assert all(map(torch.equal, numbers(), expected))


class Bare:
    """A module, tensor or node of a torch without any of the private names."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


def test_without_the_attributes():
    bare = Bare(
        forward=len, is_inference=lambda: False,
        named_buffers=lambda recurse: [("mean", torch.ones(1))],
    )  # fmt: skip
    assert torch_internals.compiled_from(bare) is None
    assert not torch_internals.is_compiled(bare)
    assert not torch_internals.is_replica(bare)
    assert torch_internals.has_forward(bare)
    assert torch_internals.forward_hooks(bare) == {}
    assert torch_internals.version(bare) is None
    assert not torch_internals.saved_training(bare)
    assert torch_internals.own_buffers(bare) == {"mean": torch.ones(1)}
    torch_internals.put_buffers(bare, {"mean": torch.zeros(1)})
    assert torch.equal(bare.mean, torch.zeros(1))
    module = torch.nn.Module()
    torch_internals.share_buffers(module, bare)
    assert [name for name, _ in module.named_buffers()] == ["mean"]


def test_buffers_are_put_back_where_the_module_deleted_or_replaced_them():
    module = torch.nn.BatchNorm2d(2)
    module.register_buffer("none", None)
    before = torch_internals.own_buffers(module)
    del module.running_mean
    module.none = torch.ones(1)
    torch_internals.put_buffers(module, before)
    assert torch_internals.own_buffers(module) == before
    assert module.none is None and module.running_mean is before["running_mean"]


@pytest.mark.parametrize("private", [False, True])
def test_the_norm_of_all_elements(monkeypatch, private):
    if private:
        monkeypatch.delattr(torch.nn.utils, "get_total_norm", raising=False)
    tensors = [torch.randn(3, 4), torch.randn(5), torch.randn(())]
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.testing.assert_close(torch_internals.total_norm(tensors), flat.norm())
