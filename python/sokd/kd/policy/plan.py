"""The nine operations, and the arguments of `sokd.ops.refine` for a choice of them.

All functions are tensor operations: any leading dimensions, no value read on the host, no Python
branch on a draw. `...` below is [G] for a `Plan`, or [V, G] for the V plans of `refine_dots`,
`Plans`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["OPERATIONS", "PAIRS", "Operation"]


class Operation(NamedTuple):
    """One operation and the range of its strength v = low + magnitude * (high - low)."""

    name: str
    low: float
    high: float
    unit: str

    def strength(self, magnitude: float) -> float:
        """v, in `unit`, of a magnitude in [0, 1]."""
        return self.low + magnitude * (self.high - self.low)


OPERATIONS = (  # docs/method.md 2.1, in canonical order
    Operation("shear_x", -0.3, 0.3, ""),
    Operation("shear_y", -0.3, 0.3, ""),
    Operation("translate_x", -0.45, 0.45, "of the width"),
    Operation("translate_y", -0.45, 0.45, "of the height"),
    Operation("rotate", -30.0, 30.0, "degrees"),
    Operation("cutout", 0.0, 0.2, "of the side"),
    Operation("noise", 0.0, 0.1, "standard deviation"),
    Operation("channel_shuffle", 0.0, 0.0, ""),
    Operation("channel_drop", 0.0, 0.5, "of the channels"),
)
PAIRS = tuple(combinations(range(len(OPERATIONS)), 2))  # all 36 sub-policies

_GEOMETRIC, _CUTOUT, _NOISE, _SHUFFLE, _DROP = frozenset(range(5)), 5, 6, 7, 8


class Ranges(NamedTuple):
    """The operations' ranges as integers: `.half()` casts a module's float buffers, not these."""

    low: Tensor  # [9] int64, hundredths
    span: Tensor  # [9] int64, hundredths
    carrying: Tensor  # [9] int64, 0 or 1: which get the straight-through gradient


def ranges(*, pathwise: bool) -> Ranges:
    """`OPERATIONS` as tensors of whole hundredths.

    So a magnitude of 0.5 is exactly v = 0 where low = -high. Straight-through: all operations carry
    it but the shuffle, which has no magnitude. Pathwise: only cutout and channel_drop, whose effect
    is a step function of the magnitude.
    """
    low = torch.tensor([round(100 * op.low) for op in OPERATIONS])
    span = torch.tensor([round(100 * op.high) for op in OPERATIONS]) - low
    carrying = [
        op in (_CUTOUT, _DROP) if pathwise else op != _SHUFFLE for op in range(len(OPERATIONS))
    ]
    # bool has no mean, as averaged buffers need
    return Ranges(low, span, torch.tensor(carrying).long())


def pair_of(entry: Sequence[int | str]) -> tuple[int, int]:
    """Two distinct operations by name or index, in canonical order; ValueError for others."""
    names = [op.name for op in OPERATIONS]
    try:
        indices = [names.index(op) if isinstance(op, str) else op for op in entry]
        known = all(index in range(len(names)) and not isinstance(index, bool) for index in indices)
        fits = known and len(set(indices)) == len(indices) == 2
    except (ValueError, TypeError):
        fits = False
    if not fits:
        rule = f"be pairs of two distinct operations of {', '.join(names)}"
        raise ValueError(f"Policy: policies must {rule}, got {entry!r}")
    return min(indices), max(indices)


class Strengths(NamedTuple):
    """The strength of each of the nine operations; 0 and False for one that does not act."""

    value: Tensor  # [..., 9]: v
    fired: Tensor  # [..., 9] bool
    magnitude: Tensor  # [..., 9]


def strengths(pairs: Tensor, gates: Tensor, magnitude: Tensor, ranges: Ranges) -> Strengths:
    """pairs [..., 2] int64, gates [..., 2] bool, magnitude [..., 2] of the chosen sub-policies."""
    index = torch.arange(len(OPERATIONS), device=pairs.device)
    hit = pairs.unsqueeze(-1) == index
    fired = (hit & gates.unsqueeze(-1)).any(-2)
    chosen = torch.where(hit, magnitude.unsqueeze(-1), 0).sum(-2)
    value = (ranges.low + chosen * ranges.span) / 100
    return Strengths(torch.where(fired, value, 0), fired, chosen)


def theta(value: Tensor, height: int, width: int) -> Tensor:
    """[..., 2, 3]: shear_x @ shear_y @ translate_x @ translate_y @ rotate, written out.

    At most two of the five differ from the identity, so this is theta_1 @ theta_2 in canonical
    order. An operation that does not act contributes exactly 0 and 1, so two identities give an
    exact identity.
    """
    a, b, x, y, degrees = value[..., :5].unbind(-1)
    turn = degrees * (math.pi / 180)
    cos, sin = turn.cos(), turn.sin()
    down = sin * (height / max(width, 1))
    across = sin * (width / max(height, 1))
    sheared, x, y = 1 + a * b, 2 * x, 2 * y
    rows = [
        [sheared * cos - a * across, sheared * down + a * cos, sheared * x + a * y],
        [b * cos - across, b * down + cos, b * x + y],
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def theta_gradient(value: Tensor, d_theta: Tensor, height: int, width: int) -> Tensor:
    """The gradient of `theta` for the first five strengths, [..., 5], from d_theta [..., 2, 3]."""
    a, b, x, y, degrees = value[..., :5].unbind(-1)
    turn = degrees * (math.pi / 180)
    cos, sin = turn.cos(), turn.sin()
    aspect = height / max(width, 1)
    inverse = width / max(height, 1)
    upper, lower = (row.unbind(-1) for row in d_theta.unbind(-2))
    sheared = 1 + a * b

    def along(row: Sequence[Tensor], *by: Tensor) -> Tensor:
        return row[0] * by[0] + row[1] * by[1] + row[2] * by[2]

    across = sin * inverse
    d_a = along(upper, b * cos - across, b * sin * aspect + cos, 2 * (b * x + y))
    mixed = [a * d_upper + d_lower for d_upper, d_lower in zip(upper, lower, strict=True)]
    d_b = along(mixed, cos, sin * aspect, 2 * x)
    d_x = 2 * (sheared * upper[2] + b * lower[2])
    d_y = 2 * mixed[2]
    d_turn = upper[1] * sheared * cos * aspect + lower[1] * b * cos * aspect
    d_turn = d_turn - sin * (sheared * upper[0] + b * lower[0] + mixed[1])
    d_turn = d_turn - cos * inverse * mixed[0]
    return torch.stack([d_a, d_b, d_x, d_y, d_turn * (math.pi / 180)], dim=-1)


def _span(share: Tensor, centre: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Start and end of the hole on one side: max(1, round(v * side)) cells around the centre."""
    length = (share * side).round().clamp(min=1)
    start = (centre * side).floor() - (length / 2).floor()
    return start.clamp(0, side), (start + length).clamp(0, side)


