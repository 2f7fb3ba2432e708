"""Parts by name: adapters, heads, base and presets of a SoKD; checkpoints of other parts."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from support.cases import compiles
from support.kd_cases import features, pair, rewound
from support.raises import raises
from torch import nn

import sokd
from sokd.kd.adapter import KINDS, Adapter
from sokd.kd.dam import DAM
from sokd.kd.options import PRESETS

# heads, and the smallest of their kind
HEADS = {
    "attention": {"heads": "attention", "k": 2},
    "bounded": {"heads": "bounded", "heat_channels": 5, "k": 2},
    "paper": {"heads": "paper", "heat_channels": 5, "k": 2},
    "none": {"dam": None},
}


def make(*channels: int, heads: str = "attention", **options) -> sokd.SoKD:
    torch.manual_seed(0)
    return sokd.SoKD(*(channels or (3, 4)), **{**HEADS[heads], **options})


# ----------------------------------------------------------------------------------------- adapters


def convolutions(adapter: Adapter) -> list[nn.Module]:
    return [part for part in adapter.modules() if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d))]


LAYERS = {  # kernels and groups of the convolutions 3 -> 4 channels, number of BatchNorms
    "conv": ([((1, 1), 1), ((3, 3), 1), ((3, 3), 1)], 3),
    "separable": ([((1, 1), 1), ((3, 3), 4), ((1, 1), 1)], 3),
    "regressor": ([((1, 1), 1)], 1),
    "linear": ([((1, 1), 1)], 0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_layers_of_each_adapter(kind):
    adapter = Adapter(3, 4, kind=kind)
    layers, norms = LAYERS[kind]
    assert [(conv.kernel_size, conv.groups) for conv in convolutions(adapter)] == layers
    assert sum(isinstance(part, nn.BatchNorm2d) for part in adapter.modules()) == norms
    assert (adapter.match.bias is not None) == (kind == "linear")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("student", "teacher"),
    [((6, 6), (6, 6)), ((8, 8), (4, 4)), ((4, 4), (8, 8)), ((6, 6), (4, 5))],
    ids=["equal", "half", "double", "no ratio"],
)
@pytest.mark.parametrize("sizes", [True, False], ids=["sizes given", "sizes unknown"])
def test_every_adapter_serves_any_sizes(kind, student, teacher, sizes):
    options = {"student_size": student, "teacher_size": teacher} if sizes else {}
    adapter = Adapter(3, 4, kind=kind, **options)
    out = adapter(features(2, 3, *student), teacher)
    assert out.shape == (2, 4, *teacher)
    out.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in adapter.parameters())
    last = Adapter(3, 4, kind=kind, **options).to(memory_format=torch.channels_last)
    maps = features(2, 3, *student).to(memory_format=torch.channels_last)
    assert last(maps, teacher).is_contiguous(memory_format=torch.channels_last)


def test_linear_is_a_convolution_and_regressor_the_published_one():
    maps = features(2, 3, 6, 6)
    linear, regressor = (Adapter(3, 4, kind=kind) for kind in ("linear", "regressor"))
    want = F.conv2d(maps, linear.match.weight, linear.match.bias)
    torch.testing.assert_close(linear(maps), want)
    published = F.relu(nn.BatchNorm2d(4)(F.conv2d(maps, regressor.match.weight)))
    torch.testing.assert_close(regressor(maps), published)


@pytest.mark.parametrize("kind", KINDS)
def test_the_keys_of_each_adapter(kind):
    keys = {name.rsplit(".", 1)[0] for name in Adapter(3, 4, kind=kind).state_dict()}
    body = {"body.0", "body.1", "body.3", "body.4"} if kind in ("conv", "separable") else set()
    assert keys == {"match"} | body | (set() if kind == "linear" else {"norm"})


@pytest.mark.parametrize("kind", KINDS)
def test_one_value_a_channel_is_refused_where_there_is_a_norm(kind):
    kd, (student, teacher) = make(adapter=kind), pair((1, 3, 1, 1), (1, 4, 1, 1))
    if kind == "linear":
        assert kd(student, teacher).isfinite()
        return
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        kd(student, teacher)


@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_trains_in_a_loss(kind):
    kd, (student, teacher) = make(adapter=kind, base="keep"), pair()
    kd(student, teacher).backward()
    assert all(parameter.grad.isfinite().all() for parameter in kd.adapter.parameters())


# ------------------------------------------------------------------------------------------ presets


def test_the_paper_preset_is_what_the_paper_and_the_prototype_do():
    kd = sokd.SoKD(3, 4, preset="paper")
    assert kd.adapter.kind == "conv" and kd.dam.heads == "paper" and kd.base == "replace"
    assert kd.dam.heat_channels == 100 and kd.dam.overlap == "sum" and kd.dam.k == 8
    assert (kd.policy.estimator, kd.policy.granularity) == ("gumbel", "batch")
    assert kd.policy.magnitude_gradient == "straight_through" and kd.normalise == "elements"


def test_an_option_wins_over_the_preset():
    kd = sokd.SoKD(3, 4, preset="paper", heads="attention", base="keep", lambda_areas=3.0)
    assert kd.adapter.kind == "conv" and isinstance(kd.dam, sokd.AttentionDAM)
    assert (kd.base, kd.lambda_areas) == ("keep", 3.0)
    assert kd.lambda_agreement == PRESETS["paper"]["lambda_agreement"]


def test_the_defaults_are_the_preset_none():
    kd, chosen = sokd.SoKD(3, 4), PRESETS[None]
    assert kd.adapter.kind == chosen["adapter"] and kd.base == chosen["base"]
    heads = kd.dam.heads if isinstance(kd.dam, DAM) else "attention"
    assert heads == chosen["heads"]
    granularity = chosen["granularity"] if chosen["search"] is None else "sample"
    assert kd.policy.granularity == granularity
    assert (kd.search is None) == (chosen["search"] is None)
    assert PRESETS[None].keys() == PRESETS["paper"].keys()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"preset": "prototype"}, "preset must be 'paper', got 'prototype'"),
        (
            {"adapter": "mlp"},
            "adapter must be 'conv' or 'separable' or 'regressor' or 'linear', got 'mlp'",
        ),
        ({"heads": "free"}, "heads must be 'attention' or 'bounded' or 'paper', got 'free'"),
        ({"base": "both"}, "base must be 'keep' or 'replace', got 'both'"),
        (
            {"heads": "attention", "heat_channels": 5},
            "heat_channels must be left out with heads='attention', which has no such option, "
            "got 5",
        ),
        (
            {"heads": "paper", "attention_temperature": 2.0},
            "attention_temperature must be left out with heads='paper', which has no such option, "
            "got 2.0",
        ),
        (
            {"base": "replace", "lambda_base": 2.0},
            "lambda_base must be left out with base='replace', which has no such term, got 2.0",
        ),
        (
            {"base": "keep", "lambda_base": -1.0},
            "lambda_base must be a finite number, 0 or more, got -1.0",
        ),
        *(
            (
                {"dam": dam, **option},
                f"{name} must be left out with dam=, which it does not change, got {value!r}",
            )
            for dam in (None, DAM(4))
            for option in (
                {"heads": "bounded"},
                {"heat_channels": 5},
                {"attention_temperature": 2.0},
                {"areas": "student"},
                {"overlap": "union"},
                {"k": 4},
                {"kernel": 5},
            )
            for name, value in option.items()
        ),
        *(
            (
                {"policy": policy, "search": None, **option},
                f"{name} must be left out with policy=, which it does not change, got {value!r}",
            )
            for policy in (None, sokd.Policy())
            for option in (
                {"policies": [("rotate", "cutout")]},
                {"estimator": "relax"},
                {"magnitude_gradient": "pathwise"},
                {"granularity": "batch"},
                {"generator": torch.Generator()},
            )
            for name, value in option.items()
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(options, text):
    with pytest.raises(ValueError) as caught:
        sokd.SoKD(3, 4, **options)
    assert str(caught.value) == f"SoKD: {text}"


NUMBERS = {
    "lr of the search": (
        lambda value: setattr(sokd.SoKD(4, 6).search, "lr", value),
        "OnlineSearch: lr must be a finite number, 0 or more",
    ),
    "temperature of a policy": (
        lambda value: sokd.Policy(temperature=value),
        "Policy: temperature must be positive and finite",
    ),
    "temperature of the attention": (
        lambda value: sokd.SoKD(4, 6, attention_temperature=value),
        "AttentionDAM: temperature must be positive and finite",
    ),
    "weight of a term": (
        lambda value: sokd.SoKD(4, 6, lambda_areas=value),
        "SoKD: lambda_areas must be a finite number, 0 or more",
    ),
}


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "4"], ids=str)
def test_how_often_the_policy_moves(value):
    rule = "be positive" if type(value) is int else "be a whole number"
    with raises(ValueError, f"OnlineSearch: every must {rule}, got {value!r}"):
        sokd.SoKD(4, 6).search.every = value


def test_a_preset_holds_options_of_parts_that_are_given():
    kd = sokd.SoKD(3, 4, preset="paper", policy=None, dam=None)
    assert kd.policy is None and kd.dam is None and kd.base == "replace"


@pytest.mark.parametrize(("give", "rule"), NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), True, "1", [1.0]], ids=str)
def test_numbers_of_sokd(give, rule, value):
    with raises(ValueError, f"{rule}, got {value!r}"):
        give(value)


# --------------------------------------------------------------------------------------------- base


@pytest.mark.parametrize("heads", HEADS)
def test_a_kept_base_is_the_mean_square_of_the_clean_teacher(heads):
    kd, (student, teacher) = make(heads=heads, base="keep", lambda_base=3.0).eval(), pair()
    draw = rewound(kd, 5).policy.draw(2)
    terms = kd.terms(student, teacher, draw=draw)
    adapted = kd.adapter(student, (6, 6))
    want = 3 * F.mse_loss(adapted, teacher)
    torch.testing.assert_close(terms["base"], want)
    total = terms["agreement"] + terms["areas"] + terms["base"]
    torch.testing.assert_close(terms["total"], total)
    d_got = torch.autograd.grad(terms["base"], student)[0]
    torch.testing.assert_close(d_got, torch.autograd.grad(want, student)[0])
    kd.base = "replace"
    replaced = kd.terms(student, teacher, draw=draw)
    assert replaced["base"] == 0
    for name in ("agreement", "areas"):
        assert torch.equal(replaced[name], terms[name])
    torch.testing.assert_close(replaced["total"], terms["agreement"] + terms["areas"])


def test_the_base_of_several_layers_is_their_sum():
    kd, (student, teacher) = make([3, 3], [4, 4], base="keep", lambda_base=1.0).eval(), pair()
    got = kd.terms([student] * 2, [teacher] * 2)["base"]
    want = sum(F.mse_loss(adapter(student, (6, 6)), teacher) for adapter in kd.adapter)
    torch.testing.assert_close(got, want)


def test_the_base_under_autocast_and_with_an_inference_tensor():
    kd, (student, teacher) = make(base="keep").eval(), pair()
    want = rewound(kd).terms(student, teacher)["base"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = rewound(kd).terms(student, teacher)["base"]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
    with torch.inference_mode():
        inferred = teacher.clone()
    torch.testing.assert_close(rewound(kd).terms(student, inferred)["base"], want)


def test_the_search_trains_the_policy_of_a_kept_base():
    kd, (student, teacher) = make(base="keep", policies=[("noise", "rotate")]), pair()
    terms = kd.terms(student, teacher, draw=kd.policy.draw(2), differentiable=True)
    terms["total"].backward()
    assert kd.policy.magnitude.grad.abs().sum() > 0


@pytest.mark.parametrize("heads", HEADS)
def test_wrap_with_a_kept_base_calls_the_loss_once_on_clean_features(heads):
    kd, (student, teacher) = make(heads=heads, base="keep").eval(), pair()
    seen = []

    def any_loss(f_s, f_t):
        seen.append((f_s, f_t))
        return F.l1_loss(f_s, f_t)

    draw = rewound(kd, 5).policy.draw(2)
    terms = kd.terms(student, teacher, draw=draw)
    got = sokd.wrap(any_loss, rewound(kd, 5))(student, teacher)
    ((f_s, f_t),) = seen
    adapted = kd.adapter(student, (6, 6))
    assert torch.equal(f_s, adapted) and torch.equal(f_t, teacher)
    own = terms["agreement"] + terms["areas"]
    torch.testing.assert_close(got, F.l1_loss(adapted, teacher) + own)
    apart = sokd.wrap(any_loss, rewound(kd, 5), agreement=False)
    torch.testing.assert_close(apart(student, teacher), F.l1_loss(adapted, teacher))
    torch.testing.assert_close(apart.agreement, own)
    torch.testing.assert_close(kd.diagnostics()["areas"], terms["areas"].detach())


@compiles
def test_wrap_with_a_kept_base_compiles():
    torch._dynamo.reset()
    kd, (student, teacher) = make(base="keep").eval(), pair()
    wrapped = sokd.wrap(F.mse_loss, kd)
    want = wrapped(student, teacher)
    rewound(kd)
    got = torch.compile(wrapped, fullgraph=True, backend="eager")(student, teacher)
    torch.testing.assert_close(got, want)


# -------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("layers", [1, 2])
def test_a_state_of_the_same_parts_is_loaded(kind, heads, layers):
    kd = make([3] * layers, [4] * layers, adapter=kind, heads=heads)
    other = make([3] * layers, [4] * layers, adapter=kind, heads=heads)
    torch.manual_seed(7)
    for parameter in kd.parameters():
        nn.init.normal_(parameter)
    other.load_state_dict(copy.deepcopy(kd.state_dict()))
    for name, value in kd.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


KINDS_REFUSED = [
    ({"adapter": "conv"}, {"adapter": "linear"}, "adapter='conv'"),
    ({"adapter": "separable"}, {"adapter": "conv"}, "adapter='separable'"),
    ({"adapter": "regressor"}, {"adapter": "separable"}, "adapter='regressor'"),
    ({"adapter": "linear"}, {"adapter": "regressor"}, "adapter='linear'"),
    ({"heads": "attention"}, {"heads": "paper"}, "heads='attention'"),
    ({"heads": "paper"}, {"heads": "attention"}, "heads='paper'"),
    ({"heads": "paper"}, {"heads": "bounded"}, "heads='paper'"),
    ({"heads": "bounded"}, {"heads": "paper"}, "heads='bounded'"),
    ({"heads": "bounded"}, {"heads": "none"}, "heads='bounded'"),
    (
        {"adapter": "conv", "heads": "bounded"}, {"adapter": "linear", "heads": "attention"},
        "adapter='conv' and heads='bounded'",
    ),
]  # fmt: skip
PARTS_REFUSED = [
    ({"adapter": None}, {}, "adapter=None"),
    ({}, {"adapter": None}, "adapter='linear'"),
    ({"policy": None}, {}, "policy=None"),
    ({"search": None}, {"policy": None}, "policy='default'"),
    ({}, {"search": None}, "search='online'"),
    ({}, {"policy": None}, "policy='default' and search='online'"),
]


def refused(text: str, load: str = "") -> str:
    load = load or text.replace(" and ", ", ")
    return re.escape(
        f"SoKD: the state fits {text}, not this object; to load it make kd with SoKD(..., {load})"
    )


def two(made, loaded, layers=1) -> tuple[dict, sokd.SoKD]:
    """The state of one, and another."""
    common = {"adapter": "linear", "heads": "attention"}
    one, other = (make([3] * layers, [4] * layers, **common | each) for each in (made, loaded))
    return one.state_dict(), other


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("made", "loaded", "text"), KINDS_REFUSED + PARTS_REFUSED)
def test_a_state_of_other_parts_is_refused_by_name(made, loaded, text, layers):
    state, kd = two(made, loaded, layers)
    before = copy.deepcopy(kd.state_dict())
    with pytest.raises(RuntimeError, match=refused(text)):
        kd.load_state_dict(state)
    for name, value in before.items():
        assert torch.equal(kd.state_dict()[name], value)


@pytest.mark.parametrize(("made", "loaded", "text"), KINDS_REFUSED)
def test_inside_another_module_other_kinds_are_refused(made, loaded, text):
    state, kd = two(made, loaded)
    with pytest.raises(RuntimeError, match=refused(text)):
        nn.ModuleDict({"kd": kd}).load_state_dict({f"kd.{name}": v for name, v in state.items()})


@pytest.mark.filterwarnings("ignore:SoKD. the state has no policy search")
@pytest.mark.parametrize(("made", "loaded", "text"), PARTS_REFUSED)
def test_absent_parts_are_no_matter_if_not_strict(made, loaded, text):
    state, kd = two(made, loaded)
    found = kd.load_state_dict(state, strict=False)
    assert found.missing_keys or found.unexpected_keys


@pytest.mark.parametrize("heads", ["bounded", "paper"])
@pytest.mark.parametrize("own", ["bounded", "paper"])
def test_heads_whose_state_names_no_kind_are_loaded_into_either(own, heads):
    state, kd = copy.deepcopy(make(heads=heads).state_dict()), make(heads=own)
    del state["dam.heads_index"]
    nn.init.zeros_(kd.dam.heat.bias)
    kd.load_state_dict(state)
    assert torch.equal(kd.dam.heat.bias, state["dam.heat.bias"])
    assert kd.dam.heads == own and kd.dam.heads_index.item() == ["bounded", "paper"].index(own)
    want = refused("heads='bounded' or 'paper'", load="heads='bounded'")
    with pytest.raises(RuntimeError, match=want):
        make().load_state_dict(state)


@pytest.mark.parametrize("assign", [False, True])
def test_heads_on_the_meta_device_get_a_state(assign):
    state = DAM(3, heads="paper").state_dict()
    with torch.device("meta"):
        dam = DAM(3, heads="paper")
    if not assign:
        dam.to_empty(device="cpu")
    dam.load_state_dict(state, assign=assign)
    assert dam.to("cpu").heads_index.item() == 1


def test_heads_keep_their_kind_without_a_state():
    with torch.device("meta"):
        dam = DAM(3, heads="paper")
    assert dam.heads_index.is_meta
    assert dam.to_empty(device="cpu").heads_index.item() == 1


def test_heads_alone_refuse_the_state_of_others():
    with pytest.raises(RuntimeError) as caught:
        DAM(3, heads="bounded").load_state_dict(DAM(3, heads="paper").state_dict())
    want = (
        "DAM: the state was made with heads='paper', this module with heads='bounded'; make it "
        "with heads='paper'"
    )
    assert str(caught.value) == want


def test_an_adapter_alone_refuses_another_kind():
    with pytest.raises(RuntimeError) as caught:
        Adapter(3, 4, kind="linear").load_state_dict(Adapter(3, 4).state_dict())
    want = (
        "Adapter: the state was made with adapter='conv', this module with adapter='linear'; "
        "make it with adapter='conv'"
    )
    assert str(caught.value) == want
