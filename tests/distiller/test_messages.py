"""Errors that name what really happened."""

import copy
import re
import subprocess
import sys

import pytest
import torch
from support.distiller_cases import SMALL, Answering, Net, batch, make, models, objective
from support.raises import raises, warns
from torch import nn

import sokd
from sokd import methods

REPLACED = (
    "Distiller: the student's layer {!r} must be the module that it was when the Distiller "
    "was made, got another one (convert_sync_batchnorm, an adapter such as LoRA, or a rebuilt "
    "part); change the model first, then make its Distiller"
)


# ------------------------------------------------------------------------ layers that are elsewhere
class Wrapped(nn.Module):
    """A frozen layer with something trained beside it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.scale = base, nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.base(x) * self.scale


def inject(student: Net) -> None:
    student.requires_grad_(False)
    student.stage1[1] = Wrapped(student.stage1[1])


CHANGES = {
    "rebuilt": lambda student: setattr(student, "stage1", Net._stage(3, 6, 2, True, False)),
    "wrapped": inject,
    "synchronised": lambda student: setattr(
        student, "stage1", nn.SyncBatchNorm.convert_sync_batchnorm(student.stage1)
    ),
    "moved": lambda student: (
        setattr(student, "other", nn.Sequential(*student.stage1)),
        setattr(student, "stage1", student.other),
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_layer_that_was_replaced_later(change, steps):
    layers = ["stage1.1", "stage2"]
    distiller = make(layers=layers)
    for _ in range(steps):
        objective(distiller)
    change(distiller.student)
    if is_tapped(distiller.student.stage1[1]):
        assert objective(distiller).isfinite(), "the very layer moved along"
    else:
        with raises(RuntimeError, REPLACED.format("stage1.1")):
            objective(distiller)


def test_a_weight_for_another_name():
    distiller = make(method={"fitnet": 2.0})
    distiller.weights["fitness"] = 3.0
    rule = "name methods of this Distiller (fitnet)"
    with raises(ValueError, f"Distiller: weights must {rule}, got 'fitness'"):
        objective(distiller)


def is_tapped(module: nn.Module) -> bool:
    return any(type(hook).__name__ == "Tap" for hook in module._forward_hooks.values())


def test_a_teachers_layer_that_was_replaced():
    distiller = make()
    distiller.teacher.stage1 = copy.deepcopy(distiller.teacher.stage2)
    text = REPLACED.replace("the student's", "the teacher's").format("stage1")
    with raises(RuntimeError, text):
        objective(distiller)


class Dropping(Net):
    """Skips a stage in some passes, as LayerDrop does."""

    drop = False

    def features(self, x):
        maps = self.stage1(self.stem(x))
        return maps.tile(1, 2, 1, 1)[:, :, ::2, ::2] if self.drop else self.stage2(maps)


def test_a_layer_that_is_skipped_in_a_pass():
    student = Dropping(3)
    distiller = make(models=(Net(6), student))
    assert objective(distiller).isfinite()
    student.drop = True
    text = (
        "Distiller: the student's layer 'stage2' must run in every forward pass, got no call; the "
        "model skipped it in this pass (LayerDrop, a branch) or called a method of it, such as "
        "forward_features, which runs no hooks: name a layer that always runs"
    )
    with raises(RuntimeError, text):
        objective(distiller)


@pytest.mark.parametrize("kind", ["ModuleList", "ModuleDict"])
def test_a_list_of_layers_is_not_called(kind):
    pair = models()
    for net in pair:
        parts = [nn.Identity()]
        net.extra = nn.ModuleDict({"0": parts[0]}) if kind == "ModuleDict" else nn.ModuleList(parts)
    text = (
        "Distiller: the student's layer 'extra' must run in every forward pass, got no call; it is "
        f"a {kind}, which is never called: name one of its entries"
    )
    with raises(RuntimeError, text):
        make(models=pair, layers="extra")


@pytest.mark.parametrize("way", ["features", "search"])
def test_a_layer_that_is_replaced_before_a_search(way):
    distiller = make()
    distiller.student.stage1 = copy.deepcopy(distiller.student.stage1)
    with pytest.raises(RuntimeError, match="'stage1' must be the module that it was"):
        if way == "features":
            distiller.features(batch()[0])
        else:
            distiller.step(distiller.student, batch())


def test_a_layer_that_is_compiled_later():
    distiller = make()
    distiller.student.stage1 = torch.compile(distiller.student.stage1, backend="eager")
    with pytest.raises(RuntimeError, match="'stage1' must be the module that it was"):
        objective(distiller)


# -------------------------------------------------------------------------------------------- calls
class Two(Net):
    def forward(self, left, right):
        return super().forward(left + right)


def test_an_input_that_forward_does_not_take():
    x, y = batch()
    rule = "be an input of the {}'s forward({}), several as a dict of keywords"
    one, two = rule.format("student", "x"), rule.format("student", "left, right")
    with raises(TypeError, f"Distiller: x must {one}, got dict of 'image', 'label'"):
        make(example={"image": x, "label": y})
    with raises(TypeError, f"Distiller: x must {one}, got dict of 'image'"):
        make()({"image": x}, y)
    pair = Two(6), Two(3)
    with raises(TypeError, f"Distiller: x must {two}, got tuple of Tensor, Tensor"):
        make(models=pair, example=(x, x))
    of_teacher = rule.format("teacher", "left, right")
    with raises(TypeError, f"Distiller: x must {of_teacher}, got Tensor"):
        make(models=(Two(6), Net(3)))
    named = make(models=pair, example={"left": x, "right": x})
    doubled = make(models=models())
    doubled.student.load_state_dict(named.student.state_dict())
    found, wanted = named({"left": x, "right": x}, y), doubled(x + x, y)
    torch.testing.assert_close(found[1]["loss_ce"], wanted[1]["loss_ce"])


def test_a_student_that_takes_no_target():
    """DETR: the targets are a list of dicts, and the criterion is apart from the model."""
    pair = tuple(Answering(net, lambda z: {"pred_logits": z, "pred_boxes": z}) for net in models())
    distiller = make(models=pair, layers="net.stage1")
    targets = [{"labels": torch.zeros(1)}] * 4
    rule = "be a loss (output, y) where the student's forward(x) takes no target"
    got = "list of dict, dict, dict"
    with raises(TypeError, f"Distiller: task must {rule}, got 'auto' with a {got}"):
        distiller(batch()[0], targets)
    assert distiller.eval()(batch()[0], targets)[1] == {}


def test_an_error_inside_a_model_stays():
    def fails(z):
        raise TypeError("of the user's own")

    pair = tuple(Answering(net, fails) for net in models())
    with raises(TypeError, "of the user's own"):
        make(models=pair, layers="net.stage1")


# ------------------------------------------------------------------------------------------- labels
@pytest.mark.parametrize("wrong", [-1, 5, 255])
def test_dkd_and_a_label_that_is_no_class(wrong):
    target = torch.tensor([0, 1, wrong, -100])
    text = f"dkd: target must be class indices 0 .. 4 (-100 is ignored), got {wrong}"
    with raises(ValueError, text):
        methods.dkd(torch.randn(4, 5), torch.randn(4, 5), target)


def test_dkd_leaves_ignored_samples_out():
    student, teacher = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)
    target = torch.tensor([0, -100, 2, 4, -100, 1])
    kept = target != -100
    found = methods.dkd(student, teacher, target)
    expected = methods.dkd(student[kept], teacher[kept], target[kept])
    torch.testing.assert_close(found, expected)
    own = torch.autograd.grad(found, student)[0]
    torch.testing.assert_close(own, torch.autograd.grad(expected, student)[0])
    assert not own[~kept].any()
    named = methods.dkd(student, teacher, target.where(kept, -1), ignore_index=-1)
    torch.testing.assert_close(named, expected)
    assert methods.dkd(student, teacher, torch.full((6,), -100)) == 0


def test_dkd_by_name_honours_the_ignored_label():
    x, y = batch()
    ignored = y.clone()
    ignored[0] = -100
    losses = make(method="dkd", sokd=False)(x, ignored)[1]
    alone = make(method="dkd", sokd=False)
    expected = methods.dkd(*(net(x)[1:] for net in (alone.student, alone.teacher)), y[1:])
    torch.testing.assert_close(losses["loss_dkd"], expected)
    ignored[0] = -1
    task = nn.CrossEntropyLoss(ignore_index=-1)
    named = make(method="dkd", sokd=False, task=task, ignore_index=-1)(x, ignored)[1]
    torch.testing.assert_close(named["loss_dkd"], expected)


# ------------------------------------------------------------------------------------------ reloads
def reloaded_sokd() -> nn.Module:
    """A SoKD of the class as it was before a notebook's reload."""
    old = sokd.SoKD(3, 3, **SMALL)
    old.__class__ = type("SoKD", (nn.Module,), dict(vars(nn.Module)))
    return old


