"""The terms of a Distiller against the same written by hand; its inputs and outputs."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from support.distiller_cases import (
    CLASSES,
    SMALL,
    Answering,
    Net,
    batch,
    extra,
    gradients,
    make,
    models,
    objective,
    rewound,
)
from support.raises import raises
from torch import Tensor, nn

import sokd
from sokd import methods
from sokd.distiller import Distiller


def hand_written(distiller: Distiller) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, and the two stages' maps of a Net, as a user would get them by changing it."""
    student, (x, _) = distiller.student, batch()
    first = student.stage1(student.stem(x))
    second = student.stage2(first)
    return student.head(second.mean((2, 3))), first, second


def teacher_maps(distiller: Distiller) -> list[Tensor]:
    teacher, (x, _) = distiller.teacher, batch()
    with torch.no_grad():
        first = teacher.stage1(teacher.stem(x))
        return [first, teacher.stage2(first)]


def test_fitnet_is_the_adapted_mean_squared_error():
    distiller, (x, y) = make(sokd=False, method={"fitnet": 3.0}), batch()
    logits, losses = distiller(x, y)
    expected, *maps = hand_written(distiller)
    hints = [
        F.mse_loss(adapter(f_s, f_t.shape[2:]), f_t)
        for adapter, f_s, f_t in zip(distiller.adapters, maps, teacher_maps(distiller), strict=True)
    ]
    assert list(losses) == ["loss_ce", "loss_fitnet"]
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(losses["loss_ce"], F.cross_entropy(expected, y))
    torch.testing.assert_close(losses["loss_fitnet"], 3 * sum(hints))


def test_with_sokd_fitnet_is_sokd_loss():
    distiller = make(method={"fitnet": 10.0}, sokd={**SMALL, "lambda_areas": 10.0})
    _, losses = distiller(*batch())
    _, *maps = hand_written(distiller)
    terms = sokd.loss(maps, teacher_maps(distiller), rewound(distiller).kd, return_terms=True)
    assert list(losses) == ["loss_ce", "loss_fitnet", "loss_agreement"]
    torch.testing.assert_close(losses["loss_fitnet"], terms["areas"])
    torch.testing.assert_close(losses["loss_agreement"], terms["agreement"])


@pytest.mark.parametrize("method", ["kd", None])
def test_where_no_method_looks_at_features_sokd_does(method):
    distiller = make(method=method)
    _, losses = distiller(*batch())
    _, *maps = hand_written(distiller)
    terms = sokd.loss(maps, teacher_maps(distiller), rewound(distiller).kd, return_terms=True)
    torch.testing.assert_close(losses["loss_sokd"], terms["areas"])
    torch.testing.assert_close(losses["loss_agreement"], terms["agreement"])
    assert ("loss_kd" in losses) == (method == "kd")


def test_kd_alone_needs_no_layer():
    distiller, (x, y) = (
        make(method={"kd": 2.0}, sokd=False, layers="nowhere", example=None),
        batch(),
    )
    logits, losses = distiller(x, y)
    with torch.no_grad():
        of_teacher = distiller.teacher(x)
    torch.testing.assert_close(losses["loss_kd"], 2 * methods.kd(logits, of_teacher))
    assert not distiller.student.stage1._forward_hooks


@pytest.mark.parametrize("name", sorted(methods.METHODS))
@pytest.mark.parametrize("plugged", [False, True], ids=["alone", "sokd"])
def test_every_method_by_name(name, plugged):
    options = {"num_samples": 8, "negatives": 4} if name == "crd" else {}
    distiller = make(method=name, sokd=SMALL if plugged else False, **options)
    _, losses = distiller(*batch(), **extra())
    torch.stack(list(losses.values())).sum().backward()
    assert {"loss_ce", f"loss_{name}"} <= set(losses)
    assert ("loss_agreement" in losses) == plugged
    assert all(loss.dim() == 0 and loss.isfinite() for loss in losses.values())
    unused = [key for key, p in distiller.named_parameters() if p.grad is None]
    assert unused == [], "DistributedDataParallel would wait for them"
    assert all(p.grad is None for p in distiller.teacher.parameters())


def test_methods_combine_with_their_weights():
    both = make(method={"fitnet": 2.0, "kd": None}, sokd=False)
    _, losses = both(*batch())
    _, alone = make(method="kd", sokd=False)(*batch())
    torch.testing.assert_close(losses["loss_kd"], alone["loss_kd"])
    assert both.weights == {"fitnet": 2.0, "kd": methods.METHODS["kd"].default_weight}


def test_a_callable_gets_maps_of_one_shape():
    seen = []

    def cosine(f_s, f_t):
        seen.append((f_s.shape, f_t.shape))
        return 1 - F.cosine_similarity(f_s, f_t).mean()

    _, losses = make(method=cosine, sokd=False)(*batch())
    assert list(losses) == ["loss_ce", "loss_cosine"]
    assert seen == [((4, 12, 8, 8),) * 2, ((4, 24, 4, 4),) * 2]


