"""Small networks of stages, and a Distiller of two of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sokd.distiller import Distiller
from support.kd_cases import TRAINED, but_for

CLASSES = 5
SMALL = {**TRAINED, "heat_channels": 3, "k": 2}


class Net(nn.Module):
    """Stem and two stages with maps [B, w, 16, 16], [B, 2w, 8, 8], [B, 4w, 4, 4]."""

    def __init__(self, width: int, *, norm: bool = True, inplace: bool = False) -> None:
        super().__init__()
        self.stem = self._stage(3, width, 1, norm, inplace)
        self.stage1 = self._stage(width, 2 * width, 2, norm, inplace)
        self.stage2 = self._stage(2 * width, 4 * width, 2, norm, inplace)
        self.head = nn.Linear(4 * width, CLASSES)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int, norm: bool, inplace: bool) -> nn.Sequential:
        layers = [nn.Conv2d(inputs, outputs, 3, stride, 1)]
        if norm:
            layers.append(nn.BatchNorm2d(outputs))
        return nn.Sequential(*layers, nn.ReLU(inplace=inplace))

    def features(self, x: Tensor) -> Tensor:
        return self.stage2(self.stage1(self.stem(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class Buffered(nn.Module):
    """A net with a buffer that its forward treats in some way."""

    def __init__(self, width: int, buffer: Tensor | None, use) -> None:
        super().__init__()
        self.net, self.use = Net(width), use
        self.register_buffer("memory", buffer)

    def forward(self, x: Tensor) -> Tensor:
        self.use(self, x)
        return self.net(x)


class Answering(nn.Module):
    """A net that answers in another form."""

    def __init__(self, net: nn.Module, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.form = net, form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.net(x))


class Shaped(nn.Module):
    """A layer `here` that gives whatever `form` makes of a map [B, 4, 8, 8], and logits."""

    def __init__(self, form) -> None:
        super().__init__()
        self.conv, self.here = nn.Conv2d(3, 4, 3, 2, 1), Form(form)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv(x)
        self.here(maps)
        return self.head(maps.mean((2, 3)))


class Form(nn.Module):
    def __init__(self, form) -> None:
        super().__init__()
        self.form = form

    def forward(self, maps):
        return self.form(maps)


def models(*, norm: bool = True) -> tuple[Net, Net]:
    """Teacher and student, always the same."""
    torch.manual_seed(0)
    return Net(6, norm=norm), Net(3, norm=norm)


def batch(samples: int = 4, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 3, 16, 16, generator=generator)
    return x.to(dtype), torch.randint(0, CLASSES, (samples,), generator=generator)


def extra(samples: int = 4) -> dict[str, Any]:
    """The further arguments of some methods: indices in the training set, boxes."""
    boxes = [torch.tensor([[2.0, 3.0, 9.0, 8.0]]), torch.zeros(0, 4)] * samples
    return {"index": torch.arange(samples), "boxes": boxes[:samples]}


def make(**options: Any) -> Distiller:
    """A Distiller of two Nets in train mode; a SoKD of trained parts but for those named."""
    teacher, student = options.pop("models", None) or models()
    plug = options.get("sokd", True)
    if plug is False:
        options.setdefault("adapter", "conv")
    elif plug is True or (isinstance(plug, dict) and "preset" not in plug):
        parts = SMALL if plug is True else but_for(plug)
        given = () if plug is True else plug
        named = "adapter" in options and "adapter" not in given
        options["sokd"] = {n: v for n, v in parts.items() if not (named and n == "adapter")}
    defaults = {"layers": ["stage1", "stage2"], "method": "fitnet", "example": batch()[0]}
    return Distiller(teacher=teacher, student=student, **{**defaults, **options})


def objective(distiller: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    _, losses = distiller(*(args or batch()), **kwargs)
    return torch.stack(list(losses.values())).sum()


def rewound(distiller: Distiller, counter: int = 0) -> Distiller:
    """The same draws again."""
    if distiller.kd is not None and distiller.kd.policy is not None:
        distiller.kd.policy.counter.fill_(counter)
    return distiller


def gradients(distiller: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in distiller.named_parameters() if p.grad is not None}
