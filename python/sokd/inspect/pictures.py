"""The pictures of `sokd.inspect`: the policy over time, and areas on images.

Figures are made without pyplot: no display is needed, and the user's own figures and backend stay
as they are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from sokd.kd.policy.plan import OPERATIONS
from sokd.ops import Areas

__all__ = ["areas_on_images", "of_operation", "policy_over_time"]

Array = npt.NDArray[np.float64]
Path = str | os.PathLike[str]
Pairs = Sequence[Sequence[int]]  # the operations of each sub-policy

GREY, INK = "#b9bec6", "#30343b"
# Okabe and Ito's colour-blind safe colours that show on white, then three more.
COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"),
    *("#56b4e9", "#30343b", "#8a8f98", "#7a4a21"),
)
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.edgecolor": INK,
}


# ----------------------------------------------------------------------------- the policy over time


def of_operation(probabilities: Array, values: Array, operation: int, pairs: Pairs) -> Array:
    """[T]: mean of values [T, K, 2] over an operation's sub-policies, weighted by probabilities."""
    places = [(k, list(pair).index(operation)) for k, pair in enumerate(pairs) if operation in pair]
    rows, sides = zip(*places, strict=True)
    weight = probabilities[:, rows]
    mean: Array = (weight * values[:, rows, sides]).sum(1) / weight.sum(1)
    return mean


def policy_over_time(
    snapshots: Sequence[Any], pairs: Pairs, path: Path, *, caption: str = ""
) -> None:
    """Write a picture of the policy over training steps: choice, entropy, firing, magnitudes.

    Args:
        snapshots: each with `step`, `probabilities` [K], `fire` [K, 2] and `magnitude` [K, 2].
        pairs: the operations of the K sub-policies.
    """
    steps = [each.step for each in snapshots]
    probabilities, fire, magnitude = (
        np.array([getattr(each, name) for each in snapshots])
        for name in ("probabilities", "fire", "magnitude")
    )
    with rc_context(STYLE):
        figure = Figure(figsize=(12, 7.2), layout="constrained")
        grid = figure.subplots(2, 2)
        _draw_probabilities(grid[0, 0], steps, probabilities, pairs)
        _draw_entropy(grid[0, 1], steps, probabilities)
        title = "How often an operation of the drawn pair fires (mean beta)"
        _draw_by_operation(grid[1, 0], steps, probabilities, fire, pairs, title)
        title = "Magnitude of each operation (0 to 1 of its range)"
        _draw_by_operation(grid[1, 1], steps, probabilities, magnitude, pairs, title)
        for axes in grid.flat:
            axes.set_xlabel("training step")
            axes.set_xlim(steps[0], max(steps[-1], steps[0] + 1))
        figure.suptitle(f"The learned policy over time{caption}", x=0.01, ha="left", fontsize=12)
        figure.savefig(path, dpi=110)


def _name(pair: Sequence[int]) -> str:
    return " + ".join(OPERATIONS[op].name.replace("_", " ") for op in pair)


def _label_ends(axes: Any, steps: Sequence[int], lines: Sequence[tuple[Array, str, str]]) -> None:
    """Names at the right ends of the lines, pushed apart so that none covers another."""
    ordered = sorted(lines, key=lambda line: float(line[0][-1]))
    low, high = axes.get_ylim()
    least = 0.055 * (high - low)
    places: list[float] = []
    for values, _, _ in ordered:
        places.append(max(float(values[-1]), places[-1] + least) if places else float(values[-1]))
    shift = max(0.0, places[-1] - high) if places else 0.0
    for place, (values, label, colour) in zip(places, ordered, strict=True):
        axes.annotate(
            label,
            xy=(steps[-1], float(values[-1])),
            xytext=(steps[-1] + 0.03 * (steps[-1] - steps[0]), place - shift),
            color=colour,
            va="center",
            fontsize=8,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.6},
        )


def _draw_probabilities(axes: Any, steps: list[int], probabilities: Array, pairs: Pairs) -> None:
    final, count = probabilities[-1], len(pairs)
    strongest = np.argsort(-final, kind="stable")[:4]
    weakest = [k for k in np.argsort(final, kind="stable")[:2] if k not in strongest]
    axes.plot(steps, 100 * probabilities, color=GREY, lw=0.7)
    axes.axhline(100 / count, color=INK, lw=0.7, ls=":")
    lines = []
    for colour, k in zip(COLOURS, [*strongest, *weakest], strict=False):
        axes.plot(steps, 100 * probabilities[:, k], color=colour, lw=1.6)
        lines.append((100 * probabilities[:, k], _name(pairs[k]), colour))
    axes.set_title(f"How often each of the {count} sub-policies is drawn, %\n(dotted: all alike)")
    _label_ends(axes, steps, lines)


