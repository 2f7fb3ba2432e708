"""coco.py from the command line to the student's file, and what it refuses."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import coco
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from parts import detection, published
from support.detection import changed, options, write_set
from support.recipes import RECIPES, checkpoint, differences, load_without_sokd
from torch import nn
from torchvision import models

import sokd
from sokd.kd.adapter import kind_of_state
from sokd.methods.regions import Images

pytest.importorskip("pycocotools")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    """A teacher's file, trained by the script."""
    out = tmp_path_factory.mktemp("teacher")
    torch.set_num_threads(1)
    coco.main(options(data, out, "--teacher-only", "--max-steps", "2"))
    return out / "teacher.pt"


@pytest.fixture
def run(data, teacher, tmp_path):
    """run("name", options ...): coco.main with --out name, a teacher and a tiny student."""

    def call(name, *more, **extra):
        given = options(data, tmp_path / name, "--teacher-weights", str(teacher), *more)
        return coco.main(given, **extra)

    return call


DISTIL = [
    "--method",
    "fitnet=1",
    "fgd",
    "--sokd-option",
    "search=None",
    "--search-epochs",
    "1",
    "--search-every",
    "2",
]


def test_logs_result_and_a_student_without_sokd(run, tmp_path, capsys):
    result = run("out", *DISTIL, "--accumulate", "2", "--ema", "0.9")
    with (tmp_path / "out" / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    own = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    figures = {*detection.FIGURES, "ema_AP", "best_AP", "best_epoch"}
    seconds = {f"seconds_{n}" for n in ("search", "forward", "loss", "backward", "evaluation")}
    distilled = {"loss_fitnet", "loss_fgd", "loss_agreement"}
    assert own | figures | seconds | distilled <= rows[0].keys()
    assert all(float(rows[0][name]) > 0 for name in seconds)
    assert result["last_epoch"] == 2 and result["last_AP"] == float(rows[1]["AP"])
    assert "last epoch (2) AP " in capsys.readouterr().out
    imports, network = "from parts import detection", "detection.build('small4', 4, [64], 96)"
    load_without_sokd(tmp_path / "out" / "student.pt", imports, network)
    assert run("out", "--eval-only")["AP"] == result["last_AP"]


@pytest.mark.parametrize(
    "more",
    [
        "--method mgd --amp bf16 --channels-last",
        "--method at=1 --no-sokd --layers backbone.fpn:1=backbone.fpn:1",
        "--method none --keep-empty --train-samples 4 --schedule 2x",
        "--method reviewkd=1 --no-sokd --min-size 48 64 --warmup-epochs 2",
    ],
)
def test_every_kind_of_run(run, more, tmp_path):
    run("out", *more.split(), "--max-steps", "1")
    assert checkpoint(tmp_path / "out")["step"] == 1


@pytest.mark.parametrize("batch", [1, 3])
def test_sigterm_and_resume_are_an_uninterrupted_run(run, tmp_path, monkeypatch, batch):
    run("whole", *DISTIL)
    whole, calls = checkpoint(tmp_path / "whole"), []

    def terminated(*arguments):
        calls.append(1)
        if len(calls) == batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    original = coco.objective
    monkeypatch.setattr(coco, "objective", terminated)
    with pytest.raises(SystemExit) as stopped:
        run("out", *DISTIL)
    saved = checkpoint(tmp_path / "out")
    assert stopped.value.code == 143 and (saved["epoch"], saved["step"]) == divmod(batch, 2)
    torch.manual_seed(123)  # whatever the state of the process
    run("out", *DISTIL, "--resume", "auto")
    assert differences(checkpoint(tmp_path / "out"), whole) == []
    with pytest.raises(SystemExit, match="was made with --min-size \\[64\\], got \\[48\\]"):
        run("out", *DISTIL, "--resume", "auto", "--min-size", "48")


def test_two_ranks(run, data, teacher, tmp_path):
    """They train together, and in the evaluation each image counts once."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    out = tmp_path / "out"
    given = options(
        data, out, "--teacher-weights", str(teacher), "--method", "fgd", "--epochs", "1"
    )
    paths = [str(Path(sokd.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", str(RECIPES / "coco.py"), *given],
        env=os.environ | own, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert checkpoint(out)["step"] == 2 and len(checkpoint(out)["rng"]) == 2
    result = json.loads((out / "result.json").read_text())
    assert run("out", "--eval-only")["AP"] == pytest.approx(result["last_AP"], abs=1e-3)


# ------------------------------------------------------------------------ one transform for both


def test_one_transform_a_batch_and_the_teachers_backbone_alone(run, monkeypatch):
    """With two sizes to draw from: both backbones get the tensor that one transform made."""
    seen, steps = [], []
    build, prepare, objective = detection.build, coco.prepare, coco.objective

    def watched(name, *given):
        network = build(name, *given)
        for part in ("transform", "backbone", "rpn", "roi_heads"):
            getattr(network, part).register_forward_hook(
                lambda module, args, output, at=f"{name}.{part}": seen.append((at, args[0]))
            )
        return network

    monkeypatch.setattr(detection, "build", watched)
    monkeypatch.setattr(coco, "prepare", lambda *given: seen.clear() or prepare(*given))
    monkeypatch.setattr(
        coco, "objective", lambda *given: steps.append([*seen]) or objective(*given)
    )
    run("out", "--method", "fgd", "--no-sokd", "--min-size", "48", "64")
    expected = "small4.transform small8.backbone small4.backbone small4.rpn small4.roi_heads"
    assert [[at for at, _ in step] for step in steps] == [expected.split()] * 4
    assert all(step[1][1] is step[2][1] for step in steps)
    assert len({step[1][1].shape for step in steps}) > 1


def test_boxes_fall_on_the_right_cells_of_every_level(data):
    """Four images of unequal size: in the padded batch each box holds its bright article, and on
    P2 to P6 the cells of fgd's boxes are those with a bright pixel; padding has neither."""
    found = detection.coco(str(data), None, 0, False, print)
    images, targets, _ = detection.as_lists([found.train[0, index] for index in range(4)])
    transform = detection.build("small4", 4, [80], 96).transform.train()
    x, targets, where = coco.prepare(transform, images, targets)
    assert x.shape[2] % 32 == x.shape[3] % 32 == 0 and len(set(where["image_sizes"])) == 4
    assert [target["size"] for target in targets] == where["image_sizes"]
    assert targets[0]["boxes"] is where["boxes"][0] and targets[0]["labels"].tolist() == [1, 3]
    bright = (x[:, :1] > 0.5).float()
    for picture, (height, width) in zip(x, where["image_sizes"], strict=True):
        assert not picture[:, height:].any() and not picture[:, :, width:].any()
    near = F.max_pool2d(bright, 5, stride=1, padding=2)  # a resize rounds
    far = 1 - F.max_pool2d(1 - bright, 5, stride=1, padding=2)
    for stride in (4, 8, 16, 32, 64):
        level = torch.zeros(4, 1, *(-(-side // stride) for side in x.shape[2:]))
        inside = Images(where["image_sizes"], x.shape[2:]).density(where["boxes"], level) > 0
        surely, perhaps = (
            F.adaptive_max_pool2d(part, level.shape[2:])[:, 0] > 0 for part in (far, near)
        )
        assert surely.any() and not (surely & ~inside).any(), stride
        assert not (inside & ~perhaps).any(), stride


def test_the_learning_rate():
    args = Namespace(lr_warmup_steps=10, milestones=[2, 3])
    found = [coco.learning_rate(args, 20, step) for step in (0, 5, 10, 39, 40, 60)]
    assert found == pytest.approx([0.001, 0.5005, 1, 1, 0.1, 0.01])


def test_a_perfect_detector_has_an_ap_of_100(data):
    truth = detection.read(data, "val2017").content
    results = [
        {key: each[key] for key in ("image_id", "bbox", "category_id")} | {"score": 0.9}
        for each in truth["annotations"]
    ]
    assert detection.score(results, truth) == [100, 100, 100, 100, -1, -1]
    assert detection.score([], truth) == [0] * 6
    for each in results[::2]:
        each["bbox"] = [each["bbox"][0] + 40, *each["bbox"][1:]]
    assert 0 < detection.score(results, truth)[0] < 60


# ----------------------------------------------------------------------------------------- networks


def test_networks_by_name():
    assert detection.build("small8", 5, [64], 64).backbone.out_channels == 16
    resnet = detection.build("resnet18", 5, [64], 64)
    assert list(resnet.backbone(torch.zeros(1, 3, 64, 64))) == ["0", "1", "2", "3", "pool"]
    own = detection.build("fasterrcnn_mobilenet_v3_large_fpn", 5, [64, 80], 96)
    assert own.transform.min_size == (64, 80) and own.transform.max_size == 96


def test_a_trained_backbone_is_frozen_as_torchvisions(tmp_path):
    """Keys, values and what is trained, against torchvision's own `_resnet_fpn_extractor`."""
    classifier = models.resnet18(num_classes=7)
    classifier.bn1.running_mean.fill_(3.0)
    torch.save({"state_dict": classifier.state_dict()}, tmp_path / "r18.pth")
    network = detection.build("resnet18", 5, [64], 64)
    detection.with_trained_backbone(network, "resnet18", str(tmp_path / "r18.pth"))
    reference = models.detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, trainable_layers=3
    )
    trained = {name: p.requires_grad for name, p in network.backbone.named_parameters()}
    assert trained == {name: p.requires_grad for name, p in reference.named_parameters()}
    assert network.backbone.state_dict().keys() == reference.state_dict().keys()
    assert (network.backbone.body.bn1.running_mean == 3).all()
    torch.save(models.resnet34(num_classes=7).state_dict(), tmp_path / "r34.pth")
    given = network, "resnet18", str(tmp_path / "r34.pth")
    said = refused(detection.with_trained_backbone, *given)
    assert said.startswith(f"--backbone-weights: {given[2]}: its state_dict does not fit: ")


def test_torchvisions_checkpoints_load(tmp_path):
    """A frozen BatchNorm counts no batches; a network that counts takes its checkpoint, and the
    other way round."""
    counting = detection.build("resnet18", 5, [64], 64)
    frozen = detection.build("resnet18", 5, [64], 64)
    detection.freeze(frozen.backbone.body)
    for one, other in ((counting, frozen), (frozen, counting)):
        detection.load_weights(one, other.state_dict(), "--teacher-weights")
        assert torch.equal(one.backbone.body.bn1.weight, other.backbone.body.bn1.weight)
    with pytest.raises(SystemExit, match=r"bn1\.weight is missing"):
        state = frozen.state_dict()
        del state["backbone.body.bn1.weight"]
        detection.load_weights(counting, state, "--teacher-weights")


def test_a_row_of_the_table(tmp_path, monkeypatch):
    pair = "fasterrcnn_resnet50_fpn_v2:fasterrcnn_resnet50_fpn"
    row = published.parse_row(f"{pair}:mgd+sokd")
    said = published.accepted(row, published.COCO_PAIRS, published.COCO, "source")
    assert said == "mgd 42.1, none in the table for mgd+sokd, student alone 38.4 (source)"
    args: dict[str, Any] = {}
    monkeypatch.setattr(coco, "distil", lambda given, run: args.update(vars(given)))
    coco.main(["--row", f"{pair}:mgd", "--out", str(tmp_path / "out")])
    expected = {"epochs": 24, "milestones": [16, 22], "lr": 0.02, "batch_size": 16, "sokd": False,
                "method": {"mgd": 5e-7},
                "method_option": {"over": "cells", "ratio": 0.45}}  # fmt: skip
    assert expected.items() <= args.items()


@pytest.mark.parametrize("methods", ["fgd", "fgd+sokd"])
def test_a_row_has_the_linear_adapter(run, tmp_path, methods):
    """An FPN's maps have negative values, which no adapter that ends in a ReLU matches."""
    run("out", "--row", f"small8:small4:{methods}", "--max-steps", "1")
    saved = checkpoint(tmp_path / "out")
    assert saved["options"]["schedule"] == "2x"
    adapters = {key for key in saved["parts"]["model"] if ".match.weight" in key}
    kinds = {
        kind_of_state(saved["parts"]["model"], key[: -len("match.weight")]) for key in adapters
    }
    assert kinds == {"linear"}


# ---------------------------------------------------------------------------------------- bad input


def refused(call, *arguments):
    with pytest.raises(SystemExit) as ended:
        call(*arguments)
    assert isinstance(ended.value.code, str)
    return ended.value.code


@pytest.fixture
def spoiled(data, tmp_path):
    """spoiled(part, change): a copy of the set, its annotations changed, through `coco`."""

    def call(part="train2017", change=None, keep_empty=False):
        folder = tmp_path / "spoiled"
        shutil.copytree(data, folder)
        changed(folder, part, change or (lambda content: None))
        said = []
        return detection.coco(str(folder), None, 0, keep_empty, said.append), said

    return call


def test_boxes_that_are_not_used_as_they_are_are_named(spoiled):
    def change(content):
        boxes = content["annotations"]
        boxes[0]["bbox"] = [5, 5, 0, 10]
        boxes[2]["bbox"] = [500, 5, 10, 10]
        boxes[4]["bbox"] = [-20, 5, 30, 10]
        boxes[6]["iscrowd"] = 1

    data, said = spoiled(change=change)
    assert said == [
        "instances_train2017.json: 2 of 16 boxes are empty or outside their image and are left "
        "out: annotations 1, 3",
        "instances_train2017.json: 1 of 16 boxes reach out of their image by more than a pixel and "
        "are cut at its border: annotations 5",
        "instances_train2017.json: 1 of 16 boxes are crowds and are left out (the evaluation "
        "ignores them): annotations 7",
    ]
    _, target, _ = data.train[0, 2]
    boxes = sorted(box for box in target["boxes"].tolist() if box[1] == 5)
    assert boxes in ([[0, 5, 10, 15]], [[54, 5, 64, 15]])  # flipped or not


@pytest.mark.parametrize("keep_empty", [False, True])
def test_images_without_boxes_are_named(spoiled, keep_empty):
    def change(content):
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 11]

    data, (said,) = spoiled(change=change, keep_empty=keep_empty)
    assert ("1 of 8 images have no box and are left out" in said) is not keep_empty
    assert said.endswith(": 1.png") and len(data.train) == 7 + keep_empty
    if keep_empty:
        assert data.train[0, 1][1]["boxes"].shape == (0, 4)


def test_every_image_without_a_box(run, data, tmp_path):
    """A whole batch of background trains."""
    folder = tmp_path / "bare"
    shutil.copytree(data, folder)
    changed(folder, "train2017", lambda content: content["annotations"].clear())
    assert "has no image to train on" in refused(run, "out", "--data", str(folder))
    run("out", "--data", str(folder), "--keep-empty", "--max-steps", "1", "--method", "fitnet=1")
    assert checkpoint(tmp_path / "out")["step"] == 1


def test_files_that_do_not_fit_are_refused_by_name(spoiled, data, tmp_path):
    def lose(content):
        content["images"][2]["file_name"] = "lost.png"

    said = refused(spoiled, "val2017", lose)
    assert "1 of the 4 images that instances_val2017.json lists are not in " in said
    assert said.endswith("val2017: lost.png")
    for change, expected in (
        (lambda c: c["annotations"][0].update(image_id=99), "1 annotations of an image that it"),
        (lambda c: c["annotations"][0].update(category_id=9), "1 annotations of a category that"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "is no file of COCO's form: Value"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3, float("inf")]), "annotation 1 has th"),
        (lambda c: c["annotations"][3].pop("area"), "ValueError('annotations[3] has no area')"),
        (lambda c: c["images"][1].update(id=10), "ValueError('images has the id 10 twice')"),
        (lambda c: c.pop("categories"), "is no file of COCO's form: KeyError('categories')"),
        (lambda c: c["categories"].append({"id": 7}), "train and val differ in the categories 7"),
        (lambda c: c["categories"].append({"id": 0}), "must be 1 or more"),
    ):
        shutil.rmtree(tmp_path / "spoiled")
        assert expected in refused(spoiled, "train2017", change)
    said = refused(detection.coco, str(tmp_path / "none"), None, 0, False, print)
    assert "instances_train2017.json is not there; COCO's archives are at cocodataset.org" in said


