"""Further situations of users: one test each, beside those in the files of their kinds."""

from __future__ import annotations

import copy
import io
import re
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune as nn_prune
from support.distiller_cases import (
    CLASSES,
    SMALL,
    Answering,
    Buffered,
    Net,
    Shaped,
    batch,
    gradients,
    make,
    models,
    objective,
)
from torch import Tensor, nn

import sokd
from sokd import methods


def refused(error: type[Exception], text: str, call: Any) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == text


# --------------------------------------------------------------------------- what a model returns

Heads = namedtuple("Heads", "logits boxes")


@dataclass
class Plain:
    logits: Tensor
    boxes: Tensor


@dataclass(slots=True)
class Slotted:
    logits: Tensor
    boxes: Tensor


class ModelOutput(OrderedDict[str, Tensor]):
    """As of Hugging Face: a dict whose entries are attributes too."""

    def __init__(self, logits: Tensor, boxes: Tensor) -> None:
        super().__init__(logits=logits, boxes=boxes)

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


class Boxes(Net):
    """A classifier and a regression head."""

    def __init__(self, width: int, form: Any) -> None:
        super().__init__(width)
        self.boxes, self.form = nn.Linear(4 * width, 4), form

    def forward(self, x: Tensor) -> Any:
        pooled = self.features(x).mean((2, 3))
        return self.form(self.head(pooled), self.boxes(pooled))


FORMS = [Heads, Plain, Slotted, ModelOutput]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_an_output_with_names(form):
    """The task gets all of it, a method of logits those, and both heads learn."""
    student, (x, y) = Boxes(3, form), batch()

    def task(output, y):
        return F.cross_entropy(output.logits, y) + output.boxes.square().mean()

    distiller = make(models=(Boxes(6, form), student), method="kd", sokd=False, task=task)
    output, losses = distiller(x, y)
    assert type(output) is form and distiller.logits_of(output) is output.logits
    torch.testing.assert_close(losses["loss_task"], task(student(x), y))
    kd = 0.9 * methods.kd(student(x).logits, distiller.teacher(x).logits)
    torch.testing.assert_close(losses["loss_kd"], kd)
    losses["loss_task"].backward()
    assert student.head.weight.grad.any() and student.boxes.weight.grad.any()


class Backbone(Net):
    """A list of maps, as timm's features_only gives."""

    def forward(self, x: Tensor) -> list[Tensor]:
        first = self.stage1(self.stem(x))
        return [first, self.stage2(first)]


@pytest.mark.parametrize("layers", [["stage1", "stage2"], "auto"], ids=str)
def test_backbones_that_return_features(layers):
    distiller = make(models=(Backbone(6), Backbone(3)), layers=layers, task=None, sokd=False)
    output, losses = distiller(batch()[0])
    assert [tuple(each.shape) for each in output] == [(4, 6, 8, 8), (4, 12, 4, 4)]
    if layers != "auto":
        pairs = zip(distiller.adapters, output, strict=True)
        adapted = [adapter(maps, maps.shape[2:]) for adapter, maps in pairs]
        expected = 100 * methods.fitnet(adapted, distiller.teacher(batch()[0]))
        torch.testing.assert_close(losses["loss_fitnet"], expected)
    assert distiller.logits_of(output) is output or distiller.logits_of(output) is output[0]


def test_a_detector_that_decodes_in_eval_mode():
    """YOLO: the maps in train mode, (decoded, maps) in eval mode; each as it is."""

    class Yolo(Backbone):
        def forward(self, x):
            maps = super().forward(x)
            return maps if self.training else (maps[0].flatten(1), maps)

    seen = []

    def task(output, y):
        seen.append(type(output))
        maps = output[1] if isinstance(output, tuple) else output
        return sum(each.square().mean() for each in maps)

    distiller = make(models=(Yolo(6), Yolo(3)), task=task)
    x, y = batch()
    output, losses = distiller(x, y)
    assert isinstance(output, list)
    distiller.eval()
    decoded, losses = distiller(x, y)
    torch.testing.assert_close(losses["loss_task"], task(distiller.student(x), y))
    assert isinstance(decoded, tuple) and seen == [list, tuple, tuple]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_auxiliary_classifiers_of_googlenet():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    student = torchvision.models.googlenet(num_classes=CLASSES, aux_logits=True, init_weights=False)
    x, y = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    teacher = Answering(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64**2, 900), nn.Linear(900, 5)),
                        lambda logits: logits)  # fmt: skip

    def all_three(output, y):
        return sum(F.cross_entropy(each, y) for each in output)

    options = {"models": (teacher, student), "method": "kd", "sokd": False}
    with pytest.warns(UserWarning, match="do not train 'aux_logits2', 'aux_logits1'"):
        make(**options)(x, y)
    output, losses = make(**options, task=all_three)(x, y)
    torch.testing.assert_close(losses["loss_task"], all_three(output, y))
    losses["loss_task"].backward()
    assert student.aux1.fc2.weight.grad.any() and student.aux2.fc2.weight.grad.any()


