"""The command line of the recipes."""

import argparse
import ast
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sokd
from parts.published import parse_row
from sokd.kd.options import settled


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
    if args.row is not None:
        _take_row(args, parser)
    if args.teacher_only:
        args.student, args.method, args.sokd = args.teacher, ["none"], False
    args.method = dict(map(_weighted, args.method or ["fitnet"]))
    if "none" in args.method:
        if len(args.method) > 1 or args.sokd:
            raise SystemExit("--method none must stand alone, without other methods and SoKD")
        args.method, args.sokd = {}, False
    args.sokd = args.sokd is not False
    for name in args.method:
        if name not in sokd.methods.METHODS:
            known = ", ".join(sokd.methods.METHODS)
            raise SystemExit(f"--method must be among none, {known}, got {name!r}")
    published = settings(args.teacher, args.student, list(args.method))
    weights = published.pop("weights")
    args.method = {m: weights.get(m) if w is None else w for m, w in args.method.items()}
    args.method_option = published.pop("method_option", {}) | dict(args.method_option)
    args.sokd_option = dict(args.sokd_option)
    adapter = published.pop("adapter", None)
    if args.row is not None and args.sokd:
        args.sokd_option.setdefault("preset", "paper")
    elif args.row is not None and adapter is not None:
        args.method_option.setdefault("adapter", adapter)
    if args.eval_only and args.student_weights is None:
        name = "teacher" if args.teacher_only else "student"
        args.student_weights = f"{args.out}/{name}.pt"
    for name, value in ({"ce_weight": 1.0, "warmup_epochs": 0} | published).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    with refusing():
        if settled(args.sokd_option.get("preset"), args.sokd_option)["search"] is not None:
            args.search_epochs = 0  # the loss searches
    return args


@contextmanager
def refusing() -> Iterator[None]:
    """End the run with the sentence of an error of sokd about an option."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise SystemExit(str(error)) from error


def refuse_detection(args: argparse.Namespace) -> None:
    """Refuse the methods that a classification recipe has no boxes or layers for."""
    for name in args.method:
        if "boxes" in sokd.methods.METHODS[name].needs:
            raise SystemExit(f"--method must need no boxes, got {name!r}; coco.py has them")
    if "ofd" in args.method and args.layers is None:
        raise SystemExit("--method ofd needs --layers that end before a ReLU, such as BatchNorms")


def _take_row(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """The pair, the methods and SoKD of --row; other options must not name others."""
    row = parse_row(args.row)
    named = {"teacher": row.teacher, "student": row.student, "method": row.methods}
    for name, value in (named | {"sokd": row.sokd}).items():
        if getattr(args, name) not in (parser.get_default(name), value):
            raise SystemExit(f"--row {args.row} and --{name} must not both be given")
        setattr(args, name, value)


def number(least: float, most: float = math.inf) -> Callable[[str], Any]:
    """The type of an option of at least `least` and at most `most`: whole where `least` is."""

    def read(text: str) -> Any:
        value = type(least)(text)
        if not least <= value <= most or value == math.inf:
            bound = f"{least} or more" if most == math.inf else f"from {least:g} to {most:g}"
            raise argparse.ArgumentTypeError(f"must be {bound}, got {text}")
        return value

    read.__name__ = type(least).__name__  # argparse: "invalid int value"
    return read


POSITIVE, NATURAL, AMOUNT = number(1), number(0), number(0.0)


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
    add("--method", nargs="+", metavar="NAME[=WEIGHT]", help="none: the student alone")
    add("--method-option", nargs="*", default=[], type=_option, metavar="NAME=VALUE")
    add("--sokd", action=yes_or_no, help="refined teacher features and mutual areas; left out: on")
    add("--sokd-option", nargs="*", default=[], type=_option, metavar="NAME=VALUE")
    add("--layers", nargs="+", type=_pair, metavar="STUDENT=TEACHER",
        help="other layers than the tables'")  # fmt: skip
    add("--search-epochs", type=NATURAL, help="how long SoKD's policy is searched; 0: not at all")
    add("--search-every", type=POSITIVE, default=1, help="steps between two steps of the search")
    add("--data", default="data", help="folder of the data set")
    add("--download", action="store_true", help="fetch the data set into --data")
    add("--train-samples", type=int, help="a fixed random subset of this size")
    add("--epochs", type=POSITIVE)
    add("--milestones", type=NATURAL, nargs="*", help="epochs after which lr is divided by 10")
    add("--batch-size", type=POSITIVE, help="of one step, over all ranks")
    add("--accumulate", type=POSITIVE, default=1, help="parts in which each rank computes a step")
    add("--lr", type=AMOUNT)
    add("--momentum", type=AMOUNT, default=0.9)
    add("--weight-decay", type=AMOUNT)
    add("--ce-weight", type=AMOUNT, help="of the task's loss: cross entropy, the detector's own")
    add("--warmup-epochs", type=NATURAL, help="linear rise of the distillation terms")
    add("--seed", type=NATURAL, default=0)
    add("--amp", choices=("no", "bf16", "fp16"), default="no")
    add("--compile", action="store_true")
    add("--channels-last", action="store_true")
    add("--sync-bn", action="store_true", help="BatchNorm over all ranks (GPUs; never run yet)")
    add("--ema", type=number(0.0, 1.0), metavar="DECAY",
        help="average the student's weights, e.g. 0.9999")  # fmt: skip
    add("--workers", type=NATURAL, help="of the loader, for each rank")
    add("--out", default="out/recipe", help="folder for the checkpoint, the logs and the student")
    add("--resume", default="no", help="auto (OUT's checkpoint, if any), no, or a file")
    add("--max-steps", type=POSITIVE, help="end the run after so many steps")
    add("--eval-only", action="store_true")
    add("--tensorboard", action="store_true", help="write OUT/tensorboard too")
    return made


def _weighted(text: str) -> tuple[str, float | None]:
    name, equals, weight = text.partition("=")
    try:
        return name, float(weight) if equals else None
    except ValueError:
        raise SystemExit(f"--method must be NAME or NAME=WEIGHT, got {text!r}") from None


def _pair(text: str) -> tuple[str, str]:
    pair = text.split("=")
    if len(pair) != 2 or not all(pair):
        raise argparse.ArgumentTypeError(f"must be STUDENT=TEACHER, got {text!r}")
    return pair[0], pair[1]


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # a word
