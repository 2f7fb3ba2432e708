"""Running modules at virtual weights, with modules and random state left as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sokd.ops.torch_internals import compiled_from

__all__ = ["Together", "replayed", "unwrapped"]

T = TypeVar("T")
Weights = dict[str, Tensor]


class Together(nn.Module):
    """Several modules whose weights are replaced for the duration of a call.

    `functional_call` swaps the tensors inside the modules themselves, so every reference to them
    (in a closure, in a hook) runs them at the virtual weights. No module is copied.
    """

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.members = nn.ModuleList(modules)

    def forward(self, run: Callable[[], T]) -> T:
        return run()

    def weights(self, *, but: Iterable[Tensor] = ()) -> Weights:
        """The trained parameters by name, detached, without those in `but`."""
        left_out = {id(tensor) for tensor in but}
        named = self.named_parameters()
        return {name: p.detach() for name, p in named if p.requires_grad and id(p) not in left_out}

    def at(self, weights: Mapping[str, Tensor], run: Callable[[], T]) -> T:
        """run() with the modules at `weights`, and with clones of their buffers."""
        buffers = {name: buffer.clone() for name, buffer in self.named_buffers()}
        return torch.func.functional_call(self, {**buffers, **weights}, (run,))  # type: ignore[no-any-return]


def unwrapped(module: Any) -> Any:
    """The module inside the wrappers of DistributedDataParallel, DataParallel and torch.compile.

    The wrappers act on the real weights: a reducer waits for gradients, compiled code guards on
    parameters.
    """
    while isinstance(module, nn.Module):
        if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            module = module.module
        elif (inner := compiled_from(module)) is not None:
            module = inner
        else:
            break
    return module


@contextmanager
def replayed(devices: Iterable[torch.device]) -> Iterator[Callable[[], None]]:
    """Yield a function that restores PyTorch's present random state; called at the end too."""
    accelerators = [device for device in set(devices) if device.type not in ("cpu", "meta")]
    host = torch.get_rng_state()
    states = [
        (device, torch.get_device_module(device).get_rng_state(device)) for device in accelerators
    ]

    def rewind() -> None:
        torch.set_rng_state(host)
        for device, state in states:
            torch.get_device_module(device).set_rng_state(state, device)

    try:
        yield rewind
    finally:
        rewind()
