"""sokd.loss: values, gradients, options, ablations, shapes and layers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.kd_cases import FixedMask, features, make, pair, rewound, trained
from support.raises import raises
from torch import Tensor, nn

from sokd import reference
from sokd.kd.dam import DAM
from sokd.kd.features import tokens_to_map
from sokd.kd.policy import Policy
from sokd.kd.sokd import SoKD, loss

# ------------------------------------------------------------------------------------------- values


def test_by_hand_without_any_part():
    kd = trained(1, 1, adapter=None, policy=None, dam=None, lambda_areas=2.0)
    student = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]], requires_grad=True)
    teacher = torch.tensor([[[[0.0, 2.0], [1.0, 1.0]]]])
    value = loss(student, teacher, kd)
    value.backward()
    assert value.item() == 2 * (1 + 0 + 4 + 9) / 4
    assert student.grad.tolist() == [[[[1.0, 0.0], [2.0, 3.0]]]]


@pytest.mark.parametrize(
    ("normalise", "value", "gradient"),
    [("elements", 2 * (2 * 1 + 9) / 4, 1.0), ("area", 2 * (2 * 1 + 9) / 3, 4 / 3)],
)
def test_by_hand_with_a_mask(normalise, value, gradient):
    mask = FixedMask(torch.tensor([[[2.0, 0.0], [0.0, 1.0]]]))
    kd = trained(1, 1, adapter=None, policy=None, dam=mask, lambda_areas=2.0, normalise=normalise)
    student = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]], requires_grad=True)
    got = loss(student, torch.tensor([[[[0.0, 2.0], [1.0, 1.0]]]]), kd)
    got.backward()
    assert got.item() == pytest.approx(value)
    assert student.grad[0, 0, 0, 0].item() == pytest.approx(2 * gradient)
    assert student.grad[0, 0, 0, 1] == student.grad[0, 0, 1, 0] == 0


def written_out(kd: SoKD, student: Tensor, teacher: Tensor, draw) -> dict[str, Tensor]:
    """docs/method.md 2 to 4, one line each, in plain PyTorch."""
    plan = kd.policy.plan(draw, teacher.shape)
    refined = reference.refine(teacher, **plan._asdict())
    adapted = kd.adapter(student, teacher.shape[2:])
    heads_s, heads_t = kd.dam.maps(adapted), kd.dam.maps(refined)
    entries = sum(part.numel() for part in heads_s)
    agreement = sum((s - t).square().sum() for s, t in zip(heads_s, heads_t, strict=True)) / entries
    found = reference.areas(*heads_s, k=kd.dam.k, kernel=kd.dam.kernel, teacher=tuple(heads_t))
    areas = (found.coverage.unsqueeze(1) * (adapted - refined).square()).sum() / adapted.numel()
    agreement, areas = kd.lambda_agreement * agreement, kd.lambda_areas * areas
    return {"agreement": agreement, "areas": areas, "total": agreement + areas}


@pytest.mark.parametrize("counter", range(4))
def test_the_terms_and_gradients_are_those_of_the_formulas(counter):
    kd = make(lambda_agreement=30.0, lambda_areas=7.0).double()
    student, teacher = pair(dtype=torch.float64)
    got = loss(student, teacher, rewound(kd, counter), return_terms=True)
    want = written_out(kd, student, teacher, rewound(kd, counter).policy.draw(2))
    inputs = [student, *kd.parameters()]
    for name, term in want.items():
        torch.testing.assert_close(got[name], term)
    d_got = torch.autograd.grad(got["total"], inputs)
    d_want = torch.autograd.grad(want["total"], inputs)
    for one, other in zip(d_got, d_want, strict=True):
        torch.testing.assert_close(one, other)


def test_the_ways_to_call_it_are_one():
    kd = make()
    student, teacher = pair()
    kd.eval()
    value = loss(student, teacher, rewound(kd))
    assert torch.equal(value, rewound(kd)(student, teacher))
    terms = loss(student, teacher, rewound(kd), return_terms=True)
    assert torch.equal(terms["total"], value)
    assert torch.equal(terms["agreement"] + terms["areas"], value)
    assert torch.equal(rewound(kd)([student], (teacher,)), value)
    assert value.shape == () and value.dtype == torch.float32


def test_without_dam_it_is_the_plain_mean_square_against_refined_features():
    kd = make(dam=None, lambda_areas=3.0)
    student, teacher = pair()
    kd.eval()
    terms = loss(student, teacher, rewound(kd), return_terms=True)
    refined = kd.policy(teacher, rewound(kd).policy.draw(2))
    torch.testing.assert_close(terms["areas"], 3 * F.mse_loss(kd.adapter(student, (6, 6)), refined))
    assert terms["agreement"] == 0


def test_without_policy_the_teacher_is_as_it_is():
    kd = make(policy=None, dam=None, lambda_areas=1.0).eval()
    student, teacher = pair()
    expected = F.mse_loss(kd.adapter(student, (6, 6)), teacher)
    torch.testing.assert_close(loss(student, teacher, kd), expected)


@pytest.mark.parametrize("options", [{}, {"policy": None}, {"policy": None, "dam": None}], ids=str)
def test_the_teachers_features_may_come_from_inference_mode(options):
    student, teacher = pair()
    with torch.inference_mode():
        inferred = teacher.clone()
    values = [loss(student, features, make(**options)) for features in (teacher, inferred)]
    assert torch.equal(*values)
    first, second = (torch.autograd.grad(value, student)[0] for value in values)
    assert torch.equal(first, second)


def test_the_teachers_features_may_be_a_file_in_half_precision(tmp_path):
    """Cached features, as rows of a memory map behind a header, under autocast."""
    f_s, f_t = pair()
    shape = (len(f_t) + 3, *f_t.shape[1:])
    file = np.memmap(tmp_path / "features", np.float16, "w+", offset=6, shape=shape)
    file[2:-1] = f_t.half().numpy()
    kd = make()
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(f_s, torch.from_numpy(file)[2:-1], kd)
        wanted = loss(f_s, f_t.half(), rewound(kd))
    assert found == wanted and found.isfinite()


def test_without_adapter_the_student_is_as_it_is():
    kd = make(4, 4, adapter=None, policy=None, dam=None, lambda_areas=1.0)
    student, teacher = pair((2, 4, 6, 6))
    torch.testing.assert_close(loss(student, teacher, kd), F.mse_loss(student, teacher))


def test_parts_can_be_replaced_and_removed_later():
    kd = make()
    student, teacher = pair()
    kd.adapter = nn.Conv2d(3, 4, 1)
    kd.policy = kd.dam = None
    kd.lambda_areas = 1.0
    torch.testing.assert_close(loss(student, teacher, kd), F.mse_loss(kd.adapter(student), teacher))
    kd.policy, kd.dam = Policy(), DAM(4, heat_channels=2)
    assert loss(student, teacher, kd).isfinite()


@pytest.mark.parametrize("options", [
    {"areas": "student"},
    {"areas": "teacher"},
    {"overlap": "square"},
    {"overlap": "union"},
    {"heads": "paper"},
    {"k": 5, "kernel": 5, "heat_channels": 9},
], ids=str)  # fmt: skip
def test_options_reach_their_part(options):
    kd = make(**options)
    for name, value in options.items():
        held = {
            "heat_channels": kd.dam.heat.out_channels,
            "student_size": 6,
            "teacher_size": (6, 6),
        }
        given = getattr(kd.dam, name, held.get(name))
        assert given == value or (name in held and held[name] == value)
    assert loss(*pair(), kd).isfinite()


def test_options_of_the_policy_reach_it():
    kd = make(
        policies=[("rotate", "noise")],
        estimator="relax",
        magnitude_gradient="pathwise",
        granularity="sample",
        generator=torch.Generator().manual_seed(4),
    )
    assert kd.policy.policies == ((4, 6),)
    assert (kd.policy.estimator, kd.policy.magnitude_gradient, kd.policy.granularity) == (
        "relax",
        "pathwise",
        "sample",
    )
    again = make(seed=9, generator=torch.Generator().manual_seed(4))
    assert torch.equal(kd.policy.seed, again.policy.seed)
    assert loss(*pair(), kd).isfinite()


# -------------------------------------------------------------------------------- shapes and layers
@pytest.mark.parametrize(("student", "teacher"), [
    pytest.param((2, 3, 6, 6), (2, 4, 3, 3), id="teacher smaller"),
    pytest.param((2, 3, 4, 4), (2, 4, 8, 8), id="teacher larger"),
    pytest.param((2, 3, 5, 7), (2, 4, 6, 4), id="no ratio"),
    pytest.param((2, 3, 1, 1), (2, 4, 2, 2), id="one cell"),
    pytest.param((2, 3, 1, 9), (2, 4, 2, 3), id="strip"),
    pytest.param((2, 17, 3), (2, 4, 4, 4), id="student tokens"),
    pytest.param((2, 3, 4, 4), (2, 9, 4), id="teacher tokens"),
    pytest.param((2, 16, 3), (2, 18, 4), id="both tokens"),
])  # fmt: skip
def test_any_sizes_and_tokens(student, teacher):
    kd = make()
    student, teacher = pair(student, teacher)
    loss(student, teacher, kd).backward()
    assert student.grad.isfinite().all() and student.grad.abs().sum() > 0


def test_tokens_are_the_map_they_hold():
    kd = make(student_tokens=2, teacher_grid=(2, 6)).eval()
    student, teacher = pair((2, 18, 3), (2, 13, 4))
    maps = tokens_to_map(student, tokens=2), tokens_to_map(teacher, grid=(2, 6))
    torch.testing.assert_close(loss(student, teacher, rewound(kd)), loss(*maps, rewound(kd)))


@pytest.mark.parametrize(("student", "teacher", "said"), [
    ((2, 3, 10, 20), (2, 200, 4),
     "teacher_features must have the aspect of the other side's map (see teacher_grid= of SoKD), "
     "got 10 x 20 and 14 x 14"),
    ((2, 144, 3), (2, 4, 9, 16),
     "student_features must have the aspect of the other side's map (see student_grid= of SoKD), "
     "got 12 x 12 and 9 x 16"),
    ((2, 3, 20, 10), (2, 4, 10, 20),
     "teacher_features must have the student's height and width, not transposed, "
     "got 20 x 10 and 10 x 20"),
], ids=["teacher's tokens", "student's tokens", "transposed"])  # fmt: skip
def test_maps_of_two_aspects(student, teacher, said):
    with raises(ValueError, f"loss: {said}"):
        loss(*pair(student, teacher), make())


def test_several_layers_add_up_with_one_draw_and_noise_of_their_own():
    kd = make([3, 5], [4, 2]).eval()
    shapes = [((2, 3, 6, 6), (2, 4, 6, 6)), ((2, 5, 3, 3), (2, 2, 4, 4))]
    students, teachers = zip(*(pair(*shape) for shape in shapes), strict=True)
    got = loss(list(students), list(teachers), rewound(kd), return_terms=True)
    draw = rewound(kd).policy.draw(2)
    want = {"agreement": 0.0, "areas": 0.0}
    for index, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        refined = kd.policy(teacher, draw, layer=index)
        single = trained(1, 1, adapter=kd.adapter[index], dam=kd.dam[index], policy=None)
        single.student_channels, single.teacher_channels = [student.shape[1]], [teacher.shape[1]]
        for name, term in single.terms(student, refined).items():
            want[name] = want.get(name, 0) + term
    for name, term in want.items():
        torch.testing.assert_close(got[name], term)
    assert kd.policy.counter == 1


def test_layers_may_have_their_own_options_and_share_a_module():
    options = {"student_size": [6, None], "teacher_size": [3, None], "teacher_tokens": [None, 0]}
    kd = make([3, 3], [4, 4], **options)
    assert [adapter.match.stride for adapter in kd.adapter] == [(2, 2), (1, 1)]
    kd.dam = DAM(4, heat_channels=2, k=1)
    students, teachers = [pair()[0]] * 2, [features(2, 4, 3, 3), features(2, 9, 4)]
    assert loss(students, teachers, kd).isfinite()


def test_an_empty_batch_gives_zero():
    kd = make().eval()
    student, teacher = pair((0, 3, 6, 6), (0, 4, 6, 6))
    value = loss(student, teacher, kd)
    value.backward()
    assert value == 0
    assert student.grad.shape == student.shape


def test_nan_features_are_seen_in_the_loss():
    kd = make(dam=None)
    student, teacher = pair()
    assert loss(student, teacher.fill_(float("nan")), kd).isnan()


def test_channels_last_gives_the_same_and_stays():
    kd = make().eval()
    student, teacher = pair()
    want = loss(student, teacher, rewound(kd))
    d_want = torch.autograd.grad(want, student)[0]
    kd = kd.to(memory_format=torch.channels_last)
    last = student.detach().to(memory_format=torch.channels_last).requires_grad_()
    got = loss(last, teacher.to(memory_format=torch.channels_last), rewound(kd))
    d_got = torch.autograd.grad(got, last)[0]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(d_got, d_want, rtol=1e-4, atol=1e-4)
    assert d_got.is_contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------- gradients
def test_training_gives_the_policy_and_the_teacher_no_gradient():
    kd = make()
    student, teacher = pair()
    loss(student, teacher, kd).backward()
    assert all(parameter.grad is None for parameter in kd.policy.parameters())
    assert all(parameter.grad is not None for parameter in kd.parameters())
    assert teacher.grad is None


@pytest.mark.parametrize("method", ["terms", "consistency"])
def test_the_search_gets_the_policys_gradient(method):
    kd = make(policies=[("noise", "rotate")])
    student, teacher = pair()
    draw = kd.policy.draw(2)
    value = getattr(kd, method)(student, teacher, draw=draw, differentiable=True)
    value = value["total"] if method == "terms" else value
    chi = torch.autograd.grad(value, [kd.policy.beta, kd.policy.magnitude], retain_graph=True)
    assert all(gradient.abs().sum() > 0 for gradient in chi)
    assert torch.autograd.grad(value, student)[0].abs().sum() > 0


def test_the_search_sees_the_value_of_training():
    kd = make().eval()
    student, teacher = pair()
    draw = kd.policy.draw(2)
    want = kd.terms(student, teacher, draw=draw)
    got = kd.terms(student, teacher, draw=draw, differentiable=True)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_consistency_is_half_the_mean_square():
    kd = make().eval()
    student, teacher = pair()
    draw = kd.policy.draw(2)
    got = kd.consistency(student, teacher, draw=draw)
    want = F.mse_loss(kd.policy(teacher, draw), kd.adapter(student, (6, 6))) / 2
    torch.testing.assert_close(got, want)
    found, wanted = (torch.autograd.grad(value, student)[0] for value in (got, want))
    torch.testing.assert_close(found, wanted)


def test_under_no_grad_it_is_only_a_value():
    kd = make()
    with torch.no_grad():
        assert not loss(*pair(), kd).requires_grad
