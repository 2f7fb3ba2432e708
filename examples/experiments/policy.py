"""`python -m examples.experiments.policy`: where the online search takes the policy; policy.csv.

One student run for each setting, on animal-mnist with the demo's networks and solver. The figures
are taken on the validation images, with student and adapter in eval mode:

    learned, clean   L_aug = 1/2 mean (F_hat - Phi)^2 of the learned policy's draws, and of the
                     clean teacher's maps; both relative to the uniform policy's draws
    energy           |F_hat|^2 / |F|^2 of the learned policy's draws
    acts             chance that at least one operation fires in a draw
    then             chance that each operation fires
"""

import argparse
import csv
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

import sokd
from sokd.demo.data import animal_mnist
from sokd.demo.networks import predict
from sokd.demo.train import Run, Solver, Task, build, fit, train_teacher
from sokd.kd.adapter import KINDS
from sokd.kd.policy import online
from sokd.kd.policy.plan import OPERATIONS

OLD = {"adapter": "conv", "base": "replace"}
PARTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    **{kind: {"adapter": kind} for kind in KINDS},
    "dafa": {**OLD, "dam": None, "lambda_areas": 2.0},
    "bounded": {**OLD, "heads": "bounded", "lambda_agreement": 1.0, "lambda_areas": 1.0},
}
DRAWS = 8  # of each policy, over all validation images


class Setting(NamedTuple):
    """One run."""

    parts: str  # a key of PARTS
    granularity: str
    samples: int
    lr: float
    every: int
    seed: int
    search: str = "online"  # or "bilevel": `sokd.PolicySearch`, the halves of a batch as its levels


def fires(policy: sokd.Policy) -> dict[str, float]:
    """The chance that any operation acts in a draw, and that of each operation."""
    chances = {"acts": 0.0, **dict.fromkeys((op.name for op in OPERATIONS), 0.0)}
    for row in policy.table():
        first, second = row["beta"]
        chances["acts"] += row["probability"] * (1 - (1 - first) * (1 - second))
        for name, beta in zip(row["operations"], row["beta"], strict=True):
            chances[name] += row["probability"] * beta
    return chances


@torch.no_grad()
def figures(kd: sokd.SoKD, student: Tensor, teacher: Tensor) -> dict[str, float]:
    """L_aug of learned policy and clean teacher over the uniform policy's, energy, chances."""
    (match,) = kd.eval().match(student, teacher, refine=False, attend=False)
    assert isinstance(kd.policy, sokd.Policy)
    uniform = sokd.Policy(policies=kd.policy.policies, granularity="sample")
    learned = sokd.Policy(policies=kd.policy.policies, granularity="sample")
    learned.load_state_dict(kd.policy.state_dict())

    def consistency(refined: Tensor) -> float:
        return float((refined - match.student).square().mean() / 2)

    drawn = [[policy(teacher) for _ in range(DRAWS)] for policy in (learned, uniform)]
    own, base = (sum(map(consistency, maps)) / DRAWS for maps in drawn)
    energy = sum(float(refined.square().sum()) for refined in drawn[0]) / DRAWS
    return {
        "learned": own / base,
        "clean": consistency(teacher) / base,
        "energy": energy / float(teacher.square().sum()),
        **fires(learned),
    }


def trial(setting: Setting, task: Task) -> dict[str, float]:
    """Train one student with the setting; its figures at the end."""
    own = "online" if setting.search == "online" else None
    options = {**PARTS[setting.parts], "search": own, "granularity": setting.granularity}
    run = Run(setting.parts, {"method": None, "sokd": options}, setting.seed)
    distiller, steps = build(run, task), itertools.count()
    kd, (images, labels) = distiller.kd, task.data.train
    assert kd is not None
    bilevel = None
    if kd.search is None:
        bilevel = sokd.PolicySearch(kd, distiller.student, lr=setting.lr)
    else:
        kd.search.lr, kd.search.every = setting.lr, setting.every

    def evaluate(model: nn.Module, rows: Tensor) -> Any:
        distiller.teacher.rows = rows
        return distiller.step(model, (images[rows], labels[rows]))

    def loss_of(rows: Tensor) -> Tensor:
        if next(steps) % setting.every == 0 and bilevel is not None:
            bilevel.step(evaluate, *rows.chunk(2))
        distiller.teacher.rows = rows
        return torch.stack([*distiller(images[rows], labels[rows])[1].values()]).sum()

    started, order = time.process_time(), torch.Generator().manual_seed(setting.seed)
    with mock.patch.object(online, "SAMPLES", setting.samples):
        for _ in fit(distiller.train().parameters(), loss_of, len(labels), task.solver, order):
            pass
    seconds = time.process_time() - started
    held_out = task.data.validation[0]
    student, teacher = (predict(net, held_out)[1] for net in (distiller.student, task.teacher))
    print(sokd.inspect.table(kd, top=2), flush=True)
    return {"steps": next(steps), "seconds": seconds, **figures(kd, student, teacher)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m examples.experiments.policy", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--parts", choices=PARTS, nargs="+", default=["defaults"])
    add("--granularity", choices=("sample", "batch"), nargs="+", default=["sample"])
    add("--samples", type=int, nargs="+", default=[online.SAMPLES], help="of a batch, a step reads")
    add("--search", choices=("online", "bilevel"), nargs="+", default=["online"])
    add("--lr", type=float, nargs="+", default=[0.02], help="of the search")
    add("--every", type=int, nargs="+", default=[online.EVERY], help="losses from step to step")
    add("--seed", type=int, nargs="+", default=[0])
    add("--epochs", type=int, default=10)
    add("--save", type=Path, default=Path("out/policy"), help="folder of policy.csv")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    options.save.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    data = animal_mnist()
    path = options.save / f"teacher-{data.name}-base-8.pt"  # the demo's
    teacher = train_teacher(data, "base", Solver(8, lr=0.4), path)
    outputs = predict(teacher, data.train[0])
    task = Task(data, teacher, outputs, "small", Solver(options.epochs))
    each = (
        options.parts,
        options.granularity,
        options.samples,
        options.lr,
        options.every,
        options.seed,
        options.search,
    )
    with (options.save / "policy.csv").open("a", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        for setting in map(Setting._make, itertools.product(*each)):
            found = trial(setting, task)
            if file.tell() == 0:
                out.writerow((*Setting._fields, *found))
            out.writerow((*setting, *(f"{value:.4g}" for value in found.values())))
            file.flush()
            print(setting, {name: round(value, 3) for name, value in found.items()}, flush=True)


if __name__ == "__main__":
    main()
