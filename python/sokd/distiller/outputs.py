"""Calls of a model, and the logits and losses in its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any, Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sokd.kd.features import described
from sokd.kd.sanity import is_made_of, leaves
from sokd.methods.checks import wrong_class
from sokd.methods.common import Step
from sokd.ops.runtime import is_eager

__all__ = [
    "Logits",
    "Task",
    "call",
    "check_needs",
    "checked_task",
    "entries",
    "find_logits",
    "is_for_model",
    "labels_of",
    "own_losses",
    "task_losses",
    "untrained_entries",
]

# Where the logits are: a key or an index of the output, or a function of it; None: the usual keys.
Logits: TypeAlias = str | int | Callable[[Any], Tensor] | None
# The task's loss: see `sokd.Distiller`.
Task: TypeAlias = Literal["auto", "model"] | Callable[[Any, Any], Tensor] | None

_USUAL_KEYS = ("logits", "out")  # Hugging Face; torchvision's segmentation models


def call(model: nn.Module, x: Any, *target: Any) -> Any:
    """model(**x) for a dict (the convention of Hugging Face), else model(x, *target)."""
    return model(**x) if isinstance(x, Mapping) else model(x, *target)


def is_for_model(target: Any) -> bool:
    """Whether a target is an argument of the model, as for torchvision's detectors."""
    return isinstance(target, (list, tuple)) and len(target) > 0 and isinstance(target[0], Mapping)


def own_losses(output: Any) -> dict[str, Tensor]:
    """The losses that a model computed itself: the entry "loss" of an output, or a dict of scalars.

    Of a dict of scalars the terms are the entries with "loss" in their names, or all if none has;
    those without a gradient beside others with one are figures to log, and so are the parts that
    "loss" is computed from. The names are `loss_<key>`, or the key if it begins with "loss"; "loss"
    becomes `loss_task`.

    Raises:
        ValueError: it is not clear which scalars are terms.
    """
    if _only_losses(output):
        return {_loss_name(key): value for key, value in _terms(output).items()}
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return {"loss_task": loss.reshape(())}
    return {}


def _terms(output: Mapping[Any, Tensor]) -> dict[str, Tensor]:
    """The losses among the scalars of a dict."""
    scalars = {str(key): value for key, value in output.items()}
    losses = {key: value for key, value in scalars.items() if "loss" in key.lower()} or scalars
    trained = [key for key, value in scalars.items() if value.requires_grad]
    if not trained:
        return {"loss": losses["loss"]} if "loss" in losses else losses
    unnamed = [key for key in trained if key not in losses]
    if unnamed:
        rule = "have 'loss' in the names of its losses, and its other scalars detached"
        raise ValueError(f"Distiller: the student's output must {rule}, got {unnamed[0]!r}")
    if "loss" not in trained or len(trained) == 1:
        return {key: losses[key] for key in trained}
    parts = [losses[key] for key in trained if key != "loss"]
    if not torch.compiler.is_compiling() and not is_made_of(losses["loss"], parts):
        rule = "have a 'loss' that is computed from its other losses, or another name for it"
        got = ", ".join(map(repr, trained))
        raise ValueError(f"Distiller: the student's output must {rule}, got {got}")
    return {"loss": losses["loss"]}


def _only_losses(output: Any) -> bool:
    return (
        isinstance(output, Mapping)
        and len(output) > 0
        and all(isinstance(value, Tensor) and value.dim() == 0 for value in output.values())
    )


def _loss_name(key: str) -> str:
    return "loss_task" if key == "loss" else key if key.startswith("loss") else f"loss_{key}"


def entries(output: Any) -> dict[str, Any]:
    """The entries of a dict, tuple, list or object with attributes, by key, index or name."""
    if isinstance(output, Tensor):
        return {}
    if isinstance(output, Mapping):
        items: Any = output.items()
    elif isinstance(output, (tuple, list)):
        items = zip(getattr(output, "_fields", range(len(output))), output, strict=True)
    else:
        items = getattr(output, "__dict__", {}).items()
    return {str(key): value for key, value in items}


def find_logits(
    output: Any, where: Logits = None, *, guess: bool = True, strict: bool = True
) -> Tensor | None:
    """The logits in a model's output; None where there are none.

    Without `where`: the output itself, its entry or attribute "logits" or "out", else, as a guess,
    its first tensor that is not a scalar; None if there is a second [B, D] and the first is a map,
    or [B, D] of another D: features and logits in an unknown order. A tensor is the logits itself.

    Raises:
        TypeError, ValueError: `where` selects nothing or, if `strict`, something other than a
            tensor.
    """
    if _only_losses(output):
        return None
    if where is not None and (callable(where) or not isinstance(output, Tensor)):
        found = picked(output, where)
        if strict and not isinstance(found, Tensor):
            rule = f"select a tensor of the {type(output).__name__} that the model returns"
            raise TypeError(f"Distiller: logits must {rule}, got {type(found).__name__}")
        return found if isinstance(found, Tensor) else None
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
    """The tensors that are not scalars among the entries of a dict, tuple or list."""
    values = entries(output).values() if isinstance(output, (Mapping, tuple, list)) else ()
    return [each for each in values if isinstance(each, Tensor) and each.dim()]


