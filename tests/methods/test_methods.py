"""Distillation losses without state: values against loops, gradients, edges."""

import functools

import numpy as np
import pytest
import support.naive_methods as naive
import torch
from support.raises import raises

from sokd import methods

F64 = torch.float64
LOGITS = ["kd", "lskd", "dkd", "dist", "wkd_logits"]
FEATURES = ["fitnet", "at", "sp", "rkd", "catkd", "hcl", "wkd_features", "nst", "pkt", "cc"]
# the others take any size, these and catkd the teacher's channels
SAME_SHAPE = {"fitnet", "hcl", "wkd_features"}


def logits(batch=5, classes=7, dtype=F64, spread=3.0):
    return [torch.randn(batch, classes, dtype=F64).mul(spread).to(dtype) for _ in range(2)]


def target(batch=5, classes=7):
    return torch.randint(0, classes, (batch,))


def distances(classes=7, dtype=F64):
    """Between points in a plane, at most 1."""
    points = torch.rand(classes, 2, dtype=F64)
    return (torch.cdist(points, points) / 2**0.5).to(dtype)


def rest_of(name, batch=5, dtype=F64):
    """What a loss of logits takes beside them."""
    if name == "wkd_logits":
        return target(batch), distances(dtype=dtype)
    return (target(batch),) if name == "dkd" else ()


def maps(name, student=(3, 4, 6, 6), teacher=(3, 5, 6, 6), dtype=F64):
    if name in SAME_SHAPE:
        student = teacher
    elif name == "catkd":
        student = (student[0], teacher[1], *student[2:])
    return [torch.randn(shape, dtype=F64).to(dtype) for shape in (student, teacher)]


def omega(batch=3, height=6, width=6, dtype=F64):
    weight = torch.randint(0, 4, (batch, height, width)).to(dtype)
    weight[:, 0, 0] = 2  # no sample without an area
    return weight


def with_mask(name, mask, dtype=F64, **sizes):
    student, teacher = maps(name, dtype=dtype, **sizes)
    height, width = teacher.shape[2:]
    weight = omega(teacher.shape[0], height, width) if mask else None
    return student, teacher, weight


def arrays(*tensors):
    return [None if tensor is None else tensor.numpy() for tensor in tensors]


def close(actual, expected, rtol=1e-9, atol=1e-12):
    assert actual.dtype == F64 and actual.dim() == 0
    expected = torch.tensor(float(expected), dtype=F64)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


# --- values
@pytest.mark.parametrize("batch, classes", [(5, 7), (1, 2), (2, 30)])
@pytest.mark.parametrize("name, options", [
    ("kd", {}), ("kd", {"temperature": 1.0}), ("lskd", {}), ("lskd", {"temperature": 3.0}),
    ("dist", {}), ("dist", {"beta": 2.0, "gamma": 0.5, "temperature": 4.0}),
])  # fmt: skip
def test_logits_against_loops(name, options, batch, classes):
    student, teacher = logits(batch, classes)
    expected = getattr(naive, name)(student.numpy(), teacher.numpy(), **options)
    # lskd: 1e-7 beside the deviation in the loops, within the root here
    rtol = 1e-6 if name == "lskd" else 1e-9
    close(getattr(methods, name)(student, teacher, **options), expected, rtol=rtol)


@pytest.mark.parametrize("name", ["kd", "lskd", "dist"])
@pytest.mark.parametrize("places", [(3, 5), (2, 1, 4)], ids=["maps", "volumes"])
def test_dense_logits_are_samples_of_their_own(name, places):
    """Segmentation's [B, K, H, W]: each position a prediction, the mean over all of them."""
    loss = getattr(methods, name)
    student, teacher = (torch.randn(2, 6, *places, dtype=F64) for _ in range(2))
    cells = [np.moveaxis(each.numpy(), 1, -1).reshape(-1, 6) for each in (student, teacher)]
    rtol = 1e-6 if name == "lskd" else 1e-9
    close(loss(student, teacher), getattr(naive, name)(*cells), rtol=rtol)
    last = student.movedim(1, -1).contiguous().movedim(-1, 1)  # channels_last
    torch.testing.assert_close(loss(last, teacher), loss(student, teacher))
    leaf = student.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda given: loss(given, teacher), leaf)
    assert loss(student[:0], teacher[:0]) == 0


@pytest.mark.parametrize("options", [{}, {"alpha": 0.5, "beta": 2.0, "temperature": 1.0}])
@pytest.mark.parametrize("batch, classes", [(5, 7), (1, 2), (2, 30)])
def test_dkd_against_loops(batch, classes, options):
    (student, teacher), true = logits(batch, classes), target(batch, classes)
    expected = naive.dkd(*arrays(student, teacher, true), **options)
    close(methods.dkd(student, teacher, true, **options), expected)


