"""The teacher changes nothing that the student sees, nor the batch of the caller."""

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.distiller_cases import Answering, Net, batch, make, models, objective
from torch import Tensor, nn

from sokd.kd.batches import changed, copied


class Normalising(nn.Module):
    """Normalises its input in place, once for each tensor in it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net, self.seen = Net(width), []

    def forward(self, *args, **kwargs) -> Tensor:
        images = args[0] if args else None
        tensors = images if isinstance(images, list) else [*args, *kwargs.values()]
        for each in tensors:
            self.seen.append(each.mean().item())
            each.sub_(0.5).div_(0.25)
        images = torch.stack(tensors) if tensors[0].dim() == 3 else sum(tensors)
        return self.net(images)


class Reading(Normalising):
    """Takes the same and leaves it as it is."""

    def forward(self, *args, **kwargs) -> Tensor:
        return super().forward(*copied(args), **copied(kwargs))


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


FORMS = {
    "tensor": lambda: ones(4, 3, 16, 16),
    "keywords": lambda: {"a": ones(4, 3, 16, 16), "b": ones(4, 3, 16, 16)},
    "list of images": lambda: [ones(3, 16, 16) for _ in range(4)],
}


def values(x) -> list[float]:
    tensors = [x] if isinstance(x, Tensor) else x.values() if isinstance(x, dict) else x
    return [value for each in tensors for value in each.unique().tolist()]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("options", [
    {"layers": "net.stage1"}, {"layers": "auto"},
    {"layers": "net.stage1", "example": None},
    {"method": "kd", "sokd": False, "example": None},  # without a dry run
], ids=["named", "auto", "first batch", "no layers"])  # fmt: skip
def test_a_teacher_that_normalises_in_place(form, options):
    teacher, student = Normalising(6), Reading(3)
    example = form()
    distiller = make(models=(teacher, student), **{"example": example, **options})
    assert set(values(example)) == {1.0}, "the example is left as it was"
    for _ in range(3):
        x, y = form(), batch()[1]
        teacher.seen.clear()
        student.seen.clear()
        distiller(x, y)
        assert set(student.seen) == {1.0} and set(values(x)) == {1.0}
        assert teacher.seen.count(1.0) == len(teacher.seen) > 0


@pytest.mark.parametrize("features", [False, True], ids=["a step", "features"])
def test_both_normalise_in_place_and_each_sees_the_batch_once(features):
    pair = Normalising(6), Normalising(3)
    distiller = make(models=pair, layers="net.stage1", example=ones(4, 3, 16, 16))
    for net in pair:
        net.seen.clear()
    x = ones(4, 3, 16, 16)
    distiller.features(x) if features else distiller(x, batch()[1])
    assert pair[0].seen == pair[1].seen == [1.0]
    # a step: the student's own change, as without a Distiller; features leave the batch alone
    assert values(x) == [1.0 if features else 2.0]


def test_a_teacher_that_starts_to_write_is_refused():
    class Late(Reading):
        def forward(self, x):
            if len(self.seen) > 2:
                x.zero_()
            return super().forward(x)

    distiller = make(models=(Late(6), Reading(3)), layers="net.stage1", example=ones(4, 3, 16, 16))
    with pytest.raises(RuntimeError, match="Distiller: the teacher changed its input in place"):
        for _ in range(5):
            distiller(ones(4, 3, 16, 16), batch()[1])


def test_a_teacher_that_reads_costs_no_copy(monkeypatch):
    distiller = make()
    objective(distiller)
    monkeypatch.setattr("sokd.distiller.distiller.copied", lambda x: pytest.fail("copied"))
    objective(distiller)


def test_inference_tensors_have_no_version():
    with torch.inference_mode():
        x = batch()[0] + 0
    assert not changed(x)()
    students, teachers = make(example=x).features(x)
    assert all(maps.isfinite().all() for maps in students + teachers)


def test_a_dict_keeps_its_keys():
    class Popping(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.net = Net(width)

        def forward(self, **given):
            return self.net(given.pop("img"))

    x = {"img": batch()[0]}
    distiller = make(models=(Popping(6), Popping(3)), layers="net.stage1", example=x)
    assert objective(distiller, x, batch()[1]).isfinite() and list(x) == ["img"]


def test_inputs_that_hold_tensors_in_an_object_pass_through():
    """DETR's pair of tensors and mask: of it the versions are not known."""

    class Holder:
        def __init__(self, tensors):
            self.tensors = tensors

    class Masked(Answering):
        def forward(self, x):
            return super().forward(x.tensors)

    pair = Masked(Net(6), lambda z: z), Masked(Net(3), lambda z: z)
    x = Holder(batch()[0])
    assert objective(make(models=pair, layers="net.stage1", example=x), x, batch()[1]).isfinite()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layers", ["net.stage1", "auto"])
def test_a_nested_tensor_passes_through(layers):
    """It has no shape to be read."""

    class Padding(Answering):
        def forward(self, x):
            return super().forward(torch.nested.to_padded_tensor(x, 0.0) if x.is_nested else x)

    x, y = batch()
    losses = []
    for given in (x, torch.nested.nested_tensor(list(x))):
        pair = tuple(Padding(net, lambda z: z) for net in models())
        distiller = make(models=pair, layers=layers, example=given)
        losses.append(distiller(given, y)[1])
    torch.testing.assert_close(*losses)


Pair = namedtuple("Pair", "image mask")


@pytest.mark.parametrize("x", [
    torch.ones(2), [torch.ones(2), {"a": (torch.ones(2), 3)}], Pair(torch.ones(2), None),
], ids=["tensor", "nested", "namedtuple"])  # fmt: skip
def test_copies(x):
    twin = copied(x)
    assert type(twin) is type(x) and repr(twin) == repr(x)
    was_changed = changed(x)
    first = twin
    while not isinstance(first, Tensor):
        first = first[0]
    first.zero_()
    assert not was_changed()
    first = x
    while not isinstance(first, Tensor):
        first = first[0]
    first.zero_()
    assert was_changed()


# ------------------------------------------------------------------------------- inputs of any form


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


def images() -> Tensor:
    return ones(4, 3, 16, 16)


INPUTS = {
    "an object": (lambda: Padded(images()), lambda x: x.tensors, lambda x: x.tensors.mul_(2)),
    "an object's attribute": (
        lambda: Padded(images()), lambda x: x.tensors,
        lambda x: setattr(x, "tensors", 2 * x.tensors),
    ),
    "a list in a dict": (
        lambda: {"images": [images()]}, lambda x: x["images"][0], lambda x: x["images"][0].mul_(2)
    ),
    "an entry of a list": (
        lambda: [ones(3, 16, 16)] * 4, torch.stack,
        lambda x: x.__setitem__(0, 2 * x[0]),
    ),
    "a list that is emptied": (
        lambda: [ones(3, 16, 16)] * 4, lambda x: torch.stack(x) if x else images(),
        lambda x: x.clear(),
    ),
    "a view": (images, lambda x: x, lambda x: x[:, 1].mul_(2)),
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
