"""ops.refine and ops.refine_dots against the twin, naive loops and PyTorch itself."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from support import naive
from support.cases import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    both,
    everything,
    laid_out,
    neutral_plan,
    pair,
    same_bits,
)
from support.raises import raises

from sokd import ops, reference

hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis")
given, st = hypothesis.given, hypothesis.strategies

ULP = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
CLOSE = {torch.float64: {"rtol": 1e-10, "atol": 1e-6}, torch.float32: {"rtol": 1e-5, "atol": 1e-5}}
# d_theta sums over all cells: compared with what the sum of absolute values allows
GRADIENT = {
    torch.float64: {"rtol": 1e-6, "atol": 1e-5},
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
}


def assert_near(actual, expected, dtype):
    """Close for the full precisions; half a unit in the last place more for the half ones."""
    assert actual.dtype == dtype and actual.shape == expected.shape
    if dtype in CLOSE:
        torch.testing.assert_close(actual, expected.to(dtype), **CLOSE[dtype])
    else:
        bound = ULP[dtype] * expected.abs().float() + 1e-5
        assert ((actual.float() - expected.float()).abs() <= bound).all()


# --- values
@pytest.mark.parametrize("first, second", list(itertools.combinations(range(9), 2)))
def test_every_pair_of_operations(first, second):
    shape = (2, 4, 7, 6)
    features, plan = torch.randn(shape), pair(first, second, shape)
    actual = ops.refine(features, **plan, seed=9)
    twin = reference.refine(features, **plan, seed=9)
    torch.testing.assert_close(actual, twin, rtol=1e-5, atol=1e-5)
    arrays = {name: part.numpy() for name, part in plan.items()}
    expected = naive.refine(features.double().numpy(), **arrays, seed=9)
    torch.testing.assert_close(actual.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape, dtype, layout):
    features, plan = laid_out(shape, layout, dtype), everything(shape, shape[0])
    wide = features if dtype in CLOSE else features.float()
    assert_near(ops.refine(features, **plan, seed=4), reference.refine(wide, **plan, seed=4), dtype)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(4, 32, 28, 28), (2, 64, 40, 23)])
def test_values_of_larger_maps(shape, layout):
    features, plan = laid_out(shape, layout, torch.float32), everything(shape, 1, torch.float32)
    assert_near(
        ops.refine(features, **plan, seed=4),
        reference.refine(features, **plan, seed=4),
        torch.float32,
    )


@both
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if math.prod(shape)])
def test_theta_is_affine_grid_and_grid_sample(shape, module):
    features, theta = torch.randn(shape), torch.eye(2, 3) + 0.4 * torch.randn(shape[0], 2, 3)
    wide, upstream = (
        [each.double().requires_grad_() for each in (features, theta)],
        torch.randn(shape),
    )
    grid = F.affine_grid(wide[1], list(shape), align_corners=False)
    expected = F.grid_sample(wide[0], grid, align_corners=False)
    single = module.refine(features, theta).double()
    torch.testing.assert_close(single, expected, rtol=1e-5, atol=1e-5)
    actual = module.refine(*wide)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    found, wanted = (torch.autograd.grad(y, wide, upstream.double()) for y in (actual, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_worse_than_eager(dtype):
    shape = (2, 8, 14, 14)
    features = torch.randn(shape).to(dtype)
    theta = (torch.eye(2, 3) + 0.2 * torch.randn(2, 2, 3)).to(dtype)
    exact = reference.refine(features.double(), theta.double())
    grid = F.affine_grid(theta, list(shape), align_corners=False)
    eager = F.grid_sample(features, grid, align_corners=False)
    values = ops.refine(features, theta), eager
    error, eagers_own = ((value.double() - exact).abs() for value in values)
    assert error.max() <= eagers_own.max() + ULP[dtype] * exact.abs().max()
    assert (error <= ULP[dtype] * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@both
def test_neutral_values_copy_bit_for_bit(module, dtype, layout):
    features = laid_out((2, 3, 6, 5), layout, dtype)
    if layout != "expanded":
        features[0, 0, 0, :3] = torch.tensor([math.nan, -0.0, math.inf])
    neutral = neutral_plan()
    for plan in [{}, neutral, *({name: part} for name, part in neutral.items())]:
        assert same_bits(module.refine(features, **plan, seed=1), features.contiguous())


@pytest.mark.parametrize("groups", list(itertools.product([1, 3], repeat=5)))
def test_each_part_has_its_own_groups(groups):
    shape = (3, 4, 5, 5)
    plan = everything(shape, 3)
    plan = {name: part[:count] for (name, part), count in zip(plan.items(), groups, strict=True)}
    features = torch.randn(shape, dtype=torch.float64)
    whole = {name: part.expand(3, *part.shape[1:]) for name, part in plan.items()}
    actual = ops.refine(features, **plan, seed=2)
    assert torch.equal(actual, ops.refine(features, **whole, seed=2))
    assert_near(actual, reference.refine(features, **plan, seed=2), torch.float64)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_integer_parts_of_any_width(dtype):
    features, perm = torch.randn(2, 4, 5, 5), torch.tensor([[2, 0, 3, 1]])
    hole = torch.tensor([[1, 2, 3, 9]])
    expected = reference.refine(features, perm=perm, hole=hole)
    assert torch.equal(ops.refine(features, perm=perm.to(dtype), hole=hole.to(dtype)), expected)


def test_holes_are_clipped_to_the_map():
    features = torch.randn(1, 2, 4, 5)
    far = 2**40
    for hole in (-3, -2, 2, 2), (0, 0, 100, 100), (2, 3, far, far), (-9, -9, -1, -1), (5, 5, 9, 9):
        part = torch.tensor([hole])
        assert torch.equal(ops.refine(features, hole=part), reference.refine(features, hole=part))


def test_a_far_theta_empties_the_map():
    features = torch.randn(2, 3, 4, 5)
    for far in (1e3, -1e9, 1e30):
        theta = torch.tensor([[[1.0, 0, far], [0, 1, far]]])
        assert not ops.refine(features, theta).any()


def test_corners_outside_are_zero_even_next_to_nan():
    """A NaN corner gives NaN; a corner outside the map adds nothing."""
    features = torch.full((1, 1, 3, 3), math.nan)
    features[0, 0, 1, 1] = 1.0
    # three columns to the side: all outside
    theta = torch.tensor([[[1.0, 0, 2 / 3 * 3], [0, 1, 0]]])
    assert torch.equal(ops.refine(features, theta), torch.zeros(1, 1, 3, 3))


def test_nan_features_propagate_and_keep_clears_them():
    features = torch.randn(1, 2, 4, 4)
    features[0, :, 1, 1] = math.nan
    keep = torch.tensor([[True, False]])
    theta = torch.tensor([[[1.0, 0, 0.1], [0, 1, 0.1]]])
    refined = ops.refine(features, theta, keep=keep, sigma=torch.ones(1))
    assert refined[0, 0].isnan().any() and torch.equal(refined[0, 1], torch.zeros(4, 4))
    twin = reference.refine(features, theta, keep=keep, sigma=torch.ones(1))
    assert torch.equal(refined.isnan(), twin.isnan())


# --- gradients
def gradients(refine, features, plan, upstream, straight):
    leaves = [features.detach(), plan["theta"], plan["sigma"], straight]
    features, theta, sigma, straight = (leaf.clone().requires_grad_() for leaf in leaves)
    rest = {"hole": plan["hole"], "perm": plan["perm"], "keep": plan["keep"]}
    refined = refine(features, theta, sigma=sigma, straight=straight, **rest, seed=6)
    return torch.autograd.grad(refined, (features, theta, sigma, straight), upstream)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape, dtype, layout):
    features, plan = laid_out(shape, layout, dtype), everything(shape, shape[0], dtype)
    upstream, straight = laid_out(shape, layout, dtype), torch.zeros(shape[0], dtype=dtype)
    actual = gradients(ops.refine, features, plan, upstream, straight)
    expected = gradients(reference.refine, features.double(), plan, upstream.double(), straight)
    for one, two in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, two.to(one.dtype), **GRADIENT[dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_in_half_precision(dtype):
    shape = (2, 5, 8, 9)
    features, plan, upstream = (
        torch.randn(shape).to(dtype),
        everything(shape, 2, torch.float32),
        torch.randn(shape).to(dtype),
    )
    straight = torch.zeros(1)
    actual = gradients(ops.refine, features, plan, upstream, straight)
    expected = gradients(reference.refine, features.double(), plan, upstream.double(), straight)
    assert actual[0].dtype == dtype and actual[1].dtype == torch.float32
    assert_near(actual[0], expected[0].float(), dtype)
    for one, two in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_a_stride_0_upstream():
    shape = (2, 3, 5, 5)
    features, plan = torch.randn(shape), everything(shape, 1, torch.float32)
    theta, sigma = plan["theta"].requires_grad_(), plan["sigma"].requires_grad_()
    features.requires_grad_()
    ops.refine(features, **plan, seed=1).sum().backward()  # sum's gradient is one element, expanded
    actual = features.grad, theta.grad, sigma.grad
    ones = torch.ones(shape)
    refined = ops.refine(features, **plan, seed=1)
    expected = torch.autograd.grad(refined, (features, theta, sigma), ones)
    for one, two in zip(actual, expected, strict=True):
        assert torch.equal(one, two)


def _leaves():
    shape = (2, 3, 4, 5)
    plan = everything(shape, 2)
    leaves = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True),
        plan.pop("theta").requires_grad_(),
        plan.pop("sigma").requires_grad_(),
    )
    return leaves, plan


@pytest.mark.parametrize("groups", [1, 2])
def test_gradcheck(groups):
    (features, theta, sigma), plan = _leaves()
    theta, sigma = (leaf.detach()[:groups].requires_grad_() for leaf in (theta, sigma))
    assert torch.autograd.gradcheck(
        lambda features, theta, sigma: ops.refine(features, theta, sigma=sigma, **plan),
        (features, theta, sigma),
    )


def test_gradgradcheck():
    leaves, plan = _leaves()
    assert torch.autograd.gradgradcheck(
        lambda features, theta, sigma: ops.refine(features, theta, sigma=sigma, **plan), leaves
    )


def test_a_gradient_penalty_is_the_twins():
    """d/d theta of |d refined / d theta|^2: a backward whose upstream requires no gradient."""
    (features, theta, sigma), plan = _leaves()

    def penalty(refine):
        refined = refine(features, theta, sigma=sigma, **plan).square().sum()
        (d_theta,) = torch.autograd.grad(refined, theta, create_graph=True)
        return torch.autograd.grad(d_theta.square().sum(), (features, theta))

    for one, two in zip(penalty(ops.refine), penalty(reference.refine), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)  # the noise is float32


@both
def test_straight_gets_the_sum_of_the_upstream_gradient(module):
    features, upstream = torch.randn(2, 2, 3, 4, 5)
    keep = torch.tensor([[True, False, True]])
    for groups, expected in ((1, upstream.sum().reshape(1)), (2, upstream.sum((1, 2, 3)))):
        value = math.nan if module is ops else 3.0  # the kernels do not read it
        straight = torch.full((groups,), value, requires_grad=True)
        refined = module.refine(features, keep=keep, straight=straight)
        assert torch.equal(refined, module.refine(features, keep=keep))
        torch.testing.assert_close(torch.autograd.grad(refined, straight, upstream)[0], expected)


def test_only_wanted_gradients_exist():
    features, theta = torch.randn(2, 3, 4, 5), torch.eye(2, 3).unsqueeze(0).requires_grad_()
    refined = ops.refine(features, theta, sigma=torch.ones(1))
    assert refined.requires_grad
    refined.sum().backward()
    assert theta.grad is not None and features.grad is None
    assert not ops.refine(features, theta.detach()).requires_grad


# --- refine_dots
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_refine_dots(dtype, layout):
    shape, plans = (2, 5, 6, 7), 5
    features, upstream = (laid_out(shape, layout, dtype) for _ in range(2))
    each = [everything(shape, 2) for _ in range(plans)]
    parts = {name: torch.stack([plan[name] for plan in each]) for name in each[0]}
    stacked = ops.Plan(**parts, seed=8)
    actual = ops.refine_dots(features, upstream, stacked)
    expected = reference.refine_dots(features.double(), upstream.double(), stacked)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)
    names = {name: getattr(stacked, name) for name in ("theta", "sigma")}
    fewer = ops.refine_dots(features, upstream, {**names, "seed": 8})
    expected = reference.refine_dots(features.double(), upstream.double(), {**names, "seed": 8})
    torch.testing.assert_close(fewer.double(), expected, rtol=1e-4, atol=1e-4)


# one group, a group for each sample; a tile and a rest, more channels than a chunk has
@pytest.mark.parametrize(
    "groups, shape", [(1, (3, 5, 6, 7)), (3, (3, 5, 6, 7)), (2, (2, 33, 9, 8))]
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_refine_dots_by_sample(dtype, layout, groups, shape):
    features, upstream = (laid_out(shape, layout, dtype) for _ in range(2))
    each = [everything(shape, groups) for _ in range(6)]
    each[1] = {**each[1], "theta": torch.eye(2, 3).expand(groups, 2, 3).double()}
    each[2] = {**each[2], "sigma": torch.zeros(groups, dtype=torch.float64)}
    stacked = ops.Plan(
        **{name: torch.stack([plan[name] for plan in each]) for name in each[0]}, seed=8
    )
    found = ops.refine_dots(features, upstream, stacked, by_sample=True)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wide = features.double(), upstream.double()
    expected = reference.refine_dots(*wide, stacked, by_sample=True)
    assert found.shape == (2, 6, shape[0])
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    products = ops.refine_dots(features, upstream, stacked)
    torch.testing.assert_close(found[0].sum(1), products, rtol=1e-4, atol=1e-3)
    again = ops.refine_dots(features, upstream, stacked, by_sample=True)
    assert torch.equal(found, again)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)])
def test_refine_dots_of_nothing_are_zero(shape):
    empty = torch.randn(shape)
    three = {"sigma": torch.ones(3, 1)}
    assert ops.refine_dots(empty, empty, three).tolist() == [0.0] * 3
    by_sample = ops.refine_dots(empty, empty, three, by_sample=True)
    assert by_sample.tolist() == [[[0.0] * shape[0]] * 3] * 2
    one, none = torch.ones(1, 1, 2, 2), {"sigma": torch.ones(0, 1)}
    assert ops.refine_dots(one, one, none).shape == (0,)
    assert ops.refine_dots(one, one, none, by_sample=True).shape == (2, 0, 1)


@pytest.mark.parametrize("name", ["features", "upstream", "theta"])
def test_refine_dots_refuse_gradients(name):
    inputs = {
        "features": torch.ones(1, 1, 2, 2),
        "upstream": torch.ones(1, 1, 2, 2),
        "theta": torch.eye(2, 3)[None, None],
    }
    inputs[name] = inputs[name].clone().requires_grad_()
    plans = {"theta": inputs.pop("theta")}
    text = f"refine_dots: {name} must not require grad, got a tensor that requires grad"
    with raises(ValueError, text):
        ops.refine_dots(**inputs, plans=plans)
    with torch.no_grad():
        assert ops.refine_dots(**inputs, plans=plans).tolist() == [4.0]


# --- noise: a function of the seed and the logical index alone
def test_noise_is_the_twins():
    features = torch.zeros(2, 5, 7, 9)
    for seed in (0, 5, -5, 2**63 + 1, torch.tensor([77])):
        actual = ops.refine(features, sigma=torch.ones(1), seed=seed)
        expected = reference.normals((2, 5, 7, 9), seed)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_noise_has_the_same_bits_for_any_strides(layout):
    shape = (2, 6, 9, 7)
    features = laid_out(shape, layout, torch.float32) * 0
    contiguous = ops.refine(torch.zeros(shape), sigma=torch.ones(1), seed=3)
    assert torch.equal(ops.refine(features, sigma=torch.ones(1), seed=3), contiguous)


def test_noise_has_the_same_bits_for_any_groups_batch_and_precision():
    features = torch.zeros(4, 3, 5, 5)
    one = ops.refine(features, sigma=torch.ones(1), seed=3)
    assert torch.equal(ops.refine(features, sigma=torch.ones(4), seed=3), one)
    assert torch.equal(ops.refine(features[:2], sigma=torch.ones(1), seed=3), one[:2])
    assert torch.equal(ops.refine(features.double(), sigma=torch.ones(1), seed=3), one.double())
    assert torch.equal(ops.refine(features.half(), sigma=torch.ones(1), seed=3), one.half())
    hole = torch.tensor([[0, 0, 5, 5]])
    assert torch.equal(ops.refine(features + 1, hole=hole, sigma=torch.ones(1), seed=3), one)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_for_any_number_of_threads(layout, with_threads):
    shape = (3, 16, 19, 21)
    features, plan = laid_out(shape, layout, torch.float32), everything(shape, 3, torch.float32)
    upstream = torch.randn(shape)
    stacked = {name: torch.stack([part, part]) for name, part in plan.items()}

    def work():
        straight = torch.zeros(1)
        refined = ops.refine(features, **plan, seed=4)
        return (
            refined,
            *gradients(ops.refine, features, plan, upstream, straight),
            ops.refine_dots(features, upstream, stacked),
        )

    first = with_threads(1, work)
    for threads in (2, 3):
        for one, two in zip(first, with_threads(threads, work), strict=True):
            assert torch.equal(one, two)


# --- any shape, any strides, any values
@st.composite
def cases(draw):
    limits = (0, 3), (0, 9), (1, 12), (1, 12)
    shape = tuple(draw(st.integers(*limit)) for limit in limits)
    parts = draw(st.sets(st.sampled_from(["theta", "hole", "sigma", "perm", "keep"])))
    layout, seed = draw(st.sampled_from(LAYOUTS)), draw(st.integers(0, 2**31))
    return shape, parts, layout, seed, draw(st.booleans())


@given(cases())
def test_any_case(case):
    shape, parts, layout, seed, grouped = case
    torch.manual_seed(seed)
    plan = everything(shape, shape[0] if grouped else 1)
    plan = {name: plan[name] for name in parts}
    features = laid_out(shape, layout, torch.float64)
    before = features.clone()
    actual = ops.refine(features, **plan, seed=seed)
    assert_near(actual, reference.refine(features, **plan, seed=seed), torch.float64)
    assert torch.equal(features, before)
