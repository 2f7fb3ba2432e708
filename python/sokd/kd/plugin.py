"""Any feature loss combined with SoKD: the same signature; kd's terms added or inside.

base="replace":  any_loss(sqrt(omega) * adapter(f_s), sqrt(omega) * policy(f_t), ...) + agreement
base="keep":     any_loss(adapter(f_s), f_t, ...) + areas + agreement

Source: docs/method.md 4, "any loss(f_s, f_t): called with both sides masked and the teacher
refined" [P]. Settled here: the root of the mask, so that a squared difference carries omega once;
kd's own terms in the result, because nothing else trains a DAM's heads; "keep" (docs/method.md 7).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from sokd.kd import sanity
from sokd.kd.dam import masked
from sokd.kd.features import Features, described
from sokd.kd.sokd import Match, SoKD, named_kd
from sokd.kd.virtual import unwrapped
from sokd.ops.runtime import savable

__all__ = ["Wrapped", "wrap"]


def wrap(
    any_loss: Callable[..., Any], kd: nn.Module, *, student: int | str = 0, teacher: int | str = 1,
    agreement: bool = True,
) -> Wrapped:  # fmt: skip
    """Wrap a feature loss with SoKD; the result has the signature of `any_loss`.

        kd = sokd.SoKD(student_channels=64, teacher_channels=256)
        loss = sokd.wrap(F.mse_loss, kd)
        loss(f_s, f_t).backward()                     # kd's adapter, policy and mask, then MSE

    Args:
        any_loss: takes the student's and the teacher's features, and any other arguments. It is
            called once, with maps [B, C, H, W] of the teacher's shape, or with lists of them where
            it is given lists: with base="replace" masked, the teacher's refined; with base="keep"
            the adapted student and the clean teacher.
        kd: a `sokd.SoKD` for these features. Train its parameters, as for `sokd.loss`:
            `wrapped.parameters()` holds them and those of `any_loss`, if it is a module.
        student, teacher: which arguments of `any_loss` are the features: position (from 0) or name.
            A call may pass them either way.
        agreement: add kd's own terms to the result, a tensor of one number: lambda_agreement * L_D,
            and with base="keep" lambda_areas * L_DA. False leaves their sum in `wrapped.agreement`,
            to be added by hand: for losses that return a dict or a tuple.

    Returns:
        A module with the signature of `any_loss`.

    Raises:
        TypeError: arguments of another type; with `agreement`, a result that is not a tensor of one
            number.
        ValueError: arguments that are not features, or features for which `sokd.loss` raises.
    """
    return Wrapped(any_loss, kd, student=student, teacher=teacher, agreement=agreement)


class Wrapped(nn.Module):
    """The loss that `sokd.wrap` returns."""

    def __init__(
        self, any_loss: Callable[..., Any], kd: nn.Module, *, student: int | str,
        teacher: int | str, agreement: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        if not callable(any_loss):
            raise TypeError(f"wrap: any_loss must be callable, got {type(any_loss).__name__}")
        if not isinstance(kd, SoKD):
            raise TypeError(f"wrap: kd must be a sokd.SoKD, got {named_kd(kd)}")
        self.any_loss, self.kd, self.adds_agreement = any_loss, kd, agreement
        self._places = {
            "student": _place("student", student),
            "teacher": _place("teacher", teacher),
        }
        self._names = _parameter_names(any_loss)
        self._check_names("student", "teacher")
        self._check_names("teacher", "student")
        self.agreement: Tensor | None = None

    def _check_names(self, side: str, other: str) -> None:
        """Refuse a place whose name in any_loss is that of the other side."""
        place = self._places[side]
        by_place = isinstance(place, int) and place < len(self._names)
        name = self._names[place] if by_place else str(place)  # type: ignore[index]
        if other in name and side not in name:
            rule = f"be the argument of the {side}'s features"
            raise ValueError(f"wrap: {side} must {rule}, got {place!r}, which is {name!r}")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """`any_loss(*args, **kwargs)` on kd's maps, and kd's own terms."""
        arguments: dict[int | str, Any] = dict(enumerate(args))
        arguments.update(kwargs)
        at = {side: self._find(side, arguments) for side in self._places}
        if at["student"] == at["teacher"]:
            rule = "be another argument of any_loss than student"
            raise ValueError(f"wrap: teacher must {rule}, got {at['teacher']!r} for both")
        f_s, f_t = (_features(side, key, arguments[key]) for side, key in at.items())
        matches = self.kd.match(f_s, f_t)
        kept = self.kd.base == "keep"
        pairs = [(each.student, savable(each.clean)) if kept else _masked(each) for each in matches]
        students, teachers = map(list, zip(*pairs, strict=True))
        for side, given, maps in (("student", f_s, students), ("teacher", f_t, teachers)):
            arguments[at[side]] = maps[0] if isinstance(given, Tensor) else maps
        result = self.any_loss(
            *(arguments[i] for i in range(len(args))), **{name: arguments[name] for name in kwargs}
        )
        areas = self.kd.distances(matches) if kept else []
        replaced = [result.sum()] if isinstance(result, Tensor) else []
        self.kd.record(matches, areas if kept else replaced)
        sanity.look(self.kd, f_s, f_t)
        return self._with_terms(result, matches, areas)

    def extra_repr(self) -> str:
        name = getattr(self.any_loss, "__name__", type(self.any_loss).__name__)
        return f"{name}, agreement={self.adds_agreement}"

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out the last step's agreement, which holds its graph."""
        return {**self.__dict__, "agreement": None}

    def _find(self, side: str, arguments: dict[int | str, Any]) -> int | str:
        """The position or keyword of one side's features among a call's arguments."""
        wanted = self._places[side]
        name = (
            self._names[wanted] if isinstance(wanted, int) and wanted < len(self._names) else wanted
        )
        place = self._names.index(wanted) if wanted in self._names else wanted
        for key in (name, place):
            if key in arguments:
                return key
        rule = f"be among the arguments of any_loss as {wanted!r}"
        raise TypeError(f"wrap: {side} must {rule}, got {list(arguments)}")

    def _with_terms(self, result: Any, matches: Sequence[Match], areas: Sequence[Tensor]) -> Any:
        """The result with kd's terms added, or their sum left in the attribute."""
        terms = [match.attention.agreement for match in matches if match.attention is not None]
        terms += areas
        agreement = torch.stack(terms).sum() if terms else None
        self.agreement = None if self.adds_agreement else agreement
        if not self.adds_agreement or agreement is None:
            return result
        if not isinstance(result, Tensor) or result.numel() != 1:
            rule = (
                "return a scalar tensor to add the agreement to (agreement=False leaves it in "
                ".agreement)"
            )
            is_tensor = isinstance(result, Tensor)
            got = f"shape {list(result.shape)}" if is_tensor else type(result).__name__
            raise TypeError(f"wrap: any_loss must {rule}, got {got}")
        return result + agreement


