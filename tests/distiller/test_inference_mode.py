"""Teachers, features and set-ups under torch.inference_mode() give what no_grad gives."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.distiller_cases import SMALL, Net, batch, extra, gradients, make, models, objective
from support.raises import raises
from torch import Tensor, nn

import sokd
from sokd import methods
from sokd.methods import METHODS


class Decorated(nn.Module):
    """A teacher whose forward is an inference."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("plugged", [SMALL, False], ids=["sokd", "alone"])
def test_a_teacher_whose_forward_is_an_inference(name, plugged):
    options = {"num_samples": 8, "negatives": 4} if name == "crd" else {}
    found = []
    for wrap in (nn.Sequential, Decorated):
        teacher, student = models()
        names = "0" if wrap is nn.Sequential else "net"
        layers = {layer: f"{names}.{layer}" for layer in ("stage1", "stage2")}
        torch.manual_seed(3)
        distiller = make(
            models=(wrap(teacher), student), layers=layers, method=name, sokd=plugged, **options
        )
        losses = distiller(*batch(), **extra())[1]
        sum(losses.values()).backward()
        found.append((losses, gradients(distiller)))
    for own, other in zip(*found, strict=True):
        assert own.keys() == other.keys()
        assert all(torch.equal(own[key], other[key]) for key in own)


