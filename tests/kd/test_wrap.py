"""`sokd.wrap`: any loss with its own signature, its features refined and masked."""

import copy
import functools
import pickle
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from support.cases import compiles
from support.kd_cases import features, make, pair, rewound, trained
from support.raises import raises
from torch import nn

from sokd.kd.plugin import wrap
from sokd.kd.sokd import loss
from sokd.ops.torch_internals import RELEASE

traces_methods = pytest.mark.skipif(
    RELEASE < (2, 6), reason="the compiler of torch 2.5 does not trace methods of others"
)


def test_a_squared_error_is_sokd_loss():
    kd, (f_s, f_t) = make(lambda_areas=1.0), pair()
    value = wrap(F.mse_loss, kd)(f_s, f_t)
    torch.testing.assert_close(value, loss(f_s, f_t, rewound(kd)))


def test_its_gradients_are_sokd_loss_too():
    kd, (f_s, f_t) = make(lambda_areas=1.0), pair()
    wanted = [f_s, *kd.parameters()]
    found = torch.autograd.grad(wrap(F.mse_loss, kd)(f_s, f_t), wanted)
    expected = torch.autograd.grad(loss(f_s, f_t, rewound(kd)), wanted)
    for actual, other in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-4, atol=1e-6)


def test_the_agreement_can_be_added_by_hand():
    kd, (f_s, f_t) = make(), pair()
    together = wrap(F.l1_loss, kd)(f_s, f_t)
    apart = wrap(F.l1_loss, rewound(kd), agreement=False)
    torch.testing.assert_close(apart(f_s, f_t) + apart.agreement, together)


def scaled(teacher, student, *, scale=2.0, offset=0.0):
    return scale * F.l1_loss(student, teacher) + offset


def test_the_signature_is_that_of_the_loss():
    kd, (f_s, f_t) = make(), pair()
    wrapped = wrap(scaled, kd, student="student", teacher="teacher")
    first = wrapped(f_t, f_s, scale=3.0)
    calls = [
        lambda: wrapped(teacher=f_t, student=f_s, scale=3.0),
        lambda: wrapped(f_t, student=f_s, scale=3.0),
        lambda: wrap(scaled, kd, student=1, teacher=0)(f_t, f_s, scale=3.0),
        lambda: wrap(scaled, kd, student=1, teacher=0)(student=f_s, teacher=f_t, scale=3.0),
        lambda: wrapped(f_t, f_s, scale=3.0, offset=1.0) - 1.0,
    ]
    for call in calls:
        rewound(kd)
        torch.testing.assert_close(call(), first)


def test_a_modules_names_are_its_forwards():
    kd, (f_s, f_t) = make(), pair()
    wrapped = wrap(nn.SmoothL1Loss(beta=0.5), kd)
    expected = wrapped(f_s, f_t)
    for call in (lambda: wrapped(input=f_s, target=f_t), lambda: wrapped(f_s, target=f_t)):
        rewound(kd)
        torch.testing.assert_close(call(), expected)


def of_a_task(logits, y, f_s, f_t, *, share=0.5):
    return (1 - share) * F.cross_entropy(logits, y) + share * F.mse_loss(f_s, f_t)


class Owner:
    """Losses as bound methods."""

    def feature_loss(self, f_s, f_t):
        return F.mse_loss(f_s, f_t)

    def __call__(self, f_s, f_t):
        return self.feature_loss(f_s, f_t)


def test_features_behind_other_arguments():
    kd, (f_s, f_t) = make(), pair()
    logits, y = torch.randn(len(f_s), 5, requires_grad=True), torch.arange(len(f_s))
    wrapped = wrap(of_a_task, kd, student="f_s", teacher="f_t", agreement=False)
    value = wrapped(logits, y, f_s, f_t=f_t, share=0.25)
    features_alone = wrap(F.mse_loss, rewound(kd), agreement=False)(f_s, f_t)
    torch.testing.assert_close(value, 0.75 * F.cross_entropy(logits, y) + 0.25 * features_alone)
    rewound(kd)
    torch.testing.assert_close(wrap(of_a_task, kd, student=2, teacher=3, agreement=False)(
        logits, y, f_s, f_t, share=0.25), value)  # fmt: skip
    value.backward()
    assert logits.grad.abs().sum() > 0 and f_s.grad.abs().sum() > 0


