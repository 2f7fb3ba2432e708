"""Copies of a batch of inputs, and whether a model has written to it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from sokd.ops.torch_internals import version

__all__ = ["apart", "changed", "copied"]


def copied(x: Any) -> Any:
    """x with copies of its tensors: in dicts, lists, tuples, and an object's attributes too."""
    return _mapped(x, lambda tensor: tensor.clone())


def apart(x: Any) -> Any:
    """x with the same tensors in dicts, lists and objects of its own."""
    return _mapped(x, lambda tensor: tensor)


def _mapped(x: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, Mapping):
        return {key: _mapped(value, change) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        values = [_mapped(value, change) for value in x]
        return type(x)(*values) if hasattr(x, "_fields") else type(x)(values)
    held = {name: each for name, each in _attributes(x).items() if isinstance(each, Tensor)}
    if held:  # DETR's pair of tensors and mask
        x = copy.copy(x)
        vars(x).update({name: change(each) for name, each in held.items()})
    return x


def _attributes(x: Any) -> dict[str, Any]:
    return getattr(x, "__dict__", {})


def changed(x: Any) -> Callable[[], bool]:
    """A function that returns whether a tensor in x has been written to since this call."""
    tensors: list[Tensor] = []
    _mapped(x, tensors.append)
    seen = [(tensor, version(tensor)) for tensor in tensors]
    return lambda: any(version(tensor) != before for tensor, before in seen)