def test_dense_outputs_of_one_width_are_reported():
    """A segmentation model's auxiliary head."""

    class Dense(Net):
        def __init__(self, width):
            super().__init__(width)
            self.out, self.aux = nn.Conv2d(4 * width, 3, 1), nn.Conv2d(4 * width, 3, 1)

        def forward(self, x):
            maps = self.features(x)
            return {"out": self.out(maps), "aux": self.aux(maps)}

    distiller = make(models=(Dense(6), Dense(3)))
    y = torch.randint(0, 3, (4, 4, 4))
    with pytest.warns(
        UserWarning, match="'out' is taken as the logits, and losses of the logits do not"
    ):
        output, losses = distiller(batch()[0], y)
    torch.testing.assert_close(losses["loss_ce"], F.cross_entropy(output["out"], y))


# ------------------------------------------------------------------------------- who cannot learn


@pytest.mark.parametrize("where", ["averaged", "copied"])
def test_a_teacher_that_is_a_moving_average_of_the_student(where):
    torch.manual_seed(0)
    student = Net(3)
    if where == "averaged":
        average = torch.optim.swa_utils.AveragedModel(
            student, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
        )
        layers = {"stage1": "module.stage1"}
    else:
        average, layers = copy.deepcopy(student), "stage1"
    distiller = make(models=(average, student), layers=layers, method={"fitnet": 1.0, "kd": 1.0})
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    before = [each.detach().clone() for each in average.state_dict().values()]
    for _ in range(3):
        optimizer.zero_grad()
        objective(distiller).backward()
        optimizer.step()
        if where == "averaged":
            average.update_parameters(student)
        else:
            with torch.no_grad():
                for own, other in zip(average.parameters(), student.parameters(), strict=True):
                    own.lerp_(other, 0.5)
    assert not all(map(torch.equal, before, average.state_dict().values()))
    assert not any(p.requires_grad or p.grad is not None for p in average.parameters())
    assert all(p.grad is not None for p in student.parameters())


@pytest.mark.parametrize("call", [
    lambda s, t: methods.kd(s, t), lambda s, t: methods.dist(s, t),
    lambda s, t: methods.sp(s, t), lambda s, t: methods.rkd(s, t),
    lambda s, t: methods.at(*(each[:, :, None, None].expand(4, 5, 2, 2) for each in (s, t))),
], ids=["kd", "dist", "sp", "rkd", "at"])  # fmt: skip
def test_student_and_teacher_that_are_swapped(call):
    student, teacher = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    call(student, teacher).backward()
    with pytest.warns(UserWarning, match=r"so nothing is trained by it; the order is \(student, "):
        assert not call(teacher, student).requires_grad
    with torch.no_grad():
        call(teacher, student)


# --------------------------------------------------------- losses of legal shapes that are nothing


@pytest.mark.parametrize("name", ["kd", "dkd", "lskd", "dist"])
def test_one_logit_and_a_method_of_classes(name):
    """Its softmax is 1 on both sides."""
    pair = models()
    for net in pair:
        net.head = nn.Linear(net.head.in_features, 1)
    distiller = make(models=pair, method=name, sokd=False, task=None)
    y = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match=f"{name}: student_logits must be .*K >= 2.*, got "):
        distiller(batch()[0], y)