@pytest.mark.parametrize("any_loss", [Owner(), Owner().feature_loss, functools.partial(F.mse_loss)])
def test_methods_objects_and_partials(any_loss):
    kd, (f_s, f_t) = make(), pair()
    expected = wrap(F.mse_loss, kd)(f_s, f_t)
    torch.testing.assert_close(wrap(any_loss, rewound(kd))(f_s, f_t), expected)


@pytest.mark.parametrize("kind", [dict, tuple])
def test_a_dict_or_a_tuple_is_handed_on(kind):
    def parts(f_s, f_t):
        value = F.mse_loss(f_s, f_t)
        return {"loss_feature": value, "count": 1} if kind is dict else (value, f_s)

    kd, (f_s, f_t) = make(), pair()
    wrapped = wrap(parts, kd, agreement=False)
    result = wrapped(f_s, f_t)
    value = result["loss_feature"] if kind is dict else result[0]
    together = wrap(F.mse_loss, rewound(kd))(f_s, f_t)
    torch.testing.assert_close(value + wrapped.agreement, together)


def test_a_result_of_one_number():
    kd, (f_s, f_t) = make(), pair()
    value = wrap(lambda *maps: F.mse_loss(*maps)[None], kd)(f_s, f_t)
    torch.testing.assert_close(value, wrap(F.mse_loss, rewound(kd))(f_s, f_t)[None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    kd, (f_s, f_t) = make(), pair()
    expected = wrap(F.mse_loss, kd)(f_s, f_t)
    rewound(kd)
    with torch.autocast("cpu", dtype=dtype):
        value = wrap(F.mse_loss, kd)(f_s.to(dtype), f_t)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=0.05, atol=0.05)


def test_a_loss_without_names():
    kd, (f_s, f_t) = make(), pair()
    wrapped = wrap(lambda *maps: F.mse_loss(*maps), kd)
    torch.testing.assert_close(wrapped(f_s, f_t), wrap(F.mse_loss, rewound(kd))(f_s, f_t))


def test_lists_stay_lists():
    kd = make([3, 3], [4, 4])
    seen = []

    def total(students, teachers):
        seen.append((type(students), type(teachers), len(students)))
        return sum(F.mse_loss(s, t) for s, t in zip(students, teachers, strict=True))

    students = [features(2, 3, 6, 6), features(2, 3, 3, 3)]
    assert wrap(total, kd)(students, [features(2, 4, 6, 6), features(2, 4, 3, 3)]).isfinite()
    assert seen == [(list, list, 2)]


def test_tokens_come_as_maps():
    kd = make()
    shapes = []

    def seen(f_s, f_t):
        shapes.append((f_s.shape, f_t.shape))
        return f_s.sum() * 0

    wrap(seen, kd)(features(2, 37, 3), features(2, 16, 4))
    assert shapes == [((2, 4, 4, 4),) * 2]


@pytest.mark.parametrize("part", ["dam", "policy", "adapter"])
def test_each_part_can_be_left_out(part):
    f_s, f_t = features(2, 4, 6, 6).requires_grad_(), features(2, 4, 6, 6, seed=6)
    kd = make(4, 4, **{part: None})
    value = wrap(F.mse_loss, kd)(f_s, f_t)
    value.backward()
    assert f_s.grad.abs().sum() > 0
    if part == "dam":
        assert wrap(F.mse_loss, kd, agreement=True)(f_s, f_t).isfinite()


def test_a_module_keeps_its_parameters():
    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, f_s, f_t):
            return self.scale * F.mse_loss(f_s, f_t)

    wrapped = wrap(Learned(), make())
    assert {"any_loss.scale", "kd.adapter.match.weight"} <= dict(wrapped.named_parameters()).keys()
    assert not any("policy" in name for name, _ in wrapped.named_parameters())
    wrapped(*pair()).backward()
    assert all(parameter.grad is not None for parameter in wrapped.parameters())


def test_the_figures_are_left_in_kd():
    kd, (f_s, f_t) = make(), pair()
    value = wrap(F.mse_loss, kd, agreement=False)(f_s, f_t)
    torch.testing.assert_close(kd.diagnostics()["areas"], value.detach())
    assert kd.diagnostics()["agreement"] > 0


