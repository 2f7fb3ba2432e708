"""Wasserstein distances: of predictions over related classes, and of Gaussians of features.

    p = softmax(logits / T) over the classes but y;   c_ij = 1 - exp(-sharpness * distances_ij)
    W = sum_ij u_i K_ij c_ij v_j,   K = exp(-c / regularisation),   after `iterations` times
        v = p_t / (K^T u + 1e-8);   u = p_s / (K v + 1e-8),   from u = 1 / (classes - 1)
    wkd_logits = 1 / B * sum_b [transport * W - q_t[y] log q_s[y]],   q = softmax(logits)
    mu, sigma = mean and standard deviation of each channel in the regions of a grid g x g of cells
    wkd_features = 1 / (B g^2) * sum means * (mu_s - mu_t)^2 + (sigma_s - sigma_t)^2
    wkd = wkd_logits + features * wkd_features

Source: Lv, Yang, Li, "Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge
Distillation" (NeurIPS 2024, arXiv 2412.08139, section 3; the target's term without temperature,
the 1e-8, the variance divided by n - 1 and the added 1e-5 as in the authors' code). omega, 1
without a mask: both maps are multiplied by its root first, settled here.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sokd.methods.catkd import Head, head_weight
from sokd.methods.checks import check_target, layer_pairs, logits_pair, number
from sokd.methods.common import (
    Maps,
    Method,
    Shapes,
    Step,
    Weights,
    given,
    masked,
    total,
    unit,
    unmixed,
    wide,
)

__all__ = ["WKD", "class_distances", "wkd", "wkd_features", "wkd_logits"]

_EPS = 1e-8  # added to the sums that the marginals are divided by
_VARIANCE = 1e-5
_ROWS = 64  # of each class's Gram matrix at a time


def wkd(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, distances: Tensor,
    student: Maps, teacher: Maps, weight: Weights = None, *, transport: float = 10.0,
    features: float = 0.02, means: float = 2.0, temperature: float = 2.0, sharpness: float = 1.0,
    regularisation: float = 0.05, iterations: int = 10, grid: int = 4, ignore_index: int = -100,
) -> Tensor:  # fmt: skip
    """`wkd_logits` plus `features` times `wkd_features`.

        student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
        target, distances = torch.randint(0, 10, (8,)), 1 - torch.eye(10)
        f_s, f_t = torch.randn(8, 4, 7, 7, requires_grad=True), torch.randn(8, 4, 7, 7)
        sokd.methods.wkd(student, teacher, target, distances, f_s, f_t).backward()

    Args:
        student_logits, teacher_logits, target, distances: see `wkd_logits`.
        student, teacher, weight: see `wkd_features`.
        features: the weight of the features' part; the authors' configurations: 0.02 (ResNet34 ->
            ResNet18; 1.0 in their file for both parts), 0.005 (ResNet50 -> MobileNetV1), 0.08 to
            0.5 on CIFAR-100.
        transport, temperature, sharpness, regularisation, iterations, ignore_index: of the logits'
            part.
        means, grid: of the features' part.

    Returns:
        [] float32 (float64 for float64); 0 for an empty batch.
    """
    _check_features_option(features)
    of_logits = wkd_logits(
        student_logits, teacher_logits, target, distances, transport=transport,
        temperature=temperature, sharpness=sharpness, regularisation=regularisation,
        iterations=iterations, ignore_index=ignore_index,
    )  # fmt: skip
    return of_logits + features * wkd_features(student, teacher, weight, means=means, grid=grid)


def wkd_logits(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, distances: Tensor, *,
    transport: float = 10.0, temperature: float = 2.0, sharpness: float = 1.0,
    regularisation: float = 0.05, iterations: int = 10, ignore_index: int = -100,
) -> Tensor:  # fmt: skip
    """WKD-L: optimal transport between the predictions for the other classes, and the target's.

        student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
        target, distances = torch.randint(0, 10, (8,)), 1 - torch.eye(10)
        sokd.methods.wkd_logits(student, teacher, target, distances).backward()

    Args:
        student_logits, teacher_logits: [B, K], K >= 2, any floating-point dtypes.
        target: [B] int64, the true classes, or `ignore_index`.
        distances: [K, K] between classes, 0 to themselves, not negative: see `class_distances`.
        transport: the weight of the transport; the authors': 30 for ResNet34 -> ResNet18 (10 with
            features), 25 for ResNet50 -> MobileNetV1, 60 to 600 on CIFAR-100.
        temperature: T of the transport; 2 on ImageNet, 4 to 8 on CIFAR-100.
        sharpness, regularisation, iterations: kappa, eta and steps of Sinkhorn's algorithm; the
            authors': 1 (2 for ResNet50 -> MobileNetV1), 0.05, 10.
        ignore_index: the label of samples that are left out of the loss and its mean.

    Returns:
        [] float32 (float64 for float64); 0 for an empty batch. The gradient is that of the
        iterations. The authors let the weights fall to 0 by a cosine, on ImageNet from the first
        epoch (ResNet34 -> ResNet18), on CIFAR-100 after 150 of 240 epochs.
    """
    _check_logits_options(transport, temperature, sharpness, regularisation, iterations)
    student, teacher = logits_pair("wkd", student_logits, teacher_logits, dense=False)
    check_target("wkd", target, student, ignore_index)
    cost = _cost(_checked_distances(distances, student), sharpness)
    counted = (target != ignore_index).to(student.dtype)
    classes = torch.arange(student.shape[1], device=student.device)
    own = torch.where(target != ignore_index, target, 0).unsqueeze(1) == classes
    q_t = teacher.softmax(1).masked_fill(~own, 0.0).sum(1)
    log_q_s = student.log_softmax(1).masked_fill(~own, 0.0).sum(1)
    p_s, p_t = (
        (logits / temperature).masked_fill(own, -torch.inf).softmax(1)
        for logits in (student, teacher)
    )
    moved = _sinkhorn(p_s, p_t, cost, ~own, regularisation, iterations)
    return ((transport * moved - q_t * log_q_s) * counted).sum() / counted.sum().clamp(min=1)


def _sinkhorn(
    p_s: Tensor, p_t: Tensor, cost: Tensor, others: Tensor, regularisation: float, iterations: int
) -> Tensor:
    """The transport's cost [B]. The target is a class without mass, so that all samples share K."""
    kernel = (-cost / regularisation).exp()
    with unmixed(p_s):
        u, v = others.to(p_s.dtype) / (p_s.shape[1] - 1), p_t
        for _ in range(iterations):
            v = p_t / (u @ kernel + _EPS)
            u = p_s / (v @ kernel.mT + _EPS)
        return (u @ (kernel * cost) * v).sum(1)


