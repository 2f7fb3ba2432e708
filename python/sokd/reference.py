"""The operators in plain PyTorch: their definition, and the path of devices without a kernel.

Same names, signatures and numbers as `sokd.ops`; differentiable by autograd. No value is read on
the host, so the functions run on any device without a synchronisation. Half precision computes in
float32 and rounds once. Invalid metadata raises PyTorch's own errors here; `sokd.ops` checks all
arguments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Areas",
    "Plan",
    "Plans",
    "areas",
    "draw",
    "masked_mse",
    "normals",
    "philox",
    "refine",
    "refine_dots",
]

_LOW32 = 0xFFFFFFFF
_PARTS = ("theta", "hole", "sigma", "perm", "keep")  # a plan without its seed


class Areas(NamedTuple):
    """The boxes `areas` found and what they cover."""

    coverage: Tensor  # [B, H, W] float32: how many of the boxes cover the cell
    boxes: Tensor  # [B, k, 4] int64: y0 x0 y1 x1, inclusive; (0, 0, -1, -1): no further peak
    scores: Tensor  # [B, k]: heat of each peak, best first; 0 for the missing ones


class Plan(NamedTuple):
    """The arguments of one `refine` except the features; G is 1 or B; None: unused."""

    theta: Tensor | None = None  # [G, 2, 3]
    hole: Tensor | None = None  # [G, 4]: y0 x0 y1 x1, half open
    sigma: Tensor | None = None  # [G]
    perm: Tensor | None = None  # [G, C]
    keep: Tensor | None = None  # [G, C] bool
    seed: int | Tensor = 0  # of the noise
    straight: Tensor | None = None  # [G]: not part of the value; a straight-through gradient


class Plans(NamedTuple):
    """V plans for `refine_dots`: the arguments of `refine`, stacked; G is 1 or B; None: unused."""

    theta: Tensor | None = None  # [V, G, 2, 3]
    hole: Tensor | None = None  # [V, G, 4]
    sigma: Tensor | None = None  # [V, G]
    perm: Tensor | None = None  # [V, G, C]
    keep: Tensor | None = None  # [V, G, C]
    seed: int | Tensor = 0  # one for all plans, which have the same noise

    @classmethod
    def of(cls, plans: Plans | Plan | Mapping[str, Any]) -> Plans:
        """Accept the tuple itself, a `Plan` of stacked parts, or a mapping of the field names."""
        if isinstance(plans, Plans):
            return plans
        if isinstance(plans, Plan):
            return cls(**{name: getattr(plans, name) for name in (*_PARTS, "seed")})
        if not isinstance(plans, Mapping):
            raise TypeError(
                f"refine_dots: plans must be a Plan or a mapping, got {type(plans).__name__}"
            )
        if unknown := sorted(set(plans) - set(cls._fields)):
            names = ", ".join(cls._fields)
            raise ValueError(f"refine_dots: plans must have no names but {names}, got {unknown[0]}")
        return cls(**plans)

    def parts(self) -> dict[str, Tensor]:
        """The stacked parts that are present, by name."""
        # by name: the compilers of torch 2.5 and 2.6 trace no slice of a named tuple, no `_replace`
        parts = {name: getattr(self, name) for name in _PARTS}
        return {name: part for name, part in parts.items() if part is not None}


# ---------------------------------------------------------------- random numbers


def philox(
    counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon, Moraes, Dror, Shaw, 2011): four 32-bit words for each counter.

    `counter` and `key` hold 32-bit words as int64 tensors or Python ints, broadcast against each
    other; at least one counter word is a tensor. Returns int64 tensors with values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2**64: the masked shift is the unsigned product's high word
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        high0, low0 = (product0 >> 32) & _LOW32, product0 & _LOW32
        high1, low1 = (product1 >> 32) & _LOW32, product1 & _LOW32
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW32, (k1 + 0xBB67AE85) & _LOW32
    return c0, c1, c2, c3


def _key(seed: int | Tensor) -> tuple[Any, Any]:
    """The two 32-bit halves of a 64-bit seed, low one first."""
    return seed & _LOW32, (seed >> 32) & _LOW32


def _box_muller(even: Tensor, odd: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normals (float32) from two 32-bit words."""
    uniform = even.to(torch.float32) * 2.0**-32 + 2.0**-33  # in (0, 1]
    signed = odd - ((odd >> 31) << 32)  # the word read as int32
    angle = signed.to(torch.float32) * 2.0**-32 * (2.0 * math.pi)
    radius = torch.sqrt(-2.0 * torch.log(uniform))
    return radius * torch.cos(angle), radius * torch.sin(angle)


