"""The options of SoKD: what each is by default, checked, and the parts that are made of them."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from torch import nn

from sokd.kd.adapter import KINDS, Adapter
from sokd.kd.attention import AttentionDAM
from sokd.kd.dam import DAM
from sokd.kd.features import one_of, per_layer
from sokd.kd.policy import Policy
from sokd.kd.policy.online import OnlineSearch
from sokd.kd.virtual import unwrapped
from sokd.ops.torch_internals import has_forward

__all__ = [
    "PRESETS", "adapters_of", "channel_lists", "check_left_out", "dams_of", "part_or_none",
    "policy_or_none", "search_or_none", "settled",
]  # fmt: skip

# What an option is where it is "default", by `preset`.
PRESETS: dict[str | None, dict[str, Any]] = {
    None: {
        "adapter": "separable", "heads": "attention", "areas": "teacher", "base": "keep",
        "lambda_agreement": 0.2, "lambda_areas": 0.4, "lambda_base": 2.0,
        "granularity": "batch", "magnitude_gradient": "straight_through", "search": "online",
    },
    "paper": {
        "adapter": "conv", "heads": "paper", "areas": "mutual", "base": "replace",
        "lambda_agreement": 10.0, "lambda_areas": 10.0, "lambda_base": 0.0,
        "granularity": "batch", "magnitude_gradient": "straight_through", "search": None,
    },
}  # fmt: skip
_HEADS = ("attention", "bounded", "paper")
_BASES = ("keep", "replace")

# How the loss calls a part: positional arguments, keywords.
_CALLS = {"adapter": (["student"], []), "dam": (["student", "refined"], ["scale"])}


def settled(preset: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every option of `PRESETS`: as given, or the preset's where it is "default" or left out.

    settled("paper", {"base": "keep"})["heads"]           # 'paper'
    """
    if preset is not None:
        one_of("SoKD", "preset", preset, tuple(filter(None, PRESETS)))
    chosen = {
        name: value if given.get(name, "default") == "default" else given[name]
        for name, value in PRESETS[preset].items()
    }
    one_of("SoKD", "heads", chosen["heads"], _HEADS)
    one_of("SoKD", "base", chosen["base"], _BASES)
    weight = given.get("lambda_base", "default")
    if chosen["base"] == "replace" and weight != "default":
        rule = "be left out with base='replace', which has no such term"
        raise ValueError(f"SoKD: lambda_base must {rule}, got {weight!r}")
    if chosen["search"] is not None:
        one_of("SoKD", "search", chosen["search"], ("online",))
        if given.get("granularity", "default") == "default":
            chosen["granularity"] = "sample"  # the search learns most from many draws
    if isinstance(chosen["adapter"], str):
        one_of("SoKD", "adapter", chosen["adapter"], KINDS)
    return chosen


def check_left_out(part: str, given: Mapping[str, Any], of: type) -> None:
    """Refuse options that make a part which is given instead, as None or a module.

    Args:
        given: the options; those that are the defaults of `of` count as left out.

    Raises:
        ValueError: `SoKD: {option} must be left out ..., got {value}`.
    """
    parameters = inspect.signature(of).parameters
    for name, value in given.items():
        if value is not parameters[name].default and value != parameters[name].default:
            rule = f"be left out with {part}=, which it does not change"
            raise ValueError(f"SoKD: {name} must {rule}, got {value!r}")


def adapters_of(
    kind: str, student_channels: Sequence[int], teacher_channels: Sequence[int],
    student_size: Any, teacher_size: Any,
) -> nn.Module:  # fmt: skip
    """One `Adapter` for each layer."""
    sizes = {"student_size": student_size, "teacher_size": teacher_size}
    columns = (per_layer(name, size, len(student_channels)) for name, size in sizes.items())
    rows = zip(student_channels, teacher_channels, *columns, strict=True)
    return _one_or_list(
        Adapter(*channels, student_size=of_student, teacher_size=of_teacher, kind=kind)
        for *channels, of_student, of_teacher in rows
    )


