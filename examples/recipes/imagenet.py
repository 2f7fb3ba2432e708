"""ImageNet distillation: ResNet34 -> ResNet18 of the tables, or any two torchvision networks.

    torchrun --nproc-per-node 8 imagenet.py --row resnet34:resnet18:reviewkd+sokd --amp bf16 \
        --data /data/imagenet --out out/reviewkd     # train/ and val/, one folder a class in each
    python imagenet.py --row ... --teacher-weights resnet34.pth    # without a network

The batch size is that of all ranks together. The teacher is torchvision's (IMAGENET1K_V1) unless
--teacher-weights names a file.
"""

from collections.abc import Sequence
from typing import Any
from urllib.error import URLError

import torch
from parts import published
from parts.data import imagenet, loaders
from parts.networks import layers
from parts.options import POSITIVE, read_options, refuse_detection, refusing
from parts.run import Alone, Run, averaged, load_weights, objective
from torch import Tensor, nn
from torch.amp import GradScaler
from torchvision import models

import sokd


def build(name: str, classes: int) -> nn.Module:
    """torchvision's network of that name, with its first weights."""
    try:
        return models.get_model(name, num_classes=classes)
    except ValueError:
        raise SystemExit(f"no network {name!r} in torchvision.models") from None


def pretrained(name: str, classes: int) -> nn.Module:
    """torchvision's network of that name, trained on ImageNet."""
    try:
        weights = models.get_model_weights(name).IMAGENET1K_V1
    except (ValueError, AttributeError):
        raise SystemExit(
            f"--teacher-weights is needed: torchvision has no ImageNet weights of {name!r}"
        ) from None
    instead = f"fetch {weights.url} elsewhere and name the file by --teacher-weights"
    if classes != 1000:
        raise SystemExit(f"torchvision's {name} has 1000 classes, --data has {classes}: {instead}")
    try:
        return models.get_model(name, weights=weights)
    except (URLError, OSError) as error:
        raise SystemExit(f"torchvision's {name} was not downloaded ({error}); {instead}") from None


@refusing()
def with_teacher(args: Any, student: nn.Module, classes: int, labels: Tensor) -> sokd.Distiller:
    """The student, its teacher and the methods that --method names."""
    if args.teacher_weights is None:
        teacher = pretrained(args.teacher, classes)
    else:
        teacher = build(args.teacher, classes)
        load_weights(teacher, args.teacher_weights, "--teacher-weights")
    stages = ["layer1", "layer2", "layer3", "layer4"], "layer4"
    resnets = args.teacher.startswith("res") and args.student.startswith("res")
    tables = layers(args.method, stages, stages) if resnets else "auto"
    bank = {"num_samples": len(labels), "labels": labels} if "crd" in args.method else {}
    return sokd.Distiller(
        student=student, teacher=teacher, layers=args.layers or tables, method=args.method,
        sokd=args.sokd and args.sokd_option, check_finite=False,
        example=torch.zeros(2, 3, args.size, args.size), **bank | args.method_option,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None, writer: Any = None) -> dict[str, Any]:
    args = read_options(
        __doc__, argv, published.imagenet_settings,
        {"--size": {"type": POSITIVE, "default": 224, "help": "of the images, in pixels"}},
        teacher="resnet34", student="resnet18", epochs=100, milestones=[30, 60, 90],
        batch_size=256, weight_decay=1e-4,
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
    data = imagenet(args.data, args.size, args.train_samples, args.seed)
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
        run, args.row, published.IMAGENET_PAIRS, published.IMAGENET, published.IMAGENET_SOURCE
    )
    return result


if __name__ == "__main__":
    main()
