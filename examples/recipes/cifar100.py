"""CIFAR-100 distillation: one row of the published tables, or a pair and a method of your choice.

    python cifar100.py --teacher-only --teacher resnet32x4 --out out/resnet32x4 --download
    python cifar100.py --row resnet32x4:resnet8x4:fitnet+sokd --out out/fitnet \
        --teacher-weights out/resnet32x4/teacher.pt
    torchrun --nproc-per-node 4 cifar100.py ...     # the batch size is that of all ranks together
"""

from collections.abc import Sequence
from typing import Any

import torch
from parts import published
from parts.data import loaders, of_32x32
from parts.networks import build, layers, layers_of
from parts.options import read_options, refuse_detection, refusing
from parts.run import Alone, Run, averaged, load_weights, objective
from torch import Tensor, nn
from torch.amp import GradScaler

import sokd


@refusing()
def with_teacher(args: Any, student: nn.Module, classes: int, labels: Tensor) -> sokd.Distiller:
    """The student, its teacher and the methods that --method names."""
    if args.teacher_weights is None:
        raise SystemExit(
            f"--teacher-weights is needed: a public checkpoint of {args.teacher}, or the one that "
            f"--teacher-only --teacher {args.teacher} writes"
        )
    teacher = build(args.teacher, classes)
    load_weights(teacher, args.teacher_weights, "--teacher-weights")
    tables = layers(args.method, layers_of(args.student), layers_of(args.teacher))
    bank = {"num_samples": len(labels), "labels": labels} if "crd" in args.method else {}
    return sokd.Distiller(
        student=student, teacher=teacher, layers=args.layers or tables, method=args.method,
        sokd=args.sokd and args.sokd_option, example=torch.zeros(2, 3, 32, 32), check_finite=False,
        **bank | args.method_option,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None, writer: Any = None) -> dict[str, Any]:
    args = read_options(
        __doc__, argv, published.cifar100_settings,
        {"--dataset": {"choices": ("cifar100", "fashion-mnist"), "default": "cifar100"}},
        teacher="resnet32x4", student="resnet8x4", epochs=240, milestones=[150, 180, 210],
        batch_size=64, weight_decay=5e-4,
    )  # fmt: skip
    refuse_detection(args)
    with Run(args, writer) as run:
        return distil(args, run)


def step(
    args: Any, run: Run, model: nn.Module, batches: list[Any], rise: float, scaler: GradScaler,
    optimizer: torch.optim.Optimizer,
) -> None:  # fmt: skip
    """One step of the optimiser: the gradients of all parts of a batch, then the update."""
    for part, (x, y, index) in enumerate(batches, 1):
        with run.accumulating(model, last=part == len(batches)):
            with run.clock("loss"), run.autocast():
                _, losses = model(x, y, index=index)
                loss = objective(losses, args.ce_weight, rise) / len(batches)
            with run.clock("backward"):
                scaler.scale(loss).backward()
        run.log(losses)
    with run.clock("backward"):
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def distil(args: Any, run: Run) -> dict[str, Any]:
    data = run.in_turn(
        lambda: of_32x32(args.dataset, args.data, args.download, args.train_samples, args.seed)
    )
    train, test = loaders(data, args, run.rank, run.ranks, run.device)
    student = build(args.student, data.classes)
    if args.student_weights is not None:
        load_weights(student, args.student_weights, "--student-weights")
    if args.eval_only:
        return run.report(run.evaluate(student.to(run.device), test))

    alone = not args.method
    learner = Alone(student) if alone else with_teacher(args, student, data.classes, data.labels)
    model = run.parallel(learner)
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, args.milestones, 0.1)
    scaler = GradScaler(run.device.type, enabled=args.amp == "fp16")
    ema, search = averaged(args.ema, student), None
    if args.sokd and args.search_epochs:
        with refusing():
            search = sokd.PolicySearch(learner.kd, student, epochs=args.search_epochs)
    if not args.compile:
        run.clock.watch(student, *(() if alone else (learner.teacher,)))
    run.track(
        model=learner, optimizer=optimizer, schedule=schedule, scaler=scaler, ema=ema, search=search
    )

    for epoch in run.epochs():
        rise = min(1.0, (epoch + 1) / args.warmup_epochs) if args.warmup_epochs else 1.0
        model.train()
        for batches in run.steps(train):
            if search is not None and run.step % args.search_every == 0:
                with run.clock("search"), run.autocast():
                    search.step(learner.step, batches[0][:2])
            step(args, run, model, batches, rise, scaler, optimizer)
            if ema is not None:
                ema.update_parameters(student)
        figures = run.evaluate(student, test)
        if ema is not None:
            figures["ema_top1"] = run.evaluate(ema.module, test)["top1"]
        run.end_epoch(figures)
        schedule.step()
        if search is not None:
            search.end_epoch()

    result = run.finish(student, ema)
    published.compare(
        run, args.row, published.CIFAR100_PAIRS, published.CIFAR100, published.CIFAR100_SOURCE
    )
    return result


if __name__ == "__main__":
    main()
