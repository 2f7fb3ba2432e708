"""Every option that is a number is judged when it is given, by the function and by name."""

import math

import pytest
import torch
from support.distiller_cases import make
from support.raises import raises

from sokd import methods
from sokd.methods import METHODS, build, options_of

POSITIVE, WEIGHT = "be positive and finite", "be 0 or more and finite"
SHARE, COUNT = "be in [0, 1)", "be 1 or more"
RULES = {
    ("kd", "temperature"): POSITIVE, ("lskd", "temperature"): POSITIVE,
    ("dkd", "temperature"): POSITIVE, ("dkd", "alpha"): WEIGHT, ("dkd", "beta"): WEIGHT,
    ("dist", "temperature"): POSITIVE, ("dist", "beta"): WEIGHT, ("dist", "gamma"): WEIGHT,
    ("rkd", "distance"): WEIGHT, ("rkd", "angle"): WEIGHT, ("catkd", "resolution"): COUNT,
    ("mgd", "ratio"): SHARE, ("reviewkd", "hidden"): COUNT, ("crd", "dim"): COUNT,
    ("crd", "negatives"): COUNT, ("crd", "temperature"): POSITIVE, ("crd", "momentum"): SHARE,
    ("crd", "num_samples"): "be 2 or more", ("fgd", "foreground"): WEIGHT,
    ("fgd", "background"): WEIGHT, ("fgd", "attention"): WEIGHT, ("fgd", "relation"): WEIGHT,
    ("fgd", "temperature"): POSITIVE, ("wkd", "transport"): WEIGHT, ("wkd", "features"): WEIGHT,
    ("wkd", "means"): WEIGHT, ("wkd", "temperature"): POSITIVE, ("wkd", "sharpness"): POSITIVE,
    ("wkd", "regularisation"): POSITIVE, ("wkd", "iterations"): COUNT, ("wkd", "grid"): COUNT,
    ("cc", "gamma"): POSITIVE, ("cc", "order"): COUNT, ("vid", "variance"): POSITIVE,
}  # fmt: skip
WRONG = {
    POSITIVE: [0, -1.0, math.nan, math.inf], WEIGHT: [-1, math.nan, math.inf],
    SHARE: [-0.1, 1, math.nan], COUNT: [0, -3], "be 2 or more": [1, -1],
}  # fmt: skip
CASES = [(*key, rule, value) for key, rule in RULES.items() for value in WRONG[rule]]
LOGITS = torch.randn(4, 5), torch.randn(4, 5)
MAPS = torch.randn(4, 5, 3, 3), torch.randn(4, 5, 3, 3)


def by_name(name: str, **options):
    shapes = [(5, 3, 3)]
    needed = {"crd": {"num_samples": 9}, "wkd": {"distances": torch.ones(5, 5)}}.get(name, {})
    return build(name, student_shapes=shapes, teacher_shapes=shapes, **{**needed, **options})


def called(name: str, **options):
    method = getattr(methods, name)
    if name == "crd":
        return method(5, 5, options.pop("num_samples", 9), **options)
    if name in ("mgd", "fgd"):
        return method(5, **options)
    if name == "vid":
        return method(5, 5, **options)
    if name == "reviewkd":
        return method([5], [5], **options)
    if name == "wkd":
        return method(*LOGITS, torch.tensor([0, 1, 2, 3]), torch.ones(5, 5), *MAPS, **options)
    arguments = LOGITS if "logits" in METHODS[name].needs and name != "catkd" else MAPS
    target = [torch.tensor([0, 1, 2, 3])] if name == "dkd" else []
    return method(*arguments, *target, **options)


WAYS = {"by name": by_name, "function": called}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(("name", "option", "rule", "value"), CASES)
def test_numbers_out_of_range(way, name, option, rule, value):
    with raises(ValueError, f"{name}: {option} must {rule}, got {value!r}"):
        way(name, **{option: value})


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(("name", "option"), RULES)
@pytest.mark.parametrize("value", ["4", [2], 1 + 2j, True], ids=str)
def test_invalid_numbers(way, name, option, value):
    kind = "a whole number" if RULES[name, option] in (COUNT, "be 2 or more") else "a number"
    with raises(TypeError, f"{name}: {option} must be {kind}, got {value!r}"):
        way(name, **{option: value})


@pytest.mark.parametrize(("name", "option"), [key for key, rule in RULES.items() if rule == COUNT])
def test_counts_that_are_not_whole(name, option):
    with pytest.raises(TypeError, match=f"{name}: {option} must be a whole number, got 1.5"):
        called(name, **{option: 1.5})


def test_a_distiller_judges_them_before_the_first_batch():
    with pytest.raises(ValueError, match="kd: temperature must be positive and finite, got 0"):
        make(method="kd", sokd=False, temperature=0)


def test_every_number_among_the_options_has_a_rule():
    others = {"over", "generator", "labels", "normalise", "student_head", "teacher_head"}
    others |= {"distances", "ignore_index", "margins"}  # any class, or none
    for name in METHODS:
        assert {option for option in options_of(name) if option not in others} == {
            option for of, option in RULES if of == name
        }


def test_a_learned_temperature_is_taken():
    temperature = torch.tensor(4.0, requires_grad=True)
    loss = methods.kd(*LOGITS, temperature=temperature)
    torch.testing.assert_close(loss, methods.kd(*LOGITS, temperature=4.0))
    loss.backward()
    assert temperature.grad.isfinite()


@pytest.mark.parametrize(("wrong", "text"), [
    (lambda: methods.crd(3, 5, 9, negatives=2)(*torch.randn(2, 2, 5), torch.arange(2)),
     "crd: student must be [B, 3] (student_dim), got [2, 5]"),
    (lambda: methods.reviewkd([3], [5])([torch.randn(2, 5, 4, 4)], [torch.randn(2, 3, 4, 4)]),
     "reviewkd: student must have the 3 channels of its stage (student_channels), "
     "got [2, 5, 4, 4]"),
], ids=["crd", "reviewkd"])  # fmt: skip
def test_sides_that_are_swapped(wrong, text):
    with raises(ValueError, text):
        wrong()


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("name", ["dkd", "wkd"])
@pytest.mark.parametrize("value", [math.nan, 2.0, None, False], ids=str)
def test_a_label_that_is_ignored_is_a_whole_number(way, name, value):
    with raises(TypeError, f"{name}: ignore_index must be a whole number, got {value!r}"):
        way(name, ignore_index=value)
