"""The demo's two pictures: the learned policy over time, and images with the areas that DAM finds on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import matplotlib

matplotlib.use("Agg")  # no display wanted

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.patches import Rectangle
from torch import Tensor

import sokd
from sokd.demo.methods import METHODS, Method, Plugged, Snapshot
from sokd.demo.models import Net
from sokd.demo.train import Run, Task, predict, restore
from sokd.plan import OPERATIONS, PAIRS

Array = npt.NDArray[np.float64]

_GREY, _INK = "#b9bec6", "#30343b"
_COLOURS = ("#1f6fb4", "#d1541b", "#2b8a4b", "#8a4bb0", "#b58900", "#17939c", "#c2327a", "#6b6f76", "#7a4a21")
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.edgecolor": _INK,
}


def of_operation(probabilities: Array, values: Array, operation: int) -> Array:
    """[T]: mean of values [T, K, 2] over the operation's sub-policies, weighted by probabilities [T, K]."""
    places = [(k, pair.index(operation)) for k, pair in enumerate(PAIRS) if operation in pair]
    rows, sides = zip(*places, strict=True)
    weight = probabilities[:, rows]
    mean: Array = (weight * values[:, rows, sides]).sum(1) / weight.sum(1)
    return mean


def _name(pair: tuple[int, ...]) -> str:
    return " + ".join(OPERATIONS[op].name.replace("_", " ") for op in pair)


def _label_ends(axes: Any, steps: Sequence[int], lines: Sequence[tuple[Array, str, str]], gap: float) -> None:
    """Names at the right ends of the lines, pushed apart so that none covers another."""
    ordered = sorted(lines, key=lambda line: float(line[0][-1]))
    low, high = axes.get_ylim()
    least = gap * (high - low)
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


def _draw_probabilities(axes: Any, steps: list[int], probabilities: Array) -> None:
    final = probabilities[-1]
    strongest = np.argsort(-final)[:4]
    weakest = np.argsort(final)[:2]
    axes.plot(steps, 100 * probabilities, color=_GREY, lw=0.7)
    axes.axhline(100 / len(PAIRS), color=_INK, lw=0.7, ls=":")
    lines = []
    for colour, k in zip(_COLOURS, [*strongest, *weakest], strict=False):
        axes.plot(steps, 100 * probabilities[:, k], color=colour, lw=1.6)
        lines.append((100 * probabilities[:, k], _name(PAIRS[k]), colour))
    axes.set_title(f"How often each of the {len(PAIRS)} sub-policies is drawn, %\n(dotted: all alike)")
    _label_ends(axes, steps, lines, 0.055)


def _draw_entropy(axes: Any, steps: list[int], probabilities: Array) -> None:
    entropy = -(probabilities * np.log(np.clip(probabilities, 1e-12, None))).sum(1)
    axes.plot(steps, np.exp(entropy), color=_COLOURS[0], lw=1.8)
    axes.set_ylim(0, len(PAIRS) * 1.08)
    axes.axhline(len(PAIRS), color=_INK, lw=0.7, ls=":")
    axes.set_title(
        f"Sub-policies in use, exp(entropy of the draw)\n(entropy {entropy[0]:.3f} to {entropy[-1]:.3f} nats)"
    )


def _draw_by_operation(axes: Any, steps: list[int], probabilities: Array, values: Array, title: str) -> None:
    lines = []
    for operation, colour in zip(range(len(OPERATIONS)), _COLOURS, strict=True):
        mean = of_operation(probabilities, values, operation)
        axes.plot(steps, mean, color=colour, lw=1.4)
        lines.append((mean, OPERATIONS[operation].name.replace("_", " "), colour))
    axes.axhline(0.5, color=_INK, lw=0.7, ls=":")
    axes.set_title(title)
    _label_ends(axes, steps, lines, 0.055)


def policy_over_time(snapshots: Sequence[Snapshot], path: Path, *, caption: str = "") -> None:
    """Write the policy's way as a picture: choice, entropy, firing, magnitudes, over training steps."""
    steps = [s.step for s in snapshots]
    probabilities = np.array([s.probabilities for s in snapshots])
    fire, magnitude = (np.array([getattr(s, name) for s in snapshots]) for name in ("fire", "magnitude"))
    with plt.rc_context(_STYLE):
        figure, grid = plt.subplots(2, 2, figsize=(12, 7.2), layout="constrained")
        _draw_probabilities(grid[0, 0], steps, probabilities)
        _draw_entropy(grid[0, 1], steps, probabilities)
        _draw_by_operation(
            grid[1, 0],
            steps,
            probabilities,
            fire,
            "How often an operation of the drawn pair fires (mean beta)",
        )
        _draw_by_operation(
            grid[1, 1], steps, probabilities, magnitude, "Magnitude of each operation (0 to 1 of its range)"
        )
        for axes in grid.flat:
            axes.set_xlabel("training step")
            axes.set_xlim(steps[0], steps[-1])
        figure.suptitle(f"The learned policy over time{caption}", x=0.01, ha="left", fontsize=12)
        figure.savefig(path, dpi=110)
        plt.close(figure)


