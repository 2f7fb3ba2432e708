"""ops.areas: boxes, scores and coverage, equal to the twin's and to naive loops."""

import math

import pytest
import torch
from support import naive
from support.cases import DTYPES, LAYOUTS, both, laid_out

from sokd import ops, reference

hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis")
given, st = hypothesis.given, hypothesis.strategies


def maps(shape, dtype=torch.float32, layout="contiguous"):
    """heat, size and offset; the heat in sixths, so that many are equal."""
    batch, _, height, width = shape
    heat = (laid_out(shape, layout, torch.float64).sigmoid() * 6).round() / 6
    pair = (batch, 2, height, width)
    size, offset = (laid_out(pair, layout, torch.float64).sigmoid() for _ in range(2))
    return [
        (part * scale).to(dtype)
        for part, scale in ((heat, 1), (size, max(height, width)), (offset, 1))
    ]


def assert_same(actual, expected):
    for name, one, two in zip(actual._fields, actual, expected, strict=True):
        assert one.dtype == two.dtype and torch.equal(one, two), name


@pytest.mark.parametrize("kernel", [1, 3, 5, 99])
@pytest.mark.parametrize("k", [1, 8, 60])
@both
def test_naive_loops(module, k, kernel):
    heat, size, offset = maps((3, 3, 4, 5), torch.float64)
    heat[1] = 0.5  # one plateau: every cell is a peak
    heat[2, 1, 2, 2] = math.nan
    coverage, boxes, scores = naive.areas(heat.numpy(), size.numpy(), offset.numpy(), k, kernel)
    actual = module.areas(heat, size, offset, k=k, kernel=kernel)
    assert actual.boxes.tolist() == boxes.tolist()
    assert actual.coverage.tolist() == coverage.tolist()
    assert actual.scores.tolist() == scores.tolist()


@pytest.mark.parametrize("mutual", [False, True])
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(2, 3, 5, 7), (1, 1, 1, 1), (3, 2, 1, 9), (2, 17, 8, 8), (2, 100, 16, 16), (0, 3, 4, 4)],
)
def test_values(shape, dtype, layout, mutual):
    student, k = maps(shape, dtype, layout), min(8, math.prod(shape[1:]))
    teacher = tuple(maps(shape, dtype, layout)) if mutual else None
    options = {"k": k, "teacher": teacher}
    assert_same(ops.areas(*student, **options), reference.areas(*student, **options))


@pytest.mark.parametrize(
    "shape, k, kernel",
    [((2, 5, 64, 50), 8, 3), ((1, 300, 7, 7), 100, 3), ((1, 2, 40, 40), 3200, 7)],
)
def test_larger(shape, k, kernel):
    student, teacher = maps(shape), tuple(maps(shape))
    student[0], heat = torch.rand(shape), torch.rand(shape)  # no ties
    teacher = (heat, *teacher[1:])
    options = {"k": k, "kernel": kernel, "teacher": teacher}
    assert_same(ops.areas(*student, **options), reference.areas(*student, **options))


def test_mixed_layouts():
    shape = (2, 6, 9, 8)
    student = [part for part, layout in zip(maps(shape), LAYOUTS, strict=False)]
    student[0] = maps(shape, layout="channels_last")[0]
    teacher = (maps(shape, layout="sliced")[0], maps(shape, layout="transposed")[1], maps(shape)[2])
    assert_same(ops.areas(*student, teacher=teacher), reference.areas(*student, teacher=teacher))


def test_ties_go_to_the_lower_flat_index():
    heat = torch.zeros(1, 2, 3, 3)
    heat[0, 1, 0, 0] = heat[0, 0, 2, 2] = heat[0, 0, 0, 0] = 0.5
    size, offset = torch.ones(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)
    boxes = ops.areas(heat, size, offset, k=3).boxes[0]
    assert boxes.tolist() == [[0, 0, 0, 0], [1, 1, 2, 2], [0, 0, 0, 0]]


@pytest.mark.parametrize("module", [ops, reference], ids=["ops", "reference"])
@pytest.mark.parametrize("mutual", [False, True])
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "expanded"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cell_of_heat_zero_is_no_peak(dtype, layout, mutual, module):
    """Cells of a plateau of zeros and cells below 0 are none; the two cells above 0 are."""
    heat = torch.zeros(3, 20, 6, 7)
    heat[0, 3, 2, 2], heat[0, 17, 5, 6] = 0.25, 0.5
    heat[1] = -0.0
    heat[2] = -1.0  # the root of the product of two such is 1
    heat = laid_out(heat.shape, layout, dtype).copy_(heat.to(dtype))
    size, offset = (torch.zeros(3, 2, 6, 7, dtype=dtype) for _ in range(2))
    teacher = (heat, size, offset) if mutual else None
    found = module.areas(heat, size, offset, k=4, teacher=teacher)
    none = [0, 0, -1, -1]
    assert found.boxes[0].tolist() == [[5, 6, 5, 6], [2, 2, 2, 2], none, none]
    assert found.scores[0].tolist() == [0.5, 0.25, 0, 0]
    assert found.boxes[1].tolist() == [none] * 4 and not found.scores[1].any()
    assert found.coverage[0].sum() == 2 and not found.coverage[1].any()
    assert found.scores[2].tolist() == ([1.0] * 4 if mutual else [0.0] * 4)


