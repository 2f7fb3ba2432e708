"""DAM with trained heads: the areas that student and teacher both attend to, and their agreement.

Source: docs/method.md section 3 [P: paper, A: authors' prototype, S: settled here]. The heads
without parameters are `sokd.kd.attention`.

    hidden   = relu(conv3x3(features))           C -> 3C: the first convolutions of three heads
    heat     = sigmoid(conv1x1(hidden[0:C]))                    [B, A, H, W]
    offset   = sigmoid(conv1x1(hidden[C:2C]))                   [B, 2, H, W], x and y in cells
    size     = (W, H) * sigmoid(conv1x1(hidden[2C:3C]) - 1)     [B, 2, H, W], in cells
    L_D      = mean over all entries of (heads(student) - heads(teacher))^2
    coverage = number of the k best areas of the two that cover a cell
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sokd.kd.adapter import resize
from sokd.kd.features import both_sides_at_once, one_of, positive
from sokd.kd.virtual import unwrapped
from sokd.ops import Areas
from sokd.ops import areas as find_areas
from sokd.ops.masked_mse import scaled_mse
from sokd.reference import accumulator

__all__ = [
    "DAM", "Attention", "Heads", "checked_options", "heads_of_state", "masked", "reads_adapted",
    "resized", "root", "weight_of",
]  # fmt: skip

_HEADS = ("bounded", "paper")
_AREAS = ("mutual", "student", "teacher")
_OVERLAP = ("sum", "square", "union")


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

    Only the agreement trains the heads, and on the scenes of docs/results.md they lose the areas;
    `dam.requires_grad_(False)` keeps the initial heads, which do not.

    Args:
        channels: C of both feature maps.
        heat_channels: A, the number of heat maps [A: 100].
        heads: "bounded" [S], the formulas above; "paper": each head ends with ReLU, as in the
            prototype. "attention", without parameters: `sokd.AttentionDAM`.
        areas: the maps that the areas come from. "mutual" [P]: heat sqrt(heat_s * heat_t), the mean
            size and offset; "student" [A]; "teacher".
        overlap: the weight of a cell under n areas: "sum" [P] n, "square" [A] n * n, "union" 1.
        k: areas for each sample, 1 .. A*H*W.
        kernel: side of the neighbourhood in which a peak is the largest; odd.

    Buffer `heads_index` [1] int64 says which heads the parameters belong to: a state of the other
    heads raises RuntimeError. A state without it, of sokd 0.1, is loaded.
    """

    adapts: ClassVar[bool] = True  # whether it compares adapted maps, of one shape
    heads_index: Tensor

    @torch.inference_mode(False)
    def __init__(
        self, channels: int, *, heat_channels: int = 100, heads: str = "bounded",
        areas: str = "mutual", overlap: str = "sum", k: int = 8, kernel: int = 3,
    ) -> None:  # fmt: skip
        super().__init__()
        self.channels = positive("DAM", "channels", channels)
        self.heat_channels = positive("DAM", "heat_channels", heat_channels)
        one_of("DAM", "heads", heads, _HEADS)
        self.heads = heads
        self.areas, self.overlap, self.k, self.kernel = checked_options(
            "DAM", areas, overlap, k, kernel
        )
        self.first = nn.Conv2d(channels, 3 * channels, 3, padding=1)
        self.heat = nn.Conv2d(channels, heat_channels, 1)
        self.size = nn.Conv2d(channels, 2, 1)
        self.offset = nn.Conv2d(channels, 2, 1)
        self.register_buffer("heads_index", torch.tensor([_HEADS.index(heads)]))

    def forward(self, student: Tensor, teacher: Tensor, *, scale: float = 1.0) -> Attention:
        """Agreement and areas of student and teacher, [B, C, H, W] each.

        The teacher's features are constants; both sides train the heads. `scale` multiplies L_D.
        """
        # two passes: in one batch the backward would compute the teacher's half of the input
        # gradient, which nothing reads
        last = self._last()
        sides = self._heads(student, *last), self._heads(teacher.detach(), *last)
        agreement = self._agreement(*sides, scale)
        of_student, of_teacher = (
            self._named(points.detach(), size.detach()) for points, size in sides
        )
        found = self._find(of_student, of_teacher, self.areas)
        weight = weight_of(found.coverage, self.overlap)
        return Attention(agreement, weight, found.coverage, found.boxes, of_student.heat)

    def maps(self, features: Tensor) -> Heads:
        """The outputs of the heads for features [B, C, H, W]."""
        return self._named(*self._heads(features, *self._last()))

    @torch.no_grad()
    def find(self, student: Tensor, teacher: Tensor, areas: str | None = None) -> Areas:
        """The areas of student and teacher [B, C, H, W]; `areas` None: the module's own choice.

        dam.find(f_s, f_t, "teacher").coverage                # [B, H, W]
        """
        return self._find(self.maps(student), self.maps(teacher), areas or self.areas)

    def extra_repr(self) -> str:
        names = ("heads", "areas", "overlap", "k", "kernel")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DAM:
        """As `nn.Module._apply`; `heads_index` has its value also after `to_empty`."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.heads_index.fill_(_HEADS.index(self.heads))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """As `nn.Module._load_from_state_dict`, but refuse the state of the other heads by name."""
        heads = heads_of_state(state_dict, prefix)
        if heads and self.heads not in heads:
            raise RuntimeError(
                f"DAM: the state was made with heads={heads[0]!r}, this module with "
                f"heads={self.heads!r}; make it with heads={heads[0]!r}"
            )
        name = f"{prefix}heads_index"
        if heads and (name not in state_dict or state_dict[name].is_meta):
            device = state_dict[f"{prefix}first.weight"].device
            state_dict[name] = torch.tensor([_HEADS.index(self.heads)], device=device)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _last(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the heads' last convolutions as one, with a block-diagonal weight.

        Three would first copy their slices of the hidden map.
        """
        heads = (self.heat, self.offset, self.size)
        weight: Tensor = torch.block_diag(*(head.weight.flatten(1) for head in heads))  # type: ignore[no-untyped-call]
        biases = [cast(Tensor, head.bias) for head in heads]
        if self.heads == "bounded":
            biases[2] = biases[2] - 1
        return weight[..., None, None], torch.cat(biases)

    def _heads(self, features: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """[N, C, H, W] -> heat and offset [N, A + 2, H, W], size in cells [N, 2, H, W]."""
        hidden = F.relu(self.first(features), inplace=True)
        raw = F.conv2d(hidden, weight, bias)
        ended = raw.sigmoid_() if self.heads == "bounded" else raw.relu_()
        points, size = torch.split(ended, [self.heat_channels + 2, 2], dim=1)
        return points, _in_cells(size) if self.heads == "bounded" else size

    def _named(self, points: Tensor, size: Tensor) -> Heads:
        heat, offset = torch.split(points, [self.heat_channels, 2], dim=1)
        return Heads(heat, size, offset)

    def _agreement(
        self, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], scale: float
    ) -> Tensor:
        """scale * L_D, the mean over the entries of all three heads."""
        share = scale / (self.heat_channels + 4)
        of_points = _mean_square(student[0], teacher[0], share * (self.heat_channels + 2))
        return of_points + _mean_square(student[1], teacher[1], share * 2)

    def _find(self, student: Heads, teacher: Heads, areas: str) -> Areas:
        of = teacher if areas == "teacher" else student
        other = teacher if areas == "mutual" else None
        return find_areas(*of, k=self.k, kernel=self.kernel, teacher=other)