ONE_CELL = {
    "at": (lambda s, t: methods.at(s, t), (2, 4, 1, 1), (2, 6, 7, 7)),
    "at, teacher": (lambda s, t: methods.at(s, t), (2, 4, 7, 7), (2, 4, 1, 1)),
    "catkd": (lambda s, t: methods.catkd(s, t), (2, 4, 1, 1), (2, 4, 1, 1)),
    "catkd, pooled": (lambda s, t: methods.catkd(s, t, resolution=1), (2, 4, 7, 7), (2, 4, 7, 7)),
}


@pytest.mark.parametrize(("call", "student", "teacher"), ONE_CELL.values(), ids=ONE_CELL)
def test_a_map_of_one_cell_has_no_attention(call, student, teacher):
    """Divided by its length it is 1 or -1, whatever the network computes."""
    given = torch.rand(student, requires_grad=True), torch.rand(teacher)
    rule = "have 2 cells or more where the maps are compared"
    got = f"got {list(student)} and the teacher's {list(teacher)}"
    with pytest.raises(ValueError, match=re.escape(f": student must {rule}, {got}")):
        call(*given)


@pytest.mark.parametrize("method", ["at", "catkd"])
def test_vectors_have_no_attention_either(method):
    pair = [Shaped(lambda maps: maps.mean((2, 3))) for _ in range(2)]
    options = {} if method == "at" else {"student_head": pair[1].head, "teacher_head": pair[0].head}
    distiller = make(models=pair, layers="here", method=method, sokd=False, **options)
    with pytest.raises(ValueError, match=f"{method}: student must have 2 cells or more"):
        objective(distiller)


def test_class_maps_without_their_length_may_be_pooled_to_one_cell():
    student, teacher = torch.rand(2, 4, 7, 7, requires_grad=True), torch.rand(2, 4, 7, 7)
    loss = methods.catkd(student, teacher, resolution=1, normalise=False)
    torch.testing.assert_close(loss, F.mse_loss(student.mean((2, 3)), teacher.mean((2, 3))))
    loss.backward()
    assert student.grad.any()


# ----------------------------------------------------------------------------------------- layouts


class Tokens(nn.Module):
    def __init__(self, channels: int, prefix: int = 0) -> None:
        super().__init__()
        self.patch, self.blocks = nn.Conv2d(3, channels, 8, 8), nn.Linear(channels, channels)
        self.prefix, self.head = prefix, nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).mT
        before = tokens.new_zeros(len(x), self.prefix, tokens.shape[2])
        return self.head(self.blocks(torch.cat([before, tokens], 1)).mean(1))


def test_a_grid_that_is_turned():
    """(W, H) where (H, W) is meant fits the number of tokens all the same."""
    x = torch.randn(2, 3, 32, 72)
    options = {"models": (Tokens(16), Tokens(12)), "layers": "blocks", "example": x}
    rule = "be (H, W) as the images are, 32 x 72"
    refused(
        ValueError, f"Distiller: student_grid must {rule}, got (9, 4)",
        lambda: make(**options, student_grid=(9, 4), teacher_grid=(9, 4)),
    )  # fmt: skip
    refused(
        ValueError, f"Distiller: teacher_grid must {rule}, got (9, 4)",
        lambda: make(**options, student_grid=(4, 9), teacher_grid=(9, 4)),
    )  # fmt: skip
    named = make(**options, student_grid=(4, 9), teacher_grid=(4, 9))
    assert named.features(x)[0][0].shape == (2, 12, 4, 9)
    one_row = make(**options, student_grid=(1, 36), teacher_grid=(1, 36))
    assert one_row.features(x)[0][0].shape == (2, 12, 1, 36), "another aspect is no turned one"


def test_more_registers_than_usual_are_named():
    x, pair = torch.randn(2, 3, 40, 40), (Tokens(16, 8), Tokens(12, 8))
    options = {"models": pair, "layers": "blocks", "example": x}
    with pytest.raises(ValueError, match=r"must hold 0, 1, 2, 4 or 5 prefix tokens .*, got 33 tok"):
        make(**options)
    named = make(**options, student_tokens=8, teacher_tokens=8)
    tokens = named.student.blocks(named.student.patch(x).flatten(2).mT)
    torch.testing.assert_close(named.features(x)[0][0], tokens.mT.unflatten(2, (5, 5)))


