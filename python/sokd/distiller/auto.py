"""`layers="auto"`: the last map of each resolution that both models have, found in one pass through each.

It is what a person would name: what a stage gives, not what a block computes on its way to the next
resolution; features, not the map of logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from sokd.distiller.maps import Grid, batch_size, same_aspect
from sokd.distiller.taps import Pair
from sokd.kd.adapter import tokens_to_map
from sokd.kd.virtual import unwrapped

__all__ = ["auto_layers"]

# What a convolution pads before it runs ("same" padding in EfficientNets), and what pools to a size of its
# own for a classifier: no layers that anyone would distil.
PASSED_OVER = (
    *(nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d),
    *(nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
)
# What may follow the convolution that gives a map of logits; after anything else it gives features.
AFTER_LOGITS = (
    *(nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Upsample),
    *(nn.Identity, _DropoutNd),
)


@dataclass
class _Made:
    """What is known of the output of a module without children."""

    logits: bool  # whether it may be a map of logits: a convolution's, that nothing has made features of


@dataclass
class _Map:
    """A map that a layer gave."""

    name: str
    size: Grid
    channels: int
    made: _Made | None  # where the map is what a module without children gave, as it is


@dataclass
class _Open:
    """A module that has begun to run: how many maps there were, and the resolution of the last."""

    maps: int
    size: Grid | None


@dataclass
class _Seen:
    """What one model's layers gave in a pass, in the order in which they finished."""

    batch: int | None
    order: Any
    maps: list[_Map] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    tokens: set[int] = field(default_factory=set)
    running: list[_Open] = field(default_factory=list)
    last: Any = None  # output of a module without children; one alone is held
    made: _Made = field(default_factory=lambda: _Made(False))  # what is known of it

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
        self.maps.append(_Map(name, size, channels, self.made if output is self.last else None))

    def _follow(self, module: nn.Module, args: Any, output: Any) -> None:
        """Whether the map that this module gives may be one of logits, and that it was given still may."""
        logits = isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))
        if self.last is not None and any(each is self.last for each in args):
            goes_on = isinstance(module, AFTER_LOGITS)
            logits = logits or (goes_on and self.made.logits)
            self.made.logits &= goes_on
        self.last, self.made = output, _Made(logits)

    def _leave(self, begun: _Open, size: Grid) -> None:
        """Forget what a block that leads from one resolution to another computed at the first."""
        inside = self.maps[begun.maps :]
        if begun.size not in (None, size) and {each.size for each in inside} <= {
            begun.size,
            size,
            (1, 1),
        }:
            self.maps[begun.maps :] = [each for each in inside if each.size != begun.size]

    def _size(self, output: Any) -> Grid | None:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        if output.shape[:1] != (self.batch,) or 0 in output.shape:
            return None
        if output.dim() == 4:
            rows = 1 if self.order == "BHWC" else 2
            return output.shape[rows], output.shape[rows + 1]
        if output.dim() != 3:
            return None
        self.tokens.add(output.shape[1])
        try:
            return tuple(tokens_to_map(output).shape[2:])  # type: ignore[return-value]
        except ValueError:
            return None

    def found(self, image: Grid | None, classes: int | None) -> dict[Grid, str]:
        """The last layer of each resolution. Layers that run once; no attention maps [B, heads, N, N], no map
        of logits, by a convolution or by a module with that convolution in it; if there are others, no pooled
        ones and none of another aspect than the image's."""
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
            ):
                kept.pop(each.size, None)  # to the end
                kept[each.size] = each.name
        if image is not None:
            kept = {size: name for size, name in kept.items() if same_aspect(size, image)} or kept
        return {size: name for size, name in kept.items() if size != (1, 1)} or kept


def _is_block(module: nn.Module) -> bool:
    """Whether a module is one unit of a network, not a row of stages."""
    return type(module) is not nn.Sequential or not any(list(child.children()) for child in module)


def auto_layers(
    student: nn.Module, teacher: nn.Module, run: Callable[[nn.Module], Any], x: Any, *,
    logits: Callable[[Any], Tensor | None] = lambda _: None, orders: Mapping[str, Any] | None = None,
) -> list[Pair]:  # fmt: skip
    """The last layer of each resolution that both models have; the two last ones if there is none such.

    Args:
        student, teacher: looked at in one pass each.
        run: run(model) is that pass.
        x: its input, for the batch size and the aspect of the images.
        logits: finds them in what a model gives; where they are a map, it is no layer.
        orders: of the "student"'s and the "teacher"'s four dimensions.
    """
    sides = {"student": student, "teacher": teacher}
    layers = {
        side: _seen(model, run, x, logits, (orders or {}).get(side))
        for side, model in sides.items()
    }
    for side, found in layers.items():
        if not found:
            rule = f"be named, for no layer of the {side} gives a map or a square of tokens"
            raise ValueError(f"Distiller: layers must {rule}, got 'auto'")
    of_student, of_teacher = layers.values()
    common = [(name, of_teacher[size]) for size, name in of_student.items() if size in of_teacher]
    return common or [(list(of_student.values())[-1], list(of_teacher.values())[-1])]


def _seen(
    model: nn.Module, run: Callable[[nn.Module], Any], x: Any, logits: Callable[[Any], Tensor | None],
    order: Any,
) -> dict[Grid, str]:  # fmt: skip
    seen = _Seen(batch_size(x), order)
    with _listening(model, seen):
        found = logits(run(model))
    return seen.found(
        _image_size(x), found.shape[1] if found is not None and found.dim() == 4 else None
    )


def _image_size(x: Any) -> Grid | None:
    values = x.values() if isinstance(x, Mapping) else [x]
    images = [value for value in values if isinstance(value, Tensor) and value.dim() == 4]
    return (images[0].shape[2], images[0].shape[3]) if images else None


@contextmanager
def _listening(model: nn.Module, seen: _Seen) -> Iterator[None]:
    def hook_for(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen.end(name, module, args, output)

    handles = []
    for name, module in unwrapped(model).named_modules():
        if name and not isinstance(module, PASSED_OVER):
            handles.append(module.register_forward_pre_hook(lambda module, args: seen.begin()))
            handles.append(module.register_forward_hook(hook_for(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
