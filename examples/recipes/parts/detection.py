"""Detection: COCO's files, the networks, and the average precision of pycocotools."""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import models
from torchvision.io import ImageReadMode, decode_image
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes, Image

from parts.data import Seeded, subset
from parts.networks import conv_bn
from parts.run import Run, load_weights, weights_of

FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
Target = dict[str, Any]
ENTRIES = {  # what the recipe and pycocotools read
    "images": {"id", "file_name", "height", "width"},
    "annotations": {"id", "image_id", "category_id", "bbox", "area", "iscrowd"},
    "categories": {"id"},
}

# ------------------------------------------------------------------------------------ COCO's files


class Truth(NamedTuple):
    """An annotation file."""

    path: Path
    content: dict[str, Any]
    images: list[dict[str, Any]]  # those to train on or to test
    boxes: dict[int, list[Any]]  # by image: (x1, y1, x2, y2, category) of each


class Data(NamedTuple):
    """A detection set as the recipe uses it."""

    train: SeededBoxes
    test: SeededBoxes
    truth: dict[str, Any]  # of the test images, for pycocotools
    classes: int  # the largest category, and the background


def coco(root: str, size: int | None, seed: int, keep_empty: bool, say: Any) -> Data:
    """DIR/train2017/*, DIR/val2017/* and DIR/annotations/instances_{train,val}2017.json.

    `say` is called with a sentence about everything that is not used unchanged.
    """
    train, test = (read(Path(root), part) for part in ("train2017", "val2017"))
    one_sided = categories(train) ^ categories(test)
    if one_sided:
        raise SystemExit(f"--data: train and val differ in the categories {some(one_sided)}")
    for truth in (train, test):
        tidy(truth, say)
    bare = [image for image in train.images if not train.boxes[image["id"]]]
    if bare and not keep_empty:
        say(
            f"{train.path.name}: {len(bare)} of {len(train.images)} images have no box and are "
            f"left out, as in the published runs (--keep-empty trains on them as background): "
            f"{some(image['file_name'] for image in bare)}"
        )
        train = train._replace(images=[i for i in train.images if train.boxes[i["id"]]])
    elif bare:
        names = some(image["file_name"] for image in bare)
        say(f"{train.path.name}: {len(bare)} images have no box, only background: {names}")
    if not train.images:
        raise SystemExit(f"--data: {train.path} has no image to train on")
    plain = v2.ToDtype(torch.float32, scale=True)
    moved = v2.Compose([v2.RandomHorizontalFlip(), plain])
    chosen = subset(len(train.images), size)
    folders = (Path(root) / part for part in ("train2017", "val2017"))
    samples = [Boxes(folder, truth) for folder, truth in zip(folders, (train, test), strict=True)]
    return Data(
        SeededBoxes(samples[0], moved, seed, chosen), SeededBoxes(samples[1], plain, seed),
        test.content, max(categories(train)) + 1,
    )  # fmt: skip


def read(root: Path, part: str) -> Truth:
    """One annotation file; every image that it lists is there, and every annotation's image."""
    path, folder = root / "annotations" / f"instances_{part}.json", root / part
    for place in (path, folder):
        if not place.exists():
            raise SystemExit(
                f"--data: {place} is not there; COCO's archives are at cocodataset.org "
                f"({part}.zip and annotations_trainval2017.zip), to be unpacked in {root}"
            )
    try:
        content = json.loads(path.read_bytes())
        for kind, keys in ENTRIES.items():
            check_entries(kind, content[kind], keys)
        images, annotations = content["images"], content["annotations"]
        known = {category["id"] for category in content["categories"]}
        ids = {image["id"] for image in images}
        names = {image["file_name"] for image in images}
        for each in annotations:
            x, y, width, height = map(float, each["bbox"])
            if not all(map(math.isfinite, (x, y, width, height))):
                raise ValueError(f"annotation {each['id']} has the box {each['bbox']}")
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"--data: {path} is no file of COCO's form: {error!r}") from None
    if missing := names - {entry.name for entry in os.scandir(folder)}:
        raise SystemExit(
            f"--data: {len(missing)} of the {len(names)} images that {path.name} lists are not in "
            f"{folder}: {some(sorted(missing))}"
        )
    for key, listed, what in (("image_id", ids, "image"), ("category_id", known, "category")):
        if lost := [each["id"] for each in annotations if each[key] not in listed]:
            raise SystemExit(
                f"--data: {path.name} has {len(lost)} annotations of an {what} that it does not "
                f"list: {some(lost)}".replace("an category", "a category")
            )
    if not known or min(known) < 1:
        raise SystemExit(
            f"--data: the categories of {path.name} must be 1 or more (0 is the background)"
        )
    boxes: dict[int, list[Any]] = {image["id"]: [] for image in images}
    return Truth(path, content, images, boxes)