@compiles
@pytest.mark.parametrize(
    ("any_loss", "agreement"),
    [
        (F.mse_loss, True),
        (nn.MSELoss(), False),
        pytest.param(Owner().feature_loss, True, marks=traces_methods),
    ],
)
def test_it_compiles_in_one_graph(any_loss, agreement):
    torch._dynamo.reset()
    kd, (f_s, f_t) = make(), pair()
    wrapped = wrap(any_loss, kd, agreement=agreement)
    expected = wrapped(f_s, f_t), wrapped.agreement
    rewound(kd)
    value = torch.compile(wrapped, fullgraph=True, backend="eager")(f_s, f_t)
    torch.testing.assert_close((value, wrapped.agreement), expected)


@pytest.mark.parametrize("agreement", [True, False])
def test_copies_are_apart(agreement):
    wrapped = wrap(F.mse_loss, make(), agreement=agreement)
    wrapped(*pair())  # its graph cannot be copied
    twins = copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))
    assert all(twin.agreement is None for twin in twins)
    expected = wrapped(*pair())
    for twin in twins:
        torch.testing.assert_close(twin(*pair()), expected)


def test_nothing_of_a_step_is_kept():
    wrapped, (f_s, f_t) = wrap(F.mse_loss, make()), pair()
    wrapped(f_s, f_t)
    gone = weakref.ref(f_s)
    del f_s
    assert gone() is None, "no graph holds the features"


def test_teacher_gradients_are_warned_of():
    f_s, f_t = pair()
    with pytest.warns(UserWarning, match="teacher_features require grad"):
        wrap(F.mse_loss, make())(f_s, f_t.requires_grad_())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap(F.mse_loss, make())(*pair())


WRONG = {
    "no loss": (lambda: wrap(3, make()), "wrap: any_loss must be callable, got int"),
    "no kd":
        (lambda: wrap(F.mse_loss, nn.Identity()), "wrap: kd must be a sokd.SoKD, got Identity"),
    "no such argument":
        (lambda: wrap(scaled, make(), student="f_s", teacher="teacher")(*pair()),
         "wrap: student must be among the arguments of any_loss as 'f_s', got [0, 1]"),
    "an invalid position":
        (lambda: wrap(scaled, make(), student=-1),
         "wrap: student must be a position (0 or more) or a name, got -1"),
    "no place":
        (lambda: wrap(scaled, make(), teacher=True),
         "wrap: teacher must be a position (0 or more) or a name, got True"),
    "no tensor":
        (lambda: wrap(lambda f_s, f_t: {"loss": f_s.sum()}, make())(*pair()),
         "wrap: any_loss must return a scalar tensor to add the agreement to (agreement=False "
         "leaves it in .agreement), got dict"),
    "no scalar":
        (lambda: wrap(lambda f_s, f_t: f_s.sum((1, 2, 3)), make())(*pair()),
         "wrap: any_loss must return a scalar tensor to add the agreement to (agreement=False "
         f"leaves it in .agreement), got shape [{len(pair()[0])}]"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "text"), WRONG.values(), ids=WRONG)
def test_what_is_refused(call, text):
    with raises(TypeError, text):
        call()


LEAD = (
    "select features [B, C, H, W] or [B, N, C], or a list of them, among the arguments of any_loss"
)
ELSEWHERE = {
    "logits first":
        (lambda: wrap(of_a_task, make())(torch.randn(2, 5), torch.arange(2), *pair()),
         f"wrap: student must {LEAD}, got float32 [2, 5] at 0"),
    "a dict":
        (lambda: wrap(F.mse_loss, make())(pair()[0], {"map": pair()[1]}),
         f"wrap: teacher must {LEAD}, got dict at 1"),
    "one for both":
        (lambda: wrap(F.mse_loss, make(), student=1, teacher="target")(*pair()),
         "wrap: teacher must be another argument of any_loss than student, got 1 for both"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "text"), ELSEWHERE.values(), ids=ELSEWHERE)
def test_arguments_that_are_no_features(call, text):
    with raises(ValueError, text):
        call()


def test_places_that_are_swapped():
    def loss_of(teacher_maps, student_maps):
        return F.mse_loss(student_maps, teacher_maps)

    kd = trained(3, 4, heat_channels=3)
    rule = "be the argument of the student's features"
    text = f"wrap: student must {rule}, got 0, which is 'teacher_maps'"
    with raises(ValueError, text):
        wrap(loss_of, kd)
    with pytest.raises(ValueError, match="got 'teacher_maps', which is 'teacher_maps'"):
        wrap(loss_of, kd, student="teacher_maps", teacher=0)
    assert wrap(loss_of, kd, student=1, teacher=0) is not None
    assert wrap(lambda student_teacher, y: y, kd) is not None, "a name of both sides is no mistake"
