"""COCO distillation: Faster R-CNN with FPN, on the levels P2 to P6 of its pyramid.

    torchrun --nproc-per-node 8 coco.py --amp bf16 --data /data/coco --out out/fgd \
        --row fasterrcnn_resnet50_fpn_v2:fasterrcnn_resnet50_fpn:fgd+sokd
    python coco.py --row ... --teacher-weights v2.pth --backbone-weights resnet50.pth  # no network

--data holds train2017/, val2017/ and annotations/. The batch size is that of all ranks together.
Networks: torchvision's detectors, its ResNets (under Faster R-CNN with FPN), and small<WIDTH>. One
transform runs once a batch for both networks; only the teacher's backbone runs.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from parts import detection, published
from parts.data import loaders
from parts.detection import BackboneAlone, Once
from parts.options import NATURAL, POSITIVE, read_options, refusing
from parts.run import Run, averaged, load_weights, objective
from torch import Tensor, nn
from torch.amp import GradScaler

import sokd

SCHEDULES = {"1x": (12, [8, 11]), "2x": (24, [16, 22])}  # epochs, and after which lr is / 10
OWN: dict[str, dict[str, Any]] = {
    "--schedule": {"choices": tuple(SCHEDULES), "help": "default: 1x, and 2x for a row"},
    "--lr-warmup-steps": {"type": NATURAL, "default": 500, "help": "rise of the learning rate"},
    "--min-size": {"type": POSITIVE, "nargs": "+", "default": [800], "help": "of the shorter side"},
    "--max-size": {"type": POSITIVE, "default": 1333, "help": "longer side, at most"},
    "--backbone-weights": {"help": "of the student: a classifier's checkpoint, or none"},
    "--keep-empty": {"action": "store_true", "help": "train on images without boxes too"},
}


def student_of(args: Any, classes: int) -> nn.Module:
    """The student, with the weights that the options name."""
    student = detection.build(args.student, classes, args.min_size, args.max_size)
    detection.check_student(student, args.student)
    if args.student_weights is not None:
        load_weights(student, args.student_weights, "--student-weights")
    elif args.backbone_weights != "none" and not args.student.startswith("small"):
        detection.with_trained_backbone(student, args.student, args.backbone_weights)
    return student


@refusing()
def with_teacher(args: Any, student: nn.Module, classes: int) -> sokd.Distiller:
    """The student, the teacher's backbone and the methods that --method names."""
    teacher = detection.build(args.teacher, classes, args.min_size, args.max_size)
    if args.teacher_weights is None:
        detection.pretrained(teacher, args.teacher)
    else:
        load_weights(teacher, args.teacher_weights, "--teacher-weights")
    names = args.student, args.teacher
    pairs = args.layers or detection.levels(student, teacher, names)
    given = {*args.method_option, *args.sokd_option}
    own = {} if "adapter" in given else {"adapter": "linear"}  # FPN's maps have negative values
    return sokd.Distiller(
        student=student, teacher=BackboneAlone(teacher), layers=pairs, method=args.method,
        task="model", sokd=args.sokd and args.sokd_option, check_finite=False,
        example=torch.zeros(2, 3, 128, 128), **own, **args.method_option,
    )  # fmt: skip


def prepare(transform: nn.Module, images: list[Tensor], targets: list[Any]) -> tuple[Any, ...]:
    """A batch for both networks: x [B, 3, H, W], padded; targets in its pixels, with the size of
    each image in x; and boxes and sizes, as a Distiller takes them."""
    batch, targets = transform(images, targets)
    targets = [{**t, "size": size} for t, size in zip(targets, batch.image_sizes, strict=True)]
    where = {"boxes": [t["boxes"] for t in targets], "image_sizes": batch.image_sizes}
    return batch.tensors, targets, where


def main(argv: Sequence[str] | None = None, writer: Any = None) -> dict[str, Any]:
    args = read_options(
        __doc__, argv, published.coco_settings, OWN,
        teacher="fasterrcnn_resnet50_fpn_v2", student="fasterrcnn_resnet50_fpn", batch_size=16,
        lr=0.02, weight_decay=1e-4,
    )  # fmt: skip
    if args.schedule is None:
        args.schedule = "1x" if args.row is None else "2x"
    epochs, milestones = SCHEDULES[args.schedule]
    args.epochs = epochs if args.epochs is None else args.epochs
    args.milestones = milestones if args.milestones is None else args.milestones
    detection.pycocotools()
    refuse(args)
    with Run(args, writer, figure="AP") as run:
        return distil(args, run)


