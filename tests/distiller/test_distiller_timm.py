"""timm's models, where timm is installed."""

from __future__ import annotations

import pytest
import torch

from sokd.distiller import Distiller

timm = pytest.importorskip("timm", reason="timm is not installed")


@pytest.mark.parametrize(("teacher", "student", "layers"), [
    ("resnet18", "mobilenetv3_small_050", {"blocks.3": "layer3"}),
    ("vit_tiny_patch16_224", "resnet18", {"layer3": "blocks.2"}),
])  # fmt: skip
def test_one_step(teacher, student, layers):
    options = {teacher: {"num_classes": 10}, student: {"num_classes": 10}}
    options.setdefault("vit_tiny_patch16_224", {}).update(img_size=64, depth=3)
    nets = [
        timm.create_model(name, pretrained=False, **options[name]) for name in (teacher, student)
    ]
    x, y = torch.randn(2, 3, 64, 64), torch.tensor([1, 7])
    distiller = Distiller(
        *reversed(nets), layers=layers, example=x, sokd={"heat_channels": 4, "k": 2}
    )
    _, losses = distiller(x, y)
    torch.stack(list(losses.values())).sum().backward()
    assert all(loss.isfinite() for loss in losses.values())
