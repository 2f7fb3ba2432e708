"""The two levels of the policy search as functions of the weights, and what a user's `step` may return."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sokd.kd.policy import Draw
from sokd.kd.virtual import Weights

if TYPE_CHECKING:
    from sokd.kd.search.search import PolicySearch

__all__ = ["Features", "Level", "Run", "Step"]

Features = Tensor | Sequence[Tensor]
Step = Callable[[Any, Any], tuple[Tensor, Features, Features]]

_OF_STUDENT = "members.0."  # how the names of its weights begin: it is the first of `Together`
_ANOTHER_MODEL = (
    "PolicySearch: step must run the model it is called with, with gradients, got a loss that none of the "
    "student's parameters enters"
)
_NOTHING_TRAINED = (
    "PolicySearch: student must have parameters that require grad (or kd.adapter or kd.dam some), for its "
    "virtual step, got none; order=1 does without"
)


class Run(NamedTuple):
    """One evaluation of a level."""

    loss: Tensor  # scalar
    draw: Draw  # what the policy drew for it
    lift: float  # a factor of its gradients while they are on their way


class Level:
    """The two losses as functions of the weights, for one step of the search: one draw, one random state."""

    def __init__(self, search: PolicySearch, step: Step, rewind: Callable[[], None]) -> None:
        self.search, self.step, self.rewind = search, step, rewind
        self.weights = search.together.weights(but=search.policy.parameters())

    def train(self, weights: Weights, batch: Any) -> Run:
        """L_train: the task's loss and kd's."""
        return self._at(weights, batch, "total")

    def slope(self, weights: Weights, batch: Any) -> list[Tensor]:
        """d L_train / d weights, along which the virtual step goes."""
        if not weights:
            raise ValueError(_NOTHING_TRAINED)
        found = _derivatives(self.train(weights, batch), weights.values())
        of_student = [
            d for name, d in zip(weights, found, strict=True) if name.startswith(_OF_STUDENT)
        ]
        if of_student and all(d is None for d in of_student):
            raise ValueError(_ANOTHER_MODEL)
        return _filled(found, weights.values())

    def upper(self, weights: Weights, batch: Any) -> Run:
        """L_up."""
        return self._at(weights, batch, self.search.objective)

    def _at(self, weights: Weights, batch: Any, objective: str) -> Run:
        self.rewind()
        return self.search.together.at(weights, lambda: self._run(batch, objective))

    def _run(self, batch: Any, objective: str) -> Run:
        task, f_s, f_t = checked(self.step(self.search.student, batch))
        draw, lift = self._draw(f_t), _lift(f_s)
        if objective == "task":
            return Run(task, draw, lift)
        # differentiable also where chi's gradient is not asked for: such a call leaves nothing in kd
        options: dict[str, Any] = {"draw": draw, "differentiable": True}
        if objective == "consistency":
            return Run(self.search.kd.consistency(f_s, f_t, **options), draw, lift)
        return Run(task + self.search.kd.terms(f_s, f_t, **options)["total"], draw, lift)

    def _draw(self, f_t: Features) -> Draw:
        batch = (f_t if isinstance(f_t, Tensor) else f_t[0]).shape[0]
        return self.search.policy.draw_at(self.search.seed, self.search.counter, batch)


def leaves(weights: Weights) -> Weights:
    """The same values as leaves of a new graph."""
    return {name: weight.detach().requires_grad_() for name, weight in weights.items()}


def moved(weights: Weights, along: Sequence[Tensor], by: float | Tensor) -> Weights:
    """weights + by * along, each in its weight's dtype."""
    pairs = zip(weights.items(), along, strict=True)
    return {name: (weight + by * d).to(weight.dtype) for (name, weight), d in pairs}


def gradients(run: Run, inputs: Sequence[Tensor]) -> list[Tensor]:
    """d loss / d inputs, zeros for what the loss does not depend on."""
    return _filled(_derivatives(run, inputs), inputs)


def _lift(features: Features) -> float:
    """For float16 maps what a GradScaler does for a training: one element's part in a mean is lost in it.

    1024 leaves room for a gradient of 60; a power of two rounds nothing.
    """
    first = _tensors(features)[0]
    kind = first.device.type
    cast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    return 1024.0 if cast or first.dtype == torch.float16 else 1.0


def _derivatives(run: Run, inputs: Iterable[Tensor]) -> Sequence[Tensor | None]:
    if not run.loss.requires_grad:
        raise ValueError(
            "PolicySearch: loss must depend on the weights, got one without a gradient"
        )
    lifted = torch.full_like(run.loss, run.lift)
    found = torch.autograd.grad(run.loss, list(inputs), lifted, allow_unused=True)
    return found if run.lift == 1 else [None if d is None else d.float() / run.lift for d in found]


def _filled(found: Iterable[Tensor | None], inputs: Iterable[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(of) if d is None else d for d, of in zip(found, inputs, strict=True)]


def checked(returned: Any) -> tuple[Tensor, Features, Features]:
    """What `step` returned, if it is (loss, student features, teacher features)."""
    if not isinstance(returned, (tuple, list)) or len(returned) != 3:
        got = (
            f"{len(returned)} values"
            if isinstance(returned, (tuple, list))
            else type(returned).__name__
        )
        what = "(loss, student features, teacher features)"
        raise TypeError(f"PolicySearch: step must return {what}, got {got}")
    task, f_s, f_t = returned
    if not isinstance(task, Tensor) or task.numel() != 1:
        got = f"shape {list(task.shape)}" if isinstance(task, Tensor) else type(task).__name__
        raise TypeError(f"PolicySearch: loss must be a scalar tensor, got {got}")
    for name, features in (("student features", f_s), ("teacher features", f_t)):
        _check_features(name, features)
    if any(tensor.requires_grad for tensor in _tensors(f_t)):
        got = "a tensor that requires grad"
        raise ValueError(f"PolicySearch: teacher features must not require grad, got {got}")
    return task.squeeze() if task.dim() else task, f_s, f_t


def _tensors(features: Features) -> list[Tensor]:
    return [features] if isinstance(features, Tensor) else list(features)


def _check_features(name: str, features: Any) -> None:
    if isinstance(features, Tensor):
        return
    if not isinstance(features, (list, tuple)) or not features:
        got = type(features).__name__
        raise TypeError(f"PolicySearch: {name} must be a tensor or a list of tensors, got {got}")
    for entry in features:
        if not isinstance(entry, Tensor):
            got = type(entry).__name__
            rule = "be a tensor or a list of tensors"
            raise TypeError(f"PolicySearch: {name} must {rule}, got a list with {got}")
