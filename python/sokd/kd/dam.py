"""DAM: the areas that student and teacher both attend to, and the agreement of their heads.

Source: docs/method.md section 3 [P: paper, A: authors' prototype, S: settled here].

    hidden   = relu(conv3x3(features))           C -> 3C: the first convolutions of three heads
    heat     = sigmoid(conv1x1(hidden[0:C]))                    [B, A, H, W]
    offset   = sigmoid(conv1x1(hidden[C:2C]))                   [B, 2, H, W], x and y in cells
    size     = (W, H) * sigmoid(conv1x1(hidden[2C:3C]) - 1)     [B, 2, H, W], in cells
    L_D      = mean over all entries of (heads(student) - heads(teacher))^2
    coverage = number of the k best areas of the two that cover a cell
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sokd.kd.adapter import resize
from sokd.kd.features import one_of, positive
from sokd.ops import Areas
from sokd.ops import areas as find_areas
from sokd.ops.masked_mse import scaled_mse
from sokd.reference import accumulator

__all__ = ["DAM", "Attention", "Heads", "apply_dam", "masked", "resized", "root"]

_HEADS = ("bounded", "paper")
_AREAS = ("mutual", "student", "teacher")
_OVERLAP = ("sum", "square", "union")


# (points, size) of student and teacher
_Sides = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


class Heads(NamedTuple):
    """The outputs of the three heads for one side."""

    heat: Tensor  # [B, A, H, W]
    size: Tensor  # [B, 2, H, W]: width, height, in cells
    offset: Tensor  # [B, 2, H, W]: x, y, in cells


class Attention(NamedTuple):
    """DAM's output for a batch."""

    agreement: Tensor  # scalar, float32 (float64 for float64): scale * L_D
    weight: Tensor  # [B, H, W] float32: omega of the masked distillation; no gradient
    coverage: Tensor  # [B, H, W] float32: number of areas that cover the cell
    boxes: Tensor  # [B, k, 4] int64: y0 x0 y1 x1, inclusive
    heat: Tensor  # [B, A, H, W]: the student's heat, detached; for the diagnostics


