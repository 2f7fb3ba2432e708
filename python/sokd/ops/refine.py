"""Refinement of features by one plan for each group of samples, in one pass [method 2.3].

refined[n,c,y,x] = keep[g,c] * (hole_g(y,x) * bilinear(features[n, perm[g,c]], theta_g (x,y))
                                + sigma_g * eps(seed, n, c, y, x))
with upstream u:  d_features = adjoint of the sampling;  d_theta through the bilinear weights;
d_sigma = sum keep * u * eps;  d_straight = sum u.  The backward draws eps again; nothing is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from sokd import _core, reference
from sokd.ops import torch_internals
from sokd.ops.checks import Array, check_kind, refuse_gradients, split_seed
from sokd.ops.runtime import (
    apply,
    checked_by,
    has_kernel,
    is_eager,
    is_meta,
    positional,
    register,
    resources,
    second_derivative,
)
from sokd.reference import Plan, Plans, accumulator, layout_of

__all__ = ["Plan", "Plans", "refine", "refine_dots"]

_Part = Tensor | None
_PARTS = (
    "Tensor? theta, Tensor? hole, Tensor? sigma, Tensor? perm, Tensor? keep, "
    "Tensor? seed_tensor, int seed"
)


def _forward_kernel(features: Tensor, *plan: Any) -> Tensor:
    refined = _forward_fake(features)
    _core.refine_forward(refined, features, plan, resources(features))
    return refined


def _forward_fake(features: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(features, memory_format=layout_of(features))


def _backward_kernel(upstream: Tensor, features: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *plan, _, wanted = rest
    gradients = _backward_fake(upstream, features, *rest)
    written = tuple(
        gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)
    )
    _core.refine_backward(written, upstream, features, tuple(plan), resources(features))
    return gradients


def _backward_fake(upstream: Tensor, features: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    theta, _, sigma, _, _, _, _, straight, wanted = rest

    def gradient(of: _Part, wanted: bool) -> Tensor:
        return features.new_empty(0) if of is None or not wanted else of.new_empty(of.shape)

    d_features = _forward_fake(features) if wanted[0] else features.new_empty(0)
    return (
        d_features,
        *(gradient(*each) for each in zip((theta, sigma, straight), wanted[1:], strict=True)),
    )


def _dots_kernel(features: Tensor, upstream: Tensor, *rest: Any) -> Tensor:
    dots = _dots_fake(features, *rest)
    _core.refine_dots(dots, features, upstream, rest[:-2], resources(features))
    return dots


def _dots_fake(features: Tensor, *rest: Any) -> Tensor:
    count, by_sample = rest[-2:]
    shape = (2, count, features.shape[0]) if by_sample else (count,)
    return features.new_empty(shape, dtype=accumulator(features.dtype))


_forward = register(f"refine(Tensor features, {_PARTS}) -> Tensor", _forward_kernel, _forward_fake)
_backward = register(
    f"refine_backward(Tensor upstream, Tensor features, {_PARTS}, Tensor? straight, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward_kernel,
    _backward_fake,
)
_dots = register(
    f"refine_dots(Tensor features, Tensor upstream, {_PARTS}, int plans, bool by_sample) -> Tensor",
    _dots_kernel,
    _dots_fake,
)


class Refine(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    @positional
    def forward(
        features: Tensor, theta: _Part, sigma: _Part, straight: _Part, hole: _Part, perm: _Part,
        keep: _Part, seed_tensor: _Part, seed: int,
    ) -> Tensor:  # fmt: skip
        return _forward(features, theta, hole, sigma, perm, keep, seed_tensor, seed)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:8])
        ctx.seed = inputs[8]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[_Part, ...]:
        wanted = list(ctx.needs_input_grad[:4])
        twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        # The map behind a negative view (see `masked_mse`) is read without a pass that negates it.
        negated = is_eager(upstream) and not (wanted[0] or twice) and upstream.is_neg()
        if negated:
            upstream = torch_internals.negative_view(upstream)
        inputs = (upstream, *ctx.saved_tensors, ctx.seed, wanted)
        gradients = apply(RefineBackward, *inputs) if twice else RefineBackward.forward(*inputs)
        if negated:
            gradients = tuple(-gradient for gradient in gradients)
        return (
            *(d if want else None for d, want in zip(gradients, wanted, strict=True)),
            *[None] * 5,
        )


class RefineBackward(torch.autograd.Function):
    """The backward, differentiable: its own gradient is that of `sokd.reference`."""

    generate_vmap_rule = True

    @staticmethod
    @positional
    def forward(
        upstream: Tensor, features: Tensor, theta: _Part, sigma: _Part, straight: _Part,
        hole: _Part, perm: _Part, keep: _Part, seed_tensor: _Part, seed: int, wanted: list[bool],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        plan = (theta, hole, sigma, perm, keep, seed_tensor, seed)
        return _backward(upstream, features, *plan, straight, wanted)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:9])
        ctx.seed, ctx.wanted = inputs[9:]

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[_Part, ...]:
        upstream, *inputs, hole, perm, keep, seed_tensor = ctx.saved_tensors
        seed = ctx.seed if seed_tensor is None else seed_tensor

        def value(features: Tensor, theta: _Part, sigma: _Part, straight: _Part) -> Tensor:
            return reference.refine(
                features,
                theta,
                hole=hole,
                sigma=sigma,
                perm=perm,
                keep=keep,
                seed=seed,
                straight=straight,
            )

        return (*second_derivative(value, upstream, inputs, ctx.wanted, incoming), *[None] * 6)


def _check(
    features: Any, theta: Any = None, *, hole: Any = None, sigma: Any = None, perm: Any = None,
    keep: Any = None, seed: Any = 0, straight: Any = None,
) -> None:  # fmt: skip
    number, seed_tensor = split_seed("refine", seed, features)
    plan = (theta, hole, sigma, perm, keep, seed_tensor, number)
    if is_eager(features, straight, *plan):
        _check_kinds(features, theta, hole, sigma, perm, keep, straight)
        _core.check_refine(features, plan, straight)


def _check_kinds(features: Any, *parts: Any) -> None:
    names = ("theta", "hole", "sigma", "perm", "keep", "straight")
    check_kind("refine", "features", features, **dict(zip(names, parts, strict=True)))


@checked_by(_check)
def refine(
    features: Array, theta: Array | None = None, *, hole: Array | None = None,
    sigma: Array | None = None, perm: Array | None = None, keep: Array | None = None,
    seed: int | Tensor = 0, straight: Array | None = None,
) -> Array:  # fmt: skip
    """Refine features by a plan: permute channels, resample, cut a hole, add noise, drop channels.

    Args:
        features: [B, C, H, W] float64, float32, float16 or bfloat16; any strides, channels_last
            native.
        theta: [G, 2, 3] as `affine_grid` + `grid_sample(align_corners=False)` read it; identity
            copies.
        hole: [G, 4] ints y0 x0 y1 x1, half open, set to zero (the noise is added on top).
        sigma: [G], standard deviation of the noise.
        perm: [G, C] ints: output channel c shows input channel perm[g, c].
        keep: [G, C] bool: channels with False become zero.
        seed: of the noise: an int of 64 bits, or an int64 tensor [1] on the features' device.
        straight: [G]; not part of the value; its gradient is the sum of the upstream gradient.
        G is 1 or B, for each argument separately. An argument that is None or neutral is free.

    Returns:
        refined, with the shape and dtype of the features; channels_last if they are.

    Gradients: features, theta, sigma, straight (second derivatives by plain PyTorch: exact, but
    slow). Under vmap all entries have the noise of the same seed.
    NaN features propagate. On the CPU, a theta or sigma that is not finite and a perm that is not a
    permutation raise ValueError. NumPy arrays give a NumPy array. Source: method 2.3, settled here.
    """
    number, seed_tensor = split_seed("refine", seed, features)
    _check_kinds(features, theta, hole, sigma, perm, keep, straight)
    if isinstance(features, np.ndarray):
        refined: Any = np.empty(features.shape, features.dtype)
        plan = (theta, hole, sigma, perm, keep, None, number)
        _core.refine_forward(refined, features, plan, resources(features))
        return cast(Array, refined)
    parts = {"hole": hole, "sigma": sigma, "perm": perm, "keep": keep, "straight": straight}
    served = has_kernel(features)
    if not served or is_meta(features, theta, *parts.values()) or not _fits(straight, features):
        _check(features, theta, seed=seed, **parts)
    if not served:
        return reference.refine(features, theta, seed=seed, **parts)
    inputs = (features, theta, sigma, straight, hole, perm, keep, seed_tensor, number)
    return apply(Refine, *inputs)  # type: ignore[no-any-return]


def _fits(straight: _Part, features: Tensor) -> bool:
    """Whether `straight` needs no check; the forward's kernel does not read it."""
    if straight is None or torch.compiler.is_compiling():
        return True
    wide = straight.is_floating_point() and straight.dtype.itemsize > 1
    sizes = ((1,), (features.shape[0],))
    return wide and straight.shape in sizes and straight.device == features.device


