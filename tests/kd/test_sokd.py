"""sokd.SoKD: parameters, state, resumption, diagnostics, and the texts of its errors."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.cases import compiles
from support.kd_cases import features, make, pair, rewound
from support.raises import raises
from torch import nn

from sokd.kd.policy import Policy
from sokd.kd.sokd import SoKD, loss

# ----------------------------------------------------------------------------- parameters and state


def test_the_policy_is_in_the_state_but_not_among_the_parameters():
    kd = make()
    of_policy = set(kd.policy.parameters())
    holder = nn.ModuleDict({"student": nn.Linear(2, 2), "kd": kd})
    for module in (kd, holder):
        assert not of_policy & set(module.parameters())
        assert not any("policy" in name for name, _ in module.named_parameters())
    assert len(list(kd.parameters())) == len(list(kd.adapter.parameters())) + len(
        list(kd.dam.parameters())
    )
    names = set(kd.state_dict())
    assert {
        "policy.alpha",
        "policy.beta",
        "policy.magnitude",
        "policy.seed",
        "policy.counter",
    } <= names
    assert "statistics" not in names
    buffers = dict(holder.named_buffers())
    assert buffers["kd.policy.counter"] is kd.policy.counter
    assert next(iter(kd.named_parameters()))[0].startswith("adapter.")


def test_moving_the_module_moves_the_policy():
    kd = make().double()
    assert kd.policy.alpha.dtype == torch.float64
    assert dict(kd.named_buffers())["policy.seed"].dtype == torch.int64
    kd.eval()
    assert not kd.policy.training


def saved_and_loaded(kd: SoKD) -> SoKD:
    buffer = io.BytesIO()
    torch.save(kd.state_dict(), buffer)
    buffer.seek(0)
    other = make(seed=77)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    return other


@pytest.mark.parametrize("copied", [
    pytest.param(copy.deepcopy, id="deepcopy"),
    pytest.param(lambda kd: pickle.loads(pickle.dumps(kd)), id="pickle"),
    pytest.param(saved_and_loaded, id="state_dict"),
])  # fmt: skip
def test_a_copy_goes_on_with_the_same_bits(copied):
    kd = make()
    student, teacher = pair()
    loss(student, teacher, kd).backward()
    other = copied(kd)
    for _ in range(3):
        assert torch.equal(loss(student, teacher, kd), loss(student, teacher, other))


def test_an_average_with_its_buffers_can_be_kept():
    kd = make()
    averaged = torch.optim.swa_utils.AveragedModel(kd, use_buffers=True)
    for _ in range(2):
        averaged.update_parameters(kd)
    assert averaged(*pair()).isfinite()


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps = self.body(x)
        return self.head(maps.mean((2, 3))), maps


def test_the_default_weights_train_with_the_usual_optimiser():
    """The shortest real use: SGD, lr 0.05, momentum 0.9, features of unit variance."""
    torch.set_num_threads(1)  # small steps; conftest restores the count
    student = Student()
    kd = SoKD(3, 4, heat_channels=5, k=2)
    parameters = [*student.parameters(), *kd.parameters()]
    optimiser = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    tasks = []
    for step in range(60):
        y = torch.arange(16) % 2
        x = features(16, 1, 6, 6, seed=step) + y[:, None, None, None]
        logits, maps = student(x)
        tasks.append(F.cross_entropy(logits, y))
        value = tasks[-1] + loss(maps, torch.cat((x, -x, x.square(), x.exp()), dim=1), kd)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
    assert torch.stack(tasks[-10:]).mean() < 0.6 * tasks[0]


class Run:
    """A small training run that can be saved and resumed."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.student, self.kd = Student(), SoKD(3, 4, heat_channels=5, k=2)
        parameters = [*self.student.parameters(), *self.kd.parameters()]
        self.optimiser = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)

    def steps(self, first: int, last: int) -> list[torch.Tensor]:
        values = []
        for step in range(first, last):
            x, y = features(4, 1, 6, 6, seed=step), torch.arange(4) % 2
            logits, maps = self.student(x)
            value = F.cross_entropy(logits, y) + loss(
                maps, features(4, 4, 6, 6, seed=100 + step), self.kd
            )
            self.optimiser.zero_grad()
            value.backward()
            self.optimiser.step()
            values.append(value.detach())
        return values

    def state(self) -> dict:
        return {name: part.state_dict() for name, part in vars(self).items()}

    def load(self, state: dict) -> None:
        for name, part in vars(self).items():
            part.load_state_dict(state[name])


