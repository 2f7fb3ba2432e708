"""What `SoKD` is made of, checked: channels, weights, the layers' layouts and sizes, parts of one's own."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any, cast

from torch import Tensor, nn

from sokd.kd.policy import Policy
from sokd.kd.virtual import unwrapped

# How the loss calls a part: by place, by keyword.
_CALLS = {"adapter": (["student"], []), "dam": (["student", "refined"], ["scale"])}


def described(value: Any) -> str:
    """A value as an error names it."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return "none" if value is None else type(value).__name__


def one_or_list(parts: Iterable[nn.Module]) -> nn.Module:
    modules = list(parts)
    return modules[0] if len(modules) == 1 else nn.ModuleList(modules)


def channel_pairs(
    student: int | Sequence[int], teacher: int | Sequence[int]
) -> list[tuple[int, int]]:
    students, teachers = (
        _channels("student_channels", student),
        _channels("teacher_channels", teacher),
    )
    if len(students) != len(teachers):
        rule = f"be as many as student_channels ({len(students)})"
        raise ValueError(f"SoKD: teacher_channels must {rule}, got {len(teachers)}")
    return list(zip(students, teachers, strict=True))


def _channels(name: str, channels: int | Sequence[int]) -> list[int]:
    given = list(channels) if isinstance(channels, Sequence) else [channels]
    if not given or not all(isinstance(count, numbers.Integral) and count > 0 for count in given):
        raise ValueError(
            f"SoKD: {name} must be a positive number or a list of them, got {channels!r}"
        )
    return [int(count) for count in given]


def term_weight(name: str, value: float) -> float:
    if not isinstance(value, numbers.Real) or not 0 <= value < math.inf:
        raise ValueError(f"SoKD: {name} must be a finite number, 0 or more, got {value!r}")
    return float(value)


def policy_or_none(given: Any) -> Policy | None:
    """A policy, also a compiled one."""
    if given is None or isinstance(unwrapped(given), Policy):
        return cast("Policy | None", given)
    raise TypeError(f"SoKD: policy must be 'default', None or a sokd.Policy, got {_named(given)}")


def part_or_none(name: str, given: Any, layers: int) -> nn.Module | None:
    """An adapter or a DAM, or a list of them, that can be called as the loss does."""
    modules = (
        _for_layers(name, list(given), layers) if isinstance(given, nn.ModuleList) else [given]
    )
    for module in [] if given is None else modules:
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"SoKD: {name} must be 'default', None or an nn.Module, got {_named(module)}"
            )
        if not _takes(module, *_CALLS[name]):
            call = ", ".join([*_CALLS[name][0], *(f"{keyword}=..." for keyword in _CALLS[name][1])])
            raise TypeError(f"SoKD: {name} must take ({call}), got {_named(module)}")
    return cast("nn.Module | None", given)


def _named(given: Any) -> str:
    return repr(given) if isinstance(given, str) else type(given).__name__


def _takes(module: nn.Module, places: Sequence[str], keywords: Sequence[str]) -> bool:
    """Whether the module's signature allows such a call, or does not tell."""
    if getattr(module.forward, "__name__", "") == "_forward_unimplemented":
        return False
    try:
        inspect.signature(module.forward).bind(*places, **dict.fromkeys(keywords))
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def _for_layers(name: str, value: Any, layers: int) -> list[Any]:
    if not isinstance(value, list):
        return [value] * layers
    if len(value) != layers:
        raise ValueError(
            f"SoKD: {name} must have one entry for each of the {layers} layers, got {len(value)}"
        )
    return list(value)


def layouts(side: str, tokens: Any, grid: Any, layers: int) -> list[dict[str, Any]]:
    """The layers' arguments for `tokens_to_map`."""
    counts, grids = (
        _for_layers(f"{side}_tokens", tokens, layers),
        _for_layers(f"{side}_grid", grid, layers),
    )
    for of in grids:
        if of is not None and not _is_grid(of):
            raise ValueError(
                f"SoKD: {side}_grid must be (H, W), both positive, for each layer, got {of!r}"
            )
    for count in counts:
        if count is not None and (not isinstance(count, int) or count < 0):
            raise ValueError(
                f"SoKD: {side}_tokens must be a whole number, 0 or more, for each layer, got {count!r}"
            )
    named: dict[str, Any] = {"op": "loss", "name": f"{side}_features"}
    return [{"tokens": count, "grid": of, **named} for count, of in zip(counts, grids, strict=True)]


def _is_grid(grid: Any) -> bool:
    pair = isinstance(grid, Sequence) and len(grid) == 2
    return pair and all(isinstance(side, int) and side > 0 for side in grid)


def sizes(student: Any, teacher: Any, layers: int) -> list[dict[str, Any]]:
    """The layers' arguments for `Adapter`."""
    of_student, of_teacher = (
        _for_layers(f"{side}_size", size, layers)
        for side, size in (("student", student), ("teacher", teacher))
    )
    return [
        {"student_size": s, "teacher_size": t} for s, t in zip(of_student, of_teacher, strict=True)
    ]
