"""The methods by name: their declarations, their errors, `Step`s with and without the mask."""

import copy
import dataclasses
import pickle

import pytest
import torch
from support.cases import compiles
from support.raises import raises
from torch import nn

from sokd import methods
from sokd.methods import METHODS, Method, Step, build
from sokd.methods.regions import Images

STUDENT, TEACHER = [(3, 8, 6), (4, 4, 3)], [(5, 8, 6), (6, 2, 2)]
CLASSES, BATCH, SAMPLES = 7, 4, 20
NEEDS = {"logits", "features", "target", "index", "boxes"}
NAMES = [
    "fitnet", "at", "crd", "reviewkd", "kd", "dkd", "lskd", "dist", "sp", "rkd", "catkd", "mgd",
    "fgd", "wkd", "nst", "pkt", "vid", "cc", "ofd",
]  # fmt: skip


def made(name: str) -> Method:
    torch.manual_seed(0)
    options = {
        "crd": {"num_samples": SAMPLES, "negatives": 6},
        "catkd": {"student_head": nn.Linear(4, CLASSES), "teacher_head": nn.Conv2d(6, CLASSES, 1)},
        "wkd": {"teacher_head": nn.Linear(6, CLASSES)},
    }
    return build(name, student_shapes=STUDENT, teacher_shapes=TEACHER, **options.get(name, {}))


def step(mask: bool = False, method: type[Method] | None = None, batch: int = BATCH) -> Step:
    """A step with what the method declares in `needs`, and nothing else."""
    torch.manual_seed(1)
    needs = NEEDS if method is None else method.needs

    def maps(shapes):
        return [torch.randn(batch, *shape) for shape in shapes] if "features" in needs else []

    adapted = maps(TEACHER) if method is None or method.adapts else []
    weights = [torch.randint(1, 4, (batch, *shape[1:])).float() for shape in TEACHER]
    return Step(
        student_logits=torch.randn(batch, CLASSES) if "logits" in needs else None,
        teacher_logits=torch.randn(batch, CLASSES) if "logits" in needs else None,
        target=torch.randint(0, CLASSES, (batch,)) if "target" in needs else None,
        student=maps(STUDENT), teacher=maps(TEACHER), adapted=adapted,
        weight=[weight if mask else None for weight in weights],
        index=torch.arange(batch) if "index" in needs else None,
        **(boxes_of(batch) if "boxes" in needs else {}),
    )  # fmt: skip


def boxes_of(batch: int) -> dict:
    """One to each image but the first, which is smaller than the input."""
    boxes = [torch.tensor([[3.0, 2.0, 9.0, 20.0]])[: min(image, 1)] for image in range(batch)]
    sizes = tuple((20 if image == 0 else 32, 24) for image in range(batch))
    return {"boxes": boxes, "images": Images(sizes, (32, 24))}


def leaves(given: Step) -> list[torch.Tensor]:
    found = [*given.student, *given.adapted]
    found += [] if given.student_logits is None else [given.student_logits]
    return [leaf.requires_grad_() for leaf in found]


def test_the_names():
    assert list(METHODS) == NAMES
    for name in NAMES:
        method = METHODS[name]
        assert method.name == name and callable(getattr(methods, name))
        assert method.needs <= NEEDS and method.needs
        assert method.default_weight > 0 and isinstance(method.adapts, bool)