def _cost(distances: Tensor, sharpness: float) -> Tensor:
    return 1 - (-sharpness * distances).exp()


def wkd_features(
    student: Maps, teacher: Maps, weight: Weights = None, *, means: float = 2.0, grid: int = 4
) -> Tensor:
    """WKD-F: the squared distance of Gaussians with diagonal covariances, in regions of the map.

        f_s, f_t = torch.randn(2, 8, 7, 7, requires_grad=True), torch.randn(2, 8, 7, 7)
        sokd.methods.wkd_features(f_s, f_t).backward()

    Args:
        student: [B, C, H, W], already of the teacher's shape (`sokd.Adapter`), or a list of them,
            one a layer; the paper: the last stage.
        teacher: [B, C, H, W], constant, or an equally long list.
        weight: omega [B, H, W], or one (or None) for each layer.
        means: the weight of the means relative to the deviations; the authors': 2 on ImageNet, 3 to
            8 on CIFAR-100.
        grid: g, regions on a side, at most the cells of the map; the authors': 4 on ImageNet, 1 or
            4 on CIFAR-100.

    Returns:
        [] float32 (float64 for float64), the sum over the layers; 0 for an empty batch. A region of
        one cell has the deviation 0.
    """
    _check_feature_options(means, grid)
    pairs = layer_pairs("wkd", student, teacher, weight, same="shape")
    return total([_gaussians(*pair, means, grid) for pair in pairs])


