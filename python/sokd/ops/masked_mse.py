"""Masked distillation: the weighted mean squared difference and its gradient, in one pass.

loss      = scale / norm * sum weight[b,y,x] * (student - teacher)[b,c,y,x]^2
d_student = 2 * scale / norm * weight * (student - teacher)
norm      = B*C*H*W ("elements") or C * sum(weight) ("area"); norm 0: loss 0, gradient 0
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from sokd import _core, reference
from sokd.ops import torch_internals
from sokd.ops.checks import Array, check_kind, refuse_gradients
from sokd.ops.runtime import (
    apply,
    checked_by,
    has_kernel,
    is_eager,
    is_meta,
    positional,
    register,
    resources,
    savable,
    second_derivative,
)
from sokd.reference import accumulator, layout_of

_NORMALISE = ("elements", "area")


def _kernel(
    student: Tensor, teacher: Tensor, weight: Tensor | None, normalise: str, scale: float,
    gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    loss, d_student = _fake(student, teacher, weight, normalise, scale, gradient)
    wanted = d_student if gradient else None
    _core.masked_mse(loss, wanted, student, teacher, weight, normalise, scale, resources(student))
    return loss, d_student


def _fake(
    student: Tensor, teacher: Tensor, weight: Tensor | None, normalise: str, scale: float,
    gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    loss = student.new_empty((), dtype=accumulator(student.dtype))
    if not gradient:
        return loss, student.new_empty(0)
    return loss, torch.empty_like(student, memory_format=layout_of(student))


_forward = register(
    "masked_mse(Tensor student, Tensor teacher, Tensor? weight, str normalise, float scale, "
    "bool gradient) -> (Tensor, Tensor)",
    _kernel,
    _fake,
)


def _scale_kernel(gradient: Tensor, upstream: Tensor) -> None:
    if gradient.device.type != "cpu":
        _core.masked_mse_scale(gradient, upstream, resources(gradient))
        # Repeating a backward that failed after this would scale twice; with a new version autograd
        # raises instead.
        torch.autograd.graph.increment_version(gradient)
    elif (factor := upstream.item()) != 1.0:
        gradient.mul_(factor)


# gradient *= upstream, without a write where upstream is one, and without a synchronisation.
_scale = register(
    "masked_mse_scale(Tensor(a!) gradient, Tensor upstream) -> ()",
    _scale_kernel,
    lambda gradient, upstream: None,
)


class _MaskedMse(torch.autograd.Function):
    """Returns (loss, d_student): the gradient is an output so that `setup_context` can save it."""

    generate_vmap_rule = True

    @staticmethod
    @positional
    def forward(
        student: Tensor, teacher: Tensor, weight: Tensor | None, normalise: str, scale: float,
        gradient: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        loss, d_student = _forward(student, teacher, weight, normalise, scale, gradient)
        return loss, d_student

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        # The vmap of torch 2.5 to 2.7 requires a gradient; elsewhere zeros would cost a map.
        eager = torch.compiler.is_compiling() or not torch_internals.is_transforming()
        ctx.set_materialize_grads(not eager)
        ctx.save_for_backward(output[1], *inputs[:3])
        ctx.options = inputs[3:5]
        ctx.to_refine = _is_refined(inputs[1])
        ctx.is_hooked = is_eager() and torch_internals.saved_tensor_hooks(False) is not None

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 6
        twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if twice:
            d_student = apply(_MaskedMseBackward, upstream, *ctx.saved_tensors, *ctx.options)
        else:
            d_student = _scaled(ctx.saved_tensors[0], upstream, ctx.is_hooked)
        d_teacher = _negated(d_student, ctx) if ctx.needs_input_grad[1] else None
        return (d_student if ctx.needs_input_grad[0] else None), d_teacher, None, None, None, None


class _MaskedMseBackward(torch.autograd.Function):
    """The backward, differentiable: its own gradient is that of `sokd.reference`."""

    generate_vmap_rule = True

    @staticmethod
    @positional
    def forward(
        upstream: Tensor, d_student: Tensor, student: Tensor, teacher: Tensor,
        weight: Tensor | None, normalise: str, scale: float,
    ) -> Tensor:  # fmt: skip
        return _multiplied(d_student, upstream)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        upstream, _, student, teacher, weight, *ctx.options = inputs
        ctx.save_for_backward(upstream, student, teacher, weight)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        upstream, student, teacher, weight = ctx.saved_tensors
        normalise, scale = ctx.options

        def value(student: Tensor, teacher: Tensor) -> Tensor:
            return reference.mutual_mse(student, teacher, weight, normalise=normalise, scale=scale)

        pair = (student, teacher)
        to_upstream, *to_pair = second_derivative(value, upstream, pair, (True, False), (incoming,))
        return to_upstream, None, *to_pair, None, None, None


def _is_refined(teacher: Tensor) -> bool:
    """Whether the teacher's gradient flows to `refine` only."""
    if not is_eager(teacher):
        return False
    return teacher.grad_fn is not None and teacher.grad_fn.name() == "RefineBackward"


def _negated(d_student: Tensor, ctx: Any) -> Tensor:
    """-d_student; a negative view where only `refine`, which reads one at no cost, receives it.

    A view kept as a gradient elsewhere would share memory with the student's.
    """
    return (
        torch_internals.negative_view(d_student)
        if ctx.to_refine and is_eager(d_student)
        else -d_student
    )


