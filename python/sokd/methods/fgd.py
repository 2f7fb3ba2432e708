"""Focal and global distillation: foreground and background apart, and relations between cells.

    A[b,y,x] = N_b softmax_{y,x}(mean_c |F| / T);   C[b,c] = C softmax_c(mean_{y,x} |F| / T)
    R(F) = F + W2 ReLU(LN(W1 sum_{y,x} softmax_{y,x}(w F) F))        (a block for each side)
    focal = sum (foreground * density + background * (density = 0) / N_bg) A_t C_t omega (S - F_t)^2
    fgd = sum over layers of  1 / B * (focal + attention * (|A_s - A_t|_1 + |C_s - C_t|_1)
                                       + relation * sum omega (R(S) - R(F_t))^2)

S: the adapted student. Sums, means and softmaxes run over the N_b cells of image b that are not
padding; N_bg of them are in no box; density: 1 / cells of the smallest box over a cell
(`sokd.methods.regions`).

Source: Yang, Li, Jiang, Gong, Yuan, Zhao, Yuan, "Focal and Global Knowledge Distillation for
Detectors" (CVPR 2022, arXiv 2111.11837, section 3). R: the GcBlock of Cao, Xu, Lin, Wei, Hu,
"GCNet" (arXiv 1904.11492). Settled here: omega, 1 without a mask; padding has no part in any sum
(the authors stretch an image's boxes over its padding); a box covers the cells it touches (the
authors add one column and one row). The authors adapt by a 1x1 convolution, and not at all where
the channels are equal; a `Distiller` always adapts, so pass it adapter="linear".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from sokd.methods.checks import layer_pairs, number
from sokd.methods.common import Method, Shapes, Step, given, total, unmixed, wide
from sokd.methods.regions import Images, checked_boxes

__all__ = ["FGD", "FGDLoss", "fgd"]


def fgd(
    channels: int, *, foreground: float = 1e-3, background: float = 5e-4, attention: float = 1e-3,
    relation: float = 5e-6, temperature: float = 0.5,
) -> FGDLoss:  # fmt: skip
    """The loss module for features of the teacher's `channels`; see `FGDLoss`."""
    return FGDLoss(
        channels, foreground=foreground, background=background, attention=attention,
        relation=relation, temperature=temperature,
    )  # fmt: skip


