"""What named layers of a model give, without a change to the model: one forward hook for each, set once.

A hook does nothing until it is armed for the length of a forward pass, so the model by itself keeps nothing
of a pass and computes what it always did. Recomputation by gradient checkpointing runs the hooks again, in
the
backward pass: they are not armed then.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sokd.kd.virtual import unwrapped
from sokd.methods.registry import nearest

__all__ = ["Layers", "Pair", "Taps", "layer_pairs", "untapped"]

Pair = tuple[str, str]  # the student's layer and the teacher's
Layers = str | Mapping[str, str] | Sequence[str | Pair]

NEVER_RAN = (
    "Distiller: {which} must run in every forward pass, got no call; if the model was compiled and run "
    "before its Distiller was made, call torch.compiler.reset()"
)
RAN_AGAIN = "sokd: {which} runs several times in a forward pass; its first output is distilled"
OVERWRITTEN = (
    "sokd: {which} is overwritten in place by what follows it; what is distilled is the overwritten map, so "
    "name the layer that wrote it"
)


class Tap:
    """A forward hook that keeps its layer's output while it is armed: the first of a pass."""

    def __init__(self) -> None:
        self.armed = False
        self.value: Any = None
        self.again = False  # whether the layer ran more than once
        self.version: int | None = None  # of the output, where it is asked for by a number

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.armed:
            return
        if self.value is not None:
            self.again = True
            return
        self.value = output
        if self.version is not None and isinstance(output, Tensor):
            self.version = output._version

    def take(self) -> Any:
        """What was kept; the tap is disarmed and empty afterwards."""
        value, self.value, self.armed = self.value, None, False
        return value


class Taps:
    """The taps of one side.

    Args:
        side: "student" or "teacher", for the error's words.
        model: with the layers in it; DistributedDataParallel and torch.compile are looked through.
        layers: names from the model's `named_modules`, one for each pair; `name:key` where the layer gives a
            dict or a tuple.

    Raises:
        ValueError: no layer of that name; the nearest names are given.
    """

    def __init__(self, side: str, model: nn.Module, layers: Sequence[str]) -> None:
        self.side, self.layers = side, list(layers)
        self.labels = [f"the {side}'s layer {layer!r}" for layer in layers]  # for people
        self.taps: dict[str, Tap] = {}
        modules = dict(unwrapped(model).named_modules())
        for layer in layers:
            name = _split(layer)[0]
            if name not in modules or not name:
                raise ValueError(_no_such_layer(side, name, modules))
            if name not in self.taps:
                self.taps[name] = Tap()
                modules[name].register_forward_hook(self.taps[name])

    def run(self, call: Callable[[], Any], *, warn: bool = False) -> tuple[Any, list[Tensor]]:
        """What `call`, a forward pass, returns, and what each layer gave in it.

        Args:
            warn: of layers whose output is not what a reader of their names expects.

        Raises:
            RuntimeError: a layer that did not run.
            TypeError: a layer whose output is not a tensor.
        """
        for tap in self.taps.values():
            tap.value, tap.armed, tap.again, tap.version = None, True, False, 0 if warn else None
        try:
            output = call()
        finally:
            taken = {name: tap.take() for name, tap in self.taps.items()}
        chosen = [self._chosen(*each, taken) for each in zip(self.layers, self.labels, strict=True)]
        if warn:
            self._warn(chosen)
        return output, chosen

    def _warn(self, chosen: Sequence[Tensor]) -> None:
        for layer, label, tensor in zip(self.layers, self.labels, chosen, strict=True):
            tap = self.taps[_split(layer)[0]]
            if tap.again:
                warnings.warn(RAN_AGAIN.format(which=label), stacklevel=3)
            elif ":" not in layer and tensor._version != tap.version:
                warnings.warn(OVERWRITTEN.format(which=label), stacklevel=3)

    def _chosen(self, layer: str, label: str, taken: Mapping[str, Any]) -> Tensor:
        name, key = _split(layer)
        value = taken[name]
        if value is None:
            raise RuntimeError(NEVER_RAN.format(which=label))
        entries = _entries(value)
        if key is not None and key in entries:
            value = entries[key]
        elif key is not None:
            raise TypeError(
                f"Distiller: {label} must give one of {_names(entries)}, got none of that name"
            )
        if isinstance(value, Tensor):
            return value
        hint = (
            f" with {_names(entries)}: name one, as in '{name}:{next(iter(entries))}'"
            if entries
            else ""
        )
        raise TypeError(f"Distiller: {label} must give a tensor, got {type(value).__name__}{hint}")


def untapped(module: nn.Module) -> nn.Module:
    """The module itself, without the taps in it."""
    for part in module.modules():
        for key in [key for key, hook in part._forward_hooks.items() if isinstance(hook, Tap)]:
            del part._forward_hooks[key]
    return module


def layer_pairs(layers: Layers) -> list[Pair]:
    """(student, teacher) names from what a user may give: a name, names, pairs, or a dict student ->
    teacher."""
    entries: list[Any]
    if isinstance(layers, str):
        entries = [layers]
    elif isinstance(layers, Mapping):
        entries = list(layers.items())
    else:
        entries = list(layers) if isinstance(layers, Sequence) else [layers]
    pairs = [(entry, entry) if isinstance(entry, str) else entry for entry in entries]
    if not pairs or not all(_is_pair(pair) for pair in pairs):
        rule = "be 'auto', a name, a dict of student layer -> teacher layer, or a list of names or such pairs"
        raise TypeError(f"Distiller: layers must {rule}, got {layers!r}")
    return [(student, teacher) for student, teacher in pairs]


def _is_pair(pair: Any) -> bool:
    return (
        isinstance(pair, (tuple, list))
        and len(pair) == 2
        and all(isinstance(name, str) for name in pair)
    )


def _split(layer: str) -> tuple[str, str | None]:
    """`name:key` as name and key."""
    name, colon, key = layer.partition(":")
    return name, key if colon else None


def _entries(value: Any) -> dict[str, Any]:
    """The tensors of a dict or a tuple, by key or place."""
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (tuple, list)):
        items = enumerate(value)
    return {str(key): entry for key, entry in items if isinstance(entry, Tensor)}


def _names(entries: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, entries)) or "its tensors"


def _no_such_layer(side: str, name: str, modules: Mapping[str, nn.Module]) -> str:
    names = [known for known in modules if known]
    near = nearest(name, names)
    near += [known for known in names if known.endswith(f".{name}") and known not in near][:3]
    hint = ", ".join(map(repr, near)) if near else ", ".join(map(repr, names[:5])) + ", ..."
    rule = f"be layers of the {side} (named_modules; nearest: {hint})"
    return f"Distiller: layers must {rule}, got {name!r}"
