"""Whole training steps with `sokd.loss` against the same step with a plain FitNet loss; the memory.

Step: ResNet32x4 -> ResNet8x4, batch 64 of 32x32 images, maps of the second stages (64x128x16x16):
teacher forward, student forward, loss, backward, SGD. Both sides have the same adapter, and nothing
is left out of either: SoKD's side has all its parts with weights above 0, a search of its own
included. Further sides are without some of the parts.

Adapters: FitNet's step with the default adapter, with that of three convolutions and without one.

The demo's step: its networks, 64 images of 28x28, four steps a turn, of which one moves the policy.
Its student has 4,700 parameters, so calls of small tensor operations take the time.

Memory: the peak of live tensors in forward and backward of the loss, features and parameters not
counted, minus that of the adapter alone; in feature maps.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sokd
from benches.bench_refine import MAIN
from benches.harness import Case, Options
from benches.models import ResNet
from sokd.demo.data import DataSet
from sokd.demo.networks import build_teacher, predict
from sokd.demo.train import METHODS, WEIGHTS, Run, Solver, Task, build

IMAGES = (64, 3, 32, 32)
FITNET = "FitNet, same adapter"
NO_ADAPTER, CONVOLUTIONS = "no adapter", "three convolutions"
Loss = Callable[[Tensor, Tensor], Tensor]
# name of the case, options of SoKD, its highest cost relative to FitNet with the same adapter
STEPS: tuple[tuple[str, dict[str, Any], float], ...] = (
    ("training step, batch 64, SoKD", {}, 1.10),
    ('training step, batch 64, preset="paper"', {"preset": "paper"}, 1.33),
)
# sides of SoKD's steps that show what its parts cost, by their options
WITHOUT: dict[str, dict[str, Any]] = {
    "without its search": {"search": None, "granularity": "sample"},
    "without DAM": {"dam": None},
    "without DAM, policy and search": {"dam": None, "policy": None, "search": None},
}


def training_step(
    teacher: nn.Module, loss: Loss, parameters: list[nn.Parameter]
) -> Callable[[], None]:
    """One whole step with a new student."""
    torch.manual_seed(0)
    student = ResNet(8)
    trained = [*student.parameters(), *parameters]
    optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9, weight_decay=5e-4)
    images, labels = torch.randn(IMAGES), torch.randint(0, 100, IMAGES[:1])

    def step() -> None:
        with torch.no_grad():
            _, f_t = teacher(images)
        logits, f_s = student(images)
        total = F.cross_entropy(logits, labels) + loss(f_s, f_t)
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def new_kd(channels: int, **options: Any) -> Any:
    torch.manual_seed(0)
    return sokd.SoKD(student_channels=channels, teacher_channels=channels, **options)


def step_case(work: str, options: dict[str, Any], limit: float) -> Case:
    """A SoKD with these options against FitNet with an adapter of its kind."""
    teacher = ResNet(32).eval().requires_grad_(False)
    channels = MAIN[1]
    plain = new_kd(channels, **options).adapter
    losses: dict[str, tuple[Loss, nn.Module]] = {}
    for name, left_out in {"sokd": {}, **({} if options else WITHOUT)}.items():
        kd = new_kd(channels, **options, **left_out)
        if kd.search is not None:
            kd.search.every = 1  # in each step: a median would leave out those between
        losses[name] = (partial(sokd.loss, kd=kd), kd)
    losses[FITNET] = (lambda s, t: F.mse_loss(plain(s), t), plain)
    sides = {
        name: training_step(teacher, loss, [*part.parameters()])
        for name, (loss, part) in losses.items()
    }
    note = f"adapter {plain.kind!r}; whole steps"
    return Case(work, MAIN, sides, limits={FITNET: limit}, check=_check_loss, note=note)


def adapter_case() -> Case:
    """FitNet's step by each adapter; compared is the time beyond a step without one."""
    teacher = ResNet(32).eval().requires_grad_(False)
    kinds = {"sokd": "default", CONVOLUTIONS: "conv"}
    adapters = {name: new_kd(MAIN[1], adapter=kind).adapter for name, kind in kinds.items()}

    def by(adapter: nn.Module) -> Callable[[], None]:
        return training_step(
            teacher, lambda s, t: F.mse_loss(adapter(s), t), [*adapter.parameters()]
        )

    each = {**adapters, NO_ADAPTER: nn.Identity()}
    kind = adapters["sokd"].kind
    return Case(
        "training step, batch 64, FitNet",
        MAIN,
        {name: by(adapter) for name, adapter in each.items()},
        limits={CONVOLUTIONS: 0.5},
        check=_check_loss,
        counted=lambda medians: {name: medians[name] - medians[NO_ADAPTER] for name in adapters},
        note=f"adapter {kind!r}; compared: the time beyond a step without adapter",
        fewest=15,
    )


