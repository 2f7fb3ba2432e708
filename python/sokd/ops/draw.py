"""The policy's random draws: uniforms and a noise seed from two int64 buffers, no generator.

word = philox4x32_10(counter = (block, 0xFFFFFFFF, counter), key = seed)
noise_seed  = words 0 and 1 of block 0
uniforms[i] = ((word i % 4 of block 1 + i // 4) >> 9) + 1/2) * 2^-23    in the open interval (0, 1)
"""

from __future__ import annotations

import torch
from torch import Tensor

from sokd import _core, reference
from sokd.ops.checks import check_device, check_word
from sokd.ops.runtime import has_kernel, register, resources


def _kernel(seed: Tensor, counter: Tensor, n: int) -> tuple[Tensor, Tensor]:
    uniforms, noise_seed = _fake(seed, counter, n)
    _core.draw(uniforms, noise_seed, seed, counter, resources(seed))
    return uniforms, noise_seed


def _fake(seed: Tensor, counter: Tensor, n: int) -> tuple[Tensor, Tensor]:
    return torch.empty(n, dtype=torch.float32, device=seed.device), torch.empty_like(seed)


_draw = register("draw(Tensor seed, Tensor counter, int n) -> (Tensor, Tensor)", _kernel, _fake)


def draw(seed: Tensor, counter: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """`n` uniforms and a seed for `refine`, a function of `seed` and `counter` alone.

    Args:
        seed: [1] int64, the stream; counter: [1] int64, the step in it.
        n: number of uniforms, not negative.

    Returns:
        uniforms [n] float32 in the open interval (0, 1); noise_seed [1] int64.

    Source: settled here, so that a run resumes bit for bit from two buffers in its state_dict, and
    draws the same on each rank and under `torch.compile`.
    """
    check_word("draw", "seed", seed)
    check_word("draw", "counter", counter)
    check_device("draw", "counter", counter, "seed", seed)
    if n < 0:
        raise ValueError(f"draw: n must be at least 0, got {n}")
    if not has_kernel(seed):
        return reference.draw(seed, counter, n)
    uniforms, noise_seed = _draw(seed, counter, n)
    return uniforms, noise_seed