def _draw_entropy(axes: Any, steps: list[int], probabilities: Array) -> None:
    entropy = -(probabilities * np.log(np.clip(probabilities, 1e-12, None))).sum(1)
    count = probabilities.shape[1]
    axes.plot(steps, np.exp(entropy), color=COLOURS[0], lw=1.8)
    axes.set_ylim(0, count * 1.08)
    axes.axhline(count, color=INK, lw=0.7, ls=":")
    axes.set_title(
        f"Sub-policies in use, exp(entropy of the draw)\n(entropy {entropy[0]:.3f} to "
        f"{entropy[-1]:.3f} nats)"
    )


def _draw_by_operation(
    axes: Any, steps: list[int], probabilities: Array, values: Array, pairs: Pairs, title: str
) -> None:
    lines = []
    for operation, colour in zip(range(len(OPERATIONS)), COLOURS, strict=True):
        if not any(operation in pair for pair in pairs):
            continue
        mean = of_operation(probabilities, values, operation, pairs)
        axes.plot(steps, mean, color=colour, lw=1.4)
        lines.append((mean, OPERATIONS[operation].name.replace("_", " "), colour))
    axes.axhline(0.5, color=INK, lw=0.7, ls=":")
    axes.set_title(title)
    _label_ends(axes, steps, lines)


# ---------------------------------------------------------------------------------- areas on images


def areas_on_images(
    images: Tensor, found: Mapping[str, Areas], shares: Mapping[str, float], path: Path, *,
    titles: Sequence[str] | None = None, caption: str = "",
) -> None:  # fmt: skip
    """Write images [B, 3 or 1, H, W], and below them the areas of `found` in a row each.

    Deeper colour where areas overlap; the boxes are the areas' borders.
    """
    pictures = _as_pictures(images)
    with rc_context(STYLE):
        figure = Figure(
            figsize=(1.75 * len(pictures) + 0.9, 2.0 * (1 + len(found))), layout="constrained"
        )
        grid = figure.subplots(1 + len(found), len(pictures), squeeze=False)
        for column, picture in enumerate(pictures):
            _show(grid[0, column], picture)
            if titles is not None:
                grid[0, column].set_title(titles[column], loc="center")
            for row, (colour, each) in enumerate(
                zip(COLOURS, found.values(), strict=False), start=1
            ):
                _draw_areas(grid[row, column], picture, each, column, colour)
        grid[0, 0].set_ylabel("image", fontsize=10)
        for row, (colour, name) in enumerate(zip(COLOURS, found, strict=False), start=1):
            text = f"{name} areas\n{shares[name]:.0%} of the cells"
            grid[row, 0].set_ylabel(text, color=colour, fontsize=10)
        for axes in grid.flat:
            _bare(axes)
        figure.suptitle(caption, x=0.01, ha="left", fontsize=10)
        figure.savefig(path, dpi=110)


def _as_pictures(images: Tensor) -> list[Array]:
    """Each [H, W, 3 or 1] in [0, 1], the whole batch on one scale."""
    values = images.detach().double().cpu()
    low, high = values.min(), values.max()
    scaled = (values - low) / (high - low).clamp(min=1e-12)
    return list(scaled.permute(0, 2, 3, 1).numpy())


def _show(axes: Any, picture: Array, strength: float = 1.0) -> None:
    """A picture, paler with less strength, in its own pixels as coordinates."""
    height, width, channels = picture.shape
    pale = 1 - strength * (1 - picture)
    shown = pale if channels == 3 else np.repeat(pale, 3, axis=2)
    axes.imshow(shown, extent=(0, width, height, 0), interpolation="nearest")


def _draw_areas(axes: Any, picture: Array, found: Areas, index: int, colour: str) -> None:
    height, width, _ = picture.shape
    rows, columns = found.coverage.shape[-2:]
    tall, wide = height / rows, width / columns
    _show(axes, picture, 0.6)
    cover = found.coverage[index].cpu()
    tint = np.zeros((rows, columns, 4))
    tint[..., :3] = to_rgb(colour)
    tint[..., 3] = 0.65 * (cover / cover.max().clamp(min=1)).numpy()
    axes.imshow(tint, extent=(0, width, height, 0), interpolation="nearest")
    for y0, x0, y1, x1 in found.boxes[index].tolist():
        if y1 < y0 or x1 < x0:
            continue  # a slot without an area
        corner, size = (x0 * wide, y0 * tall), ((x1 - x0 + 1) * wide, (y1 - y0 + 1) * tall)
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, lw=1.3))
    axes.set_xlim(-0.01 * width, 1.01 * width)
    axes.set_ylim(1.01 * height, -0.01 * height)


def _bare(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
