"""A small SoKD, features for it, and its draws from the start: fixtures for tests of the loss."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sokd import SoKD
from sokd.kd.dam import Attention

# A SoKD in which every part has parameters.
TRAINED = {
    "adapter": "conv", "heads": "bounded", "areas": "mutual", "base": "replace",
    "lambda_agreement": 10.0, "lambda_areas": 10.0, "search": None,
}  # fmt: skip


def but_for(options: Mapping[str, Any], parts: Mapping[str, Any] = TRAINED) -> dict[str, Any]:
    """The parts but for the options; without options of a DAM where a DAM or None is given."""
    of_dam = ("heads", "areas", "heat_channels", "k") if "dam" in options else ()
    return {**{name: part for name, part in parts.items() if name not in of_dam}, **options}


def trained(*channels, **options) -> SoKD:
    """A SoKD of these parts but for the options."""
    return SoKD(*channels, **but_for(options))


def make(*channels, seed: int = 0, **options) -> SoKD:
    torch.manual_seed(seed)
    channels = channels or (3, 4)
    heat_channels = None if options.get("heads") == "attention" else 5
    parts = {**TRAINED, "heat_channels": heat_channels, "k": 2}
    return SoKD(*channels, **but_for(options, parts))


def features(*shape: int, seed: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pair(student=(2, 3, 6, 6), teacher=(2, 4, 6, 6), dtype=torch.float32) -> tuple[Tensor, Tensor]:
    return features(*student, dtype=dtype).requires_grad_(), features(*teacher, seed=6, dtype=dtype)


def rewound(kd: SoKD, counter: int = 0) -> SoKD:
    """kd with its draws restarted at `counter`."""
    kd.policy.counter.fill_(counter)
    return kd


class FixedMask(nn.Module):
    """A DAM with a given weight, no agreement and no cost."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, student: Tensor, teacher: Tensor, *, scale: float) -> Attention:
        heat = student.detach()[:0]
        return Attention(self.weight.new_zeros(()), self.weight, self.weight, self.weight, heat)
