"""Common models: one training step each on the CPU, random weights, the models unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.raises import raises
from torch import nn

from sokd.distiller import Distiller

SMALL = {"heat_channels": 4, "k": 2}
SIDE = 64

vision = pytest.importorskip("torchvision", reason="torchvision is not installed").models


def resnet18(**options: Any) -> nn.Module:
    return vision.resnet18(num_classes=10, **options)


def vit(layers: int) -> nn.Module:
    return vision.VisionTransformer(
        image_size=SIDE, patch_size=16, num_layers=layers, num_heads=2, hidden_dim=32, mlp_dim=64,
        num_classes=10,
    )  # fmt: skip


def swin() -> nn.Module:
    return vision.SwinTransformer(
        patch_size=[4, 4], embed_dim=16, depths=[1, 1], num_heads=[1, 2], window_size=[4, 4],
        num_classes=10,
    )  # fmt: skip


DEEP = {"layers": ["layer3", "layer4"]}
PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], dict[str, Any]]] = {
    "resnet34 to resnet18":
        (lambda: vision.resnet34(num_classes=10), resnet18, {**DEEP, "method": "fitnet"}),
    "resnet18 to mobilenet_v2":
        (resnet18, lambda: vision.mobilenet_v2(num_classes=10),
         {"layers": {"features.13": "layer3", "features": "layer4"}, "method": "at"}),
    "resnet18 to shufflenet_v2":
        (resnet18, lambda: vision.shufflenet_v2_x0_5(num_classes=10),
         {"layers": {"stage3": "layer3", "stage4": "layer4"}, "method": "reviewkd"}),
    "vit to vit": (lambda: vit(2), lambda: vit(1), {"layers": "auto", "method": "fitnet"}),
    "resnet18 to vit":
        (resnet18, lambda: vit(1), {"layers": {"encoder": "layer3"}, "method": {"kd": None}}),
    "swin to resnet18":
        (swin, resnet18,
         {"layers": {"layer2": "features.3"}, "teacher_order": "BHWC", "method": "mgd"}),
}  # fmt: skip


def check_step(distiller: Distiller, *given: Any) -> dict[str, torch.Tensor]:
    """One step: finite terms, a gradient for whatever is trained, none for the teacher."""
    _, losses = distiller(*given)
    torch.stack(list(losses.values())).sum().backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert [
        name for name, p in distiller.named_parameters() if p.requires_grad and p.grad is None
    ] == []
    assert all(p.grad is None for p in distiller.teacher.parameters())
    return losses


@pytest.mark.filterwarnings("ignore:sokd. the student has")  # swin is a small one here
@pytest.mark.parametrize(("teacher", "student", "options"), PAIRS.values(), ids=PAIRS)
def test_classifiers(teacher, student, options):
    x, y = torch.randn(2, 3, SIDE, SIDE), torch.tensor([1, 7])
    distiller = Distiller(student(), teacher(), example=x, sokd=SMALL, **options)
    losses = check_step(distiller, x, y)
    assert next(iter(losses)) == "loss_ce" and "loss_agreement" in losses
    assert distiller.eval()(x).shape == (2, 10)


def test_auto_on_a_resnet_takes_its_stages():
    x = torch.randn(2, 3, SIDE, SIDE)
    distiller = Distiller(resnet18(), resnet18(), example=x, sokd=False, method="at")
    assert distiller.pairs == [
        (name, name) for name in ("relu", "layer1", "layer2", "layer3", "layer4")
    ]
    check_step(distiller, x, torch.tensor([1, 7]))


@pytest.mark.parametrize(("make_net", "layers"), [
    (vision.mobilenet_v2, ["features.1", "features.3", "features.6", "features.13", "features"]),
    (vision.regnet_y_400mf,
     ["stem", *(f"trunk_output.block{n}" for n in (1, 2, 3)), "trunk_output"]),
    (swin, ["features.1", "norm"]),
], ids=["mobilenet_v2", "regnet", "swin"])  # fmt: skip
def test_auto_takes_stages_not_what_blocks_widen(make_net, layers):
    order = {"student_order": "BHWC", "teacher_order": "BHWC"} if make_net is swin else {}
    x = torch.randn(2, 3, SIDE, SIDE)
    distiller = Distiller(make_net(), make_net(), example=x, method="at", sokd=False, **order)
    assert [student for student, _ in distiller.pairs] == layers
    check_step(distiller, x, torch.tensor([1, 7]))


def test_auto_on_a_segmentation_model_leaves_its_logits_out():
    def net() -> nn.Module:
        return vision.segmentation.lraspp_mobilenet_v3_large(num_classes=4, weights_backbone=None)

    distiller = Distiller(
        net(), net(), example=torch.randn(2, 3, SIDE, SIDE), method="at", sokd=False
    )
    assert "classifier" not in dict(distiller.pairs)


def test_a_segmentation_model():
    def net() -> nn.Module:
        return vision.segmentation.lraspp_mobilenet_v3_large(num_classes=4, weights_backbone=None)

    x, y = torch.randn(2, 3, SIDE, SIDE), torch.randint(0, 4, (2, SIDE, SIDE))
    method = {"fitnet": None, "kd": 1.0}  # KD for each pixel
    distiller = Distiller(
        net(), net(), layers="backbone:high", method=method, example=x, sokd=SMALL
    )
    losses = check_step(distiller, x, y)
    assert list(losses) == ["loss_ce", "loss_fitnet", "loss_kd", "loss_agreement"]


def faster_rcnn() -> nn.Module:
    return vision.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=96, max_size=96
    )


def test_a_detector_with_an_fpn():
    images = [torch.rand(3, 80, 96), torch.rand(3, 96, 72)]
    targets = [
        {"boxes": torch.tensor([[5.0, 5.0, 60.0, 60.0]]), "labels": torch.tensor([label])}
        for label in (1, 2)
    ]
    layers = ["backbone.fpn:0", "backbone.fpn:1"]
    distiller = Distiller(faster_rcnn(), faster_rcnn(), layers=layers, example=images, sokd=SMALL)
    losses = check_step(distiller, images, targets)
    own = ["loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"]
    assert list(losses) == [*own, "loss_fitnet", "loss_agreement"]
    found = distiller.eval()(images)
    assert len(found) == 2 and {"boxes", "labels", "scores"} <= found[0].keys()


def test_a_detectors_dict_of_maps_is_pointed_out():
    images = [torch.rand(3, 96, 96)]
    with raises(
        TypeError,
        "Distiller: the student's layer 'backbone.fpn' must give a tensor, got OrderedDict with "
        "'0', '1', 'pool': name one, as in 'backbone.fpn:0'",
    ):
        Distiller(faster_rcnn(), faster_rcnn(), layers="backbone.fpn", example=images)
