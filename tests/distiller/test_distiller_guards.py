"""A script's mistakes: bad input is refused before the first step, silent ones are warned of."""

import copy
import functools
import re
import warnings

import pytest
import torch
from support.distiller_cases import SMALL, Answering, Net, batch, make, models, objective
from support.raises import raises, warns
from torch import nn

import sokd
from sokd.distiller import Distiller

UNHELD = (
    "sokd: {} had gradients in 10 steps of the student's optimiser, but no optimiser holds them; "
    "pass it the distiller's parameters, e.g. SGD(distiller.parameters(), lr=...)"
)
TEACHER_TRAINS = (
    "sokd: the teacher was in train mode and has been set to eval mode; call teacher.eval() "
    "after teacher.train()"
)


def refused(error: type[Exception], text: str, make_or_call) -> None:
    with raises(error, f"Distiller: {text}"):
        make_or_call()


# ------------------------------------------------------------------------------------- construction
def test_a_teacher_that_is_the_student():
    net = Net(3)
    rule = "share no parameter with the student, because it is frozen (use copy.deepcopy)"
    count = len(list(net.parameters()))
    refused(ValueError, f"teacher must {rule}, got {count} of them", lambda: Distiller(net, net))
    assert all(p.requires_grad for p in net.parameters()), "a refused model is left alone"


METHOD = "method must be a name, a dict of name -> weight, or a callable (f_s, f_t) -> scalar, got"
WEIGHT = "method['at'] must be a finite number, 0 or more, got"
SOKD = "sokd must be True, False, a dict of SoKD's options or a SoKD, got"
REFUSED = {
    "a function": (TypeError, "teacher must be an nn.Module, got function",
                   lambda: Distiller(Net(3), lambda x: x)),
    "a name": (TypeError, "student must be an nn.Module, got str",
               lambda: Distiller("resnet18", Net(6))),
    "a model in DataParallel":
        (TypeError, "the model must run in one thread per process, got torch.nn.DataParallel; "
                    "use DistributedDataParallel(distiller)",
         lambda: Distiller(nn.DataParallel(Net(3)), Net(6))),
    "a number as method": (TypeError, f"{METHOD} int", lambda: make(method=3)),
    "a list of methods": (TypeError, f"{METHOD} list", lambda: make(method=["at", "kd"])),
    "a weight that is no number":
        (ValueError, f"{WEIGHT} 'much'", lambda: make(method={"at": "much"})),
    "a negative weight": (ValueError, f"{WEIGHT} -1", lambda: make(method={"at": -1})),
    "two methods of one name":
        (ValueError, "method must have one entry for each name, got 'mseloss' twice",
         lambda: make(method={nn.MSELoss(): 1.0, nn.MSELoss(reduction="sum"): 1.0})),
    "a name like a method's":
        (ValueError, f"method must be one of {', '.join(sokd.methods.METHODS)} (nearest: fitnet, "
                     "nst), got 'fitnets'", lambda: make(method="fitnets")),
    "a task by name":
        (TypeError, "task must be 'auto', 'model', None or a callable (logits, y), got 'ce'",
         lambda: make(task="ce")),
    "sokd=None": (TypeError, f"{SOKD} None", lambda: make(sokd=None)),
    "sokd=1.0": (TypeError, f"{SOKD} 1.0", lambda: make(sokd=1.0)),
    "an unknown option of SoKD":
        (TypeError, "sokd must hold options of SoKD (nearest: areas, adapter, teacher_size), got "
                    "'layers'", lambda: make(sokd={"layers": 3})),
    "a SoKD for other channels":
        (ValueError, "sokd must have the layers' channels, [6, 12] -> [12, 24], got [6, 12] -> "
                     "[12, 12]", lambda: make(sokd=sokd.SoKD([6, 12], [12, 12], **SMALL))),
    "an empty batch": (ValueError, "x must hold at least one sample, got none",
                       lambda: objective(make(), *batch(0))),
    "an empty example": (ValueError, "x must hold at least one sample, got none",
                         lambda: make(example=batch(0)[0])),
}  # fmt: skip


