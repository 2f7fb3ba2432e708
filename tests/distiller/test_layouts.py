"""Layouts of features are checked against the inputs: batch, rank, aspect of the images."""

import re

import pytest
import torch
from support.distiller_cases import CLASSES, SMALL, Shaped, batch, make, objective
from support.raises import raises
from torch import Tensor, nn

from sokd.distiller import Distiller
from sokd.distiller.inputs import Given


class Tokens(nn.Module):
    """A patch embedding, and blocks on tokens in any layout."""

    def __init__(self, channels: int, patch: int = 8, prefix: int = 0, layout: str = "BNC") -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, channels, patch, patch)
        self.prefix, self.layout = prefix, layout
        self.blocks, self.head = nn.Linear(channels, channels), nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).mT
        tokens = torch.cat([tokens.new_zeros(len(x), self.prefix, tokens.shape[2]), tokens], 1)
        if self.layout == "NBC":
            return self.head(self.blocks(tokens.transpose(0, 1)).mean(0))
        return self.head(self.blocks(tokens).mean(1))


class Last(nn.Module):
    """Maps [B, H, W, C], as a Swin transformer's stages."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, channels, 4, 4)
        self.blocks, self.head = nn.Linear(channels, channels), nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patch(x).movedim(1, 3)).mean((1, 2)))


def made(teacher: nn.Module, student: nn.Module, x: Tensor, **options) -> Distiller:
    given = {"layers": "blocks", "method": "fitnet", "sokd": SMALL, "example": x, **options}
    return Distiller(teacher=teacher, student=student, **given)


def refused(text: str, *args, **options) -> None:
    with pytest.raises(ValueError, match=re.escape(f"Distiller: {text}")):
        made(*args, **options)


# -------------------------------------------------------------------------------------------- BHWC
@pytest.mark.parametrize("size", [(32, 32), (24, 40), (4, 4)], ids=str)
@pytest.mark.parametrize("plugged", [SMALL, False], ids=["sokd", "alone"])
def test_channels_last_is_refused_and_named(size, plugged):
    x = torch.randn(2, 3, *size)
    shape = [2, size[0] // 4, size[1] // 4, 12]
    rule = f"be [B, C, H, W] with the aspect of the images, {size[0]} x {size[1]}"
    hint = "student_order='BHWC' if the channels are last, 'BCHW' if they are not"
    text = f"the student's layer 'blocks' must {rule} ({hint}), got {shape}"
    refused(text, Last(16), Last(12), x, sokd=plugged)
    named = made(Last(16), Last(12), x, sokd=plugged, student_order="BHWC", teacher_order="BHWC")
    assert [tuple(side[0].shape[1:]) for side in named.features(x)] == [
        (12, size[0] // 4, size[1] // 4), (16, size[0] // 4, size[1] // 4)
    ]  # fmt: skip
    assert objective(named, x, torch.tensor([0, 1])).isfinite()


def test_channels_last_on_one_side_is_refused_there():
    x = torch.randn(2, 3, 32, 32)
    text = "the teacher's layer 'blocks' must be [B, C, H, W] with the aspect of the images"
    refused(text, Last(16), Last(12), x, student_order="BHWC")


def test_auto_is_refused_too_if_only_such_maps_are_there():
    class Bare(Last):
        def forward(self, x):
            patches = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3)
            return self.head(self.blocks(patches).mean((1, 2)))

    def net(channels):
        bare = Bare(channels)
        bare.blocks, bare.patch = nn.Linear(48, channels), nn.Identity()
        return bare

    x = torch.randn(2, 3, 32, 32)
    refused("the student's layer 'blocks' must be [B, C, H, W]", net(16), net(12), x, layers="auto")


def strips(maps: Tensor) -> Tensor:
    return maps.mean(2, keepdim=True)


def test_a_map_of_another_aspect_is_no_other_order():
    """A network for text lines pools the rows away: [B, C, 1, W]."""
    x = batch()[0]
    assert objective(made(Shaped(strips), Shaped(strips), x, layers="here")).isfinite()


def test_an_order_that_is_named_is_believed():
    """[4, 8, 8, 4] maps of 8 channels and 8 x 4 cells, of square images."""

    def halves(maps):
        return maps.tile(1, 2, 1, 1)[:, :, :, ::2]

    x = batch()[0]
    pair = Shaped(halves), Shaped(halves)
    refused("the student's layer 'here' must be [B, C, H, W]", *pair, x, layers="here")
    named = made(*pair, x, layers="here", student_order="BCHW", teacher_order="BCHW")
    assert named.features(x)[0][0].shape == (4, 8, 8, 4)


# ------------------------------------------------------------------------------------------ tokens
GUESSES = {
    "9 x 16": ((72, 128), 0, 12),
    "4 x 9": ((32, 72), 0, 6),
    "5 x 10, which is 7 x 7 and one more": ((40, 80), 0, 7),
    "2 x 3, which is 2 x 2 and two more": ((16, 24), 0, 2),
    "5 x 10 with two registers": ((40, 80), 3, 7),
}


@pytest.mark.parametrize(("size", "prefix", "guess"), GUESSES.values(), ids=GUESSES)
def test_a_square_guess_for_images_that_are_not_square(size, prefix, guess):
    x, grid = torch.randn(2, 3, *size), (size[0] // 8, size[1] // 8)
    count = grid[0] * grid[1] + prefix
    pair = Tokens(16, prefix=prefix), Tokens(12, prefix=prefix)
    rule = f"be tokens of images of {size[0]} x {size[1]} (pass student_grid=(H, W), and student_"
    refused(f"the student's layer 'blocks' must {rule}", *pair, x)
    with pytest.raises(ValueError, match=f"guessed to be a {guess} x {guess} grid"):
        made(*pair, x)
    named = made(*pair, x, student_grid=grid, teacher_grid=grid)
    students, teachers = named.features(x)
    assert students[0].shape[2:] == teachers[0].shape[2:] == grid
    tokens = named.student.blocks(named.student.patch(x).flatten(2).mT)
    assert count == prefix + tokens.shape[1]
    torch.testing.assert_close(students[0], tokens.mT.unflatten(2, grid))


@pytest.mark.parametrize(("size", "patch", "prefix"), [
    ((224, 224), 32, 1),  # ViT-B/32: 50 tokens
    ((56, 56), 8, 0), ((64, 64), 8, 5), ((16, 16), 8, 2),
    ((60, 64), 8, 0),  # 7 x 8 it is not: 56 tokens leave no square
    ((66, 64), 8, 0),  # rounded down to 8 x 8
], ids=str)  # fmt: skip
def test_a_square_image_confirms_a_square_guess(size, patch, prefix):
    x = torch.randn(2, 3, *size)
    pair = Tokens(16, patch, prefix), Tokens(12, patch, prefix)
    grid = (size[0] // patch, size[1] // patch)
    if grid[0] != grid[1]:
        refused("the student's layer 'blocks' must hold 0, 1, 2, 4 or 5 prefix tokens", *pair, x)
    else:
        assert made(*pair, x).features(x)[0][0].shape == (2, 12, *grid)


def test_a_later_batch_of_another_aspect_is_checked_too():
    distiller = made(Tokens(16), Tokens(12), torch.randn(2, 3, 48, 48))
    y = torch.tensor([0, 1])
    assert objective(distiller, torch.randn(2, 3, 48, 48), y).isfinite()
    with pytest.raises(ValueError, match="must be tokens of images of 32 x 72"):
        objective(distiller, torch.randn(2, 3, 32, 72), y)


def test_tokens_of_what_is_not_an_image():
    """Sixteen words are no 4 x 4 picture."""

    class Words(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.embed, self.blocks = nn.Embedding(9, channels), nn.Linear(channels, channels)
            self.head = nn.Linear(channels, CLASSES)

        def forward(self, x):
            return self.head(self.blocks(self.embed(x)).mean(1))

    x = torch.randint(0, 9, (2, 16))
    rule = "have a grid, because x is not a batch of images (student_grid=(H, W), e.g. (1, N))"
    refused(f"the student's layer 'blocks' must {rule}, got [2, 16, 12]", Words(16), Words(12), x)
    named = made(Words(16), Words(12), x, student_grid=(1, 16), teacher_grid=(1, 16))
    assert objective(named, x, torch.tensor([0, 1])).isfinite()


class Frames(nn.Module):
    """Frames as samples, then a layer `blocks` on the frames of a clip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.patch, self.blocks = nn.Conv2d(3, channels, 8, 8), nn.Linear(channels, channels)
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        frames = self.patch(x.flatten(0, 1)).mean((2, 3)).unflatten(0, x.shape[:2])
        return self.head(self.blocks(frames).mean(1))