def plan_gradients(
    features: Tensor, upstream: Tensor, plan: Plan
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of <upstream, refine(features; plan)> for theta [G, 2, 3] and sigma [G].

    Without autograd, so that they can be computed where a graph must not be recorded or would
    break. None for a part that the plan has not.
    """
    raw = _raw("refine", plan, features)
    wanted = [False, plan.theta is not None, plan.sigma is not None, False]
    if has_kernel(features):
        found = _backward(upstream, features, *raw, None, wanted)
        d_theta, d_sigma = found[1:3]
    else:
        d_theta, d_sigma = _plain_gradients(features, upstream, plan)
    return d_theta if wanted[1] else None, d_sigma if wanted[2] else None


def _raw(op: str, plan: Plan | Plans, features: Any) -> tuple[Any, ...]:
    """A plan as the kernels take it; the compilers of torch 2.5 and 2.6 trace no slice of it."""
    number, seed_tensor = split_seed(op, plan.seed, features)
    return (plan.theta, plan.hole, plan.sigma, plan.perm, plan.keep, seed_tensor, number)


def _plain_gradients(features: Tensor, upstream: Tensor, plan: Plan) -> tuple[_Part, _Part]:
    leaves = [None if part is None else part.detach() for part in (plan.theta, plan.sigma)]
    present = [leaf for leaf in leaves if leaf is not None]
    with torch.enable_grad():
        for leaf in present:
            leaf.requires_grad_()
        refined = reference.refine(
            features, leaves[0], sigma=leaves[1], hole=plan.hole, perm=plan.perm, keep=plan.keep,
            seed=plan.seed,
        )  # fmt: skip
        found = iter(torch.autograd.grad(refined, present, upstream) if present else ())
    d_theta, d_sigma = (None if leaf is None else next(found) for leaf in leaves)
    return d_theta, d_sigma


def _check_dots(features: Any, upstream: Any, plans: Any, *, by_sample: bool = False) -> None:
    plan = Plans.of(plans)
    raw = _raw("refine_dots", plan, features)
    if is_eager(features, upstream, *raw):
        check_kind("refine_dots", "features", features, upstream=upstream, **plan.parts())
        _core.check_refine_dots(features, upstream, raw)


@checked_by(_check_dots)
def refine_dots(
    features: Array, upstream: Array, plans: Plans | Plan | Mapping[str, Any], *,
    by_sample: bool = False,
) -> Array:  # fmt: skip
    """<upstream, refine(features; plan_v)> for V plans, in one pass over memory.

        plans = {"sigma": torch.tensor([[0.0], [0.1], [0.5]])}            # V = 3
        products, squares = refine_dots(features, target, plans, by_sample=True)
        distances = squares - 2 * products       # and + target's squares: |refined - target|^2

    Args:
        features, upstream: [B, C, H, W], one shape and dtype.
        plans: `Plans`, or a mapping of its names: theta [V, G, 2, 3], hole [V, G, 4], sigma [V,
            G], perm and keep [V, G, C], each optional but not all of them; seed one int or int64
            tensor [1] for all plans.
        by_sample: keep the samples apart, and give the squares of the refined maps too.

    Returns:
        [V] float32 (float64 for float64 features). With `by_sample` [2, V, B]: <upstream_b,
        refined_b>, then <refined_b, refined_b>, where the refined maps are not rounded to the
        features' dtype.

    The products are gradients themselves (of the gates and the choice of a sub-policy), so no
    gradient flows through; inputs that require grad raise in grad mode. Source: method 2.4.
    """
    plan = Plans.of(plans)
    parts = plan.parts()
    raw = _raw("refine_dots", plan, features)
    check_kind("refine_dots", "features", features, upstream=upstream, **parts)
    if isinstance(features, np.ndarray):
        shape = (2, _count(parts), len(features)) if by_sample else _count(parts)
        dots: Any = np.empty(shape, accumulator(features.dtype))
        _core.refine_dots(dots, features, upstream, raw, resources(features))
        return cast(Array, dots)
    refuse_gradients("refine_dots", features=features, upstream=upstream, **parts)
    served = has_kernel(features)
    if not served or is_meta(features, upstream, *plan):
        _check_dots(features, upstream, plan)
    if not served:
        return reference.refine_dots(features, upstream, plan, by_sample=by_sample)
    return _dots(features, upstream, *raw, _count(parts), by_sample)  # type: ignore[no-any-return]


def _count(parts: Mapping[str, Tensor]) -> int:
    if not parts:
        raise ValueError("refine_dots: plans must have at least one part, got none")
    return next(iter(parts.values())).shape[0]
