"""Accepted figures (%) of the tables that the field compares on, and their settings.

CIFAR-100: 240 epochs, batch 64, mean of the published runs, from the READMEs of RepDistiller and
mdistiller, which most later papers copy. ImageNet: 100 epochs, batch 256 or 512, from the methods'
papers and mdistiller's README. COCO: the READMEs of FGD and MGD. RepDistiller's CC is another loss
than `sokd.methods.cc`, so its figures are not here.
"""

from typing import Any, NamedTuple

CIFAR100_SOURCE = "RepDistiller and mdistiller READMEs, CIFAR-100 top-1, 240 epochs"
IMAGENET_SOURCE = "mdistiller README and the methods' papers, ImageNet top-1, 100 epochs"

CIFAR100_PAIRS = (
    *("resnet56:resnet20", "resnet110:resnet32", "resnet32x4:resnet8x4", "wrn_40_2:wrn_16_2"),
    *("wrn_40_2:wrn_40_1", "vgg13:vgg8", "vgg13:MobileNetV2", "ResNet50:MobileNetV2"),
    *("resnet32x4:ShuffleV1", "resnet32x4:ShuffleV2", "wrn_40_2:ShuffleV1"),
)
CIFAR100 = {
    "teacher": "72.34 74.31 79.42 75.61 75.61 74.64 74.64 79.34 79.42 79.42 75.61",
    "none": "69.06 71.14 72.50 73.26 71.98 70.36 64.60 64.60 70.50 71.82 70.50",
    "kd": "70.66 73.08 73.33 74.92 73.54 72.98 67.37 67.35 74.07 74.45 74.83",
    "fitnet": "69.21 71.06 73.50 73.58 72.24 71.02 64.14 63.16 73.59 73.54 73.73",
    "at": "70.55 72.31 73.44 74.08 72.77 71.43 59.40 58.58 71.73 72.73 73.32",
    "sp": "69.67 72.69 72.94 73.83 72.43 72.68 66.30 68.08 73.48 74.56 74.52",
    "vid": "70.38 72.61 73.09 74.11 73.30 71.23 65.56 67.57 73.38 73.40 73.61",
    "rkd": "69.61 71.82 71.90 73.35 72.22 71.48 64.52 64.43 72.28 73.21 72.21",
    "pkt": "70.34 72.61 73.64 74.54 73.45 72.88 67.13 66.52 74.10 74.69 73.89",
    "nst": "69.60 71.96 73.30 73.68 72.24 71.53 58.16 64.96 74.12 74.68 74.89",
    "crd": "71.16 73.48 75.51 75.48 74.14 73.94 69.73 69.11 75.11 75.65 76.05",
    "reviewkd": "71.89 73.89 75.63 76.12 75.09 74.84 70.37 69.89 77.45 77.78 77.14",
    "dkd": "71.97 74.11 76.32 76.23 74.81 74.68 69.71 70.35 76.45 77.07 76.70",
}
IMAGENET_PAIRS = ("resnet34:resnet18",)
IMAGENET = {
    "teacher": "73.31", "none": "69.75", "kd": "70.7-71.0", "at": "70.69", "crd": "71.17",
    "reviewkd": "71.61", "reviewkd+sokd": "72.53", "dkd": "71.70", "mgd": "71.69", "dist": "72.07",
    "wkd": "72.76",
}  # fmt: skip

# Both READMEs: mmdetection's Faster R-CNN ResNet-50 of the 2x schedule, AP of val2017.
COCO_SOURCE = (
    "READMEs of FGD and MGD, COCO val2017 AP, 2x; their teacher is Cascade Mask R-CNN ResNeXt-101 "
    "of mmdetection, which torchvision has not"
)
COCO_PAIRS = ("fasterrcnn_resnet50_fpn_v2:fasterrcnn_resnet50_fpn",)
COCO = {"none": "38.4", "fgd": "42.0", "mgd": "42.1"}

_MOBILE = ("mobilenetv2", "shufflev1", "shufflev2")
_DKD_BETA = {
    **dict.fromkeys(("resnet20", "resnet32"), 2.0),
    **dict.fromkeys(("vgg8", "wrn_16_2", "wrn_40_1"), 6.0),
}
_REVIEWKD = {"resnet20": 0.6, "resnet32": 1.0, "shufflev2": 8.0}


def plain(name: str) -> str:
    """A network's name without what does not matter in it: case, and `-` for `_`."""
    return name.lower().replace("-", "_")


