"""DAM without parameters: areas and agreement from the attention of each side's own map.

    a    = mean_c |F|                                        [B, H, W], the energy of a cell
    z    = (a - mean a) / sqrt(var a + 1e-5 (mean a)^2 + 1e-12)   over the cells of a sample
    A    = softmax(z / tau) over the cells                       sums to 1
    heat = A / max A;  mutual: sqrt(heat_s * heat_t), size and offset the means of both sides
    peak: a local maximum whose heat exceeds the map's mean; without one omega is 1 everywhere
    size and offset of a peak: moments of A in the window of (2r + 1)^2 cells around it,
        m = sum A d / sum A,  v = sum A d^2 / sum A - m^2,  r = max(1, min(H, W) // 4)
        width = min(W, sqrt(12 v + 1)), exact for uniform attention over that many cells
    L_D  = mean over samples of 1 - cos(A_s, A_t)

Source: docs/method.md section 7 [S: settled here].
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sokd.kd.adapter import resize
from sokd.kd.dam import Attention, Heads, checked_options, weight_of
from sokd.kd.features import above_zero, both_sides_at_once
from sokd.ops import Areas
from sokd.ops import areas as find_areas
from sokd.ops.runtime import is_captured, is_eager
from sokd.reference import accumulator

__all__ = ["AttentionDAM", "attention_map", "disagreement"]

Side = tuple[Tensor, Tensor]  # attention [B, H, W] and heat [B, 1, H, W]

# How far a peak exceeds the mean of its map, as a share of it: rounding makes no peak.
_MARGIN = 2.0**-10


class AttentionDAM(nn.Module):
    """Distinctive Area Detection by attention: no parameters, and no constant solution.

        dam = sokd.AttentionDAM()
        attention = dam(torch.randn(8, 64, 14, 14), torch.randn(8, 256, 7, 7))
        attention.weight                                  # omega [8, 7, 7]

    The attention of a side depends on its own map only, so no adapter is needed. The
    student's map is resized to the teacher's size, as for `sokd.methods.at`. Only the student
    learns from the agreement, which is 0 for equal and 1 for disjoint attention.

    Args:
        temperature: tau of the softmax over the cells, positive. Low: few small areas.
        areas: the maps that the areas come from: "teacher" [S]; "mutual" [P], heat
            sqrt(heat_s * heat_t) and the mean size and offset; "student" [A].
        overlap: the weight of a cell under n areas: "sum" [P] n, "square" [A] n * n, "union" 1.
        k: the most areas of a sample; at most H*W are found.
        kernel: side of the neighbourhood in which a peak is the largest; odd.
    """

    adapts: ClassVar[bool] = False  # it reads the student's own map

    def __init__(
        self, *, temperature: float = 1.0, areas: str = "teacher", overlap: str = "sum", k: int = 8,
        kernel: int = 3,
    ) -> None:  # fmt: skip
        super().__init__()
        self.temperature = above_zero("AttentionDAM", "temperature", temperature)
        self.areas, self.overlap, self.k, self.kernel = checked_options(
            "AttentionDAM", areas, overlap, k, kernel
        )

    def forward(self, student: Tensor, teacher: Tensor, *, scale: float = 1.0) -> Attention:
        """Agreement and areas of student [B, C_s, H_s, W_s] and teacher [B, C, H, W].

        The teacher's features are constants. `scale` multiplies L_D.
        """
        energies = _energy(_at_size_of(teacher, student)), _energy(teacher.detach())
        both = _attention(torch.cat(energies), self.temperature)
        count = student.shape[0]
        agreement = disagreement(both, scale)
        with torch.no_grad():
            heat = _heat(both)
            sides = [(both[rows], heat[rows]) for rows in (slice(count), slice(count, None))]
            found = self._find(sides, self.areas)
            weight = weight_of(found.coverage, self.overlap)
            none = found.scores[:, 0] <= 0  # the best one is missing
            weight = weight.masked_fill(none.view(-1, 1, 1), 1)
        return Attention(agreement, weight, found.coverage, found.boxes, heat[:count])

    def maps(self, features: Tensor) -> Heads:
        """Heat, size and offset of features [B, C, H, W], as `sokd.ops.areas` takes them."""
        with torch.no_grad():
            attention = attention_map(features, self.temperature)
            return _heads(attention, _heat(attention))

    def find(self, student: Tensor, teacher: Tensor, areas: str | None = None) -> Areas:
        """The areas of student and teacher, as `forward` takes them; `areas` None: the module's.

        dam.find(f_s, f_t, "teacher").coverage                # [B, H, W]
        """
        with torch.no_grad():
            maps = [
                attention_map(features, self.temperature)
                for features in (_at_size_of(teacher, student), teacher)
            ]
            return self._find([(each, _heat(each)) for each in maps], areas or self.areas)

    def extra_repr(self) -> str:
        names = ("temperature", "areas", "overlap", "k", "kernel")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def _find(self, sides: Sequence[Side], areas: str) -> Areas:
        """The areas of student or teacher, or of both."""
        student, teacher = sides
        heat, size, offset = _heads(*(student if areas == "student" else teacher))
        other = _heads(*student) if areas == "mutual" else None
        if other is not None:
            heat = (heat * other.heat).sqrt()
        mean = heat.mean((2, 3), keepdim=True)
        heat = heat.masked_fill(heat <= mean * (1 + _MARGIN), 0)
        # `areas` takes the means of both sides' sizes and offsets
        other = None if other is None else Heads(heat, other.size, other.offset)
        k = min(self.k, heat.shape[2] * heat.shape[3])
        return find_areas(heat, size, offset, k=k, kernel=self.kernel, teacher=other)


def attention_map(features: Tensor, temperature: float = 1.0) -> Tensor:
    """features [B, C, H, W] -> A [B, H, W], float32 (float64 for float64), 1 in sum over the cells.

    attention_map(torch.randn(2, 64, 7, 7)).sum((1, 2))   # [1, 1]

    A map of equal energies, of zeros too, is uniform; a NaN makes all cells of its sample NaN.
    """
    return _attention(_energy(features), temperature)


def _energy(features: Tensor) -> Tensor:
    return features.abs().mean(1, dtype=accumulator(features.dtype))


def _attention(energy: Tensor, temperature: float) -> Tensor:
    """z as a layer norm: scaled by s = 1 / sqrt(mean^2 + 1e-7), eps = 1e-5 is 1e-5 / s^2 for a."""
    mean = energy.mean((1, 2), keepdim=True)
    scaled = energy * torch.rsqrt(mean.square() + 1e-7)
    scores = F.layer_norm(scaled, scaled.shape[1:], eps=1e-5).flatten(1)
    return (scores if temperature == 1 else scores / temperature).softmax(1).view_as(energy)


def disagreement(maps: Tensor, scale: float = 1.0) -> Tensor:
    """Mean over samples of 1 - cos(A_s, A_t): in [0, 1], 0 for an empty batch.

    maps [2B, H, W]: the student's, then the teacher's, which are constants. As half the squared
    distance of the unit vectors, which is exactly 0 for equal maps.
    """
    count = maps.shape[0] // 2
    unit = maps / torch.linalg.vector_norm(maps, dim=(1, 2), keepdim=True)
    factor = 0.5 * scale / max(count, 1)
    return F.mse_loss(unit[:count], unit[count:].detach(), reduction="sum") * factor


def _at_size_of(teacher: Tensor, student: Tensor) -> Tensor:
    return resize(student, (teacher.shape[2], teacher.shape[3]))


def _heat(attention: Tensor) -> Tensor:
    """A [B, H, W] -> A / max A [B, 1, H, W]."""
    return (attention / attention.amax((1, 2), keepdim=True)).unsqueeze(1)


def _heads(attention: Tensor, heat: Tensor) -> Heads:
    """A [B, H, W] and its heat -> heat, size less one and offset [B, 2, H, W], in cells."""
    weight, moments = _window_sums(attention)
    moments = moments / weight.clamp_min(torch.finfo(weight.dtype).tiny)
    mean, square = moments[:, :2], moments[:, 2:]
    span = (12 * (square - mean.square()).clamp_min(0) + 1).sqrt()
    height, width = attention.shape[1:]
    if both_sides_at_once(height, width):
        span = span.clamp(max=width)
    else:
        span = torch.cat((span[:, :1].clamp(max=width), span[:, 1:].clamp(max=height)), dim=1)
    # `areas` fills from the cell of one corner to that of the other, inclusively
    return Heads(heat, span - 1, mean + 0.5)


def _window_sums(attention: Tensor) -> tuple[Tensor, Tensor]:
    """Over the window of each cell the sum of A [B, 1, H, W], and those of A dx, A dy, A dx^2 and
    A dy^2 [B, 4, H, W]."""
    batch, height, width = attention.shape
    reach = max(1, min(height, width) // 4)
    with torch.autocast(attention.device.type, enabled=False):
        sums = attention @ _powers(width, reach, attention)
        sums = sums.transpose(1, 2) @ _powers(height, reach, attention)
    sums = sums.view(batch, 3, width, 3, height).transpose(2, 4)  # [B, of x, H, of y, W]
    of_each = (sums[:, 1, :, 0], sums[:, 0, :, 1], sums[:, 2, :, 0], sums[:, 0, :, 2])
    return sums[:, :1, :, 0], torch.stack(of_each, dim=1)


def _powers(cells: int, reach: int, like: Tensor) -> Tensor:
    """d^0, d^1, d^2 of the distances d from each cell, 0 beyond the reach: [cells, 3 * cells]."""
    make = _cached_powers if is_eager(like) and not is_captured(like) else _new_powers
    return make(cells, reach, like.dtype, like.device)


@functools.lru_cache(maxsize=64)
def _cached_powers(cells: int, reach: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _new_powers(cells, reach, dtype, device)


def _new_powers(cells: int, reach: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    place = torch.arange(cells, dtype=dtype, device=device)
    distance = place.unsqueeze(1) - place
    near = (distance.abs() <= reach).to(dtype)
    return torch.cat((near, near * distance, near * distance.square()), dim=1)