# -- areas --------------------------------------------------------------------------------------------------


def _dam(method: Method) -> sokd.DAM:
    """The method's DAM; a ValueError for a method without one."""
    dam = method.kd.dam if isinstance(method, Plugged) else None
    if not isinstance(dam, sokd.DAM):
        raise ValueError(f"areas: method must have a DAM, got {type(method).__name__}")
    return dam


def find_areas(student: Net, method: Method, task: Task, images: Tensor) -> dict[str, sokd.ops.Areas]:
    """The teacher's, the student's and the mutual areas of some images, by the method's own heads."""
    _, teacher_map = predict(task.teacher, images)
    _, student_map = predict(student, images)
    dam = _dam(method)
    adapter = cast(sokd.Adapter, cast(Plugged, method).kd.adapter)
    with torch.no_grad():
        of_teacher = dam.maps(teacher_map)
        of_student = dam.maps(adapter(student_map, (teacher_map.shape[2], teacher_map.shape[3])))
        best = partial(sokd.ops.areas, k=dam.k, kernel=dam.kernel)
        return {
            "teacher": best(*of_teacher),
            "student": best(*of_student),
            "mutual": best(*of_student, teacher=of_teacher),
        }


def _pick(task: Task, count: int) -> Tensor:
    """Indices of `count` test images, each of another class where there are enough."""
    labels = task.data.test[1]
    chosen = [int(torch.nonzero(labels == c)[0]) for c in range(task.data.classes) if (labels == c).any()]
    step = max(1, len(chosen) // count)
    return torch.tensor(chosen[::step][:count])


def _draw_areas(axes: Any, picture: Array, found: sokd.ops.Areas, index: int, colour: str) -> None:
    side = picture.shape[-1]
    cells = found.coverage.shape[-1]
    cell = side / cells
    axes.imshow(picture, cmap="gray_r", vmin=0, vmax=1.7, extent=(0, side, side, 0), interpolation="nearest")
    cover = (found.coverage[index] / found.coverage[index].max().clamp(min=1)).numpy()
    tint = np.zeros((cells, cells, 4))
    tint[..., :3] = matplotlib.colors.to_rgb(colour)
    tint[..., 3] = 0.65 * cover
    axes.imshow(tint, extent=(0, side, side, 0), interpolation="nearest")
    for y0, x0, y1, x1 in found.boxes[index].tolist():
        if y1 < y0 or x1 < x0:
            continue  # a slot without an area
        axes.add_patch(
            Rectangle(
                (x0 * cell, y0 * cell),
                (x1 - x0 + 1) * cell,
                (y1 - y0 + 1) * cell,
                fill=False,
                edgecolor=colour,
                lw=1.3,
            )
        )
    axes.set_xlim(-0.3, side + 0.3)
    axes.set_ylim(side + 0.3, -0.3)


def areas(run: Run, task: Task, path: Path, *, count: int = 6) -> None:
    """Write test images with the areas of teacher, student and both drawn on them, one row each."""
    student, method = restore(run, task)
    dam = _dam(method)
    index = _pick(task, count)
    images, labels = task.data.test[0][index], task.data.test[1][index]
    found = find_areas(student, method, task, images)
    guesses = predict(student, images)[0].argmax(1)
    pictures = task.data.pixels(images)[:, 0].numpy()
    rows = (("teacher", _COLOURS[0]), ("student", _COLOURS[1]), ("mutual", _COLOURS[2]))
    with plt.rc_context(_STYLE):
        figure, grid = plt.subplots(
            4, len(index), figsize=(1.75 * len(index) + 0.9, 8.0), layout="constrained", squeeze=False
        )
        for column in range(len(index)):
            name = task.data.class_names[int(labels[column])]
            guess = task.data.class_names[int(guesses[column])]
            grid[0, column].imshow(pictures[column], cmap="gray_r", vmin=0, vmax=1.2)
            grid[0, column].set_title(name if name == guess else f"{name}\n(student: {guess})", loc="center")
            for row, (kind, colour) in enumerate(rows, start=1):
                _draw_areas(grid[row, column], pictures[column], found[kind], column, colour)
        cells = found["mutual"].coverage[0].numel()
        shares = {k: (a.coverage > 0).float().sum().item() / (cells * len(index)) for k, a in found.items()}
        grid[0, 0].set_ylabel("test image", fontsize=10)
        for row, (kind, colour) in enumerate(rows, start=1):
            text = f"{kind} areas\n{shares[kind]:.0%} of the cells"
            grid[row, 0].set_ylabel(text, color=colour, fontsize=10)
        for axes in grid.flat:
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(False)
        figure.suptitle(
            f"Where {METHODS[run.job.method].label} looks (seed {run.job.seed}, last epoch): "
            f"the {dam.k} best areas on the {math.isqrt(cells)} x {math.isqrt(cells)} feature map,\n"
            "deeper colour where areas overlap. "
            "Mutual areas come from both heat maps together; only there are features distilled.",
            x=0.01,
            ha="left",
            fontsize=10,
        )
        figure.savefig(path, dpi=110)
        plt.close(figure)
