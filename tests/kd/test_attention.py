"""Heads without parameters: attention, moments, areas, agreement, with values worked out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support.cases import compiles
from support.kd_cases import features, make, pair, rewound

import sokd
from sokd import reference
from sokd.kd.attention import AttentionDAM, attention_map, disagreement
from sokd.methods import at


def a_map(rows: list[list[float]], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """One channel of one sample."""
    return torch.tensor(rows, dtype=dtype)[None, None]


def written_out(features: torch.Tensor, tau: float) -> torch.Tensor:
    """The attention of docs/method.md 7 in float64, one sample after the other."""
    maps = []
    for sample in features.double():
        energy = sample.abs().mean(0)
        variance = energy.var(unbiased=False)
        z = (energy - energy.mean()) / (variance + 1e-5 * energy.mean() ** 2 + 1e-12).sqrt()
        maps.append((z.flatten() / tau).softmax(0).view_as(energy))
    return torch.stack(maps)


# ---------------------------------------------------------------------------------- the attention


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("shape", [(3, 5, 4, 6), (2, 1, 1, 9), (1, 7, 14, 14)], ids=str)
def test_attention_is_the_formula_and_sums_to_one(shape, tau):
    maps = features(*shape)
    got = attention_map(maps, tau)
    torch.testing.assert_close(got.double(), written_out(maps, tau), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got.sum((1, 2)), torch.ones(shape[0]))


def test_a_case_by_hand():
    # energies 0 and 4: mean 2, variance 4, z = -+ 2 / sqrt(4 + 4e-5)
    got = attention_map(a_map([[0.0, -4.0]]))
    z = 2 / math.sqrt(4 + 4e-5 + 1e-12)
    share = 1 / (1 + math.exp(-2 * z))
    torch.testing.assert_close(got, torch.tensor([[[1 - share, share]]]))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_attention_does_not_depend_on_the_scale_of_the_features(scale):
    maps = features(2, 5, 6, 6)
    torch.testing.assert_close(attention_map(scale * maps), attention_map(maps))


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_equal_cells_have_equal_attention_and_a_finite_gradient(value):
    maps = torch.full((2, 3, 4, 5), value, requires_grad=True)
    got = attention_map(maps)
    torch.testing.assert_close(got, torch.full((2, 4, 5), 1 / 20))
    (got * features(2, 4, 5)).sum().backward()
    assert maps.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    maps = features(2, 64, 6, 6).to(dtype)
    got = attention_map(maps)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), written_out(maps, 1.0), rtol=2e-2, atol=1e-4)
    large = torch.full((1, 8, 2, 2), 60000.0, dtype=torch.float16)  # whose sum is not float16
    large[0, :, 0, 0] = 30000
    assert attention_map(large).isfinite().all()


def test_a_nan_makes_its_own_sample_nan():
    maps = features(2, 3, 4, 4)
    maps[1, 2, 3, 3] = math.nan
    got = attention_map(maps)
    assert got[0].isfinite().all() and got[1].isnan().all()


# ------------------------------------------------------------------------------------ the agreement


def test_agreement_of_equal_and_of_disjoint_attention():
    one, other = torch.zeros(2, 3, 3), torch.zeros(2, 3, 3)
    one[:, 0, 0] = other[:, 2, 1] = 1
    half = (one + other) / 2
    equal, disjoint, partly = (torch.cat((one, teacher)) for teacher in (one, other, half))
    assert disagreement(equal) == 0 and disagreement(disjoint) == 1
    assert disagreement(partly).item() == pytest.approx(1 - math.sqrt(0.5))


@pytest.mark.parametrize("sizes", [((6, 6), (6, 6)), ((8, 8), (4, 4)), ((4, 4), (8, 8))], ids=str)
def test_agreement_is_one_minus_the_cosine_and_trains_the_student_alone(sizes):
    student = features(3, 4, *sizes[0]).requires_grad_()
    teacher = features(3, 7, *sizes[1], seed=6).requires_grad_()
    got = AttentionDAM(temperature=0.7)(student, teacher, scale=5.0).agreement
    maps = (
        attention_map(sokd.kd.adapter.resize(student, sizes[1]), 0.7),
        attention_map(teacher, 0.7),
    )
    want = 5 * (1 - F.cosine_similarity(*(each.flatten(1) for each in maps))).mean()
    torch.testing.assert_close(got, want)
    got.backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None
    assert 0 <= got <= 5


@pytest.mark.parametrize("sizes", [((3, 3), (3, 3)), ((4, 4), (2, 3)), ((2, 3), (4, 4))], ids=str)
def test_gradcheck_of_the_agreement(sizes):
    student = features(2, 3, *sizes[0], dtype=torch.float64).requires_grad_()
    teacher = features(2, 4, *sizes[1], seed=6, dtype=torch.float64)
    dam = AttentionDAM()
    assert torch.autograd.gradcheck(lambda f_s: dam(f_s, teacher).agreement, student)
    assert torch.autograd.gradgradcheck(lambda f_s: dam(f_s, teacher).agreement, student)


# ------------------------------------------------------------------------------------------ windows


def naive_moments(attention: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Width, height and the mean's place by loops over each cell's window."""
    height, width = attention.shape
    reach = max(1, min(height, width) // 4)
    size, place = torch.zeros(2, height, width), torch.zeros(2, height, width)
    for y in range(height):
        for x in range(width):
            cells = [
                (q, p)
                for q in range(max(0, y - reach), min(height, y + reach + 1))
                for p in range(max(0, x - reach), min(width, x + reach + 1))
            ]
            total = sum(attention[q, p] for q, p in cells)
            for axis, side in ((0, width), (1, height)):
                steps = [p - x if axis == 0 else q - y for q, p in cells]
                mean = sum(attention[c] * d for c, d in zip(cells, steps, strict=True)) / total
                second = sum(
                    attention[c] * (d - mean) ** 2 for c, d in zip(cells, steps, strict=True)
                )
                size[axis, y, x] = min(side, math.sqrt(12 * second / total + 1))
                place[axis, y, x] = mean
    return size, place


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 2), (4, 4), (9, 12)], ids=str)
def test_moments_are_those_of_the_window(shape):
    maps = features(1, 3, *shape)
    heads = AttentionDAM().maps(maps)
    size, place = naive_moments(attention_map(maps)[0].double())
    torch.testing.assert_close(heads.size[0] + 1, size, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(heads.offset[0] - 0.5, place, rtol=1e-4, atol=1e-4)
    assert heads.heat.amax() == 1


def a_block(height: int, width: int, y: slice, x: slice, dtype=torch.float32) -> torch.Tensor:
    maps = torch.zeros(1, 1, height, width, dtype=dtype)
    maps[..., y, x] = 1
    return maps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("y", "x"),
    [
        (slice(5, 8), slice(4, 7)),  # odd sides, in the middle
        (slice(4, 6), slice(9, 13)),  # even sides
        (slice(0, 3), slice(13, 16)),  # in a corner
    ],
    ids=str,
)
def test_a_uniform_block_is_covered_exactly(y, x, dtype):
    """The windows of its peaks hold all of it: one box each, all the same."""
    maps = a_block(16, 16, y, x, dtype)
    found = AttentionDAM(temperature=0.05, overlap="union")(maps, maps)
    assert torch.equal(found.weight[0], maps[0, 0].float())