def test_boxes_are_clamped_truncated_and_filled_inclusively():
    heat = torch.zeros(1, 1, 5, 6)
    heat[0, 0, 2, 3] = 1
    size, offset = torch.zeros(1, 2, 5, 6), torch.zeros(1, 2, 5, 6)
    for (width, height), (dx, dy), box in [
        ((0.0, 0.0), (0.0, 0.0), [2, 3, 2, 3]),
        ((2.0, 1.0), (0.5, 0.5), [2, 2, 3, 4]),
        ((100.0, 100.0), (0.0, 0.0), [0, 0, 4, 5]),
        ((0.0, 0.0), (-50.0, 50.0), [4, 0, 4, 0]),
        ((math.inf, 1.9), (0.0, 0.0), [1, 0, 2, 5]),
    ]:
        size[0, :, 2, 3], offset[0, :, 2, 3] = torch.tensor([width, height]), torch.tensor([dx, dy])
        found = ops.areas(heat, size, offset, k=1)
        assert found.boxes[0, 0].tolist() == box
        y0, x0, y1, x1 = box
        expected = torch.zeros(5, 6)
        expected[y0 : y1 + 1, x0 : x1 + 1] = 1
        assert torch.equal(found.coverage[0], expected)


def test_a_negative_size_covers_nothing():
    heat, offset = torch.zeros(1, 1, 5, 5), torch.zeros(1, 2, 5, 5)
    heat[0, 0, 2, 2] = 1
    found = ops.areas(heat, torch.full((1, 2, 5, 5), -4.0), offset, k=1)
    assert not found.coverage.any()
    assert_same(found, reference.areas(heat, torch.full((1, 2, 5, 5), -4.0), offset, k=1))


@pytest.mark.parametrize("mutual", [False, True])
def test_missing_peaks_are_empty_boxes(mutual):
    heat, size, offset = (torch.full((2, channels, 4, 4), math.nan) for channels in (3, 2, 2))
    heat[1, 0, 1, 1], size[1], offset[1] = 0.25, 1.0, 0.0
    heat[1, 0] = torch.arange(16.0).view(4, 4) / 16
    teacher = (heat, size, offset) if mutual else None
    found = ops.areas(heat, size, offset, k=2, teacher=teacher)
    assert not found.coverage[0].any() and found.boxes[0].tolist() == [[0, 0, -1, -1]] * 2
    assert found.boxes[1].tolist() == [[2, 2, 3, 3], [0, 0, -1, -1]]
    assert found.scores.tolist() == [[0.0, 0.0], [15 / 16, 0.0]]
    assert_same(found, reference.areas(heat, size, offset, k=2, teacher=teacher))


def test_nan_in_size_or_offset_makes_a_corner_zero():
    heat, size, offset = maps((2, 3, 6, 6))
    size[:, 0, ::2], offset[:, 1, :, ::2] = math.nan, math.nan
    assert_same(ops.areas(heat, size, offset, k=20), reference.areas(heat, size, offset, k=20))


def test_no_gradient_flows_and_none_is_lost():
    heat, size, offset = (part.requires_grad_() for part in maps((2, 3, 4, 5)))
    found = ops.areas(heat, size, offset, teacher=(heat, size, offset))
    assert not any(part.requires_grad for part in found)


def test_same_bits_for_any_number_of_threads(with_threads):
    student, teacher = maps((5, 40, 20, 21)), tuple(maps((5, 40, 20, 21)))
    first = with_threads(1, lambda: ops.areas(*student, k=30, teacher=teacher))
    for threads in (2, 3):
        again = with_threads(threads, lambda: ops.areas(*student, k=30, teacher=teacher))
        assert_same(again, first)


@given(
    st.tuples(st.integers(0, 3), st.integers(1, 20), st.integers(1, 12), st.integers(1, 12)),
    st.sampled_from(LAYOUTS), st.sampled_from(DTYPES), st.sampled_from([1, 3, 5]), st.booleans(),
    st.sampled_from([0.0, 0.01, 0.3]), st.integers(0, 2**31), st.data(),
)  # fmt: skip
def test_any_case(shape, layout, dtype, kernel, mutual, nans, seed, data):
    torch.manual_seed(seed)
    k = data.draw(st.integers(1, math.prod(shape[1:])))
    student, teacher = maps(shape, dtype, layout), tuple(maps(shape, dtype)) if mutual else None
    student[0] = torch.where(torch.rand(shape) < nans, math.nan, student[0]) if nans else student[0]
    options = {"k": k, "kernel": kernel, "teacher": teacher}
    assert_same(ops.areas(*student, **options), reference.areas(*student, **options))
