"""PyTorch's private names: the use of each, its first release, and what serves without it.

All of them exist in torch 2.5 to 2.15 unless said otherwise. Nothing else in the package reads a
private name of PyTorch, and every fallback gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

RELEASE = tuple(int(part) for part in torch.__version__.split(".")[:2])
TRACES_GUARDS = RELEASE >= (2, 8)


def _find(name: str, fallback: Callable[..., Any]) -> Callable[..., Any]:
    try:
        return attrgetter(name)(torch)  # type: ignore[no-any-return]
    except AttributeError:
        return fallback


# Whether a torch.func transform is active; its tensors have no memory to read. Since 2.0.
# Without: always assumed, so that only the kernels check arguments.
is_transforming: Callable[[], bool] = _find("_C._are_functorch_transforms_active", lambda: True)

# How many TorchDispatchModes are active (FakeTensorMode, say). Since 2.0. Without: as above.
count_dispatch_modes: Callable[[], int] = _find("_C._len_torch_dispatch_stack", lambda: 1)

# Whether a tensor is a wrapper that outlived its transform. Since 2.0. Without: as above.
is_functorch_wrapper: Callable[[Tensor], bool] = _find(
    "_C._functorch.is_functorch_wrapped_tensor", lambda tensor: True
)

# Whether a tensor is batched by `torch.autograd.grad(is_grads_batched=True)`. Since 2.0. Without:
# as above.
is_legacy_batched: Callable[[Tensor], bool] = _find(
    "_C._functorch.is_legacy_batchedtensor", lambda tensor: True
)

# The hooks on saved tensors, None without any: what they return may be used again. Since 2.8.
# Without: always assumed, so that a backward writes to new memory.
saved_tensor_hooks: Callable[[bool], Any] = _find(
    "_C._autograd._top_saved_tensors_default_hooks", lambda ignore_is_tracing: True
)

# Whether the running backward retains its graph, in which saved tensors must stay. Since 2.1.
# Without: always assumed, so that a backward writes to new memory.
is_graph_retained: Callable[[], bool] = _find(
    "_C._autograd._get_current_graph_task_keep_graph", lambda: True
)

# The number of the running backward pass, -1 outside of one: a draw inside of one would differ from
# the forward's. Since 1.11. Without: such a draw is not refused.
running_backward: Callable[[], int] = _find("_C._current_graph_task_id", lambda: -1)

# -tensor as a view that shares memory, which `refine` reads at no cost. Since 1.10. Without: a
# copy.
negative_view: Callable[[Tensor], Tensor] = _find("_neg_view", lambda tensor: -tensor)


def without_symbols(args: Sequence[Any]) -> list[Any]:
    """For use while compiling: the numbers that `dynamic=True` made symbols, as plain numbers.

    A symbol that two autograd functions share breaks the graph. A compiler traces `guard_scalar`
    since 2.8. Without: the arguments as they are.
    """
    if not TRACES_GUARDS:
        return list(args)
    from torch.fx.experimental.symbolic_shapes import guard_scalar

    return [guard_scalar(arg) if isinstance(arg, (int, float)) else arg for arg in args]


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all elements. `torch.nn.utils.get_total_norm` is public, but only since 2.6."""
    if hasattr(torch.nn.utils, "get_total_norm"):
        norm: Tensor = torch.nn.utils.get_total_norm(tensors)
        return norm
    norms = torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors])
    overall: Tensor = torch.linalg.vector_norm(norms)
    return overall


def raw_stream(index: int) -> int:
    """The handle of a CUDA device's current stream, without a Stream object. Since 1.9."""
    if hasattr(torch._C, "_cuda_getCurrentRawStream"):
        return torch._C._cuda_getCurrentRawStream(index)
    handle: int = torch.cuda.current_stream(index).cuda_stream
    return handle