class Volume(nn.Module):
    """Patches of a volume."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.patch, self.blocks = nn.Conv3d(1, channels, 4, 4), nn.Linear(channels, channels)
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patch(x).flatten(2).mT).mean(1))


class Pair(nn.Module):
    """Words next to an image, each with tokens of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.embed, self.words = nn.Embedding(9, channels), nn.Linear(channels, channels)
        self.image = Tokens(channels)

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        return self.image(pixels) + self.words(self.embed(ids)).mean((1, 2))[:, None]


def pixels_and_ids(words: int) -> dict[str, Tensor]:
    return {"pixels": torch.randn(2, 3, 32, 32), "ids": torch.randint(0, 9, (2, words))}


@pytest.mark.parametrize(("net", "x", "layer", "grid"), [
    (Frames, torch.randn(2, 16, 3, 32, 32), "blocks", (1, 16)),
    (Volume, torch.randn(2, 1, 16, 16, 16), "blocks", (4, 16)),
    (Pair, pixels_and_ids(9), "words", (1, 9)),
], ids=["frames", "volume", "words and pixels"])  # fmt: skip
def test_a_square_of_what_is_no_picture(net, x, layer, grid):
    """Neither 16 frames nor 64 patches of a volume are a square picture, though x has images."""
    rule = "have a grid, because x is not a batch of images (student_grid=(H, W), e.g. (1, N))"
    count = grid[0] * grid[1]
    text = f"the student's layer {layer!r} must {rule}, got [2, {count}, 12]"
    refused(text, net(16), net(12), x, layers=layer)
    named = made(net(16), net(12), x, layers=layer, student_grid=grid, teacher_grid=grid)
    assert named.features(x)[0][0].shape == (2, 12, *grid)
    assert objective(named, x, torch.tensor([0, 1])).isfinite()