def picked(output: Any, where: Logits) -> Any:
    """The part of an output that `logits=` selects.

    Raises:
        ValueError: there is no such part.
    """
    try:
        if callable(where):
            return where(output)
        is_attribute = isinstance(where, str) and not isinstance(output, Mapping)
        return getattr(output, where) if is_attribute else output[where]  # type: ignore[arg-type]
    except (KeyError, IndexError, AttributeError, TypeError):
        names = entries(output) if isinstance(output, Mapping) else [type(output).__name__]
        got = getattr(where, "__name__", repr(where))
        rule = f"select from the models' output ({', '.join(map(repr, names))})"
        raise ValueError(f"Distiller: logits must {rule}, got {got}") from None


def untrained_entries(output: Any, logits: Tensor | None) -> tuple[str, list[str]] | None:
    """The entry taken as the logits, and others of its width that get no gradient from it.

    Next to one of the usual names, an entry counts if it has parameters that the logits do not; if
    the first tensor was guessed, all entries of its width count.
    """
    of_width = {
        name: value
        for name, value in entries(output).items()
        if isinstance(value, Tensor) and value.dim() > 1 and value.requires_grad
        and logits is not None and value.shape[1] == logits.shape[1]
    }  # fmt: skip
    taken = next((name for name, value in of_width.items() if value is logits), None)
    if taken is None or logits is None:
        return None
    rest = {name: value for name, value in of_width.items() if value is not logits}
    if taken in _USUAL_KEYS:
        reached = {id(leaf) for leaf in leaves([logits])}
        rest = {
            name: value
            for name, value in rest.items()
            if any(id(leaf) not in reached for leaf in leaves([value]))
        }
    return (taken, list(rest)) if rest else None


# ----------------------------------------------------------------------------------------- the task


def checked_task(task: Any) -> Task:
    """`task=`, checked."""
    if task is None or task in ("auto", "model") or callable(task):
        return cast(Task, task)
    raise TypeError(
        f"Distiller: task must be 'auto', 'model', None or a callable (logits, y), got {task!r}"
    )


def task_losses(
    task: Task, output: Any, logits: Tensor | None, target: Any, *, where: Logits = None,
    look: bool = True,
) -> dict[str, Tensor]:  # fmt: skip
    """The task's terms: the model's own, a callable's, or cross entropy; none without a target.

    Args:
        output, logits: the student's output, and the logits in it.
        where: `logits=`; a callable is called with that part of the output, or with all of it.
        look: whether the rows of soft targets are checked (on the CPU only).

    Raises:
        TypeError: no logits to compute them from, or no losses where the model should have
            returned them.
        ValueError: logits or a target for which cross entropy is undefined.
    """
    own = own_losses(output) if task in ("auto", "model") else {}
    if own or target is None or task is None:
        return own
    if task == "model":
        rule = "be one that the student computes itself ('model'): a dict of scalars, or an output "
        rule += "with a loss"
        raise TypeError(f"Distiller: task must {rule}, got {type(output).__name__}")
    if callable(task):
        named = where is not None and (callable(where) or not isinstance(output, Tensor))
        return {"loss_task": _called(task, picked(output, where) if named else output, target)}
    if logits is None:
        rule = "be in what the student returns (name them by logits=, or the loss by task=)"
        parts = ", ".join(map(described, _tensors(output)))
        got = type(output).__name__ + (f" of {parts}" if parts else "")
        raise TypeError(f"Distiller: logits must {rule}, got {got}")
    return {"loss_ce": _cross_entropy(logits, target, look)}


def _called(task: Callable[[Any, Any], Tensor], output: Any, target: Any) -> Tensor:
    """The loss of a callable, a scalar."""
    try:
        loss = task(output, target)
    except (TypeError, AttributeError) as error:
        if isinstance(output, Tensor):
            raise
        rule = "accept the student's output (logits= selects a part of it)"
        got = f"{type(output).__name__}: {error}"
        raise TypeError(f"Distiller: task must {rule}, got {got}") from error
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"Distiller: task must return a scalar tensor, got {got}")
    return loss.reshape(())