def test_a_callable_is_masked_as_masked_mse_is():
    distiller = make(method=F.mse_loss)
    _, losses = distiller(*batch())
    named = make(method={"fitnet": 1.0})
    torch.testing.assert_close(losses["loss_mse_loss"], named(*batch())[1]["loss_fitnet"])


def test_a_module_as_method_is_trained():
    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, f_s, f_t):
            return self.scale * F.l1_loss(f_s, f_t)

    distiller = make(method={Learned(): 2.0}, sokd=False)
    objective(distiller).backward()
    assert distiller.methods["learned"].loss.scale.grad is not None
    assert any(name.endswith("scale") for name, _ in distiller.named_parameters())


def test_a_partial_has_a_name_too():
    _, losses = make(method=functools.partial(F.smooth_l1_loss, beta=0.5), sokd=False)(*batch())
    assert list(losses) == ["loss_ce", "loss_feature"]


def test_a_sokd_of_ones_own():
    kd = sokd.SoKD([6, 12], [12, 24], policy=None, **SMALL)
    distiller = make(sokd=kd)
    assert distiller.kd is kd
    assert objective(distiller).isfinite()


def test_eval_is_the_student():
    distiller, (x, y) = make().eval(), batch()
    bare = copy.deepcopy(distiller.student)
    assert torch.equal(distiller(x), bare(x))
    logits, losses = distiller(x, y)
    assert list(losses) == ["loss_ce"]
    torch.testing.assert_close(losses["loss_ce"], F.cross_entropy(logits, y))
    assert int(distiller.kd.policy.counter) == 0, "an evaluation takes no draw"


def test_without_a_target_there_is_no_task_loss():
    _, losses = make()(batch()[0])
    assert list(losses) == ["loss_fitnet", "loss_agreement"]


def test_the_teacher_is_a_constant():
    distiller = make()
    distiller.train()
    assert not any(part.training for part in distiller.teacher.modules())
    assert not any(p.requires_grad for p in distiller.teacher.parameters())
    before = copy.deepcopy(distiller.teacher.state_dict())
    objective(distiller).backward()
    ids = {id(p) for p in distiller.teacher.parameters()}
    assert not ids & {id(p) for p in distiller.parameters()}
    assert not [name for name in distiller.state_dict() if "teacher" in name]
    assert sum("stem.0.weight" in name for name in distiller.state_dict()) == 1
    after = distiller.teacher.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_to_moves_the_teacher_and_keeps_it_frozen():
    distiller = make().to(torch.float64)
    assert {p.dtype for p in distiller.teacher.parameters()} == {torch.float64}
    assert not any(p.requires_grad for p in distiller.teacher.parameters())
    assert objective(distiller, *batch(dtype=torch.float64)).dtype == torch.float64