def test_a_run_taken_up_from_a_checkpoint_is_the_same_run_to_the_bit():
    torch.set_num_threads(1)
    whole, first = Run(0), Run(0)
    want = whole.steps(0, 12)
    first.steps(0, 5)
    buffer = io.BytesIO()
    torch.save(first.state(), buffer)
    buffer.seek(0)
    second = Run(123)
    second.load(torch.load(buffer, weights_only=True))
    assert torch.equal(torch.stack(second.steps(5, 12)), torch.stack(want[5:]))
    for name, tensor in whole.kd.state_dict().items():
        assert torch.equal(second.kd.state_dict()[name], tensor), name
    for name, tensor in whole.student.state_dict().items():
        assert torch.equal(second.student.state_dict()[name], tensor), name


# -------------------------------------------------------------------------------------- diagnostics


def test_diagnostics_are_the_last_steps():
    kd = make()
    student, teacher = pair()
    kd.eval()
    terms = loss(student, teacher, rewound(kd), return_terms=True)
    found = kd.diagnostics()
    draw = rewound(kd).policy.draw(2)
    attention = kd.dam(kd.adapter(student, (6, 6)), kd.policy(teacher, draw))
    torch.testing.assert_close(found["agreement"], terms["agreement"])
    torch.testing.assert_close(found["areas"], terms["areas"])
    variance = attention.heat.transpose(0, 1).flatten(1).var(1, correction=0).mean()
    torch.testing.assert_close(found["heat_variance"], variance)
    assert found["covered_share"] == (attention.coverage > 0).float().mean()
    assert set(found) == {
        "agreement", "areas", "heat_variance", "covered_share", "entropy", "beta", "magnitude",
    }  # fmt: skip
    assert not any(value.requires_grad for value in found.values())
    before = found["areas"].clone()
    loss(student * 2, teacher, kd)
    assert torch.equal(found["areas"], before), (
        "a later step must not write into what was handed out"
    )


def test_diagnostics_of_several_layers_and_of_what_is_absent():
    kd = make([3, 3], [4, 4], policy=None)
    student, teacher = pair()
    loss([student] * 2, [teacher] * 2, kd)
    found = kd.diagnostics()
    assert set(found) == {
        "agreement", "areas", "heat_variance", "heat_variance.0", "heat_variance.1",
        "covered_share", "covered_share.0", "covered_share.1",
    }  # fmt: skip
    torch.testing.assert_close(
        found["heat_variance"], (found["heat_variance.0"] + found["heat_variance.1"]) / 2
    )
    kd.dam = None
    assert set(kd.diagnostics()) == {"areas"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_leaves_policy_and_statistics_in_float32(dtype):
    cast = make().to(dtype)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        made = make()
    finally:
        torch.set_default_dtype(before)
    for kd in (cast, made, nn.Sequential(make()).to(dtype)[0]):
        assert kd.adapter.match.weight.dtype == dtype and kd.statistics.dtype == torch.float32
        assert {parameter.dtype for parameter in kd.policy.parameters()} == {torch.float32}


def test_the_search_leaves_the_diagnostics_alone():
    kd = make()
    loss(*pair(), kd)
    before = kd.statistics.clone()
    kd.terms(*pair(), differentiable=True)
    kd.consistency(*pair())
    assert torch.equal(kd.statistics, before)


# ----------------------------------------------------------------------------------------- refusals

STUDENT, TEACHER = torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, 4)


