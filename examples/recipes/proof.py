"""A proof that the recipes run, on real data and a small machine; no ranking of the methods.

    python examples/recipes/proof.py --out out/proof     # cut off, it goes on where it was

Fashion-MNIST through cifar100.py, a subset: a teacher (resnet20), then a narrower student
(resnet8w8) alone and by each method, plain and with SoKD, on every seed. Each run is a line of
OUT/runs.csv.
"""

import argparse
import csv
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import cifar100
import torch

# FitNet, AT and ReviewKD: a part of the tables' weights, which are for large networks.
METHODS = ("none", "kd", "fitnet=1", "at=10", "crd", "reviewkd=1")
COLUMNS = ("method", "seed", "last_top1", "best_top1", "best_epoch", "cpu_seconds", "threads")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/proof"))
    parser.add_argument("--data", default="data")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", default="32")
    args = parser.parse_args(argv)
    common = [
        *("--dataset", "fashion-mnist", "--data", args.data, "--resume", "auto"),
        *("--train-samples", str(args.samples), "--epochs", str(args.epochs)),
        *("--milestones", str(max(1, args.epochs - 1)), "--workers", "0", "--teacher", "resnet20"),
        *("--batch-size", args.batch_size),
    ]
    teacher = args.out / "teacher"
    once(teacher, "teacher (resnet20)", 0, [*common, "--teacher-only"])
    student = ["--student", "resnet8w8", "--teacher-weights", str(teacher / "teacher.pt")]
    # The search is a step in eight, and CRD has the negatives that a small set allows.
    student += ["--search-every", "8", "--search-epochs", str(args.epochs)]
    for seed in range(args.seeds):
        for method in METHODS:
            for sokd in (False, True)[: 1 if method == "none" else 2]:
                name = f"{method.split('=')[0]}{'+sokd' if sokd else ''}"
                more = ["--method", method, "--sokd" if sokd else "--no-sokd", "--seed", str(seed)]
                more += ["--method-option", "negatives=1024"] if method == "crd" else []
                once(args.out / f"{name}-{seed}", name, seed, [*common, *student, *more])
    rows = [json.loads(path.read_text()) for path in sorted(args.out.glob("*/row.json"))]
    with (args.out / "runs.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    print("| run | last epoch, test % | best epoch | CPU seconds |\n|---|---|---|---|")
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        cells = (
            spread([row[key] for row in own]) for key in ("last_top1", "best_top1", "cpu_seconds")
        )
        print(f"| {name} | {' | '.join(cells)} |")


def once(out: Path, name: str, seed: int, options: list[str]) -> None:
    """Run cifar100.py unless its row is there; a run that was cut off goes on."""
    if (out / "row.json").exists():
        return
    print(f"{name}, seed {seed}", flush=True)
    begun = time.process_time()
    result = cifar100.main([*options, "--out", str(out)])
    row = {"method": name, "seed": seed} | {key: result[key] for key in COLUMNS[2:5]}
    row |= {"cpu_seconds": round(time.process_time() - begun, 1)}
    (out / "row.json").write_text(json.dumps(row | {"threads": torch.get_num_threads()}))


def spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


if __name__ == "__main__":
    main()
