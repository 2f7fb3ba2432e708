"""Inspection of a run: the policy as a table and over time, areas on images, exported figures.

    trajectory = sokd.inspect.Trajectory(kd)
    trajectory.record(step)                                    # now and then in training
    trajectory.save("policy.json"); trajectory.draw("policy.png")
    print(sokd.inspect.table(kd))
    sokd.inspect.draw_areas(images, sokd.inspect.areas(distiller, images), "areas.png")
    sokd.inspect.log(writer, kd, step)                         # any writer with add_scalar

The functions do not change the `SoKD`, `Policy` or `Distiller`: they take no draw and change no
mode. Reading numbers synchronises with the device, so do not call them in every step. Pictures need
matplotlib, which is imported when the first is drawn.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sokd.kd.attention import AttentionDAM
from sokd.kd.dam import DAM, reads_adapted
from sokd.kd.policy import Policy
from sokd.kd.policy.plan import OPERATIONS
from sokd.kd.sokd import Match, SoKD, part_of
from sokd.kd.virtual import unwrapped
from sokd.ops import Areas

__all__ = [
    "Snapshot",
    "Trajectory",
    "areas",
    "draw_areas",
    "entropy",
    "export_json",
    "log",
    "shares",
    "table",
]

Path = str | os.PathLike[str]
LayerAreas = dict[str, Areas]  # "teacher", "student", "mutual"


class Writer(Protocol):
    """A writer such as TensorBoard's SummaryWriter."""

    def add_scalar(self, tag: str, scalar_value: Any, global_step: Any) -> Any: ...


# ----------------------------------------------------------------------------------- the policy now


def table(subject: nn.Module, *, top: int | None = None) -> str:
    """The policy as text: a line for each sub-policy, the most probable first.

        print(sokd.inspect.table(sokd.SoKD(8, 16), top=5))

    Args:
        subject: a `Policy`, or a `SoKD` or `Distiller` with one.
        top: number of lines; None: all.
    """
    rows = sorted(_policy_of("table", subject).table(), key=lambda row: -row["probability"])[:top]
    lines = [f"{'sub-policy':<32}{'drawn':>7}   fires         strength"]
    for row in rows:
        fires = " ".join(f"{beta:5.0%}" for beta in row["beta"])
        lines.append(f"{_named(row):<32}{row['probability']:>7.2%}  {fires}   {_strengths(row)}")
    return "\n".join(lines)


def _named(row: dict[str, Any]) -> str:
    return " + ".join(name.replace("_", " ") for name in row["operations"])


def _strengths(row: dict[str, Any]) -> str:
    return ", ".join(
        f"{value:.3g} {unit}".rstrip()
        for value, unit in zip(row["value"], row["unit"], strict=True)
    )


@torch.no_grad()
def entropy(subject: nn.Module) -> float:
    """Entropy of the draw of a sub-policy, in nats: log K if uniform, 0 if one is always drawn."""
    return float(_policy_of("entropy", subject).diagnostics()["entropy"])


def _policy_of(op: str, subject: Any) -> Policy:
    subject = unwrapped(subject)
    for found in (
        subject,
        getattr(subject, "policy", None),
        getattr(getattr(subject, "kd", None), "policy", None),
    ):
        if isinstance(policy := unwrapped(found), Policy):
            return policy
    rule = "be a Policy, or a SoKD or Distiller that has one"
    raise TypeError(f"{op}: subject must {rule}, got {_kind_of(subject)}")


def _kd_of(subject: Any) -> SoKD | None:
    kd = subject if isinstance(subject, SoKD) else getattr(subject, "kd", None)
    return kd if isinstance(kd, SoKD) else None


def _kind_of(subject: Any) -> str:
    waits = (
        ""
        if getattr(subject, "ready", True)
        else " before its shapes are known (example= or setup)"
    )
    return type(subject).__name__ + waits


# ----------------------------------------------------------------------------- the policy over time


@dataclass(frozen=True)
class Snapshot:
    """The policy at one step; K sub-policies."""

    step: int
    probabilities: list[float]  # [K], softmax(alpha)
    fire: list[list[float]]  # [K, 2], beta
    magnitude: list[list[float]]  # [K, 2]

    @property
    def entropy(self) -> float:
        """The entropy of the choice of a sub-policy, in nats."""
        return -sum(p * math.log(p) for p in self.probabilities if p > 0)


