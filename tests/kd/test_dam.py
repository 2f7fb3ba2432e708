"""DAM: heads, agreement, areas and weights, against the formulas written out head by head."""

import pytest
import torch
import torch.nn.functional as F
from support.raises import raises
from torch import Tensor

from sokd import reference
from sokd.kd.dam import DAM


def maps_written_out(dam: DAM, features: Tensor) -> dict[str, Tensor]:
    """The three heads one by one, each with its own first convolution."""
    channels, height, width = features.shape[1:]
    raw = {}
    for index, name in enumerate(("heat", "offset", "size")):
        rows = slice(index * channels, (index + 1) * channels)
        hidden = F.conv2d(features, dam.first.weight[rows], dam.first.bias[rows], padding=1).relu()
        head = getattr(dam, name)
        raw[name] = F.conv2d(hidden, head.weight, head.bias)
    if dam.heads == "paper":
        return {name: part.clamp(min=0) for name, part in raw.items()}
    side = torch.tensor([width, height], dtype=features.dtype)[:, None, None]
    return {
        "heat": raw["heat"].sigmoid(),
        "offset": raw["offset"].sigmoid(),
        "size": side * (raw["size"] - 1).sigmoid(),
    }


def agreement_written_out(dam: DAM, student: Tensor, teacher: Tensor) -> Tensor:
    sides = [
        torch.cat(list(maps_written_out(dam, side).values()), dim=1)
        for side in (student, teacher.detach())
    ]
    return (sides[0] - sides[1]).square().mean()


def a_pair(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(*shape, generator=generator, dtype=dtype) for _ in range(2))
    return student.requires_grad_(), teacher


@pytest.fixture(params=["bounded", "paper"])
def dam(request) -> DAM:
    torch.manual_seed(1)
    return DAM(3, heat_channels=5, heads=request.param, k=2).double()


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (1, 3, 5, 3), (2, 3, 1, 1)], ids=str)
def test_heads_are_the_formulas(dam, shape):
    features, _ = a_pair(*shape)
    got, want = dam.maps(features)._asdict(), maps_written_out(dam, features)
    assert got.keys() == want.keys()
    for name, part in want.items():
        torch.testing.assert_close(got[name], part)


def test_bounded_heads_stay_in_their_ranges():
    dam = DAM(3, heat_channels=4)
    maps = dam.maps(100 * torch.randn(2, 3, 4, 6))
    assert maps.heat.min() >= 0 and maps.heat.max() <= 1
    assert maps.offset.min() >= 0 and maps.offset.max() <= 1
    assert maps.size[:, 0].max() <= 6 and maps.size[:, 1].max() <= 4
    assert maps.size[:, 0].max() > 4, "width and height are exchanged"


@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_agreement_is_the_mean_over_all_entries_with_the_gradients_of_both_sides(dam, scale):
    student, teacher = a_pair(2, 3, 4, 5)
    got, want = (
        dam(student, teacher, scale=scale).agreement,
        scale * agreement_written_out(dam, student, teacher),
    )
    torch.testing.assert_close(got, want)
    inputs = [student, *dam.parameters()]
    of_both = (torch.autograd.grad(value, inputs) for value in (got, want))
    for d_got, d_want in zip(*of_both, strict=True):
        torch.testing.assert_close(d_got, d_want)


def test_the_teacher_gets_no_gradient(dam):
    student, teacher = a_pair(2, 3, 4, 4)
    teacher.requires_grad_()
    dam(student, teacher).agreement.backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_the_teachers_half_has_no_input_gradient(dam):
    """Both sides in one batch would compute one that nothing reads."""
    student, teacher = a_pair(2, 3, 4, 4)
    read = []
    dam.first.register_forward_pre_hook(
        lambda _, inputs: read.append((len(inputs[0]), inputs[0].requires_grad))
    )
    dam(student, teacher.requires_grad_())
    assert sorted(read) == [(2, False), (2, True)]


def test_equal_features_agree_exactly(dam):
    _, teacher = a_pair(2, 3, 4, 4)
    assert dam(teacher, teacher).agreement == 0


