"""The search that comes with the loss: in one of every few calls the policy takes a step of Adam.

    L_v         = 1/2 |T_v F - Phi|^2 / N     for the K + 2 alternatives v of a draw: exact values
    d alpha_j   = p_j (L_j - sum_i p_i L_i)   p = softmax(alpha); L_j: sub-policy j at its gates
    d beta_i    = L(b_i = 1) - L(b_i = 0)     both gates of the drawn sub-policy
    d magnitude = d L / d theta * d theta / d magnitude + d L / d sigma * d sigma / d magnitude

F are the teacher's features, Phi the adapted student's, N the elements of a sample. The gradients
are averaged over the samples and the ranks and summed over the layers. cutout and channel_drop,
whose effect is a step function of the magnitude, get the straight-through gradient, the sum of
(F_hat - Phi) / N. First order: Phi is a constant. Source: docs/method.md 2.6, settled here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sokd.kd.features import not_negative, positive
from sokd.kd.policy.plan import strength_gradient
from sokd.kd.policy.policy import Draw, Policy, WideModule, acting
from sokd.ops import Plan, refine_dots
from sokd.ops.distributed import agreed, averaged, is_sharded, place
from sokd.ops.refine import plan_gradients
from sokd.ops.runtime import is_captured, is_eager, warn_user
from sokd.reference import accumulator

__all__ = ["Layer", "OnlineSearch"]

# Samples of the batch that a step evaluates; their number determines the cost. With a step in each
# call two, eight and 64 end alike (docs/method.md 2.6).
SAMPLES = 8
# Calls from step to step. On small networks a step costs as much as the rest of the loss; a step in
# each call ends 0.01 to 0.03 lower (docs/method.md 2.6).
EVERY = 4
BETAS = (0.5, 0.999)  # Adam's, as those of PolicySearch
_TINY = 1e-8

_AFRESH = "SoKD: the state has no policy search, which starts afresh; the policy itself is loaded"
_ANOTHER_POLICY = (
    "SoKD: kd.policy must have as many sub-policies as the search was made for, {own}, got {got}"
)


class Layer(NamedTuple):
    """The maps [B, C, H, W] of one layer; dtypes differ only under autocast."""

    teacher: Tensor  # F
    refined: Tensor  # F_hat, by the draw of the loss
    student: Tensor  # Phi


class OnlineSearch(WideModule):
    """The state of `sokd.SoKD(..., search="online")`: Adam's moments for the policy.

        kd = sokd.SoKD(student_channels=64, teacher_channels=256, search="online")
        sokd.loss(f_s, f_t, kd).backward()             # has moved kd.policy, too
        kd.search.lr = 0.005                           # at any time, as kd.search.every

    Args:
        policy: the policy that `step` will be called with, or one with as many sub-policies.
        lr: of Adam(betas=(0.5, 0.999)), without weight decay.
        every: the policy moves in the first of as many calls of `step`.

    Buffers, in the state_dict: `moments` [2, 5K] of alpha, beta and magnitude; int64 [1]: `calls`,
    `steps` (the calls that moved the policy), `frozen`. A state without them starts the search
    afresh, with a warning.
    """

    moments: Tensor
    calls: Tensor
    steps: Tensor
    frozen: Tensor

    def __init__(self, policy: Policy, *, lr: float = 0.02, every: int = EVERY) -> None:
        super().__init__()
        self.lr, self.every = lr, every
        alpha = policy.alpha
        self.register_buffer("moments", alpha.new_zeros(2, 5 * len(alpha)).detach())
        for name in ("calls", "steps", "frozen"):
            self.register_buffer(name, torch.zeros(1, dtype=torch.int64, device=alpha.device))
        # of `frozen` and `calls`, whose values lie on the device
        self.active, self._counted = True, 0
        self._agreed = False  # whether the ranks have one state

    def freeze(self) -> None:
        """Make `step` a no-op from now on; saved with the state."""
        self.frozen.fill_(1)
        self.active = False

    @property
    def lr(self) -> float:
        """Adam's step size, 0 or more."""
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr = not_negative("OnlineSearch", "lr", value)

    @property
    def every(self) -> int:
        """The policy moves in the first of as many calls of `step`."""
        return self._every

    @every.setter
    def every(self, value: int) -> None:
        self._every = positive("OnlineSearch", "every", value)

    def agree(self, policy: Policy) -> None:
        """Under torch.distributed, in the first call: the first rank's policy and search for all.

        A state that one rank alone had loaded would part the policies, and an end of the search
        that one rank alone knew of would leave the others waiting. Compiled code is left out.
        """
        if not is_eager(self.calls) or is_captured(self.calls):
            return
        if self._agreed or place()[1] == 1:
            return
        if not is_sharded(policy.parameters()):
            for tensor in (*policy.parameters(), *self.buffers()):
                agreed(tensor.data)
        self._read()
        self._agreed = True

    @torch.no_grad()
    def step(self, policy: Policy, draw: Draw, layers: Sequence[Layer]) -> None:
        """Move the policy along the gradient of L_aug on the first `SAMPLES` of a batch.

        A call between two steps computes nothing; in compiled code and in a CUDA graph, where the
        number of calls is known on the device only, its result is discarded. Under
        torch.distributed one all-reduce averages the gradients. A gradient that is not finite, as
        that of an empty batch is, changes nothing: decided on the device.
        """
        chi = [policy.alpha, policy.beta, policy.magnitude]
        if not self.active or not all(parameter.requires_grad for parameter in chi):
            return
        if self.moments.shape[1] != sum(parameter.numel() for parameter in chi):
            own, got = self.moments.shape[1] // 5, len(policy.policies)
            raise ValueError(_ANOTHER_POLICY.format(own=own, got=got))
        due = self._due()
        if due is False:
            return
        with torch.autocast(self.steps.device.type, enabled=False):
            gradients = [gradient(policy, draw, layer, index) for index, layer in enumerate(layers)]
            change = self._adam(averaged(torch.stack(gradients).sum(0).to(self.moments.dtype)), due)
        parts = torch.split(change, [parameter.numel() for parameter in chi])
        for parameter, part in zip(chi, parts, strict=True):
            parameter.add_(part.view_as(parameter))
        policy.project()

    def _due(self) -> Tensor | bool:
        """Count a call, and whether it moves the policy: decided on the host where it can be.

        Reading `calls` on another device would wait for it; `_counted` is its copy on the host.
        """
        due = self.calls % self.every == 0
        self.calls.add_(1)
        if not is_eager(self.calls) or is_captured(self.calls):
            return due
        self._counted += 1
        on_cpu = self.calls.device.type == "cpu"
        return bool(due) if on_cpu else (self._counted - 1) % self.every == 0

    def _adam(self, found: Tensor, due: Tensor | bool) -> Tensor:
        """The change of chi [5K], and the new moments; zeros unless all of `found` is finite."""
        squares = found.square()
        finite = squares.isfinite().all() & due
        # numbers, not a tensor of them: a copy to the device cannot be captured in a graph
        pairs = zip(self.moments, (found, squares), BETAS, strict=True)
        moved = torch.stack([moment.lerp(new, 1 - beta) for moment, new, beta in pairs])
        self.moments.copy_(torch.where(finite, moved, self.moments))
        self.steps.add_(finite)
        steps = self.steps.to(found.dtype)
        mean, square = (
            moment / (1 - beta**steps) for moment, beta in zip(self.moments, BETAS, strict=True)
        )
        return torch.where(finite, -self.lr * mean / (square.sqrt() + _TINY), 0)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if not any(key.startswith(prefix) for key in state_dict):
            warn_user(_AFRESH)
            for buffer in self.buffers():
                buffer.zero_()
        else:
            super()._load_from_state_dict(state_dict, prefix, *rest)
        self._read()

    def _read(self) -> None:
        """The values of the buffers for the host."""
        self.active = self.frozen.is_meta or not self.frozen.item()
        self._counted = 0 if self.calls.is_meta else int(self.calls)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._agreed = False  # a copy may lie on one rank alone

    def extra_repr(self) -> str:
        return f"lr={self.lr:g}, every={self.every}, {SAMPLES} samples a step" + (
            "" if self.active else ", frozen"
        )


