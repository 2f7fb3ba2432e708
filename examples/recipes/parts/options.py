"""The command line of the recipes."""

import argparse
import ast
from collections.abc import Callable, Sequence
from typing import Any

import sokd
from parts.published import parse_row
from sokd.kd.options import settled

# What may differ between a run and its continuation; every other option makes another run.
FREE = {"out", "data", "download", "resume", "workers", "max_steps", "eval_only", "tensorboard"}


def read_options(
    description: str | None,
    argv: Sequence[str] | None,
    settings: Callable[[str, str, list[str]], dict[str, Any]],
    own: dict[str, dict[str, Any]],
    **defaults: Any,
) -> argparse.Namespace:
    """The options, a recipe's `own` among them.

    Those not given are the `settings` that the pair and its methods were published with, then the
    defaults.
    """
    parser = _parser(description)
    for name, kind in own.items():
        parser.add_argument(name, **kind)
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    args.method = dict(map(_weighted, args.method or ["fitnet"]))
    if args.row is not None:
        row = parse_row(args.row)
        args.teacher, args.student, args.sokd = row.teacher, row.student, row.sokd
        args.method = dict.fromkeys(row.methods)
    if args.teacher_only:
        args.student, args.method = args.teacher, {"none": None}
    if "none" in args.method:
        args.method, args.sokd = {}, False
    for name in args.method:
        if name not in sokd.methods.METHODS:
            known = ", ".join(sokd.methods.METHODS)
            raise SystemExit(f"--method must be among none, {known}, got {name!r}")
    published = settings(args.teacher, args.student, list(args.method))
    weights = published.pop("weights")
    args.method = {m: weights.get(m) if w is None else w for m, w in args.method.items()}
    args.method_option = published.pop("method_option", {}) | dict(args.method_option)
    args.sokd_option = dict(args.sokd_option)
    if args.row is not None:
        args.sokd_option.setdefault("preset", "paper")
    if args.eval_only and args.student_weights is None:
        args.student_weights = f"{args.out}/student.pt"
    for name, value in ({"ce_weight": 1.0, "warmup_epochs": 0} | published).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if settled(args.sokd_option.get("preset"), args.sokd_option)["search"] is not None:
        args.search_epochs = 0  # the loss searches
    return args


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and the defaults."""


def _parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=_Help)
    add, yes_or_no = made.add_argument, argparse.BooleanOptionalAction
    add("--row", help="a row of a table, TEACHER:STUDENT:METHOD[+sokd]; prints the accepted figure")
    add("--teacher", help="network")
    add("--student", help="network")
    add("--teacher-weights", help="checkpoint of the teacher")
    add("--student-weights", help="checkpoint that the student starts from, or for --eval-only")
    add("--teacher-only", action="store_true", help="train the teacher, by cross entropy")
    add("--method", nargs="*", metavar="NAME[=WEIGHT]", help="none: the student alone")
    add("--method-option", nargs="*", default=[], type=_option, metavar="NAME=VALUE")
    add("--sokd", action=yes_or_no, default=True, help="refined teacher features and mutual areas")
    add("--sokd-option", nargs="*", default=[], type=_option, metavar="NAME=VALUE")
    add("--layers", nargs="*", metavar="STUDENT=TEACHER", help="other layers than the tables'")
    add("--search-epochs", type=int, help="how long SoKD's policy is searched; 0: not at all")
    add("--search-every", type=int, default=1, help="steps between two steps of the search")
    add("--data", default="data", help="folder of the data set")
    add("--download", action="store_true", help="fetch the data set into --data")
    add("--train-samples", type=int, help="a fixed random subset of this size")
    add("--epochs", type=int)
    add("--milestones", type=int, nargs="*", help="epochs after which lr is divided by 10")
    add("--batch-size", type=int, help="of one step, over all ranks")
    add("--accumulate", type=int, default=1, help="parts in which each rank computes a step")
    add("--lr", type=float)
    add("--momentum", type=float, default=0.9)
    add("--weight-decay", type=float)
    add("--ce-weight", type=float, help="of the task's loss: the cross entropy, the detector's own")
    add("--warmup-epochs", type=int, help="linear rise of the distillation terms")
    add("--seed", type=int, default=0)
    add("--amp", choices=("no", "bf16", "fp16"), default="no")
    add("--compile", action="store_true")
    add("--channels-last", action="store_true")
    add("--sync-bn", action="store_true", help="BatchNorm over all ranks (GPUs; never run yet)")
    add("--ema", type=float, metavar="DECAY", help="average the student's weights, e.g. 0.9999")
    add("--workers", type=int, help="of the loader, for each rank")
    add("--out", default="out/recipe", help="folder for the checkpoint, the logs and the student")
    add("--resume", default="no", help="auto: go on where OUT's checkpoint is; no; or a file")
    add("--max-steps", type=int, help="end the run after so many steps")
    add("--eval-only", action="store_true")
    add("--tensorboard", action="store_true", help="write OUT/tensorboard too")
    return made


def _weighted(text: str) -> tuple[str, float | None]:
    name, equals, weight = text.partition("=")
    try:
        return name, float(weight) if equals else None
    except ValueError:
        raise SystemExit(f"--method must be NAME or NAME=WEIGHT, got {text!r}") from None


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # a word
