"""A Distiller with a kept and a replaced base, for every method; adapters by name."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from support.distiller_cases import batch, gradients, make, objective, rewound

import sokd
from sokd.kd.adapter import KINDS
from sokd.methods import METHODS
from sokd.methods.common import Method, Step

OPTIONS = {"crd": {"num_samples": 16}}
GIVEN = {
    "crd": {"index": torch.arange(4)},
    "fgd": {"boxes": [torch.tensor([[2.0, 2.0, 9.0, 12.0]])] * 4},
}
HEADS = ["attention", "bounded"]


def options(heads: str, base: str, **more) -> dict:
    maps = {"heat_channels": 3} if heads != "attention" else {}
    return {"heads": heads, "base": base, "k": 2, **maps, **more}


class Recorded(Method):
    """A method that keeps its steps."""

    name, needs, adapts, default_weight = "recorded", frozenset({"features"}), False, 1.0

    def __init__(self, adapts: bool) -> None:
        super().__init__()
        self.adapts, self.steps = adapts, []

    def forward(self, step: Step) -> torch.Tensor:
        self.steps.append(step)
        return step.student[0].sum() * 0 + 1


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("adapts", [False, True])
@pytest.mark.parametrize("base", ["keep", "replace"])
def test_a_method_runs_once_with_what_the_base_says(base, adapts, heads):
    method = Recorded(adapts)
    distiller = make(method=method, sokd=options(heads, base, policies=[("noise", "rotate")]))
    with torch.no_grad():
        distiller.kd.policy.beta.fill_(1)  # both operations in every draw
    losses = distiller(*batch())[1]
    (step,) = method.steps
    students, teachers = distiller.features(batch()[0])
    for index in range(2):
        clean = torch.equal(step.teacher[index], teachers[index])
        assert clean == (base == "keep")
        assert (step.weight[index] is None) == (base == "keep")
        assert step.student[index].shape == students[index].shape
        adapted = step.adapted[index].shape == teachers[index].shape
        assert adapted == (adapts or base == "keep")
    own = {"loss_agreement", "loss_sokd"} if base == "keep" else {"loss_agreement"}
    assert losses.keys() == {"loss_ce", "loss_recorded"} | own


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", METHODS)
def test_with_a_kept_base_the_method_is_as_without_sokd(name, heads):
    """Its term has the same value, and SoKD's stand beside it."""
    given = GIVEN.get(name, {})
    terms = []
    for plug in (False, options(heads, "keep")):
        distiller = make(method=name, sokd=plug, adapter="regressor", **OPTIONS.get(name, {}))
        for part in (distiller.adapters, distiller.kd and distiller.kd.adapter, distiller.methods):
            torch.manual_seed(11)
            for parameter in [] if part is None else part.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
        terms.append(distiller(*batch(), **given)[1])
    plain, kept = terms
    if name not in ("crd", "mgd", "fgd"):  # whose draws depend on their seeds
        torch.testing.assert_close(kept[f"loss_{name}"], plain[f"loss_{name}"])
    assert kept.keys() == plain.keys() | {"loss_sokd", "loss_agreement"}
    assert all(term.isfinite() for term in kept.values())


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("base", ["keep", "replace"])
def test_every_parameter_is_trained(base, name, heads):
    given = GIVEN.get(name, {})
    distiller = make(method=name, sokd=options(heads, base), **OPTIONS.get(name, {}))
    objective(distiller, *batch(), **given).backward()
    trained = {name: p for name, p in distiller.named_parameters() if p.requires_grad}
    assert not [name for name, parameter in trained.items() if parameter.grad is None]
    kind = METHODS[name]
    adapted = base == "keep" or kind.adapts or "features" not in kind.needs or heads == "bounded"
    assert (distiller.kd.adapter is not None) == adapted


@pytest.mark.parametrize("base", ["keep", "replace"])
def test_without_a_method_it_is_the_loss(base):
    distiller = make(method=None, layers="stage2", sokd=options("attention", base))
    distiller.kd.eval()
    _, losses = rewound(distiller, 3)(*batch())
    own = {"loss_sokd", "loss_agreement"} | ({"loss_base"} if base == "keep" else set())
    assert losses.keys() == {"loss_ce"} | own
    _, f_s, f_t = distiller.step(distiller.student, batch())
    terms = rewound(distiller, 3).kd.terms(f_s, f_t)
    torch.testing.assert_close(sum(losses[name] for name in own), terms["total"])