def test_a_signal_is_no_image():
    """[B, C, T] of an audio network is not B samples of C tokens."""

    class Signal(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.blocks, self.head = nn.Conv1d(1, channels, 4, 4), nn.Linear(channels, CLASSES)

        def forward(self, x):
            return self.head(self.blocks(x).mean(2))

    x, pair = torch.randn(2, 1, 64), (Signal(16), Signal(9))
    options = {"models": pair, "layers": "blocks", "example": x}
    with pytest.raises(ValueError, match=r"have a grid, .* \(student_grid=\(H, W\), e.g. \(1, N\)"):
        make(**options)
    named = make(
        **options, student_order="BCN", teacher_order="BCN", student_grid=(1, 16),
        teacher_grid=(1, 16),
    )  # fmt: skip
    assert named.features(x)[0][0].shape == (2, 9, 1, 16)


# ------------------------------------------------------------- a teacher that changes its own input


@dataclass
class Padded:
    """DETR's pair of tensors and mask."""

    tensors: Tensor
    mask: Tensor | None = None


class Changing(nn.Module):
    """Reads the first tensor by `read`; a teacher changes it by `change` first."""

    def __init__(self, width: int, read: Any, change: Any = None) -> None:
        super().__init__()
        self.net, self.read, self.change, self.seen = Net(width), read, change, []

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = args[0] if args else kwargs
        self.seen.append(self.read(x).mean().item())
        if self.change is not None:
            self.change(x)
        return self.net(self.read(x))


def ones() -> Tensor:
    return torch.ones(4, 3, 16, 16)


INPUTS = {
    "an object": (lambda: Padded(ones()), lambda x: x.tensors, lambda x: x.tensors.mul_(2)),
    "an object's attribute": (
        lambda: Padded(ones()), lambda x: x.tensors, lambda x: setattr(x, "tensors", 2 * x.tensors)
    ),
    "a list in a dict": (
        lambda: {"images": [ones()]}, lambda x: x["images"][0], lambda x: x["images"][0].mul_(2)
    ),
    "an entry of a list": (
        lambda: [torch.ones(3, 16, 16)] * 4, torch.stack,
        lambda x: x.__setitem__(0, 2 * x[0]),
    ),
    "a list that is emptied": (
        lambda: [torch.ones(3, 16, 16)] * 4, lambda x: torch.stack(x) if x else ones(),
        lambda x: x.clear(),
    ),
    "a view": (ones, lambda x: x, lambda x: x[:, 1].mul_(2)),
}  # fmt: skip


@pytest.mark.parametrize(("form", "read", "change"), INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("example", [True, False])
def test_inputs_of_any_form_stay_as_they_are(form, read, change, example):
    teacher, student = Changing(6, read, change), Changing(3, read)
    options = {"layers": "net.stage1", "example": form() if example else None}
    distiller = make(models=(teacher, student), **options)
    for _ in range(2):
        x = form()
        distiller(x, batch()[1])
        assert read(x).unique().tolist() == [1.0]
        distiller.features(x)
        assert read(x).unique().tolist() == [1.0]
    assert set(student.seen) == {1.0} == set(teacher.seen)


# ------------------------------------------------------------------------------------- the dry run


def fill(net: Buffered, x: Tensor) -> None:
    net.memory = torch.zeros(3) if net.memory is None else net.memory + 1


def drop(net: Buffered, x: Tensor) -> None:
    del net.memory
    net.register_buffer("memory", torch.full((2,), 5.0))


def multiply(net: Buffered, x: Tensor) -> None:
    assert net.memory.layout == torch.sparse_coo
    net.memory = net.memory * 2


@pytest.mark.parametrize(("use", "buffer"), [
    (fill, None), (drop, torch.zeros(4)), (multiply, torch.eye(3).to_sparse()),
], ids=["none yet", "registered again", "sparse"])  # fmt: skip
def test_buffers_that_come_and_go(use, buffer):
    pair = [Buffered(width, buffer, use) for width in (6, 3)]
    distiller = make(models=pair, layers="net.stage1")
    assert all(net.memory is buffer for net in pair)
    objective(distiller).backward()


def test_a_table_that_the_first_pass_registers():
    """Rotary tables, anchors: as after a first pass without a Distiller."""

    class Tabled(Net):
        def forward(self, x):
            if not hasattr(self, "table"):
                self.register_buffer("table", torch.arange(5.0), persistent=False)
            return super().forward(x) + self.table

    distiller = make(models=(Tabled(6), Tabled(3)))
    expected = distiller.student(batch()[0])
    torch.testing.assert_close(distiller(*batch())[0], expected)


def test_lazy_layers_where_no_dry_run_is_needed():
    def lazy():
        return nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(CLASSES))

    torch.manual_seed(0)
    distiller = sokd.Distiller(lazy(), lazy(), method="kd", sokd=False)
    assert objective(distiller).isfinite()
    assert not any(p.requires_grad for p in distiller.teacher.parameters())


# ---------------------------------------------------------------------------------- inference mode


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
    refused(
        ValueError, f"Distiller: student must {rule}, got {count} such parameters",
        lambda: make(models=(Net(6), student)),
    )  # fmt: skip


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_search_by_relax_in_the_dtype_of_kd(dtype):
    student, kd = nn.Conv2d(3, 4, 3).to(dtype), sokd.SoKD(4, 6, search=None).to(dtype)
    search = sokd.PolicySearch(kd, student, estimator="relax")
    before = kd.policy.alpha.detach().clone()

    def step(model, x):
        features = model(x)
        return features.square().mean(), features, torch.ones(4, 6, 14, 14, dtype=dtype)

    search.step(step, batch(dtype=dtype)[0])
    assert kd.policy.alpha.isfinite().all() and not torch.equal(kd.policy.alpha, before)


# ------------------------------------------------------------------------------------------ exports


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def prune(student: Net) -> None:
    nn_prune.l1_unstructured(student.stage1[0], "weight", 0.5)


def keep(student: Net) -> None:
    student.stem.register_forward_hook(Keeper())


class Keeper:
    """A hook that keeps what it saw last."""

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.kept = output


@pytest.mark.parametrize("change", [prune, keep], ids=["pruned", "kept in inference mode"])
def test_exports_of_changed_students(change):
    student = Net(3)
    change(student)
    distiller = make(models=(Net(6), student))
    objective(distiller).backward()
    with torch.inference_mode():
        distiller.eval()(*batch())
    exported, x = distiller.export(), batch()[0]
    expected = student.eval()(x)
    assert torch.equal(exported(x), expected) and torch.equal(saved(exported)(x), expected)


def test_an_export_can_be_exported():
    distiller = make()
    objective(distiller).backward()
    exported, x = distiller.export(), batch()[0]
    program = torch.export.export(exported, (x,))
    torch.testing.assert_close(program.module()(x), exported(x))


# ------------------------------------------------------------------------------ models of any kind


def traced(net: nn.Module) -> nn.Module:
    return torch.fx.symbolic_trace(net)


def exported_program(net: nn.Module) -> nn.Module:
    return torch.export.export(net, (batch()[0],)).module()


@pytest.mark.parametrize("form", [traced, exported_program], ids=["fx", "export"])
def test_a_teacher_that_is_a_graph(form):
    teacher, student = models()
    teacher.eval()
    expected = make(models=(teacher, copy.deepcopy(student)), method="kd", sokd=False)
    graph = make(models=(form(teacher), student), method="kd", sokd=False)
    found, wanted = (each(*batch())[1]["loss_kd"] for each in (graph, expected))
    torch.testing.assert_close(found, wanted)
    assert not any(p.requires_grad for p in graph.teacher.parameters())


class Silent(Net):
    """Its `train()` returns nothing, as that of mmdetection's backbones."""

    def train(self, mode: bool = True) -> None:
        super().train(mode)
        self.stem.eval()


def test_models_whose_train_returns_nothing():
    distiller = make(models=(Silent(6), Silent(3)))
    assert isinstance(distiller.teacher, Silent) and not distiller.teacher.training
    objective(distiller.train()).backward()
    assert distiller.student.training and not distiller.student.stem.training
    distiller.teacher.train()
    with pytest.warns(UserWarning, match="the teacher was in train mode"):
        objective(distiller)
    assert isinstance(distiller.export(), Silent) and not distiller.export().training


def test_layers_of_a_graph():
    """Of a stage the graph calls the layers, not the stage."""
    pair = tuple(map(traced, models()))
    with pytest.raises(RuntimeError, match=r"torch\.fx graph, which calls the innermost mod"):
        make(models=pair, sokd=False)
    distiller = make(models=pair, sokd=False, layers=["stage1.2", "stage2.2"])
    expected = make(models=models(), sokd=False, layers=["stage1.2", "stage2.2"])
    for found, wanted in zip(
        distiller.features(batch()[0]), expected.features(batch()[0]), strict=True
    ):
        torch.testing.assert_close(found, wanted)
    objective(distiller).backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_student_of_torchscript_where_no_layers_are_used():
    teacher, student = models()
    student.eval()
    expected = make(models=(teacher, student), method="kd", sokd=False).eval()(*batch())[1]
    script = torch.jit.script(copy.deepcopy(student))
    distiller = make(models=(teacher, script), method="kd", sokd=False)
    torch.testing.assert_close(distiller.eval()(*batch())[1], expected)
    objective(distiller.train()).backward()
    assert all(p.grad is not None for p in script.parameters())
    assert torch.equal(distiller.export()(batch()[0]), script.eval()(batch()[0]))


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


# ----------------------------------------------------------------------------- swapped arguments


@pytest.mark.parametrize(("channels", "text"), [
    (([(16, 8, 8)], [(32, 8, 8)]), "student_channels must be a whole number, got (16, 8, 8)"),
    ((16, 32), "student_channels must be a list of numbers, got 16"),
    (([16], [32.0]), "teacher_channels must be a whole number, got 32.0"),
], ids=["shapes", "numbers", "a fraction"])  # fmt: skip
def test_channels_of_another_kind(channels, text):
    refused(TypeError, f"reviewkd: {text}", lambda: methods.reviewkd(*channels))


def test_channels_that_are_swapped():
    kd = sokd.SoKD(student_channels=6, teacher_channels=4, **SMALL)
    refused(
        ValueError,
        "loss: student_features must be [B, 6, H, W] or [B, N, 6], got [2, 4, 8, 8]",
        lambda: sokd.loss(torch.randn(2, 4, 8, 8), torch.randn(2, 6, 8, 8), kd),
    )


def test_a_step_whose_features_are_swapped():
    student, kd = nn.Conv2d(3, 6, 3), sokd.SoKD(6, 6, **SMALL)

    def step(model, x):
        features = model(x)
        return features.square().mean(), torch.ones(4, 6, 14, 14), features

    refused(
        ValueError,
        "PolicySearch: teacher features must not require grad, got a tensor that requires grad",
        lambda: sokd.PolicySearch(kd, student).step(step, batch()[0]),
    )


# ---------------------------------------------------------------------- numbers that are options

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


@pytest.mark.parametrize(("give", "rule"), NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), True, "1", [1.0]], ids=str)
def test_numbers_of_sokd(give, rule, value):
    refused(ValueError, f"{rule}, got {value!r}", lambda: give(value))


