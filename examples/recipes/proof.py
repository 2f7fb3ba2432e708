"""A proof that the recipes run, on real data and a small machine; no ranking of the methods.

    python examples/recipes/proof.py --out out/proof     # interrupted, it resumes

Fashion-MNIST through cifar100.py, a subset: a teacher (resnet20), then a narrower student
(resnet8w8) alone and by each method, plain and with SoKD, on every seed. Each run is a line of
OUT/runs.csv.
"""

import argparse
import csv
import json
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cifar100
import torch

# FitNet, AT and ReviewKD: a part of the tables' weights, which are for large networks.
METHODS = ("none", "kd", "fitnet=1", "at=10", "crd", "reviewkd=1")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/proof"))
    parser.add_argument("--data", default="data")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", default="32")
    parser.add_argument("--docs", type=Path, help="folder whose results.md gets the table")
    args = parser.parse_args(argv)
    common = [
        *("--dataset", "fashion-mnist", "--data", args.data, "--resume", "auto"),
        *("--train-samples", str(args.samples), "--epochs", str(args.epochs)),
        *("--milestones", str(max(1, args.epochs - 1)), "--workers", "0", "--teacher", "resnet20"),
        *("--batch-size", args.batch_size),
    ]
    teacher = args.out / "teacher"
    once(cifar100, teacher, "teacher (resnet20)", 0, [*common, "--teacher-only"])
    student = ["--student", "resnet8w8", "--teacher-weights", str(teacher / "teacher.pt")]
    for seed in range(args.seeds):
        for method in METHODS:
            for sokd in (False, True)[: 1 if method == "none" else 2]:
                name = f"{method.split('=')[0]}{'+sokd' if sokd else ''}"
                more = ["--method", method, "--sokd" if sokd else "--no-sokd", "--seed", str(seed)]
                more += ["--method-option", "negatives=1024"] if method == "crd" else []
                once(cifar100, args.out / f"{name}-{seed}", name, seed, [*common, *student, *more])
    shown = table(args.out, {"last_top1": "last epoch, test %", "best_top1": "best epoch"})
    print(shown)
    if args.docs is not None:
        publish(f"{shown}\n", args.out, args.docs, "classification")


def table(out: Path, figures: dict[str, str]) -> str:
    """Write OUT/runs.csv, and give the mean and spread of the runs' figures as a table."""
    rows = [json.loads(path.read_text()) for path in sorted(out.glob("*/row.json"))]
    with (out / "runs.csv").open("w", newline="") as file:
        lines = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        lines.writeheader()
        lines.writerows(rows)
    columns = figures | {"cpu_seconds": "CPU seconds"}
    shown = [f"| run | {' | '.join(columns.values())} |", "|---" * (len(columns) + 1) + "|"]
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        cells = (spread([row[key] for row in own]) for key in columns)
        shown.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(shown)


def publish(shown: str, out: Path, docs: Path, name: str) -> None:
    """The table between its markers in DOCS/results.md, and the runs in DOCS/results/NAME.csv."""
    page = docs / "results.md"
    before, opening, rest = page.read_text().partition(f"<!-- {name}:")
    head, _, rest = rest.partition("\n")
    _, closing, after = rest.partition(f"<!-- /{name} -->")
    if not closing:
        raise SystemExit(f"--docs: {page} has no markers <!-- {name}: --> and <!-- /{name} -->")
    page.write_text(f"{before}{opening}{head}\n{shown}{closing}{after}")
    shutil.copy(out / "runs.csv", docs / "results" / f"{name}.csv")


def once(
    recipe: Any, out: Path, name: str, seed: int, options: list[str], more: Sequence[str] = ()
) -> None:
    """Run a recipe unless its row is there; an interrupted run resumes.

    `more`: figures of the log's last row, in addition to those of the result.
    """
    if (out / "row.json").exists():
        return
    print(f"{name}, seed {seed}", flush=True)
    begun = time.process_time()
    result = recipe.main([*options, "--out", str(out)])
    row = {"method": name, "seed": seed} | {k: v for k, v in result.items() if k != "last_epoch"}
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    row |= {f"last_{key}": last[key] for key in more}
    row |= {"cpu_seconds": round(time.process_time() - begun, 1)}
    (out / "row.json").write_text(json.dumps(row | {"threads": torch.get_num_threads()}))


def spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


if __name__ == "__main__":
    main()