def test_a_callable_is_called_once_on_clean_maps():
    calls = []

    def feature(f_s, f_t):
        calls.append(f_t)
        return F.mse_loss(f_s, f_t)

    distiller = make(method=feature, layers="stage2", sokd=options("attention", "keep"))
    losses = distiller(*batch())[1]
    (teacher,) = calls
    assert torch.equal(teacher, distiller.features(batch()[0])[1][0])
    assert {"loss_feature", "loss_sokd", "loss_agreement"} < losses.keys()


# ----------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plug", [False, True, {"k": 2}])
def test_the_adapter_by_name(kind, plug):
    distiller = make(method="fitnet", sokd=plug if plug is not True else options("bounded", "keep"),
                     adapter=kind)  # fmt: skip
    adapters = distiller.adapters if plug is False else distiller.kd.adapter
    assert [adapter.kind for adapter in adapters] == [kind] * 2
    objective(distiller).backward()
    assert any("adapter" in name for name in gradients(distiller))


def test_the_default_adapter_is_that_of_sokd():
    kinds = {made.kind for made in make(sokd=False, adapter="default").adapters}
    assert kinds == {sokd.SoKD(3, 4).adapter.kind}
    paper = make(sokd={"preset": "paper", "heat_channels": 3})
    assert {made.kind for made in paper.kd.adapter} == {"conv"} and paper.kd.base == "replace"


OWN = "Distiller: adapter must be left out where sokd= has an adapter of its own, got 'linear'"


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            {"adapter": "mlp"},
            "Distiller: adapter must be 'conv' or 'separable' or 'regressor' or 'linear', got "
            "'mlp'",
        ),
        ({"adapter": "linear", "sokd": {"adapter": "conv"}}, OWN),
        ({"adapter": "linear", "sokd": sokd.SoKD([6, 12], [12, 24])}, OWN),
        ({"sokd": {"base": "both"}}, "SoKD: base must be 'keep' or 'replace', got 'both'"),
    ],
)
def test_options_that_do_not_fit_are_refused(given, text):
    with pytest.raises(ValueError) as caught:
        make(**given)
    assert str(caught.value) == text


def test_a_checkpoint_of_another_adapter_is_refused():
    state = make(sokd=False, adapter="conv").state_dict()
    with pytest.raises(RuntimeError, match="made with adapter='conv'"):
        make(sokd=False, adapter="linear").load_state_dict(state)
    make(sokd=False, adapter="conv").load_state_dict(state)


@pytest.mark.parametrize(("base", "other"), [("keep", "replace"), ("replace", "keep")])
def test_a_checkpoint_of_the_other_base_is_refused(base, other):
    state = make(method="at", sokd=options("attention", base)).state_dict()
    loaded = make(method="at", sokd=options("attention", other))
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    want = (
        f"Distiller: the state fits base={base!r} or other methods, not this object; to load it "
        f"make the Distiller with its methods and sokd={{'base': {base!r}}}"
    )
    with pytest.raises(RuntimeError, match=re.escape(want)):
        loaded.load_state_dict(state)
    assert all(torch.equal(before[name], value) for name, value in loaded.state_dict().items())
    make(method="at", sokd=options("attention", base)).load_state_dict(state)


def test_trained_heads_adapt_under_either_base():
    state = make(method="at", sokd=options("bounded", "keep")).state_dict()
    make(method="at", sokd=options("bounded", "replace")).load_state_dict(state)


@pytest.mark.parametrize(("one", "other"), [("attention", "bounded"), ("bounded", "attention")])
def test_a_checkpoint_of_other_heads_is_refused_by_their_name(one, other):
    state = make(method="at", sokd=options(one, "replace")).state_dict()
    with pytest.raises(RuntimeError, match=f"SoKD: the state fits .*heads='{one}'"):
        make(method="at", sokd=options(other, "replace")).load_state_dict(state)


def test_a_checkpoint_of_an_adapter_without_parameters_is_loaded():
    class Repeated(torch.nn.Module):
        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return features.repeat(1, 2, 1, 1)

    given = {"adapter": torch.nn.ModuleList([Repeated(), Repeated()]), "base": "keep"}
    state = make(method="at", sokd=given).state_dict()
    make(method="at", sokd=given).load_state_dict(state)


def test_a_checkpoint_without_a_search_is_refused_by_name():
    state = make(sokd={"search": "online"}).state_dict()
    with pytest.raises(RuntimeError, match="SoKD: the state fits search='online'"):
        make(sokd={"search": None}).load_state_dict(state)