def _gaussians(
    student: Tensor, teacher: Tensor, weight: Tensor | None, means: float, grid: int
) -> Tensor:
    (mean_s, deviation_s), (mean_t, deviation_t) = (
        _moments(masked(wide(features), weight), grid) for features in (student, teacher)
    )
    distance = means * (mean_s - mean_t).square() + (deviation_s - deviation_t).square()
    regions = distance.shape[0] * distance.shape[2] * distance.shape[3]
    return distance.sum() / max(regions, 1)


def _moments(features: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation in each region of the grid, [B, C, g, g]."""
    size = min(grid, features.shape[2]), min(grid, features.shape[3])
    if features.shape[2] % size[0] == 0 and features.shape[3] % size[1] == 0:
        rows, columns = features.shape[2] // size[0], features.shape[3] // size[1]
        regions = features.reshape(*features.shape[:2], size[0], rows, size[1], columns)
        mean = regions.mean((3, 5), keepdim=True)
        spread = (regions - mean).square().sum((3, 5)) / max(rows * columns - 1, 1)
        return mean.reshape(spread.shape), (spread + _VARIANCE).sqrt()
    return _overlapping_moments(features, size)


def _overlapping_moments(features: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """In the regions of `adaptive_avg_pool2d`.

    The channel's mean is subtracted first: a mean of squares less a square of the mean cancels.
    """
    base = features.detach().mean((2, 3), keepdim=True)
    features = features - base
    mean = F.adaptive_avg_pool2d(features, size)
    spread = F.adaptive_avg_pool2d(features.square(), size) - mean.square()
    rows, columns = (
        _counts(cells, regions, features)
        for cells, regions in zip(features.shape[2:], size, strict=True)
    )
    count = rows.unsqueeze(1) * columns
    unbiased = torch.where(count > 1, count / (count - 1).clamp(min=1), 0.0)
    return mean + base, (spread.clamp(min=0) * unbiased + _VARIANCE).sqrt()


def _counts(cells: int, regions: int, like: Tensor) -> Tensor:
    """How many of the cells each of the regions covers, as `adaptive_avg_pool2d` has it."""
    place = torch.arange(regions, device=like.device)
    first, last = place * cells // regions, -(-(place + 1) * cells // regions)
    return (last - first).to(like.dtype)


def class_distances(features: Tensor) -> Tensor:
    """features of the classes [K, N, D] -> 1 - linear CKA of each two of them, [K, K].

        distances = sokd.methods.class_distances(torch.randn(10, 32, 16))
        assert distances.shape == (10, 10)

    Args:
        features: the teacher's, of N >= 2 training images of each class: logits (the authors on
            ImageNet) or cells of the last map (on CIFAR-100).

    Returns:
        float32 (float64 for float64), from 0 to 1, symmetric, 0 on the diagonal.
    """
    if not isinstance(features, Tensor) or not features.is_floating_point():
        got = str(features.dtype) if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(f"class_distances: features must be a floating-point tensor, got {got}")
    if features.dim() != 3 or features.shape[0] < 2 or features.shape[1] < 2:
        got = str(list(features.shape))
        raise ValueError(f"class_distances: features must be [K >= 2, N >= 2, D], got {got}")
    centred = wide(features.detach())
    centred = centred - centred.mean(1, keepdim=True)
    products = centred.new_zeros(features.shape[0], features.shape[0])
    with unmixed(centred):
        for rows in torch.split(centred, _ROWS, dim=1):
            grams = (rows @ centred.mT).flatten(1)
            products += grams @ grams.mT
    length = products.diagonal().sqrt().clamp(min=torch.finfo(products.dtype).tiny)
    distances = (1 - products / length.unsqueeze(1) / length).clamp_(0, 1)
    return distances.fill_diagonal_(0)


def _cosines(weight: Tensor) -> Tensor:
    """1 - the cosine of each two rows."""
    rows = unit(wide(weight.detach()), 1)
    with unmixed(rows):
        return (1 - rows @ rows.mT).clamp(min=0)


def _checked_distances(distances: Any, logits: Tensor) -> Tensor:
    if not isinstance(distances, Tensor) or not distances.is_floating_point():
        got = str(distances.dtype) if isinstance(distances, Tensor) else type(distances).__name__
        raise TypeError(f"wkd: distances must be a floating-point tensor [K, K], got {got}")
    classes = logits.shape[1]
    if distances.shape != (classes, classes):
        rule = f"be [{classes}, {classes}] for the logits' classes"
        raise ValueError(f"wkd: distances must {rule}, got {list(distances.shape)}")
    return distances.detach().to(logits.device, logits.dtype).clamp(min=0)


def _check_logits_options(
    transport: float, temperature: float, sharpness: float, regularisation: float, iterations: int
) -> None:
    number("wkd", "transport", transport, least=0)
    number("wkd", "temperature", temperature, above=0)
    number("wkd", "sharpness", sharpness, above=0)
    number("wkd", "regularisation", regularisation, above=0)
    number("wkd", "iterations", iterations, least=1, whole=True)


def _check_feature_options(means: float, grid: int) -> None:
    number("wkd", "means", means, least=0)
    number("wkd", "grid", grid, least=1, whole=True)


def _check_features_option(features: float) -> None:
    number("wkd", "features", features, least=0)


class WKD(Method):
    """`wkd` by name: the logits, and the adapted maps of every layer pair.

    Options:
        distances: [K, K] between the classes (`class_distances`); None: 1 - the cosine of the
            classes' rows in `teacher_head`, as an option of the authors' code. They are computed
            once: the teacher's state is to be loaded before.
        teacher_head: the teacher's classifier (see `sokd.methods.class_maps`).
        transport, features, means, temperature, sharpness, regularisation, iterations, grid,
            ignore_index: see `wkd`.
    """

    name: ClassVar[str] = "wkd"
    needs: ClassVar[frozenset[str]] = frozenset({"logits", "features", "target"})
    adapts: ClassVar[bool] = True
    default_weight: ClassVar[float] = 1.0
    distances: Tensor

    def __init__(
        self, student_shapes: Shapes = (), teacher_shapes: Shapes = (), *,
        distances: Tensor | None = None, teacher_head: Head | None = None, transport: float = 10.0,
        features: float = 0.02, means: float = 2.0, temperature: float = 2.0,
        sharpness: float = 1.0, regularisation: float = 0.05, iterations: int = 10, grid: int = 4,
        ignore_index: int = -100,
    ) -> None:  # fmt: skip
        super().__init__(student_shapes, teacher_shapes)
        _check_logits_options(transport, temperature, sharpness, regularisation, iterations)
        _check_feature_options(means, grid)
        _check_features_option(features)
        number("wkd", "ignore_index", ignore_index, least=-math.inf, whole=True)
        self.options: dict[str, Any] = {
            "transport": transport, "features": features, "means": means,
            "temperature": temperature, "sharpness": sharpness, "regularisation": regularisation,
            "iterations": iterations, "grid": grid, "ignore_index": ignore_index,
        }  # fmt: skip
        if distances is None:
            if teacher_head is None:
                rule = "be given, [K, K] (sokd.methods.class_distances), or teacher_head"
                raise TypeError(f"wkd: distances must {rule}, got None")
            distances = _cosines(head_weight("wkd", teacher_head, teacher_shapes[-1][0]))
        # not persistent: they come with the options
        self.register_buffer("distances", torch.as_tensor(distances), persistent=False)

    def forward(self, step: Step) -> Tensor:
        target = given(self.name, "target", step.target, "it is treated apart")
        return wkd(
            *self.logits(step), target, self.distances, step.adapted, step.teacher, step.weight,
            **self.options,
        )  # fmt: skip