class DAM(nn.Module):
    """Distinctive Area Detection: one set of heads, shared by student and teacher.

        dam = sokd.DAM(channels=256)
        attention = dam(torch.randn(8, 256, 7, 7), torch.randn(8, 256, 7, 7))
        attention.weight                                  # omega [8, 7, 7]

    Args:
        channels: C of both feature maps.
        heat_channels: A, the number of heat maps [A: 100].
        heads: "bounded" [S], the formulas above; "paper": each head ends with ReLU, as in the
            prototype.
        areas: the maps that the areas come from. "mutual" [P]: heat sqrt(heat_s * heat_t), the mean
            size and offset; "student" [A]; "teacher".
        overlap: the weight of a cell under n areas: "sum" [P] n, "square" [A] n * n, "union" 1.
        k: areas for each sample, 1 .. A*H*W.
        kernel: side of the neighbourhood in which a peak is the largest; odd.
    """

    @torch.inference_mode(False)
    def __init__(
        self, channels: int, *, heat_channels: int = 100, heads: str = "bounded",
        areas: str = "mutual", overlap: str = "sum", k: int = 8, kernel: int = 3,
    ) -> None:  # fmt: skip
        super().__init__()
        self.channels = positive("DAM", "channels", channels)
        self.heat_channels = positive("DAM", "heat_channels", heat_channels)
        for name, value, choices in (
            ("heads", heads, _HEADS), ("areas", areas, _AREAS), ("overlap", overlap, _OVERLAP)
        ):  # fmt: skip
            one_of("DAM", name, value, choices)
        self.heads = heads
        self.areas = areas
        self.overlap = overlap
        self.k = positive("DAM", "k", k)
        self.kernel = positive("DAM", "kernel", kernel)
        if kernel % 2 == 0:
            raise ValueError(f"DAM: kernel must be odd, got {kernel}")
        self.first = nn.Conv2d(channels, 3 * channels, 3, padding=1)
        self.heat = nn.Conv2d(channels, heat_channels, 1)
        self.size = nn.Conv2d(channels, 2, 1)
        self.offset = nn.Conv2d(channels, 2, 1)

    def forward(self, student: Tensor, teacher: Tensor, *, scale: float = 1.0) -> Attention:
        """Agreement and areas of student and teacher, [B, C, H, W] each, as one batch.

        The teacher's features are constants; both sides train the heads. `scale` multiplies L_D.
        """
        points, size = self._heads(torch.cat((student, teacher.detach())))
        batch = student.shape[0]
        agreement = self._agreement(_sides(points, size, batch), scale)
        detached = _sides(points.detach(), size.detach(), batch)
        of_student, of_teacher = (self._named(*side) for side in detached)
        found = self._areas(of_student, of_teacher)
        weight = self._weight(found.coverage)
        return Attention(agreement, weight, found.coverage, found.boxes, of_student.heat)

    def maps(self, features: Tensor) -> Heads:
        """The outputs of the heads for features [B, C, H, W]."""
        return self._named(*self._heads(features))

    def extra_repr(self) -> str:
        names = ("heads", "areas", "overlap", "k", "kernel")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def _heads(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[N, C, H, W] -> heat and offset [N, A + 2, H, W], size in cells [N, 2, H, W]."""
        hidden = F.relu(self.first(features), inplace=True)
        # One convolution with a block-diagonal weight: three would first copy their slices of
        # `hidden`.
        heads = (self.heat, self.offset, self.size)
        weight: Tensor = torch.block_diag(*(head.weight.flatten(1) for head in heads))  # type: ignore[no-untyped-call]
        biases = [cast(Tensor, head.bias) for head in heads]
        if self.heads == "bounded":
            biases[2] = biases[2] - 1
        raw = F.conv2d(hidden, weight[..., None, None], torch.cat(biases))
        ended = raw.sigmoid_() if self.heads == "bounded" else raw.relu_()
        points, size = torch.split(ended, [self.heat_channels + 2, 2], dim=1)
        return points, _in_cells(size) if self.heads == "bounded" else size

    def _named(self, points: Tensor, size: Tensor) -> Heads:
        heat, offset = torch.split(points, [self.heat_channels, 2], dim=1)
        return Heads(heat, size, offset)

    def _agreement(self, sides: _Sides, scale: float) -> Tensor:
        """scale * L_D, the mean over the entries of all three heads."""
        share = scale / (self.heat_channels + 4)
        (points_s, size_s), (points_t, size_t) = sides
        of_points = _mean_square(points_s, points_t, share * (self.heat_channels + 2))
        return of_points + _mean_square(size_s, size_t, share * 2)

    def _areas(self, student: Heads, teacher: Heads) -> Areas:
        of = teacher if self.areas == "teacher" else student
        other = teacher if self.areas == "mutual" else None
        return find_areas(*of, k=self.k, kernel=self.kernel, teacher=other)

    def _weight(self, coverage: Tensor) -> Tensor:
        """omega [B, H, W] from the number of areas over each cell."""
        if self.overlap == "square":
            return coverage.square()
        return coverage.clamp(max=1) if self.overlap == "union" else coverage


def apply_dam(
    dam: nn.Module | None, student: Tensor, refined: Tensor, scale: float
) -> Attention | None:
    """The output of `dam`, a `DAM` or a module called as one is; None without one.

    Raises:
        TypeError: the module returns something else than an `Attention`.
    """
    found = None if dam is None else dam(student, refined, scale=scale)
    if found is None or isinstance(found, Attention):
        return found
    raise TypeError(f"loss: kd.dam must return an Attention, got {type(found).__name__}")


# ------------------------------------------------------------------------------ omega as a mask


def masked(features: Tensor, weight: Tensor | None) -> Tensor:
    """sqrt(omega) * features [B, C, H, W], omega resized to the features; no weight: as given.

    The root, so that the square of a difference of two masked maps carries omega once, as in
    `masked_mse`.
    """
    return features if weight is None else features * root(features, weight).unsqueeze(1)


def root(features: Tensor, weight: Tensor) -> Tensor:
    """sqrt(omega) [B, H, W] in the size and dtype of the features [B, C, H, W]."""
    return resized(weight, features).sqrt().to(features.dtype)


def resized(weight: Tensor, features: Tensor) -> Tensor:
    """omega [B, H, W] in the size of the features and the dtype of their accumulator."""
    wide = weight.to(accumulator(weight.dtype)).unsqueeze(1)
    at_size = resize(wide, (features.shape[2], features.shape[3]))
    return at_size.squeeze(1).to(accumulator(features.dtype))


# -------------------------------------------------------------------------------------- small parts


def _sides(points: Tensor, size: Tensor, batch: int) -> _Sides:
    """The student's and the teacher's half of the batch.

    One `split`, because its gradient is one concatenation. `chunk` would read the size of the
    batch, which may be a symbol (torch.export).
    """
    (points_s, points_t), (size_s, size_t) = (
        torch.split(both, [batch, batch]) for both in (points, size)
    )
    return (points_s, size_s), (points_t, size_t)


def _mean_square(student: Tensor, teacher: Tensor, scale: float) -> Tensor:
    return scaled_mse(student, teacher, None, normalise="elements", scale=scale, mutual=True)


def _in_cells(share: Tensor) -> Tensor:
    """Shares [N, 2, H, W] of the map's width and height in cells."""
    height, width = share.shape[-2:]
    # one kernel fewer; a compiler fuses them anyway, and its sizes may be symbols, not to be
    # compared
    if not torch.compiler.is_compiling() and height == width:
        return share * width
    across, down = share.chunk(2, dim=1)
    return torch.cat((across * width, down * height), dim=1)
