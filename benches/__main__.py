"""`python -m benches [--quick] [name ...]`: all benches or those named; tables, CSV files, docs."""

import argparse
import importlib
import sys
import time

from benches.harness import Options, machine, run
from benches.report import write_pages

NAMES = (
    "refine", "masked_mse", "areas", "loss", "methods", "distiller", "warmup", "readers", "recipes",
    "import",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benches", description=__doc__)
    names = ", ".join(NAMES)
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], metavar="name", help=names)
    parser.add_argument("--quick", action="store_true", help="main cases, few turns; to out/bench")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a target is missed")
    arguments = parser.parse_args()
    start = time.perf_counter()
    options = Options(quick=arguments.quick)
    met = True
    for name in arguments.names or NAMES:
        met &= run(name, importlib.import_module(f"benches.bench_{name}").cases, options)
    if not options.quick and not arguments.names:
        write_pages()
    where = ", ".join(f"{key} {value}" for key, value in machine().items())
    verdict = "all targets met" if met else "targets missed: see above"
    print(f"{where}; {time.perf_counter() - start:.0f} s; {verdict}")
    return int(arguments.strict and not met)


if __name__ == "__main__":
    sys.exit(main())
