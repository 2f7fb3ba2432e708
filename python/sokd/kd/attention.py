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

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sokd.kd.adapter import resize
from sokd.kd.dam import Attention, Heads, checked_options, weight_of
from sokd.kd.features import above_zero
from sokd.ops import Areas
from sokd.ops import areas as find_areas
from sokd.reference import accumulator

__all__ = ["AttentionDAM", "attention_map", "disagreement"]

# How far a peak exceeds the mean of its map, as a share of it: rounding makes no peak.
_MARGIN = 2.0**-10


class AttentionDAM(nn.Module):
    """Distinctive Area Detection by attention: no parameters, and no constant solution.

        dam = sokd.AttentionDAM()
        attention = dam(torch.randn(8, 64, 14, 14), torch.randn(8, 256, 7, 7))
        attention.weight                                  # omega [8, 7, 7]

    Each side's attention is that of its own map, whatever its channels: no adapter is needed. The
    student's map is resized to the teacher's size, as for `sokd.methods.at`. Only the student
    learns from the agreement, which is 0 for equal and 1 for disjoint attention.

    Args:
        temperature: tau of the softmax over the cells, positive. Low: few small areas.
        areas: the maps that the areas come from. "mutual" [P]: heat sqrt(heat_s * heat_t), the mean
            size and offset; "student" [A]; "teacher".
        overlap: the weight of a cell under n areas: "sum" [P] n, "square" [A] n * n, "union" 1.
        k: the most areas of a sample; at most H*W are found.
        kernel: side of the neighbourhood in which a peak is the largest; odd.
    """

    adapts: ClassVar[bool] = False  # it reads the student's own map

    def __init__(
        self, *, temperature: float = 1.0, areas: str = "mutual", overlap: str = "sum", k: int = 8,
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
        of_student = attention_map(_at_size_of(teacher, student), self.temperature)
        with torch.no_grad():
            of_teacher = attention_map(teacher, self.temperature)
        agreement = scale * disagreement(of_student, of_teacher)
        with torch.no_grad():
            heads = self._heads(of_student), self._heads(of_teacher)
            found = self._find(*heads, self.areas)
            weight = weight_of(found.coverage, self.overlap)
            none = (found.scores[:, :1] <= 0).unsqueeze(2)  # the best one is missing
            weight = torch.where(none, torch.ones_like(weight), weight)
        return Attention(agreement, weight, found.coverage, found.boxes, heads[0].heat)

    def maps(self, features: Tensor) -> Heads:
        """Heat, size and offset of features [B, C, H, W], as `sokd.ops.areas` takes them."""
        with torch.no_grad():
            return self._heads(attention_map(features, self.temperature))

    def find(self, student: Tensor, teacher: Tensor, areas: str | None = None) -> Areas:
        """The areas of student and teacher, as `forward` takes them; `areas` None: the module's.

        dam.find(f_s, f_t, "teacher").coverage                # [B, H, W]
        """
        sides = self.maps(_at_size_of(teacher, student)), self.maps(teacher)
        return self._find(*sides, areas or self.areas)

    def extra_repr(self) -> str:
        names = ("temperature", "areas", "overlap", "k", "kernel")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def _heads(self, attention: Tensor) -> Heads:
        """A [B, H, W] -> heat [B, 1, H, W], size less one and offset [B, 2, H, W], in cells."""
        heat = attention / attention.amax((1, 2), keepdim=True)
        width, offset = _moments(attention)
        # `areas` fills from the cell of one corner to that of the other, inclusively
        return Heads(heat.unsqueeze(1), width - 1, offset + 0.5)

    def _find(self, student: Heads, teacher: Heads, areas: str) -> Areas:
        heat, size, offset = teacher if areas == "teacher" else student
        if areas == "mutual":
            heat = (heat * teacher.heat).sqrt()
            size, offset = (size + teacher.size) / 2, (offset + teacher.offset) / 2
        above = heat > heat.mean((2, 3), keepdim=True) * (1 + _MARGIN)
        cells = heat.shape[2] * heat.shape[3]
        heat = torch.where(above, heat, torch.zeros_like(heat))
        return find_areas(heat, size, offset, k=min(self.k, cells), kernel=self.kernel)


def attention_map(features: Tensor, temperature: float = 1.0) -> Tensor:
    """features [B, C, H, W] -> A [B, H, W], float32 (float64 for float64), 1 in sum over the cells.

    attention_map(torch.randn(2, 64, 7, 7)).sum((1, 2))   # [1, 1]

    A map of equal energies, of zeros too, is uniform; a NaN makes all cells of its sample NaN.
    """
    energy = features.abs().mean(1, dtype=accumulator(features.dtype))
    mean = energy.mean((1, 2), keepdim=True)
    centred = energy - mean
    variance = centred.square().mean((1, 2), keepdim=True)
    scored = centred * torch.rsqrt(variance + 1e-5 * mean.square() + 1e-12)
    return (scored / temperature).flatten(1).softmax(1).view_as(energy)


def disagreement(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over samples of 1 - cos(A_s, A_t), maps [B, H, W]: in [0, 1], 0 for an empty batch.

    As half the squared distance of the unit vectors, which is exactly 0 for equal maps.
    """
    one, other = (
        side / torch.linalg.vector_norm(side, dim=(1, 2), keepdim=True)
        for side in (student, teacher)
    )
    apart: Tensor = (one - other).square().sum()
    return 0.5 * apart / max(student.shape[0], 1)


def _at_size_of(teacher: Tensor, student: Tensor) -> Tensor:
    return resize(student, (teacher.shape[2], teacher.shape[3]))


def _moments(attention: Tensor) -> tuple[Tensor, Tensor]:
    """A [B, H, W] -> width and height, and the mean's place (x, y) from the cell, [B, 2, H, W].

    The window's sums are averages along one axis and the other; cells outside the map are zeros.
    """
    height, width = attention.shape[1:]
    reach = max(1, min(height, width) // 4)
    side = 2 * reach + 1
    place = _places(attention)
    sums = attention.unsqueeze(1) * torch.cat((torch.ones_like(place[:1]), place, place.square()))
    sums = F.avg_pool2d(sums, (1, side), 1, (0, reach))
    sums = F.avg_pool2d(sums, (side, 1), 1, (reach, 0))
    weight, first, second = torch.split(sums, [1, 2, 2], dim=1)
    weight = weight.clamp_min(torch.finfo(weight.dtype).tiny)
    mean = first / weight
    span = (12 * (second / weight - mean.square()).clamp_min(0) + 1).sqrt()
    spans = span[:, :1].clamp(max=width), span[:, 1:].clamp(max=height)
    return torch.cat(spans, dim=1), mean - place


def _places(attention: Tensor) -> Tensor:
    """x and y of each cell, [2, H, W], from the middle of the map: their squares stay small."""
    y, x = (
        torch.arange(count, dtype=attention.dtype, device=attention.device) - (count - 1) / 2
        for count in attention.shape[1:]
    )
    return torch.stack((x.expand(len(y), -1), y.unsqueeze(1).expand(-1, len(x))))