# ---------------------------------------------------------- a search, and what it is called with


class Normalising(Net):
    """Normalises its input in place, and keeps the mean of the pixels that it saw."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = [*getattr(self, "seen", []), x.mean().item()]
        return super().forward(x.sub_(0.5).div_(0.25))


@pytest.mark.parametrize("order", [1, 2])
def test_a_search_of_a_student_that_normalises_in_place(order):
    distiller = make(models=(Net(6), Normalising(3)), sokd={"search": None, **SMALL})
    search = sokd.PolicySearch(distiller.kd, distiller.student, order=order)
    x, y = ones(), batch()[1]
    distiller.student.seen = []
    search.step(distiller.step, (x, y))
    assert distiller.student.seen == [1.0] * (4 if order == 2 else 1)
    assert torch.equal(x, ones()), "the batch changed"


@pytest.mark.parametrize("form", [lambda x: x, lambda x: {"x": x}, lambda x: [x]])
def test_a_step_that_changes_its_batch(form):
    student, kd = nn.Conv2d(3, 4, 3), sokd.SoKD(4, 6, search=None)
    search = sokd.PolicySearch(kd, student)

    def step(model, given):
        x = given["x"] if isinstance(given, dict) else given[0] if len(given) == 1 else given
        features = model(x.sub_(0.5))
        return features.square().mean(), features, torch.ones(4, 6, 14, 14)

    with pytest.raises(ValueError, match=r"leave the batch as it is, .* \(x.clone\(\)\)"):
        search.step(step, form(ones()))


def test_a_search_of_another_model():
    distiller = make(sokd={"search": None, **SMALL})
    rule = "Distiller: model must be the Distiller's student, as in PolicySearch(distiller.kd, "
    for model, got in ((distiller.teacher, "its teacher"), (Net(3), "another Net")):
        search = sokd.PolicySearch(distiller.kd, model)
        refused(
            ValueError, f"{rule}distiller.student), got {got}",
            lambda search=search: search.step(distiller.step, batch()),
        )  # fmt: skip


# --------------------------------------------------------------- sizes and orders that are swapped


@pytest.mark.parametrize("adapter", ["conv", "linear"])
def test_sizes_that_are_swapped(adapter):
    f_s, f_t = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4)
    refused(
        ValueError,
        "loss: student_features must have the size (4, 4) that the adapter was made for, got "
        "(8, 8), the teacher's size (student_size and teacher_size are swapped)",
        lambda: sokd.loss(
            f_s, f_t, sokd.SoKD(4, 6, student_size=4, teacher_size=8, adapter=adapter)
        ),
    )
    right = sokd.SoKD(4, 6, student_size=8, teacher_size=4, adapter=adapter)
    assert torch.isfinite(sokd.loss(f_s, f_t, right))
    larger = torch.randn(2, 4, 16, 16), torch.randn(2, 6, 8, 8)
    assert torch.isfinite(sokd.loss(*larger, right)), "larger images are legal"


def pyramid(channels: int) -> list[Tensor]:
    return [torch.randn(2, channels, side, side, requires_grad=channels == 4) for side in (8, 4)]


@pytest.mark.parametrize("way", ["loss", "wrap", "Distiller"])
def test_layers_in_another_order(way):
    kd = sokd.SoKD([4, 4], [6, 6], **SMALL)
    loss = kd if way == "loss" else sokd.wrap(
        lambda students, teachers: sum(map(F.mse_loss, students, teachers)), kd
    )  # fmt: skip

    def call(crossed: bool) -> None:
        if way == "Distiller":
            layers = {"stage1": "stage2", "stage2": "stage1"} if crossed else ["stage1", "stage2"]
            make(layers=layers, sokd=SMALL)
        else:
            loss(pyramid(4), pyramid(6)[:: -1 if crossed else 1])

    call(crossed=False)
    with pytest.warns(UserWarning, match="8x8, 4x4 and the teacher's 4x4, 8x8: the same sizes in"):
        call(crossed=True)


def test_boxes_that_are_shares_of_the_sides():
    shares = [torch.tensor([[0.2, 0.2, 0.8, 0.9]]), torch.zeros(0, 4)] * 2
    distiller = make(method="fgd", sokd=False)
    x, y = batch()
    refused(
        ValueError,
        "fgd: boxes must be in pixels of the network's input, 16 x 16 (height x width), got none "
        "above 1, as shares of the sides are",
        lambda: distiller(x, y, boxes=shares),
    )
    pixels = [16 * each for each in shares]
    assert torch.isfinite(distiller(x, y, boxes=pixels)[1]["loss_fgd"])
    corner = [torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.zeros(0, 4)] * 2
    distiller(x, y, boxes=corner)  # a pixel is a box


def test_a_teacher_that_is_set_later():
    """It would be trained with the student, and not run."""
    distiller, other = make(), Net(6)
    with pytest.raises(AttributeError, match="make another Distiller, or load the weights into it"):
        distiller.teacher = other
    assert not {*other.parameters()} & {*distiller.parameters()}
    distiller.teacher.load_state_dict(other.state_dict())
    x = batch()[0]
    torch.testing.assert_close(distiller.teacher(x), other.eval()(x))


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
