"""Layers by name, of any shape; all that is refused or warned of, verbatim."""

import re
import warnings

import pytest
import torch
from support.distiller_cases import SMALL, Net, Shaped, batch, make, models, objective
from support.raises import raises, warns
from torch import nn

from sokd.distiller import Distiller
from sokd.distiller.copies import bare_copy
from sokd.distiller.maps import as_map, check_pair
from sokd.distiller.taps import Tap, layer_pairs
from sokd.kd.features import Layout

MUST = "Distiller: layers must "


@pytest.mark.parametrize(("layers", "pairs"), [
    ("a", [("a", "a")]),
    (["a", "b"], [("a", "a"), ("b", "b")]),
    ([("a", "b")], [("a", "b")]),
    ({"a": "b", "c": "d"}, [("a", "b"), ("c", "d")]),
    ((("a", "b"), "c"), [("a", "b"), ("c", "c")]),
])  # fmt: skip
def test_layers_in_every_form(layers, pairs):
    assert layer_pairs(layers) == pairs


@pytest.mark.parametrize("layers", [[], {}, 3, [("a",)], [3]], ids=str)
def test_layers_in_no_form(layers):
    rule = (
        "be 'auto', a name, a dict of student layer -> teacher layer, or a list of names or such "
        "pairs"
    )
    with pytest.raises(TypeError, match=re.escape(f"{MUST}{rule}, got {layers!r}")):
        make(layers=layers)


@pytest.mark.parametrize("swapped", [{"stem": "third"}, [("stem", "third")]], ids=str)
def test_pairs_are_student_then_teacher(swapped):
    teacher, student = models()
    student.third = nn.Identity()
    pairs = make(models=(teacher, student), layers={"third": "stem"}, example=None).pairs
    assert pairs == [("third", "stem")]
    order = "pairs and dicts go student layer -> teacher layer"
    rule = "be layers of the teacher (named_modules; nearest: 'head')"
    with raises(ValueError, f"{MUST}{rule}, got 'third', a layer of the student: {order}"):
        make(models=(teacher, student), layers=swapped, example=None)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("stage3", "'stage2', 'stage1', 'stage2.2'"), ("satge1", "'stage1', 'stage2.1', 'stage1.2'")],
)
def test_the_nearest_names(name, nearest):
    rule = f"be layers of the student (named_modules; nearest: {nearest})"
    with raises(ValueError, f"{MUST}{rule}, got {name!r}"):
        make(layers=name)


def test_a_name_like_none_of_them():
    text = (
        "(named_modules; nearest: 'stem', 'stem.0', 'stem.1', 'stem.2', 'stage1', ...), got "
        "'xyzzyx'"
    )
    with raises(ValueError, f"{MUST}be layers of the student {text}"):
        make(layers="xyzzyx")


# ------------------------------------------------------------------------------------------- shapes
def shaped(student, teacher=lambda maps: maps, *, layers="here", **options):
    torch.manual_seed(0)
    given = {"example": batch()[0], "sokd": SMALL, "method": "fitnet", **options}
    return Distiller(Shaped(student), Shaped(teacher), layers=layers, **given)


def tokens(prefix: int):
    return lambda maps: torch.cat([maps.new_ones(len(maps), prefix, 4), maps.flatten(2).mT], dim=1)


FORMS = {
    "map": (lambda maps: maps, {}),
    "smaller": (lambda maps: maps[:, :, ::2, ::2], {}),
    "another ratio": (lambda maps: maps[:, :, :5, :5], {}),
    "tokens": (tokens(0), {}),
    "class token": (tokens(1), {}),
    "registers": (tokens(5), {}),
    "named prefix": (tokens(3), {"student_tokens": 3}),
    "channels last": (lambda maps: maps.permute(0, 2, 3, 1), {"student_order": "BHWC"}),
}


