"""SoKD under any other loss: the student's maps adapted, the teacher's refined, the mask, the agreement term.

student   = adapter(F_s)                    for losses that compare maps of one shape, and for DAM
teacher   = policy(F_t)                     a constant
agreement = lambda_agreement * L_D          what trains DAM; the mask has no gradient
weight    = omega of the areas
                                                                              [docs/method.md section 4]
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sokd.kd.loss import Features
from sokd.kd.sokd import SoKD, _spread_and_share

__all__ = ["Plugged", "masked_pair", "own_distance", "plug", "record", "unplugged"]


class Plugged(NamedTuple):
    """What SoKD makes of the layers' features."""

    adapted: list[Tensor]  # the student's [B, C, H, W]; as they came where no adapter is asked for
    refined: list[Tensor]  # the teacher's [B, C, H, W]
    weight: list[Tensor | None]  # omega [B, H, W], or None without a DAM
    agreement: list[Tensor]  # scalars, weighted by lambda_agreement; empty without a DAM
    spread: list[list[Tensor]]  # heat variance and covered share, for `kd.diagnostics()`


def plug(
    kd: SoKD, student_features: Features, teacher_features: Features, *, adapt: bool = True
) -> Plugged:
    """Take the next draw and make everything that a loss of one's own needs; features as `sokd.loss` takes
    them.

    Args:
        adapt: False leaves the student's maps as they are; refused where a DAM has to compare them.
    """
    pairs = kd._pairs(student_features, teacher_features)
    draw = kd._draw(pairs, None)
    made = Plugged([], [], [], [], [])
    for index, (student, teacher) in enumerate(pairs):
        if adapt or kd.dam is not None:
            student, refined = kd._meet(index, student, teacher, draw, False)
        else:
            refined = _refined(kd, index, teacher, draw)
        attention = kd._attention(index, student, refined)
        made.adapted.append(student)
        made.refined.append(refined)
        made.weight.append(None if attention is None else attention.weight)
        if attention is not None:
            made.agreement.append(attention.agreement)
        made.spread.append(_spread_and_share(attention, kd.statistics))
    return made


def unplugged(
    adapters: nn.ModuleList | None, students: list[Tensor], teachers: list[Tensor]
) -> Plugged:
    """The same without SoKD: the student's maps adapted, if there are adapters, the teacher's as they are."""
    sizes = [(teacher.shape[2], teacher.shape[3]) for teacher in teachers]
    adapted = [
        adapter(student, size)
        for adapter, student, size in zip(adapters or (), students, sizes, strict=False)
    ]
    return Plugged(adapted, teachers, [None] * len(teachers), [], [])


def _refined(kd: SoKD, index: int, teacher: Tensor, draw: object) -> Tensor:
    if kd.policy is None:
        return teacher
    with torch.no_grad():
        refined: Tensor = kd.policy(teacher, draw, layer=index)
    return refined


def masked_pair(student: Tensor, teacher: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both maps times sqrt(omega): a squared difference of the two then carries omega once."""
    if weight is None:
        return student, teacher
    root = weight.sqrt().unsqueeze(1)
    return student * root.to(student.dtype), teacher * root.to(teacher.dtype)


def record(kd: SoKD, made: Plugged, distance: Tensor) -> None:
    """Leave the step in `kd.diagnostics()`: `distance`, what the features' terms came to, as "areas"."""
    nothing = torch.zeros_like(distance.detach())
    rows = [
        [
            made.agreement[index] if made.agreement else nothing,
            distance if index == 0 else nothing,
            *spread,
        ]
        for index, spread in enumerate(made.spread)
    ]
    kd._record(rows)


def own_distance(kd: SoKD, made: Plugged) -> Tensor:
    """SoKD's own masked term, weighted by lambda_areas, summed over the layers."""
    triples = zip(made.adapted, made.refined, made.weight, strict=True)
    return torch.stack([kd._distance(*triple, kd.lambda_areas, False) for triple in triples]).sum()