def hole(value: Tensor, centre: Tensor, height: int, width: int) -> Tensor:
    """[..., 4] int64; zeros where cutout does not act. centre [..., 2]: uniforms for y and x."""
    share = value[..., _CUTOUT].detach()
    y0, y1 = _span(share, centre[..., 0], height)
    x0, x1 = _span(share, centre[..., 1], width)
    return torch.where((share > 0).unsqueeze(-1), torch.stack([y0, x0, y1, x1], dim=-1), 0).long()


def shuffled(fired: Tensor, uniforms: Tensor) -> Tensor:
    """[..., C]: sort order of the uniforms [..., C] where the shuffle fired, else the identity."""
    channels = uniforms.shape[-1]
    drawn = uniforms.argsort(dim=-1, stable=True)
    same = torch.arange(channels, device=uniforms.device)
    return torch.where(fired[..., _SHUFFLE, None], drawn, same)


def kept(value: Tensor, uniforms: Tensor) -> Tensor:
    """[..., C] bool: False with probability v, each channel by its own uniform of [..., C]."""
    return uniforms >= value[..., _DROP, None].detach()


class Present(NamedTuple):
    """Which arguments of `refine` any of the sub-policies uses; the others are not computed."""

    theta: bool
    hole: bool
    sigma: bool
    perm: bool
    keep: bool

    @classmethod
    def of(cls, pairs: Sequence[tuple[int, int]]) -> Present:
        used = {op for pair in pairs for op in pair}
        single = (op in used for op in (_CUTOUT, _NOISE, _SHUFFLE, _DROP))
        return cls(bool(used & _GEOMETRIC), *single)


def arguments(
    strong: Strengths, present: Present, centre: Tensor, channel_uniforms: Tensor, height: int,
    width: int,
) -> dict[str, Tensor | None]:  # fmt: skip
    """The arguments of `refine` that a `Plan` and `Plans` share, by name; `seed` is missing.

    centre [..., 2]; channel_uniforms [2, ..., C], for perm and keep.
    """
    value, fired = strong.value, strong.fired
    return {
        "theta": theta(value, height, width) if present.theta else None,
        "hole": hole(value, centre, height, width) if present.hole else None,
        "sigma": value[..., _NOISE] if present.sigma else None,
        "perm": shuffled(fired, channel_uniforms[0]) if present.perm else None,
        "keep": kept(value, channel_uniforms[1]) if present.keep else None,
    }


def straight(strong: Strengths, carrying: Tensor) -> Tensor:
    """[...]: sum of the fired magnitudes that get the straight-through gradient."""
    return torch.where(strong.fired, strong.magnitude * carrying, 0).sum(-1)


def strength_gradient(
    strong: Strengths, d_theta: Tensor | None, d_sigma: Tensor | None, d_straight: Tensor,
    height: int, width: int,
) -> Tensor:  # fmt: skip
    """The pathwise gradient of each operation's magnitude [..., 9], 0 where it does not act.

    Args:
        d_theta: [..., 2, 3] and d_sigma [...] of the plan; None: no sub-policy uses it.
        d_straight: [...], the gradient of cutout's and channel_drop's magnitudes.
    """
    nothing = torch.zeros_like(strong.value[..., 0])
    by_span = [nothing] * len(OPERATIONS)
    if d_theta is not None:
        by_span[:5] = theta_gradient(strong.value, d_theta, height, width).unbind(-1)
    if d_sigma is not None:
        by_span[_NOISE] = d_sigma
    found = [
        d_straight if index in (_CUTOUT, _DROP) else each * (operation.high - operation.low)
        for index, (each, operation) in enumerate(zip(by_span, OPERATIONS, strict=True))
    ]
    return torch.where(strong.fired, torch.stack(found, dim=-1), 0)