def check_entries(kind: str, entries: list[dict[str, Any]], keys: set[str]) -> None:
    """Raise ValueError for an entry without one of the keys, and for an id that is there twice."""
    known = set()
    for place, each in enumerate(entries):
        if lacking := keys - each.keys():
            raise ValueError(f"{kind}[{place}] has no {', '.join(sorted(lacking))}")
        if each["id"] in known:
            raise ValueError(f"{kind} has the id {each['id']} twice")
        known.add(each["id"])


def tidy(truth: Truth, say: Any) -> None:
    """Fill `truth.boxes`, cut at the images' borders; report annotations that are changed."""
    sizes = {image["id"]: (image["width"], image["height"]) for image in truth.images}
    crowds, empty, cut = [], [], []
    for each in truth.content["annotations"]:
        if each.get("iscrowd"):
            crowds.append(each["id"])
            continue
        (x, y, w, h), (width, height) = map(float, each["bbox"]), sizes[each["image_id"]]
        box = max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)
        if min(w, h) <= 0 or box[0] >= box[2] or box[1] >= box[3]:
            empty.append(each["id"])
            continue
        if max(abs(a - b) for a, b in zip(box, (x, y, x + w, y + h), strict=True)) > 1:
            cut.append(each["id"])
        truth.boxes[each["image_id"]].append((*box, each["category_id"]))
    total = len(truth.content["annotations"])
    for found, what in (
        (empty, "boxes are empty or outside their image and are left out"),
        (cut, "boxes reach out of their image by more than a pixel and are cut at its border"),
        (crowds, "boxes are crowds and are left out (the evaluation ignores them)"),
    ):
        if found:
            say(f"{truth.path.name}: {len(found)} of {total} {what}: annotations {some(found)}")


def categories(truth: Truth) -> set[int]:
    return {category["id"] for category in truth.content["categories"]}


def some(names: Iterable[Any]) -> str:
    """The first five, and how many more there are."""
    names = list(names)
    more = f", and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(str, names[:5])) + more


class Boxes(Dataset):
    """Images [3, H, W] uint8 and their targets: "boxes" [n, 4], "labels" [n], "image_id"."""

    def __init__(self, folder: Path, truth: Truth) -> None:
        self.folder, self.images, self.boxes = folder, truth.images, truth.boxes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image, Target]:
        entry = self.images[index]
        path = self.folder / entry["file_name"]
        try:
            image = decode_image(str(path), ImageReadMode.RGB)
        except RuntimeError as error:
            raise ValueError(f"{path} must be an image, got {error}") from None
        size = entry["height"], entry["width"]
        if tuple(image.shape[1:]) != size:
            got = f"{image.shape[1]} x {image.shape[2]}"
            raise ValueError(f"{path} must have the {size[0]} x {size[1]} of its entry, got {got}")
        rows = torch.tensor(self.boxes[entry["id"]], dtype=torch.float32).reshape(-1, 5)
        boxes = BoundingBoxes(rows[:, :4], format="XYXY", canvas_size=size)
        labels = rows[:, 4].to(torch.int64)
        return Image(image), {"boxes": boxes, "labels": labels, "image_id": entry["id"]}


class SeededBoxes(Seeded):
    """`data[epoch, index]` is (image, target, index), seeded as `Seeded`: a flip moves both."""

    def transformed(self, image: Image, target: Target) -> tuple[Tensor, Target]:
        image, target = self.transform(image, target)
        boxes = target["boxes"].as_subclass(Tensor)
        return image.as_subclass(Tensor), {**target, "boxes": boxes}


def as_lists(samples: Sequence[tuple[Tensor, Target, int]]) -> tuple[Any, Any, Tensor]:
    """Images of unequal size as a list, for a DataLoader."""
    images, targets, indices = zip(*samples, strict=True)
    return list(images), list(targets), torch.tensor(indices)


# -------------------------------------------------------------------------------------- networks


