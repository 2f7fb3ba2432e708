"""sokd.reference against PyTorch's own operators, naive loops, published numbers and statistics."""

from __future__ import annotations

import math

import pytest
import torch
from support import naive
from support.cases import SHAPES, compiles, everything, operation

from sokd import reference

stats = pytest.importorskip("scipy.stats", reason="needs scipy")

# Random123's known-answer tests of philox4x32 with 10 rounds (kat_vectors): counter, key, result
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_known_answers(counter, key, words):
    tensors = tuple(torch.tensor([word]) for word in counter)
    assert tuple(int(word) for word in reference.philox(tensors, key)) == words
    assert tuple(naive.philox(list(counter), list(key))) == words


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 + 5, 0x123456789ABCDEF])
def test_normals_equal_the_naive_ones(seed):
    values = reference.normals((2, 2, 3, 3), seed)
    for n, c, y, x in torch.cartesian_prod(*(torch.arange(side) for side in values.shape)).tolist():
        assert values[n, c, y, x].item() == pytest.approx(
            naive.normal(seed, n * 2 + c, y * 3 + x), abs=1e-6
        )
    tensor = torch.tensor([seed - 2**64 if seed >= 2**63 else seed])
    assert torch.equal(values, reference.normals((2, 2, 3, 3), tensor))


def test_normals_are_standard_normal():
    values = reference.normals((8, 16, 61, 67), 7).double().flatten()
    count = values.numel()
    assert abs(values.mean()) < 4 / math.sqrt(count)
    assert abs(values.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs((values**3).mean()) < 4 * math.sqrt(15 / count)
    assert abs((values**4).mean() - 3) < 4 * math.sqrt(96 / count)
    assert stats.kstest(values.numpy(), "norm").pvalue > 1e-3
    for bound in (2, 3, 4):  # tails on both sides
        for tail in (values > bound, values < -bound):
            expected = count * stats.norm.sf(bound)
            assert abs(tail.sum().item() - expected) < 4 * math.sqrt(expected)


def test_normals_are_independent():
    shape = (4, 8, 40, 40)
    values, bound = reference.normals(shape, 11).double(), 5.0

    def correlation(one, two):  # in standard deviations of its own error
        return abs((one * two).mean().item()) * math.sqrt(one.numel())

    assert correlation(values[:, :, :, 1:], values[:, :, :, :-1]) < bound  # neighbours in a row
    assert correlation(values[:, :, 1:], values[:, :, :-1]) < bound
    assert correlation(values[:, 1:], values[:, :-1]) < bound  # channels
    assert correlation(values[1:], values[:-1]) < bound  # samples
    # Box-Muller's pairs
    assert correlation(values[..., 0::2] ** 2 - 1, values[..., 1::2] ** 2 - 1) < bound * 2
    for seed in (12, -11, 11 + 2**32, 11 << 32):
        assert correlation(values, reference.normals(shape, seed).double()) < bound


def test_draw_is_uniform_and_never_0_or_1():
    rows = [reference.draw(torch.tensor([3]), torch.tensor([step]), 40)[0] for step in range(500)]
    values = torch.cat(rows).double()
    assert values.min() > 0 and values.max() < 1
    assert stats.kstest(values.numpy(), "uniform").pvalue > 1e-3
    columns = torch.stack(rows).double()
    assert torch.corrcoef(columns.T).fill_diagonal_(0).abs().max() < 5 / math.sqrt(500)


def test_theta_at_the_kinks_has_the_right_derivative():
    """Whole coordinates (identity, whole shifts): grid_sample's right derivative, zeros beyond the
    border."""
    features = torch.arange(1.0, 5.0, dtype=torch.float64).reshape(1, 1, 1, 4)
    theta = torch.eye(2, 3, dtype=torch.float64).unsqueeze(0).requires_grad_()
    refined = reference.refine(features, theta)
    # d/d t02 = W/2 * (right neighbour - value), the last one falls to zero
    for cell, slope in enumerate([1.0, 1.0, 1.0, -4.0]):
        upstream = torch.zeros_like(refined)
        upstream[..., cell] = 1
        (d_theta,) = torch.autograd.grad(refined, theta, upstream, retain_graph=True)
        assert d_theta[0, 0, 2].item() == pytest.approx(2 * slope)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if math.prod(shape) < 400])
@pytest.mark.parametrize("groups", ["one", "each"])
def test_everything_equals_the_naive_loops(shape, groups):
    plan = everything(shape, 1 if groups == "one" else shape[0])
    features = torch.randn(shape, dtype=torch.float64)
    expected = naive.refine(
        features.numpy(), **{name: part.numpy() for name, part in plan.items()}, seed=5
    )
    actual = reference.refine(features, **plan, seed=5)
    torch.testing.assert_close(actual, torch.from_numpy(expected), rtol=1e-6, atol=1e-6)


def test_refine_dots_are_inner_products():
    features, upstream = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    plans = {
        "sigma": torch.rand(4, 2, dtype=torch.float64),
        "keep": torch.rand(4, 1, 3) < 0.5,
        "seed": 3,
    }
    expected = [
        (
            upstream
            * reference.refine(features, sigma=plans["sigma"][v], keep=plans["keep"][v], seed=3)
        ).sum()
        for v in range(4)
    ]
    torch.testing.assert_close(
        reference.refine_dots(features, upstream, plans), torch.stack(expected)
    )
    torch.testing.assert_close(
        reference.refine_dots(features, upstream, reference.Plan(**plans)), torch.stack(expected)
    )


def test_areas_of_two_are_those_of_the_means():
    student, teacher = ([torch.rand(2, channels, 4, 5) for channels in (3, 2, 2)] for _ in range(2))
    mutual = [
        (student[0] * teacher[0]).double().sqrt().float(),
        *((student[i] + teacher[i]) / 2 for i in (1, 2)),
    ]
    for one, two in zip(
        reference.areas(*student, teacher=tuple(teacher)), reference.areas(*mutual), strict=True
    ):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once(dtype):
    shape = (2, 3, 6, 7)
    features, plan = torch.randn(shape).to(dtype), everything(shape, 2, torch.float32)
    wide = reference.refine(features.float(), **plan, seed=2)
    assert torch.equal(reference.refine(features, **plan, seed=2), wide.to(dtype))
    assert reference.masked_mse(features, -features).dtype == torch.float32


@pytest.mark.parametrize("index", range(9))
def test_layout_is_kept(index):
    features = torch.randn(2, 4, 5, 6).to(memory_format=torch.channels_last)
    plan = {
        name: part.float() if part.is_floating_point() else part
        for name, part in operation(index, (2, 4, 5, 6), 0.7).items()
    }
    refined = reference.refine(features, **plan)
    assert refined.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(refined, reference.refine(features.contiguous(), **plan))


@compiles
def test_compiles_as_one_graph():
    shape = (2, 3, 5, 6)
    plan = everything(shape, 2, torch.float32)
    features = torch.randn(shape)
    theta, sigma = plan["theta"].requires_grad_(), plan["sigma"].requires_grad_()

    def step(features):
        refined = reference.refine(features, **plan, seed=torch.tensor([3]))
        return reference.masked_mse(refined, features, torch.ones(2, 5, 6))

    eager, compiled = step(features), torch.compile(step, fullgraph=True)(features)
    torch.testing.assert_close(compiled, eager)
    for one, two in zip(
        torch.autograd.grad(compiled, (theta, sigma)),
        torch.autograd.grad(eager, (theta, sigma)),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