@pytest.mark.parametrize(("error", "student", "teacher", "text"), [
    (TypeError, None, TEACHER,
     "student_features must be a tensor or a list of tensors, got NoneType"),
    (TypeError, [None], TEACHER, "student_features must be a tensor, got NoneType"),
    (TypeError, STUDENT, {"a": 1},
     "teacher_features must be a tensor or a list of tensors, got dict"),
    (ValueError, [STUDENT] * 2, [TEACHER] * 2,
     "student_features must have one tensor for each of kd's layers (1), got 2"),
    (ValueError, STUDENT, [],
     "teacher_features must have one tensor for each of kd's layers (1), got 0"),
    (TypeError, STUDENT.long(), TEACHER,
     "student_features must be floating point, got torch.int64"),
    (ValueError, STUDENT[0, 0], TEACHER,
     "student_features must be [B, 3, H, W] or [B, N, 3], got [4, 4]"),
    (ValueError, STUDENT, STUDENT,
     "teacher_features must be [B, 4, H, W] or [B, N, 4], got [2, 3, 4, 4]"),
    (ValueError, STUDENT.flatten(2), TEACHER,
     "student_features must be [B, 3, H, W] or [B, N, 3], got [2, 3, 16]"),
    (ValueError, STUDENT, TEACHER[:1],
     "teacher_features must have the student's batch size 2, got 1"),
    (TypeError, STUDENT, TEACHER.half(),
     "teacher_features must have the student's dtype torch.float32, got torch.float16"),
    (ValueError, STUDENT, TEACHER.to("meta"),
     "teacher_features must be on the student's device cpu, got meta"),
    (ValueError, torch.zeros(2, 7, 3), TEACHER,
     "student_features must hold 0, 1, 2, 4 or 5 prefix tokens and a square grid (or name "
     "tokens and grid), got 7 tokens"),
])  # fmt: skip
def test_features_that_do_not_fit_are_refused(error, student, teacher, text):
    with raises(error, f"loss: {text}"):
        loss(student, teacher, make())


def test_the_layer_is_named():
    with raises(
        ValueError, "loss: teacher_features[1] must be [B, 4, H, W] or [B, N, 4], got [2, 3, 4, 4]"
    ):
        loss([STUDENT] * 2, [TEACHER, STUDENT], make([3, 3], [4, 4]))


def test_shapes_that_no_adapter_makes_equal_are_refused():
    kd = make(adapter=None)
    with pytest.raises(ValueError) as caught:
        loss(STUDENT, TEACHER, kd)
    shape = "loss: student_features must have the teacher's shape [2, 4, 4, 4]"
    assert str(caught.value) == f"{shape} (kd.adapter is None), got [2, 3, 4, 4]"
    kd.adapter = nn.Conv2d(3, 4, 3)
    rule = "have the teacher's shape [2, 4, 4, 4] after kd.adapter"
    with raises(ValueError, f"loss: student_features must {rule}, got [2, 4, 2, 2]"):
        loss(STUDENT, TEACHER, kd)


@pytest.mark.parametrize(
    ("kd", "got"), [({}, "dict"), (nn.Linear(1, 1), "Linear")], ids=["dict", "Linear"]
)
def test_kd_must_be_a_sokd(kd, got):
    with raises(TypeError, f"loss: kd must be a sokd.SoKD, got {got}"):
        loss(STUDENT, TEACHER, kd)


def test_one_value_a_channel_is_refused_in_training():
    kd, student, teacher = make(), torch.randn(1, 3, 1, 1), torch.randn(1, 4, 1, 1)
    want = (
        "loss: student_features must give the BatchNorm of kd.adapter more than 1 value per "
        "channel in train mode, got 1 sample of 1 cell (drop_last=True in the DataLoader, or "
        "larger batches)"
    )
    with raises(ValueError, want):
        loss(student, teacher, kd)
    kd.adapter.eval()
    assert loss(student, teacher, kd).isfinite()