def refuse(args: Any) -> None:
    """Refuse the options of the other recipes that a detector does not support."""
    if args.download:
        raise SystemExit("--download: coco.py fetches nothing; COCO is at cocodataset.org")
    if args.compile:
        raise SystemExit("--compile: torchvision's detectors have no fixed shapes to compile for")
    for name in args.method:
        if needs := sokd.methods.METHODS[name].needs - {"features", "boxes"}:
            what = ", ".join(sorted(needs))
            raise SystemExit(f"--method must compare features only, got {name!r} (reads {what})")


def step(
    args: Any, run: Run, model: nn.Module, batches: list[Any], rise: float, scaler: GradScaler,
    optimizer: torch.optim.Optimizer,
) -> None:  # fmt: skip
    """One step of the optimiser: the gradients of all parts of a batch, then the update."""
    for part, (x, y, where) in enumerate(batches, 1):
        with run.accumulating(model, last=part == len(batches)):
            with run.clock("loss"), run.autocast():
                own, losses = model(x, y, **where)
                loss = objective(losses, args.ce_weight, rise, own) / len(batches)
            with run.clock("backward"):
                scaler.scale(loss).backward()
        run.log(losses)
    with run.clock("backward"):
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def distil(args: Any, run: Run) -> dict[str, Any]:
    data = detection.coco(args.data, args.train_samples, args.seed, args.keep_empty, run.say)
    train, test = loaders(
        data, args, run.rank, run.ranks, run.device, test_batch=8, collate=detection.as_lists
    )
    student = student_of(args, data.classes)
    transform = student.transform
    evaluate = partial(detection.average_precision, run, test=test, truth=data.truth)
    if args.eval_only:
        return run.report(evaluate(student.to(run.device)))
    student.transform = Once(transform)

    alone = not args.method
    learner = detection.Alone(student) if alone else with_teacher(args, student, data.classes)
    model = run.parallel(learner)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, args.lr, args.momentum, weight_decay=args.weight_decay)
    factor = partial(learning_rate, args, train.batch_sampler.steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    scaler = GradScaler(run.device.type, enabled=args.amp == "fp16")
    ema, search = averaged(args.ema, student), None
    if args.sokd and args.search_epochs:
        with refusing():
            search = sokd.PolicySearch(learner.kd, student, epochs=args.search_epochs)
    run.clock.watch(student, *(() if alone else (learner.teacher,)))
    run.track(
        model=learner, optimizer=optimizer, schedule=schedule, scaler=scaler, ema=ema, search=search
    )

    for epoch in run.epochs():
        rise = min(1.0, (epoch + 1) / args.warmup_epochs) if args.warmup_epochs else 1.0
        model.train()
        for batches in run.steps(train):
            batches = [prepare(transform, x, y) for x, y, _ in batches]
            if search is not None and run.step % args.search_every == 0:
                with run.clock("search"), run.autocast():
                    sizes = batches[0][2]["image_sizes"]
                    search.step(partial(learner.step, image_sizes=sizes), batches[0][:2])
            step(args, run, model, batches, rise, scaler, optimizer)
            if ema is not None:
                ema.update_parameters(student)
            schedule.step()
        figures = evaluate(student)
        if ema is not None:
            figures |= {f"ema_{name}": value for name, value in evaluate(ema.module).items()}
        run.end_epoch(figures)
        if search is not None:
            search.end_epoch()

    result = run.finish(student, ema)
    published.compare(run, args.row, published.COCO_PAIRS, published.COCO, published.COCO_SOURCE)
    return result


def learning_rate(args: Any, steps: int, step: int) -> float:
    """The factor of --lr at a step of the run: a linear rise from 0.001, then / 10 by milestone."""
    rise = min(1.0, 0.001 + 0.999 * step / max(1, args.lr_warmup_steps))
    return rise * 0.1 ** sum(step // steps >= milestone for milestone in args.milestones)


if __name__ == "__main__":
    main()
