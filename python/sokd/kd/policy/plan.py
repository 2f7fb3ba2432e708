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

from sokd.kd.features import both_sides_at_once

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
    """The ranges of the pairs' operations as integers: `.half()` casts a module's float buffers."""

    low_of_pairs: Tensor  # [K, 2, 9] int64, hundredths; 0 for other operations than the pair's
    span_of_pairs: Tensor  # [K, 2, 9] int64, hundredths; likewise
    carrying: Tensor  # [K, 2] int64, 0 or 1: which get the straight-through gradient
    spans: Tensor  # [9] int64, hundredths: of each operation


def ranges(operations: Tensor, *, pathwise: bool) -> Ranges:
    """`OPERATIONS` of the pairs [K, 2] in whole hundredths; the shuffle is 1 where it fires.

    So a magnitude of 0.5 is exactly v = 0 where low = -high. Straight-through: all operations carry
    it but the shuffle, which has no magnitude. Pathwise: only cutout and channel_drop, whose effect
    is a step function of the magnitude.
    """
    low = torch.tensor([round(100 * op.low) for op in OPERATIONS])
    spans = torch.tensor([round(100 * op.high) for op in OPERATIONS]) - low
    low[_SHUFFLE] = 100
    carrying = [
        op in (_CUTOUT, _DROP) if pathwise else op != _SHUFFLE for op in range(len(OPERATIONS))
    ]
    place = (operations.unsqueeze(-1) == torch.arange(len(OPERATIONS))).long()
    # bool has no mean, as averaged buffers need
    carried = torch.tensor(carrying).long()[operations]
    return Ranges(low * place, spans * place, carried, spans)


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


def _factors(value: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Factors of theta: shears [..., 2, 2, 1]; translation with rotation [..., 1, 2, 3]."""
    a, b = value[..., 0], value[..., 1]
    x, y = (2 * value[..., 2:4]).unbind(-1)
    turn = value[..., 4] * (math.pi / 180)
    cos, sin = turn.cos(), turn.sin()
    down, across = (
        (sin, -sin) if both_sides_at_once(height, width)
        else (sin * (height / max(width, 1)), sin * (-width / max(height, 1)))
    )  # fmt: skip
    shears = torch.stack((1 + a * b, a, b, torch.ones_like(a)), dim=-1)
    rest = torch.stack((cos, down, x, across, cos, y), dim=-1)
    batch = a.shape
    return shears.view(*batch, 2, 2, 1), rest.view(*batch, 1, 2, 3)


def theta(value: Tensor, height: int, width: int) -> Tensor:
    """[..., 2, 3]: shear_x @ shear_y @ translate_x @ translate_y @ rotate.

    At most two of the five differ from the identity, so this is theta_1 @ theta_2 in canonical
    order. An operation that does not act contributes exactly 0 and 1, so two identities give an
    exact identity.
    """
    shears, rest = _factors(value, height, width)
    return (shears * rest).sum(-2)


def theta_gradient(value: Tensor, d_theta: Tensor, height: int, width: int) -> Tensor:
    """The gradient of `theta` for the first five strengths, [..., 5], from d_theta [..., 2, 3]."""
    shears, rest = _factors(value, height, width)
    d_theta = d_theta.unsqueeze(-2)  # [..., 2, 1, 3]
    d_shears = (d_theta * rest).sum(-1).flatten(-2).unbind(-1)
    d_rest = (d_theta * shears).sum(-3).flatten(-2).unbind(-1)
    a, b = value[..., 0], value[..., 1]
    cos, down = rest.flatten(-3).unbind(-1)[:2]
    turned = cos * (d_rest[1] * (height / max(width, 1)) - d_rest[3] * (width / max(height, 1)))
    sin = down * (width / max(height, 1))
    turned = turned - sin * (d_rest[0] + d_rest[4])
    parts = (
        d_shears[1] + b * d_shears[0], d_shears[2] + a * d_shears[0],
        2 * d_rest[2], 2 * d_rest[5], turned * (math.pi / 180),
    )  # fmt: skip
    return torch.stack(parts, dim=-1)


def hole(value: Tensor, centre: Tensor, height: int, width: int) -> Tensor:
    """[..., 4] int64: max(1, round(v * side)) cells around the centre on each side of the map.

    Zeros where cutout does not act. centre [..., 2]: uniforms for y and x.
    """
    share = value[..., _CUTOUT, None].detach()
    if both_sides_at_once(height, width):
        corners = torch.cat(_ends(share, centre, height), dim=-1)
    else:
        of_y, of_x = _ends(share, centre[..., :1], height), _ends(share, centre[..., 1:], width)
        corners = torch.cat([of_y[0], of_x[0], of_y[1], of_x[1]], dim=-1)
    return (corners * (share > 0)).long()


def _ends(share: Tensor, at: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The first cell, and the one after the last, of that share of a side around a uniform."""
    length = (share * side).round().clamp(min=1)
    start = (at * side).floor() - (length / 2).floor()
    return start.clamp(0, side), (start + length).clamp(0, side)


def shuffled(value: Tensor, uniforms: Tensor) -> Tensor:
    """[..., C]: sort order of the uniforms [..., C] where the shuffle fired, else the identity."""
    channels = uniforms.shape[-1]
    drawn = uniforms.argsort(dim=-1, stable=True)
    same = torch.arange(channels, device=uniforms.device)
    return torch.where(value[..., _SHUFFLE, None] > 0, drawn, same)


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
    value: Tensor, present: Present, centre: Tensor, channel_uniforms: Tensor, height: int,
    width: int,
) -> dict[str, Tensor | None]:  # fmt: skip
    """The arguments of `refine` that a `Plan` and `Plans` share, by name; `seed` is missing.

    value [..., 9]; centre [..., 2]; channel_uniforms [2, ..., C], for perm and keep.
    """
    return {
        "theta": theta(value, height, width) if present.theta else None,
        "hole": hole(value, centre, height, width) if present.hole else None,
        "sigma": value[..., _NOISE] if present.sigma else None,
        "perm": shuffled(value, channel_uniforms[0]) if present.perm else None,
        "keep": kept(value, channel_uniforms[1]) if present.keep else None,
    }


def strength_gradient(
    value: Tensor, d_theta: Tensor | None, d_sigma: Tensor | None, d_straight: Tensor, span: Tensor,
    height: int, width: int,
) -> Tensor:  # fmt: skip
    """The pathwise gradient of each operation's magnitude [..., 9]; the shuffle's is 0.

    Args:
        value: [..., 9].
        d_theta: [..., 2, 3] and d_sigma [...] of the plan; None: no sub-policy uses it.
        d_straight: [...], the gradient of cutout's and channel_drop's magnitudes.
        span: of `Ranges`.
    """
    nothing = torch.zeros_like(d_straight).unsqueeze(-1)
    geometric = nothing.expand(*nothing.shape[:-1], _CUTOUT)
    if d_theta is not None:
        geometric = theta_gradient(value, d_theta, height, width) * span[:_CUTOUT] / 100
    d_noise = nothing if d_sigma is None else (d_sigma * span[_NOISE] / 100).unsqueeze(-1)
    d_straight = d_straight.unsqueeze(-1)
    return torch.cat([geometric, d_straight, d_noise, nothing, d_straight], dim=-1)
