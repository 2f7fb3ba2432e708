"""`python -m sokd.demo`: train a teacher, distil students from it, print one table, draw two pictures."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

NEEDED = ("matplotlib", "tqdm")


def _parser() -> argparse.ArgumentParser:
    from sokd.demo.data import SOURCES
    from sokd.demo.methods import METHODS, SIX
    from sokd.demo.models import STUDENTS, TEACHERS

    parser = argparse.ArgumentParser(
        prog="python -m sokd.demo",
        description="Train a teacher, distil students from it in several ways over several seeds, print one "
        "table, and draw the learned policy and the areas that teacher and student attend to.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--dataset",
        choices=tuple(SOURCES),
        default="animal-mnist",
        help="real images; how to install: an error says",
    )
    add("--method", choices=tuple(METHODS), nargs="+", default=list(SIX), metavar="NAME",
        help=f"one or several of: {', '.join(METHODS)}")  # fmt: skip
    add("--seeds", type=_count, default=3, help="runs of each method, with seeds 0, 1, ...")
    add("--epochs", type=_count, default=10, help="of every student run")
    add("--teacher", choices=tuple(TEACHERS), default="base", help="size of the teacher")
    add("--teacher-epochs", type=_count, default=8, help="of the teacher")
    add("--student", choices=tuple(STUDENTS), default="small", help="size of the students")
    add(
        "--workers",
        type=_count,
        default=None,
        help="student runs at a time, one thread each; default: the cores",
    )
    add(
        "--save",
        type=Path,
        default=Path("out/demo"),
        metavar="DIR",
        help="where tables, pictures and the teacher go",
    )
    add("--tune", action="store_true",
        help="no table: try every setting of each method on the validation part, write tune.csv")  # fmt: skip
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; 0 if all went well, 2 with one line on stderr if something it needs is missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        print(
            f"sokd.demo: {names} must be installed: pip install '.[demo]' in a checkout",
            file=sys.stderr,
        )
        return 2
    from sokd.demo.data import MissingData, load

    options = _parser().parse_args(arguments)
    try:
        data = load(options.dataset)
    except MissingData as error:
        print(f"sokd.demo: {error}", file=sys.stderr)
        return 2
    from sokd.demo.flow import demo  # after the check: it needs tqdm and matplotlib

    demo(data, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
