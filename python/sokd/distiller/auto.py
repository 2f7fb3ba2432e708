"""`layers="auto"`: the last map of each resolution that both models have, found in one pass each.

These are the outputs of stages: not the maps that a block computes on its way to the next
resolution, not the map of logits, and, in the student, with a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sokd.distiller.inputs import Given, Grid, batch_size
from sokd.distiller.taps import Pair
from sokd.kd.features import same_aspect, tokens_to_map
from sokd.kd.virtual import unwrapped

__all__ = ["auto_layers"]

# Padding before a convolution ("same" in EfficientNets), and pooling to a fixed size for a
# classifier.
PASSED_OVER = (
    *(nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d),
    *(nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
)
# Modules that may follow a convolution whose map is logits; before any other it is features.
AFTER_LOGITS = (
    *(nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Upsample),
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
    nn.FeatureAlphaDropout,
)


@dataclass
class _Made:
    """Properties of the output of a module without children."""

    logits: bool  # whether it may be a map of logits: the unchanged output of a convolution


@dataclass
class _Map:
    """The map that a layer returned."""

    name: str
    size: Grid
    channels: int
    learns: bool  # whether a gradient of the map reaches a parameter
    made: _Made | None  # if the map is the unchanged output of a module without children


@dataclass
class _Open:
    """A running module: the number of maps before it, and the resolution of the last of them."""

    maps: int
    size: Grid | None


@dataclass
class _Seen:
    """The outputs of one model's layers in a pass, in the order in which they finished."""

    batch: int | None
    order: Any
    given: Given
    maps: list[_Map] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    tokens: set[int] = field(default_factory=set)
    running: list[_Open] = field(default_factory=list)
    last: Any = None  # the latest output of a module without children
    made: _Made = field(default_factory=lambda: _Made(False))  # its properties

    def begin(self) -> None:
        self.running.append(_Open(len(self.maps), self.maps[-1].size if self.maps else None))

    def end(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        begun, is_leaf = self.running.pop(), not any(True for _ in module.children())
        if is_leaf:
            self._follow(module, args, output)
        size = self._size(output)
        if size is None:
            return
        if _is_block(module) and not is_leaf:
            self._leave(begun, size)
        channels = output.shape[2 if output.dim() == 3 else 3 if self.order == "BHWC" else 1]
        made = self.made if output is self.last else None
        self.maps.append(_Map(name, size, channels, output.requires_grad, made))

    def _follow(self, module: nn.Module, args: Any, output: Any) -> None:
        """Update whether this module's output, and its input, may be a map of logits."""
        logits = isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))
        if self.last is not None and any(each is self.last for each in args):
            goes_on = isinstance(module, AFTER_LOGITS)
            logits = logits or (goes_on and self.made.logits)
            self.made.logits &= goes_on
        self.last, self.made = output, _Made(logits)

    def _leave(self, begun: _Open, size: Grid) -> None:
        """Drop the maps that a block computed at its input's resolution before it changed it."""
        inside = self.maps[begun.maps :]
        if begun.size not in (None, size) and {each.size for each in inside} <= {
            begun.size,
            size,
            (1, 1),
        }:
            self.maps[begun.maps :] = [each for each in inside if each.size != begun.size]

    def _size(self, output: Any) -> Grid | None:
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.is_nested:
            return None
        if output.shape[:1] != (self.batch,) or 0 in output.shape:
            return None
        if output.dim() == 4:
            rows = 1 if self.order == "BHWC" else 2
            return output.shape[rows], output.shape[rows + 1]
        if output.dim() != 3:
            return None
        self.tokens.add(output.shape[1])
        if not self.given.has_grid(output):
            return None
        try:
            return tuple(tokens_to_map(output).shape[2:])  # type: ignore[return-value]
        except ValueError:
            return None

    def found(self, image: Grid | None, classes: int | None, learning: bool) -> dict[Grid, str]:
        """The last layer of each resolution.

        Only layers that run once; no attention maps [B, heads, N, N]; no map of logits, whether of
        a convolution or of a module that contains it; with a gradient if `learning`; and, unless
        nothing else is left, no pooled maps and none of another aspect than the image.
        """
        attention = {(count, count) for count in self.tokens}
        as_logits = [each for each in self.maps if each.channels == classes]
        heads = [each.name for each in as_logits if each.made is not None and each.made.logits]
        logits = {
            each.name
            for each in as_logits
            if any(f"{h}.".startswith(f"{each.name}.") for h in heads)
        }
        kept: dict[Grid, str] = {}
        for each in self.maps:
            if (
                self.calls[each.name] == 1
                and each.size not in attention
                and each.name not in logits
                and (each.learns or not learning)
            ):
                kept.pop(each.size, None)  # to the end
                kept[each.size] = each.name
        if image is not None:
            kept = {size: name for size, name in kept.items() if same_aspect(size, image)} or kept
        return {size: name for size, name in kept.items() if size != (1, 1)} or kept


def _is_block(module: nn.Module) -> bool:
    """Whether a module is one block of a network, not a sequence of stages."""
    return type(module) is not nn.Sequential or not any(list(child.children()) for child in module)


def auto_layers(
    student: nn.Module, teacher: nn.Module, run: Callable[[nn.Module], Any], x: Any, *,
    logits: Callable[[Any], Tensor | None] = lambda _: None,
    orders: Mapping[str, Any] | None = None,
) -> list[Pair]:  # fmt: skip
    """The last layer of each resolution that both models have, else the last one of each model.

    Args:
        student, teacher: run once each; the student with a graph, to find what is trained.
        run: run(model) runs the pass.
        x: the input, for the batch size and the aspect of the images.
        logits: finds the logits in a model's output; a map of logits is not a layer.
        orders: the order of dimensions of the "student"'s and the "teacher"'s maps.
    """
    layers, given = {}, Given.of(x)
    for side, model in {"student": student, "teacher": teacher}.items():
        trained = side == "student" and any(p.requires_grad for p in model.parameters())
        seen = _Seen(batch_size(x), (orders or {}).get(side), given)
        with _listening(model, seen), torch.set_grad_enabled(trained):
            output = logits(run(model))
        classes = output.shape[1] if output is not None and output.dim() == 4 else None
        layers[side] = seen.found(given.image, classes, trained)
        if not layers[side]:
            which = f"of the {side} with a gradient" if trained else f"of the {side}"
            rule = f"be named, because no layer {which} returns a map or a square of tokens"
            raise ValueError(f"Distiller: layers must {rule}, got 'auto'")
    of_student, of_teacher = layers.values()
    common = [(name, of_teacher[size]) for size, name in of_student.items() if size in of_teacher]
    return common or [(list(of_student.values())[-1], list(of_teacher.values())[-1])]


@contextmanager
def _listening(model: nn.Module, seen: _Seen) -> Iterator[None]:
    def hook_for(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen.end(name, module, args, output)

    handles = []
    for name, module in unwrapped(model).named_modules():
        if name and not isinstance(module, (*PASSED_OVER, torch.jit.ScriptModule)):
            handles.append(module.register_forward_pre_hook(lambda module, args: seen.begin()))
            handles.append(module.register_forward_hook(hook_for(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
