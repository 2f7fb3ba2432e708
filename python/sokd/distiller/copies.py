"""Dry runs that leave models unchanged, and copies of a student for deployment."""

from __future__ import annotations

import gc
import types
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sokd.ops.torch_internals import forward_hooks, own_buffers, put_buffers

__all__ = ["as_eval", "bare_copy", "untouched"]

M = TypeVar("M", bound=nn.Module)


def as_eval(model: M) -> M:
    """The model, put in eval mode, also where its own `train()` returns nothing.

    One that torch.export made has no modes and refuses `eval()`.
    """
    try:
        model.eval()
    except NotImplementedError:
        for part in model.modules():
            part.training = False
    return model


@contextmanager
def untouched(*models: nn.Module) -> Iterator[None]:
    """Run models in eval mode without gradients, and restore modes and buffers afterwards.

    The models run on copies of their buffers, so they may write to a buffer, resize it or replace
    it. Lazy parameters and buffers are initialised and stay.
    """
    parts = [part for model in models for part in model.modules()]
    modes = [part.training for part in parts]
    scripted = [part for part in parts if isinstance(part, torch.jit.ScriptModule)]
    eager = [part for part in parts if not isinstance(part, torch.jit.ScriptModule)]
    own = [own_buffers(part) for part in eager]
    copies: dict[int, Tensor | None] = {
        id(buffer): buffer if buffer is None or is_lazy(buffer) else buffer.clone()
        for buffers in own
        for buffer in buffers.values()
    }
    # buffers of TorchScript cannot be replaced, resized or reassigned
    fixed = [(buffer, buffer.clone()) for part in scripted for buffer in part.buffers(False)]
    try:
        for part, buffers in zip(eager, own, strict=True):
            put_buffers(part, {name: copies[id(each)] for name, each in buffers.items()})
        for model in models:
            as_eval(model)
        with torch.no_grad():
            yield
    finally:
        for part, training in zip(parts, modes, strict=True):
            part.training = training
        for part, buffers in zip(eager, own, strict=True):
            put_buffers(part, buffers)
        for buffer, before in fixed:
            buffer.data.copy_(before)
        # autocast of older releases gives the casts of these passes, without a graph, to the next
        torch.clear_autocast_cache()


def bare_copy(model: M, hooks: type) -> M:
    """A deep copy without the forward hooks of that type.

    Copies of tensors with a graph (the weight of an old-style weight norm, a feature stored in a
    module) are constants, because PyTorch cannot copy a graph.
    """
    memo: dict[int, Any] = {id(each): each.detach().clone() for each in _with_graph(model)}
    twin = deepcopy(model, memo)
    for part in twin.modules():
        found = forward_hooks(part)
        for key in [key for key, hook in found.items() if isinstance(hook, hooks)]:
            del found[key]
    return twin


# Objects that `deepcopy` does not descend into.
_ATOMS = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType, str, bytes, int)


def _with_graph(root: Any) -> Iterator[Tensor]:
    """The tensors with a graph among all that a deep copy of `root` copies."""
    waiting, seen = [root], {}
    while waiting:
        each = waiting.pop()
        if id(each) in seen or isinstance(each, _ATOMS):
            continue
        seen[id(each)] = each  # held, so that no other object gets its id
        if not isinstance(each, Tensor):
            waiting.extend(gc.get_referents(each))
        elif each.grad_fn is not None:
            yield each