def test_the_dry_run_leaves_no_trace():
    teacher, student = models()
    student.stem.eval()  # a mode of the user's own
    before, modes = copy.deepcopy(student.state_dict()), [m.training for m in student.modules()]
    state = torch.get_rng_state()
    Distiller(student, teacher, layers="stage1", example=batch()[0], method="at", sokd=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in student.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


def test_the_first_batch_serves_as_example():
    lazy = make(example=None)
    for use in (lambda: list(lazy.parameters()), lambda: lazy.load_state_dict({})):
        with pytest.raises(
            RuntimeError, match="Distiller: the parameters do not exist before the shapes are"
        ):
            use()
    torch.manual_seed(7)
    value, other = objective(lazy), make(example=None)
    torch.manual_seed(7)
    assert torch.equal(value, objective(other.setup(batch()[0])))
    assert len(list(lazy.parameters())) == len(list(make().parameters()))


def test_a_distiller_that_waits_can_be_shown_and_looked_at():
    teacher, student = models()
    lazy = Distiller(student, teacher, sokd=SMALL)
    assert "layers: none, weights: fitnet=100" in repr(lazy)
    students, teachers = lazy.features(batch()[0])
    assert len(students) == len(teachers) == len(lazy.pairs) == 3
    other = Distiller(*reversed(models()), sokd=SMALL)
    task, *_ = other.step(other.student, batch())
    assert task.isfinite() and len(other.pairs) == 3


@pytest.mark.parametrize(("form", "where", "task"), [
    (lambda z: {"loss": z.sum() * 0 + 9, "logits": z}, None, "loss_task"),
    (lambda z: {"aux": z + 1, "out": z}, None, "loss_ce"),
    (lambda z: (z, [z + 1]), None, "loss_ce"),
    (lambda z: (z + 1, z), 1, "loss_ce"),
    (lambda z: {"hidden": {"z": z}}, lambda output: output["hidden"]["z"], "loss_ce"),
], ids=["logits and loss", "out", "tuple", "index", "function"])  # fmt: skip
def test_logits_are_found(form, where, task):
    teacher, student = (Answering(net, form) for net in models())
    layers = ["net.stage1", "net.stage2"]
    options = {"method": "kd", "sokd": False, "logits": where}
    distiller = make(models=(teacher, student), layers=layers, **options)
    output, losses = distiller(*batch())
    _, plain = make(method="kd", sokd=False)(*batch())
    torch.testing.assert_close(losses["loss_kd"], plain["loss_kd"])
    assert type(output) is type(form(torch.zeros(1, 5))), "what the student returned"
    assert distiller.logits_of(output).shape == (4, CLASSES)
    assert list(losses) == [task, "loss_kd"]


@pytest.mark.parametrize(("features", "shape"), [
    (lambda z: z.tile(1, 2)[:, :8], "[4, 8]"),
    (lambda z: z[:, :, None, None].tile(1, 1, 2, 2), "[4, 5, 2, 2]"),
], ids=["embedding", "map"])  # fmt: skip
def test_features_beside_the_logits(features, shape):
    """Which of the two are the logits is not guessed: a wrong guess trains without an error."""
    twofold = [Answering(net, lambda z: (features(z), z)) for net in models()]
    given = {"models": twofold, "layers": "net.stage1", "sokd": False}
    got = f"tuple of float32 {shape}, float32 [4, 5]"
    text = (
        f"logits must be in what the student returns (name them by logits=, or the loss by task=), "
        f"got {got}"
    )
    with pytest.raises(TypeError) as caught:
        objective(make(**given))
    assert str(caught.value) == f"Distiller: {text}"
    text = (
        "logits must be in the output of both models for method 'kd' (select them by "
        "logits=), got none"
    )
    with raises(ValueError, f"Distiller: {text}"):
        objective(make(**given, method="kd", task=None))
    _, losses = make(**given, method={"fitnet": None, "kd": None}, logits=1)(*batch())
    _, plain = make(layers="stage1", sokd=False, method="kd")(*batch())
    assert torch.equal(losses["loss_kd"], plain["loss_kd"])
    assert make(**given)(batch()[0])[1].keys() == {"loss_fitnet"}, (
        "no logits are required where none are used"
    )


def test_logits_named_for_one_of_two_models():
    """A tensor is the logits, whatever entry is named for the other model's."""
    teacher, student = models()
    twofold = Answering(teacher, lambda z: (z + 1, z))
    given = {"models": (twofold, student), "layers": {"stage1": "net.stage1"}, "logits": 1}
    _, losses = make(**given, method="kd", sokd=False)(*batch())
    _, plain = make(method="kd", sokd=False)(*batch())
    torch.testing.assert_close(losses["loss_kd"], plain["loss_kd"])


class Judging(nn.Module):
    """Computes its own losses in train mode, as torchvision's detectors do."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x, targets=None):
        logits = self.net(x)
        if not self.training:
            return [{"scores": row} for row in logits]
        y = torch.stack([target["label"] for target in targets])
        return {"loss_classifier": F.cross_entropy(logits, y), "loss_box": logits.square().mean()}


def test_losses_inside_the_student():
    teacher, student = map(Judging, models())
    distiller = make(models=(teacher, student), layers=["net.stage2"], method="fitnet")
    x, y = batch()
    output, losses = distiller(x, [{"label": label} for label in y])
    assert list(losses) == ["loss_classifier", "loss_box", "loss_fitnet", "loss_agreement"]
    assert isinstance(output, dict)
    distiller.eval()
    assert len(distiller(x)) == 4
    assert distiller(x, [{"label": label} for label in y])[1] == {}


@pytest.mark.parametrize(("form", "names"), [
    (lambda a, b: {"loss": a + b, "loss_ce": a, "loss_reg": b}, ["loss_task"]),
    (lambda a, b: {"loss": (a + b).detach(), "loss_ce": a, "loss_reg": b}, ["loss_ce", "loss_reg"]),
    (lambda a, b: {"loss": (a + b).reshape(1), "logits": torch.zeros(4, 5)}, ["loss_task"]),
    (lambda a, b: {"loss_ce": a, "box_loss": b, "accuracy": b.detach() + 1},
     ["loss_ce", "loss_box_loss"]),
    (lambda a, b: {"ce": a, "box": b}, ["loss_ce", "loss_box"]),
], ids=["total", "parts", "one element", "metric", "no name"])  # fmt: skip
def test_which_scalars_of_the_student_are_losses(form, names):
    teacher, student = models()
    answer = Answering(student, lambda z: form(z.exp().mean(), z.square().mean()))
    options = {"layers": {"net.stage1": "stage1"}, "method": "fitnet", "sokd": False}
    _, losses = make(models=(teacher, answer), **options)(batch()[0])
    z = student(batch()[0]).detach()
    assert list(losses) == [*names, "loss_fitnet"]
    own = sum(losses[name] for name in names)
    assert own.requires_grad
    torch.testing.assert_close(own.detach(), z.exp().mean() + z.square().mean())


@pytest.mark.parametrize(("names", "rule", "got"), [
    (("loss_ce", "confidence"),
     "have 'loss' in the names of its losses, and its other scalars detached", "'confidence'"),
    (("loss", "loss_ce"),
     "have a 'loss' that is computed from its other losses, or another name for it",
     "'loss', 'loss_ce'"),
])  # fmt: skip
def test_a_scalar_that_may_be_a_loss_is_refused(names, rule, got):
    teacher, student = models()
    answer = Answering(student, lambda z: dict(zip(names, (z.exp().mean(), z.amax()), strict=True)))
    distiller = make(models=(teacher, answer), layers={"net.stage1": "stage1"})
    with raises(ValueError, f"Distiller: the student's output must {rule}, got {got}"):
        distiller(batch()[0])


class TwoHeads(Net):
    """Returns the logits of two classifiers of one shape."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.other = copy.deepcopy(self.head)

    def forward(self, x):
        z = super().forward(x)
        return {"logits": z, "aux": z + 0 * self.other.weight.sum()}


@pytest.mark.parametrize("method", ["catkd", "wkd"])
def test_two_classifiers_of_one_shape_are_named(method):
    torch.manual_seed(0)
    teacher, student = TwoHeads(6), TwoHeads(3)
    side, channels = ("student", 12) if method == "catkd" else ("teacher", 24)
    given = {"models": (teacher, student), "sokd": False, "logits": "logits", "layers": "stage2"}
    given |= {"task": lambda output, y: F.cross_entropy(output, y)}
    rule = f"be given, because several layers of the {side} go from {channels} channels to 5"
    with raises(ValueError, f"Distiller: {side}_head must {rule} classes, got 'head', 'other'"):
        make(**given, method=method)
    heads = {"student_head": student.head} if method == "catkd" else {}
    distiller = make(**given, method=method, **heads, teacher_head=teacher.head)
    distiller(*batch())[1][f"loss_{method}"].backward()
    assert student.stage1[0].weight.grad.any()


class Keyworded(nn.Module):
    """Takes keywords and a loss's labels, as Hugging Face's models do."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixel_values, labels=None):
        logits = self.net(pixel_values)
        return {
            "loss": None if labels is None else F.cross_entropy(logits, labels),
            "logits": logits,
        }


def test_a_dict_of_keywords():
    teacher, student = map(Keyworded, models())
    x, y = batch()
    layers = ["net.stage1", "net.stage2"]
    distiller = make(models=(teacher, student), layers=layers, example={"pixel_values": x})
    output, losses = distiller({"pixel_values": x, "labels": y})
    torch.testing.assert_close(losses["loss_task"], F.cross_entropy(output["logits"], y))
    assert list(losses) == ["loss_task", "loss_fitnet", "loss_agreement"]


def test_a_task_of_ones_own():
    smooth = nn.CrossEntropyLoss(label_smoothing=0.1)
    logits, losses = make(task=smooth)(*batch())
    torch.testing.assert_close(losses["loss_task"], smooth(logits, batch()[1]))
    assert "loss_ce" not in make(task=None)(*batch())[1]


def test_vectors_and_tokens_meet_maps_of_one_kind():
    teacher, student = models()
    distiller = make(models=(teacher, student), layers={"head": "head"}, method="fitnet")
    assert objective(distiller).isfinite()


def test_diagnostics_hold_the_terms():
    distiller = make()
    _, losses = distiller(*batch())
    seen = distiller.kd.diagnostics()
    torch.testing.assert_close(seen["areas"], losses["loss_fitnet"].detach())
    torch.testing.assert_close(seen["agreement"], losses["loss_agreement"].detach())
    assert 0 < seen["covered_share"] <= 1


def test_two_students_share_one_teacher():
    teacher, student = models()
    first = make(models=(teacher, student), sokd=False)
    alone = objective(first)
    second = make(models=(teacher, Net(4)), sokd=False)
    objective(second).backward()
    assert gradients(second) and not gradients(first)
    assert torch.equal(objective(first), alone)


@pytest.mark.parametrize("layers", [["stage1", "stage2"], "auto"], ids=str)
def test_a_dry_run_under_autocast_takes_no_gradient_from_the_step(layers):
    """Autocast of older releases of torch keeps the casts of a pass without gradients."""
    distiller = make(layers=layers, example=None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = objective(distiller)
        distiller.features(batch()[0])
        loss = loss + objective(distiller)
    loss.backward()
    assert gradients(distiller).keys() == dict(distiller.named_parameters()).keys()
