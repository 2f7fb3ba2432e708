"""The adapters, SoKD and classifiers of a Distiller, for the shapes that its dry run found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

from torch import nn

from sokd.distiller.recipe import Recipe
from sokd.kd.adapter import KINDS, Adapter
from sokd.kd.dam import reads_adapted
from sokd.kd.features import one_of
from sokd.kd.options import settled
from sokd.kd.sokd import SoKD, named_kd
from sokd.methods.common import Shape
from sokd.methods.registry import nearest, options_of

__all__ = ["Needs", "checked_plug", "find_heads", "make_adapters", "make_kd", "with_adapter"]

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


def with_adapter(plug: Plug, adapter: str) -> tuple[Plug, str]:
    """`sokd=` with the adapter that `adapter=` names, and that adapter's kind without SoKD.

    Raises:
        ValueError: no such adapter, or named where `sokd=` has its own.
    """
    if adapter == "default":
        return plug, str(settled(None, {})["adapter"])
    one_of("Distiller", "adapter", adapter, KINDS)
    if isinstance(plug, SoKD) or (isinstance(plug, Mapping) and "adapter" in plug):
        rule = "be left out where sokd= has an adapter of its own"
        raise ValueError(f"Distiller: adapter must {rule}, got {adapter!r}")
    if plug is False:
        return plug, adapter
    return {**(plug if isinstance(plug, Mapping) else {}), "adapter": adapter}, adapter


class Needs:
    """The requirements of a Distiller's methods."""

    def __init__(self, recipes: Sequence[Recipe], plug: Plug) -> None:
        plain = not any("features" in recipe.kind.needs for recipe in recipes)
        # the base method's own loss stays, of the clean teacher
        self.keeps = _base_of(plug) == "keep"
        # without a method that reads features only SoKD's masked term is left
        self.own = plug is not False and (plain or self.keeps)
        # without a method the objective is that of `sokd.loss`
        self.base = self.keeps and not recipes
        self.logits = any("logits" in recipe.kind.needs for recipe in recipes)
        self.maps = plug is not False or not plain
        adapts = any(recipe.kind.adapts for recipe in recipes)
        self.adapted = self.own or adapts
        # whether `base` alone decides that there is an adapter
        options = plug if isinstance(plug, Mapping) else {}
        fixed = _dam_adapts(options) or not isinstance(options.get("adapter", "default"), str)
        self.by_base = not (plug is False or isinstance(plug, SoKD) or plain or adapts or fixed)


def _base_of(plug: Plug) -> str | None:
    """`base` of the SoKD that `sokd=` selects; None without one."""
    if isinstance(plug, SoKD):
        return plug.base
    options = plug if isinstance(plug, Mapping) else {}
    return None if plug is False else str(settled(options.get("preset"), options)["base"])


def make_adapters(students: Sequence[Shape], teachers: Sequence[Shape], kind: str) -> nn.ModuleList:
    """One `Adapter` for each pair, for its channels and sizes."""
    return nn.ModuleList(
        Adapter(s[0], t[0], student_size=s[1:], teacher_size=t[1:], kind=kind)
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
    if not needs.adapted and not _dam_adapts(options):
        options["adapter"] = None  # nothing would train it
    sizes: list[Any] = [[shape[1:] for shape in side] for side in (students, teachers)]
    return SoKD(*channels, **{"student_size": sizes[0], "teacher_size": sizes[1], **options})


def _dam_adapts(options: Mapping[str, Any]) -> bool:
    """Whether the DAM of a SoKD with these options reads adapted maps."""
    dam = options.get("dam", "default")
    if isinstance(dam, nn.Module):
        return reads_adapted(dam)
    heads = settled(options.get("preset"), options)["heads"]
    return dam is not None and heads != "attention"


def find_heads(
    recipe: Recipe, models: Sequence[nn.Module], shapes: Sequence[Sequence[Shape]],
    classes: Callable[[int], int | None],
) -> dict[str, nn.Module]:  # fmt: skip
    """The models' classifiers for a method that needs them, unless its options give them.

    A classifier is a linear layer or 1x1 convolution with the channels of the last map; of several
    the one with as many outputs as there are classes, `classes(0)` in the student and `classes(1)`
    in the teacher. Where these are not known (None), or no layer has them, it is the last.

    Raises:
        ValueError: several layers have these outputs.
    """
    if not isinstance(recipe.source, str):
        return {}
    found: dict[str, nn.Module] = {}
    for at, (side, model, of_side) in enumerate(
        zip(("student", "teacher"), models, shapes, strict=True)
    ):
        option = f"{side}_head"
        if option not in options_of(recipe.source) or option in recipe.options or not of_side:
            continue
        channels = of_side[-1][0]
        heads = {n: part for n, part in model.named_modules() if _is_head(part, channels)}
        count = classes(at) if len(heads) > 1 else None
        fitting = {name: head for name, head in heads.items() if len(head.weight) == count}
        if len({id(head.weight) for head in fitting.values()}) > 1:
            rule = f"be given, because several layers of the {side} go from {channels} channels"
            got = ", ".join(map(repr, fitting))
            raise ValueError(f"Distiller: {option} must {rule} to {count} classes, got {got}")
        if heads:
            found[option] = [*(fitting or heads).values()][-1]
    return found


def _is_head(part: nn.Module, channels: int) -> bool:
    if isinstance(part, nn.Conv2d):
        return part.kernel_size == (1, 1) and part.in_channels == channels
    return isinstance(part, nn.Linear) and part.in_features == channels