def test_auto_takes_no_words_for_a_picture():
    x = pixels_and_ids(9)
    assert made(Pair(16), Pair(12), x, layers="auto").pairs[-1] == ("image.blocks", "image.blocks")
    with pytest.raises(ValueError, match="no layer of the student with a gradient returns a map"):
        made(Volume(16), Volume(12), torch.randn(2, 1, 16, 16, 16), layers="auto")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padded_tokens_in_a_nested_tensor():
    """In eval mode PyTorch's encoder packs what `src_key_padding_mask` leaves."""

    class Encoded(Tokens):
        def __init__(self, channels: int, nested: bool = True) -> None:
            super().__init__(channels)
            layer = nn.TransformerEncoderLayer(channels, 2, 8, batch_first=True)
            self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)

        def forward(self, pixels: Tensor, mask: Tensor) -> Tensor:
            tokens = self.patch(pixels).flatten(2).mT
            return self.head(self.blocks(tokens, src_key_padding_mask=mask).mean(1))

    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, 8:] = True
    x = {"pixels": torch.randn(2, 3, 32, 32), "mask": mask}
    options = {"layers": "blocks.layers.0", "example": x}
    rule = "be a tensor of one size (nn.TransformerEncoder: enable_nested_tensor=False)"
    with raises(
        TypeError,
        f"Distiller: the student's layer 'blocks.layers.0' must {rule}, got a nested tensor",
    ):
        make(models=(Encoded(16), Encoded(12)), **options)
    named = make(models=(Encoded(16, False), Encoded(12, False)), **options)
    assert objective(named, x, torch.tensor([0, 1])).isfinite()
    whole = make(models=(Encoded(16), Encoded(12)), layers="auto", example=x)
    assert whole.pairs[-1] == ("blocks", "blocks")


def test_an_input_that_is_not_known_leaves_the_guess():
    class Holder:
        def __init__(self, tensors):
            self.tensors = tensors

    class Reading(Tokens):
        def forward(self, x):
            return super().forward(x.tensors)

    x = Holder(torch.randn(2, 3, 32, 72))
    assert made(Reading(16), Reading(12), x).features(x)[0][0].shape == (2, 12, 6, 6)


