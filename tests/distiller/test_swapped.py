"""Arguments in the wrong order: student and teacher, channels, sizes, layers."""

import pytest
import torch
import torch.nn.functional as F
from support.distiller_cases import SMALL, batch, make
from support.raises import raises
from torch import Tensor, nn

import sokd
from sokd import methods


@pytest.mark.parametrize("call", [
    lambda s, t: methods.kd(s, t), lambda s, t: methods.dist(s, t),
    lambda s, t: methods.sp(s, t), lambda s, t: methods.rkd(s, t),
    lambda s, t: methods.at(*(each[:, :, None, None].expand(4, 5, 2, 2) for each in (s, t))),
], ids=["kd", "dist", "sp", "rkd", "at"])  # fmt: skip
def test_student_and_teacher_that_are_swapped(call):
    student, teacher = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    call(student, teacher).backward()
    with pytest.warns(UserWarning, match=r"so nothing is trained by it; the order is \(student, "):
        assert not call(teacher, student).requires_grad
    with torch.no_grad():
        call(teacher, student)


def test_channels_that_are_swapped():
    kd = sokd.SoKD(student_channels=6, teacher_channels=4, **SMALL)
    rule = "be [B, 6, H, W] or [B, N, 6]"
    with raises(ValueError, f"loss: student_features must {rule}, got [2, 4, 8, 8]"):
        sokd.loss(torch.randn(2, 4, 8, 8), torch.randn(2, 6, 8, 8), kd)


def test_a_step_whose_features_are_swapped():
    student, kd = nn.Conv2d(3, 6, 3), sokd.SoKD(6, 6, **SMALL)

    def step(model, x):
        features = model(x)
        return features.square().mean(), torch.ones(4, 6, 14, 14), features

    text = "teacher features must not require grad, got a tensor that requires grad"
    with raises(ValueError, f"PolicySearch: {text}"):
        sokd.PolicySearch(kd, student).step(step, batch()[0])


@pytest.mark.parametrize("adapter", ["conv", "linear"])
def test_sizes_that_are_swapped(adapter):
    f_s, f_t = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4)
    swapped = sokd.SoKD(4, 6, student_size=4, teacher_size=8, adapter=adapter)
    rule = "have the size (4, 4) that the adapter was made for"
    got = "(8, 8), the teacher's size (student_size and teacher_size are swapped)"
    with raises(ValueError, f"loss: student_features must {rule}, got {got}"):
        sokd.loss(f_s, f_t, swapped)
    right = sokd.SoKD(4, 6, student_size=8, teacher_size=4, adapter=adapter)
    assert torch.isfinite(sokd.loss(f_s, f_t, right))
    larger = torch.randn(2, 4, 16, 16), torch.randn(2, 6, 8, 8)
    assert torch.isfinite(sokd.loss(*larger, right)), "larger images are legal"


def pyramid(channels: int) -> list[Tensor]:
    return [torch.randn(2, channels, side, side, requires_grad=channels == 4) for side in (8, 4)]


@pytest.mark.parametrize("way", ["loss", "wrap", "Distiller"])
def test_layers_in_another_order(way):
    kd = sokd.SoKD([4, 4], [6, 6], **SMALL)
    loss = kd if way == "loss" else sokd.wrap(
        lambda students, teachers: sum(map(F.mse_loss, students, teachers)), kd
    )  # fmt: skip

    def call(crossed: bool) -> None:
        if way == "Distiller":
            layers = {"stage1": "stage2", "stage2": "stage1"} if crossed else ["stage1", "stage2"]
            make(layers=layers, sokd=SMALL)
        else:
            loss(pyramid(4), pyramid(6)[:: -1 if crossed else 1])

    call(crossed=False)
    with pytest.warns(UserWarning, match="8x8, 4x4 and the teacher's 4x4, 8x8: the same sizes in"):
        call(crossed=True)