class Trajectory:
    """The history of a policy: snapshots, in the order of their steps.

    Args:
        subject: a `Policy`, or a `SoKD` or `Distiller` with one.
        every: record only steps that are multiples of it.
    """

    def __init__(self, subject: nn.Module, *, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"Trajectory: every must be positive, got {every}")
        self.policy, self.every = _policy_of("Trajectory", subject), every
        self.operations = [
            tuple(OPERATIONS[op].name for op in pair) for pair in self.policy.policies
        ]
        self.snapshots: list[Snapshot] = []

    @torch.no_grad()
    def record(self, step: int) -> None:
        """Take a snapshot of the policy as it is now."""
        if step % self.every:
            return
        policy = self.policy
        parts = (policy.alpha.softmax(0), policy.beta, policy.magnitude)
        self.snapshots.append(Snapshot(step, *(part.tolist() for part in parts)))

    @property
    def entropies(self) -> list[float]:
        """The choice's entropy at each snapshot, in nats."""
        return [snapshot.entropy for snapshot in self.snapshots]

    def save(self, path: Path) -> None:
        """Write it as JSON: "operations" [K] pairs of names, "snapshots"."""
        state = {
            "operations": self.operations,
            "snapshots": [asdict(each) for each in self.snapshots],
        }
        _write(path, state)

    def load(self, path: Path) -> None:
        """Replace the snapshots by those of a file, to continue after a resumed run."""
        with open(path) as file:
            state = json.load(file)
        if [tuple(pair) for pair in state["operations"]] != self.operations:
            rule = "hold the sub-policies of this policy"
            raise ValueError(f"Trajectory: path must {rule}, got {len(state['operations'])} others")
        self.snapshots = [Snapshot(**each) for each in state["snapshots"]]

    def draw(self, path: Path, *, caption: str = "") -> None:
        """Write a picture: choice, entropy, firing and magnitudes over the steps."""
        from sokd.inspect.pictures import policy_over_time

        if not self.snapshots:
            raise ValueError("Trajectory: draw must be called after record, got no snapshots")
        policy_over_time(self.snapshots, self.policy.policies, path, caption=caption)


# -------------------------------------------------------------------------------------------- areas


@torch.no_grad()
def areas(subject: nn.Module, *inputs: Any) -> list[LayerAreas]:
    """The areas of the teacher, of the student and of both, one dict for each layer.

    areas(distiller, images), or areas(kd, student_features, teacher_features), also for what
    `sokd.wrap` returns.

    The teacher's features are not refined, so the areas do not depend on a draw.
    """
    subject = unwrapped(subject)
    kd = _kd_of(subject)
    if kd is None or kd.dam is None:
        raise TypeError(
            f"areas: subject must be a SoKD or a Distiller with a DAM, got {_kind_of(subject)}"
        )
    read = getattr(subject, "features", None)  # of a Distiller; the others take features
    if len(inputs) != (1 if read else 2):
        rule = "be the images" if read else "be the student's and the teacher's features"
        raise TypeError(f"areas: inputs must {rule}, got {len(inputs)} of them")
    students, teachers = read(*inputs) if read else inputs
    training = [(part, part.training) for part in kd.modules()]
    kd.eval()
    try:
        dams = [part_of(kd.dam, index) for index in range(len(kd.student_channels))]
        matches = {
            adapt: kd.match(students, teachers, adapt=adapt, refine=False, attend=False)
            for adapt in set(map(reads_adapted, dams))
        }
        pairs = ((dam, matches[reads_adapted(dam)][at]) for at, dam in enumerate(dams))
        return [_layer_areas(dam, match) for dam, match in pairs]
    finally:
        for part, mode in training:
            part.training = mode


def _layer_areas(dam: nn.Module | None, match: Match) -> LayerAreas:
    if not isinstance(dam, (DAM, AttentionDAM)):
        raise TypeError(f"areas: kd.dam must be a DAM or an AttentionDAM, got {type(dam).__name__}")
    sides = match.student, match.refined
    return {whose: dam.find(*sides, whose) for whose in ("teacher", "student", "mutual")}


