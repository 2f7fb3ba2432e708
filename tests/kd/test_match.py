"""SoKD.match: the effect of each option, and its agreement with all its callers."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from support.kd_cases import features, make, pair, rewound
from torch import Tensor, nn

import sokd
from sokd.kd.dam import DAM, masked

COUNTER = 5  # of a draw whose gates fire


def matched(kd: sokd.SoKD, student: Tensor, teacher: Tensor, **options) -> sokd.Match:
    """The match of the only layer, always from the same draw."""
    (match,) = rewound(kd, COUNTER).match(student, teacher, **options)
    return match


def test_it_adapts_refines_and_attends():
    kd, (student, teacher) = make().eval(), pair()
    match = matched(kd, student, teacher)
    draw = rewound(kd, COUNTER).policy.draw(2)
    assert torch.equal(match.student, kd.adapter(student, (6, 6)))
    assert torch.equal(match.refined, kd.policy(teacher, draw))
    assert not torch.equal(match.refined, teacher)
    expected = kd.dam(match.student, match.refined, scale=kd.lambda_agreement)
    for got, want in zip(match.attention, expected, strict=True):
        assert torch.equal(got, want)
    assert not match.refined.requires_grad and match.student.requires_grad


def test_a_draw_of_its_own_or_the_one_that_is_given():
    kd, (student, teacher) = make().eval(), pair()
    draw = kd.policy.draw(2)
    given = [kd.match(student, teacher, draw=draw)[0].refined for _ in range(2)]
    assert torch.equal(*given) and kd.policy.counter == 1
    kd.match(student, teacher)
    assert kd.policy.counter == 2


def test_one_draw_for_all_layers():
    kd = make([3, 3], [4, 4]).eval()
    student, teacher = pair()
    matches = kd.match([student, student], [teacher, teacher])
    assert len(matches) == 2 and kd.policy.counter == 1


def test_without_refinement_the_teacher_is_clean_and_no_draw_is_taken():
    kd, (student, teacher) = make().eval(), pair()
    match = matched(kd, student, teacher, refine=False)
    assert torch.equal(match.refined, teacher) and not match.refined.requires_grad
    assert kd.policy.counter == COUNTER
    assert match.attention is not None


@pytest.mark.parametrize("without", ["option", "part"])
def test_without_attention_the_dam_does_not_run(without):
    kd, (student, teacher) = make().eval(), pair()
    kd.dam.register_forward_pre_hook(lambda *_: pytest.fail("the DAM ran"))
    if without == "part":
        kd.dam = None
    assert matched(kd, student, teacher, attend=without == "part").attention is None


def test_without_adaption_the_students_map_is_as_given():
    kd, (student, teacher) = make().eval(), pair()
    match, adapted = matched(kd, student, teacher, adapt=False), matched(kd, student, teacher)
    assert match.student.data_ptr() == student.data_ptr()
    assert torch.equal(match.refined, adapted.refined)
    assert torch.equal(match.attention.coverage, adapted.attention.coverage)
    assert torch.equal(match.attention.agreement, adapted.attention.agreement)


def test_without_adaption_nor_dam_no_adapter_runs():
    kd, (student, teacher) = make(dam=None), pair((2, 3, 5, 7))
    kd.adapter.register_forward_pre_hook(lambda *_: pytest.fail("the adapter ran"))
    assert matched(kd, student, teacher, adapt=False).student.shape == (2, 3, 5, 7)


def test_differentiable_matches_carry_the_policys_gradient():
    kd, (student, teacher) = make(), pair()
    plain, match = (matched(kd, student, teacher, differentiable=flag) for flag in (False, True))
    assert torch.equal(plain.refined, match.refined)
    match.refined.square().sum().backward()
    assert kd.policy.alpha.grad is not None


def test_it_records_nothing_and_warns_of_nothing():
    kd, (student, teacher) = make(), pair()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kd.match(student, teacher.requires_grad_())
    assert not kd.statistics.any()
    assert not kd.match(student, teacher)[0].refined.requires_grad


def test_records_are_the_callers():
    kd, (student, teacher) = make(), pair()
    matches = rewound(kd, COUNTER).match(student, teacher)
    kd.record(matches, kd.distances(matches))
    found, terms = kd.diagnostics(), rewound(kd, COUNTER).terms(student, teacher)
    for name in ("agreement", "areas"):
        torch.testing.assert_close(found[name], terms[name].detach())
    kd.record(matches, [])
    assert kd.diagnostics()["areas"] == 0 and kd.diagnostics()["agreement"] > 0


@pytest.mark.parametrize("normalise", ["elements", "area"])
def test_the_terms_are_made_of_it(normalise):
    kd, (student, teacher) = make(normalise=normalise).eval(), pair()
    match, terms = matched(kd, student, teacher), rewound(kd, COUNTER).terms(student, teacher)
    weight = match.attention.weight
    areas = sokd.ops.masked_mse(match.student, match.refined, weight, normalise=normalise)
    torch.testing.assert_close(terms["areas"], kd.lambda_areas * areas)
    torch.testing.assert_close(terms["agreement"], match.attention.agreement)
    consistency = rewound(kd, COUNTER).consistency(student, teacher)
    torch.testing.assert_close(consistency, F.mse_loss(match.student, match.refined) / 2)


def test_wrap_is_made_of_it():
    kd, (student, teacher) = make().eval(), pair()
    match, seen = matched(kd, student, teacher), []
    wrapped = sokd.wrap(lambda f_s, f_t: seen.extend((f_s, f_t)) or f_s.sum(), rewound(kd, COUNTER))
    wrapped(student, teacher)
    for got, features_of_side in zip(seen, match[:2], strict=True):
        assert torch.equal(got, masked(features_of_side, match.attention.weight))


def test_inspected_areas_are_made_of_it():
    kd, (student, teacher) = make(), pair()
    found = sokd.inspect.areas(kd, student, teacher)[0]["mutual"]
    match = matched(kd.eval(), student, teacher, refine=False)
    assert torch.equal(found.coverage, match.attention.coverage)


@pytest.mark.parametrize("options", [{}, {"adapt": False}, {"attend": False}, {"refine": False}])
def test_features_are_checked_whatever_is_made_of_them(options):
    with pytest.raises(ValueError, match=r"loss: teacher_features must be \[B, 4, H, W\]"):
        make().match(features(2, 3, 6, 6), features(2, 5, 6, 6), **options)


def test_a_parameters_dtype_matters_where_the_map_meets_it():
    kd, (student, teacher) = make(adapter=None, dam=None), pair(dtype=torch.float64)
    assert matched(kd, student, teacher, adapt=False).student.dtype == torch.float64
    kd.dam = DAM(4, k=1)
    with pytest.raises(TypeError, match="student_features must have the dtype"):
        kd.match(student, teacher, adapt=False)


@pytest.mark.parametrize("shared", [False, True])
def test_the_part_of_a_layer(shared):
    parts = nn.ModuleList([nn.ReLU(), nn.ReLU()])
    of_layer = [sokd.kd.sokd.part_of(parts[0] if shared else parts, index) for index in range(2)]
    assert of_layer == [parts[0], parts[0] if shared else parts[1]]
    assert sokd.kd.sokd.part_of(None, 1) is None


# ---------------------------------------------------------------------------------- omega as a mask
def test_the_mask_is_the_root_of_the_weight():
    maps, weight = features(2, 3, 4, 4), features(2, 4, 4, seed=1).square()
    expected = maps * weight.sqrt().unsqueeze(1)
    torch.testing.assert_close(masked(maps, weight), expected)
    assert masked(maps, None) is maps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_masked_map_keeps_its_dtype(dtype):
    weight = torch.tensor([[[3.0]]])
    got = masked(torch.ones(1, 1, 1, 1, dtype=dtype), weight)
    assert got.dtype == dtype
    assert got.item() == torch.tensor(3.0, dtype=torch.float64).sqrt().to(dtype).item()
