"""The silent mistakes of a training script, said aloud: a warning once for each SoKD, naming the fix.

Everything here reads metadata (version counters, graph nodes), or values where they lie in the CPU's memory.
Nothing is looked at under `torch.compile`, `torch.no_grad()`, a functorch transform or a dispatch mode.
"""

from __future__ import annotations

import itertools
import sys
import warnings
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sokd.ops import torch_internals
from sokd.ops.runtime import is_eager

if TYPE_CHECKING:
    from sokd.kd.loss import Features
    from sokd.kd.sokd import SoKD

__all__ = ["look", "look_at_mask", "look_for_updates", "remember", "transformed"]

PATIENCE = 10  # steps in a row before a mistake is taken for one

UNHELD = (
    "sokd: {parts} had gradients but did not change in {steps} steps of the student's optimiser; "
    "give it kd's parameters too, e.g. SGD([*student.parameters(), *kd.parameters()], lr=...)"
)
TEACHER_GRAPH = (
    "sokd: teacher_features require grad, but no gradient flows to the teacher; call the teacher under "
    "torch.no_grad()"
)
# Seen in the teacher's graph alone; under torch.no_grad() train mode leaves no sign in the features.
TEACHER_TRAINS = (
    "sokd: the teacher ran in train mode; call teacher.eval() before the student's training"
)
MASK_FULL = (
    "sokd: the areas covered every cell for {steps} steps, so the mask selects nothing; "
    "use larger maps, a lower k or dam=None"
)
MASK_EMPTY = (
    "sokd: the areas covered no cell for {steps} steps, so no feature is distilled; "
    "look for NaN in the features or in kd.dam, and lower the learning rate"
)


@dataclass
class _Seen:
    """A parameter as it was when it was looked at."""

    name: str  # of the part of kd that it belongs to
    parameter: weakref.ref[Tensor]
    version: int
    values: list[float]
    steps: int = 0  # the student's optimiser steps that left the parameter as it was

    @classmethod
    def of(cls, name: str, parameter: Tensor) -> _Seen:
        return cls(name, weakref.ref(parameter), parameter._version, _some_values(parameter))


@dataclass
class _Memory:
    """What is remembered of one SoKD between two of its steps."""

    said: set[str] = field(default_factory=set)
    student: _Seen | None = None
    watched: list[_Seen] = field(default_factory=list)  # of kd, one parameter of each submodule
    held: set[str] = field(default_factory=set)  # parts of kd of which something was updated
    full: int = 0
    empty: int = 0


# Beside the module, not in it: copies and pickles start afresh.
_memories: weakref.WeakKeyDictionary[nn.Module, _Memory] = weakref.WeakKeyDictionary()


def transformed() -> bool:
    """Whether a functorch transform runs eagerly: nothing may be kept from inside it."""
    return not torch.compiler.is_compiling() and torch_internals.is_transforming()


def look(kd: SoKD, student_features: Features, teacher_features: Features) -> None:
    """Look at one training step of `kd`, whose statistics are just recorded."""
    if not is_eager(kd.statistics) or not torch.is_grad_enabled():
        return
    memory = _memories.setdefault(kd, _Memory())
    _look_at_teacher(memory, _tensors(teacher_features))
    _look_at_optimiser(kd, memory, _tensors(student_features))
    _look_at_mask(kd, memory)


def look_at_mask(kd: SoKD) -> None:
    """Look at the mask alone, of a step whose statistics are just recorded."""
    if is_eager(kd.statistics):
        _look_at_mask(kd, _memories.setdefault(kd, _Memory()))


def _tensors(features: Features) -> list[Tensor]:
    return [features] if isinstance(features, Tensor) else list(features)