def build(name: str, classes: int, min_size: Sequence[int], max_size: int) -> nn.Module:
    """torchvision's detector of that name, Faster R-CNN with FPN on its ResNet of that name, or
    small<WIDTH>, which trains on a CPU; with its first weights."""
    sizes: dict[str, Any] = {"min_size": tuple(min_size), "max_size": max_size}
    if found := re.fullmatch(r"small(\d+)", name):
        return small(int(found[1]), classes, **sizes)
    if re.fullmatch(r"(wide_)?res(net|next)\d+\w*", name) and name in models.list_models(models):
        backbone = resnet_fpn_backbone(
            backbone_name=name, weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
        )
        return FasterRCNN(backbone, classes, **sizes)
    if name not in models.list_models(models.detection):
        raise SystemExit(f"no detector {name!r} in torchvision.models.detection, and no ResNet")
    blank: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": classes}
    network = models.get_model(name, **blank)
    network.transform.min_size, network.transform.max_size = sizes["min_size"], max_size
    return network


def small(width: int, classes: int, **sizes: Any) -> FasterRCNN:
    """Faster R-CNN for images of 128: four stages from `width` channels, an FPN of twice that."""

    def stage(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            *conv_bn(inputs, outputs, 3, stride=2), nn.ReLU(),
            *conv_bn(outputs, outputs, 3), nn.ReLU(),
        )  # fmt: skip

    widths, channels = [width, 2 * width, 3 * width, 4 * width], 2 * width
    body = nn.Sequential(*conv_bn(3, width, 3, stride=2), nn.ReLU())
    for number, (inputs, outputs) in enumerate(zip([width, *widths], widths, strict=False)):
        body.add_module(f"stage{number + 1}", stage(inputs, outputs))
    levels = {f"stage{number + 1}": str(number) for number in range(4)}
    backbone = BackboneWithFPN(body, levels, widths, channels)
    return FasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(
            tuple((side,) for side in (8, 16, 32, 64, 128)), ((0.5, 1.0, 2.0),) * 5
        ),
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 5, sampling_ratio=2),
        box_head=TwoMLPHead(25 * channels, 128), box_predictor=FastRCNNPredictor(128, classes),
        rpn_pre_nms_top_n_train=200, rpn_post_nms_top_n_train=100, rpn_pre_nms_top_n_test=200,
        rpn_post_nms_top_n_test=100, rpn_batch_size_per_image=64, box_batch_size_per_image=64,
        box_detections_per_img=20, **sizes,
    )  # fmt: skip


def check_student(network: nn.Module, name: str) -> None:
    """Refuse a detector whose own losses need more than boxes."""
    heads = getattr(network, "roi_heads", None)
    if heads is not None and (heads.has_mask() or heads.has_keypoint()):
        raise SystemExit(f"--student must be trained by boxes only, got {name}")


def pretrained(network: nn.Module, name: str) -> None:
    """Load torchvision's weights of a detector, trained on COCO."""
    try:
        weights = models.get_model_weights(name).DEFAULT
    except ValueError:
        raise SystemExit(
            f"--teacher-weights is needed: torchvision has no weights of a detector {name!r}"
        ) from None
    load_weights(network, fetched(weights, name, "--teacher-weights"), f"torchvision's {name}")


def with_trained_backbone(network: nn.Module, name: str, path: str | None) -> None:
    """ImageNet's weights in the backbone, whose BatchNorms are frozen with all before layer2: as
    torchvision's own `weights_backbone` does.

    Args:
        path: a checkpoint of the classifier; None: torchvision's.
    """
    body = network.backbone.body
    if path is None:
        known = [b for b in ("resnet50", "mobilenet_v3_large", name) if b in name]
        kind = next((b for b in known if b in models.list_models(models)), None)
        if kind is None:
            raise SystemExit(f"--backbone-weights is needed: torchvision has none for {name!r}")
        weights = models.get_model_weights(kind).IMAGENET1K_V1
        given, source = fetched(weights, kind, "--backbone-weights"), f"torchvision's {kind}"
    else:
        given, source = weights_of(path, "--backbone-weights"), f"--backbone-weights: {path}"
    given = {key.removeprefix("features."): value for key, value in given.items()}
    given = {key: value for key, value in given.items() if key.split(".")[0] in body}
    load_weights(body, given, source)
    freeze(body)


def freeze(body: nn.Module) -> None:
    """Every BatchNorm a constant, and no gradient before layer2 of a ResNet."""
    for module in list(body.modules()):
        for name, part in module.named_children():
            if isinstance(part, nn.BatchNorm2d):
                constant = FrozenBatchNorm2d(part.num_features, part.eps)
                constant.load_state_dict(part.state_dict())
                setattr(module, name, constant)
    for name, parameter in body.named_parameters():
        if "layer4" in body and not name.startswith(("layer2", "layer3", "layer4")):
            parameter.requires_grad = False


