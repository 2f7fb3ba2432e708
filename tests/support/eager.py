"""The operators in PyTorch as users write them: the baselines of the benches."""

import torch
import torch.nn.functional as F
from torch import Tensor

Heads = tuple[Tensor, Tensor, Tensor]


def refine(
    features: Tensor, theta: Tensor, hole: Tensor, sigma: Tensor, perm: Tensor, keep: Tensor
) -> Tensor:
    """All five parts by index_select, affine_grid, grid_sample, randn_like and masks."""
    batch, _, height, width = features.shape
    if len(perm) == 1:
        out = features.index_select(1, perm[0])
    else:
        out = features[torch.arange(batch).unsqueeze(1), perm]
    out = affine(out, theta)
    y0, x0, y1, x1 = hole.view(-1, 4, 1, 1).unbind(1)
    y, x = torch.arange(height).unsqueeze(1), torch.arange(width)
    outside = ~((y >= y0) & (y < y1) & (x >= x0) & (x < x1))
    out = out * outside.unsqueeze(1).to(out.dtype)
    out = out + sigma.to(out.dtype).view(-1, 1, 1, 1) * torch.randn_like(out)
    return out * keep[:, :, None, None].to(out.dtype)


def affine(features: Tensor, theta: Tensor) -> Tensor:
    """One grid for each group, expanded over the batch, in the features' dtype for grid_sample.

    In bfloat16 (8 bits for a coordinate) the grid is off by up to a cell: not compared with sokd.
    """
    batch, channels, height, width = features.shape
    grid = F.affine_grid(theta, [len(theta), channels, height, width], align_corners=False)
    grid = grid.to(features.dtype).expand(batch, -1, -1, -1)
    return F.grid_sample(features, grid, align_corners=False)


def masked_mse(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """The loss as users write it in one line."""
    return (F.mse_loss(student, teacher, reduction="none") * weight.unsqueeze(1)).mean()


def areas(student: Heads, teacher: Heads, k: int = 8) -> Tensor:
    """Peaks by max_pool2d and topk, then one box at a time; coverage [B, H, W]."""
    heat = (student[0] * teacher[0]).sqrt()
    size, offset = (student[1] + teacher[1]) / 2, (student[2] + teacher[2]) / 2
    batch, _, height, width = heat.shape
    coverage = torch.zeros(batch, height, width)
    for index in range(batch):
        peaks = heat[index] * (heat[index] == F.max_pool2d(heat[index], 3, stride=1, padding=1))
        cells = peaks.flatten().topk(k).indices % (height * width)
        for cell in cells.tolist():
            y, x = divmod(cell, width)
            w, h = size[index, :, y, x].tolist()
            dx, dy = offset[index, :, y, x].tolist()
            x0, x1 = (int(min(max(x + dx + sign * w / 2, 0), width - 1)) for sign in (-1, 1))
            y0, y1 = (int(min(max(y + dy + sign * h / 2, 0), height - 1)) for sign in (-1, 1))
            coverage[index, y0 : y1 + 1, x0 : x1 + 1] += 1
    return coverage