def _say(memory: _Memory, text: str, **values: Any) -> None:
    """Warn once, at the user's own line."""
    if text in memory.said:
        return
    memory.said.add(text)
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in ("sokd", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(text.format(**values), stacklevel=level)


# ------------------------------------------------------------------------------------------------ the teacher


def _look_at_teacher(memory: _Memory, teachers: list[Tensor]) -> None:
    """Features alone show a teacher's mode only through its graph; without one, nothing can be said."""
    if not any(teacher.requires_grad for teacher in teachers) or TEACHER_GRAPH in memory.said:
        return
    _say(memory, TEACHER_GRAPH)
    if any(_trains(node) for node in _nodes(teachers)):
        _say(memory, TEACHER_TRAINS)


def _trains(node: Any) -> bool:
    name = node.name()
    return "NativeDropout" in name or (
        "BatchNorm" in name and bool(getattr(node, "_saved_training", False))
    )


def _nodes(outputs: Iterable[Tensor]) -> Iterator[Any]:
    """The nodes of the autograd graph behind the outputs, nearest first."""
    waiting = deque(output.grad_fn for output in outputs if output.grad_fn is not None)
    seen: set[Any] = set(waiting)
    while waiting:
        node = waiting.popleft()
        yield node
        fresh = [
            following
            for following, _ in node.next_functions
            if following is not None and following not in seen
        ]
        seen.update(fresh)
        waiting.extend(fresh)


# ---------------------------------------------------------------------------------------------- the optimiser


def _look_at_optimiser(kd: SoKD, memory: _Memory, students: list[Tensor]) -> None:
    if memory.student is not None:
        look_for_updates(memory, UNHELD)
        return
    leaves = (getattr(node, "variable", None) for node in _nodes(students))
    student = next((leaf for leaf in leaves if leaf is not None), None)
    remember(memory, student, {f"kd.{name}": getattr(kd, name) for name in ("adapter", "dam")})


def remember(
    memory: _Memory, student: Tensor | None, parts: Mapping[str, nn.Module | None]
) -> None:
    """Start to watch a parameter of the student, and one of each submodule of the parts."""
    if student is None:
        return
    memory.student = _Seen.of("student", student)
    for name, part in parts.items():
        for module in [] if part is None else part.modules():
            trained = (p for p in module.parameters(recurse=False) if p.requires_grad and p.is_leaf)
            memory.watched += [
                _Seen.of(name, parameter) for parameter in itertools.islice(trained, 1)
            ]


def look_for_updates(memory: _Memory, text: str) -> None:
    """Say of a student that is updated while a part with gradients never is: no optimiser holds that part.

    An update is a new version of the parameter, or new values: a fused optimiser makes no version. On other
    devices than the CPU, where values are not looked at, a student under a fused optimiser seems to rest.
    """
    student = None if memory.student is None else memory.student.parameter()
    if memory.student is None or student is None or not memory.watched:
        return
    if not _is_updated(memory.student, student):
        return
    memory.student = _Seen.of("student", student)
    memory.watched = [seen for seen in memory.watched if _is_left_behind(memory, seen)]
    late = [seen for seen in memory.watched if seen.steps >= PATIENCE]
    if late:
        parts = dict.fromkeys(
            f"parts of {s.name}" if s.name in memory.held else s.name for s in late
        )
        _say(memory, text, parts=" and ".join(parts), steps=PATIENCE)
        memory.watched = []


def _is_updated(seen: _Seen, parameter: Tensor) -> bool:
    return parameter._version != seen.version or _some_values(parameter) != seen.values


def _is_left_behind(memory: _Memory, seen: _Seen) -> bool:
    """Whether no optimiser may hold the parameter still, after another step of the student's."""
    parameter = seen.parameter()
    if parameter is None or parameter._version != seen.version:
        memory.held.add(seen.name)
        return False
    seen.steps += (
        parameter.grad is not None
    )  # `zero_grad` of an optimiser that holds it leaves None
    if seen.steps < PATIENCE or parameter.grad is None:
        return True
    if _some_values(parameter) != seen.values:  # not sooner: once is cheap
        memory.held.add(seen.name)
        return False
    # zeros: an optimiser's `zero_grad(set_to_none=False)`, or a loss that does not depend on it
    return parameter.device.type != "cpu" or bool(parameter.grad.any())


def _some_values(parameter: Tensor) -> list[float]:
    """At most 64 values from all over the parameter's memory; none on other devices than the CPU."""
    if parameter.device.type != "cpu" or not is_eager(parameter):
        return []
    own = parameter.untyped_storage().nbytes() // parameter.itemsize - parameter.storage_offset()
    count = min(parameter.numel(), own)
    step = count // 64 | 1  # odd, so as not to meet the same input channel in every row
    return parameter.detach().as_strided((-(-count // step),), (step,)).tolist()


# --------------------------------------------------------------------------------------------------- the mask


def _look_at_mask(kd: SoKD, memory: _Memory) -> None:
    """Count steps in a row in which the areas of every sample cover all, or nothing. On the CPU alone."""
    if kd.dam is None or kd.statistics.device.type != "cpu":
        return
    shares: list[float] = kd.statistics[:, -1].tolist()
    memory.full = memory.full + 1 if max(shares) >= 1 else 0
    memory.empty = memory.empty + 1 if min(shares) <= 0 else 0
    if memory.full == PATIENCE:
        _say(memory, MASK_FULL, steps=PATIENCE)
    if memory.empty == PATIENCE:
        _say(memory, MASK_EMPTY, steps=PATIENCE)