def features() -> tuple[Tensor, Tensor, Tensor]:
    """A teacher's maps, logits and a weight, made in inference mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        maps, logits = (torch.randn(4, *shape, generator=generator) for shape in ((6, 4, 4), (5,)))
        weight = torch.rand(4, 4, 4, generator=generator)
    return maps, logits, weight


FEATURES = {
    "fitnet": methods.fitnet, "at": methods.at, "sp": methods.sp, "rkd": methods.rkd,
    "hcl": methods.hcl, "catkd": methods.catkd, "wkd_features": methods.wkd_features,
    "nst": methods.nst, "pkt": methods.pkt, "cc": methods.cc,
    "mgd": lambda *given: methods.mgd(6, generator=torch.Generator().manual_seed(1))(*given),
    "reviewkd": lambda student, teacher, *weight: methods.reviewkd([6], [6])(
        [student], [teacher], *([weight] if weight else [])
    ),
}  # fmt: skip
LOGITS = {
    "kd": methods.kd, "lskd": methods.lskd, "dist": methods.dist,
    "dkd": lambda *logits: methods.dkd(*logits, torch.tensor([0, 1, 2, 3])),
    "wkd_logits": lambda *logits: methods.wkd_logits(
        *logits, torch.tensor([0, 1, 2, 3]), 1 - torch.eye(5)
    ),
}  # fmt: skip


def check_like_no_grad(call, student: Tensor, *given: Tensor) -> None:
    found = []
    for arguments in (given, [each.clone() for each in given]):
        leaf = student.clone().requires_grad_()
        torch.manual_seed(0)
        value = call(leaf, *arguments)
        value.backward()
        found.append((value, leaf.grad))
    assert all(each.is_inference() for each in given)
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("mask", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("name", FEATURES)
def test_methods_of_features(name, mask):
    maps, _, weight = features()
    check_like_no_grad(FEATURES[name], torch.randn(4, 6, 4, 4), maps, *([weight] if mask else []))


@pytest.mark.parametrize("name", LOGITS)
def test_methods_of_logits(name):
    check_like_no_grad(LOGITS[name], torch.randn(4, 5), features()[1])


def test_crd():
    def call(student, teacher):
        loss = methods.crd(6, 6, 9, negatives=4, generator=torch.Generator().manual_seed(1))
        return loss(student, teacher, torch.arange(4))

    with torch.inference_mode():
        teacher = torch.randn(4, 6)
    check_like_no_grad(call, torch.randn(4, 6), teacher)


@pytest.mark.parametrize("way", ["setup", "constructor", "auto", "no layers"])
def test_made_in_inference_mode(way):
    options = {
        "auto": {"layers": "auto"}, "no layers": {"method": "kd", "sokd": False},
    }.get(way, {})  # fmt: skip
    options = {"method": {"mgd": None, "kd": None}, **options}
    expected, pair = make(**options), models()
    with torch.inference_mode():
        distiller = make(models=pair, **options, **({"example": None} if way == "setup" else {}))
        distiller.setup(batch()[0])
    assert not any(each.is_inference() for each in (*distiller.parameters(), *distiller.buffers()))
    assert not torch.is_inference_mode_enabled()
    assert distiller.state_dict().keys() == expected.state_dict().keys()
    objective(distiller).backward()
    assert all(p.grad is not None for p in distiller.parameters())


def test_features_in_inference_mode():
    distiller = make()
    expected = distiller.features(batch()[0])
    with torch.inference_mode():
        found = distiller.features(batch()[0])
    for own, other in zip(expected, found, strict=True):
        assert all(torch.equal(*each) for each in zip(own, other, strict=True))
    assert objective(distiller).isfinite()


def test_an_evaluation_in_inference_mode():
    distiller = make().eval()
    with torch.inference_mode():
        logits, losses = distiller(*batch())
    twin = copy.deepcopy(distiller.student)
    assert torch.equal(logits, twin(batch()[0])) and losses["loss_ce"].isfinite()


def test_masked_mse():
    maps, _, weight = features()
    check_like_no_grad(sokd.ops.masked_mse, torch.randn(4, 6, 4, 4), maps)
    check_like_no_grad(sokd.ops.masked_mse, torch.randn(4, 6, 4, 4), maps, weight)


def test_sokd_made_in_inference_mode():
    with torch.inference_mode():
        kd = sokd.SoKD(6, 6, **SMALL)
    assert not any(each.is_inference() for each in (*kd.parameters(), *kd.buffers()))
    student = torch.randn(4, 6, 4, 4, requires_grad=True)
    sokd.loss(student, features()[0], kd).backward()
    assert student.grad.any() and all(p.grad is not None for p in kd.parameters())


def test_a_teacher_that_was_made_in_inference_mode():
    found = []
    for inference in (False, True):
        torch.manual_seed(0)
        with torch.inference_mode(inference):
            teacher = Net(6)
        torch.manual_seed(1)
        distiller = make(models=(teacher, Net(3)), method={"fitnet": None, "kd": None})
        losses = distiller(*batch())[1]
        sum(losses.values()).backward()
        found.append((losses, gradients(distiller)))
    for own, other in zip(*found, strict=True):
        assert own.keys() == other.keys() and all(torch.equal(own[k], other[k]) for k in own)


def test_a_student_that_was_made_in_inference_mode():
    with torch.inference_mode():
        student = Net(3)
    count = len(list(student.parameters()))
    rule = "be made outside torch.inference_mode(), where no parameter can be trained"
    with raises(ValueError, f"Distiller: student must {rule}, got {count} such parameters"):
        make(models=(Net(6), student))


@pytest.mark.parametrize("make_method", [
    lambda: methods.mgd(6), lambda: methods.reviewkd([6], [6]), lambda: methods.crd(6, 6, 9),
    lambda: sokd.Adapter(4, 6), lambda: sokd.kd.DAM(6), lambda: sokd.Policy(),
], ids=["mgd", "reviewkd", "crd", "adapter", "dam", "policy"])  # fmt: skip
def test_parts_that_were_made_in_inference_mode(make_method):
    with torch.inference_mode():
        method = make_method()
    assert not any(each.is_inference() for each in (*method.parameters(), *method.buffers()))


def test_a_search_with_features_of_inference_mode():
    found = []
    for mode in (torch.no_grad, torch.inference_mode):
        torch.manual_seed(0)
        sokd.manual_seed(0)
        student, kd = nn.Conv2d(3, 4, 3), sokd.SoKD(4, 6, **SMALL)
        with torch.inference_mode(mode is torch.inference_mode):
            search = sokd.PolicySearch(kd, student)

        def step(model, x, mode=mode):
            features = model(x)
            with mode():
                teacher = torch.ones(4, 6, 14, 14) + 0
            return features.square().mean(), features, teacher

        for _ in range(2):
            search.step(step, batch()[0])
        wrapped = sokd.wrap(F.mse_loss, kd)
        with mode():
            teacher = torch.ones(4, 6, 14, 14) + 0
        wrapped(student(batch()[0]), teacher).backward()
        found.append([p.clone() for p in kd.policy.parameters()] + [student.weight.grad])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("options", [{}, {"policy": None}, {"policy": None, "dam": None}], ids=str)
def test_a_wrapped_loss_with_features_of_inference_mode(options):
    """The base is kept: the loss gets the teacher's own map, which autograd must save."""
    f_s, found = torch.randn(2, 4, 5, 5, requires_grad=True), []
    for mode in (torch.no_grad, torch.inference_mode):
        torch.manual_seed(0)
        sokd.manual_seed(0)
        kd = sokd.SoKD(4, 6, **options)
        with mode():
            f_t = torch.ones(2, 6, 5, 5) + 0
        loss = sokd.wrap(F.mse_loss, kd)(f_s, f_t)
        found.append([loss.detach(), *torch.autograd.grad(loss, [f_s, *kd.parameters()])])
    assert all(map(torch.equal, *found))
