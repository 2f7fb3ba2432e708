"""The Distiller with the calls of mdistiller's trainers and their forks.

In a fork, one import and one line where its distillers are listed:

    from sokd.compat import MDistiller
    layers = {"layer3": "layer3"}
    distiller_dict["SOKD"] = functools.partial(MDistiller, layers=layers, method="reviewkd")
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sokd.distiller import Distiller
from sokd.methods import METHODS, options_of

__all__ = ["MDistiller"]

_SIDES = {
    "cifar100": 32,
    "cifar10": 32,
    "tinyimagenet": 64,
    "imagenet": 224,
}  # of the data sets' images

_DETECTION = ("boxes", "image_sizes", "input_size")  # keywords of a call, as `Distiller`'s


class MDistiller(Distiller):
    """mdistiller-compatible wrapper around `Distiller`: the keywords `image` and `target`.

    `distiller(image=..., target=..., epoch=...)` is `(logits, losses)` in train mode; in eval mode
    `distiller(image=...)` is the logits. `torch.nn.DataParallel`, which its scripts put around a
    distiller, serves on one device; several need DistributedDataParallel.

    Args:
        student, teacher: as mdistiller makes them; they return (logits, dict of features), or
            anything else.
        cfg: the fork's configuration: `cfg.DATASET.TYPE` gives the size of the images for the dry
            run.
        num_data: of the training set, as CRD is given it; handed on to a method with that option.
        options: of `Distiller`. `example` is needed where `cfg` does not name a known data set.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        cfg: Any = None,
        num_data: int | None = None,
        **options: Any,
    ) -> None:
        if options.get("example") is None:
            options["example"] = _example(cfg, student)
        if num_data is not None and _takes(options.get("method"), "num_samples"):
            options.setdefault("num_samples", num_data)
        super().__init__(student, teacher, **options)
        self.cfg = cfg

    def forward(  # type: ignore[override]
        self, image: Any = None, target: Any = None, **kwargs: Any
    ) -> Any:
        if self.training:
            return self.forward_train(image, target, **kwargs)
        return self.forward_test(image)

    def forward_train(
        self, image: Any, target: Any = None, index: Tensor | None = None, **kwargs: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """The student's logits and the dict of losses.

        Of a trainer's other keywords `epoch` is not used, nor CRD's `contrastive_index`: the
        negatives are drawn by the loss itself.
        """
        given = {name: kwargs[name] for name in _DETECTION if name in kwargs}
        output, losses = super().forward(image, target, index=index, **given)
        return self.logits_of(output), losses

    def forward_test(self, image: Any) -> Any:
        """The student's logits."""
        return self.logits_of(super().forward(image))

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        """The parameters for the optimiser: of the student, adapters, methods and SoKD."""
        return list(self.parameters())

    def get_extra_parameters(self) -> int:
        """The number of trained parameters beside the student's."""
        students = {id(parameter) for parameter in self.student.parameters()}
        return sum(p.numel() for p in self.get_learnable_parameters() if id(p) not in students)


def _takes(method: Any, option: str) -> bool:
    """Whether a method of that name, or one of those, has the option."""
    names = method if isinstance(method, Mapping) else [method]
    return any(
        name in METHODS and option in options_of(name) for name in names if isinstance(name, str)
    )


def _example(cfg: Any, student: nn.Module) -> Tensor | None:
    kind = getattr(getattr(cfg, "DATASET", None), "TYPE", None)
    side = _SIDES.get(str(kind).lower().replace("-", "").replace("_", ""))
    if side is None:
        return None
    place = next(student.parameters(), torch.zeros(()))
    return torch.zeros(2, 3, side, side, device=place.device)