OTHER_LOSSES = (
    "task=F.mse_loss for numbers, task=F.binary_cross_entropy_with_logits for several labels per "
    "sample"
)


_IGNORED = -100  # of `F.cross_entropy`, which is 0 / 0 without another label
_ROUNDING = 0.02  # of a row of probabilities that was once in half precision


def _cross_entropy(logits: Tensor, target: Any, look: bool) -> Tensor:
    if logits.dim() > 1 and logits.shape[1] == 1:
        rule = f"have 2 classes or more for the cross entropy ({OTHER_LOSSES})"
        raise ValueError(f"Distiller: logits must {rule}, got {list(logits.shape)}")
    if torch.compiler.is_compiling():
        return F.cross_entropy(logits, target)
    classes = list(logits.shape)
    cells = [*classes[:1], *classes[2:]]
    own = f"class indices {cells} (int64) or probabilities {classes} (float)"
    rule = f"be {own} for the logits {classes} (others: logits=, task=)"
    _check_target(logits, target, rule)
    if look and target.is_floating_point():
        _check_probabilities(target)
    if target.device.type == "cpu" and is_eager(target) and _is_unlabelled(target):
        rule = "hold a label (None for a batch without any)"
        raise ValueError(f"Distiller: target must {rule}, got {_IGNORED} in every place")
    try:
        return F.cross_entropy(logits, target)
    except IndexError as error:  # raised on the CPU only, where the target can be read
        raise ValueError(f"Distiller: {wrong_class(target, classes[1])}") from error


def _is_unlabelled(target: Tensor) -> bool:
    return not target.is_floating_point() and bool((target == _IGNORED).all())


def _check_target(logits: Tensor, target: Any, rule: str) -> None:
    """Raise TypeError or ValueError unless the cross entropy of the two is defined."""
    if not isinstance(target, Tensor):
        raise TypeError(f"Distiller: target must {rule}, got {type(target).__name__}")
    if logits.dim() < 2:
        two = "be [B, K] for the cross entropy (select them by logits=, or another loss by task=)"
        raise ValueError(f"Distiller: logits must {two}, got {list(logits.shape)}")
    shape = logits.shape if target.is_floating_point() else logits.shape[:1] + logits.shape[2:]
    if not target.is_floating_point() and target.dtype not in (torch.int64, torch.uint8):
        raise TypeError(f"Distiller: target must {rule}, got {target.dtype}")
    if target.shape != shape:
        raise ValueError(f"Distiller: target must {rule}, got {described(target)}")
    if target.device != logits.device:
        rule = f"be on the logits' device, {logits.device}"
        raise ValueError(f"Distiller: target must {rule}, got {target.device}")


def _check_probabilities(target: Tensor) -> None:
    """Raise ValueError for soft targets whose rows are not probabilities, on the CPU only."""
    if target.device.type != "cpu" or not is_eager(target) or target.numel() == 0:
        return
    rows = target.detach().to(torch.float64)
    wrong = ((rows.sum(1) - 1).abs() > _ROUNDING) | (rows.amin(1) < -_ROUNDING)
    if wrong.any():
        rule = (
            f"hold rows of probabilities, which sum to 1, where it is floating point "
            f"({OTHER_LOSSES})"
        )
        first = rows.movedim(1, -1)[wrong][0]
        got = f"a row from {first.min():.4g} to {first.max():.4g} with the sum {first.sum():.4g}"
        raise ValueError(f"Distiller: target must {rule}, got {got}")


def labels_of(target: Any) -> Tensor | None:
    """The target, if it is class indices [B]."""
    is_labels = isinstance(target, Tensor) and target.dim() == 1 and not target.is_floating_point()
    return target if is_labels else None


_HINTS = {
    "logits": "logits must be in the output of both models for method {name!r} (select them by "
    "logits=)",
    "target": "target must be class indices [B] for method {name!r}, as in distiller(x, y)",
    "index": "index must be the samples' indices in the training set, int64 [B], for method "
    "{name!r}, as in distiller(x, y, index=i)",
    "boxes": "boxes must be a list of tensors [n, 4], one an image, for method {name!r}, as in "
    "distiller(x, y, boxes=b)",
}


def check_needs(name: str, needs: Set[str], step: Step, target: Any) -> None:
    """Raise unless the step has what the method needs.

    Raises:
        ValueError: something is missing; the error names the argument to pass.
    """
    has = {
        "logits": step.student_logits is not None and step.teacher_logits is not None,
        "target": step.target is not None,
        "index": step.index is not None,
        "boxes": step.boxes is not None,
    }
    for need, hint in _HINTS.items():
        if need in needs and not has[need]:
            got = described(target if need == "target" else None)
            raise ValueError(f"Distiller: {hint.format(name=name)}, got {got}")
