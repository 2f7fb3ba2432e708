"""SoKD as a module, its match of student and teacher, and the loss.

refined   = policy(F_t)                  constant in training, differentiable in the search
student   = adapter(F_s)
agreement = lambda_agreement * L_D(student, refined)
areas     = lambda_areas * masked_mse(student, refined, omega of the areas)
total     = agreement + areas, summed over the layers       [docs/method.md sections 3 and 4]
"""

from __future__ import annotations

import functools
import inspect
import numbers
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, cast, overload

import torch
from torch import Tensor, nn

from sokd.kd import sanity
from sokd.kd.adapter import Adapter, apply_adapter
from sokd.kd.dam import DAM, Attention, apply_dam
from sokd.kd.features import (
    Features,
    Size,
    checked_maps,
    layouts,
    not_negative,
    of_one_dtype,
    one_of,
    per_layer,
    total,
)  # fmt: skip
from sokd.kd.policy import Draw, Policy
from sokd.kd.virtual import unwrapped
from sokd.ops.masked_mse import scaled_mse
from sokd.ops.runtime import savable, transformed
from sokd.ops.torch_internals import has_forward, share_buffers

__all__ = ["Match", "SoKD", "Terms", "loss", "part_of"]

T = TypeVar("T")
PerLayer: TypeAlias = T | list[T] | None
Default = Literal["default"]
Terms = dict[str, Tensor]

# Columns of the buffer `statistics`, which has one row for each layer.
STATISTICS = ("agreement", "areas", "heat_variance", "covered_share")

# How the loss calls a part: positional arguments, keywords.
_CALLS = {"adapter": (["student"], []), "dam": (["student", "refined"], ["scale"])}