class Row(NamedTuple):
    """One cell of a table: `teacher:student:method[+method ...][+sokd]`."""

    teacher: str
    student: str
    methods: list[str]
    sokd: bool


def parse_row(text: str) -> Row:
    """`resnet32x4:resnet8x4:fitnet+sokd` as its parts.

    Raises:
        SystemExit: another form.
    """
    parts = text.split(":")
    if len(parts) != 3 or not all(parts):
        raise SystemExit(f"--row must be TEACHER:STUDENT:METHOD[+sokd], got {text!r}")
    methods = [method for method in parts[2].split("+") if method != "sokd"]
    if not methods:
        raise SystemExit(f"--row must name a method beside sokd, got {text!r}")
    return Row(parts[0], parts[1], methods, "sokd" in parts[2].split("+"))


def compare(
    run: Any, text: str | None, pairs: tuple[str, ...], table: dict[str, str], source: str
) -> None:
    """Print the accepted figure of --row, if it is given."""
    if text is not None:
        run.say(f"accepted: {accepted(parse_row(text), pairs, table, source)}")


def accepted(row: Row, pairs: tuple[str, ...], table: dict[str, str], source: str) -> str:
    """The accepted figure of a row as text, or a remark that the table has none."""
    base = "+".join(row.methods)
    names = [f"{base}+sokd", base] if row.sokd else [base]
    columns = [plain(pair) for pair in pairs]
    if plain(f"{row.teacher}:{row.student}") not in columns:
        return f"no accepted figure for {row.teacher} -> {row.student}"
    column = columns.index(plain(f"{row.teacher}:{row.student}"))
    cell = {name: figures.split()[column] for name, figures in table.items()}
    found = [f"{name} {cell[name]}" for name in names if name in cell]
    missing = [f"none in the table for {name}" for name in names if name not in cell]
    figures = [*found, *missing, f"student alone {cell['none']}"]
    figures += [f"teacher {cell['teacher']}"] if "teacher" in cell else []
    return f"{', '.join(figures)} ({source})"


def cifar100_settings(teacher: str, student: str, methods: list[str]) -> dict[str, Any]:
    """The options of a pair's published runs that differ from the defaults; the adapter is that of
    rows without SoKD."""
    teacher, student = plain(teacher), plain(student)
    found: dict[str, Any] = {"lr": 0.01 if student in _MOBILE else 0.05, "weights": {}}
    found["search_epochs"] = 50 if (teacher, student) == ("resnet32x4", "resnet8x4") else 20
    if student.startswith("vgg"):
        found["search_epochs"] = 10
    if methods in (["kd"], ["lskd"]):
        found["ce_weight"] = 0.1
    if methods == ["dist"]:
        found["method_option"] = {"temperature": 4.0}
    if "dkd" in methods or "reviewkd" in methods:
        found["warmup_epochs"] = 20
    if "dkd" in methods:
        found["method_option"] = {"beta": _DKD_BETA.get(student, 8.0)}
    if "fitnet" in methods:
        found["adapter"] = "regressor"
    found["weights"]["reviewkd"] = _REVIEWKD.get(student, 5.0)
    return found


def imagenet_settings(teacher: str, student: str, methods: list[str]) -> dict[str, Any]:
    """The same as `cifar100_settings`, for ImageNet."""
    found: dict[str, Any] = {"lr": 0.1, "weights": {"kd": 0.5}, "search_epochs": 5}
    if methods == ["kd"]:
        found |= {"ce_weight": 0.5, "method_option": {"temperature": 1.0}}
    if "dkd" in methods:
        found |= {"warmup_epochs": 1, "method_option": {"temperature": 1.0, "beta": 0.5}}
    if "reviewkd" in methods:
        found["warmup_epochs"] = 1
    if "wkd" in methods:
        found["adapter"] = "regressor"
    if "mgd" in methods:
        found["adapter"] = "linear"
    return found


def coco_settings(teacher: str, student: str, methods: list[str]) -> dict[str, Any]:
    """As `cifar100_settings`. FitNet's weight is settled here: most cells are background."""
    found: dict[str, Any] = {"weights": {"fitnet": 1.0, "mgd": 5e-7}, "search_epochs": 1}
    # FGD's and MGD's: the authors' for detectors of two stages
    found["method_option"] = {"over": "cells", "ratio": 0.45} if "mgd" in methods else {}
    if "fgd" in methods:
        weights = {"foreground": 5e-5, "background": 2.5e-5, "attention": 5e-5, "relation": 5e-7}
        found["method_option"] |= weights
    return found
