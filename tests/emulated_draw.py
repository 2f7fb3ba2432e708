"""`draw` on the emulated kernel, called as the Rust host calls it."""

from __future__ import annotations

import torch
from emulated import I64, U64, Library, Placed, library, structure
from torch import Tensor

Draw = structure("Draw", uniforms=U64, noise_seed=U64, seed=U64, counter=U64, count=I64)


def draw(seed: int, counter: int, n: int, kernels: Library | None = None) -> tuple[Tensor, Tensor]:
    words = [Placed(torch.tensor([value]), align=8) for value in (seed, counter)]
    uniforms = Placed(torch.empty(n), align=4, fill=False)
    noise_seed = Placed(torch.empty(1, dtype=torch.int64), align=8, fill=False)
    args = Draw(uniforms.pointer, noise_seed.pointer, *(word.pointer for word in words), n)
    (kernels or library("draw")).launch("draw", -(-(1 + -(-n // 4)) // 256), args)
    return uniforms.read()[:n], noise_seed.read()