def _multiplied(gradient: Tensor, upstream: Tensor) -> Tensor:
    """gradient * upstream, rounded once, in new memory."""
    if gradient.dtype.itemsize == 2 and is_eager(gradient, upstream):
        # a scalar [] would not promote the dtype of the product; the write casts it
        return torch.mul(gradient, upstream.reshape(1), out=torch.empty_like(gradient))
    return (gradient.to(accumulator(gradient.dtype)) * upstream).to(gradient.dtype)


def _scaled(gradient: Tensor, upstream: Tensor, is_hooked: bool) -> Tensor:
    """gradient * upstream, in place unless the saved tensor may be read again.

    It may be with a retained graph, and where a hook on saved tensors returned it.
    """
    if is_hooked or not _is_last_walk() or torch_internals.is_legacy_batched(upstream):
        return _multiplied(gradient, upstream)
    _scale(gradient, upstream)
    return gradient


def _is_last_walk() -> bool:
    """Whether the running backward frees the saved tensors: not with `retain_graph` or traced."""
    if torch.compiler.is_compiling() or torch_internals.is_transforming():
        return False
    return not torch_internals.is_graph_retained()


def masked_mse(
    student: Array, teacher: Array, weight: Array | None = None, *, normalise: str = "elements"
) -> Array:
    """The mean of weight * (student - teacher)^2, as a scalar.

    Args:
        student, teacher: [B, C, H, W], one shape and dtype: float64, float32, float16 or bfloat16.
        weight: [B, H, W] or [B, 1, H, W], any float dtype, not negative; None: one everywhere.
        normalise: "elements": divided by B*C*H*W; "area": by C * sum(weight). The same without a
            weight.

    Returns:
        [] float32 (float64 for float64): 0, with gradient 0, for an empty batch or an area of 0.

    Gradient: student only (second derivatives by plain PyTorch: exact, but slow); a teacher or
    weight that requires grad raises. NaN propagates. On the CPU a negative weight raises
    ValueError. NumPy arrays give a NumPy array [].
    Source: method 3 [A: "elements"; settled here: "area"].
    """
    return scaled_mse(student, teacher, weight, normalise=normalise, scale=1.0)


def _check(student: Any, teacher: Any, weight: Any, *, normalise: Any, **_: Any) -> None:
    if not is_eager(student, teacher, weight):
        return
    check_kind("masked_mse", "student", student, teacher=teacher, weight=weight)
    if not isinstance(normalise, str):
        found = type(normalise).__name__
        raise TypeError(f"masked_mse: normalise must be a string, got {found}")
    _core.check_masked_mse(student, teacher, weight, normalise)


@checked_by(_check)
def scaled_mse(
    student: Array, teacher: Array, weight: Array | None, *, normalise: str, scale: float,
    mutual: bool = False,
) -> Array:  # fmt: skip
    """`masked_mse` times `scale`; with `mutual` the teacher gets a gradient too.

    With the factor in the operator the upstream gradient stays 1, which saves a pass over the map.
    """
    check_kind("masked_mse", "student", student, teacher=teacher, weight=weight)
    if isinstance(student, np.ndarray):
        return cast(Array, _masked_mse_numpy(student, teacher, weight, normalise, scale))
    refuse_gradients("masked_mse", weight=weight, teacher=None if mutual else teacher)
    served, half = has_kernel(student), student.dtype == torch.float16
    unread = half and normalise not in _NORMALISE  # float16 passes "elements" to the kernel
    if unread or is_meta(student, teacher, weight) or not served:
        _check(student, teacher, weight, normalise=normalise)
    if not served:
        return reference.mutual_mse(student, teacher, weight, normalise=normalise, scale=scale)
    tracked = student.requires_grad or teacher.requires_grad or not is_eager(student)
    gradient = torch.is_grad_enabled() and tracked
    if gradient:
        teacher, weight = savable(teacher), None if weight is None else savable(weight)
    rest: float | Tensor = 1.0
    if half:
        scale, rest = _split_scale(student, weight, normalise, scale)
        normalise = "elements"
    loss: Tensor = apply(_MaskedMse, student, teacher, weight, normalise, scale, gradient)[0]
    return loss if isinstance(rest, float) and rest == 1.0 else loss * rest


def _split_scale(
    student: Tensor, weight: Tensor | None, normalise: str, scale: float
) -> tuple[float, float | Tensor]:
    """`scale` for "elements" as two factors: the operator's, and the rest for its loss.

    The gradient is kept in float16, which cannot hold a millionth precisely and nothing above
    65504. With the first factor 1/64 to 1/32 of B*C*H*W it is weight * difference / 32 to / 16, in
    range up to a weighted difference of a million; the rest and upstream (a loss scale, mostly)
    multiply it afterwards, in float32.
    """
    elements = student.numel()
    if weight is not None and normalise == "area":  # unknown on the host, and possibly one cell
        area = weight.detach().sum(dtype=torch.float32) * student.shape[1]
        return elements / 64, torch.where(area == 0, area, 64 * scale / area)
    ratio = elements / abs(scale) if scale else 0.0
    if not 0.0 < ratio < math.inf:
        return scale, 1.0
    lift = 2.0 ** math.floor(math.log2(ratio) - 5)  # a power of two rounds nothing
    return scale * lift, 1 / lift


def _masked_mse_numpy(student: Any, teacher: Any, weight: Any, normalise: str, scale: float) -> Any:
    loss = np.empty((), accumulator(student.dtype))
    _core.masked_mse(loss, None, student, teacher, weight, normalise, scale, resources(student))
    return loss