@pytest.mark.parametrize(("options", "text"), [
    ({"policy": nn.Linear(1, 1)}, "policy must be 'default', None or a sokd.Policy, got Linear"),
    ({"policy": "none"}, "policy must be 'default', None or a sokd.Policy, got 'none'"),
    ({"dam": nn.Conv2d(4, 4, 1)}, "dam must take (student, refined, scale=...), got Conv2d"),
    ({"dam": nn.ModuleList([nn.Identity()])},
     "dam must take (student, refined, scale=...), got Identity"),
    ({"adapter": nn.Bilinear(3, 3, 3)}, "adapter must take (student), got Bilinear"),
    ({"adapter": nn.ModuleDict()}, "adapter must take (student), got ModuleDict"),
    ({"adapter": torch.relu},
     "adapter must be 'default', None or an nn.Module, got builtin_function_or_method"),
])  # fmt: skip
def test_a_part_that_the_loss_could_not_call_is_refused(options, text):
    with raises(TypeError, f"SoKD: {text}"):
        SoKD(3, 4, **options)


def test_an_invalid_generator():
    with raises(TypeError, "Policy: generator must be a torch.Generator or None, got int"):
        make(generator=3)


def test_a_part_put_in_later_must_give_what_the_loss_needs():
    kd = make()
    kd.dam = nn.Bilinear(4, 4, 4)
    kd.dam.forward = lambda student, refined, scale: student
    with raises(TypeError, "loss: kd.dam must return an Attention, got Tensor"):
        loss(*pair(), kd)


@compiles
def test_parts_of_ones_own_are_taken():
    """Wrapped ones too, whose signatures are generic."""
    kd = make(policy=torch.compile(Policy(), backend="eager"), adapter=nn.Conv2d(3, 4, 1))
    kd.dam = nn.DataParallel(kd.dam)
    made = SoKD(3, 4, adapter=kd.adapter, policy=kd.policy, dam=kd.dam)
    assert loss(*pair(), made).isfinite()


def test_features_of_another_dtype_than_the_parameters_are_refused():
    rule = "have the dtype torch.float32 of kd's parameters (see kd.to and torch.autocast)"
    with raises(TypeError, f"loss: student_features must {rule}, got torch.float64"):
        loss(STUDENT.double(), TEACHER.double(), make())


@pytest.mark.parametrize(("arguments", "options", "text"), [
    (([], []), {}, "SoKD: student_channels must be a positive number or a list of them, got []"),
    ((3, 0), {}, "SoKD: teacher_channels must be a positive number or a list of them, got 0"),
    (([3, 4], 5), {}, "SoKD: teacher_channels must be as many as student_channels (2), got 1"),
    ((3, 4), {"normalise": "cells"}, "SoKD: normalise must be 'elements' or 'area', got 'cells'"),
    (([3, 3], [4, 4]), {"student_tokens": [1]},
     "SoKD: student_tokens must have one entry for each of the 2 layers, got 1"),
    (([3, 3], [4, 4]), {"student_grid": [4, 4]},
     "SoKD: student_grid must be (H, W), both positive, for each layer, got 4"),
    ((3, 4), {"teacher_grid": (0, 4)},
     "SoKD: teacher_grid must be (H, W), both positive, for each layer, got (0, 4)"),
    (([3, 3], [4, 4]), {"adapter": nn.ModuleList([nn.Identity()])},
     "SoKD: adapter must have one entry for each of the 2 layers, got 1"),
    ((3, 4), {"policies": 5}, "Policy: policies must be a list of pairs of operations, got 5"),
])  # fmt: skip
def test_bad_options_are_refused(arguments, options, text):
    with raises(ValueError, text):
        SoKD(*arguments, **options)
