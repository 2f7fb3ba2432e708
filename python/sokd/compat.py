"""A wrapper around `Distiller` with the interface of mdistiller's distillers.

A fork of mdistiller needs one import, and one line where it lists its distillers:

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

# the image size of each data set
_SIDES = {"cifar100": 32, "cifar10": 32, "tinyimagenet": 64, "imagenet": 224}

_DETECTION = ("boxes", "image_sizes", "input_size")  # keywords of a call, as `Distiller`'s


class MDistiller(Distiller):
    """mdistiller-compatible wrapper around `Distiller`: the keywords `image` and `target`.

    `distiller(image=..., target=..., epoch=...)` returns `(logits, losses)` in train mode;
    `distiller(image=...)` returns the logits in eval mode. mdistiller's scripts wrap the distiller
    in `torch.nn.DataParallel`, which works on one device; use DistributedDataParallel for several.

    Args:
        student, teacher: models that return (logits, dict of features), as mdistiller's do, or any
            models that `Distiller` accepts.
        cfg: the configuration of mdistiller. `cfg.DATASET.TYPE` selects the image size of the dry
            run.
        num_data: the number of training samples, passed as `num_samples` to a method that has this
            option (crd).
        options: options of `Distiller`. `example` is required unless `cfg` names a known data set.
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

        The keywords `epoch` and, of CRD, `contrastive_index` are ignored: the loss draws its own
        negatives.
        """
        given = {name: kwargs[name] for name in _DETECTION if name in kwargs}
        output, losses = super().forward(image, target, index=index, **given)
        return self.logits_of(output), losses

    def forward_test(self, image: Any) -> Any:
        """The student's logits."""
        return self.logits_of(super().forward(image))

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        """The parameters for the optimiser: those of the student, adapters, methods and SoKD."""
        return list(self.parameters())

    def get_extra_parameters(self) -> int:
        """The number of trained parameters outside the student."""
        students = {id(parameter) for parameter in self.student.parameters()}
        return sum(p.numel() for p in self.get_learnable_parameters() if id(p) not in students)


def _takes(method: Any, option: str) -> bool:
    """Whether the method, or one of several, has the option."""
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