@pytest.mark.parametrize("call", [
    lambda kd: sokd.loss(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), kd),
    lambda kd: sokd.wrap(nn.MSELoss(), kd),
    lambda kd: make(sokd=kd),
], ids=["loss", "wrap", "Distiller"])  # fmt: skip
def test_a_kd_of_another_import(call):
    got = "got a SoKD of another import of sokd (make kd again after the reload)"
    with pytest.raises(TypeError, match=re.escape(got)):
        call(reloaded_sokd())


def test_a_kd_of_a_real_reload():
    script = (
        "import sys, torch, sokd\n"
        "kd = sokd.SoKD(3, 3)\n"
        "for name in ['sokd.kd.sokd']:\n"
        "    import importlib; importlib.reload(sys.modules[name])\n"
        "maps = torch.randn(2, 3, 8, 8)\n"
        "try:\n"
        "    sys.modules['sokd.kd.sokd'].loss(maps, maps, kd)\n"
        "except TypeError as error:\n"
        "    assert 'another import of sokd' in str(error), error\n"
        "else:\n"
        "    raise SystemExit('accepted')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# -------------------------------------------------------------------------- the order of the models
def test_a_student_larger_than_its_teacher():
    counts = [sum(p.numel() for p in Net(width).parameters()) for width in (6, 3)]
    text = (
        f"sokd: the student has {counts[0]:,} parameters, more than the teacher's {counts[1]:,}; "
        f"the order "
        "is Distiller(student, teacher)"
    )
    with warns(text):
        distiller = make(models=(Net(3), Net(6)))
        objective(distiller)
    assert objective(make(models=(Net(3), Net(3)))).isfinite()


def test_a_teacher_that_is_set_later():
    """It would be trained with the student, and not run."""
    distiller, other = make(), Net(6)
    with pytest.raises(AttributeError, match="make another Distiller, or load the weights into it"):
        distiller.teacher = other
    assert not {*other.parameters()} & {*distiller.parameters()}
    distiller.teacher.load_state_dict(other.state_dict())
    x = batch()[0]
    torch.testing.assert_close(distiller.teacher(x), other.eval()(x))
