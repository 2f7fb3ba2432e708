"""The adapter: sizes, channels, tokens, and the texts of its errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.raises import raises
from torch import nn

from sokd.kd.adapter import Adapter, resize
from sokd.kd.features import tokens_to_map

# student size, teacher size, kind of the size-matching convolution, its kernel and stride
MATCHING = [
    pytest.param((8, 8), (8, 8), nn.Conv2d, (1, 1), (1, 1), id="equal"),
    pytest.param((8, 8), (4, 4), nn.Conv2d, (3, 3), (2, 2), id="half"),
    pytest.param((9, 9), (3, 3), nn.Conv2d, (3, 3), (3, 3), id="third"),
    pytest.param((16, 16), (4, 4), nn.Conv2d, (5, 5), (4, 4), id="quarter"),
    pytest.param((8, 12), (4, 12), nn.Conv2d, (3, 1), (2, 1), id="one axis reduced"),
    pytest.param((5, 5), (1, 1), nn.Conv2d, (5, 5), (5, 5), id="to one cell"),
    pytest.param((4, 4), (8, 8), nn.ConvTranspose2d, (4, 4), (2, 2), id="double"),
    pytest.param((3, 3), (9, 9), nn.ConvTranspose2d, (5, 5), (3, 3), id="triple"),
    pytest.param((2, 3), (8, 3), nn.ConvTranspose2d, (8, 1), (4, 1), id="one axis enlarged"),
    pytest.param((8, 8), (5, 5), nn.Conv2d, (1, 1), (1, 1), id="no whole ratio down"),
    pytest.param((5, 5), (7, 7), nn.Conv2d, (1, 1), (1, 1), id="no whole ratio up"),
    pytest.param((8, 4), (4, 8), nn.Conv2d, (1, 1), (1, 1), id="one up, one down"),
]


@pytest.mark.parametrize(("student", "teacher", "kind", "kernel", "stride"), MATCHING)
def test_the_convolution_matches_the_sizes_it_was_made_for(student, teacher, kind, kernel, stride):
    adapter = Adapter(3, 5, student_size=student, teacher_size=teacher)
    assert type(adapter.match) is kind
    assert (adapter.match.kernel_size, adapter.match.stride) == (kernel, stride)
    features = torch.randn(2, 3, *student)
    assert adapter(features, teacher).shape == (2, 5, *teacher)
    # the convolution alone gives the size, nothing is resized
    if kernel != (1, 1) or student == teacher:
        assert adapter.match(features).shape == (2, 5, *teacher)


@pytest.mark.parametrize("teacher", [(8, 8), (4, 4), (16, 16), (5, 7), (1, 1), (9, 3)])
def test_without_sizes_one_adapter_serves_any_size_with_the_parameters_it_has_from_the_start(
    teacher,
):
    adapter = Adapter(3, 5)
    before = {name: id(parameter) for name, parameter in adapter.named_parameters()}
    out = adapter(torch.randn(2, 3, 8, 8), teacher)
    assert out.shape == (2, 5, *teacher)
    out.square().sum().backward()
    assert {name: id(parameter) for name, parameter in adapter.named_parameters()} == before
    assert all(parameter.grad is not None for parameter in adapter.parameters())


@pytest.mark.parametrize("made_for", [((8, 8), (4, 4)), ((4, 4), (8, 8))])
def test_another_ratio_than_it_was_made_for_is_resized(made_for):
    adapter = Adapter(3, 5, student_size=made_for[0], teacher_size=made_for[1])
    assert adapter(torch.randn(2, 3, 9, 9), (6, 5)).shape == (2, 5, 6, 5)


def test_one_number_is_both_sides():
    adapter = Adapter(3, 5, student_size=8, teacher_size=4)
    assert adapter.match.stride == (2, 2)


def test_it_computes_three_convolutions_each_with_norm_and_relu():
    torch.manual_seed(0)
    adapter = Adapter(2, 3).double().eval()
    for module in adapter.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    features = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    want = F.avg_pool2d(features, 2)
    convs = [module for module in adapter.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in adapter.modules() if isinstance(module, nn.BatchNorm2d)]
    assert [conv.kernel_size for conv in convs] == [(1, 1), (3, 3), (3, 3)]
    for conv, norm in zip(convs, norms, strict=True):
        want = F.conv2d(want, conv.weight, padding=conv.kernel_size[0] // 2)
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        want = (want - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[
            :, None, None
        ]
        want = want.clamp(min=0)
    torch.testing.assert_close(adapter(features, (2, 2)), want)


def test_channels_last_is_kept():
    adapter = Adapter(3, 5).to(memory_format=torch.channels_last)
    features = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    for size in ((8, 8), (4, 4), (16, 16)):
        assert adapter(features, size).is_contiguous(memory_format=torch.channels_last)


def test_resize_takes_means_where_it_reduces():
    features = torch.arange(16.0).reshape(1, 1, 4, 4)
    want = torch.tensor([[[[2.5, 4.5], [10.5, 12.5]]]])
    torch.testing.assert_close(resize(features, (2, 2)), want)


def test_resize_is_bilinear_where_it_enlarges():
    features = torch.tensor([[[[0.0, 4.0]]]])
    torch.testing.assert_close(resize(features, (1, 4)), torch.tensor([[[[0.0, 1.0, 3.0, 4.0]]]]))


def test_resize_to_the_same_size_is_the_tensor_itself():
    features = torch.randn(1, 2, 3, 4)
    assert resize(features, (3, 4)) is features


def test_tokens_become_rows_of_cells():
    # one class token, then 2 x 2 cells of 3 channels: token i holds 10 * i + channel
    tokens = (10.0 * torch.arange(5)[:, None] + torch.arange(3)).unsqueeze(0)
    want = torch.tensor(
        [[[10.0, 20.0], [30.0, 40.0]], [[11.0, 21.0], [31.0, 41.0]], [[12.0, 22.0], [32.0, 42.0]]]
    )
    assert torch.equal(tokens_to_map(tokens)[0], want)


@pytest.mark.parametrize(("count", "options", "size", "first"), [
    pytest.param(49, {}, (7, 7), 0, id="Swin"),
    pytest.param(197, {}, (14, 14), 1, id="ViT, class token"),
    pytest.param(198, {}, (14, 14), 2, id="DeiT, class and distillation tokens"),
    pytest.param(200, {}, (14, 14), 4, id="registers alone"),
    pytest.param(201, {}, (14, 14), 5, id="DINOv2, class token and registers"),
    pytest.param(1, {}, (1, 1), 0, id="one token"),
    pytest.param(52, {"tokens": 3}, (7, 7), 3, id="prefix named"),
    pytest.param(57, {"grid": (7, 8)}, (7, 8), 1, id="grid named"),
    pytest.param(59, {"tokens": 3, "grid": (8, 7)}, (8, 7), 3, id="both named"),
])  # fmt: skip
def test_prefix_tokens_are_dropped(count, options, size, first):
    tokens = torch.arange(float(count))[None, :, None].expand(2, -1, 3)
    maps = tokens_to_map(tokens, **options)
    assert maps.shape == (2, 3, *size)
    assert maps[0, 0, 0, 0] == first
    assert maps[1, 2, -1, -1] == count - 1


def test_maps_pass_through():
    features = torch.randn(2, 3, 4, 5)
    assert tokens_to_map(features) is features


def test_a_map_of_tokens_is_a_view_in_channels_last():
    tokens = torch.randn(2, 9, 4)
    maps = tokens_to_map(tokens)
    assert maps.data_ptr() == tokens.data_ptr()
    assert maps.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("count", "options", "text"), [
    (56, {},
     "tokens_to_map: features must hold 0, 1, 2, 4 or 5 prefix tokens and a square grid (or "
     "name tokens and grid), got 56 tokens"),
    (197, {"tokens": 2},
     "tokens_to_map: features must hold 2 prefix tokens and a square grid (or name tokens and "
     "grid), got 197 tokens"),
    (10, {"grid": (4, 3)},
     "tokens_to_map: features must hold any prefix tokens and a 4 x 3 grid, got 10 tokens"),
    (14, {"grid": (4, 3), "tokens": 1},
     "tokens_to_map: features must hold 1 prefix tokens and a 4 x 3 grid, got 14 tokens"),
    (0, {},
     "tokens_to_map: features must hold 0, 1, 2, 4 or 5 prefix tokens and a square grid (or "
     "name tokens and grid), got 0 tokens"),
])  # fmt: skip
def test_tokens_that_do_not_fit_are_refused(count, options, text):
    with raises(ValueError, text):
        tokens_to_map(torch.zeros(2, count, 3), **options)


@pytest.mark.parametrize(("arguments", "options", "text"), [
    ((0, 5), {}, "Adapter: student_channels must be positive, got 0"),
    ((3, -1), {}, "Adapter: teacher_channels must be positive, got -1"),
    ((3, 5), {"student_size": 8},
     "Adapter: student_size and teacher_size must be given together, got 8 and None"),
    ((3, 5), {"student_size": 8, "teacher_size": (4, 0)},
     "Adapter: teacher_size must be positive, got 0"),
    ((3, 5), {"student_size": (1, 2, 3), "teacher_size": 4},
     "Adapter: student_size must be one number or (H, W), got (1, 2, 3)"),
    (("3", 5), {}, "Adapter: student_channels must be a whole number, got '3'"),
])  # fmt: skip
def test_bad_options_are_refused(arguments, options, text):
    with raises(ValueError, text):
        Adapter(*arguments, **options)
