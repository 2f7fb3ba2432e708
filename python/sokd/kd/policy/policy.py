"""The policy: a learned augmentation of the teacher's features, drawn on the device.

    k ~ Categorical(softmax(alpha));  b_i ~ Bernoulli(beta[k, i])
    v_i = low + magnitude[k, i] * (high - low)
    refined = refine(features; plan(k, b, v))

Source: docs/method.md 2.1 - 2.4 [P: paper, A: authors' prototype, S: settled here]. All randomness
comes from two int64 buffers, `seed` and `counter`: a checkpoint resumes bit for bit, and PyTorch's
generators do not advance.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from sokd.kd.features import above_zero, one_of
from sokd.kd.policy.gumbel import with_choices
from sokd.kd.policy.plan import (
    OPERATIONS,
    PAIRS,
    Present,
    arguments,
    pair_of,
    ranges,
)
from sokd.ops import Plan, Plans, refine, torch_internals
from sokd.ops import draw as draw_uniforms
from sokd.ops.runtime import transformed
from sokd.reference import accumulator

__all__ = [
    "Choices",
    "Draw",
    "Policy",
    "Sample",
    "WideModule",
    "acting",
    "fresh_seed",
    "manual_seed",
]

_M = TypeVar("_M", bound="WideModule")

_OPTIONS = {
    "estimator": ("gumbel", "relax"),
    "magnitude_gradient": ("straight_through", "pathwise"),
    "granularity": ("batch", "sample"),
}

_DRAWN_AGAIN = (
    "Policy: draw must be called outside the backward pass, got a call inside; checkpoint the "
    "student alone, or kd.terms(..., draw=kd.policy.draw(batch)) with a draw made before"
)

_TRANSFORMED = (
    "Policy: draw must be called outside torch.func's transforms, which forbid it to count its "
    "draws, got a call inside; kd.terms(..., draw=kd.policy.draw(batch)) with a draw made before"
)

_source: torch.Generator | None = None


def manual_seed(seed: int) -> None:
    """Seed the generator that gives each `Policy` made afterwards its seed.

        sokd.manual_seed(0)
        kd = sokd.SoKD(64, 256)                   # the same draws in every run, and on every rank

    Without this call the seed comes from PyTorch's default generator, so `torch.manual_seed` alone
    makes runs reproducible too. Source: settled here.

    Args:
        seed: a whole number of 64 bits, signed or unsigned.
    """
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise TypeError(f"manual_seed: seed must be a whole number, got {seed!r}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"manual_seed: seed must fit in 64 bits, got {seed}")
    global _source
    _source = torch.Generator("cpu").manual_seed(int(seed))


def fresh_seed(generator: torch.Generator | None = None) -> Tensor:
    """A seed [1] int64 from `generator`, `manual_seed`'s generator or PyTorch's default one."""
    generator = generator if generator is not None else _source
    device = "cpu" if generator is None else generator.device
    return torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator, device=device).cpu()


class Choices(NamedTuple):
    """What a draw decides."""

    chosen: Tensor  # [G] int64
    gates: Tensor  # [G, K, 2] bool: the gates of each sub-policy, chosen or not

    def fired(self) -> Tensor:  # no property: the compiler of torch 2.5 traces none of a tuple
        """The gates of the chosen sub-policies, [G, 2]."""
        index = self.chosen[:, None, None].expand(-1, 1, 2)
        return self.gates.gather(1, index).squeeze(1)


class Draw(NamedTuple):
    """One draw of a policy, which fixes the plan. G is 1, or B with granularity="sample"."""

    uniforms: Tensor  # [G, 3K + 2] float32 in (0, 1): choice K, gates 2K, centre of the hole (y, x)
    seed: Tensor  # int64 [1]: of the noise, the shuffle and the dropped channels


class Sample(NamedTuple):
    """The choices of a draw as perturbed logits; `chosen` is the argmax, gates are where z > 0."""

    z_choice: Tensor  # [G, K]: log softmax(alpha) + Gumbel noise
    z_gates: Tensor  # [G, K, 2]: logit(beta) + logistic noise
    chosen: Tensor  # [G] int64
    gates: Tensor  # [G, K, 2] bool


class WideModule(nn.Module):
    """A module whose state is never half precision: 0.5 + 3e-4 rounds to 0.5 in bfloat16."""

    def _apply(self: _M, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _M:
        """As `nn.Module._apply`, with a tensor that would become half precision moved alone."""

        def kept(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            half = applied.dtype in (torch.float16, torch.bfloat16)
            return tensor.to(applied.device) if half else applied

        return cast(_M, super()._apply(kept, recurse))  # type: ignore[no-untyped-call]


class Policy(WideModule):
    """A learned augmentation of the teacher's features.

        policy = sokd.Policy(policies=[("rotate", "cutout"), ("translate_x", "noise")])
        refined = policy(torch.randn(8, 256, 7, 7))       # the next draw, for the whole batch
        print(policy.table())

    Args:
        policies: keyword-only, as all others: pairs of operations by name or index
            (`sokd.kd.policy.plan.OPERATIONS`); None: all 36.
        estimator: "gumbel" [P] or "relax" [A]: the search's gradient of the discrete choices.
        magnitude_gradient: "straight_through" [P] or "pathwise" [S]: exact through theta and sigma.
        granularity: "batch" [A]: one draw for the batch; "sample" [S]: one for each sample.
        temperature: of the relaxed choices.
        generator: source of the seed (see `manual_seed`).

    Parameters, trained by a search only (`search="online"` of `SoKD`, or `sokd.PolicySearch`):
    `alpha` [K] logits of the choice (initially 0), `beta` [K, 2] probability that an operation of
    the pair fires (initially 0.5; the search keeps it in [0.01, 0.99], where its logit is finite:
    settled here), `magnitude` [K, 2] (initially 0.5, kept in [0, 1]). They stay float32 (or
    float64) when the module is cast to half precision.
    Buffers: `seed` and `counter`, int64 [1]; `operations` [K, 2] int64, the sub-policies. Loading
    the state of a policy with other sub-policies raises RuntimeError. The other options are not
    part of the state: the parameters have the same meaning under all of them, so a policy learned
    with one granularity may be used with the other. A run resumes bit for bit only with the same
    options.
    """

    seed: Tensor
    counter: Tensor
    operations: Tensor
    _low_of_pairs: Tensor
    _span_of_pairs: Tensor
    _carrying: Tensor
    _spans: Tensor

    @torch.inference_mode(False)
    def __init__(
        self, *, policies: Sequence[Sequence[int | str]] | None = None,
        estimator: str = "gumbel", magnitude_gradient: str = "straight_through",
        granularity: str = "batch", temperature: float = 0.5,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.estimator, self.granularity = estimator, granularity
        self.magnitude_gradient = magnitude_gradient
        for name, choices in _OPTIONS.items():
            one_of("Policy", name, getattr(self, name), choices)
        self.temperature = above_zero("Policy", "temperature", temperature)
        if not (generator is None or isinstance(generator, torch.Generator)):
            got = type(generator).__name__
            raise TypeError(f"Policy: generator must be a torch.Generator or None, got {got}")
        if not (policies is None or isinstance(policies, Iterable)):
            rule = "be a list of pairs of operations"
            raise ValueError(f"Policy: policies must {rule}, got {policies!r}")
        self.policies = PAIRS if policies is None else tuple(pair_of(entry) for entry in policies)
        if not self.policies:
            raise ValueError("Policy: policies must hold at least one pair, got none")
        if len(set(self.policies)) < len(self.policies):
            got = _named(self.policies)
            raise ValueError(f"Policy: policies must hold each pair once, got {got}")
        self.present = Present.of(self.policies)
        count = len(self.policies)
        dtype = accumulator(torch.get_default_dtype())
        self.alpha = nn.Parameter(torch.zeros(count, dtype=dtype))
        self.beta = nn.Parameter(torch.full((count, 2), 0.5, dtype=dtype))
        self.magnitude = nn.Parameter(torch.full((count, 2), 0.5, dtype=dtype))
        self.register_buffer("seed", fresh_seed(generator).to(self.alpha.device))
        self.register_buffer("counter", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("operations", torch.tensor(self.policies))
        self._tabulate()

    def _tabulate(self) -> None:
        """Create the constants of the operations on the parameters' device."""
        pathwise = self.magnitude_gradient == "pathwise"
        tables = ranges(torch.tensor(self.policies), pathwise=pathwise)
        for name, table in tables._asdict().items():
            self.register_buffer(f"_{name}", table.to(self.alpha.device), persistent=False)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """As `nn.Module._load_from_state_dict`, but refuse a state of other sub-policies.

        The constants are created again, for a module that was on the meta device.
        """
        pairs = state_dict.get(f"{prefix}operations")
        if pairs is not None and pairs.tolist() != [list(pair) for pair in self.policies]:
            rule, got = f"those of the state, {_named(pairs.tolist())}", _named(self.policies)
            rest[-1].append(f"Policy: policies must be {rule}, got {got}")  # error_msgs
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._tabulate()

    def extra_repr(self) -> str:
        options = ", ".join(f"{name}={getattr(self, name)!r}" for name in _OPTIONS)
        return f"{len(self.policies)} sub-policies, {options}, temperature={self.temperature}"

    # ---------------------------------------------------------------------------------------- draws

    def draw(self, batch: int) -> Draw:
        """The next draw for `batch` samples; advances the counter in place, on the device.

            draw = kd.policy.draw(batch=8)
            kd.match(f_s, f_t, draw=draw)                  # the same plan in every call

        Raises:
            RuntimeError: inside a backward pass, where `torch.utils.checkpoint` computes a loss
                again: another draw would give gradients of another value. Inside transforms of
                torch.func.
        """
        if not torch.compiler.is_compiling() and torch_internals.running_backward() != -1:
            raise RuntimeError(_DRAWN_AGAIN)
        if transformed():
            raise RuntimeError(_TRANSFORMED)
        drawn = self.draw_at(self.seed, self.counter, batch)
        self.counter.add_(1)
        return drawn

    def draw_at(self, seed: Tensor, counter: Tensor, batch: int) -> Draw:
        """The draw of any seed and counter (int64 [1]); smaller batches get the first rows."""
        groups = batch if self.granularity == "sample" else 1
        width = 3 * len(self.policies) + 2
        uniforms, noise_seed = draw_uniforms(seed, counter, groups * width)
        return Draw(uniforms.reshape(groups, width), noise_seed)

    def choices(self, draw: Draw) -> Choices:
        """The choices of a draw: those of `sample`, without its logits.

        k = argmax log(u_k) / p_k, which is that of log p_k - log(-log u_k); b_i = [u_i > 1 - beta].
        """
        with torch.no_grad():
            choice, gates = self._uniforms(draw)
            chosen = (choice.log() / self.alpha.to(choice.dtype).softmax(0)).argmax(1)
            return Choices(chosen, gates > 1 - self.beta.to(gates.dtype))

    def sample(self, draw: Draw) -> Sample:
        """The choices of a draw, differentiable in alpha and beta through the perturbed logits."""
        choice, gates = self._uniforms(draw)
        alpha, beta = self.alpha.to(choice.dtype), self.beta.to(choice.dtype)
        z_choice = alpha.log_softmax(0) - (-choice.log()).log()
        z_gates = beta.logit() + gates.logit()
        return Sample(z_choice, z_gates, *self.choices(draw))

    def _uniforms(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """Those of the choice [G, K] and of the gates [G, K, 2]."""
        count = len(self.policies)
        uniforms = draw.uniforms.to(accumulator(self.alpha.dtype))
        return uniforms[:, :count], uniforms[:, count : 3 * count].reshape(-1, count, 2)

    # ---------------------------------------------------------------------------------------- plans

    def plan(
        self, draw: Draw, shape: Sequence[int], *, layer: int = 0, differentiable: bool = False
    ) -> Plan:
        """The arguments of `sokd.ops.refine` for features of `shape` [B, C, H, W].

            plan = policy.plan(policy.draw(8), (8, 256, 7, 7))
            plan.theta.shape                               # [1, 2, 3]

        Args:
            layer: index among several features that share a draw: each has its own noise, shuffle
                and drop.
            differentiable: whether the plan carries the magnitudes' gradient: pathwise in theta and
                sigma, otherwise in `straight`.
        """
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            choices = self.choices(draw)
            channels, seed = self._channel_uniforms(draw, shape, layer)
            value = acting(self.strengths()[choices.chosen], choices.fired())
            made = arguments(value, self.present, draw.uniforms[:, -2:], channels, *shape[2:])
            carried = self._straight(choices) if differentiable else None
            if self.magnitude_gradient == "straight_through":
                made = {name: None if x is None else x.detach() for name, x in made.items()}
        return Plan(**made, seed=seed, straight=carried)

    def _straight(self, choices: Choices) -> Tensor:
        """The sum of the fired magnitudes that get the straight-through gradient, [G]."""
        straight = ((self.magnitude * self._carrying)[choices.chosen] * choices.fired()).sum(-1)
        return straight.to(accumulator(straight.dtype))

    def _channel_uniforms(
        self, draw: Draw, shape: Sequence[int], layer: int
    ) -> tuple[Tensor, Tensor]:
        """Uniforms [2, G, C] for the shuffle and the drop, and the noise seed [1], of one layer."""
        groups, channels = draw.uniforms.shape[0], shape[1]
        wanted = 2 * groups * channels if self.present.perm or self.present.keep else 0
        uniforms, seed = draw_uniforms(draw.seed, torch.full_like(draw.seed, layer), wanted)
        # sample-major, so that a smaller batch gets the first rows of a larger
        return uniforms.reshape(-1 if wanted else 0, 2, channels).transpose(0, 1), seed

    @property
    def spans(self) -> Tensor:
        """The highest strength of each operation minus its lowest, [9], in hundredths."""
        return self._spans

    def strengths(self) -> Tensor:
        """Of each operation of the sub-policies at its magnitude, [K, 2, 9]: 0 elsewhere.

        Multiplied by the gates and summed over the pair, [..., 9], it is what `arguments` takes.
        """
        magnitude = self.magnitude.to(accumulator(self.magnitude.dtype)).unsqueeze(-1)
        return (self._low_of_pairs + magnitude * self._span_of_pairs) / 100

    def alternatives(
        self, choices: Choices, draw: Draw, shape: Sequence[int], *, layer: int = 0
    ) -> Plans:
        """K + 2 plans: each sub-policy at its gates, then the chosen one with a gate flipped.

        draw = policy.draw(8)
        plans = policy.alternatives(policy.choices(draw), draw, (8, 256, 7, 7))
        plans.theta.shape                              # [38, 1, 2, 3]
        """
        with torch.no_grad():
            every = self.strengths()
            own = every[choices.chosen]
            flipped = choices.fired() ^ torch.eye(2, dtype=torch.bool, device=own.device)[:, None]
            value = torch.cat(
                [acting(every.unsqueeze(1), choices.gates.transpose(0, 1)), acting(own, flipped)]
            )  # [K + 2, G, 9]
            channels, seed = self._channel_uniforms(draw, shape, layer)
            made = arguments(value, self.present, draw.uniforms[:, -2:], channels, *shape[2:])
            return Plans(**made, seed=seed)

    # --------------------------------------------------------------------------------------- passes

    def forward(
        self, features: Tensor, draw: Draw | None = None, *, layer: int = 0,
        differentiable: bool = False,
    ) -> Tensor:  # fmt: skip
        """Refine the teacher's features [B, C, H, W], which get no gradient; same shape and dtype.

        Args:
            draw: of `draw`; None: the next one.
            layer: see `plan`.
            differentiable: whether the result carries the gradients of alpha and beta (estimator
                "gumbel") and of the magnitudes, as the search needs; otherwise it has none.
        """
        features = features.detach()
        draw = self.draw(features.shape[0]) if draw is None else draw
        plan = self.plan(draw, features.shape, layer=layer, differentiable=differentiable)
        refined = refine(
            features, plan.theta, hole=plan.hole, sigma=plan.sigma, perm=plan.perm, keep=plan.keep,
            seed=plan.seed, straight=plan.straight,
        )  # fmt: skip
        if not differentiable or self.estimator != "gumbel":
            return refined
        sample = self.sample(draw)
        choice = (sample.z_choice / self.temperature).softmax(1)
        rows = torch.arange(len(sample.chosen), device=sample.chosen.device)
        gates = (sample.z_gates[rows, sample.chosen] / self.temperature).sigmoid()
        made = Choices(sample.chosen, sample.gates)
        flips = self.alternatives(made, draw, features.shape, layer=layer)
        return with_choices(refined, features, choice, gates, made.chosen, made.fired(), flips)

    # ----------------------------------------------------------------------------------- the search

    @torch.no_grad()
    def project(self) -> None:
        """Clamp beta to [0.01, 0.99] and the magnitudes to [0, 1]: called around search steps."""
        self.beta.clamp_(0.01, 0.99)
        self.magnitude.clamp_(0, 1)

    @torch.no_grad()
    def diagnostics(self) -> dict[str, Tensor]:
        """Scalars to log, on the device: entropy of the choice, mean beta, mean magnitude."""
        log_p = self.alpha.log_softmax(0)
        entropy = -(log_p.exp() * log_p).sum()
        return {"entropy": entropy, "beta": self.beta.mean(), "magnitude": self.magnitude.mean()}

    @torch.no_grad()
    def table(self) -> list[dict[str, Any]]:
        """One row for each sub-policy: names, probabilities, magnitudes and their values."""
        columns = (self.alpha.softmax(0), self.beta, self.magnitude)
        values = (column.double().cpu().tolist() for column in columns)
        table = []
        for pair, chance, beta, magnitude in zip(self.policies, *values, strict=True):
            operations = [OPERATIONS[op] for op in pair]
            strengths = (op.strength(m) for op, m in zip(operations, magnitude, strict=True))
            table.append({
                "operations": tuple(op.name for op in operations),
                "probability": chance,
                "beta": tuple(beta),
                "magnitude": tuple(magnitude),
                "value": tuple(strengths),
                "unit": tuple(op.unit for op in operations),
            })  # fmt: skip
        return table


def acting(strengths: Tensor, gates: Tensor) -> Tensor:
    """[..., 2, 9] and the pair's gates [..., 2]: what acts, [..., 9]."""
    return (strengths * gates.unsqueeze(-1)).sum(-2)


def _named(pairs: Sequence[Sequence[int]]) -> str:
    """Sub-policies as error messages show them: the first three."""
    names = [" + ".join(OPERATIONS[index].name for index in pair) for pair in pairs[:3]]
    return ", ".join(names) + (f", ... ({len(pairs)})" if len(pairs) > 3 else "")