@pytest.mark.parametrize("whose", ["mutual", "student", "teacher"])
def test_areas_come_from_the_maps_named(whose):
    torch.manual_seed(2)
    dam = DAM(3, heat_channels=5, areas=whose, k=3, kernel=5)
    student, teacher = a_pair(2, 3, 6, 7, dtype=torch.float32)
    found = dam(student, teacher)
    of_student, of_teacher = dam.maps(student.detach()), dam.maps(teacher)
    heat, size, offset = of_teacher if whose == "teacher" else of_student
    other = tuple(of_teacher) if whose == "mutual" else None
    want = reference.areas(heat.detach(), size, offset, k=3, kernel=5, teacher=other)
    assert torch.equal(found.boxes, want.boxes)
    assert torch.equal(found.coverage, want.coverage)
    assert not any(each.requires_grad for each in (found.coverage, found.weight, found.heat))


def one_peak(**options) -> DAM:
    """Heads of one channel that pass the map on: heat sigmoid(x), offset 1/2, size side / 2."""
    dam = DAM(1, heat_channels=1, **options)
    with torch.no_grad():
        for parameter in dam.parameters():
            parameter.zero_()
        dam.first.weight[0, 0, 1, 1] = 1
        dam.heat.weight.fill_(1)
        dam.size.bias.fill_(1)
    return dam


def test_a_case_by_hand():
    features = torch.zeros(1, 1, 4, 4)
    features[0, 0, 1, 2] = 3.0
    # centre x 2.5, y 1.5, width and height 4 / 2: columns 1.5 .. 3 (3.5 clamped), rows 0.5 .. 2.5
    want = torch.tensor([[0.0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0]])
    found = one_peak(k=1)(features, features)
    assert found.boxes.tolist() == [[[0, 1, 2, 3]]]
    assert torch.equal(found.coverage[0], want)


@pytest.mark.parametrize(
    ("overlap", "weights"), [("sum", [0.0, 1, 2]), ("square", [0.0, 1, 4]), ("union", [0.0, 1, 1])]
)
def test_overlapping_areas_are_weighted(overlap, weights):
    features = torch.zeros(1, 1, 1, 8)
    features[0, 0, 0, 2], features[0, 0, 0, 4] = 3.0, 2.0
    # width 8 / 2, height 1 / 2: columns 0.5 .. 4.5 and 2.5 .. 6.5, rows 0.25 .. 0.75
    found = one_peak(k=2, overlap=overlap)(features, features)
    want = torch.tensor([1.0, 1, 2, 2, 2, 1, 1, 0])
    assert torch.equal(found.coverage[0, 0], want)
    assert torch.equal(found.weight[0, 0], torch.tensor(weights)[want.long()])


def test_an_empty_batch_is_empty(dam):
    student, teacher = a_pair(0, 3, 4, 4)
    found = dam(student, teacher)
    found.agreement.backward()
    assert found.agreement == 0
    assert found.weight.shape == (0, 4, 4)
    assert student.grad.shape == (0, 3, 4, 4)


def test_channels_last_gives_the_same():
    torch.manual_seed(2)
    dam = DAM(3, heat_channels=5)
    student, teacher = a_pair(2, 3, 6, 6, dtype=torch.float32)
    want = dam(student, teacher)
    last = [side.detach().to(memory_format=torch.channels_last) for side in (student, teacher)]
    got = dam.to(memory_format=torch.channels_last)(*last)
    torch.testing.assert_close(got.agreement, want.agreement)
    torch.testing.assert_close(got.heat, want.heat)


@pytest.mark.parametrize(("options", "text"), [
    ({"channels": 0}, "DAM: channels must be positive, got 0"),
    ({"heat_channels": 0}, "DAM: heat_channels must be positive, got 0"),
    ({"heads": "free"}, "DAM: heads must be 'bounded' or 'paper', got 'free'"),
    ({"areas": "both"}, "DAM: areas must be 'mutual' or 'student' or 'teacher', got 'both'"),
    ({"overlap": "max"}, "DAM: overlap must be 'sum' or 'square' or 'union', got 'max'"),
    ({"k": 0}, "DAM: k must be positive, got 0"),
    ({"k": 2.5}, "DAM: k must be a whole number, got 2.5"),
    ({"kernel": 2}, "DAM: kernel must be odd, got 2"),
    ({"kernel": 0}, "DAM: kernel must be positive, got 0"),
])  # fmt: skip
def test_bad_options_are_refused(options, text):
    with raises(ValueError, text):
        DAM(**{"channels": 3, **options})
