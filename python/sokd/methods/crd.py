"""Contrastive representation distillation: pick the teacher embedding of the same sample.

    v = W x / |W x|, W for each side;   h(v, m) = exp(<v, m> / tau) / Z;   c = K / N
    L(v, M) = -1/B * sum_b [log h(v_b, M_b) / (h(v_b, M_b) + c)
                            + sum_{K others k} log c / (h(v_b, M_k) + c)]
    crd = L(v_student, M_teacher) + L(v_teacher, M_student)
    then, in training, on each side:
    M[index] <- normalise(momentum * M[index] + (1 - momentum) * v)

Source: Tian, Krishnan, Isola, "Contrastive Representation Distillation" (ICLR 2020, arXiv
1910.10699, section 3; Z, the banks and their momentum as in the authors' code, whose 1e-7 in the
denominators, which adds about 1e-7 N to each side's value, is left out).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sokd.kd.policy import fresh_seed
from sokd.methods.checks import layer_pairs, number
from sokd.methods.common import Method, Shapes, Step, constant, given, root, unmixed, wide
from sokd.methods.contrast import noise_contrast
from sokd.methods.negatives import Negatives
from sokd.ops.distributed import all_gathered, place
from sokd.ops.runtime import eager_only, is_eager

__all__ = ["CRD", "CRDLoss", "crd", "pooled"]

_SHORTEST = 1e-12  # the least norm that is divided by, as in `F.normalize`


def crd(
    student_dim: int, teacher_dim: int, num_samples: int, *, dim: int = 128, negatives: int = 16384,
    temperature: float = 0.07, momentum: float = 0.5, labels: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> CRDLoss:  # fmt: skip
    """The loss module for embeddings of these sizes and `num_samples` samples; see `CRDLoss`."""
    return CRDLoss(
        student_dim, teacher_dim, num_samples, dim=dim, negatives=negatives,
        temperature=temperature, momentum=momentum, labels=labels, generator=generator,
    )  # fmt: skip


class CRDLoss(nn.Module):
    """`crd(...)(student [B, D_s], teacher [B, D], index [B])`: both sides' contrast, a scalar.

        loss = sokd.methods.crd(16, 64, num_samples=1000, negatives=32)
        student, teacher = torch.randn(8, 16, requires_grad=True), torch.randn(8, 64)
        loss(student, teacher, torch.arange(8)).backward()

    Args:
        student_dim, teacher_dim: D_s and D.
        num_samples: N, the number of training samples; `index` is in 0 .. N - 1.
        dim: of the embeddings; the paper uses 128.
        negatives: K for each sample, drawn independently, as in the formula; the paper uses 16384.
        temperature, momentum: tau and the momentum of the banks; the paper uses 0.07 and 0.5 (and a
            weight of 0.8).
        labels: [N] int64, the classes of the training samples, for negatives of other classes only,
            as in the authors' code and the published figures; None: any other samples.
        generator: source of the seed of banks and negatives; None: see `sokd.manual_seed`.

    Parameters: the two embeddings. Buffers: the banks, the logarithms of Z (NaN until the first
    batch sets them, as in the authors' code), seed and counter of the negatives; a checkpoint
    resumes bit for bit. Everything is float32 under autocast. Under torch.distributed the banks of
    every rank receive the embeddings of all ranks; Z is each rank's own in the first batch and the
    mean over the ranks afterwards. A second derivative raises, and torch.compile breaks its graph
    here. If an index occurs twice in a batch, the last embedding is kept (on a GPU, either one).
    """

    student_bank: Tensor
    teacher_bank: Tensor
    log_normaliser: Tensor

    @torch.inference_mode(False)
    def __init__(
        self, student_dim: int, teacher_dim: int, num_samples: int, *, dim: int = 128,
        negatives: int = 16384, temperature: float = 0.07, momentum: float = 0.5,
        labels: Tensor | None = None, generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, size in (
            ("student_dim", student_dim),
            ("teacher_dim", teacher_dim),
            ("dim", dim),
        ):
            number("crd", name, size, least=1, whole=True)
        number("crd", "temperature", temperature, above=0)
        number("crd", "momentum", momentum, least=0, below=1)
        seed = fresh_seed(generator)
        self.negatives = Negatives(num_samples, negatives, labels, seed)
        self.temperature, self.momentum = temperature, momentum
        self.student_embedding = nn.Linear(student_dim, dim)
        self.teacher_embedding = nn.Linear(teacher_dim, dim)
        start = torch.rand(2, num_samples, dim, generator=torch.Generator().manual_seed(int(seed)))
        start = (2 * start - 1) * math.sqrt(3 / dim)  # rows of norm 1 on average
        self.register_buffer("student_bank", start[0])
        self.register_buffer("teacher_bank", start[1])
        self.register_buffer("log_normaliser", torch.full((2,), math.nan))

    # A compiled graph may delay the gradient's reads of a bank until the bank has been updated,
    # which gave wrong gradients with torch 2.13. So this loss always runs eagerly.
    @eager_only
    def forward(
        self, student: Tensor, teacher: Tensor, index: Tensor, contrast: Tensor | None = None
    ) -> Tensor:
        """The contrastive loss; in train mode the banks receive the new embeddings.

        Args:
            student, teacher: [B, D_s] and [B, D]; the teacher's embedding is trained, the teacher
                is not.
            index: [B] int64, the samples' indices in the training set, 0 .. N - 1 (checked on the
                CPU).
            contrast: [B, K] int64, the negatives; None: drawn.

        Returns:
            [] float32; 0 for an empty batch, which changes no buffer.
        """
        self._check_embeddings(student, teacher)
        self._check_index(index, student)
        with unmixed(student):
            of_student = _embed(student, self.student_embedding)
            of_teacher = _embed(constant(teacher), self.teacher_embedding)
            used = self.log_normaliser.new_full((2,), math.nan)
            if index.shape[0]:
                others = self.negatives(index) if contrast is None else contrast
                picked = torch.cat((index.unsqueeze(1), others), 1)
                sides = ((of_student, self.teacher_bank), (of_teacher, self.student_bank))
                parts = [
                    noise_contrast(*side, picked, known, self.temperature)
                    for side, known in zip(sides, self.log_normaliser, strict=True)
                ]
                loss, used = (torch.stack(each) for each in zip(*parts, strict=True))
                loss = loss.sum()
            else:
                loss = (of_student.sum() + of_teacher.sum()) * 0
            if self.training:
                self._settle(used)
                self._remember(index, of_student.detach(), of_teacher.detach())
        return loss

    @torch.no_grad()
    def _settle(self, used: Tensor) -> None:
        """Set Z from the first batch, over all ranks."""
        known, fresh = self.log_normaliser, _mean_of_exp(all_gathered(used.unsqueeze(0)))
        known.copy_(torch.where(known.isnan(), fresh, known))

    @torch.no_grad()
    def _remember(self, index: Tensor, *embeddings: Tensor) -> None:
        """Write the new embeddings of all ranks into the banks, which stay equal on every rank."""
        if place()[1] > 1:  # one all-gather for both
            index, joined = all_gathered(index), all_gathered(torch.cat(embeddings, 1))
            embeddings = joined.chunk(2, 1)
        for bank, embedding in zip((self.student_bank, self.teacher_bank), embeddings, strict=True):
            rows = bank.index_select(0, index).lerp_(embedding, 1 - self.momentum)
            # `F.normalize` in place, which is otherwise a third of the update
            length = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min_(_SHORTEST)
            bank.index_copy_(0, index, rows.div_(length))

    def _check_embeddings(self, student: Tensor, teacher: Tensor) -> None:
        layer_pairs("crd", student, teacher, embeddings=True)
        sides = (
            ("student", student, self.student_embedding),
            ("teacher", teacher, self.teacher_embedding),
        )
        for name, features, embedding in sides:
            if features.dim() != 2:
                rule = "be [B, D] (see sokd.methods.pooled for maps)"
                raise ValueError(f"crd: {name} must {rule}, got {list(features.shape)}")
            if features.shape[1] != embedding.in_features:
                rule = f"be [B, {embedding.in_features}] ({name}_dim)"
                raise ValueError(f"crd: {name} must {rule}, got {list(features.shape)}")

    def _check_index(self, index: Tensor, student: Tensor) -> None:
        if not isinstance(index, Tensor) or index.dtype != torch.int64:
            got = str(index.dtype) if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"crd: index must be an int64 tensor [B], got {got}")
        if index.shape != student.shape[:1]:
            raise ValueError(f"crd: index must be [{student.shape[0]}], got {list(index.shape)}")
        if index.device.type == "cpu" and index.numel() and is_eager(index):
            low, high = (int(end) for end in index.aminmax())
            if low < 0 or high >= len(self.student_bank):
                rule = f"lie in 0 .. {len(self.student_bank) - 1} (num_samples)"
                raise ValueError(f"crd: index must {rule}, got {low if low < 0 else high}")


def _mean_of_exp(logs: Tensor) -> Tensor:
    """log of the mean of exp(logs [R, 2]) over R, ignoring NaN (ranks without samples)."""
    there = ~logs.isnan()
    total = torch.where(there, logs, -math.inf).logsumexp(0)
    return torch.where(there.any(0), total - there.sum(0).log(), math.nan)


def _embed(features: Tensor, embedding: nn.Linear) -> Tensor:
    return F.normalize(embedding(features.to(embedding.weight.dtype)))


def pooled(features: Tensor, weight: Tensor | None = None) -> Tensor:
    """[B, C, H, W] -> [B, C] float32 (float64): the mean over the cells, weighted by sqrt(omega).

        assert sokd.methods.pooled(torch.randn(2, 16, 7, 7)).shape == (2, 16)

    Settled here, for CRD with a mask (docs/method.md 4: refine, mask, then pool): the weights are
    divided by their sum, so that the size of the areas does not scale the embedding. An omega that
    is 0 everywhere gives 0.
    """
    features = wide(features)
    if weight is None:
        return features.mean((2, 3))
    share = root(features, weight)
    share = share / share.sum((1, 2), keepdim=True).clamp_min(torch.finfo(share.dtype).tiny)
    with unmixed(features):
        return (features.flatten(2) @ share.to(features.dtype).flatten(1).unsqueeze(2)).squeeze(2)


class CRD(Method):
    """`crd` as a `Method`, on the pooled last layer pair; the options are those of `CRDLoss`."""

    name: ClassVar[str] = "crd"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "index"})
    default_weight: ClassVar[float] = 0.8

    def __init__(
        self, student_shapes: Shapes = (), teacher_shapes: Shapes = (), *,
        num_samples: int | None = None, dim: int = 128, negatives: int = 16384,
        temperature: float = 0.07, momentum: float = 0.5,
        labels: Tensor | None = None, generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__(student_shapes, teacher_shapes)
        if num_samples is None:
            raise TypeError(
                "crd: num_samples must be given (the size of the training set), got None"
            )
        self.loss = CRDLoss(
            student_shapes[-1][0], teacher_shapes[-1][0], num_samples, dim=dim, negatives=negatives,
            temperature=temperature, momentum=momentum, labels=labels, generator=generator,
        )  # fmt: skip

    def forward(self, step: Step) -> Tensor:
        index = given(
            self.name, "index", step.index, "the samples' indices in the training set, int64 [B]"
        )
        ((student, teacher, weight),) = layer_pairs(
            self.name, step.student[-1], step.teacher[-1], step.weight[-1]
        )
        loss: Tensor = self.loss(pooled(student, weight), pooled(teacher, weight), index)
        return loss