def test_an_image_of_another_size_than_its_entry(spoiled):
    data, _ = spoiled(change=lambda content: content["images"][0].update(height=32))
    with pytest.raises(ValueError, match=r"0\.png must have the 32 x 96 of its entry, got 64 x 96"):
        data.train[0, 0]


def test_a_file_that_is_no_image(data, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(data, folder)
    (folder / "train2017" / "0.png").write_bytes(b"damaged")
    found = detection.coco(str(folder), None, 0, False, print)
    with pytest.raises(ValueError, match=r"train2017/0\.png must be an image, got "):
        found.train[0, 0]


def test_levels_that_do_not_fit_are_refused(monkeypatch):
    faster, names = detection.build("small4", 3, [64], 64), ("one", "two")
    retina = models.detection.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3
    )
    said = refused(detection.levels, retina, faster, names)
    assert said == (
        "--student must have the teacher's levels, got one: '0', '1', '2', 'p6', 'p7'; two: "
        "'0', '1', '2', '3', 'pool'"
    )
    bare = nn.Module()
    said = refused(detection.levels, faster, bare, names)
    assert said == "--teacher must have a feature pyramid (backbone.fpn), got two"
    pairs = detection.levels(faster, faster, names)
    assert pairs == [f"backbone.fpn:{key}" for key in ("0", "1", "2", "3", "pool")]


def test_options_that_are_none(run, monkeypatch):
    said = refused(run, "out", "--method", "dkd")
    assert said == "--method must compare features only, got 'dkd' (reads logits, target)"
    assert "--download: coco.py fetches nothing" in refused(run, "out", "--download")
    assert "--compile: torchvision's detectors" in refused(run, "out", "--compile")
    assert "no detector 'yolo'" in refused(run, "out", "--student", "yolo")
    said = refused(run, "out", "--student", "maskrcnn_resnet50_fpn")
    assert said == "--student must be trained by boxes only, got maskrcnn_resnet50_fpn"
    assert "torchvision has no weights of a detector 'small8'" in refused(
        detection.pretrained, nn.Module(), "small8"
    )
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    assert "needs the package pycocotools: pip install it" in refused(run, "out")
