"""The outputs of a model's named layers, read by one forward hook per layer.

A hook is armed for one forward pass of a Distiller. Otherwise it is a no-op, so the model alone
stores nothing and computes as before. Gradient checkpointing runs the layers again in the backward
pass, when the hooks are not armed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sokd.distiller.outputs import entries
from sokd.kd.virtual import unwrapped
from sokd.methods.registry import nearest
from sokd.ops.runtime import warn_user
from sokd.ops.torch_internals import forward_hooks, has_forward, is_compiled, version

__all__ = ["Layers", "Pair", "Tap", "Taps", "layer_pairs"]

Pair = tuple[str, str]  # the student's layer and the teacher's
Layers = str | Mapping[str, str] | Sequence[str | Pair]

NEVER_RAN = "Distiller: {which} must run in every forward pass, got no call; {why}"
WHY_COMPILED = (
    "the model is compiled: if it ran before its Distiller was made, call torch.compiler.reset()"
)
WHY_SCRIPTED = (
    "it is inside a TorchScript module, which runs no hooks: pass the module that was scripted or "
    "traced, or name a layer outside it"
)
WHY_FLAT = (
    "the model is a torch.fx graph, which calls the innermost modules only: name one of those"
)
WHY_LIST = "it is a {kind}, which is never called: name one of its entries"
WHY_SKIPPED = (
    "the model skipped it in this pass (LayerDrop, a branch) or called a method of it, such as "
    "forward_features, which runs no hooks: name a layer that always runs"
)
REPLACED = (
    "Distiller: {which} must be the module that it was when the Distiller was made, got another "
    "one (convert_sync_batchnorm, an adapter such as LoRA, or a rebuilt part); change the model "
    "first, then make its Distiller"
)
RAN_AGAIN = "sokd: {which} runs several times in a forward pass; its first output is used"
OVERWRITTEN = (
    "sokd: {which} is overwritten in place by the layer after it, and the overwritten map is "
    "distilled; name that layer instead"
)


class Tap:
    """A forward hook that, while armed, stores the first output of its layer."""

    def __init__(self) -> None:
        self.armed = False
        self.value: Any = None
        self.again = False  # whether the layer ran more than once
        self.watches = False  # whether the versions are recorded
        self.versions: dict[int, int | None] = {}  # of the output's tensors, by id

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.armed:
            return
        if self.value is not None:
            self.again = True
            return
        self.value = output
        if self.watches and not torch.compiler.is_compiling():
            tensors = [output] if isinstance(output, Tensor) else entries(output).values()
            self.versions = {
                id(each): version(each) for each in tensors if isinstance(each, Tensor)
            }

    def take(self) -> Any:
        """Return the stored output, and disarm and empty the tap."""
        value, self.value, self.armed = self.value, None, False
        return value


class Taps:
    """The taps of one side.

    Args:
        side: "student" or "teacher", for errors.
        model: with the layers in it, also inside DistributedDataParallel or torch.compile.
        layers: names from the model's `named_modules`, one for each pair; `name:key` where the
            layer returns a dict or a tuple.
        other: the other side's model, to detect a swapped pair.

    Raises:
        ValueError: no layer of that name; the error lists the nearest names.
    """

    def __init__(
        self, side: str, model: nn.Module, layers: Sequence[str], other: nn.Module | None = None
    ) -> None:
        self.side, self.layers = side, list(layers)
        self.labels = [f"the {side}'s layer {layer!r}" for layer in layers]  # for messages
        self.taps: dict[str, Tap] = {}
        self._warned: set[str] = set()  # labels
        modules = dict(unwrapped(model).named_modules())
        for layer in layers:
            name = _split(layer)[0]
            if name not in modules or not name:
                raise ValueError(_no_such_layer(side, name, modules, other))
            if name in self.taps:
                continue
            self.taps[name] = Tap()
            try:
                modules[name].register_forward_hook(self.taps[name])
            except RuntimeError as error:  # of TorchScript
                label = f"the {side}'s layer {layer!r}"
                raise RuntimeError(NEVER_RAN.format(which=label, why=WHY_SCRIPTED)) from error

    def check_in_place(self, model: nn.Module) -> None:
        """Raise RuntimeError if a layer has been replaced by another module."""
        for layer, label in zip(self.layers, self.labels, strict=True):
            name = _split(layer)[0]
            try:
                found = unwrapped(model).get_submodule(name)
            except AttributeError:
                found = None
            if found is None or self.taps[name] not in forward_hooks(found).values():
                raise RuntimeError(REPLACED.format(which=label))

    def run(
        self, model: nn.Module, call: Callable[[], Any], *, warn: bool = False
    ) -> tuple[Any, list[Tensor]]:
        """The output of `call`, a forward pass of the model, and that of each layer in it.

        Args:
            warn: whether to warn about layers that run again or are overwritten in place.

        Raises:
            RuntimeError: a layer that did not run.
            TypeError: a layer whose output is not a tensor.
        """
        for tap in self.taps.values():
            tap.value, tap.armed, tap.again, tap.watches, tap.versions = None, True, False, warn, {}
        try:
            output = call()
        finally:
            taken = {name: tap.take() for name, tap in self.taps.items()}
        for layer, label in zip(self.layers, self.labels, strict=True):
            if taken[_split(layer)[0]] is None:
                self.check_in_place(model)
                why = _why_never_ran(model, _split(layer)[0])
                raise RuntimeError(NEVER_RAN.format(which=label, why=why))
        chosen = [self._chosen(*each, taken) for each in zip(self.layers, self.labels, strict=True)]
        if warn:
            self._warn(chosen)
        return output, chosen

    def _warn(self, chosen: Sequence[Tensor]) -> None:
        for layer, label, tensor in zip(self.layers, self.labels, chosen, strict=True):
            tap = self.taps[_split(layer)[0]]
            overwritten = tap.versions.get(id(tensor)) not in (None, version(tensor))
            if (tap.again or overwritten) and label not in self._warned:
                self._warned.add(label)
                warn_user((RAN_AGAIN if tap.again else OVERWRITTEN).format(which=label))

    def _chosen(self, layer: str, label: str, taken: Mapping[str, Any]) -> Tensor:
        name, key = _split(layer)
        value = taken[name]
        if key is None and isinstance(value, Tensor):
            return value
        named = {key: each for key, each in entries(value).items() if isinstance(each, Tensor)}
        names = ", ".join(map(repr, named)) or "its tensors"
        if key is not None and key not in named:
            raise TypeError(f"Distiller: {label} must give one of {names}, got no such entry")
        if key is not None:
            return named[key]
        hint = f" with {names}: name one, as in '{name}:{next(iter(named))}'" if named else ""
        raise TypeError(f"Distiller: {label} must give a tensor, got {type(value).__name__}{hint}")


def layer_pairs(layers: Layers) -> list[Pair]:
    """(student, teacher) names from a name, names, pairs, or a dict student -> teacher."""
    entries: list[Any]
    if isinstance(layers, str):
        entries = [layers]
    elif isinstance(layers, Mapping):
        entries = list(layers.items())
    else:
        entries = list(layers) if isinstance(layers, Sequence) else [layers]
    pairs = [(entry, entry) if isinstance(entry, str) else entry for entry in entries]
    if not pairs or not all(_is_pair(pair) for pair in pairs):
        rule = "be 'auto', a name, a dict of student layer -> teacher layer, or a list of names or "
        rule += "such pairs"
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


def _why_never_ran(model: nn.Module, name: str) -> str:
    """The likely reason why a layer's hook did not run."""
    inner = unwrapped(model)
    outer = ["", *(name[:at] for at, letter in enumerate(name) if letter == ".")]
    if any(isinstance(inner.get_submodule(part), torch.jit.ScriptModule) for part in outer):
        return WHY_SCRIPTED
    if any(isinstance(part, torch.fx.GraphModule) for part in inner.modules()):
        return WHY_FLAT
    layer = inner.get_submodule(name)
    if not has_forward(layer):
        return WHY_LIST.format(kind=type(layer).__name__)
    compiled = any(is_compiled(part) for part in (model, *inner.modules()))
    return WHY_COMPILED if compiled else WHY_SKIPPED


def _no_such_layer(
    side: str, name: str, modules: Mapping[str, nn.Module], other: nn.Module | None
) -> str:
    names = [known for known in modules if known]
    near = nearest(name, names)
    near += [known for known in names if known.endswith(f".{name}") and known not in near][:3]
    hint = ", ".join(map(repr, near)) if near else ", ".join(map(repr, names[:5])) + ", ..."
    rule = f"be layers of the {side} (named_modules; nearest: {hint})"
    swapped = other is not None and name and name in dict(unwrapped(other).named_modules())
    of_other = "teacher" if side == "student" else "student"
    why = f", a layer of the {of_other}: pairs and dicts go student layer -> teacher layer"
    return f"Distiller: layers must {rule}, got {name!r}{why if swapped else ''}"