# -------------------------------------------------------------------------------------------- areas


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (2, 3, 4, 4)], ids=["one cell", "constant"])
@pytest.mark.parametrize("value", [0.0, 2.5])
def test_a_constant_map_has_no_peak_and_is_distilled_everywhere(shape, value):
    maps = torch.full(shape, value)
    found = AttentionDAM()(maps, maps)
    assert not found.coverage.any() and (found.weight == 1).all()
    assert (found.boxes == torch.tensor([0, 0, -1, -1])).all()
    assert found.agreement == 0


def test_rounding_makes_no_peak():
    noise = 1 + 1e-7 * features(4, 8, 7, 7)  # a constant map but for the last bit
    found = AttentionDAM()(noise, noise)
    assert (found.weight == 1).all()


def test_one_row():
    maps = a_map([[0, 0, 0, 0, 9, 0, 0, 0, 0.0]])
    found = AttentionDAM()(maps, maps)
    # A of the cell is e^z with z = sqrt(8), the others e^(-1 / sqrt(8)): in the window of three
    # cells v = 2 / (24.1 + 2), w = sqrt(12 v + 1) = 1.39: centre 4.5, reach 0.19
    assert found.boxes[0, 0].tolist() == [0, 4, 0, 4]
    assert found.weight.tolist() == [[[0, 0, 0, 0, 1, 0, 0, 0, 0]]]
    assert found.boxes.shape == (1, 8, 4) and (found.boxes[0, 1:, 2] == -1).all()


