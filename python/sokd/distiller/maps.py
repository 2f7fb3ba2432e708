"""Any layer's output as a map [B, C, H, W], which pairs of them can be distilled, and "auto": which to
take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sokd.adapters import Size, tokens_to_map
from sokd.distiller.taps import Pair
from sokd.virtual import unwrapped

__all__ = ["Layout", "as_map", "auto_layers", "batch_size", "check_pair"]

ORDERS = ("BCHW", "BHWC")
Grid = tuple[int, int]
# What a convolution pads before it runs ("same" padding in EfficientNets): no layer that anyone would distil.
PADDING = (nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d)


@dataclass(frozen=True)
class Layout:
    """How one layer's features lie: see `sokd.adapters.tokens_to_map`, and the order of four dimensions."""

    tokens: int | None = None
    grid: Size | None = None
    order: str = "BCHW"


def as_map(features: Tensor, layout: Layout, name: str) -> Tensor:
    """features as [B, C, H, W]: maps, tokens [B, N, C], vectors [B, C] (as 1x1 maps); a view.

    Raises:
        TypeError, ValueError: `Distiller: {name} must {rule}, got {value}`.
    """
    if not features.is_floating_point():
        raise TypeError(f"Distiller: {name} must be floating point, got {features.dtype}")
    rank = features.dim()
    if rank not in (2, 3, 4) or 0 in features.shape[1:]:
        rule = "be a map [B, C, H, W], tokens [B, N, C] or a vector [B, C]"
        raise ValueError(f"Distiller: {name} must {rule}, got {list(features.shape)}")
    if rank == 2:
        return features[:, :, None, None]
    if rank == 4:
        return features.movedim(3, 1) if layout.order == "BHWC" else features
    return tokens_to_map(features, tokens=layout.tokens, grid=layout.grid, op="Distiller", name=name)


def check_pair(student: Tensor, teacher: Tensor, names: tuple[str, str]) -> None:
    """Refuse two maps that an adapter would fit together without a reason to.

    Raises:
        ValueError: of other batches; one a vector and the other a map; of another aspect, by more than the
            rounding of strides: a transposed map, dimensions in another order, or a wrong grid of tokens.
    """
    (of_student, of_teacher), shape = names, list(student.shape)
    wanted: str | None = None
    if student.shape[0] != teacher.shape[0]:
        wanted = f"have the batch size of {of_teacher}, {teacher.shape[0]}"
    elif (student.shape[2:].numel() == 1) != (teacher.shape[2:].numel() == 1):
        wanted = f"be a map where {of_teacher} is one, {list(teacher.shape)}"
    elif not _same_aspect(_size(student), _size(teacher)):
        wanted = (
            f"have the aspect of {of_teacher}, {list(teacher.shape)} (name student_order='BHWC', "
            "student_grid or those of the teacher where they are not as they seem)"
        )
    if wanted:
        raise ValueError(f"Distiller: {of_student} must {wanted}, got {shape}")


def _size(features: Tensor) -> Grid:
    return features.shape[2], features.shape[3]


def _same_aspect(one: Grid, other: Grid) -> bool:
    """Whether one size times a factor is the other, within a cell of either."""
    (h, w), (high, wide) = one, other
    return abs(high * w / wide - h) <= 1 or abs(h * wide / w - high) <= 1


def batch_size(x: Any) -> int | None:
    """How many samples the input holds, where that can be seen."""
    if isinstance(x, Mapping):
        x = next((value for value in x.values() if isinstance(value, Tensor)), None)
    if isinstance(x, Tensor):
        return x.shape[0] if x.dim() else None
    return len(x) if isinstance(x, (list, tuple)) else None


# ---------------------------------------------------------------------------------------------------- "auto"