@overload
def loss(
    student_features: Features, teacher_features: Features, kd: nn.Module, *,
    return_terms: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def loss(
    student_features: Features, teacher_features: Features, kd: nn.Module, *,
    return_terms: Literal[True],
) -> Terms: ...  # fmt: skip
def loss(
    student_features: Features, teacher_features: Features, kd: nn.Module, *,
    return_terms: bool = False,
) -> Tensor | Terms:  # fmt: skip
    """lambda_D * L_D + lambda_DA * L_DA, to be added to the task's loss [docs/method.md section 4].

        kd = sokd.SoKD(student_channels=64, teacher_channels=256)
        f_s, f_t = torch.randn(8, 64, 7, 7, requires_grad=True), torch.randn(8, 256, 7, 7)
        sokd.loss(f_s, f_t, kd).backward()

    Args:
        student_features: [B, C_s, H_s, W_s], tokens [B, N, C_s], or a list, one for each layer of
            `kd`.
        teacher_features: [B, C, H, W], tokens [B, N, C], or an equally long list. It gets no
            gradient.
        kd: a `sokd.SoKD`, also wrapped by DistributedDataParallel or torch.compile.
        return_terms: return a dict of "agreement", "areas" and their sum "total" instead of the
            sum.

    Returns:
        A scalar, float32 (float64 for float64 features) under autocast too; 0 for an empty batch.

    Run the teacher in eval mode and under torch.no_grad(). A teacher with gradients is warned
    about; one in train mode under no_grad is not, because its features do not show it.

    The loss never synchronises with the device and compiles with `torch.compile(fullgraph=True)`.

    Raises:
        TypeError: not tensors, not floating point, or dtypes mixed outside autocast.
        ValueError: rank, channels, batch, device or the number of layers do not fit.
    """
    if not isinstance(kd, nn.Module) or not (torch.compiler.is_compiling() or _holds_sokd(kd)):
        raise TypeError(f"loss: kd must be a sokd.SoKD, got {named_kd(kd)}")
    result: Tensor | Terms = kd(student_features, teacher_features, return_terms=return_terms)
    return result


def named_kd(kd: object) -> str:
    """The type of what is not a SoKD, as an error names it."""
    name = type(kd).__name__
    if name != "SoKD":
        return name
    return "a SoKD of another import of sokd (make kd again after the reload)"


def _holds_sokd(kd: nn.Module) -> bool:
    return any(isinstance(module, SoKD) for module in kd.modules())


class Match(NamedTuple):
    """Student and teacher in one layer, ready to be compared."""

    student: Tensor  # the adapted map [B, C, H, W]; with adapt=False the map as given
    refined: Tensor  # the refined teacher [B, C, H, W]; with refine=False the clean one
    attention: Attention | None  # areas and agreement; None without a DAM or with attend=False


class SoKD(nn.Module):
    """Student-Oriented Knowledge Distillation for one or more pairs of layers.

        kd = sokd.SoKD(student_channels=64, teacher_channels=256)
        optimizer = torch.optim.SGD([*student.parameters(), *kd.parameters()], lr=0.05)
        loss = F.cross_entropy(logits, y) + kd(f_s, f_t)          # or sokd.loss(f_s, f_t, kd)

    `parameters()`, of this module and of any module that holds it, are those the student's
    optimiser trains: adapter and DAM. The policy is trained by `PolicySearch` alone:
    `kd.policy.parameters()`; `state_dict()`, `buffers()`, `.to()` and `.train()` include it. Draws
    continue in `eval()`: a validation loss is refined as the training loss is (`kd.policy = None`
    for one that is not). Several ranks: wrap kd in DistributedDataParallel, or put it into the
    module that is wrapped; otherwise adapters and DAMs diverge between ranks. All ranks draw alike
    if `sokd.manual_seed` was called with the same seed on all of them before kd was made.
    `kd.adapter`, `kd.policy` and `kd.dam` can be replaced or set to None: no adapter (shapes must
    be equal already), no refinement, no mask (the plain mean squared error). With several layers
    `kd.adapter` and `kd.dam` are ModuleLists, or one module that the layers share.

    Args:
        student_channels, teacher_channels: channels of the features, one number or equally long
            lists. Below, a list has one entry for each layer, any other value serves all layers.
        student_size, teacher_size: (height, width) or one number, for a strided or transposed
            convolution in the `Adapter`; None: maps of unequal size are resized.
        student_tokens, teacher_tokens: prefix tokens to drop from token features; None: see
            `sokd.kd.features.tokens_to_map`.
        student_grid, teacher_grid: (H, W) of token features; None: square.
        lambda_agreement, lambda_areas: lambda_D and lambda_DA, the terms' weights, to be tuned;
            they may be set at any time (a compiled loss is compiled again). The default is settled
            here. The prototype uses 1000 and 1000 on CIFAR-100 [A], which diverge on features of
            unit variance with SGD at lr 0.05.
        normalise: "elements" [A] or "area", see `sokd.ops.masked_mse`.
        heat_channels, heads, areas, overlap, k, kernel: of `DAM`.
        policies, estimator, magnitude_gradient, granularity: of `Policy`.
        adapter, policy, dam: "default", None, or a module in its place. An adapter other than
            `Adapter` is called with the student's map alone; a DAM as `dam(student, refined,
            scale=lambda_agreement)` and returns an `Attention`; a policy is a `sokd.Policy`.
        generator: source of the seed of the policy's draws; None: see `sokd.manual_seed`.

    Raises:
        TypeError, ValueError: `SoKD: {argument} must {rule}, got {value}`.
    """

    statistics: Tensor

    @torch.inference_mode(False)
    def __init__(
        self, student_channels: int | Sequence[int], teacher_channels: int | Sequence[int], *,
        student_size: PerLayer[int | Size] = None, teacher_size: PerLayer[int | Size] = None,
        student_tokens: PerLayer[int] = None, teacher_tokens: PerLayer[int] = None,
        student_grid: PerLayer[Size] = None, teacher_grid: PerLayer[Size] = None,
        lambda_agreement: float = 10.0, lambda_areas: float = 10.0, normalise: str = "elements",
        heat_channels: int = 100, heads: str = "bounded", areas: str = "mutual",
        overlap: str = "sum", k: int = 8, kernel: int = 3,
        policies: Sequence[Sequence[int | str]] | None = None,
        estimator: str = "gumbel", magnitude_gradient: str = "straight_through",
        granularity: str = "batch", adapter: nn.Module | Default | None = "default",
        policy: Policy | Default | None = "default", dam: nn.Module | Default | None = "default",
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        one_of("SoKD", "normalise", normalise, ("elements", "area"))
        self.student_channels, self.teacher_channels = _channels(student_channels, teacher_channels)
        count = len(self.student_channels)
        self._layouts = list(zip(
            layouts("student", count, student_tokens, student_grid),
            layouts("teacher", count, teacher_tokens, teacher_grid), strict=True,
        ))  # fmt: skip
        self.lambda_agreement = not_negative("SoKD", "lambda_agreement", lambda_agreement)
        self.lambda_areas = not_negative("SoKD", "lambda_areas", lambda_areas)
        self.normalise = normalise
        if adapter == "default":
            rows = zip(
                self.student_channels, self.teacher_channels,
                per_layer("student_size", student_size, count),
                per_layer("teacher_size", teacher_size, count), strict=True,
            )  # fmt: skip
            adapter = _one_or_list(
                Adapter(of_student, of_teacher, student_size=from_size, teacher_size=to_size)
                for of_student, of_teacher, from_size, to_size in rows
            )
        if dam == "default":
            make = functools.partial(
                DAM, heat_channels=heat_channels, heads=heads, areas=areas, overlap=overlap, k=k,
                kernel=kernel,
            )  # fmt: skip
            dam = _one_or_list(map(make, self.teacher_channels))
        if policy == "default":
            policy = Policy(
                policies=policies, estimator=estimator, magnitude_gradient=magnitude_gradient,
                granularity=granularity, generator=generator,
            )  # fmt: skip
        self.adapter = _part_or_none("adapter", adapter, count)
        self.policy = _policy_or_none(policy)
        self.dam = _part_or_none("dam", dam, count)
        # A buffer, so that compiled steps fill it too; not in the state_dict: each step overwrites
        # it.
        statistics = torch.zeros(count, len(STATISTICS), dtype=torch.float32)
        self.register_buffer("statistics", statistics, persistent=False)

    # ------------------------------------------------------------------------------------ the match

    def match(
        self, student_features: Features, teacher_features: Features, *, draw: Draw | None = None,
        adapt: bool = True, refine: bool = True, attend: bool = True, differentiable: bool = False,
        valid: Sequence[Tensor | None] | None = None,
    ) -> list[Match]:  # fmt: skip
        """Adapt the student's maps, refine the teacher's, find the areas: a `Match` each layer.

            (match,) = kd.match(f_s, f_t)
            difference = match.student - match.refined            # [B, C, H, W]
            weight = match.attention.weight                       # omega [B, H, W]

        `sokd.loss`, `sokd.wrap`, `sokd.Distiller`, `sokd.PolicySearch` and `sokd.inspect` are made
        of this. It records no statistics and warns about nothing.

        Args:
            student_features, teacher_features: as `sokd.loss` takes them.
            draw: the result of `self.policy.draw(batch)`, to evaluate twice alike; None: the next
                draw. All layers share one draw: the same sub-policy, gates and magnitudes.
            adapt: False: `student` is the map as given. A DAM compares maps of one shape and reads
                an adapted copy.
            refine: False: no draw is taken and `refined` is the clean teacher.
            attend: False: the DAM does not run and `attention` is None.
            differentiable: whether `refined` carries the policy's gradient.
            valid: for each layer [B, 1, H, W] at the teacher's size, 0 for cells of padding: there
                the adapted and the refined map are 0, and so are their agreement's terms.

        Raises:
            TypeError, ValueError: as `sokd.loss`.
        """
        channels = list(zip(self.student_channels, self.teacher_channels, strict=True))
        adapters = [part_of(self.adapter, index) for index in range(len(channels))]
        dams = [part_of(self.dam, index) if attend else None for index in range(len(channels))]
        compared = adapt or (attend and self.dam is not None)
        first = [
            _first_parameter(*parts) if compared else None
            for parts in zip(adapters, dams, strict=True)
        ]
        maps = checked_maps(student_features, teacher_features, channels, self._layouts, first)
        policy = self.policy if refine else None
        if policy is not None and draw is None:
            draw = policy.draw(maps[0][1].shape[0])
        matches = []
        for index, (student, refined) in enumerate(maps):
            adapted = student
            if compared:
                adapted = apply_adapter(adapters[index], student, refined)
            if policy is None or differentiable:  # otherwise the refined features are new tensors
                refined = savable(refined)
            if policy is not None:
                with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
                    refined = policy(refined, draw, layer=index, differentiable=differentiable)
            if compared:
                adapted, refined = of_one_dtype(adapted, refined)
            cells = None if valid is None else valid[index]
            if cells is not None:
                refined = refined * cells.to(refined.dtype)
                adapted = adapted * cells.to(adapted.dtype) if compared else adapted
            attention = apply_dam(dams[index], adapted, refined, self.lambda_agreement)
            matches.append(Match(adapted if adapt else student, refined, attention))
        return matches

    # ------------------------------------------------------------------------------------ the terms

    def forward(
        self, student_features: Features, teacher_features: Features, *, return_terms: bool = False
    ) -> Tensor | Terms:
        """`sokd.loss(student_features, teacher_features, self, return_terms=return_terms)`."""
        terms = self.terms(student_features, teacher_features)
        return terms if return_terms else terms["total"]

    def terms(
        self, student_features: Features, teacher_features: Features, *,
        draw: Draw | None = None, differentiable: bool = False,
    ) -> Terms:  # fmt: skip
        """The loss's "agreement", "areas" and "total", scalars, weighted as they enter the total.

            draw = kd.policy.draw(batch=8)
            kd.terms(f_s, f_t, draw=draw)["areas"]                # the same value in every call

        Args:
            student_features, teacher_features: as `sokd.loss` takes them.
            draw: see `match`.
            differentiable: whether the policy gets a gradient (from "areas" alone: in the agreement
                the teacher's features are constants). Such a call leaves no statistics.
        """
        matches = self.match(
            student_features, teacher_features, draw=draw, differentiable=differentiable
        )
        areas = self.distances(matches, differentiable=differentiable)
        if not differentiable:
            self.record(matches, areas)
            sanity.look(self, student_features, teacher_features)
        agreement = [match.attention.agreement for match in matches if match.attention is not None]
        terms = {
            "agreement": total(agreement or [torch.zeros_like(areas[0])]),
            "areas": total(areas),
        }
        return {**terms, "total": terms["agreement"] + terms["areas"]}

    def consistency(
        self, student_features: Features, teacher_features: Features, *,
        draw: Draw | None = None, differentiable: bool = True,
    ) -> Tensor:  # fmt: skip
        """L_aug = 1/2 mean (F_hat_t - Phi(F_s))^2, summed over the layers: the search's L_up [P].

            kd.consistency(f_s, f_t).backward()                   # gradients of kd.policy too

        Arguments as those of `terms`. No mask: L_aug is about the features alone.
        """
        matches = self.match(
            student_features, teacher_features,
            draw=draw, attend=False, differentiable=differentiable,
        )  # fmt: skip
        return total([self._distance(match, 0.5, differentiable) for match in matches])

    def distances(self, matches: Sequence[Match], *, differentiable: bool = False) -> list[Tensor]:
        """lambda_DA * L_DA of each layer: the masked squared distance of student and refined.

            sum(kd.distances(kd.match(f_s, f_t)))                 # the "areas" of kd.terms

        `differentiable` as in the call of `match`.
        """
        return [self._distance(match, self.lambda_areas, differentiable) for match in matches]

    def _distance(self, match: Match, scale: float, mutual: bool) -> Tensor:
        weight = None if match.attention is None else match.attention.weight
        return scaled_mse(
            match.student, match.refined, weight,
            normalise=self.normalise, scale=scale, mutual=mutual,
        )  # fmt: skip

    # ---------------------------------------------------------------------------------- the figures

    @torch.no_grad()
    def record(self, matches: Sequence[Match], areas: Sequence[Tensor]) -> None:
        """Store the statistics of one step for `diagnostics()`; no-op inside torch.func.

            matches = kd.match(f_s, f_t)
            kd.record(matches, kd.distances(matches))

        Args:
            matches: what `match` returned for the step.
            areas: the features' term of each layer, or one entry for all layers together.
        """
        if transformed():
            return
        nothing = self.statistics.new_zeros(())
        values = []
        for index, (_, _, attention) in enumerate(matches):
            agreement = nothing if attention is None else attention.agreement
            term = areas[index] if index < len(areas) else nothing
            values += [agreement, term, *_variance_and_share(attention, nothing)]
        values = [value.detach().to(self.statistics.dtype) for value in values]
        self.statistics.copy_(torch.stack(values).view_as(self.statistics))

    def diagnostics(self) -> dict[str, Tensor]:
        """Statistics of the last loss (docs/method.md section 6): scalars, copies, on the device.

            for name, value in kd.diagnostics().items():
                writer.add_scalar(name, value, step)

        "agreement", "areas": the two terms.
        "heat_variance": of the student's heat maps over samples and cells, the mean over maps; at 0
        the heads are constant. "covered_share": share of the cells under at least one area.
        "entropy", "beta", "magnitude": the policy's.
        With several layers the terms are sums, variance and share are means, and "heat_variance.0",
        "covered_share.0", ... are those of each layer. A part that is None has no entries.
        """
        columns = dict(zip(STATISTICS, self.statistics.clone().unbind(1), strict=True))
        found = {"areas": columns["areas"].sum()}
        if self.dam is not None:
            found["agreement"] = columns["agreement"].sum()
            for name in ("heat_variance", "covered_share"):
                found[name] = columns[name].mean()
                if len(self.student_channels) > 1:
                    layers = enumerate(columns[name].unbind())
                    found |= {f"{name}.{index}": value for index, value in layers}
        return found if self.policy is None else found | self.policy.diagnostics()

    # ---------------------------------------------------------------------------------- as a module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SoKD:
        """As `nn.Module._apply`, but the statistics are not cast to half precision."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.statistics.dtype in (torch.float16, torch.bfloat16):
            self.statistics = self.statistics.to(torch.float32)
        return self

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As `nn.Module.named_modules`, with the policy's buffers in place of the policy.

        Every list of parameters comes from here: `parameters()` of this module and of any that
        holds it, and that of DistributedDataParallel, which would wait for gradients that the
        policy never gets.
        """
        memo = set() if memo is None else memo
        hidden = set() if self.policy is None else {self.policy} - memo
        memo |= hidden  # treated as listed already
        yield from super().named_modules(memo, prefix, remove_duplicate)
        memo -= hidden
        for policy in hidden:
            yield f"{prefix}.policy" if prefix else "policy", _BuffersOf(policy)

    def extra_repr(self) -> str:
        return f"lambda_agreement={self.lambda_agreement:g}, lambda_areas={self.lambda_areas:g}"


def _first_parameter(adapter: nn.Module | None, dam: nn.Module | None) -> Tensor | None:
    """The weight of the first convolution that the student's map enters, where it is known."""
    adapter, dam = unwrapped(adapter), unwrapped(dam)
    if isinstance(adapter, Adapter):
        return adapter.match.weight
    return dam.first.weight if isinstance(dam, DAM) else None


class _BuffersOf(nn.Module):
    """A module's buffers without its parameters: DistributedDataParallel broadcasts the draws."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        share_buffers(self, module)


def part_of(part: nn.Module | None, index: int) -> nn.Module | None:
    """The adapter or DAM of layer `index`: an entry of a ModuleList, or the shared module."""
    return part[index] if isinstance(part, nn.ModuleList) else part


def _variance_and_share(attention: Attention | None, nothing: Tensor) -> list[Tensor]:
    """The last two of `STATISTICS`; 0 without a DAM or a batch."""
    if attention is None or attention.heat.numel() == 0:
        return [nothing, nothing]
    # `var` is ten times slower on the CPU than these two passes
    heat = attention.heat.to(torch.float32)
    variance = (heat - heat.mean((0, 2, 3), keepdim=True)).square_().mean()
    return [variance, (attention.coverage > 0).to(torch.float32).mean()]


# ------------------------------------------------------------------------------- SoKD's own options


def _channels(
    student: int | Sequence[int], teacher: int | Sequence[int]
) -> tuple[list[int], list[int]]:
    students = _channel_list("student_channels", student)
    teachers = _channel_list("teacher_channels", teacher)
    if len(students) != len(teachers):
        rule = f"be as many as student_channels ({len(students)})"
        raise ValueError(f"SoKD: teacher_channels must {rule}, got {len(teachers)}")
    return students, teachers


def _channel_list(name: str, channels: int | Sequence[int]) -> list[int]:
    given = list(channels) if isinstance(channels, Sequence) else [channels]
    if not given or not all(isinstance(count, numbers.Integral) and count > 0 for count in given):
        rule = "be a positive number or a list of them"
        raise ValueError(f"SoKD: {name} must {rule}, got {channels!r}")
    return [int(count) for count in given]


def _one_or_list(parts: Iterable[nn.Module]) -> nn.Module:
    modules = list(parts)
    return modules[0] if len(modules) == 1 else nn.ModuleList(modules)


def _policy_or_none(given: Any) -> Policy | None:
    """A policy, compiled or not."""
    if given is None or isinstance(unwrapped(given), Policy):
        return cast("Policy | None", given)
    raise TypeError(f"SoKD: policy must be 'default', None or a sokd.Policy, got {_named(given)}")


def _part_or_none(name: str, given: Any, layers: int) -> nn.Module | None:
    """An adapter or a DAM, or a list of them, that can be called as the loss calls it."""
    modules = [given]
    if isinstance(given, nn.ModuleList):
        modules = per_layer(name, list(given), layers)
    for module in [] if given is None else modules:
        if not isinstance(module, nn.Module):
            rule = "be 'default', None or an nn.Module"
            raise TypeError(f"SoKD: {name} must {rule}, got {_named(module)}")
        places, keywords = _CALLS[name]
        if not _takes(module, places, keywords):
            call = ", ".join([*places, *(f"{keyword}=..." for keyword in keywords)])
            raise TypeError(f"SoKD: {name} must take ({call}), got {_named(module)}")
    return cast("nn.Module | None", given)


def _named(given: Any) -> str:
    return repr(given) if isinstance(given, str) else type(given).__name__


def _takes(module: nn.Module, places: Sequence[str], keywords: Sequence[str]) -> bool:
    """Whether the module's signature allows such a call, or cannot be read."""
    if not has_forward(module):
        return False
    try:
        inspect.signature(module.forward).bind(*places, **dict.fromkeys(keywords))
    except TypeError:
        return False
    except ValueError:
        return True
    return True