class FGDLoss(nn.Module):
    """`fgd(channels)(student, teacher, boxes, input_size)` for one level of a pyramid.

        loss = sokd.methods.fgd(8)
        f_s, f_t = torch.randn(2, 8, 6, 8, requires_grad=True), torch.randn(2, 8, 6, 8)
        boxes = [torch.tensor([[4.0, 8.0, 30.0, 40.0]]), torch.zeros(0, 4)]
        loss(f_s, f_t, boxes, (48, 64), image_sizes=[(48, 64), (40, 64)]).backward()

    Args:
        channels: C of the teacher's map.
        foreground, background, attention, relation: the weights alpha, beta, gamma, lambda; the
            defaults are the authors' for detectors with anchors (their RetinaNet files: attention
            5e-4). Two-stage detectors (Faster R-CNN): 5e-5, 2.5e-5, 5e-5, 5e-7; without anchors
            (FCOS, RepPoints): 1.6e-3, 8e-4, 8e-4, 8e-6.
        temperature: T; the paper: 0.5 (their FCOS file: 0.8).

    Parameters: a global context block for each side, both trained; the teacher is not.
    """

    def __init__(
        self, channels: int, *, foreground: float = 1e-3, background: float = 5e-4,
        attention: float = 1e-3, relation: float = 5e-6, temperature: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__()
        number("fgd", "channels", channels, least=1, whole=True)
        weights = {
            "foreground": foreground, "background": background, "attention": attention,
            "relation": relation,
        }  # fmt: skip
        self.weights: dict[str, float] = {
            name: number("fgd", name, weight, least=0) for name, weight in weights.items()
        }
        self.temperature: float = number("fgd", "temperature", temperature, above=0)
        self.student_context, self.teacher_context = Context(channels), Context(channels)

    def forward(
        self, student: Tensor, teacher: Tensor, boxes: Sequence[Tensor],
        input_size: tuple[int, int], *, image_sizes: Sequence[tuple[int, int]] | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The level's term, the mean over the batch.

        Args:
            student: [B, C, H, W], already of the teacher's shape (`sokd.Adapter`).
            teacher: [B, C, H, W], constant.
            boxes: one [n, 4] for each image, x1 y1 x2 y2 in pixels of the network's input; [0, 4]:
                all of the image is background. On the CPU they are checked, elsewhere clamped to
                their image.
            input_size: (H_in, W_in) of the network's input, padding included.
            image_sizes: (h, w) of each image, which starts at the top left; the rest of the input
                is padding and is not distilled. None: there is no padding.
            weight: omega [B, H, W].

        Returns:
            [] float32 (float64 for float64); 0 for an empty batch.

        Raises:
            TypeError, ValueError: boxes that are empty or lie outside their image by more than a
                pixel, other shapes, other numbers of images.
        """
        images = Images.checked("fgd", image_sizes, input_size, len(student))
        boxes = checked_boxes("fgd", boxes, images, len(student))
        return self.compare(student, teacher, boxes, images, weight)

    def compare(
        self, student: Tensor, teacher: Tensor, boxes: Sequence[Tensor], images: Images,
        weight: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The same as `forward`, with the boxes and sizes already checked."""
        ((student, teacher, weight),) = layer_pairs("fgd", student, teacher, weight, same="shape")
        batch = student.shape[0]
        if batch == 0:
            return wide(student).sum() * 0
        inside = images.cells(student).flatten(1).to(wide(student).dtype)
        density = images.density(boxes, student).flatten(1)
        omega = inside if weight is None else inside * wide(weight).flatten(1)
        with unmixed(student):
            own, target = wide(student).flatten(2), wide(teacher).flatten(2)  # [B, C, H * W]
            where_s, which_s = self._attention(own, inside)
            where_t, which_t = self._attention(target, inside)
            difference = own - target
            focal = _weighted(difference, self._focus(inside, density) * where_t * omega) * which_t
            attention = (where_s - where_t).abs().sum() + (which_s - which_t).abs().sum()
            context = self.student_context(own, inside) - self.teacher_context(target, inside)
            relation = _weighted(difference + context.unsqueeze(2), omega)
        weights = self.weights["attention"], self.weights["relation"]
        return (focal.sum() + weights[0] * attention + weights[1] * relation.sum()) / batch

    def _attention(self, features: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        """features [B, C, N] -> attention over the cells [B, N] and over the channels [B, C]."""
        energy, cells = features.abs(), inside.sum(1, keepdim=True)
        where = _softmax(energy.mean(1) / self.temperature, inside) * cells
        strength = (energy @ inside.unsqueeze(2)).squeeze(2) / cells
        return where, (strength / self.temperature).softmax(1) * features.shape[1]

    def _focus(self, inside: Tensor, density: Tensor) -> Tensor:
        """The weights of foreground and background [B, N]."""
        behind = inside * (density == 0)
        behind = behind / behind.sum(1, keepdim=True).clamp(min=1)
        return self.weights["foreground"] * density + self.weights["background"] * behind

    def extra_repr(self) -> str:
        weights = ", ".join(f"{name}={weight:g}" for name, weight in self.weights.items())
        return f"{weights}, temperature={self.temperature:g}"


def _weighted(difference: Tensor, weight: Tensor) -> Tensor:
    """difference [B, C, N], weight [B, N] -> the weighted sums of squares [B, C]."""
    return (difference.square() @ weight.unsqueeze(2)).squeeze(2)


def _softmax(scores: Tensor, inside: Tensor) -> Tensor:
    """Softmax over the cells that are not padding."""
    return scores.masked_fill(inside == 0, -torch.inf).softmax(1)


class Context(nn.Module):
    """features [B, C, N] -> what a global context block adds to every cell [B, C].

    Its output is 0 at first, as in the authors' code: the last layer is initialised with zeros.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 2, 1)
        self.score = nn.Linear(channels, 1, bias=False)  # a softmax cancels a bias
        self.transform = nn.Sequential(
            nn.Linear(channels, hidden), nn.LayerNorm(hidden), nn.ReLU(inplace=True),
            nn.Linear(hidden, channels),
        )  # fmt: skip
        nn.init.kaiming_normal_(self.score.weight)
        nn.init.zeros_(self.transform[3].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.transform[3].bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor, inside: Tensor) -> Tensor:
        share = _softmax((wide(self.score.weight) @ features).squeeze(1), inside)
        pooled = (features @ share.unsqueeze(2)).squeeze(2)
        return wide(self.transform(pooled.to(self.score.weight.dtype))).to(features.dtype)


class FGD(Method):
    """`fgd` by name, on the adapted maps: one `FGDLoss` for each layer pair, their sum."""

    name: ClassVar[str] = "fgd"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "boxes"})
    adapts: ClassVar[bool] = True
    default_weight: ClassVar[float] = 1.0

    def __init__(
        self, student_shapes: Shapes = (), teacher_shapes: Shapes = (), *,
        foreground: float = 1e-3, background: float = 5e-4, attention: float = 1e-3,
        relation: float = 5e-6, temperature: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__(student_shapes, teacher_shapes)
        self.layers = nn.ModuleList(
            FGDLoss(
                shape[0], foreground=foreground, background=background, attention=attention,
                relation=relation, temperature=temperature,
            )
            for shape in teacher_shapes
        )  # fmt: skip

    def forward(self, step: Step) -> Tensor:
        boxes = given(self.name, "boxes", step.boxes, "a list of tensors [n, 4], one an image")
        if len(step.adapted) != len(self.layers):
            rule = f"have one map for each of the {len(self.layers)} levels"
            raise ValueError(f"fgd: student must {rule}, got {len(step.adapted)}")
        images = given(self.name, "input_size", step.images, "(height, width) of the padded input")
        boxes = checked_boxes(self.name, boxes, images, len(step.adapted[0]))
        maps = zip(self.layers, step.adapted, step.teacher, step.weight, strict=True)
        return total(
            [
                cast(FGDLoss, layer).compare(own, target, boxes, images, weight)
                for layer, own, target, weight in maps
            ]
        )