def normals(
    shape: tuple[int, int, int, int] | torch.Size,
    seed: int | Tensor,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normals [B, C, H, W] float32: a function of the seed and the logical index alone.

    Counter words: low and high half of the block of four positions (y*W + x) >> 2, then low and
    high half of the plane n*C + c. The block's four words make normals 0..3 in pairs by Box-Muller.
    """
    batch, channels, height, width = shape
    cells = height * width
    plane = torch.arange(batch * channels, device=device).unsqueeze(1)
    block = torch.arange((cells + 3) // 4, device=device).unsqueeze(0)
    words = philox((block & _LOW32, block >> 32, plane & _LOW32, plane >> 32), _key(seed))
    four = torch.stack((*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3])), dim=-1)
    return four.flatten(1)[:, :cells].reshape(shape)


def draw(seed: Tensor, counter: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """`n` uniforms in the open interval (0, 1) and a seed for `refine`, from two int64 tensors [1].

    Returns `uniforms` [n] float32 and `noise_seed` [1] int64. Counter words: block, 0xFFFFFFFF
    (which `normals` never uses), low and high half of `counter`. Block 0 makes the noise seed, each
    other block four uniforms.
    """
    block = torch.arange(1 + (n + 3) // 4, device=seed.device)
    words = philox((block, _LOW32, counter & _LOW32, (counter >> 32) & _LOW32), _key(seed))
    noise_seed = words[0][:1] | (words[1][:1] << 32)
    mantissas = torch.stack(words, dim=-1)[1:].flatten()[:n] >> 9
    return (mantissas.to(torch.float32) + 0.5) * 2.0**-23, noise_seed


# ---------------------------------------------------------------- refine


class _Exactly(torch.autograd.Function):
    """The value of `exact` where `when` holds, the gradient of `computed` everywhere.

    There (an identity theta, a sigma of 0) the two are equal except for rounding, the sign of zero
    and NaN * 0.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(computed: Tensor, exact: Tensor, when: Tensor) -> Tensor:
        return torch.where(when, exact, computed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return upstream, None, None


def _exactly(computed: Tensor, exact: Tensor, when: Tensor) -> Tensor:
    if torch.compiler.is_compiling() and not (torch.is_grad_enabled() and computed.requires_grad):
        # the compiler of torch 2.5 to 2.7 passes a context to `forward` where there is no gradient
        return torch.where(when, exact.detach(), computed)
    return _Exactly.apply(computed, exact.detach(), when)  # type: ignore[no-any-return, no-untyped-call]


def accumulator(dtype: Any) -> Any:
    """The dtype of sums: float64 for float64, else float32; by name for a NumPy dtype."""
    if isinstance(dtype, torch.dtype):
        return torch.promote_types(dtype, torch.float32)
    return "float64" if dtype == "float64" else "float32"


def layout_of(features: Tensor) -> torch.memory_format:
    """The memory format of results: channels_last if the features are that and not contiguous."""
    last = (
        features.is_contiguous(memory_format=torch.channels_last) and not features.is_contiguous()
    )
    return torch.channels_last if last else torch.contiguous_format


def _coordinates(theta: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Source column and row of each output cell, [G, H, W] each.

    `affine_grid(align_corners=False)`, then the un-normalisation of `grid_sample`, around the map's
    centre, in float64 (float32 where the device has none), so that the identity gives whole
    numbers.
    """
    theta = theta.to(torch.float32 if theta.device.type == "mps" else torch.float64)
    centre_x, centre_y = (width - 1) / 2, (height - 1) / 2
    x = torch.arange(width, device=theta.device, dtype=theta.dtype) - centre_x
    y = (torch.arange(height, device=theta.device, dtype=theta.dtype) - centre_y).unsqueeze(1)
    aspect = width / max(height, 1), height / max(width, 1)
    (t00, t01, t02), (t10, t11, t12) = (row.unbind(1) for row in theta[..., None, None].unbind(1))
    column = t00 * x + t01 * aspect[0] * y + t02 * (width / 2) + centre_x
    row = t10 * aspect[1] * x + t11 * y + t12 * (height / 2) + centre_y
    return column, row


def _corner(features: Tensor, column: Tensor, row: Tensor) -> Tensor:
    """features[n, c, row, column] for integral `column`, `row` [G, H, W]; 0 outside the map."""
    batch, channels, height, width = features.shape
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    cell = torch.where(inside, row * width + column, 0).long()
    cell = cell.flatten(1).unsqueeze(1).expand(batch, channels, height * width)
    value = features.flatten(2).gather(2, cell).reshape(features.shape)
    return torch.where(inside.unsqueeze(1), value, 0)


def _bilinear(features: Tensor, theta: Tensor) -> Tensor:
    """features [B, C, H, W] sampled at theta's coordinates, 0 outside; right derivatives."""
    column, row = _coordinates(theta, *features.shape[2:])
    left, top = column.detach().floor(), row.detach().floor()
    right_share = (column - left).to(features.dtype).unsqueeze(1)
    lower_share = (row - top).to(features.dtype).unsqueeze(1)
    corners = [_corner(features, left + dx, top + dy) for dy in (0, 1) for dx in (0, 1)]
    upper = corners[0] * (1 - right_share) + corners[1] * right_share
    lower = corners[2] * (1 - right_share) + corners[3] * right_share
    sampled = upper * (1 - lower_share) + lower * lower_share
    identity = (
        (theta.detach() == torch.eye(2, 3, dtype=theta.dtype, device=theta.device))
        .flatten(1)
        .all(1)
    )
    return _exactly(sampled, features, identity[:, None, None, None])


def _in_hole(hole: Tensor, height: int, width: int) -> Tensor:
    """Cells of the half-open rectangles y0 x0 y1 x1, [G, 1, H, W] bool."""
    y0, x0, y1, x1 = hole[..., None, None, None].unbind(1)
    y = torch.arange(height, device=hole.device).unsqueeze(1)
    x = torch.arange(width, device=hole.device)
    return (y >= y0) & (y < y1) & (x >= x0) & (x < x1)


def _refined(
    features: Tensor, theta: Tensor | None = None, hole: Tensor | None = None,
    sigma: Tensor | None = None, perm: Tensor | None = None, keep: Tensor | None = None,
    seed: int | Tensor = 0,
) -> Tensor:  # fmt: skip
    """`refine` without `straight`, in the accumulator dtype."""
    out = features.to(accumulator(features.dtype))
    if perm is not None:
        out = out.gather(1, perm.long()[..., None, None].expand(out.shape))
    if theta is not None:
        out = _bilinear(out, theta)
    if hole is not None:
        out = torch.where(_in_hole(hole, *out.shape[2:]), 0, out)
    if sigma is not None:
        sigma = sigma.to(out.dtype)[:, None, None, None]
        noisy = out + sigma * normals(out.shape, seed, out.device).to(out.dtype)
        out = _exactly(noisy, out, sigma.detach() == 0)
    if keep is not None:
        out = torch.where(keep[..., None, None], out, 0)
    return out


def refine(
    features: Tensor, theta: Tensor | None = None, *, hole: Tensor | None = None,
    sigma: Tensor | None = None, perm: Tensor | None = None, keep: Tensor | None = None,
    seed: int | Tensor = 0, straight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """keep * (hole * bilinear(features[:, perm], theta) + sigma * eps(seed)), as `sokd.ops.refine`.

    features [B, C, H, W]; theta [G, 2, 3]; hole [G, 4]; sigma [G]; perm [G, C]; keep [G, C] bool;
    straight [G]; each G is 1 or B. Gradients: features, theta, sigma, straight (the sum of the
    upstream gradient).
    """
    out = _refined(features, theta, hole, sigma, perm, keep, seed)
    if straight is not None:
        carried = out + straight.to(out.dtype)[:, None, None, None]
        out = _exactly(carried, out, torch.ones((), dtype=torch.bool, device=out.device))
    return out.to(features.dtype).contiguous(memory_format=layout_of(features))


def refine_dots(
    features: Tensor, upstream: Tensor, plans: Plans | Plan | Mapping[str, Any], *,
    by_sample: bool = False,
) -> Tensor:  # fmt: skip
    """<upstream, refine(features; plan_v)> for V plans, as `sokd.ops.refine_dots`: [V].

    With `by_sample` [2, V, B]: the products of each sample, and the squares of the refined maps.
    """
    plan = Plans.of(plans)
    wide = upstream.to(accumulator(features.dtype))
    refined = [_refined(features, seed=plan.seed, **parts) for parts in _each(plan)]
    if not by_sample:
        dots = [(wide * each).sum() for each in refined]
        return torch.stack(dots) if dots else wide.new_zeros(0)
    if not refined:
        return wide.new_zeros(2, 0, len(wide))
    pairs = [torch.stack([wide * each, each.square()]) for each in refined]
    return torch.stack([pair.sum((2, 3, 4)) for pair in pairs], dim=1)


def _each(plan: Plans) -> Iterator[dict[str, Any]]:
    parts = plan.parts()
    for index in range(next(iter(parts.values())).shape[0]):
        yield {name: part[index] for name, part in parts.items()}


# ---------------------------------------------------------------- areas


def areas(
    heat: Tensor, size: Tensor, offset: Tensor, *, k: int = 8, kernel: int = 3,
    teacher: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Areas:  # fmt: skip
    """The k best peaks of heat [B, A, H, W], their boxes and the cells they cover. No gradient.

    A cell of heat 0 is no peak.
    """
    wide = accumulator(heat.dtype)
    heat, size, offset = (part.detach().to(wide) for part in (heat, size, offset))
    if teacher is not None:
        heat_t, size_t, offset_t = (part.detach().to(wide) for part in teacher)
        heat, size, offset = _root(heat * heat_t), (size + size_t) / 2, (offset + offset_t) / 2
    flat, score, found = _best_peaks(heat, k, kernel)
    boxes = torch.where(
        found.unsqueeze(-1), _boxes(flat, size, offset), flat.new_tensor([0, 0, -1, -1])
    )
    return Areas(_covered(boxes, *heat.shape[2:]), boxes, torch.where(found, score, 0))


def _root(product: Tensor) -> Tensor:
    """The correctly rounded square root. MKL's is not correctly rounded, and would break ties."""
    wide = product.to(product.dtype if product.device.type == "mps" else torch.float64)
    root = wide.sqrt()
    # one Newton step, the square exact: root = high + low, each of half the bits
    split = root * (2**27 + 1)
    high = split - (split - root)
    low = root - high
    residual = wide - high * high - 2 * high * low - low * low
    return torch.where(root > 0, root + residual / (2 * root), root).to(product.dtype)


def _best_peaks(heat: Tensor, k: int, kernel: int) -> tuple[Tensor, Tensor, Tensor]:
    """Flat index, score, existence of the k best local maxima, [B, k]; ties to the lower index."""
    # a NaN is not equal to itself and max_pool2d spreads it to its neighbours: none is a peak
    most = torch.nn.functional.max_pool2d(heat, kernel, stride=1, padding=kernel // 2)
    peak = ((heat == most) & (heat > 0)).flatten(1)
    score, flat = torch.where(peak, heat.flatten(1), -math.inf).sort(
        dim=1, descending=True, stable=True
    )
    score, flat = score[:, :k], flat[:, :k]
    return flat, score, peak.gather(1, flat)


def _boxes(flat: Tensor, size: Tensor, offset: Tensor) -> Tensor:
    """Cells y0 x0 y1 x1 (inclusive) of the boxes around peaks `flat` [B, k]: [B, k, 4] int64."""
    height, width = size.shape[2:]
    cell = flat % (height * width)
    span, shift = (
        part.flatten(2).gather(2, cell.unsqueeze(1).expand(-1, 2, -1)) for part in (size, offset)
    )
    corners = []
    for sign in (-1, 1):
        x = (cell % width) + shift[:, 0] + sign * (span[:, 0] / 2)
        y = (cell // width) + shift[:, 1] + sign * (span[:, 1] / 2)
        corners += [y.clamp(0, height - 1), x.clamp(0, width - 1)]
    return torch.stack(corners, dim=-1).nan_to_num(0.0).long()  # truncates


def _covered(boxes: Tensor, height: int, width: int) -> Tensor:
    """How many of the boxes [B, k, 4] cover each cell: [B, H, W] float32."""
    y0, x0, y1, x1 = boxes[..., None, None].unbind(2)
    y = torch.arange(height, device=boxes.device).unsqueeze(1)
    x = torch.arange(width, device=boxes.device)
    return ((y >= y0) & (y <= y1) & (x >= x0) & (x <= x1)).sum(1).to(torch.float32)


# ---------------------------------------------------------------- masked_mse


def masked_mse(
    student: Tensor, teacher: Tensor, weight: Tensor | None = None, *, normalise: str = "elements"
) -> Tensor:
    """sum(weight * (student - teacher)**2) / (B*C*H*W), or / (C * sum(weight)) with "area"."""
    for name, value in (("teacher", teacher), ("weight", weight)):
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"masked_mse: {name} must not require grad, got a tensor that requires grad"
            )
    return mutual_mse(student, teacher, weight, normalise=normalise)


def mutual_mse(
    student: Tensor, teacher: Tensor, weight: Tensor | None, *, normalise: str, scale: float = 1.0
) -> Tensor:
    """`masked_mse` times `scale`, with the gradient of both features; the weight is a constant."""
    wide = accumulator(student.dtype)
    difference = student.to(wide) - teacher.to(wide)
    share = scale / max(difference.numel(), 1)
    if weight is None:
        return difference.square().sum() * share
    batch, channels, height, width = student.shape
    weight = weight.detach().to(wide).reshape(batch, 1, height, width)
    if normalise != "area":
        return (weight * difference.square()).sum() * share
    total = weight.sum() * channels
    empty = total == 0
    # an empty area has no difference, not even a NaN
    squares = torch.where(empty, 0, difference).square()
    return (weight * squares).sum() * torch.where(empty, 0, scale / total)