def dams_of(
    heads: str, channels: Sequence[int], options: Mapping[str, Any], own: Mapping[str, Any]
) -> nn.Module:
    """The DAM of each layer.

    Args:
        channels: the teacher's in each layer.
        options: of every DAM.
        own: `heat_channels` of trained heads, `attention_temperature` of attention; None: not
            given. The other kind's is refused.
    """
    names, of_attention = ("attention_temperature", "heat_channels"), heads == "attention"
    name, other = names if of_attention else names[::-1]
    if own[other] is not None:
        rule = f"be left out with heads={heads!r}, which has no such option"
        raise ValueError(f"SoKD: {other} must {rule}, got {own[other]!r}")
    given = {} if own[name] is None else {name.removeprefix("attention_"): own[name]}
    if of_attention:
        return _one_or_list(AttentionDAM(**options, **given) for _ in channels)
    return _one_or_list(DAM(count, heads=heads, **options, **given) for count in channels)


def channel_lists(
    student: int | Sequence[int], teacher: int | Sequence[int]
) -> tuple[list[int], list[int]]:
    students = _channel_list("student_channels", student)
    teachers = _channel_list("teacher_channels", teacher)
    if len(students) != len(teachers):
        rule = f"be as many as student_channels ({len(students)})"
        raise ValueError(f"SoKD: teacher_channels must {rule}, got {len(teachers)}")
    return students, teachers


def _channel_list(name: str, channels: int | Sequence[int]) -> list[int]:
    given = list(channels) if isinstance(channels, Sequence) else [channels]
    if not given or not all(isinstance(count, numbers.Integral) and count > 0 for count in given):
        rule = "be a positive number or a list of them"
        raise ValueError(f"SoKD: {name} must {rule}, got {channels!r}")
    return [int(count) for count in given]


def _one_or_list(parts: Iterable[nn.Module]) -> nn.Module:
    modules = list(parts)
    return modules[0] if len(modules) == 1 else nn.ModuleList(modules)


def policy_or_none(given: Any) -> Policy | None:
    """A policy, compiled or not."""
    if given is None or isinstance(unwrapped(given), Policy):
        return cast("Policy | None", given)
    raise TypeError(f"SoKD: policy must be 'default', None or a sokd.Policy, got {_named(given)}")


def search_or_none(search: str | None, policy: Policy | None) -> OnlineSearch | None:
    if search is None:
        return None
    if policy is None:
        rule = "be None for a SoKD without a policy"
        raise ValueError(f"SoKD: search must {rule}, got {search!r}")
    return OnlineSearch(unwrapped(policy))


def part_or_none(name: str, given: Any, layers: int) -> nn.Module | None:
    """An adapter or a DAM, or a list of them, that can be called as the loss calls it."""
    modules = [given]
    if isinstance(given, nn.ModuleList):
        modules = per_layer(name, list(given), layers)
    for module in [] if given is None else modules:
        if not isinstance(module, nn.Module):
            rule = "be 'default', None or an nn.Module"
            raise TypeError(f"SoKD: {name} must {rule}, got {_named(module)}")
        places, keywords = _CALLS[name]
        if not _takes(module, places, keywords):
            call = ", ".join([*places, *(f"{keyword}=..." for keyword in keywords)])
            raise TypeError(f"SoKD: {name} must take ({call}), got {_named(module)}")
    return cast("nn.Module | None", given)


def _named(given: Any) -> str:
    return repr(given) if isinstance(given, str) else type(given).__name__


def _takes(module: nn.Module, places: Sequence[str], keywords: Sequence[str]) -> bool:
    """Whether the module's signature allows such a call, or cannot be read."""
    if not has_forward(module):
        return False
    try:
        inspect.signature(module.forward).bind(*places, **dict.fromkeys(keywords))
    except TypeError:
        return False
    except ValueError:
        return True
    return True