WKD = [
    {},
    {"transport": 1.0, "temperature": 8.0, "sharpness": 2.0},
    {"regularisation": 0.3, "iterations": 3},
]


@pytest.mark.parametrize("options", WKD, ids=str)
@pytest.mark.parametrize("batch, classes", [(5, 7), (1, 2), (2, 30)])
def test_wkd_logits_against_loops(batch, classes, options):
    (student, teacher), true = logits(batch, classes), target(batch, classes)
    between = distances(classes)
    expected = naive.wkd_logits(*arrays(student, teacher, true, between), **options)
    close(methods.wkd_logits(student, teacher, true, between, **options), expected)


def test_wkd_transports_between_near_classes_for_less():
    """All mass on one class, the teacher's on another: the cost of the way, not more of it."""
    between = distances(4)
    student, teacher = 40 * torch.eye(4, dtype=F64)[[1, 1]], 40 * torch.eye(4, dtype=F64)[[2, 3]]
    true, options = torch.zeros(1).long(), {"transport": 1.0, "iterations": 200}
    for row, to in enumerate((2, 3)):
        given = student[row : row + 1], teacher[row : row + 1], true, between
        plain = methods.wkd_logits(*given, **{**options, "transport": 0.0})
        moved = methods.wkd_logits(*given, **options) - plain
        torch.testing.assert_close(moved, 1 - (-between[1, to]).exp(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("samples", [2, 9, 100])
def test_class_distances(samples):
    features = torch.randn(4, samples, 3, dtype=F64)
    features[2] = features[0] @ torch.linalg.qr(torch.randn(3, 3, dtype=F64))[0] + 5  # alike
    found = methods.class_distances(features)
    for i in range(4):
        for j in range(4):
            expected = 0.0 if i == j else 1 - naive.cka(*features[[i, j]].numpy())
            assert found[i, j].item() == pytest.approx(expected, abs=1e-9)
    features[3] = 1.0  # no variance: alike to none
    distances = methods.class_distances(features.float())
    assert distances[3].tolist() == [1, 1, 1, 0] and distances.dtype == torch.float32


def test_labels_that_are_ignored_do_not_count():
    (student, teacher), true, between = logits(), target(), distances()
    expected = methods.wkd_logits(student[1:4], teacher[1:4], true[1:4], between)
    for ignored in (-100, 9):
        labels = true.clone()
        labels[[0, 4]] = ignored
        value = methods.wkd_logits(student, teacher, labels, between, ignore_index=ignored)
        torch.testing.assert_close(value, expected)
    assert methods.wkd_logits(student, teacher, true * 0 - 100, between) == 0


def test_wkd_is_the_sum_of_its_parts():
    (student, teacher), true, between = logits(3), target(3), distances()
    own, other, weight = with_mask("fitnet", True)
    options = {"grid": 2, "means": 3.0}
    value = methods.wkd(student, teacher, true, between, own, other, weight, features=0.5,
                        transport=7.0, **options)  # fmt: skip
    parts = methods.wkd_logits(student, teacher, true, between, transport=7.0)
    parts += 0.5 * methods.wkd_features(own, other, weight, **options)
    torch.testing.assert_close(value, parts)


def test_wkd_features_do_not_cancel_in_float32():
    """A region's mean far from the channel's, its deviation small: float32 is near float64."""
    steps = 100.0 * torch.arange(4.0).repeat_interleave(2)
    maps = [steps + steps[:, None] + 0.1 * torch.randn(2, 3, 8, 8) for _ in range(2)]
    gradients = []
    for dtype in (torch.float32, F64):
        student = maps[0].to(dtype).requires_grad_()
        loss = methods.wkd_features(student, maps[1].to(dtype))
        gradients += torch.autograd.grad(loss, student)
    error = (gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max()
    assert error < 1e-3


def test_the_parts_of_dkd_make_kd():
    """KD = TCKD + (1 - p_t) NCKD (the paper's decomposition), here with one p_t for all samples."""
    teacher = torch.randn(1, 6, dtype=F64).expand(4, 6)
    student, true = torch.randn(4, 6, dtype=F64), torch.full((4,), 2)
    doubt = 1 - teacher.softmax(1)[0, 2].item()
    whole = methods.dkd(student, teacher, true, alpha=1.0, beta=doubt, temperature=1.0)
    torch.testing.assert_close(whole, methods.kd(student, teacher, temperature=1.0))


SIZES = [
    {},  # equal sizes
    {"student": (3, 4, 12, 12)},  # larger than the teacher's map
    {"student": (3, 4, 3, 2)},  # smaller, by another ratio on each axis
    {"student": (1, 1, 1, 1), "teacher": (1, 1, 1, 1)},  # a single number
    {"student": (2, 3, 5, 7), "teacher": (2, 3, 5, 7)},  # odd sides
]


@pytest.mark.parametrize("mask", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", FEATURES)
def test_features_against_loops(name, sizes, mask):
    if name in ("at", "catkd") and sizes.get("student") == (1, 1, 1, 1):
        sizes = {"student": (1, 1, 1, 2), "teacher": (1, 1, 1, 2)}  # one cell is refused
    student, teacher, weight = with_mask(name, mask, **sizes)
    if weight is not None and student.shape[2:] == (
        12,
        12,
    ):  # the loops can only shrink a mask
        student = student[:, :, :6, :6]
    expected = getattr(naive, name)(*arrays(student, teacher, weight))
    close(getattr(methods, name)(student, teacher, weight), expected)


def test_a_mask_grows_with_the_map():
    """omega on a larger student map is bilinear (`sokd.kd.adapter.resize`): a constant stays."""
    student, teacher = maps("sp", student=(3, 4, 12, 12))
    for name in ("sp", "rkd", "at"):
        function, weight = getattr(methods, name), torch.full((3, 6, 6), 4.0, dtype=F64)
        # a common factor cancels in all three
        torch.testing.assert_close(function(student, teacher, weight), function(student, teacher))


@pytest.mark.parametrize("name, options", [
    ("rkd", {"distance": 0.0}), ("rkd", {"angle": 0.0}), ("catkd", {"resolution": 3}),
    ("catkd", {"normalise": False}), ("wkd_features", {"grid": 1}),
    ("wkd_features", {"grid": 5, "means": 0.5}), ("cc", {"gamma": 1.5, "order": 1}),
    ("cc", {"order": 5}),
])  # fmt: skip
def test_options(name, options):
    student, teacher, weight = with_mask(name, True)
    expected = getattr(naive, name)(*arrays(student, teacher, weight), **options)
    close(getattr(methods, name)(student, teacher, weight, **options), expected)


@pytest.mark.parametrize("name", ["sp", "rkd", "pkt", "cc"])
def test_embeddings(name):
    student, teacher = torch.randn(4, 3, dtype=F64), torch.randn(4, 6, dtype=F64)
    maps = [each[:, :, None, None].numpy() for each in (student, teacher)]
    expected = getattr(naive, name)(*maps)
    close(getattr(methods, name)(student, teacher), expected)


@pytest.mark.parametrize("name", FEATURES)
def test_layers_are_summed(name):
    layers = [with_mask(name, mask) for mask in (True, False)]
    function = getattr(methods, name)
    students, teachers, weights = zip(*layers, strict=True)
    apart = sum(function(*layer) for layer in layers)
    torch.testing.assert_close(function(students, list(teachers), weights), apart)


def test_class_maps():
    features, head = torch.randn(2, 4, 3, 5, dtype=F64), torch.randn(6, 4, dtype=F64)
    expected = torch.from_numpy(naive.class_maps(features.numpy(), head.numpy()))
    torch.testing.assert_close(methods.class_maps(features, head), expected)
    for module in (torch.nn.Linear(4, 6), torch.nn.Conv2d(4, 6, 1)):
        maps = methods.class_maps(features.float(), module)
        weight = module.weight.detach().flatten(1)
        torch.testing.assert_close(maps.detach(), methods.class_maps(features.float(), weight))


# --- gradients
def loss_of(name, dtype=F64, mask=True, **sizes):
    """A loss as a function of the student alone, and a student."""
    function = getattr(methods, name)
    if name in LOGITS:
        student, teacher = logits(dtype=dtype)
        return functools.partial(
            _flipped, function, (teacher, *rest_of(name, dtype=dtype))
        ), student
    student, teacher, weight = with_mask(name, mask, dtype=dtype, **sizes)
    return functools.partial(_flipped, function, (teacher, weight)), student


def of_batch(part, count):
    """The first samples of a part; distances [K, K] are of no sample."""
    square = part is not None and part.dim() == 2 and part.shape[0] == part.shape[1]
    return part if part is None or square else part[:count]


def _flipped(function, rest, student):
    return function(student, *rest)


SMALL = {"student": (3, 2, 2, 3), "teacher": (3, 2, 2, 3)}


@pytest.mark.parametrize("name", LOGITS + FEATURES)
def test_gradcheck(name):
    loss, student = loss_of(name, **SMALL)
    student = student.requires_grad_()
    assert torch.autograd.gradcheck(loss, student)
    if name != "dist":
        assert torch.autograd.gradgradcheck(loss, student)


def test_a_second_derivative_of_dist_is_refused():
    loss, student = loss_of("dist")
    (gradient,) = torch.autograd.grad(loss(student.requires_grad_()), student, create_graph=True)
    text = "dist: the loss must be differentiated once only, got a second backward"
    with raises(RuntimeError, text):
        gradient.sum().backward()


@pytest.mark.parametrize("name", LOGITS + FEATURES)
def test_the_teacher_gets_no_gradient(name):
    loss, student = loss_of(name, mask=False)
    teacher = loss.args[1][0].requires_grad_()
    loss(student.requires_grad_()).backward()
    assert teacher.grad is None and student.grad is not None and student.grad.isfinite().all()


@pytest.mark.parametrize("name", [n for n in LOGITS + FEATURES if n != "wkd_logits"])
def test_a_student_like_the_teacher_has_no_loss(name):
    loss, _ = loss_of(name)
    assert abs(loss(loss.args[1][0]).item()) < 1e-5  # dist: 1e-8 beside the lengths


# --- edges
@pytest.mark.parametrize("name", LOGITS + FEATURES)
def test_an_empty_batch_is_zero(name):
    loss, student = loss_of(name)
    function, rest = loss.args
    rest = [of_batch(part, 0) for part in rest]
    student = student[:0].clone().requires_grad_()
    value = function(student, *rest)
    value.backward()
    assert value.item() == 0 and student.grad.shape == student.shape


@pytest.mark.parametrize("name", LOGITS + FEATURES)
def test_a_batch_of_one(name):
    loss, student = loss_of(name)
    function, rest = loss.args
    student = student[:1].clone().requires_grad_()
    value = function(student, *[of_batch(part, 1) for part in rest])
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOGITS)
def test_extreme_logits(name, dtype):
    """No doubt, no difference, large offsets: finite values and gradients."""
    scale = 1e4 if dtype == torch.float16 else 1e15
    student = torch.eye(4) * scale
    zeros, full = torch.zeros(4, 4), torch.full((4, 4), scale)
    teachers = [student.flip(0), -student, zeros, student + scale / 2, full]
    for one in (student, zeros, -full):
        for teacher in teachers:
            leaf = one.to(dtype).requires_grad_()
            extra = {"dkd": (torch.arange(4),)}.get(name, ())
            if name == "wkd_logits":
                extra = torch.arange(4), distances(4, torch.float32)
            value = getattr(methods, name)(leaf, teacher.to(dtype), *extra)
            value.backward()
            assert value.isfinite() and leaf.grad.isfinite().all(), (one, teacher)
            assert value.dtype == torch.float32


@pytest.mark.parametrize("name", [*FEATURES])
def test_maps_of_zeros(name):
    """A dead layer on either side, an omega of nothing: finite values and gradients."""
    student, teacher, weight = with_mask(name, True)
    for one, other, mask in (
        (student * 0, teacher, None), (student, teacher * 0, None), (student, teacher, weight * 0),
        (student * 0, teacher * 0, weight * 0),
    ):  # fmt: skip
        leaf = one.clone().requires_grad_()
        value = getattr(methods, name)(leaf, other, mask)
        value.backward()
        assert value.isfinite() and leaf.grad.isfinite().all() and leaf.grad.abs().max() < 1e6


def test_samples_at_one_place():
    """Coinciding samples: no direction, not in the mean distance, a bounded gradient."""
    student, teacher = torch.randn(4, 3, dtype=F64), torch.randn(4, 3, dtype=F64)
    student[2] = student[0]
    close(methods.rkd(student, teacher), naive.rkd(student.numpy(), teacher.numpy()))
    student.requires_grad_()
    methods.rkd(student, teacher).backward()
    assert student.grad.abs().max() < 1e3


# --- precision, layouts
@pytest.mark.parametrize("name", LOGITS + FEATURES)
def test_autocast_changes_nothing(name):
    """Half-precision inputs are widened first; autocast is not let at the products."""
    loss, student = loss_of(name, dtype=torch.bfloat16)
    function, rest = loss.args
    wide = [x.float() if x is not None and x.is_floating_point() else x for x in rest]
    wide_loss = functools.partial(_flipped, function, wide)
    expected = wide_loss(student.float())
    with torch.autocast("cpu", torch.bfloat16):
        actual, of_float = loss(student), wide_loss(student.float())
    assert actual.dtype == of_float.dtype == torch.float32
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(of_float, expected)


@pytest.mark.parametrize("name", FEATURES)
def test_layouts(name):
    student, teacher, weight = with_mask(name, True, dtype=torch.float32)
    function = getattr(methods, name)
    expected = function(student, teacher, weight)
    for layout in (
        lambda each: each.to(memory_format=torch.channels_last),
        lambda each: each.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        leaf = layout(student).requires_grad_()
        actual = function(leaf, layout(teacher), weight.unsqueeze(1))
        actual.backward()
        torch.testing.assert_close(actual, expected)
