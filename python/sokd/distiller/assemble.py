"""The adapters, SoKD and classifiers of a Distiller, for the shapes that its dry run found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

from torch import nn

from sokd.distiller.recipe import Recipe
from sokd.kd.adapter import Adapter
from sokd.kd.sokd import SoKD, named_kd
from sokd.methods.common import Shape
from sokd.methods.registry import nearest, options_of

__all__ = ["Needs", "checked_plug", "find_heads", "make_adapters", "make_kd"]

Plug = bool | SoKD | Mapping[str, Any]


def checked_plug(plug: Any) -> Plug:
    """`sokd=`, checked.

    Raises:
        TypeError: another type, or a dict with an option that SoKD does not have.
    """
    if not isinstance(plug, (bool, SoKD, Mapping)):
        rule = "be True, False, a dict of SoKD's options or a SoKD"
        got = named_kd(plug) if isinstance(plug, nn.Module) else repr(plug)
        raise TypeError(f"Distiller: sokd must {rule}, got {got}")
    if not isinstance(plug, Mapping):
        return plug
    known = [name for name, p in signature(SoKD).parameters.items() if p.kind is p.KEYWORD_ONLY]
    for option in plug:
        if option not in known:
            near = nearest(str(option), known) or known
            rule = f"hold options of SoKD (nearest: {', '.join(near)})"
            raise TypeError(f"Distiller: sokd must {rule}, got {option!r}")
    return plug


class Needs:
    """What the methods of a Distiller require."""

    def __init__(self, recipes: Sequence[Recipe], plug: Plug) -> None:
        # no method reads features, so SoKD's own masked term does
        self.plain = not any("features" in recipe.kind.needs for recipe in recipes)
        self.logits = any("logits" in recipe.kind.needs for recipe in recipes)
        self.maps = plug is not False or not self.plain
        self.adapted = self.maps and (self.plain or any(recipe.kind.adapts for recipe in recipes))


def make_adapters(students: Sequence[Shape], teachers: Sequence[Shape]) -> nn.ModuleList:
    """One `Adapter` for each pair, for its channels and sizes."""
    return nn.ModuleList(
        Adapter(s[0], t[0], student_size=s[1:], teacher_size=t[1:])
        for s, t in zip(students, teachers, strict=True)
    )


def make_kd(
    plug: Plug, students: Sequence[Shape], teachers: Sequence[Shape], needs: Needs
) -> SoKD | None:
    """The SoKD that `sokd=` selects, or None.

    Raises:
        ValueError: a SoKD for other channels than the layers have.
    """
    if plug is False:
        return None
    channels = [[shape[0] for shape in side] for side in (students, teachers)]
    if isinstance(plug, SoKD):
        own = [plug.student_channels, plug.teacher_channels]
        if own != channels:
            rule = f"have the layers' channels, {channels[0]} -> {channels[1]}"
            raise ValueError(f"Distiller: sokd must {rule}, got {own[0]} -> {own[1]}")
        return plug
    options = dict(plug) if isinstance(plug, Mapping) else {}
    if not needs.adapted and options.get("dam", "default") is None:
        options.setdefault("adapter", None)  # no loss would train it
    sizes: list[Any] = [[shape[1:] for shape in side] for side in (students, teachers)]
    return SoKD(*channels, **{"student_size": sizes[0], "teacher_size": sizes[1], **options})


def find_heads(
    recipe: Recipe, models: Sequence[nn.Module], shapes: Sequence[Sequence[Shape]]
) -> dict[str, nn.Module]:
    """The models' classifiers for a method that needs them, unless its options give them.

    A classifier is the last linear layer or 1x1 convolution with the channels of the last map.
    """
    if not isinstance(recipe.source, str):
        return {}
    found: dict[str, nn.Module] = {}
    for side, model, of_side in zip(("student", "teacher"), models, shapes, strict=True):
        option = f"{side}_head"
        if option in options_of(recipe.source) and option not in recipe.options and of_side:
            head = _last_head(model, of_side[-1][0])
            found |= {} if head is None else {option: head}
    return found


def _last_head(model: nn.Module, channels: int) -> nn.Module | None:
    parts = list(model.modules())
    for part in reversed(parts):
        if isinstance(part, nn.Linear) and part.in_features == channels:
            return part
        if (
            isinstance(part, nn.Conv2d)
            and part.in_channels == channels
            and part.kernel_size == (1, 1)
        ):
            return part
    return None
