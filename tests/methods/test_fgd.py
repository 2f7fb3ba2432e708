"""FGD: values against loops, boxes and padding on every level, mistakes, and in a Distiller."""

from __future__ import annotations

import copy

import pytest
import support.naive_methods as naive
import torch
import torch.distributed as dist
from support.cases import compiles
from support.distiller_cases import SMALL, batch, gradients, make, models, objective
from support.raises import raises
from support.ranks import of_ranks
from torch import Tensor

from sokd import methods
from sokd.methods import Method
from sokd.methods.regions import Images

F64 = torch.float64
INPUT, SIZES = (48, 64), [(48, 64), (40, 33), (16, 64)]
BOXES = [
    torch.tensor([[3.0, 2.0, 30.0, 40.0], [0.0, 0.0, 64.0, 48.0], [20.0, 20.0, 21.0, 21.0]]),
    torch.zeros(0, 4),  # all background
    torch.tensor([[8.0, 0.0, 16.0, 16.0]]),  # edges of cells
]


def fgd(channels=4, dtype=F64, **options):
    """With a context block that does not add 0."""
    torch.manual_seed(0)
    loss = methods.fgd(channels, **options)
    for parameter in loss.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return loss.to(dtype)


def level(height=6, width=8, channels=4, dtype=F64):
    torch.manual_seed(1)
    return [torch.randn(3, channels, height, width, dtype=F64).to(dtype) for _ in range(2)]


def contexts(loss):
    found = []
    for block in (loss.student_context, loss.teacher_context):
        layers = (block.transform[at] for at in (0, 1, 3))
        pairs = [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in layers]
        found.append((block.score.weight.detach().numpy()[0], *pairs))
    return found


