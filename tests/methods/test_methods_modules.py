"""The distillation losses with state: CRD's banks, ReviewKD's fusions, MGD's generator."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import support.naive_methods as naive
import torch
from support.raises import raises
from torch import Tensor, nn

import sokd
from sokd import methods
from sokd.methods import contrast
from sokd.methods.negatives import Negatives

F64 = torch.float64


@pytest.fixture(params=["dense", "rows"])
def way(request, monkeypatch):
    """Both ways to the similarities: by the whole bank, by the rows picked."""
    monkeypatch.setattr(contrast, "_DENSE_UP_TO", 1e9 if request.param == "dense" else 0)
    return request.param


def crd(samples=12, negatives=5, dtype=F64, **options):
    torch.manual_seed(0)
    return methods.crd(3, 4, samples, dim=6, negatives=negatives, **options).to(dtype)


def embeddings(batch=4, dtype=F64):
    return torch.randn(batch, 3, dtype=dtype), torch.randn(batch, 4, dtype=dtype)


def unit_rows(features: Tensor, layer: nn.Linear) -> np.ndarray:
    rows = features.numpy() @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
    return np.array([naive.normalised(row) for row in rows])


# --- crd


def test_crd_against_loops(way):
    """Three batches: the first sets Z, each finds the banks as the ones before left them."""
    loss = crd()
    banks = [bank.numpy().copy() for bank in (loss.student_bank, loss.teacher_bank)]
    known = [None, None]
    for step in range(3):
        student, teacher = embeddings()
        index = torch.tensor([1, 7, 4 + step, 0])
        others = torch.randint(0, 12, (4, 5))
        anchors = [
            unit_rows(student, loss.student_embedding),
            unit_rows(teacher, loss.teacher_embedding),
        ]
        sides = [
            naive.contrast(anchor, bank, index.numpy(), others.numpy(), 0.07, z)
            for anchor, bank, z in zip(anchors, banks[::-1], known, strict=True)
        ]
        value = loss(student, teacher, index, others)
        expected = torch.tensor(sides[0][0] + sides[1][0], dtype=F64)
        torch.testing.assert_close(value.detach(), expected, rtol=1e-6, atol=0)
        known = [z for _, z in sides] if step == 0 else known
        banks = [
            naive.remembered(bank, index.numpy(), anchor, 0.5)
            for bank, anchor in zip(banks, anchors, strict=True)
        ]
        for bank, expected in zip((loss.student_bank, loss.teacher_bank), banks, strict=True):
            torch.testing.assert_close(bank, torch.from_numpy(expected))


def test_noise_contrast_gradcheck(way):
    anchor, bank = torch.randn(3, 4, dtype=F64, requires_grad=True), torch.randn(9, 4, dtype=F64)
    picked, known = torch.randint(0, 9, (3, 6)), torch.tensor(2.0, dtype=F64)

    def loss(anchor):
        return contrast.noise_contrast(anchor, bank, picked, known, 0.5)[0]

    assert torch.autograd.gradcheck(loss, anchor)
    (gradient,) = torch.autograd.grad(loss(anchor), anchor, create_graph=True)
    with raises(
        RuntimeError, "crd: the loss must be differentiated once only, got a second backward"
    ):
        gradient.sum().backward()


def test_crd_trains_both_embeddings_and_the_student_alone():
    loss, (student, teacher) = crd(), embeddings()
    student.requires_grad_(), teacher.requires_grad_()
    loss(student, teacher, torch.arange(4)).backward()
    assert teacher.grad is None and student.grad.any()
    assert all(parameter.grad.any() for parameter in loss.parameters())


@pytest.mark.parametrize("samples", [12, 70_000])  # one uniform each, and two
def test_negatives_are_others_and_all_of_them(samples):
    negatives = Negatives(samples, 4000, None, torch.tensor([3]))
    index = torch.tensor([0, 5, samples - 1])
    drawn = negatives(index)
    assert drawn.shape == (3, 4000) and drawn.min() >= 0 and drawn.max() < samples
    assert not (drawn == index.unsqueeze(1)).any()
    share = (drawn < samples // 2).double().mean().item()
    # 4 standard deviations, and the own place left out
    assert abs(share - 0.5) < 0.02 + 1 / samples
    if samples == 12:
        assert all(len(row.unique()) == 11 for row in drawn)
        counts = torch.stack([row.bincount(minlength=12) for row in drawn]).double()
        assert (counts[counts > 0] - 4000 / 11).abs().max() < 5 * (4000 / 11) ** 0.5


def test_negatives_of_other_classes():
    labels = torch.tensor([7, 3, 3, 7, 9, 3, 9, 7])
    negatives = Negatives(8, 3000, labels, torch.tensor([3]))
    index = torch.arange(8)
    drawn = negatives(index)
    for own, row in zip(index, drawn, strict=True):
        others = (labels != labels[own]).nonzero().flatten()
        assert torch.equal(row.unique(), others)
        expected = 3000 / len(others)
        assert (row.bincount(minlength=8)[others] - expected).abs().max() < 5 * expected**0.5


def test_the_last_of_a_million_places_is_reached():
    """The finest bits count: all residues appear although one uniform has only 2^23 values."""
    negatives = Negatives(3 * 2**22, 40_000, None, torch.tensor([1]))
    drawn = negatives(torch.tensor([0]))
    counts = (drawn % 3).flatten().bincount(minlength=3)
    assert (counts - 40_000 / 3).abs().max() < 5 * (40_000 / 3) ** 0.5


def run(loss, steps, start=0):
    values = []
    for step in range(start, start + steps):
        torch.manual_seed(step)
        student, teacher = embeddings(dtype=torch.float32)
        values.append(loss(student, teacher, torch.randperm(12)[:4]))
    return values


def test_crd_resumes_bit_for_bit():
    loss = crd(dtype=torch.float32)
    run(loss, 2)
    saved = copy.deepcopy(loss.state_dict())
    expected = run(loss, 2, start=2)
    other = crd(dtype=torch.float32, generator=torch.Generator().manual_seed(9))
    other.load_state_dict(saved)
    assert all(torch.equal(*pair) for pair in zip(run(other, 2, start=2), expected, strict=True))
    states = zip(other.state_dict().values(), loss.state_dict().values(), strict=True)
    assert all(torch.equal(*pair) for pair in states)


def test_seeds():
    """The same from `sokd.manual_seed`, from a generator; another from another."""
    made = []
    for seed in (1, 1, 2):
        sokd.manual_seed(seed)
        made.append(methods.crd(3, 4, 12))
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    made += [methods.crd(3, 4, 12, generator=generator) for generator in generators]
    banks = [loss.student_bank for loss in made]
    assert torch.equal(banks[0], banks[1]) and torch.equal(banks[3], banks[4])
    assert not torch.equal(banks[0], banks[2]) and not torch.equal(banks[0], banks[3])
    assert torch.allclose(banks[0].norm(dim=1).mean(), torch.tensor(1.0), atol=0.1)


def test_crd_in_eval_leaves_no_trace():
    loss = crd(dtype=torch.float32).eval()
    before = copy.deepcopy(loss.state_dict())
    first = run(loss, 1)
    assert torch.equal(first[0], run(loss, 1)[0]) and first[0].isfinite()
    after = loss.state_dict()
    assert all(
        torch.equal(before[name], after[name]) or name == "log_normaliser" for name in before
    )
    assert after["log_normaliser"].isnan().all()


def test_crd_is_float32_under_autocast(way):
    student, teacher = embeddings(dtype=torch.float32)
    values = []
    for enabled in (False, True):
        loss = crd(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            values.append(loss(student, teacher, torch.arange(4)))
        values[-1].backward()
    assert values[1].dtype == torch.float32 and torch.equal(*values)


def test_crd_survives_scores_without_measure():
    loss = crd(dtype=torch.float32, temperature=1e-6)
    student, teacher = embeddings(dtype=torch.float32)
    student.requires_grad_()
    for _ in range(2):
        value = loss(student, teacher, torch.arange(4))
        value.backward()
        assert value.isfinite() and student.grad.isfinite().all()


def test_crd_of_nothing():
    loss = crd()
    before = copy.deepcopy(loss.state_dict())
    value = loss(
        torch.zeros(0, 3, dtype=F64),
        torch.zeros(0, 4, dtype=F64),
        torch.zeros(0, dtype=torch.int64),
    )
    value.backward()
    assert value.item() == 0
    assert all(torch.equal(tensor, before[name]) or tensor.isnan().all()
               for name, tensor in loss.state_dict().items())  # fmt: skip


def test_pooled():
    features, omega = torch.randn(3, 4, 5, 6, dtype=F64), torch.rand(3, 5, 6, dtype=F64)
    omega[1] = 0
    share = omega.sqrt() / omega.sqrt().sum((1, 2), keepdim=True).clamp(min=1e-300)
    torch.testing.assert_close(
        methods.pooled(features, omega), torch.einsum("bchw,bhw->bc", features, share)
    )
    torch.testing.assert_close(methods.pooled(features), features.mean((2, 3)))
    torch.testing.assert_close(methods.pooled(features, omega * 0 + 7), features.mean((2, 3)))


# --- reviewkd


def stages(batch=2, dtype=F64):
    student = [(3, 8, 6), (4, 4, 3), (5, 2, 2)]
    teacher = [(4, 8, 6), (3, 8, 6), (6, 1, 2)]  # equal, larger and smaller than the student's
    return [
        [torch.randn(batch, *shape, dtype=dtype) for shape in shapes]
        for shapes in (student, teacher)
    ]


def reviewkd(**options):
    torch.manual_seed(0)
    loss = methods.reviewkd([3, 4, 5], [4, 3, 6], **options).double()
    for module in loss.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.normal_()
            module.running_var.uniform_(0.5, 2)
    return loss


def parameters_of(block):
    convolution, norm = block
    statistics = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return [tensor.detach().numpy() for tensor in (convolution.weight, *statistics)]


@pytest.mark.parametrize("mask", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("hidden", [None, 2])
def test_reviewkd_against_loops(mask, hidden):
    loss, (student, teacher) = reviewkd(hidden=hidden).eval(), stages()
    sizes = [(len(each), *each.shape[2:]) for each in teacher]
    weights = [torch.randint(0, 3, size).double() if mask else None for size in sizes]
    expected, fused = 0.0, None
    layers = list(zip(loss.fusions, student, teacher, weights, strict=True))
    for fusion, of_student, of_teacher, weight in layers[::-1]:
        attention = fusion.attention
        attention = attention and [
            each.detach().numpy() for each in (attention.weight, attention.bias)
        ]
        blocks = parameters_of(fusion.reduce), attention, parameters_of(fusion.expand)
        output, fused = naive.abf(of_student.numpy(), fused, of_teacher.shape[2:], *blocks)
        expected += naive.hcl(
            output, of_teacher.numpy(), None if weight is None else weight.numpy()
        )
    value = loss(student, teacher, weights if mask else None)
    torch.testing.assert_close(value.detach(), torch.tensor(expected, dtype=F64))


def test_reviewkd_gradcheck():
    loss = methods.reviewkd([1, 1], [2, 1], hidden=1).double()
    student = [torch.randn(2, 1, 2, 3, dtype=F64, requires_grad=True) for _ in range(2)]
    teacher = [torch.randn(2, channels, 2, 3, dtype=F64) for channels in (2, 1)]
    weight = torch.rand(2, 2, 3, dtype=F64)
    assert torch.autograd.gradcheck(
        lambda *student: loss(student, teacher, [weight, None]), student
    )


def test_reviewkd_trains_all_it_has_and_not_the_teacher():
    loss, (student, teacher) = reviewkd(), stages()
    for tensor in student + teacher:
        tensor.requires_grad_()
    loss(student, teacher).backward()
    assert all(tensor.grad.any() for tensor in [*student, *loss.parameters()])
    assert not any(tensor.grad is not None for tensor in teacher)


def test_reviewkd_of_nothing():
    loss, (student, teacher) = reviewkd(), stages(batch=0)
    before = copy.deepcopy(loss.state_dict())
    assert loss(student, teacher).item() == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in loss.state_dict().items())


# --- mgd


@pytest.mark.parametrize("mask", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("over", ["channels", "cells"])
def test_mgd_against_loops(over, mask):
    loss = methods.mgd(3, over=over, ratio=0.4).double()
    student, teacher = torch.randn(2, 2, 3, 4, 5, dtype=F64)
    weight = torch.randint(0, 3, (2, 4, 5)).double() if mask else None
    keep = loss._keep(student).numpy()
    loss.counter.zero_()
    assert set(keep.ravel()) == {0.0, 1.0}
    layers = [[each.detach().numpy() for each in loss.generation[i].parameters()] for i in (0, 2)]
    output = naive.generated(student.numpy(), keep, *layers)
    expected = naive.fitnet(output, teacher.numpy(), None if weight is None else weight.numpy())
    value = loss(student, teacher, weight)
    torch.testing.assert_close(value.detach(), torch.tensor(expected * 3 * 4 * 5, dtype=F64))


@pytest.mark.parametrize("over, ratio, shape", [
    ("channels", None, (50, 80, 1, 1)), ("cells", None, (10, 2, 20, 20)),
    ("cells", 0.3, (10, 2, 20, 20)),
])  # fmt: skip
def test_mgd_masks_its_share(over, ratio, shape):
    loss = methods.mgd(shape[1], over=over, ratio=ratio)
    first, second = (loss._keep(torch.zeros(shape)) for _ in range(2))
    share = {"channels": 0.15, "cells": 0.65}[over] if ratio is None else ratio
    assert not torch.equal(first, second)
    for keep in (first, second):
        assert abs(1 - keep.mean().item() - share) < 0.04


def test_mgd_gradcheck():
    loss = methods.mgd(2).double().eval()  # the same mask again
    student, teacher = torch.randn(2, 2, 2, 3, 3, dtype=F64)
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda student: loss(student, teacher, torch.ones(2, 3, 3)), student
    )


def test_mgd_resumes_bit_for_bit():
    student, teacher = torch.randn(2, 4, 3, 4, 5)
    loss = methods.mgd(3)
    loss(student, teacher)
    other = methods.mgd(3, generator=torch.Generator().manual_seed(9))
    other.load_state_dict(loss.state_dict())
    assert torch.equal(loss(student, teacher), other(student, teacher))
    assert loss(student[:0], teacher[:0]).item() == 0
