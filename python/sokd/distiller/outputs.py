"""How a model is called, and what is read from its output: logits, and losses that it computes itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any, Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sokd.kd.arguments import described
from sokd.methods.common import Step

__all__ = [
    "Logits",
    "Task",
    "call",
    "check_needs",
    "checked_task",
    "find_logits",
    "is_for_model",
    "labels_of",
    "own_losses",
    "task_losses",
]

# How logits are found: a key or an index of the output, or a function of it; None: where they usually are.
Logits: TypeAlias = str | int | Callable[[Any], Tensor] | None
# The task's loss: see `sokd.Distiller`.
Task: TypeAlias = Literal["auto", "model"] | Callable[[Any, Any], Tensor] | None

_USUAL_KEYS = ("logits", "out")  # Hugging Face; torchvision's segmentation models


def call(model: nn.Module, x: Any, *target: Any) -> Any:
    """model(**x) for a dict (as Hugging Face's models are called), else model(x, *target)."""
    return model(**x) if isinstance(x, Mapping) else model(x, *target)


def is_for_model(target: Any) -> bool:
    """Whether a target can only be meant for the model itself: torchvision's detectors take a list of
    dicts."""
    return isinstance(target, (list, tuple)) and len(target) > 0 and isinstance(target[0], Mapping)


def own_losses(output: Any) -> dict[str, Tensor]:
    """The losses that a model computed itself: a dict of scalars alone, or the entry "loss" of any output.

    Named `loss_<key>`, or by a key that says so already; the entry "loss" is `loss_task`.
    """
    if _only_losses(output):
        return {_loss_name(str(key)): value for key, value in output.items()}
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return {"loss_task": loss} if isinstance(loss, Tensor) and loss.dim() == 0 else {}


def _only_losses(output: Any) -> bool:
    return (
        isinstance(output, Mapping)
        and len(output) > 0
        and all(isinstance(value, Tensor) and value.dim() == 0 for value in output.values())
    )


def _loss_name(key: str) -> str:
    return "loss_task" if key == "loss" else key if key.startswith("loss") else f"loss_{key}"


def find_logits(output: Any, where: Logits = None, *, guess: bool = True) -> Tensor | None:
    """The logits in a model's output; None where there are none.

    Without `where`: the output itself, its entry or attribute "logits" or "out", else, as a guess, its first
    tensor that is no scalar; None where another is [B, D] and that one a map, or [B, D] of another D:
    features and logits, in an order that only the user knows. A tensor has no entries: it is the logits.

    Raises:
        TypeError, ValueError: `where` leads to no tensor.
    """
    if _only_losses(output):
        return None
    if where is not None and (callable(where) or not isinstance(output, Tensor)):
        return _selected(output, where)
    if isinstance(output, Tensor):
        return output if output.dim() else None
    for key in _USUAL_KEYS:
        value = output.get(key) if isinstance(output, Mapping) else getattr(output, key, None)
        if isinstance(value, Tensor):
            return value
    return _first_tensor(output) if guess else None


def _first_tensor(output: Any) -> Tensor | None:
    tensors = _tensors(output)
    flat = [each for each in tensors if each.dim() == 2]
    doubtful = flat and (tensors[0].dim() > 2 or len({each.shape[1] for each in flat}) > 1)
    return None if not tensors or doubtful else tensors[0]


def _tensors(output: Any) -> list[Tensor]:
    """The tensors, no scalars, among the entries of an output."""
    values = output.values() if isinstance(output, Mapping) else output
    is_entries = isinstance(output, (Mapping, tuple, list))
    return (
        [each for each in values if isinstance(each, Tensor) and each.dim()] if is_entries else []
    )


def _selected(output: Any, where: Logits) -> Tensor:
    try:
        found = where(output) if callable(where) else _entry(output, where)
    except (KeyError, IndexError, AttributeError, TypeError):
        entries = (
            ", ".join(map(repr, output)) if isinstance(output, Mapping) else type(output).__name__
        )
        rule = "name what the models give"
        raise ValueError(
            f"Distiller: logits must {rule} ({entries}), got {getattr(where, '__name__', repr(where))}"
        ) from None
    if not isinstance(found, Tensor):
        rule = f"lead to a tensor of the {type(output).__name__} that the model gives"
        raise TypeError(f"Distiller: logits must {rule}, got {type(found).__name__}")
    return found


def _entry(output: Any, where: Any) -> Any:
    if isinstance(where, str) and not isinstance(output, Mapping):
        return getattr(output, where)
    return output[where]


# -------------------------------------------------------------------------------------------------- the task


def checked_task(task: Any) -> Task:
    """`task=`, if it is one."""
    if task is None or task in ("auto", "model") or callable(task):
        return cast(Task, task)
    raise TypeError(
        f"Distiller: task must be 'auto', 'model', None or a callable (logits, y), got {task!r}"
    )


def task_losses(task: Task, output: Any, logits: Tensor | None, target: Any) -> dict[str, Tensor]:
    """The task's terms: the model's own, a callable's, or cross entropy; none without a target.

    Raises:
        TypeError: no logits to compute them from, or no losses where the model should have returned them.
    """
    own = own_losses(output) if task in ("auto", "model") else {}
    if own or target is None or task is None:
        return own
    if task == "model":
        rule = "be one that the student computes itself ('model'): a dict of scalars, or an output with a loss"
        raise TypeError(f"Distiller: task must {rule}, got {type(output).__name__}")
    if callable(task):
        return {"loss_task": task(output if logits is None else logits, target)}
    if logits is None:
        rule = "be in what the student returns (name them by logits=, or the loss by task=)"
        parts = ", ".join(map(described, _tensors(output)))
        got = type(output).__name__ + (f" of {parts}" if parts else "")
        raise TypeError(f"Distiller: logits must {rule}, got {got}")
    return {"loss_ce": _cross_entropy(logits, target)}


def _cross_entropy(logits: Tensor, target: Any) -> Tensor:
    if torch.compiler.is_compiling():
        return F.cross_entropy(logits, target)
    classes = list(logits.shape)
    cells = [*classes[:1], *classes[2:]]
    own = f"class indices {cells} (int64) or probabilities {classes} (float)"
    _check_target(
        logits, target, f"be {own}, as the logits {classes} ask for (others: logits=, task=)"
    )
    try:
        return F.cross_entropy(logits, target)
    except IndexError as error:  # seen on the CPU, where reading them is free
        rule = f"be class indices 0 .. {classes[1] - 1}, as the logits {classes} have"
        raise ValueError(f"Distiller: target must {rule}, got {int(target.max())}") from error


def _check_target(logits: Tensor, target: Any, rule: str) -> None:
    """Whether a cross entropy can be made of the two.

    Raises:
        TypeError, ValueError: it cannot.
    """
    if not isinstance(target, Tensor):
        raise TypeError(f"Distiller: target must {rule}, got {type(target).__name__}")
    if logits.dim() < 2:
        ours = "be [B, K] for the cross entropy (name them by logits=, or another loss by task=)"
        raise ValueError(f"Distiller: logits must {ours}, got {list(logits.shape)}")
    shape = logits.shape if target.is_floating_point() else logits.shape[:1] + logits.shape[2:]
    if not target.is_floating_point() and target.dtype not in (torch.int64, torch.uint8):
        raise TypeError(f"Distiller: target must {rule}, got {target.dtype}")
    if target.shape != shape:
        raise ValueError(f"Distiller: target must {rule}, got {described(target)}")
    if target.device != logits.device:
        raise ValueError(
            f"Distiller: target must be on the logits' device, {logits.device}, got {target.device}"
        )


def labels_of(target: Any) -> Tensor | None:
    """The target, if it is class indices [B]."""
    is_labels = isinstance(target, Tensor) and target.dim() == 1 and not target.is_floating_point()
    return target if is_labels else None


_HINTS = {
    "logits": "logits must be found in what both models return for method {name!r} (name them by logits=)",
    "target": "target must be class indices [B] for method {name!r}, as in distiller(x, y)",
    "index": "index must be the samples' places in the training set, int64 [B], for method {name!r}, as in "
    "distiller(x, y, index=i)",
}


def check_needs(name: str, needs: Set[str], step: Step, target: Any) -> None:
    """Whether the step holds what the method needs.

    Raises:
        ValueError: it does not; says what to pass.
    """
    has = {
        "logits": step.student_logits is not None and step.teacher_logits is not None,
        "target": step.target is not None,
        "index": step.index is not None,
    }
    for need, hint in _HINTS.items():
        if need in needs and not has[need]:
            got = described(target if need == "target" else None)
            raise ValueError(f"Distiller: {hint.format(name=name)}, got {got}")