@pytest.mark.parametrize("mask", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("sizes", [None, SIZES], ids=["whole", "padded"])
@pytest.mark.parametrize("size, channels, options", [
    ((6, 8), 4, {}),  # cells of 8 x 8 pixels
    ((5, 7), 3, {"temperature": 0.8}),  # cells that no size divides
    ((1, 1), 1, {}),  # a single number, a hidden layer of one
    ((12, 16), 2, {"foreground": 0.5, "background": 0.2, "attention": 0.0, "relation": 0.1}),
], ids=str)  # fmt: skip
def test_values_against_loops(size, channels, options, sizes, mask):
    loss, (student, teacher) = fgd(channels, **options), level(*size, channels)
    weight = torch.randint(0, 3, (3, *size)).double() if mask else None
    expected = naive.fgd(
        student.numpy(), teacher.numpy(), [b.numpy() for b in BOXES], INPUT, sizes or [INPUT] * 3,
        None if weight is None else weight.numpy(), contexts(loss), **options,
    )  # fmt: skip
    value = loss(student, teacher, BOXES, INPUT, image_sizes=sizes, weight=weight)
    assert value.dtype == F64 and value.dim() == 0
    torch.testing.assert_close(value.detach(), torch.tensor(expected, dtype=F64), rtol=1e-9, atol=0)


def test_the_authors_weights_and_start():
    """A block that starts as 0: the relation is the plain squared difference."""
    assert methods.fgd(4).weights == {
        "foreground": 1e-3, "background": 5e-4, "attention": 1e-3, "relation": 5e-6,
    }  # fmt: skip
    loss = methods.fgd(4, foreground=0, background=0, attention=0, relation=1).double()
    student, teacher = level()
    value = loss(student, teacher, BOXES, INPUT)
    torch.testing.assert_close(value, (student - teacher).square().sum() / 3)


# --- boxes and padding


@pytest.mark.parametrize("stride", [4, 8, 16, 32, 64])
def test_boxes_fall_on_the_right_cells_of_every_level(stride):
    """Images of unequal size in a batch of 128 x 192, P2 to P6: the cells that a box touches."""
    size = 128 // stride, 192 // stride
    boxes = [torch.tensor([[32.0, 64.0, 96.0, 128.0], [40.0, 8.5, 47.0, 9.0]]),
             torch.tensor([[100.0, 0.0, 130.0, 70.0]])]  # fmt: skip
    sizes = [(128, 192), (70, 130)]
    features = torch.zeros(2, 1, *size)
    images = Images(tuple(sizes), (128, 192))
    pixels = torch.zeros(2, 128, 192)
    for image, of_image in enumerate(boxes):
        for x1, y1, x2, y2 in of_image.tolist():
            down = slice(int(y1), int(-(-y2 // 1)))
            pixels[image, down, int(x1) : int(x2)] = 1
    valid = torch.zeros(2, 128, 192)
    for image, (height, width) in enumerate(sizes):
        valid[image, :height, :width] = 1
    touched, whole = (
        torch.nn.functional.max_pool2d(each, stride)  # a cell with one such pixel
        for each in (pixels, valid)
    )
    density = images.density(boxes, features)
    assert torch.equal(density > 0, touched > 0) and density[1].sum() == pytest.approx(1.0)
    assert torch.equal(images.cells(features)[:, 0], whole)


def test_the_smallest_box_counts():
    density = Images(None, INPUT).density(BOXES[:1], torch.zeros(1, 1, 48, 64))[0]
    assert density[20, 20] == 1 and density[47, 63] == pytest.approx(1 / (48 * 64))
    assert density[2, 3] == pytest.approx(1 / (27 * 38))


def test_padding_is_not_distilled():
    """The loss is that of the images alone, and padding gets no gradient."""
    loss, (student, teacher) = fgd(), level()
    student.requires_grad_()
    weight = torch.rand(3, 6, 8, dtype=F64)
    value = loss(student, teacher, BOXES, INPUT, image_sizes=SIZES, weight=weight)
    (gradient,) = torch.autograd.grad(value, student)
    alone = 0.0
    for image, (height, width) in enumerate(SIZES):
        cells = slice(image, image + 1), slice(None), slice(height // 8), slice(-(-width // 8))
        cropped = [each[cells] for each in (student, teacher, weight.unsqueeze(1))]
        size = height, cropped[0].shape[3] * 8
        alone += loss(*cropped[:2], [BOXES[image]], size, weight=cropped[2]) / 3
        outside = torch.ones(6, 8).bool()
        outside[cells[2:]] = False
        assert not gradient[image][:, outside].any() and gradient[image][:, ~outside].any()
    torch.testing.assert_close(value, alone)
    other = [each.detach() + 9 * (gradient == 0) for each in (student, teacher)]
    torch.testing.assert_close(value, loss(*other, BOXES, INPUT, image_sizes=SIZES, weight=weight))


@pytest.mark.parametrize("kind", [torch.float16, torch.int64])
def test_boxes_of_other_dtypes(kind):
    loss, (student, teacher) = fgd(), level()
    boxes = [each.to(kind) for each in BOXES]
    expected = loss(student, teacher, BOXES, INPUT)
    assert torch.equal(loss(student, teacher, boxes, INPUT), expected)


def test_a_box_may_leave_its_image_by_a_rounding():
    loss, (student, teacher) = fgd(), level()
    boxes, rounded = [[torch.tensor([box])] * 3 for box in (
        [0.0, 0.0, 64.0, 48.0], [-0.01, 0.0, 64.4, 48.2]
    )]  # fmt: skip
    expected = loss(student, teacher, boxes, INPUT)
    assert torch.equal(loss(student, teacher, rounded, INPUT), expected)


def test_boxes_over_the_whole_image_leave_no_background():
    loss, (student, teacher) = fgd(), level()
    boxes = [torch.tensor([[0.0, 0.0, 64.0, 48.0]])] * 3
    values = [
        fgd(background=weight)(student, teacher, boxes, INPUT).item() for weight in (0.0, 1.0)
    ]
    assert values[0] == values[1] and loss(student, teacher, boxes, INPUT).isfinite()


# --- gradients, precision


def test_gradcheck():
    loss, (student, teacher) = fgd(6), level(1, 3, 6)
    sizes, weight = [(48, 64), (48, 64), (48, 40)], torch.rand(3, 1, 3, dtype=F64)
    boxes = [torch.tensor([[3.0, 2.0, 20.0, 20.0]])] * 3
    inputs = [student.requires_grad_(), *loss.parameters()]

    def function(student, *parameters):
        names = [name for name, _ in loss.named_parameters()]
        given = dict(zip(names, parameters, strict=True))
        options = {"image_sizes": sizes, "weight": weight}
        arguments = (student, teacher, boxes, INPUT)
        return torch.func.functional_call(loss, given, arguments, options)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_it_trains_all_it_has_and_not_the_teacher():
    loss, (student, teacher) = fgd(8), level(channels=8)  # a norm of two numbers is constant
    student.requires_grad_()
    teacher.requires_grad_()
    loss(student, teacher, BOXES, INPUT).backward()
    assert student.grad.any() and teacher.grad is None
    assert all(parameter.grad.any() for parameter in loss.parameters())


def test_autocast_changes_nothing():
    loss, (student, teacher) = fgd(dtype=torch.float32), level(dtype=torch.bfloat16)
    expected = loss(student.float(), teacher.float(), BOXES, INPUT)
    with torch.autocast("cpu", torch.bfloat16):
        actual = loss(student, teacher, BOXES, INPUT)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=0)  # the block's linear layers


@pytest.mark.parametrize("layout", [torch.channels_last, None])
def test_layouts(layout):
    loss, (student, teacher) = fgd(dtype=torch.float32), level(dtype=torch.float32)
    expected = loss(student, teacher, BOXES, INPUT, image_sizes=SIZES)
    changed = [
        each.to(memory_format=layout) if layout else each.mT.contiguous().mT
        for each in (student, teacher)
    ]
    torch.testing.assert_close(loss(*changed, BOXES, INPUT, image_sizes=SIZES), expected)


def test_an_empty_batch_and_maps_of_zeros():
    loss, (student, teacher) = fgd(), level()
    empty = student[:0].clone().requires_grad_()
    loss(empty, teacher[:0], [], INPUT).backward()
    assert empty.grad.shape == empty.shape
    for own, other in ((student * 0, teacher), (student, teacher * 0)):
        leaf = own.clone().requires_grad_()
        value = loss(leaf, other, BOXES, INPUT, weight=torch.zeros(3, 6, 8, dtype=F64))
        value.backward()
        assert value.isfinite() and leaf.grad.isfinite().all()


@compiles
def test_compiled_in_one_graph():
    loss, (student, teacher) = fgd(dtype=torch.float32), level(dtype=torch.float32)
    plain = copy.deepcopy(loss)
    torch._dynamo.reset()
    fast = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for boxes, sizes in ((BOXES, SIZES), (BOXES[::-1], SIZES[::-1])):  # other numbers of boxes
        found = []
        for run in (fast, plain):
            leaf = student.clone().requires_grad_()
            value = run(leaf, teacher, boxes, INPUT, image_sizes=sizes)
            value.backward()
            found.append((value.detach(), leaf.grad))
        torch.testing.assert_close(*found)


# --- mistakes

M = torch.ones(2, 4, 6, 8)
ONE = torch.tensor([[1.0, 2.0, 9.0, 9.0]])


def called(boxes=(ONE, ONE), size=INPUT, sizes=None, student=M, teacher=M):
    boxes = list(boxes) if isinstance(boxes, tuple) else boxes
    return lambda: methods.fgd(4)(student, teacher, boxes, size, image_sizes=sizes)


SHAPES = {"student_shapes": [(4, 6, 8)] * 2, "teacher_shapes": [(4, 6, 8)] * 2}


def by_name(levels=2, **fields):
    maps = [torch.ones(2, 4, 6, 8)] * levels
    step = methods.Step(
        None, None, None, maps, maps, maps, [None] * levels, None, **fields
    )  # fmt: skip
    return lambda: methods.build("fgd", **SHAPES)(step)


ERRORS = [
    (called(ONE), TypeError,
     "fgd: boxes must be a list of tensors [n, 4], one an image, got Tensor"),
    (called(([1, 2, 3, 4],)), TypeError,
     "fgd: boxes must be a list of tensors [n, 4], one an image, got list of list"),
    (called((ONE,)), ValueError,
     "fgd: boxes must have one tensor for each of the 2 images, got 1"),
    (called((ONE, ONE[0])), ValueError,
     "fgd: boxes[1] must be [n, 4], x1 y1 x2 y2 ([0, 4] for an image without boxes), got [4]"),
    (called((ONE, torch.tensor([[1.0, 2, 3, 4], [5.0, 6.0, 5.0, 9.0]]))), ValueError,
     "fgd: boxes[1] must have x1 < x2 and y1 < y2, got [5.0, 6.0, 5.0, 9.0]"),
    (called((ONE, torch.tensor([[1.0, 2.0, float("nan"), 9.0]]))), ValueError,
     "fgd: boxes[1] must have x1 < x2 and y1 < y2, got [1.0, 2.0, nan, 9.0]"),
    (called((torch.tensor([[10.0, 20.0, 40.0, 50.5]]), ONE)), ValueError,
     "fgd: boxes[0] must lie in their image, 48 x 64 (height x width) pixels of the network's "
     "input, got [10.0, 20.0, 40.0, 50.5]"),
    (called(sizes=[(48, 64), (48, 7)]), ValueError,
     "fgd: boxes[1] must lie in their image, 48 x 7 (height x width) pixels of the network's "
     "input, got [1.0, 2.0, 9.0, 9.0]"),
    (called(size=None), ValueError,
     "fgd: input_size must be (height, width) of the padded input, got None"),
    (called(size=(48, 0)), ValueError,
     "fgd: input_size must be (height, width) of the padded input, got (48, 0)"),
    (called(sizes=[(48, 64)]), ValueError,
     "fgd: image_sizes must have one entry for each of the 2 images, got 1"),
    (called(sizes=[(48, 64), (50, 64)]), ValueError,
     "fgd: image_sizes[1] must be (height, width) of the images in x, at most (48, 64), got "
     "(50, 64)"),
    (called(sizes=[(48, 64), 48]), ValueError,
     "fgd: image_sizes[1] must be (height, width) of the images in x, at most (48, 64), got 48"),
    (called(student=M[:, :3]), ValueError,
     "fgd: student must have the teacher's shape [2, 4, 6, 8] (see sokd.Adapter), got "
     "[2, 3, 6, 8]"),
    (by_name(), ValueError,
     "fgd: boxes must be given (a list of tensors [n, 4], one an image), got None"),
    (by_name(boxes=[ONE, ONE]), ValueError,
     "fgd: input_size must be given ((height, width) of the padded input), got None"),
    (by_name(3, boxes=[ONE, ONE], images=Images(None, INPUT)), ValueError,
     "fgd: student must have one map for each of the 2 levels, got 3"),
    (lambda: methods.fgd(0), ValueError, "fgd: channels must be 1 or more, got 0"),
]  # fmt: skip


@pytest.mark.parametrize("mistake, kind, text", ERRORS, ids=[text for _, _, text in ERRORS])
def test_mistakes(mistake, kind, text):
    with raises(kind, text):
        mistake()


# --- in a Distiller

SMALL_BOXES = [torch.tensor([[2.0, 3.0, 9.0, 8.0]]), torch.zeros(0, 4),
               torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.zeros(0, 4)]  # fmt: skip
SMALL_SIZES = [(16, 16), (12, 16), (16, 5), (16, 16)]


class Seen(Method):
    """Keeps the step."""

    name, needs, adapts, default_weight = "seen", frozenset({"features"}), True, 1.0

    def forward(self, step):
        self.step = step
        return sum(each.sum() for each in step.adapted) * 0


@pytest.mark.parametrize("plugged", [SMALL, False], ids=["sokd", "alone"])
def test_the_distiller_hands_boxes_and_padding_over(plugged):
    """The step's maps, weights and boxes give the term; omega is 0 in the padding."""
    seen = Seen()
    distiller = make(method={"fgd": 2.0, seen: 1.0}, sokd=plugged)
    _, losses = distiller(*batch(), boxes=SMALL_BOXES, image_sizes=SMALL_SIZES)
    step = seen.step
    torch.testing.assert_close(losses["loss_fgd"], 2.0 * distiller.methods["fgd"](step))
    assert step.images == Images(tuple(SMALL_SIZES), (16, 16))
    for weight, maps in zip(step.weight, step.teacher, strict=True):
        inside = Images(tuple(SMALL_SIZES), (16, 16)).cells(maps)[:, 0]
        assert not weight[inside == 0].any() and weight.any()
        assert plugged or torch.equal(weight, inside)
    terms = sum(
        layer(own, target, SMALL_BOXES, (16, 16), image_sizes=SMALL_SIZES, weight=weight)
        for layer, own, target, weight in zip(
            distiller.methods["fgd"].layers, step.adapted, step.teacher, step.weight, strict=True
        )
    )
    torch.testing.assert_close(losses["loss_fgd"], 2.0 * terms)


def distilled(**given):
    options = {"method": "fgd", "sokd": False, **given.pop("options", {})}
    return lambda: make(**options)(*batch(), **given)


DISTILLER_ERRORS = [
    (distilled(), ValueError,
     "Distiller: boxes must be a list of tensors [n, 4], one an image, for method 'fgd', as in "
     "distiller(x, y, boxes=b), got none"),
    (distilled(options={"method": "at"}, image_sizes=[(16, 16)]), ValueError,
     "Distiller: image_sizes must have one entry for each of the 4 images, got 1"),
    (distilled(boxes=SMALL_BOXES, image_sizes=[(32, 16)] * 4), ValueError,
     "Distiller: image_sizes[0] must be (height, width) of the images in x, at most (16, 16), got "
     "(32, 16)"),
    (distilled(boxes=SMALL_BOXES[:1]), ValueError,
     "fgd: boxes must have one tensor for each of the 4 images, got 1"),
]  # fmt: skip


@pytest.mark.parametrize("mistake, kind, text", DISTILLER_ERRORS)
def test_mistakes_in_a_distiller(mistake, kind, text):
    with raises(kind, text):
        mistake()


def test_the_size_of_an_input_that_is_not_one_batch_is_given():
    class Listed(torch.nn.Module):
        """Takes a list of images, as a detector does."""

        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, images: list[Tensor]):
            return self.net(torch.stack(images))

    teacher, student = map(Listed, models())
    x, y = batch()
    distiller = make(
        models=(teacher, student), layers=["net.stage1", "net.stage2"], method="fgd",
        sokd=False, example=list(x),
    )  # fmt: skip
    with raises(
        ValueError, "fgd: input_size must be given ((height, width) of the padded input), got None"
    ):
        distiller(list(x), y, boxes=SMALL_BOXES)
    rule = "be one padded batch [B, C, H, W] where image_sizes are given without input_size"
    with raises(TypeError, f"Distiller: x must {rule}, got list"):
        distiller(list(x), y, boxes=SMALL_BOXES, image_sizes=SMALL_SIZES)
    _, losses = distiller(list(x), y, boxes=SMALL_BOXES, input_size=(16, 16))
    assert losses["loss_fgd"].isfinite()


# --- two ranks

HALVES = [SMALL_BOXES[0], SMALL_BOXES[2], torch.zeros(0, 4), torch.zeros(0, 4)]  # rank 1: none


def _gradients(rank: int | None, plugged: bool) -> dict[str, Tensor]:
    """Of the whole batch, or of a rank's half of it in DistributedDataParallel."""
    torch.manual_seed(0)
    options = {"heat_channels": 3, "k": 2, "policies": [("rotate", "cutout")]}  # no noise
    distiller = make(
        models=models(norm=False), method={"fgd": None, "fitnet": 1.0}, adapter="linear",
        sokd=options if plugged else False,
    )  # fmt: skip
    for parameter in distiller.own_parameters():  # a context block that does not add 0
        torch.nn.init.normal_(parameter, std=0.3)
    own = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
    model = distiller if rank is None else torch.nn.parallel.DistributedDataParallel(distiller)
    x, y = batch()
    objective(model, x[own], y[own], boxes=HALVES[own], image_sizes=SMALL_SIZES[own]).backward()
    return gradients(distiller)


def _of_rank(rank: int) -> list[dict[str, Tensor]]:
    return [_gradients(rank, plugged) for plugged in (False, True)]


@pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)
def test_two_ranks_have_the_gradients_of_the_whole_batch(tmp_path):
    """Boxes, padding and unequal images on each; one of them has no box at all."""
    for found in of_ranks(_of_rank, tmp_path):
        for plugged, own in zip((False, True), found, strict=True):
            expected = _gradients(None, plugged)
            assert own.keys() == expected.keys()
            assert any("methods.fgd" in n and g.any() for n, g in expected.items())
            for name, gradient in expected.items():
                torch.testing.assert_close(own[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_boxes_that_are_shares_of_the_sides():
    shares = [torch.tensor([[0.2, 0.2, 0.8, 0.9]]), torch.zeros(0, 4)] * 2
    distiller = make(method="fgd", sokd=False)
    x, y = batch()
    rule = "be in pixels of the network's input, 16 x 16 (height x width)"
    got = "none above 1, as shares of the sides are"
    with raises(ValueError, f"fgd: boxes must {rule}, got {got}"):
        distiller(x, y, boxes=shares)
    pixels = [16 * each for each in shares]
    assert torch.isfinite(distiller(x, y, boxes=pixels)[1]["loss_fgd"])
    corner = [torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.zeros(0, 4)] * 2
    distiller(x, y, boxes=corner)  # a pixel is a box