def _masked(match: Match) -> tuple[Tensor, Tensor]:
    weight = None if match.attention is None else match.attention.weight
    return masked(match.student, weight), masked(match.refined, weight)


def _place(side: str, value: Any) -> int | str:
    """`student=` or `teacher=`, checked."""
    is_place = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not is_place and not isinstance(value, str):
        raise TypeError(f"wrap: {side} must be a position (0 or more) or a name, got {value!r}")
    return cast("int | str", value)


def _features(side: str, key: int | str, given: Any) -> Features:
    """The argument at `key`, checked to be tensors of a feature's rank; kd checks the rest."""
    tensors = given if isinstance(given, (list, tuple)) else [given]
    if not all(isinstance(each, Tensor) and each.dim() in (3, 4) for each in tensors):
        shapes = "features [B, C, H, W] or [B, N, C], or a list of them"
        rule = f"select {shapes}, among the arguments of any_loss"
        got = f"{', '.join(map(described, tensors))} at {key!r}"
        raise ValueError(f"wrap: {side} must {rule}, got {got}")
    return cast(Features, given)


def _parameter_names(any_loss: Callable[..., Any]) -> list[str]:
    """The names of the arguments that may be positional; none where there is no signature."""
    called = unwrapped(any_loss)
    try:
        parameters = inspect.signature(
            called.forward if isinstance(called, nn.Module) else called
        ).parameters
    except (TypeError, ValueError):
        return []
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [parameter.name for parameter in parameters.values() if parameter.kind in by_place]
