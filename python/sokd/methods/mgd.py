"""Masked generative distillation: generate the teacher's features from masked student features.

    keep ~ Bernoulli(1 - ratio) for each channel, or each cell, of each sample
    G = conv3x3, ReLU, conv3x3
    mgd = sum over layers of  1 / B * sum_{b,c,y,x} omega[b,y,x] * (G(keep * Phi(F_s)) - F_t)^2

Source: Yang, Li, Shao, Shi, Yuan, Yuan, "Masked Generative Distillation" (ECCV 2022, arXiv
2205.01529, section 3; the authors' code masks cells in detection, channels in classification).
omega, 1 without a mask: settled here.
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from sokd.kd.policy import fresh_seed
from sokd.methods.checks import layer_pairs, number
from sokd.methods.common import Method, Shapes, Step, total
from sokd.methods.fitnet import hint
from sokd.ops import draw

__all__ = ["MGD", "MGDLoss", "mgd"]

_RATIO = {"channels": 0.15, "cells": 0.65}  # the authors' for classification and for detection


def mgd(
    channels: int, *, ratio: float | None = None, over: str = "channels",
    generator: torch.Generator | None = None,
) -> MGDLoss:  # fmt: skip
    """The loss module for features of the teacher's `channels`; see `MGDLoss`."""
    return MGDLoss(channels, ratio=ratio, over=over, generator=generator)


class MGDLoss(nn.Module):
    """`mgd(channels)(student, teacher, weight=None)` for one layer.

        loss = sokd.methods.mgd(8)
        f_s, f_t = torch.randn(2, 8, 7, 7, requires_grad=True), torch.randn(2, 8, 7, 7)
        loss(f_s, f_t).backward()

    Args:
        channels: C of the teacher's map.
        ratio: the share that is masked; None: the authors' 0.15 of the channels or 0.65 of the
            cells.
        over: "channels" or "cells".
        generator: source of the seed of the masks; None: see `sokd.manual_seed`.

    The masks are a function of the buffers `seed` and `counter` (int64 [1]), so a checkpoint
    resumes bit for bit. The authors' weights are 7e-5 (classification), 2e-5
    (detectors of one stage) and 5e-7 (of two, which mask 0.45 of the cells); for segmentation they
    mask 0.75 of the cells. They adapt by a 1x1 convolution, and not at all where the channels are
    equal; in a `Distiller` that is adapter="linear".
    """

    seed: Tensor
    counter: Tensor

    @torch.inference_mode(False)
    def __init__(
        self, channels: int, *, ratio: float | None = None, over: str = "channels",
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if over not in _RATIO:
            raise ValueError(f"mgd: over must be one of {', '.join(_RATIO)}, got {over!r}")
        ratio = _RATIO[over] if ratio is None else ratio
        number("mgd", "channels", channels, least=1, whole=True)
        self.ratio: float = number("mgd", "ratio", ratio, least=0, below=1)
        self.over = over
        self.generation = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        self.register_buffer("seed", fresh_seed(generator))
        self.register_buffer("counter", torch.zeros(1, dtype=torch.int64))

    def forward(self, student: Tensor, teacher: Tensor, weight: Tensor | None = None) -> Tensor:
        """The squared difference, summed over channels and cells, the mean over the batch.

        Args:
            student: [B, C, H, W], already of the teacher's shape (`sokd.Adapter`).
            teacher: [B, C, H, W], constant.
            weight: omega [B, H, W]: both maps are multiplied by its square root.

        Returns:
            [] float32 (float64 for float64); 0 for an empty batch. Autocast applies to the
            convolutions.
        """
        ((student, teacher, weight),) = layer_pairs("mgd", student, teacher, weight, same="shape")
        generated = self.generation(student * self._keep(student))
        cells = student.shape[1] * student.shape[2] * student.shape[3]
        return hint(generated, teacher, weight, scale=cells)

    def _keep(self, features: Tensor) -> Tensor:
        """[B, C, 1, 1] or [B, 1, H, W] of ones and zeros; a new draw in each training step."""
        batch, channels, height, width = features.shape
        shape = (batch, channels, 1, 1) if self.over == "channels" else (batch, 1, height, width)
        uniforms, _ = draw(self.seed, self.counter, shape[0] * shape[1] * shape[2] * shape[3])
        if self.training:
            self.counter.add_(1)
        return (uniforms >= self.ratio).view(shape).to(features.dtype)

    def extra_repr(self) -> str:
        return f"ratio={self.ratio:g}, over={self.over!r}"


class MGD(Method):
    """`mgd` as a `Method`, on the adapted maps: the sum of one `MGDLoss` for each layer pair."""

    name: ClassVar[str] = "mgd"
    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    adapts: ClassVar[bool] = True
    default_weight: ClassVar[float] = 7e-5

    def __init__(
        self, student_shapes: Shapes = (), teacher_shapes: Shapes = (), *,
        ratio: float | None = None, over: str = "channels",
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__(student_shapes, teacher_shapes)
        self.layers = nn.ModuleList(
            MGDLoss(shape[0], ratio=ratio, over=over, generator=generator)
            for shape in teacher_shapes
        )

    def forward(self, step: Step) -> Tensor:
        maps = zip(self.layers, step.adapted, step.teacher, step.weight, strict=True)
        return total([cast(Tensor, layer(*each)) for layer, *each in maps])
