"""The losses of `sokd.methods` in plain PyTorch, written directly from the formulas: baselines.

Teachers have no graph; no operation is superfluous.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def kd(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    predicted = F.log_softmax(student / temperature, dim=1)
    wanted = F.softmax(teacher / temperature, dim=1)
    return F.kl_div(predicted, wanted, reduction="batchmean") * temperature**2


def lskd(student: Tensor, teacher: Tensor) -> Tensor:
    def standardised(logits: Tensor) -> Tensor:
        return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)

    return kd(standardised(student), standardised(teacher), 2.0)


def dkd(student: Tensor, teacher: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    true = F.one_hot(target, student.shape[1]).bool()

    def binary(logits: Tensor) -> Tensor:
        p = F.softmax(logits / temperature, dim=1)
        return torch.stack(((p * true).sum(1), (p * ~true).sum(1)), 1)

    def others(logits: Tensor) -> Tensor:
        return logits / temperature - 1000.0 * true

    of_target = F.kl_div(binary(student).log(), binary(teacher), reduction="batchmean")
    predicted, wanted = F.log_softmax(others(student), dim=1), F.softmax(others(teacher), dim=1)
    of_others = F.kl_div(predicted, wanted, reduction="batchmean")
    loss: Tensor = (of_target + 8 * of_others) * temperature**2
    return loss


def dist(student: Tensor, teacher: Tensor) -> Tensor:
    def correlation(one: Tensor, two: Tensor) -> Tensor:
        one, two = one - one.mean(1, keepdim=True), two - two.mean(1, keepdim=True)
        lengths = torch.linalg.vector_norm(one, dim=1) * torch.linalg.vector_norm(two, dim=1)
        mean: Tensor = ((one * two).sum(1) / (lengths + 1e-8)).mean()
        return mean

    p_s, p_t = student.softmax(1), teacher.softmax(1)
    inter, intra = correlation(p_s, p_t), correlation(p_s.T, p_t.T)
    return (1 - inter) + (1 - intra)


def fitnet(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(student, teacher)


def at(student: Tensor, teacher: Tensor) -> Tensor:
    energies = (each.pow(2).mean(1).flatten(1) for each in (student, teacher))
    attention_s, attention_t = map(F.normalize, energies)
    return (attention_s - attention_t).pow(2).mean()


def sp(student: Tensor, teacher: Tensor) -> Tensor:
    rows = [each.flatten(1) for each in (student, teacher)]
    alike_s, alike_t = (F.normalize(each @ each.T) for each in rows)
    return (alike_s - alike_t).pow(2).mean()


def rkd(student: Tensor, teacher: Tensor) -> Tensor:
    with torch.no_grad():
        far_t, angles_t = _relations(teacher)
    far_s, angles_s = _relations(student)
    return 25 * F.smooth_l1_loss(far_s, far_t) + 50 * F.smooth_l1_loss(angles_s, angles_t)


def _relations(points: Tensor) -> tuple[Tensor, Tensor]:
    squares = points.pow(2).sum(1)
    squared = (squares.unsqueeze(0) + squares.unsqueeze(1) - 2 * points @ points.T).clamp(min=1e-12)
    far = squared.sqrt() * (1 - torch.eye(len(points)))
    difference = F.normalize(points.unsqueeze(0) - points.unsqueeze(1), dim=2)
    return far / far[far > 0].mean(), torch.bmm(difference, difference.transpose(1, 2))


def catkd(student: Tensor, teacher: Tensor, head_s: Tensor, head_t: Tensor) -> Tensor:
    def pooled(features: Tensor, head: Tensor) -> Tensor:
        maps = F.conv2d(features, head[:, :, None, None])
        return F.normalize(F.adaptive_avg_pool2d(maps, 2).flatten(2), dim=2)

    return F.mse_loss(pooled(student, head_s), pooled(teacher, head_t))


def mgd(student: Tensor, teacher: Tensor, generation: nn.Module) -> Tensor:
    keep = (torch.rand(*student.shape[:2], 1, 1) >= 0.0).float()
    return F.mse_loss(generation(student * keep), teacher, reduction="sum") / len(student)


def nst(student: Tensor, teacher: Tensor) -> Tensor:
    def kernel(one: Tensor, two: Tensor) -> Tensor:
        mean: Tensor = torch.bmm(one, two.transpose(1, 2)).pow(2).mean()
        return mean

    own, other = (F.normalize(each.flatten(2), dim=2) for each in (student, teacher))
    return kernel(other, other) + kernel(own, own) - 2 * kernel(own, other)


def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    def neighbours(points: Tensor) -> Tensor:
        unit = points / (points.pow(2).sum(1, keepdim=True).sqrt() + 1e-7)
        near = (unit @ unit.T + 1) / 2
        return near / near.sum(1, keepdim=True)

    p_s, p_t = neighbours(student), neighbours(teacher)
    return (p_t * ((p_t + 1e-7) / (p_s + 1e-7)).log()).mean()


def cc(student: Tensor, teacher: Tensor) -> Tensor:
    def kernel(points: Tensor) -> Tensor:
        cosines = F.normalize(points) @ F.normalize(points).T
        powers = [math.exp(-0.8) * 0.8**p / math.factorial(p) * cosines.pow(p) for p in range(3)]
        return torch.stack(powers).sum(0)

    return F.mse_loss(kernel(student), kernel(teacher))


def vid(student: Tensor, teacher: Tensor, like: Any) -> Tensor:
    mean = like.regressor(student)
    variance = (F.softplus(like.scale) + 1e-5).view(1, -1, 1, 1)
    return (0.5 * ((mean - teacher) ** 2 / variance + variance.log())).mean()  # type: ignore[no-any-return]


def ofd(student: Tensor, teacher: Tensor, like: Any) -> Tensor:
    own, margin = like.connector(student), like.margin.view(1, -1, 1, 1)
    target = torch.maximum(teacher, margin)
    counts = ((own > target) | (target > 0)).float()
    return (F.mse_loss(own, target, reduction="none") * counts).sum() / len(own)  # type: ignore[no-any-return]


def wkd_logits(
    student: Tensor, teacher: Tensor, target: Tensor, distances: Tensor, transport: float = 10.0
) -> Tensor:
    """The target's row and column are cut out of each sample's costs."""
    batch, classes = student.shape
    others = torch.arange(classes) != target.unsqueeze(1)
    p_s, p_t = (
        F.softmax(each[others].view(batch, -1) / 2.0, dim=1).unsqueeze(2)
        for each in (student, teacher)
    )
    cost = (1 - torch.exp(-distances)).repeat(batch, 1, 1)
    cost = cost[others.unsqueeze(1) & others.unsqueeze(2)].view(batch, classes - 1, classes - 1)
    kernel = torch.exp(-cost / 0.05)
    u = torch.full_like(p_s, 1 / (classes - 1))
    for _ in range(10):
        v = p_t / (torch.bmm(kernel.transpose(1, 2), u) + 1e-8)
        u = p_s / (torch.bmm(kernel, v) + 1e-8)
    moved = (u * kernel * v.transpose(1, 2) * cost).sum((1, 2)).mean()
    log_q_s = F.log_softmax(student, dim=1).gather(1, target.unsqueeze(1))
    q_t = F.softmax(teacher, dim=1).gather(1, target.unsqueeze(1))
    return transport * moved - (q_t * log_q_s).mean()


def wkd_features(student: Tensor, teacher: Tensor) -> Tensor:
    """Region by region."""
    loss, (height, width) = torch.zeros(()), (each // 4 for each in student.shape[2:])
    for y in range(4):
        for x in range(4):
            place = slice(y * height, (y + 1) * height), slice(x * width, (x + 1) * width)
            own, other = (each[:, :, place[0], place[1]] for each in (student, teacher))
            means = (own.mean((2, 3)) - other.mean((2, 3))).pow(2).sum()
            if height * width > 1:
                deviations = [(each.var((2, 3)) + 1e-5).sqrt() for each in (own, other)]
                loss = loss + (deviations[0] - deviations[1]).pow(2).sum()
            loss = loss + 2 * means
    return loss / (16 * len(student))


def fgd(
    student: Tensor, teacher: Tensor, boxes: Sequence[Tensor], stride: int, like: Any
) -> Tensor:
    """The boxes one by one, the weights as factors of both maps; no padding."""
    batch, channels, height, width = student.shape
    density = torch.zeros(batch, height, width)
    behind = torch.ones(batch, height, width)
    for image, of_image in enumerate(boxes):
        for x1, y1, x2, y2 in of_image.tolist():
            down = slice(math.floor(y1 / stride), math.ceil(y2 / stride))
            across = slice(math.floor(x1 / stride), math.ceil(x2 / stride))
            cells = (down.stop - down.start) * (across.stop - across.start)
            part = density[image, down, across]
            density[image, down, across] = part.clamp(min=1 / cells)
        behind[image] = (density[image] == 0).float()
        behind[image] /= behind[image].sum().clamp(min=1)

    def attentions(features: Tensor) -> tuple[Tensor, Tensor]:
        value = features.abs()
        where = F.softmax((value.mean(1) / 0.5).view(batch, -1), dim=1) * height * width
        return where.view(batch, height, width), F.softmax(value.mean((2, 3)) / 0.5, 1) * channels

    (where_s, which_s), (where_t, which_t) = attentions(student), attentions(teacher)
    factor = where_t.unsqueeze(1).sqrt(), which_t[:, :, None, None].sqrt()
    sides = [each * factor[0] * factor[1] for each in (student, teacher)]
    loss = torch.zeros(())
    for scale, mask in ((1e-3, density), (5e-4, behind)):
        own, other = (each * mask.unsqueeze(1).sqrt() for each in sides)
        loss = loss + scale * F.mse_loss(own, other, reduction="sum") / batch
    loss = loss + 1e-3 * ((where_s - where_t).abs().sum() + (which_s - which_t).abs().sum()) / batch

    def related(features: Tensor, block: Any) -> Tensor:
        rows = features.view(batch, channels, -1)
        share = F.softmax((block.score.weight @ rows).squeeze(1), dim=1)
        pooled = torch.bmm(rows, share.unsqueeze(2)).squeeze(2)
        added: Tensor = features + block.transform(pooled)[:, :, None, None]
        return added

    blocks = related(student, like.student_context), related(teacher, like.teacher_context)
    return loss + 5e-6 * F.mse_loss(*blocks, reduction="sum") / batch


def reviewkd(students: Sequence[Tensor], teachers: Sequence[Tensor], *, fusions: Any) -> Tensor:
    outputs: list[Tensor] = []
    fused = None
    for fusion, student, teacher in list(zip(fusions, students, teachers, strict=True))[::-1]:
        own = fusion.reduce(student)
        if fused is not None:
            deeper = F.interpolate(fused, own.shape[2:], mode="nearest")
            share = torch.sigmoid(fusion.attention(torch.cat((own, deeper), 1)))
            own = own * share[:, :1] + deeper * share[:, 1:]
        fused = own if own.shape[2:] == teacher.shape[2:] else F.interpolate(own, teacher.shape[2:])
        outputs.insert(0, fusion.expand(fused))
    return torch.stack([_hcl(*pair) for pair in zip(outputs, teachers, strict=True)]).sum()


def _hcl(student: Tensor, teacher: Tensor) -> Tensor:
    loss, norm, factor = F.mse_loss(student, teacher), 1.0, 1.0
    for side in (4, 2, 1):
        if side < student.shape[2]:
            factor /= 2
            norm += factor
            pooled_s, pooled_t = (F.adaptive_avg_pool2d(each, side) for each in (student, teacher))
            loss = loss + factor * F.mse_loss(pooled_s, pooled_t)
    return loss / norm


class CRD:
    """Gather the rows, multiply, exponentiate; index_select and index_copy_ for the banks."""

    def __init__(self, like: Any) -> None:
        self.like, self.z = like, [-1.0, -1.0]
        self.student_bank, self.teacher_bank = like.student_bank.clone(), like.teacher_bank.clone()

    def __call__(
        self, student: Tensor, teacher: Tensor, index: Tensor, others: Tensor | None = None
    ) -> Tensor:
        v_s = F.normalize(self.like.student_embedding(student))
        v_t = F.normalize(self.like.teacher_embedding(teacher))
        if others is None:
            count = self.like.negatives.count
            others = torch.randint(0, len(self.student_bank), (len(index), count))
        picked = torch.cat((index.unsqueeze(1), others), 1)
        loss = self._side(0, v_s, self.teacher_bank, picked)
        loss = loss + self._side(1, v_t, self.student_bank, picked)
        self.remember(index, v_s.detach(), v_t.detach())
        return loss

    def _side(self, side: int, anchor: Tensor, bank: Tensor, picked: Tensor) -> Tensor:
        rows = bank.index_select(0, picked.flatten()).view(*picked.shape, -1)
        scores = torch.exp(torch.bmm(rows, anchor.unsqueeze(2)).squeeze(2) / 0.07)
        if self.z[side] < 0:
            self.z[side] = (scores.mean() * len(bank)).item()
        h, noise = scores / self.z[side], (picked.shape[1] - 1) / len(bank)
        positive = (h[:, 0] / (h[:, 0] + noise)).log().sum()
        negative = (noise / (h[:, 1:] + noise)).log().sum()
        return -(positive + negative) / len(anchor)

    @torch.no_grad()
    def remember(self, index: Tensor, *anchors: Tensor) -> None:
        for bank, anchor in zip((self.student_bank, self.teacher_bank), anchors, strict=True):
            rows = bank.index_select(0, index).mul_(0.5).add_(anchor * 0.5)
            bank.index_copy_(0, index, rows / rows.pow(2).sum(1, keepdim=True).sqrt())
