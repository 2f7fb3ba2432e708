"""Registration with PyTorch, the choice between kernel and reference, the resources of a call."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial, wraps
from inspect import Parameter, Signature
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from sokd import _core
from sokd.ops import torch_internals
from sokd.ops.config import why_no_cuda

_P = ParamSpec("_P")
_R = TypeVar("_R")

try:
    LIBRARY = torch.library.Library("sokd", "DEF")  # type: ignore[no-untyped-call]
except RuntimeError as error:
    why = "its operators stay registered: restart Python"
    raise ImportError(f"sokd: imported a second time in one process, where {why}") from error

# Devices with kernels in `_core`, and their dispatch keys. A further device is added here: the
# registered functions allocate the outputs on the inputs' device, by which `_core` dispatches.
KERNELS = {"cpu": "CPU"}
if why_no_cuda() is None:
    KERNELS["cuda"] = "CUDA"

_warned: set[str] = set()


def register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register a library op: schema, kernel, fake and, for ops with a result, a vmap rule."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    name = schema.split("(")[0]
    for key in KERNELS.values():
        LIBRARY.impl(name, kernel, key)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"sokd::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.sokd, name).default
    if not schema.endswith("-> ()"):
        torch.library.register_vmap(f"sokd::{name}", _looped(op), lib=LIBRARY)
    return op


def _looped(op: Any) -> Callable[..., Any]:
    """A vmap rule with one call for each entry: noise depends on the index within a call."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        def entry(index: int) -> Any:
            pairs = zip(args, in_dims, strict=True)
            return op(
                *(arg.select(dim, index) if isinstance(dim, int) else arg for arg, dim in pairs)
            )

        results = [entry(index) for index in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(each) for each in zip(*results, strict=True)), (0,) * len(
            results[0]
        )

    return rule


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`, in a form that torch.compile traces.

    While compiling, symbolic numbers become plain ones, and without a gradient `forward` is called
    directly, because the compiler of torch 2.5 to 2.7 passes a context to it.
    """
    if torch.compiler.is_compiling():
        args = tuple(torch_internals.without_symbols(args))
        if not (torch.is_grad_enabled() and any(map(_requires_grad, args))):
            return function.forward(*args)
    return function.apply(*args)  # type: ignore[no-untyped-call]


def positional(forward: Callable[_P, _R]) -> Callable[_P, _R]:
    """Give the `forward` of an autograd function the signature (*args).

    `Function.apply` binds its arguments to the signature in each call. For named parameters that
    takes longer than the rest of a small call.
    """
    args = Parameter("args", Parameter.VAR_POSITIONAL)
    forward.__signature__ = Signature([args])  # type: ignore[attr-defined]
    return forward


def _requires_grad(arg: object) -> bool:
    return isinstance(arg, Tensor) and arg.requires_grad


def is_eager(*subjects: object) -> bool:
    """Whether the subjects have memory to read: no compiler, transform or mode, no wrapper.

    A value that is not a tensor counts as eager, so that the checks run and reject it.
    """
    if torch.compiler.is_compiling():
        return False
    if torch_internals.is_transforming() or torch_internals.count_dispatch_modes():
        return False
    return all(_has_memory(subject) for subject in subjects)


def _has_memory(subject: object) -> bool:
    if type(subject) is Tensor:
        is_wrapper = torch_internals.is_functorch_wrapper(subject)
        return not (is_wrapper or torch_internals.is_legacy_batched(subject))
    return not isinstance(subject, Tensor) or type(subject) is torch.nn.Parameter


def is_captured(tensor: Tensor) -> bool:
    """Whether a CUDA graph records what is done on the tensor's device, to repeat it later."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def transformed() -> bool:
    """Whether a functorch transform runs eagerly; its tensors must not be stored."""
    return not torch.compiler.is_compiling() and torch_internals.is_transforming()


def eager_only(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`torch.compiler.disable` that does not import the compiler (a second) when it decorates."""

    @wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.compiler.is_compiling() or torch_internals.is_compiler_loaded():
            disabled = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
            return disabled(*args, **kwargs)  # type: ignore[no-any-return]
        return function(*args, **kwargs)

    return run


def second_derivative(
    value: Callable[..., Tensor], upstream: Tensor, inputs: Sequence[Tensor | None],
    wanted: Sequence[bool], incoming: Sequence[Tensor],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of a backward, by plain PyTorch `value(*inputs)`: of `upstream`, then `inputs`.

    `incoming` are the gradients that arrive at the gradients of those inputs that are `wanted`.
    """
    present = [index for index, tensor in enumerate(inputs) if tensor is not None]
    needed = [index for index in present if wanted[index]]

    def fill(leaves: Sequence[Tensor]) -> list[Tensor | None]:
        full: list[Tensor | None] = [None] * len(inputs)
        for index, leaf in zip(present, leaves, strict=True):
            full[index] = leaf
        return full

    def first(upstream: Tensor, *leaves: Tensor) -> tuple[Tensor | None, ...]:
        gradients = fill(torch.func.vjp(lambda *leaves: value(*fill(leaves)), *leaves)[1](upstream))
        return tuple(gradients[index] for index in needed)

    pull = torch.func.vjp(first, upstream, *(inputs[index] for index in present))[1]
    d_upstream, *d_leaves = pull(tuple(incoming[index] for index in needed))
    return [d_upstream, *fill(d_leaves)]


def has_kernel(tensor: Tensor) -> bool:
    """Whether `_core` has kernels for the tensor's device; warns once per device type if not."""
    device, compiling, too_old = tensor.device.type, torch.compiler.is_compiling(), None
    if device == "cuda" and device in KERNELS and not compiling:
        too_old = _why_too_old(tensor.device.index)
    if too_old is None and (device in KERNELS or device == "meta"):
        return True
    if not compiling and device not in _warned:
        _warned.add(device)
        why = f" ({too_old or why_no_cuda()})" if device == "cuda" else ""
        used = "the plain PyTorch path (sokd.reference) is used"
        warn_user(f"sokd: no kernels for {device} in this build{why}; {used}")
    return False


def warn_user(text: str) -> None:
    """Warn at the line of the user's code that led here."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in ("sokd", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


@cache
def _why_too_old(index: int) -> str | None:
    """Why the kernels or NVRTC do not support this CUDA device; None: they do, or it is absent."""
    try:
        return _core.cuda_why_not(index)
    except RuntimeError:  # a fake tensor's device; with a real one the call raises the reason
        return None


def stream_of(device: torch.device) -> int:
    """torch's current stream of a CUDA device, as the driver's handle."""
    return torch_internals.raw_stream(device.index)


def resources(tensor: Any) -> tuple[int, int, Callable[[int], Tensor] | None]:
    """The resources of a call on this tensor's device: threads, stream, scratch allocator.

    Scratch comes from torch's allocator: freed on return, it is reused only by later work of the
    same stream.
    """
    if isinstance(tensor, np.ndarray) or tensor.device.type != "cuda":
        return torch.get_num_threads(), 0, None
    device = tensor.device
    return 1, stream_of(device), partial(torch.empty, dtype=torch.uint8, device=device)


def checked_by(check: Callable[..., None]) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Call `check` with an operator's arguments after the operator raised, for the error's message.

    The kernels validate their arguments; a check before each call would read the metadata twice.
    """

    def wrap(operator: Callable[_P, _R]) -> Callable[_P, _R]:
        @wraps(operator)
        def call(*args: _P.args, **options: _P.kwargs) -> _R:
            if torch.compiler.is_compiling():
                return operator(*args, **options)
            try:
                return operator(*args, **options)
            except Exception as error:
                failure = error
            try:
                check(*args, **options)
                raise failure
            finally:
                del failure  # its traceback holds this frame

        return call

    return wrap


def is_meta(*arguments: Any) -> bool:
    """Whether an argument is on the meta device; no kernel then checks the arguments."""
    return any(isinstance(argument, Tensor) and argument.is_meta for argument in arguments)


def savable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of an inference tensor, which autograd cannot save."""
    if torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    return tensor.clone()
