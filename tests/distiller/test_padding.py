"""image_sizes: nothing of the padding is distilled, by any method, with and without SoKD."""

from __future__ import annotations

import pytest
import torch
from support.distiller_cases import SMALL
from torch import Tensor, nn

from sokd import Distiller, PolicySearch, manual_seed

SIZES = [(16, 24), (12, 8), (5, 24)]  # (12, 8) ends between cells of the second level
BOXES = [torch.tensor([[2.0, 3.0, 9.0, 12.0]]), torch.tensor([[0.0, 0.0, 8.0, 12.0]]),
         torch.zeros(0, 4)]  # fmt: skip


class Levels(nn.Module):
    """Two levels, strides 2 and 8, of which each cell depends on its own pixels only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.p1, self.p3 = nn.Conv2d(3, width, 2, stride=2), nn.Conv2d(3, width, 8, stride=8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.seen = x.requires_grad_() if self.training else x
        return self.p1(x), self.p3(x)


def padding() -> Tensor:
    """[3, 1, 16, 24], True for the pixels of cells of padding alone, at both strides."""
    outside = torch.ones(3, 1, 16, 24, dtype=torch.bool)
    for index, (height, width) in enumerate(SIZES):
        outside[index, :, : -(-height // 8) * 8, : -(-width // 8) * 8] = False
    return outside


def distilled(x: Tensor, sizes: list | None, method: str, plugged: bool) -> tuple:
    """The losses, and their gradient with respect to the student's input."""
    manual_seed(0)
    torch.manual_seed(0)
    distiller = Distiller(
        Levels(4), Levels(6), layers=["p1", "p3"], method=method, task=None,
        example=x, sokd=SMALL if plugged else False,
    ).train()  # fmt: skip
    where = {"boxes": BOXES, "image_sizes": sizes} if sizes else {"boxes": [b[:0] for b in BOXES]}
    _, losses = distiller(x, **where)
    total = torch.stack(list(losses.values())).sum()
    (gradient,) = torch.autograd.grad(total, distiller.student.seen)
    return torch.stack(list(losses.values())).detach(), gradient


@pytest.mark.parametrize("plugged", [False, True])
@pytest.mark.parametrize("method", ["fitnet", "mgd", "at", "fgd", "sp"])
def test_padding_is_not_distilled(method, plugged):
    """The content of the padding changes no loss and gets no gradient."""
    x, outside = torch.randn(3, 3, 16, 24), padding()
    other = torch.where(outside, 7 * torch.randn_like(x), x)
    (losses, gradient), (again, _) = (
        distilled(given, SIZES, method, plugged) for given in (x, other)
    )
    assert losses.isfinite().all() and torch.equal(losses, again)
    assert not gradient[outside.expand_as(x)].any() and gradient.abs().sum() > 0
    whole, gradient = distilled(x, None, method, plugged)
    assert gradient[outside.expand_as(x)].any() and not torch.equal(whole, losses)


def test_full_images_are_no_change():
    x = torch.randn(3, 3, 16, 24)
    for method in ("fitnet", "mgd"):
        found = [distilled(x, sizes, method, True) for sizes in (None, [(16, 24)] * 3)]
        torch.testing.assert_close(*found)


def test_the_search_sees_no_padding():
    """The maps of `Distiller.step` are 0 there, so the search's loss does not depend on it."""
    x, outside = torch.randn(3, 3, 16, 24), padding()
    distiller = Distiller(
        Levels(4), Levels(6), layers=["p1"], method="fitnet", task=None, example=x, sokd=SMALL
    ).train()
    _, students, teachers = distiller.step(distiller.student, x, image_sizes=SIZES)
    cells = outside[:, :, ::2, ::2]
    for features in (*students, *teachers):
        assert not features[cells.expand_as(features)].any()
        assert features.abs().sum() > 0
    search = PolicySearch(distiller.kd, distiller.student)
    assert search.step(lambda m, b: distiller.step(m, b, image_sizes=SIZES), x).isfinite()


def test_the_images_of_a_dict_are_counted():
    x = torch.randn(3, 3, 16, 24)
    distiller = Distiller(
        Levels(4), Levels(6), layers=["p1", "p3"], method="fitnet", task=None, sokd=False, example=x
    )
    of_dict = distiller({"x": x}, image_sizes=SIZES)[1]["loss_fitnet"]
    torch.testing.assert_close(of_dict, distiller(x, image_sizes=SIZES)[1]["loss_fitnet"])


RULE = "be (height, width) of the images in x, at most (16, 24)"


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ([(16, 24)] * 2, " must have one entry for each of the 3 images, got 2"),
        ([(16, 25)] * 3, f"[0] must {RULE}, got (16, 25)"),
        ([(16, 24), (0, 4), (1, 1)], f"[1] must {RULE}, got (0, 4)"),
    ],
)
def test_sizes_that_do_not_fit(sizes, said):
    with pytest.raises(ValueError) as caught:
        distilled(torch.randn(3, 3, 16, 24), sizes, "fitnet", False)
    assert str(caught.value) == f"Distiller: image_sizes{said}"