@pytest.mark.parametrize(("error", "text", "call"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(error, text, call):
    refused(error, text, call)


def test_an_option_that_nothing_has():
    with pytest.raises(
        TypeError,
        match=re.escape("Distiller: options must be arguments of Distiller or options of"),
    ):
        make(method="fitnet", temperatur=4.0)
    assert make(method="kd", temperature=2.0).methods["kd"] is not None


# ----------------------------------------------------------------------------------------- the step
def test_a_batch_of_one_with_batch_norm():
    teacher, student = models()
    student.head = nn.Sequential(nn.BatchNorm1d(12), student.head)
    distiller = make(models=(teacher, student), example=batch(1)[0])  # the dry run is in eval mode
    text = (
        "x must hold more than one sample where a BatchNorm in train mode has one value per "
        "channel, got 1 (drop_last=True in the DataLoader)"
    )
    refused(ValueError, text, lambda: objective(distiller, *batch(1)))
    assert objective(distiller, *batch(2)).isfinite()
    nets = [nn.Sequential(nn.Conv2d(3, 5, 16), nn.Flatten()) for _ in range(2)]  # maps of one cell
    # adapter's
    refused(ValueError, text, lambda: objective(make(models=nets, layers={"0": "0"}), *batch(1)))


def test_a_teacher_on_another_device():
    teacher, student = models()
    text = "teacher must be on the student's device cpu (distiller.to moves both), got meta"
    refused(ValueError, text, lambda: make(models=(teacher.to("meta"), student)))
    distiller = make()
    distiller.teacher.to("meta")
    refused(ValueError, text, lambda: objective(distiller))


def test_an_input_of_another_dtype_or_device():
    text = "x must have the dtype torch.float32 of the student's parameters, got torch.float64"
    refused(TypeError, text, lambda: objective(make(), *batch(dtype=torch.float64)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x, y = batch()
        text = "x must be on the device of the student's parameters, cpu, got meta"
        refused(ValueError, text, lambda: make()(x.to("meta"), y))


@pytest.mark.parametrize("bias", [True, False])  # the convolution's message differs without
def test_pixels_as_bytes(bias):
    nets = models()
    for module in [] if bias else [each for net in nets for each in net.modules()]:
        if isinstance(module, nn.Conv2d):
            module.bias = None
    text = "x must have the dtype torch.float32 of the student's parameters, got torch.uint8"
    x = (255 * batch()[0]).byte()
    refused(TypeError, text, lambda: objective(make(models=nets), x, batch()[1]))


@pytest.mark.parametrize(("make_x", "got"), [
    (lambda x, y: (x, y), "tuple of Tensor, Tensor"),
    (lambda x, y: [x, y], "list of Tensor, Tensor"),
    (lambda x, y: x.numpy(), "ndarray"),
    (lambda x, y: tuple(x.shape), "tuple of int, int, int"),
], ids=["a loader's batch", "a list of it", "an array", "a shape"])  # fmt: skip
def test_an_input_of_another_kind(make_x, got):
    rule = "be an input of both models, a tensor, a dict of keywords or a list of images"
    text = f"x must {rule} (the x of a loader's batch (x, y)), got {got}"
    refused(TypeError, text, lambda: make(example=make_x(*batch())))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_teacher_of_another_dtype(dtype):
    teacher, student = models()
    rule = (
        "have the dtype torch.float32 of the student's parameters (distiller.to converts both "
        "models)"
    )
    text = f"teacher must {rule}, got {dtype}"
    refused(TypeError, text, lambda: make(models=(teacher.to(dtype), student)))


TARGETS = {
    "int32": (lambda y: y.int(), TypeError, "torch.int32"),
    "a list": (lambda y: y.tolist(), TypeError, "list"),
    "a column": (lambda y: y[:, None], ValueError, "int64 [4, 1]"),
    "too few": (lambda y: y[:3], ValueError, "int64 [3]"),
    "numbers": (lambda y: y.float(), ValueError, "float32 [4]"),
}


@pytest.mark.parametrize(("change", "error", "got"), TARGETS.values(), ids=TARGETS)
def test_targets_that_do_not_fit(change, error, got):
    x, y = batch()
    own = "class indices [4] (int64) or probabilities [4, 5] (float) for the logits [4, 5]"
    text = f"target must be {own} (others: logits=, task=), got {got}"
    refused(error, text, lambda: make()(x, change(y)))


def test_a_class_that_the_logits_do_not_have_and_another_device():
    x, y = batch()
    text = "target must be class indices 0 .. 4 (-100 is ignored), got 5"
    refused(ValueError, text, lambda: make()(x, torch.full_like(y, 5)))
    text = "target must be on the logits' device, cpu, got meta"
    refused(ValueError, text, lambda: make()(x, y.to("meta")))


def test_one_number_a_sample_is_no_cross_entropy():
    teacher, student = models()
    student.forward = lambda x: student.head(student.features(x).mean((2, 3)))[:, 0]
    rule = "be [B, K] for the cross entropy (select them by logits=, or another loss by task=)"
    text = f"logits must {rule}, got [4]"
    refused(
        ValueError,
        text,
        lambda: objective(make(models=(teacher, student)), batch()[0], torch.rand(4)),
    )


class Casting(nn.Module):
    """A model that computes in a dtype of its own whatever comes."""

    def __init__(self, net: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.net, self.dtype = net.to(dtype), dtype

    def forward(self, x):
        return self.net(x.to(self.dtype)).float()


def test_models_of_two_dtypes():
    teacher, student = models()
    pair = Casting(teacher, torch.float64), Casting(student, torch.float32)
    distiller = make(models=pair, layers=["net.stage1", "net.stage2"])
    teachers = "the teacher's layer 'net.stage1', torch.float64"
    rule = f"have the dtype of {teachers} (distiller.to converts both models)"
    refused(
        TypeError,
        f"the student's layer 'net.stage1' must {rule}, got torch.float32",
        lambda: objective(distiller),
    )


NEEDS = {
    "crd": "index must be the samples' indices in the training set, int64 [B], for method "
    "'crd', as in distiller(x, y, index=i), got none",
    "dkd": "target must be class indices [B] for method 'dkd', as in distiller(x, y), "
    "got float32 [4, 5]",
}


@pytest.mark.parametrize("name", NEEDS)
def test_what_a_method_needs_of_a_step(name):
    options = {"num_samples": 8} if name == "crd" else {}
    distiller, x = make(method=name, sokd=False, **options), batch()[0]
    refused(ValueError, NEEDS[name], lambda: distiller(x, torch.rand(4, 5).softmax(1)))


class Boxes(Net):
    def forward(self, x):
        return [{"boxes": super().forward(x)}]


def test_models_without_logits():
    distiller, (x, y) = make(models=(Boxes(6), Boxes(3)), sokd=False, method="kd"), batch()
    text = (
        "logits must be in what the student returns (name them by logits=, or the loss by task=), "
        "got list"
    )
    refused(TypeError, text, lambda: distiller(x, y))
    text = (
        "logits must be in the output of both models for method 'kd' (select them by "
        "logits=), got none"
    )
    refused(ValueError, text, lambda: distiller(x))


def test_logits_that_lead_nowhere():
    twofold = [Answering(net, lambda z: {"z": z}) for net in models()]
    distiller = make(models=twofold, layers="net.stage1", method="kd", sokd=False, logits="logits")
    text = "logits must select from the models' output ('z'), got 'logits'"
    refused(ValueError, text, lambda: objective(distiller))


def test_a_student_that_should_have_returned_losses():
    teacher, student = models()
    student.forward = lambda x, targets=None: student.head(student.features(x).mean((2, 3)))
    rule = (
        "be one that the student computes itself ('model'): a dict of scalars, or an output with a "
        "loss"
    )
    text = f"task must {rule}, got Tensor"
    refused(TypeError, text, lambda: objective(make(models=(teacher, student), task="model")))


@pytest.mark.parametrize("way", ["frozen", "no_grad", "reentrant"])
def test_a_map_without_a_gradient(way):
    teacher, student = models()
    if way == "frozen":
        student.stem.requires_grad_(False)
    elif way == "no_grad":
        inner = student.stem.forward
        student.stem.forward = lambda x: torch.no_grad()(inner)(x)
    else:
        inner = student.features
        again = functools.partial(torch.utils.checkpoint.checkpoint, inner, use_reentrant=True)
        student.features = lambda x: again(x.requires_grad_())
    text = (
        "the student's layer 'stem' must give a map with a gradient, got one without; it is "
        "frozen, runs under no_grad, or is checkpointed with use_reentrant=True (use "
        "use_reentrant=False)"
    )
    distiller = make(models=(teacher, student), layers="stem")
    refused(ValueError, text, lambda: objective(distiller))
    with torch.no_grad():
        assert objective(distiller).isfinite()


@pytest.mark.parametrize(("where", "text"), [
    ("student", "the student's layer 'stage2' is not finite either"),
    ("teacher", "the teacher's layer 'stage1' is not finite either"),
    ("method", "the maps of all layers are finite"),
])  # fmt: skip
def test_a_term_that_is_nan(where, text):
    def method(f_s, f_t):
        return (f_s - f_t).square().mean() * (float("nan") if where == "method" else 1)

    distiller = make(method=method, sokd={"dam": None})
    if where != "method":
        layer = distiller.student.stage2[0] if where == "student" else distiller.teacher.stage1[0]
        layer.weight.data[0, 0, 0, 0] = float("nan")
    name = "loss_ce" if where == "student" else "loss_method"
    refused(
        FloatingPointError,
        f"{name} must be finite, got nan; {text} (check_finite=False skips this check)",
        lambda: objective(distiller),
    )
    distiller.check_finite = False
    assert objective(distiller).isnan()


# ---------------------------------------------------------------------------------- silent mistakes
def trained(distiller: Distiller, parameters, steps: int = 15) -> list[str]:
    """Train, and return what was warned of."""
    optimiser = torch.optim.SGD(parameters, lr=1e-6)
    x, y = batch(2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimiser.zero_grad()
            objective(distiller, x, y).backward()
            optimiser.step()
    return [str(warning.message) for warning in caught]


def test_a_right_script_is_left_alone():
    distiller = make(method={"mgd": None, "fitnet": None})
    assert trained(distiller, distiller.parameters()) == []


@pytest.mark.parametrize(("options", "parts"), [
    ({"sokd": False}, "distiller.adapters"),
    ({}, "distiller.kd.adapter and distiller.kd.dam"),
    ({"sokd": False, "method": "reviewkd"}, "distiller.methods.reviewkd"),
], ids=["adapters", "sokd", "method"])  # fmt: skip
def test_parameters_that_no_optimiser_holds(options, parts):
    distiller = make(**options)
    assert trained(distiller, distiller.student.parameters()) == [UNHELD.format(parts)]
    assert trained(distiller, distiller.student.parameters()) == [], "once is enough"
    twin = copy.deepcopy(distiller)
    assert trained(twin, distiller.student.parameters()) == [], "its copy's student rests"


def test_a_teacher_in_train_mode():
    distiller = make()
    distiller.teacher.stage1.train()
    before = distiller.teacher.stage1[1].running_mean.clone()
    with warns(TEACHER_TRAINS) as caught:
        objective(distiller)
        distiller.teacher.train()
        objective(distiller)
    file = __file__.replace("distiller/test_distiller_guards", "support/distiller_cases")
    assert caught[0].filename == file
    assert torch.equal(distiller.teacher.stage1[1].running_mean, before)


def test_a_mask_of_everything_warns_once():
    distiller = make(sokd={"heat_channels": 3, "k": 48})
    with pytest.warns(UserWarning, match="the areas covered every cell for 10 steps"):
        for _ in range(10):
            distiller.kd.dam[0].size.bias.data.fill_(9.0)
            distiller.kd.dam[1].size.bias.data.fill_(9.0)
            objective(distiller)