def gradient(policy: Policy, draw: Draw, layer: Layer, index: int = 0) -> Tensor:
    """d L_aug / d chi of one layer, [5K]: alpha, beta, magnitude.

        layer = Layer(teacher, policy(teacher, draw), adapted)
        gradient(policy, draw, layer).shape                      # [180] for 36 sub-policies

    Args:
        draw: that of `layer.refined`. The first `SAMPLES` of the batch are read.
        index: the layer's, see `Policy.plan`.
    """
    dtype = torch.promote_types(layer.teacher.dtype, layer.student.dtype)
    teacher, refined, student = (part.detach()[:SAMPLES].to(dtype) for part in layer)
    if teacher.numel() == 0:
        return torch.full_like(policy.alpha, torch.nan).repeat(5)
    # a smaller batch has the first rows of a draw, so the first samples have their own plans
    draw = Draw(draw.uniforms[:SAMPLES], draw.seed)
    choices = policy.choices(draw)
    fired = choices.fired()  # [G, 2]
    plans = policy.alternatives(choices, draw, teacher.shape, layer=index)
    products, squares = refine_dots(teacher, student, plans, by_sample=True)
    losses = squares / 2 - products  # [K + 2, B]: N * L_v, but for |Phi|^2 / 2, the same in all
    d_alpha, d_gates = _of_choices(policy, _of_groups(losses, fired), choices.chosen, fired)

    difference = refined - student
    rows = torch.arange(len(fired), device=fired.device)
    drawn_parts = {name: part[choices.chosen, rows] for name, part in plans.parts().items()}
    plan = Plan(**drawn_parts, seed=plans.seed)
    d_straight = difference.sum((1, 2, 3), dtype=accumulator(difference.dtype))
    d_strengths = strength_gradient(
        acting(policy.strengths()[choices.chosen], fired),
        *plan_gradients(teacher, difference, plan), _of_groups(d_straight[None], fired)[0],
        policy.spans, *teacher.shape[2:],
    )  # fmt: skip
    d_magnitudes = d_strengths.gather(1, policy.operations[choices.chosen]) * fired
    drawn = choices.chosen[:, None] == torch.arange(len(policy.policies), device=fired.device)
    of_pairs = [
        torch.where(drawn[:, :, None], of_group[:, None], 0).sum(0).flatten()
        for of_group in (d_gates, d_magnitudes)
    ]
    return torch.cat([d_alpha, *of_pairs]) / teacher.numel()


def _of_groups(values: Tensor, fired: Tensor) -> Tensor:
    """[V, B] summed over the samples of each group: [V, G]."""
    return values.reshape(len(values), len(fired), -1).sum(2)


def _of_choices(
    policy: Policy, losses: Tensor, chosen: Tensor, fired: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of alpha [K] and of the drawn gates [G, 2], from losses [K + 2, G]."""
    probability = policy.alpha.softmax(0).to(losses.dtype)
    each, flipped = losses[:-2], losses[-2:].T
    d_alpha = probability * (each.sum(1) - (probability[:, None] * each).sum())
    current = each.gather(0, chosen[None]).T
    return d_alpha, torch.where(fired, current - flipped, flipped - current)