def demo_case() -> Case:
    """Four steps of the demo's SoKD, and without some parts, against FitNet by its adapter."""
    torch.manual_seed(0)
    part = torch.randn(256, 1, 28, 28), torch.randint(0, 10, (256,))
    data = DataSet("noise", part, part, part, tuple(map(str, range(10))), 0, 0.0, 1.0)
    teacher = build_teacher("base", data).eval().requires_grad_(False)
    task = Task(data, teacher, predict(teacher, part[0]), "small", Solver())
    rows = torch.arange(64)

    def step(losses: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        torch.stack([*losses.values()]).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    def steps_of(name: str, method: Mapping[str, Any]) -> Callable[[], None]:
        distiller = build(Run(name, method, 0), task).train()
        optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01, momentum=0.9)
        distiller.teacher.rows = rows

        def steps() -> None:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # as in the demo
            try:
                for _ in range(4):
                    step(distiller(part[0][rows], part[1][rows])[1], optimizer)
            finally:
                torch.set_num_threads(threads)

        return steps

    methods = {
        name: {"method": None, "sokd": {**WEIGHTS, **options}}
        for name, options in {"sokd": {}, **WITHOUT}.items()
    }
    sides = {
        name: steps_of(name, method)
        for name, method in (*methods.items(), (FITNET, METHODS["fitnet"]))
    }
    work = "four steps of the demo, SoKD"
    return Case(
        work, (64, 1, 28, 28), sides, limits={FITNET: 1.3}, check=_check_loss, note="one thread"
    )


def _check_loss() -> None:
    """The loss is a finite scalar that trains the adapter, DAM and the student."""
    for _, options, _ in STEPS:
        kd = new_kd(8, **options)
        f_s, f_t = torch.randn(4, 8, 6, 6).requires_grad_(), torch.randn(4, 8, 6, 6)
        loss = sokd.loss(f_s, f_t, kd)
        gradients = torch.autograd.grad(loss, [f_s, *kd.parameters()])
        if loss.dim() or not all(gradient.isfinite().all() for gradient in (loss, *gradients)):
            raise AssertionError(f"the loss is {loss}, or a gradient is not finite")


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that tensors made by `work` hold at one time, by the profiler's record."""
    work()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = 0
    for _, size in memory:
        live += size
        peak = max(peak, live)
    return peak


def memory_row() -> dict[str, Any]:
    kd = new_kd(MAIN[1])
    f_s, f_t = torch.randn(MAIN).requires_grad_(), torch.randn(MAIN)
    wanted = [f_s, *kd.parameters()]

    def actual() -> None:
        torch.autograd.grad(sokd.loss(f_s, f_t, kd), wanted)

    def adapter() -> None:
        # no name keeps a tensor alive: the backward frees what it can, as it does for the loss
        torch.autograd.grad(kd.adapter(f_s).sum(), wanted)

    full, alone = peak_bytes(actual), peak_bytes(adapter)
    row: dict[str, Any] = {
        "work": "sokd.loss, extra memory in maps",
        "shape": "x".join(map(str, MAIN)),
    }
    row |= {"dtype": "float32", "layout": "contiguous", "side": "adapter"}
    note = f"peak {full} bytes with sokd.loss, {alone} with the adapter alone"
    return row | {"ratio": f"{(full - alone) / f_t.nbytes:.3f}", "target": "<= 2", "note": note}


def cases(options: Options) -> Iterator[Case | dict[str, Any]]:
    yield memory_row()
    for step in STEPS:
        yield step_case(*step)
    yield adapter_case()
    yield demo_case()
