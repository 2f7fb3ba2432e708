"""SoKD under a loss that is not ours: the same signature, its features refined and masked.

    wrapped(f_s, f_t, ...) = any_loss(sqrt(omega) * adapter(f_s), sqrt(omega) * policy(f_t), ...) + agreement

Source: docs/method.md 4, "any loss(f_s, f_t): called with both sides masked and the teacher refined" [P].
Settled here: the mask's root, so that a squared difference carries omega once; the agreement term in the
result, for nothing else trains the DAM that finds the mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from sokd.kd import sanity
from sokd.kd.arguments import described
from sokd.kd.loss import Features
from sokd.kd.plug import Plugged, masked_pair, plug, record
from sokd.kd.sokd import SoKD
from sokd.kd.virtual import unwrapped

__all__ = ["Wrapped", "wrap"]


def wrap(
    any_loss: Callable[..., Any], kd: nn.Module, *, student: int | str = 0, teacher: int | str = 1,
    agreement: bool = True,
) -> Wrapped:  # fmt: skip
    """`any_loss` with SoKD plugged in, called as `any_loss` is.

        loss = sokd.wrap(F.mse_loss, kd)
        loss(f_s, f_t)                                # adapter, policy and mask of kd, then F.mse_loss

    Args:
        any_loss: takes the student's and the teacher's features, and whatever else. It is called with maps
            [B, C, H, W] of the teacher's shape, or with lists of them where it is given lists.
        kd: a `sokd.SoKD` for these features. Its parameters are to be trained, as for `sokd.loss`:
            `wrapped.parameters()` are those and `any_loss`'s own, if it is a module.
        student, teacher: which arguments of `any_loss` are the features: place (from 0) or name. A call may
            give them either way.
        agreement: add lambda_agreement * L_D to the result, a tensor of one number; False leaves it in
            `wrapped.agreement`, to be added by hand: for losses that return a dict or a tuple.

    Returns:
        A module with `any_loss`'s signature.

    Raises:
        TypeError: arguments of another kind; a result, with `agreement`, that is not one number in a tensor.
        ValueError: arguments that are no features; what `sokd.loss` raises of features.
    """
    return Wrapped(any_loss, kd, student=student, teacher=teacher, agreement=agreement)


class Wrapped(nn.Module):
    """What `sokd.wrap` returns."""

    def __init__(
        self, any_loss: Callable[..., Any], kd: nn.Module, *, student: int | str, teacher: int | str,
        agreement: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        if not callable(any_loss):
            raise TypeError(f"wrap: any_loss must be callable, got {type(any_loss).__name__}")
        if not isinstance(kd, SoKD):
            raise TypeError(f"wrap: kd must be a sokd.SoKD, got {type(kd).__name__}")
        self.any_loss, self.kd, self.adds_agreement = any_loss, kd, agreement
        self._places = {
            "student": _place("student", student),
            "teacher": _place("teacher", teacher),
        }
        self._names = _parameter_names(any_loss)
        self.agreement: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """`any_loss(*args, **kwargs)` on refined and masked features."""
        arguments: dict[int | str, Any] = dict(enumerate(args))
        arguments.update(kwargs)
        at = {side: self._find(side, arguments) for side in self._places}
        if at["student"] == at["teacher"]:
            rule = "be another argument of any_loss than student"
            raise ValueError(f"wrap: teacher must {rule}, got {at['teacher']!r} for both")
        f_s, f_t = (_features(side, key, arguments[key]) for side, key in at.items())
        made = plug(self.kd, f_s, f_t)
        triples = zip(made.adapted, made.refined, made.weight, strict=True)
        students, teachers = map(
            list, zip(*(masked_pair(*triple) for triple in triples), strict=True)
        )
        for side, given, maps in (("student", f_s, students), ("teacher", f_t, teachers)):
            arguments[at[side]] = maps[0] if isinstance(given, Tensor) else maps
        result = self.any_loss(
            *(arguments[i] for i in range(len(args))), **{name: arguments[name] for name in kwargs}
        )
        return self._finished(result, made, f_s, f_t)

    def extra_repr(self) -> str:
        name = getattr(self.any_loss, "__name__", type(self.any_loss).__name__)
        return f"{name}, agreement={self.adds_agreement}"

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start without the last step's agreement, which holds its graph."""
        return {**self.__dict__, "agreement": None}

    def _find(self, side: str, arguments: dict[int | str, Any]) -> int | str:
        """Where in a call's arguments the features of one side are: a place, or a keyword."""
        wanted = self._places[side]
        name = (
            self._names[wanted] if isinstance(wanted, int) and wanted < len(self._names) else wanted
        )
        place = self._names.index(wanted) if wanted in self._names else wanted
        for key in (name, place):
            if key in arguments:
                return key
        raise TypeError(
            f"wrap: {side} must be among the arguments of any_loss as {wanted!r}, got {list(arguments)}"
        )

    def _finished(self, result: Any, made: Plugged, f_s: Features, f_t: Features) -> Any:
        """The result with the agreement added, or the agreement left in the attribute."""
        is_tensor = isinstance(result, Tensor)
        record(
            self.kd,
            made,
            result.sum() if is_tensor else torch.zeros_like(made.refined[0][:0].sum()),
        )
        sanity.look(self.kd, f_s, f_t)
        agreement = torch.stack(made.agreement).sum() if made.agreement else None
        self.agreement = None if self.adds_agreement else agreement
        if not self.adds_agreement or agreement is None:
            return result
        if not is_tensor or result.numel() != 1:
            rule = "return a scalar tensor to add the agreement to (agreement=False leaves it in .agreement)"
            got = f"shape {list(result.shape)}" if is_tensor else type(result).__name__
            raise TypeError(f"wrap: any_loss must {rule}, got {got}")
        return result + agreement


def _place(side: str, value: Any) -> int | str:
    """`student=` or `teacher=`, if it is one."""
    is_place = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not is_place and not isinstance(value, str):
        raise TypeError(f"wrap: {side} must be a place (0 or more) or a name, got {value!r}")
    return cast("int | str", value)


def _features(side: str, key: int | str, given: Any) -> Features:
    """The argument at `key`, if it can be features: their channels are looked at with kd's."""
    tensors = given if isinstance(given, (list, tuple)) else [given]
    if not all(isinstance(each, Tensor) and each.dim() in (3, 4) for each in tensors):
        rule = "lead to features [B, C, H, W] or [B, N, C], or a list of them, among any_loss's arguments"
        raise ValueError(
            f"wrap: {side} must {rule}, got {', '.join(map(described, tensors))} at {key!r}"
        )
    return cast(Features, given)


def _parameter_names(any_loss: Callable[..., Any]) -> list[str]:
    """The names of the arguments that may be given by place; none where there is no signature."""
    called = unwrapped(any_loss)
    try:
        parameters = inspect.signature(
            called.forward if isinstance(called, nn.Module) else called
        ).parameters
    except (TypeError, ValueError):
        return []
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [parameter.name for parameter in parameters.values() if parameter.kind in by_place]