def fetched(weights: Any, name: str, option: str) -> dict[str, Tensor]:
    try:
        return weights.get_state_dict(progress=False, check_hash=True)
    except (URLError, OSError) as error:
        raise SystemExit(
            f"torchvision's {name} was not downloaded ({error}); fetch {weights.url} elsewhere and "
            f"name the file by {option}"
        ) from None


def levels(student: nn.Module, teacher: nn.Module, names: Sequence[str]) -> list[str]:
    """The layers: the levels of the feature pyramids, which both networks must have."""
    found = []
    for side, network, name in zip(("student", "teacher"), (student, teacher), names, strict=True):
        backbone = getattr(network, "backbone", None)
        if not isinstance(getattr(backbone, "fpn", None), nn.Module):
            raise SystemExit(f"--{side} must have a feature pyramid (backbone.fpn), got {name}")
        training = backbone.training
        with torch.no_grad():
            maps = backbone.eval()(torch.zeros(1, 3, 128, 128))
        backbone.train(training)
        found.append({key: tuple(value.shape[2:]) for key, value in maps.items()})
    if found[0] != found[1]:
        each = (f"{n}: {', '.join(map(repr, f))}" for n, f in zip(names, found, strict=True))
        raise SystemExit(f"--student must have the teacher's levels, got {'; '.join(each)}")
    return [f"backbone.fpn:{key}" for key in found[0]]


class BackboneAlone(nn.Module):
    """A teacher of whose detector only the backbone runs: its heads would double the step."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.detector = detector.backbone, detector

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.backbone(x)


class Once(nn.Module):
    """The transform of a detector that is trained on batches that a transform has been through.

    A padded batch [B, 3, H, W] passes, with the image sizes that its targets name by "size"; a list
    of images is transformed.
    """

    def __init__(self, transform: nn.Module) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, images: Any, targets: Any = None) -> tuple[ImageList, Any]:
        if not isinstance(images, Tensor):
            return self.transform(images, targets)
        whole = [(images.shape[2], images.shape[3])] * len(images)
        sizes = whole if targets is None else [target["size"] for target in targets]
        return ImageList(images, sizes), targets

    def postprocess(self, *given: Any) -> Any:
        return self.transform.postprocess(*given)


class Alone(nn.Module):
    """A detector trained by its own losses, called as a Distiller is."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, x: Tensor, y: list[Target], **_: Any) -> tuple[Any, dict[str, Tensor]]:
        losses = self.student(x, y)
        return losses, dict(losses)


# ------------------------------------------------------------------------------------ evaluation


def average_precision(
    run: Run, network: nn.Module, test: DataLoader, truth: dict[str, Any]
) -> dict[str, float]:
    """AP, AP50, AP75, APs, APm, APl (%) by pycocotools; -1 where there are no such boxes."""
    found: list[dict[str, Any]] = []
    with run.evaluating(network):
        for images, targets, _ in test:
            outputs = network([image.to(run.device) for image in images])
            for target, output in zip(targets, outputs, strict=True):
                found += as_results(target["image_id"], output)
    parts: list[Any] = [found] * run.ranks
    if run.ranks > 1:
        dist.all_gather_object(parts, found)
    figures = torch.zeros(len(FIGURES), dtype=torch.float64)
    if run.main:
        results = [each for part in parts for each in part]
        figures += torch.tensor(score(results, truth), dtype=torch.float64)
    return dict(zip(FIGURES, run.total(figures).tolist(), strict=True))


def as_results(image: int, output: dict[str, Tensor]) -> list[dict[str, Any]]:
    """An image's detections in COCO's form: boxes as x, y, width, height."""
    x1, y1, x2, y2 = output["boxes"].float().cpu().unbind(1)
    boxes = torch.stack((x1, y1, x2 - x1, y2 - y1), 1).tolist()
    rows = zip(boxes, output["scores"].tolist(), output["labels"].tolist(), strict=True)
    return [
        {"image_id": image, "bbox": box, "score": score, "category_id": label}
        for box, score, label in rows
    ]


def score(results: list[dict[str, Any]], truth: dict[str, Any]) -> list[float]:
    """The six figures of COCO's evaluation, in %."""
    COCO, COCOeval = pycocotools()
    if not results:
        return [0.0] * len(FIGURES)
    with redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = truth
        reference.createIndex()
        evaluation = COCOeval(reference, reference.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [
        value if value < 0 else round(100 * value, 4) for value in evaluation.stats.tolist()[:6]
    ]


def pycocotools() -> tuple[Any, Any]:
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise SystemExit("the evaluation needs the package pycocotools: pip install it") from None
    return COCO, COCOeval