def test_one_hot_corner():
    maps = torch.zeros(1, 2, 8, 8)
    maps[..., 0, 7] = -5
    found = AttentionDAM()(maps, maps)
    want = torch.zeros(8, 8)
    want[0, 7] = 1
    assert torch.equal(found.weight[0], want)
    assert found.boxes[0, 0].tolist() == [0, 7, 0, 7]


def test_two_equal_peaks_in_the_order_of_the_flat_index():
    maps = torch.zeros(1, 1, 9, 9)
    maps[..., 6, 2] = maps[..., 1, 7] = 3
    found = AttentionDAM()(maps, maps)
    assert found.boxes[0, :3].tolist() == [[1, 7, 1, 7], [6, 2, 6, 2], [0, 0, -1, -1]]
    assert found.weight.sum() == 2


def test_fewer_cells_than_areas():
    maps = a_map([[5.0, 0.0], [0.0, 0.0]])
    found = AttentionDAM(k=8)(maps, maps)
    assert found.boxes.shape == (1, 4, 4) and found.boxes[0, 0].tolist() == [0, 0, 0, 0]


def test_a_sample_without_a_peak_does_not_change_the_others():
    maps = torch.zeros(3, 1, 8, 8)
    maps[0, 0, 3, 3] = maps[2, 0, 5, 1] = 4
    found = AttentionDAM()(maps, maps)
    assert found.weight.sum((1, 2)).tolist() == [1, 64, 1]
    assert found.coverage.sum((1, 2)).tolist() == [1, 0, 1]


def test_a_nan_finds_no_area_and_reaches_the_loss():
    student, teacher = features(2, 3, 6, 6), features(2, 4, 6, 6, seed=6)
    teacher[1, 0, 2, 2] = math.nan
    found = AttentionDAM()(student, teacher)
    assert found.agreement.isnan()
    assert not found.coverage[1].any() and (found.weight[1] == 1).all()
    assert found.coverage[0].any()


@pytest.mark.parametrize("whose", ["mutual", "student", "teacher"])
@pytest.mark.parametrize("overlap", ["sum", "square", "union"])
def test_areas_come_from_the_maps_named(whose, overlap):
    student, teacher = features(2, 3, 9, 9), features(2, 4, 9, 9, seed=6)
    dam = AttentionDAM(areas=whose, overlap=overlap, k=3, kernel=5)
    found, sides = dam(student, teacher), (dam.maps(student), dam.maps(teacher))
    parts = {
        "student": sides[0],
        "teacher": sides[1],
        "mutual": (
            (sides[0].heat * sides[1].heat).sqrt(),
            (sides[0].size + sides[1].size) / 2,
            (sides[0].offset + sides[1].offset) / 2,
        ),
    }
    heat, size, offset = parts[whose]
    heat = heat * (heat > heat.mean((2, 3), keepdim=True))
    want = reference.areas(heat, size, offset, k=3, kernel=5)
    assert torch.equal(found.boxes, want.boxes) and torch.equal(found.coverage, want.coverage)
    power = {"sum": want.coverage, "square": want.coverage**2, "union": want.coverage.clamp(max=1)}
    assert torch.equal(found.weight, power[overlap])
    assert torch.equal(dam.find(student, teacher).boxes, want.boxes)
    assert not found.weight.requires_grad and not found.heat.requires_grad


def test_an_empty_batch_is_empty():
    student = features(0, 3, 6, 6).requires_grad_()
    found = AttentionDAM()(student, features(0, 4, 6, 6))
    found.agreement.backward()
    assert found.agreement == 0 and found.weight.shape == (0, 6, 6)
    assert student.grad.shape == student.shape


