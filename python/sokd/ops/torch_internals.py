"""PyTorch's private names: the use of each, its first release, and the fallback without it.

All of them exist in torch 2.5 to 2.15 unless a later release is given. Nothing else in the package
reads a private name of PyTorch, and every fallback gives the same numbers.

Two private methods of `nn.Module` are overridden in the classes concerned, because there is no
public hook for them. If PyTorch drops them, nothing calls the overrides:

- `_apply` (since 0.1) runs for `.to()`, `.half()` and the like. `Policy` and `SoKD` keep float32
  there, `Distiller` moves its teacher. Without: a cast to half precision rounds the policy.
- `_load_from_state_dict` (since 0.4) runs for `load_state_dict`. `Policy` refuses a state of other
  sub-policies, `Distiller` a state before its shapes are known. Without: PyTorch's own errors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from sokd.ops.installation import release_of

RELEASE = release_of(torch.__version__)
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
    """The arguments with the symbols of `dynamic=True` as plain numbers; for use while compiling.

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


def is_compiler_loaded() -> bool:
    """Whether torch._dynamo is imported, which takes a second. Since 2.0. Without: False."""
    return "torch._dynamo" in sys.modules


def compiled_from(module: nn.Module) -> nn.Module | None:
    """The module behind the result of `torch.compile(module)`, else None.

    Reads `_orig_mod`, since 2.0. Without: None, and the compiled module counts as the user's own.
    """
    inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else None


def is_compiled(module: nn.Module) -> bool:
    """Whether the module is the result of `torch.compile` or `module.compile()` was called.

    Reads `_compiled_call_impl`, since 2.2. Without: False; only the text of an error depends on it.
    """
    in_place = getattr(module, "_compiled_call_impl", None) is not None
    return in_place or compiled_from(module) is not None


def is_replica(module: nn.Module) -> bool:
    """Whether DataParallel made the module for one of its threads.

    Reads `_is_replica`, since 1.5. Without: False, and such a module is not refused.
    """
    return bool(getattr(module, "_is_replica", False))


def has_forward(module: nn.Module) -> bool:
    """Whether the module's class defines `forward`.

    `nn.Module.forward` is `_forward_unimplemented`, since 1.6. Without: True, and the first call
    raises PyTorch's own error.
    """
    return getattr(module.forward, "__name__", "") != "_forward_unimplemented"


def forward_hooks(module: nn.Module) -> MutableMapping[int, Callable[..., Any]]:
    """The module's forward hooks by id, to be found or deleted.

    Reads `_forward_hooks`, since 0.1. Without: none, so copies of a student keep their hooks and a
    layer that was replaced is found when its hook does not run.
    """
    hooks: MutableMapping[int, Callable[..., Any]] = getattr(module, "_forward_hooks", {})
    return hooks


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """A copy of the module's own buffers by name, those that are None included.

    Reads `_buffers`, since 0.1. Without: without those that are None.
    """
    return dict(getattr(module, "_buffers", module.named_buffers(recurse=False)))


def put_buffers(module: nn.Module, buffers: Mapping[str, Tensor | None]) -> None:
    """Set the module's own buffers, also those that its code has deleted.

    Writes `_buffers`, since 0.1. Without: by attribute, which a module's `__setattr__` may forbid.
    """
    if hasattr(module, "_buffers"):
        module._buffers.update(buffers)
        return
    for name, buffer in buffers.items():
        setattr(module, name, buffer)


def share_buffers(module: nn.Module, of: nn.Module) -> None:
    """Make the own buffers of one module those of another, whichever of the two is written to.

    Reads and writes `_buffers`, since 0.1. Without: the buffers of now, without later assignments.
    """
    if hasattr(of, "_buffers"):
        module._buffers = of._buffers
        return
    for name, buffer in of.named_buffers(recurse=False):
        module.register_buffer(name, buffer)


def version(tensor: Tensor) -> int | None:
    """How often the tensor was written to in place; None in inference mode, where no one counts.

    Reads `_version`, since 0.4. Without: None, and a write in place is not detected.
    """
    uncounted = not torch.compiler.is_compiling() and tensor.is_inference()
    return None if uncounted else getattr(tensor, "_version", None)


def saved_training(node: Any) -> bool:
    """Whether a BatchNorm's node in the autograd graph ran in train mode.

    Reads `_saved_training`, since 1.9. Without: False, and train mode is not warned about.
    """
    return bool(getattr(node, "_saved_training", False))