def heads_of_state(state: Mapping[str, Any], prefix: str = "") -> tuple[str, ...]:
    """The heads of the `DAM` whose parameters a state_dict holds under `prefix`; (): none.

    heads_of_state(kd.state_dict(), "dam.")
    """
    if f"{prefix}first.weight" not in state:
        return ()
    index = state.get(f"{prefix}heads_index")
    return _HEADS if index is None or index.is_meta else (_HEADS[int(index)],)


def checked_options(
    op: str, areas: str, overlap: str, k: int, kernel: int
) -> tuple[str, str, int, int]:
    """The options of every DAM, checked."""
    one_of(op, "areas", areas, _AREAS)
    one_of(op, "overlap", overlap, _OVERLAP)
    k, kernel = positive(op, "k", k), positive(op, "kernel", kernel)
    if kernel % 2 == 0:
        raise ValueError(f"{op}: kernel must be odd, got {kernel}")
    return areas, overlap, k, kernel


def weight_of(coverage: Tensor, overlap: str) -> Tensor:
    """omega [B, H, W] from the number of areas over each cell."""
    if overlap == "square":
        return coverage.square()
    return coverage.clamp(max=1) if overlap == "union" else coverage


def reads_adapted(dam: nn.Module | None) -> bool:
    """Whether a DAM compares adapted maps; one with `adapts = False` reads the student's own."""
    return dam is not None and bool(getattr(unwrapped(dam), "adapts", True))


# ------------------------------------------------------------------------------ omega as a mask


def masked(features: Tensor, weight: Tensor | None) -> Tensor:
    """sqrt(omega) * features [B, C, H, W], omega resized to the features; no weight: as given.

    With the root, the squared difference of two masked maps has omega as its weight, as in
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


def _mean_square(student: Tensor, teacher: Tensor, scale: float) -> Tensor:
    return scaled_mse(student, teacher, None, normalise="elements", scale=scale, mutual=True)


def _in_cells(share: Tensor) -> Tensor:
    """Shares [N, 2, H, W] of the map's width and height in cells."""
    height, width = share.shape[-2:]
    if both_sides_at_once(height, width):
        return share * width
    across, down = share.chunk(2, dim=1)
    return torch.cat((across * width, down * height), dim=1)