@pytest.mark.parametrize("mask", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("name", NAMES)
def test_what_a_method_declares_is_enough(name, mask):
    """A scalar, float32, with gradients for the student and all of the method's own parameters."""
    method = made(name)
    given = step(mask, METHODS[name])
    tensors = leaves(given)
    loss = method(given)
    loss.backward()
    assert loss.shape == () and loss.dtype == torch.float32 and loss.isfinite()
    read = given.adapted if method.adapts else given.student or [given.student_logits]
    used = read[-1:] if name in ("crd", "catkd") else read
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in used), len(tensors)
    assert all(parameter.grad is not None for parameter in method.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_the_mask_applies_to_features(name):
    """Features are masked, logits are not."""
    plain, masked = (made(name).eval()(step(mask)).item() for mask in (False, True))
    assert (plain == masked) == (METHODS[name].needs & {"logits", "features"} == {"logits"})


PLAIN = ["fitnet", "at", "sp", "rkd", "kd", "lskd", "dist", "nst", "pkt", "cc"]


@pytest.mark.parametrize("name", PLAIN)
def test_by_name_it_is_the_function(name):
    given, function = step(mask=True), getattr(methods, name)
    if "logits" in METHODS[name].needs:
        expected = function(given.student_logits, given.teacher_logits)
    else:
        student = given.adapted if METHODS[name].adapts else given.student
        expected = function(student, given.teacher, given.weight)
    assert torch.equal(made(name)(given), expected)


def test_catkd_by_name_is_the_function_on_class_maps():
    method, given = made("catkd"), step(mask=True)
    student, teacher = (
        methods.class_maps(features, head)
        for features, head in zip((given.student[1], given.teacher[1]), method.heads, strict=True)
    )
    torch.testing.assert_close(method(given), methods.catkd(student, teacher, given.weight[1]))
    assert not list(method.parameters()) and not method.state_dict()
    method(given).backward()
    assert method.heads[0].weight.grad.any() and method.heads[1].weight.grad is None


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles(name):
    method = made(name)
    expected = copy.deepcopy(method)(step())
    assert torch.equal(pickle.loads(pickle.dumps(method))(step()), expected)


@pytest.mark.parametrize("name", NAMES)
def test_under_autocast(name):
    with torch.autocast("cpu", torch.bfloat16):
        loss = made(name)(step(mask=True))
    assert loss.dtype == torch.float32
    # the first ones' convolutions are bfloat16
    tolerance = 0.05 if name in ("reviewkd", "mgd", "vid", "ofd") else 1e-5
    torch.testing.assert_close(loss, made(name)(step(mask=True)), rtol=tolerance, atol=0)


@compiles
@pytest.mark.parametrize("name", NAMES)
def test_compiled(name):
    """In one graph; but for crd, whose gradients would be wrong there: it breaks the graph."""
    method, given = made(name), step(mask=True)
    plain, tensors = copy.deepcopy(method), leaves(given)
    torch._dynamo.reset()
    fields = [field.name for field in dataclasses.fields(Step)]

    def function(*values):
        return method(Step(**dict(zip(fields, values, strict=True))))

    fast = torch.compile(function, fullgraph=name != "crd", backend="aot_eager")
    for _ in range(2):  # with state: the second call too
        actual, expected = fast(*(getattr(given, field) for field in fields)), plain(given)
        torch.testing.assert_close(actual, expected)
        pairs = (torch.autograd.grad(x, tensors, allow_unused=True) for x in (actual, expected))
        torch.testing.assert_close(*([each for each in pair if each is not None] for pair in pairs))


# --- mistakes
M = torch.ones(2, 3, 4, 5)
LOGITS = torch.ones(2, 4)
INDEX = torch.arange(2)
SHAPES = {"student_shapes": STUDENT, "teacher_shapes": TEACHER}
ALL = ", ".join(NAMES)
VECTORS = torch.ones(2, 3), torch.ones(2, 4)


def crd(**options):
    return methods.crd(3, 4, 5, negatives=2, **options)


def without(name, **missing):
    return lambda: made(name)(dataclasses.replace(step(), **missing))


ERRORS = [
    (lambda: build("kdd", **SHAPES), ValueError,
     f"build: name must be one of {ALL} (nearest: kd, wkd, rkd), got 'kdd'"),
    (lambda: build("zzz", **SHAPES), ValueError, f"build: name must be one of {ALL}, got 'zzz'"),
    (lambda: build("kd", temprature=2, **SHAPES), TypeError,
     "kd: options must be among temperature, got temprature"),
    (lambda: build("at", p=2, **SHAPES), TypeError,
     "at: options must be empty (it has none), got p"),
    (lambda: build("crd", **SHAPES), TypeError,
     "crd: num_samples must be given (the size of the training set), got None"),
    (lambda: build("catkd", student_head=nn.Linear(5, 7), **SHAPES), ValueError,
     "catkd: head must have the weight [K, 4], got [7, 5]"),
    (lambda: build("catkd", student_head=nn.ReLU(), **SHAPES), TypeError,
     "catkd: head must be a linear layer, a 1x1 convolution or a weight [K, C], got ReLU"),
    (without("crd", index=None), ValueError,
     "crd: index must be given (the samples' indices in the training set, int64 [B]), got None"),
    (without("dkd", target=None), ValueError,
     "dkd: target must be given (the target class has its own term), got None"),
    (without("kd", teacher_logits=None), ValueError,
     "kd: teacher_logits must be given (this method compares logits [B, K]), got None"),
    (lambda: build("catkd", **SHAPES)(step()), ValueError,
     "catkd: student_head must be given unless the student's last map has 7 channels, one for "
     "each class, got 4"),
    # logits
    (lambda: methods.kd([1.0], LOGITS), TypeError, "kd: student_logits must be a tensor, got list"),
    (lambda: methods.kd(LOGITS, LOGITS.long()), TypeError,
     "kd: teacher_logits must be floating point, got torch.int64"),
    (lambda: methods.kd(M[:, 0], M[:, 0]), ValueError,
     "kd: student_logits must be [B, K >= 2] or [B, K >= 2, H, W], got [2, 4, 5]"),
    (lambda: methods.kd(LOGITS[:, :1], LOGITS[:, :1]), ValueError,
     "kd: student_logits must be [B, K >= 2] or [B, K >= 2, H, W], got [2, 1]"),
    (lambda: methods.dkd(M, M, INDEX), ValueError,
     "dkd: student_logits must be [B, K >= 2], got [2, 3, 4, 5]"),
    (lambda: methods.dist(LOGITS, LOGITS[:, 1:]), ValueError,
     "dist: teacher_logits must have the student's shape [2, 4], got [2, 3]"),
    (lambda: methods.kd(LOGITS, LOGITS[1:]), ValueError,
     "kd: teacher_logits must have the student's batch size 2, got 1"),
    (lambda: methods.kd(LOGITS, LOGITS.to("meta")), ValueError,
     "kd: teacher_logits must be on the student's device cpu, got meta"),
    (lambda: methods.dkd(LOGITS, LOGITS, torch.ones(2)), TypeError,
     "dkd: target must be an int64 tensor [B], got torch.float32"),
    (lambda: methods.dkd(LOGITS, LOGITS, INDEX[:1]), ValueError,
     "dkd: target must be [2], got [1]"),
    (lambda: methods.wkd_logits(LOGITS, LOGITS, INDEX[:1], torch.ones(4, 4)), ValueError,
     "wkd: target must be [2], got [1]"),
    (lambda: methods.wkd_logits(LOGITS, LOGITS, INDEX, torch.ones(3, 4)), ValueError,
     "wkd: distances must be [4, 4] for the logits' classes, got [3, 4]"),
    (lambda: methods.wkd_logits(LOGITS, LOGITS, INDEX, None), TypeError,
     "wkd: distances must be a floating-point tensor [K, K], got NoneType"),
    (lambda: build("wkd", **SHAPES), TypeError,
     "wkd: distances must be given, [K, K] (sokd.methods.class_distances), or teacher_head, "
     "got None"),
    (lambda: build("wkd", teacher_head=nn.Linear(5, 7), **SHAPES), ValueError,
     "wkd: head must have the weight [K, 6], got [7, 5]"),
    (without("wkd", target=None), ValueError,
     "wkd: target must be given (it is treated apart), got None"),
    (lambda: methods.class_distances(torch.ones(3, 4)), ValueError,
     "class_distances: features must be [K >= 2, N >= 2, D], got [3, 4]"),
    (lambda: methods.class_distances(torch.ones(3, 4, 5).int()), TypeError,
     "class_distances: features must be a floating-point tensor, got torch.int32"),
    # features
    (lambda: methods.at(LOGITS, M), ValueError, "at: student must be [B, C, H, W], got [2, 4]"),
    (lambda: methods.sp(M, M[0]), ValueError,
     "sp: teacher must have the student's batch size 2, got 3"),
    (lambda: methods.sp(M[:, 0], M), ValueError,
     "sp: student must be [B, C, H, W] or [B, D], got [2, 4, 5]"),
    (lambda: methods.rkd(M[:, :, :0], M), ValueError,
     "rkd: student must have at least one cell, got [2, 3, 0, 5]"),
    (lambda: methods.fitnet(M[:, :2], M), ValueError,
     "fitnet: student must have the teacher's shape [2, 3, 4, 5] (see sokd.Adapter), got [2, "
     "2, 4, 5]"),
    (lambda: methods.catkd(M[:, :2], M), ValueError,
     "catkd: student must have the teacher's 3 channels, got 2"),
    (lambda: methods.at([M, M], [M]), ValueError,
     "at: teacher must have one entry for each of the 2 student maps, got 1"),
    (lambda: methods.at([M, M], [M, M], [None]), ValueError,
     "at: weight must have one entry for each of the 2 student maps, got 1"),
    (lambda: methods.at(M, M, torch.ones(2, 5, 4)), ValueError,
     "at: weight must be of the teacher's size [2, 4, 5], got [2, 5, 4]"),
    (lambda: methods.at(M, M, torch.ones(2, 4, 5).int()), TypeError,
     "at: weight must be a floating-point tensor or None, got torch.int32"),
    (lambda: methods.sp(LOGITS, LOGITS, torch.ones(2, 4, 5)), ValueError,
     "sp: weight must be None for features [B, D], got a weight"),
    # modules
    (lambda: crd(labels=torch.zeros(5).long()), ValueError,
     "crd: labels must be of at least 2 classes, got 1"),
    (lambda: crd(labels=torch.zeros(4).long()), ValueError,
     "crd: labels must be int64 [5] (num_samples), got [4] torch.int64"),
    (lambda: crd()(*VECTORS, INDEX.int()), TypeError,
     "crd: index must be an int64 tensor [B], got torch.int32"),
    (lambda: crd()(*VECTORS, INDEX[:1]), ValueError, "crd: index must be [2], got [1]"),
    (lambda: crd()(*VECTORS, INDEX + 4), ValueError,
     "crd: index must lie in 0 .. 4 (num_samples), got 5"),
    (lambda: crd()(*VECTORS, INDEX - 1), ValueError,
     "crd: index must lie in 0 .. 4 (num_samples), got -1"),
    (lambda: crd()(M, M, INDEX), ValueError,
     "crd: student must be [B, D] (see sokd.methods.pooled for maps), got [2, 3, 4, 5]"),
    (lambda: methods.mgd(3, over="rows"), ValueError,
     "mgd: over must be one of channels, cells, got 'rows'"),
    (lambda: methods.reviewkd([3], []), ValueError,
     "reviewkd: teacher_channels must be as many as student_channels (1), at least one, got 0"),
    (lambda: methods.reviewkd([3], [3])([M, M], [M, M]), ValueError,
     "reviewkd: student must have one map for each of the 1 stages, got 2"),
    (lambda: methods.reviewkd([3], [3])([M[:1, :, :1, :1]], [M[:1]]), ValueError,
     "reviewkd: student must have more than one value per channel in train mode, for "
     "BatchNorm (drop_last=True in the DataLoader), got [1, 3, 1, 1]"),
]  # fmt: skip


@pytest.mark.parametrize("mistake, kind, text", ERRORS, ids=[text for _, _, text in ERRORS])
def test_mistakes(mistake, kind, text):
    with raises(kind, text):
        mistake()