@pytest.mark.parametrize(("form", "options"), FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("plugged", [False, True], ids=["alone", "sokd"])
def test_any_form_meets_a_map(form, options, plugged):
    distiller = shaped(form, sokd=SMALL if plugged else False, **options)
    value = objective(distiller)
    value.backward()
    assert value.isfinite()
    assert distiller.student.conv.weight.grad.abs().sum() > 0


def test_a_larger_student_map():
    distiller = shaped(lambda maps: maps, lambda maps: maps[:, :, ::4, ::4], sokd=False)
    assert distiller.adapters[0].match.stride == (4, 4)
    assert objective(distiller).isfinite()


def test_an_entry_of_a_dict_or_tuple():
    distiller = shaped(
        lambda maps: {"fine": maps, "n": 3},
        lambda maps: [maps, maps],
        layers={"here:fine": "here:1"},
    )
    assert objective(distiller).isfinite()


WRONG = {
    "a dict":
        (lambda maps: {"fine": maps, "coarse": maps}, TypeError,
         "the student's layer 'here' must give a tensor, got dict with 'fine', 'coarse': name "
         "one, as in 'here:fine'"),
    "no tensor":
        (lambda maps: 3, TypeError, "the student's layer 'here' must give a tensor, got int"),
    "integers":
        (lambda maps: maps.long(), TypeError,
         "the student's layer 'here' must be floating point, got torch.int64"),
    "five dimensions":
        (lambda maps: maps[None], ValueError,
         "the student's layer 'here' must be a map [B, C, H, W], tokens [B, N, C] or a vector "
         "[B, C], got [1, 4, 4, 8, 8]"),
    "a batch of its own":
        (lambda maps: torch.cat([maps, maps]), ValueError,
         "the student's layer 'here' must have the batch size of x, 4, in its first dimension, "
         "got [8, 4, 8, 8]"),
    "a vector":
        (lambda maps: maps.mean((2, 3)), ValueError,
         "the student's layer 'here' must be a map where the teacher's layer 'here' is one, [4, "
         "4, 8, 8], got [4, 4, 1, 1]"),
    "another aspect":
        (lambda maps: maps[:, :, :2], ValueError,
         "the student's layer 'here' must have the aspect of the teacher's layer 'here', [4, "
         "4, 8, 8] (for another layout pass student_order='BHWC', student_grid or the "
         "teacher's), got [4, 4, 2, 8]"),
    "tokens without a grid":
        (tokens(3), ValueError,
         "the student's layer 'here' must hold 0, 1, 2, 4 or 5 prefix tokens and a square grid "
         "(or name tokens and grid), got 67 tokens"),
}  # fmt: skip


@pytest.mark.parametrize(("form", "error", "text"), WRONG.values(), ids=WRONG)
def test_what_no_adapter_should_hide(form, error, text):
    with raises(error, f"Distiller: {text}"):
        shaped(form)


@pytest.mark.parametrize(("student", "teacher", "fits"), [
    ((7, 7), (14, 14), True), ((1, 1), (1, 1), True), ((50, 38), (25, 19), True),
    ((5, 7), (10, 13), True),  # strides round up
    ((8, 4), (4, 8), False), ((2, 8), (8, 8), False), ((56, 1), (56, 56), False),
])  # fmt: skip
def test_aspects(student, teacher, fits):
    maps = [torch.zeros(2, 3, *size) for size in (student, teacher)]
    if fits:
        check_pair(*maps, ("a", "b"))
    else:
        with pytest.raises(ValueError, match="Distiller: a must have the aspect of b"):
            check_pair(*maps, ("a", "b"))


def test_options_of_the_layouts():
    with pytest.raises(
        ValueError,
        match="student_order must be 'BCHW', 'BHWC', 'BNC', 'NBC', 'BCN' or None, got 'CHW'",
    ):
        make(student_order="CHW")
    text = "teacher_tokens must have one entry for each of the 2 pairs of layers"
    with pytest.raises(ValueError, match=text):
        make(teacher_tokens=[1])
    with pytest.raises(ValueError, match=r"^Distiller: student_grid must be \(H, W\), .* got 7$"):
        make(student_grid=7)
    maps = as_map(torch.zeros(2, 5, 5, 3), Layout(order="BHWC"), ("student", "x"))
    assert maps.shape == (2, 3, 5, 5)


# ---------------------------------------------------------------------------------------- the hooks
def test_hooks_are_set_once_and_keep_nothing():
    distiller = make()
    student = distiller.student
    for _ in range(2):
        objective(distiller).backward()
    hooks = [hook for part in student.modules() for hook in part._forward_hooks.values()]
    assert [type(hook) for hook in hooks] == [Tap, Tap]
    student(batch()[0])
    assert all(hook.value is None and not hook.armed for hook in hooks)
    bare = bare_copy(student, Tap)
    assert not [hook for part in bare.modules() for hook in part._forward_hooks.values()]


def test_one_layer_in_two_pairs():
    distiller = make(layers=[("stage1", "stage1"), ("stage1", "stage2")])
    assert objective(distiller).isfinite()
    assert len(distiller.student.stage1._forward_hooks) == 1


def test_an_error_in_a_model_disarms_the_hooks():
    distiller = make()
    with pytest.raises(RuntimeError):
        distiller(torch.randn(4, 5, 16, 16), batch()[1])
    assert all(
        not tap.armed and tap.value is None
        for taps in distiller._taps.values()
        for tap in taps.taps.values()
    )
    assert objective(distiller).isfinite()


def test_a_layer_that_runs_twice_is_pointed_out():
    teacher, student = models()
    student.stage1[2] = student.stem[2]  # one ReLU for both
    what = "runs several times in a forward pass; its first output is used"
    text = f"sokd: the student's layer 'stem.2' {what}"
    with warns(text):
        make(models=(teacher, student), layers={"stem.2": "stem.2"})


def test_a_layer_that_runs_twice_in_training_only_is_pointed_out():
    class Twice(Net):
        def forward(self, x):
            return super().forward(x) + (super().forward(x.flip(3)) if self.training else 0)

    teacher, _ = models()
    distiller = make(models=(teacher, Twice(3)), layers=["stage1"])
    distiller.features(batch()[0])
    what = "runs several times in a forward pass; its first output is used"
    with warns(f"sokd: the student's layer 'stage1' {what}"):
        distiller(*batch())
    distiller(*batch())


def test_an_entry_that_is_overwritten_is_pointed_out():
    class Both(nn.Module):
        def forward(self, x):
            return x * 2, x.mean()

    class Overwriting(Net):
        def __init__(self, width):
            super().__init__(width)
            self.both = Both()

        def forward(self, x):
            features = self.both(self.features(x))[0]
            logits = self.head(features.mean((2, 3)))
            features.mul_(0)
            return logits

    teacher, student = Overwriting(6), models()[1]
    text = (
        "sokd: the teacher's layer 'both:0' is overwritten in place by the layer after it, and "
        "the overwritten map is distilled; name that layer instead"
    )
    with warns(text):
        make(models=(teacher, student), layers={"stage2": "both:0"})


def test_a_layer_that_is_overwritten_is_pointed_out():
    teacher, _ = models()
    text = (
        "sokd: the student's layer 'stage1.1' is overwritten in place by the layer after it, and "
        "the overwritten map is distilled; name that layer instead"
    )
    with warns(text):
        make(models=(teacher, Net(3, inplace=True)), layers={"stage1.1": "stage1.1"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(models=(teacher, Net(3, inplace=True)))