def shares(found: LayerAreas) -> dict[str, float]:
    """The share of the cells under at least one area, by side."""
    return {name: float((each.coverage > 0).float().mean()) for name, each in found.items()}


def draw_areas(
    images: Tensor, found: LayerAreas | Sequence[LayerAreas], path: Path, *, layer: int = -1,
    titles: Sequence[str] | None = None, caption: str = "",
) -> None:  # fmt: skip
    """Write a picture: the images, and on them the areas of teacher, student and both.

    Args:
        images: [B, 3 or 1, H, W], the input or images of its aspect, scaled from their smallest to
            their largest value. The picture has B columns; B may be smaller than the batch of
            `found`, whose first samples are drawn.
        found: the result of `areas`, or the dict of one layer.
        layer: index of the layer.
        titles: B titles above the images.

    Raises:
        ValueError: images, layer or titles do not match `found`.
    """
    from sokd.inspect.pictures import areas_on_images

    if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1] not in (1, 3):
        got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"draw_areas: images must be [B, 3, H, W] or [B, 1, H, W], got {got}")
    layers = [found] if isinstance(found, dict) else list(found)
    if not -len(layers) <= layer < len(layers):
        raise ValueError(
            f"draw_areas: layer must be one of the {len(layers)} in found, got {layer}"
        )
    chosen = layers[layer]
    count, samples = len(images), len(chosen["mutual"].coverage)
    if not 1 <= count <= samples:
        raise ValueError(f"draw_areas: images must be 1 to {samples}, as in found, got {count}")
    if titles is not None and len(titles) != count:
        raise ValueError(
            f"draw_areas: titles must be {count}, one for each image, got {len(titles)}"
        )
    areas_on_images(images, chosen, shares(chosen), path, titles=titles, caption=caption)


# ------------------------------------------------------------------------------------------ exports


def export_json(subject: nn.Module, path: Path | None = None) -> dict[str, Any]:
    """The figures of a SoKD or Distiller as plain data, written to `path` if it is given.

    "policy": `Policy.table()`; "entropy"; "diagnostics": those of the last step; for a Distiller
    "layers" and "weights" too. A missing part has no entry. In the file, NaN and infinity are null,
    because JSON has no such numbers.
    """
    subject = unwrapped(subject)
    kd = _kd_of(subject)
    found: dict[str, Any] = {}
    if hasattr(subject, "pairs"):
        found |= {"layers": subject.pairs, "weights": subject.weights}
    if kd is not None:
        found["diagnostics"] = {name: float(value) for name, value in kd.diagnostics().items()}
    if isinstance(subject, Policy) or getattr(kd, "policy", None) is not None:
        found |= {"policy": _policy_of("export_json", subject).table(), "entropy": entropy(subject)}
    if not found:
        rule = "be a Policy, a SoKD or a Distiller with one"
        raise TypeError(f"export_json: subject must {rule}, got {_kind_of(subject)}")
    if path is not None:
        _write(path, found)
    return found


def log(
    writer: Writer, subject: nn.Module, step: int, *, losses: Any = None, prefix: str = "sokd"
) -> None:
    """Write the last step's figures with `writer.add_scalar(tag, value, step)`.

    `diagnostics()` of a SoKD, of a Distiller's, or of a Policy under `{prefix}/`, and of `losses`,
    a Distiller's dict, each entry.

    Raises:
        TypeError: the subject has another type.
    """
    subject = unwrapped(subject)
    source = subject if isinstance(subject, Policy) else _kd_of(subject)
    if source is None and not hasattr(subject, "kd"):
        raise TypeError(
            f"log: subject must be a Policy, a SoKD or a Distiller, got {_kind_of(subject)}"
        )
    figures = {**({} if source is None else source.diagnostics()), **(losses or {})}
    for name, value in figures.items():
        scalar = float(value.detach() if isinstance(value, Tensor) else value)
        writer.add_scalar(f"{prefix}/{name}", scalar, step)


def _write(path: Path, state: Any) -> None:
    with open(path, "w") as file:
        json.dump(_strict(state), file, indent=1, allow_nan=False)
        file.write("\n")


def _strict(state: Any) -> Any:
    """Plain data with None in place of numbers that are not finite."""
    if isinstance(state, dict):
        return {key: _strict(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [_strict(value) for value in state]
    return None if isinstance(state, float) and not math.isfinite(state) else state