@dataclass
class _Seen:
    """What one model's layers gave in a pass: the resolutions of their maps, in the order of their runs."""

    sizes: dict[str, Grid] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    tokens: set[int] = field(default_factory=set)

    def see(self, name: str, output: Any, batch: int | None) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.shape[:1] != (batch,):
            return
        size = self._size(output)
        if size is not None:
            self.sizes[name] = size

    def _size(self, output: Tensor) -> Grid | None:
        if output.dim() == 4 and 0 not in output.shape:
            return _size(output)
        if output.dim() != 3 or 0 in output.shape:
            return None
        self.tokens.add(output.shape[1])
        try:
            return _size(tokens_to_map(output))
        except ValueError:
            return None

    def found(self) -> dict[Grid, str]:
        """The last layer of each resolution. Layers that run once; no padding, no attention maps
        [B, heads, N, N]; no pooled ones if there are others."""
        attention = {(count, count) for count in self.tokens}
        kept: dict[Grid, str] = {}
        for name, size in self.sizes.items():
            if self.calls[name] == 1 and size not in attention:
                kept.pop(size, None)  # to the end
                kept[size] = name
        return {size: name for size, name in kept.items() if size != (1, 1)} or kept


def auto_layers(
    student: nn.Module, teacher: nn.Module, run: Callable[[nn.Module], Any], x: Any
) -> list[Pair]:
    """The last layer of each resolution that both models have; the two last ones if there is none such.

    Args:
        student, teacher: looked at in one pass each.
        run: run(model) is that pass.
        x: its input, for the batch size.
    """
    of_student, of_teacher = (_seen(model, run, batch_size(x)) for model in (student, teacher))
    for side, found in (("student", of_student), ("teacher", of_teacher)):
        if not found:
            rule = f"be named, for no layer of the {side} gives a map or a square of tokens"
            raise ValueError(f"Distiller: layers must {rule}, got 'auto'")
    common = [(name, of_teacher[size]) for size, name in of_student.items() if size in of_teacher]
    return common or [(list(of_student.values())[-1], list(of_teacher.values())[-1])]


def _seen(model: nn.Module, run: Callable[[nn.Module], Any], batch: int | None) -> dict[Grid, str]:
    with _listening(model, batch) as seen:
        run(model)
    return seen.found()


@contextmanager
def _listening(model: nn.Module, batch: int | None) -> Iterator[_Seen]:
    seen = _Seen()

    def hook_for(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen.see(name, output, batch)

    named = [(name, module) for name, module in unwrapped(model).named_modules() if name]
    handles = [
        module.register_forward_hook(hook_for(name))
        for name, module in named
        if not isinstance(module, PADDING)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# ----------------------------------------------------------------------------------------- one for each pair


def layouts(side: str, pairs: int, tokens: Any, grid: Any, order: Any) -> list[Layout]:
    """The pairs' layouts from the user's options: a list has one entry for each pair."""
    given = {"tokens": tokens, "grid": grid, "order": order}
    columns = {name: _for_pairs(f"{side}_{name}", value, pairs) for name, value in given.items()}
    for value in columns["order"]:
        if value not in ORDERS:
            raise ValueError(
                f"Distiller: {side}_order must be {' or '.join(map(repr, ORDERS))}, got {value!r}"
            )
    rows: Sequence[tuple[Any, ...]] = list(zip(*columns.values(), strict=True))
    return [Layout(*row) for row in rows]


def _for_pairs(name: str, value: Any, pairs: int) -> list[Any]:
    if not isinstance(value, list):
        return [value] * pairs
    if len(value) != pairs:
        rule = f"have one entry for each of the {pairs} pairs of layers"
        raise ValueError(f"Distiller: {name} must {rule}, got {len(value)}")
    return list(value)


@contextmanager
def untouched(*models: nn.Module) -> Iterator[None]:
    """Run models in eval mode without gradients; modes and buffers are afterwards as they were."""
    parts = [(part, part.training) for model in models for part in model.modules()]
    buffers = [(buffer, buffer.clone()) for model in models for buffer in model.buffers()]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for part, training in parts:
            part.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