# ------------------------------------------------------------------------------------------- batch
@pytest.mark.parametrize(("samples", "side"), [(4, 32), (5, 32), (8, 32), (16, 48)])
def test_tokens_before_samples(samples, side):
    x = torch.randn(samples, 3, side, side)
    count = (side // 8) ** 2
    pair = Tokens(16, layout="NBC"), Tokens(12, layout="NBC")
    rule = f"have the batch size of x, {samples}, in its first dimension"
    hint = "student_order='NBC' for tokens [N, B, C]"
    got = [count, samples, 12]
    refused(f"the student's layer 'blocks' must {rule} ({hint}), got {got}", *pair, x)
    named = made(*pair, x, student_order="NBC", teacher_order="NBC")
    maps = named.features(x)[0][0]
    expected = named.student.blocks(named.student.patch(x).flatten(2).mT)
    torch.testing.assert_close(maps, expected.mT.unflatten(2, (side // 8, side // 8)))


def test_as_many_tokens_as_samples_are_found_out_by_the_next_batch():
    distiller = made(Tokens(16, layout="NBC"), Tokens(12, layout="NBC"), torch.randn(16, 3, 32, 32))
    with pytest.raises(ValueError, match="must have the batch size of x, 9, in its first dim"):
        objective(distiller, torch.randn(9, 3, 32, 32), torch.randint(0, CLASSES, (9,)))


def test_channels_before_tokens():
    def flat(maps):
        return maps.flatten(2)

    named = made(
        Shaped(flat), Shaped(flat), batch()[0], layers="here",
        student_order="BCN", teacher_order="BCN",
    )  # fmt: skip
    assert named.features(batch()[0])[0][0].shape == (4, 4, 8, 8)


@pytest.mark.parametrize("form", [
    lambda maps: maps.flatten(2).mT.reshape(-1, 16, 4),  # windows
    lambda maps: maps.repeat(2, 1, 1, 1),
    lambda maps: maps[:1],
    lambda maps: maps.flatten(2).mean(2).repeat(3, 1),
], ids=["windows", "repeated", "one", "vectors"])  # fmt: skip
def test_other_batches(form):
    pair = Shaped(form), Shaped(form)
    text = "the student's layer 'here' must have the batch size of x, 4, in its first dimension"
    refused(text, *pair, batch()[0], layers="here")


@pytest.mark.parametrize("form", [lambda maps: maps[:, None], lambda maps: maps[0, 0, 0]])
def test_other_ranks(form):
    text = "the student's layer 'here' must be a map [B, C, H, W], tokens [B, N, C] or a vector"
    refused(text, Shaped(form), Shaped(form), batch()[0], layers="here")


@pytest.mark.parametrize(("x", "batches", "image"), [
    (torch.zeros(2, 3, 8, 6), {2}, (8, 6)),
    ({"mask": torch.zeros(2), "img": torch.zeros(2, 3, 8, 6)}, {2}, (8, 6)),
    ((torch.zeros(2, 3, 8, 6), torch.zeros(3, 3, 8, 6)), {2, 3, 5}, (8, 6)),  # two views, joined
    ([torch.zeros(3, 8, 4), torch.zeros(3, 6, 9), torch.zeros(3, 6, 9)], {3}, (8, 9)),  # padded
    (torch.zeros(2, 5, 3, 8, 6), {2, 10}, (8, 6)),  # frames
    (torch.zeros(2, 7), {2}, None),
    ("a text", None, None),
], ids=["images", "dict", "two", "list", "video", "words", "other"])  # fmt: skip
def test_what_is_known_of_an_input(x, batches, image):
    given = Given.of(x)
    assert given.batches == (None if batches is None else frozenset(batches))
    assert given.image == image


def test_frames_as_samples():
    class Video(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.blocks, self.head = nn.Conv2d(3, channels, 4, 4), nn.Linear(channels, CLASSES)

        def forward(self, x):
            maps = self.blocks(x.flatten(0, 1))
            return self.head(maps.unflatten(0, x.shape[:2]).mean((1, 3, 4)))

    x = torch.randn(2, 3, 3, 16, 16)
    assert objective(made(Video(16), Video(12), x), x, torch.tensor([0, 1])).isfinite()


# -------------------------------------------------------------------------------------------- grids


def test_a_grid_that_is_turned():
    """(W, H) where (H, W) is meant fits the number of tokens all the same."""
    x = torch.randn(2, 3, 32, 72)
    options = {"models": (Tokens(16), Tokens(12)), "layers": "blocks", "example": x}
    rule = "be (H, W) as the images are, 32 x 72"
    with raises(ValueError, f"Distiller: student_grid must {rule}, got (9, 4)"):
        make(**options, student_grid=(9, 4), teacher_grid=(9, 4))
    with raises(ValueError, f"Distiller: teacher_grid must {rule}, got (9, 4)"):
        make(**options, student_grid=(4, 9), teacher_grid=(9, 4))
    named = make(**options, student_grid=(4, 9), teacher_grid=(4, 9))
    assert named.features(x)[0][0].shape == (2, 12, 4, 9)
    one_row = make(**options, student_grid=(1, 36), teacher_grid=(1, 36))
    assert one_row.features(x)[0][0].shape == (2, 12, 1, 36), "another aspect is no turned one"


def test_more_registers_than_usual_are_named():
    x, pair = torch.randn(2, 3, 40, 40), (Tokens(16, prefix=8), Tokens(12, prefix=8))
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