def test_channels_last_gives_the_same():
    student, teacher = features(2, 3, 8, 8), features(2, 4, 8, 8, seed=6)
    last = [side.to(memory_format=torch.channels_last) for side in (student, teacher)]
    dam = AttentionDAM()
    want, got = dam(student, teacher), dam(*last)
    torch.testing.assert_close(got.agreement, want.agreement)
    assert torch.equal(got.boxes, want.boxes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing_of_float32_maps(dtype):
    student, teacher = features(2, 3, 8, 8), features(2, 4, 8, 8, seed=6)
    dam = AttentionDAM()
    want = dam(student, teacher)
    with torch.autocast("cpu", dtype=dtype):
        got = dam(student, teacher)
    assert got.agreement.dtype == torch.float32
    assert torch.equal(got.agreement, want.agreement) and torch.equal(got.boxes, want.boxes)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"temperature": 0}, "temperature must be positive and finite, got 0"),
        ({"temperature": math.inf}, "temperature must be positive and finite, got inf"),
        ({"temperature": "1"}, "temperature must be positive and finite, got '1'"),
        ({"areas": "both"}, "areas must be 'mutual' or 'student' or 'teacher', got 'both'"),
        ({"overlap": "max"}, "overlap must be 'sum' or 'square' or 'union', got 'max'"),
        ({"k": 0}, "k must be positive, got 0"),
        ({"kernel": 4}, "kernel must be odd, got 4"),
    ],
)
def test_bad_options_are_refused(options, text):
    with pytest.raises(ValueError) as caught:
        AttentionDAM(**options)
    assert str(caught.value) == f"AttentionDAM: {text}"


# ---------------------------------------------------------------------------------------- in a SoKD

ATTENTION = {"heads": "attention"}


def test_it_reads_the_students_own_map_and_needs_no_adapter():
    kd = make(**ATTENTION, attention_temperature=0.8)
    kd.eval()
    student, teacher = pair((2, 3, 8, 8), (2, 4, 4, 4))
    (match,) = kd.match(student, teacher, draw=kd.policy.draw(2))
    assert kd.dam.temperature == 0.8 and not list(kd.dam.parameters())
    want = kd.dam(student, match.refined, scale=kd.lambda_agreement)
    for got, expected in zip(match.attention, want, strict=True):
        assert torch.equal(got, expected)
    alone = make(**ATTENTION, adapter=None)
    (match,) = alone.match(student, teacher, adapt=False)
    assert match.student is not None and match.attention.agreement > 0
    with pytest.raises(ValueError, match="have the teacher's shape"):
        alone.match(student, teacher)


def test_the_loss_of_a_student_that_attends_as_the_teacher_does():
    kd = make(4, 4, **ATTENTION, policy=None, adapter=None, lambda_areas=0.0)
    _, teacher = pair()
    assert kd(teacher.clone().requires_grad_(), teacher) == 0
    assert kd(teacher.flip(3).requires_grad_(), teacher) > 0


@compiles
@pytest.mark.parametrize("base", ["keep", "replace"])
def test_it_compiles_in_one_graph(base):
    torch._dynamo.reset()
    kd, (student, teacher) = make(**ATTENTION, base=base).eval(), pair()
    want = rewound(kd)(student, teacher)
    compiled = torch.compile(lambda f_s, f_t: sokd.loss(f_s, f_t, kd), fullgraph=True,
                             backend="aot_eager")  # fmt: skip
    rewound(kd)
    got = compiled(student, teacher)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got, student)[0], torch.autograd.grad(want, student)[0]
    )


def test_at_and_attention_resize_alike():
    """The student's map is brought to the teacher's size before anything is read of it."""
    student, teacher = features(2, 3, 8, 8), features(2, 4, 4, 4, seed=6)
    small = F.adaptive_avg_pool2d(student, (4, 4))
    dam = AttentionDAM()
    assert torch.equal(dam(student, teacher).agreement, dam(small, teacher).agreement)
    assert torch.equal(at(student, teacher), at(small, teacher))
