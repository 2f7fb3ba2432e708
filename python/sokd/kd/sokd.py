"""SoKD as a module: adapter, policy and DAM, and the terms they make of student and teacher features.

refined   = policy(F_t)                             a constant in training, differentiable in the search
student   = adapter(F_s)
agreement = lambda_agreement * L_D(student, refined)
areas     = lambda_areas * masked_mse(student, refined, omega of the areas)
total     = agreement + areas, summed over the layers                       [docs/method.md sections 3 and 4]
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from sokd.kd import sanity
from sokd.kd.adapter import Adapter, Size, tokens_to_map
from sokd.kd.arguments import (
    channel_pairs,
    layouts,
    one_or_list,
    part_or_none,
    policy_or_none,
    sizes,
    term_weight,
)
from sokd.kd.dam import DAM, Attention
from sokd.kd.loss import Features, Terms, checked_pairs, mixed_dtypes_allowed
from sokd.kd.policy import Draw, Policy
from sokd.ops.masked_mse import _masked_mse

__all__ = ["SoKD"]

T = TypeVar("T")
PerLayer: TypeAlias = T | list[T] | None
Default = Literal["default"]
Maps = list[tuple[Tensor, Tensor]]

# What a step leaves in the buffer `statistics`, one row for each layer.
STATISTICS = ("agreement", "areas", "heat_variance", "covered_share")


class SoKD(nn.Module):
    """Student-Oriented Knowledge Distillation for one pair of layers, or several that share one policy.

    `kd(student_features, teacher_features)` is `sokd.loss(student_features, teacher_features, kd)`.

    `parameters()`, of this module and of any module that holds it, are those the student's optimiser
    trains: adapter and DAM. The policy is trained by `PolicySearch` alone: `kd.policy.parameters()`;
    `state_dict()`, `buffers()`, `.to()` and `.train()` include it. The draws go on in `eval()` too: a loss of
    validation refines as training does (`kd.policy = None` for one that does not).
    Several ranks: wrap kd by DistributedDataParallel, or put it into the module that is wrapped; outside of
    it the ranks' adapters and DAMs part. They draw alike where `sokd.manual_seed` was called with the same
    seed on all of them before kd was made.
    `kd.adapter`, `kd.policy` and `kd.dam` can be replaced or set to None: no adapter (the shapes are equal
    already), no refinement, no mask (the plain mean squared error). With several layers `kd.adapter` and
    `kd.dam` are ModuleLists, or one module that the layers share.

    Args:
        student_channels, teacher_channels: of the features, one number or equally long lists of them.
            Below, a list has one entry for each layer, anything else serves all layers.
        student_size, teacher_size: (height, width) or one number, for a strided or transposed convolution
            in the `Adapter`; None: maps of unequal size are resized.
        student_tokens, teacher_tokens: prefix tokens to drop from token features; None: see `tokens_to_map`.
        student_grid, teacher_grid: (H, W) of token features; None: square.
        lambda_agreement, lambda_areas: lambda_D and lambda_DA, the terms' weights, to be tuned; they may be
            set at any time (a compiled loss compiles again). The default is settled here. The prototype uses
            1000 and 1000 on CIFAR-100 [A], which diverge on features of unit variance with SGD at lr 0.05.
        normalise: "elements" [A] or "area", see `sokd.ops.masked_mse`.
        heat_channels, heads, areas, overlap, k, kernel: of `DAM`.
        policies, estimator, magnitude_gradient, granularity: of `Policy`.
        adapter, policy, dam: "default", None, or a module in its place. An adapter other than `Adapter` is
            called with the student's map alone; a DAM as `dam(student, refined, scale=lambda_agreement)`,
            for an `Attention`; a policy is a `sokd.Policy`.
        generator: where the policy takes the seed of its draws; None: see `sokd.manual_seed`.

    Raises:
        TypeError, ValueError: `SoKD: {argument} must {rule}, got {value}`.
    """

    statistics: Tensor

    def __init__(
        self, student_channels: int | Sequence[int], teacher_channels: int | Sequence[int], *,
        student_size: PerLayer[int | Size] = None, teacher_size: PerLayer[int | Size] = None,
        student_tokens: PerLayer[int] = None, teacher_tokens: PerLayer[int] = None,
        student_grid: PerLayer[Size] = None, teacher_grid: PerLayer[Size] = None,
        lambda_agreement: float = 10.0, lambda_areas: float = 10.0, normalise: str = "elements",
        heat_channels: int = 100, heads: str = "bounded", areas: str = "mutual", overlap: str = "sum",
        k: int = 8, kernel: int = 3, policies: Sequence[Sequence[int | str]] | None = None,
        estimator: str = "gumbel", magnitude_gradient: str = "straight_through", granularity: str = "batch",
        adapter: nn.Module | Default | None = "default", policy: Policy | Default | None = "default",
        dam: nn.Module | Default | None = "default", generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if normalise not in ("elements", "area"):
            raise ValueError(f"SoKD: normalise must be 'elements' or 'area', got {normalise!r}")
        channels = channel_pairs(student_channels, teacher_channels)
        self.student_channels, self.teacher_channels = map(list, zip(*channels, strict=True))
        self._student_layout = layouts("student", student_tokens, student_grid, len(channels))
        self._teacher_layout = layouts("teacher", teacher_tokens, teacher_grid, len(channels))
        self.lambda_agreement = term_weight("lambda_agreement", lambda_agreement)
        self.lambda_areas, self.normalise = term_weight("lambda_areas", lambda_areas), normalise
        if adapter == "default":
            of_layers = zip(channels, sizes(student_size, teacher_size, len(channels)), strict=True)
            adapter = one_or_list(Adapter(*of, **size) for of, size in of_layers)
        if dam == "default":
            heads_of = functools.partial(DAM, heat_channels=heat_channels, heads=heads, areas=areas)
            dam = one_or_list(
                heads_of(teacher, overlap=overlap, k=k, kernel=kernel) for _, teacher in channels
            )
        if policy == "default":
            policy = Policy(
                policies=policies, estimator=estimator, magnitude_gradient=magnitude_gradient,
                granularity=granularity, generator=generator,
            )  # fmt: skip
        self.adapter = part_or_none("adapter", adapter, len(channels))
        self.policy = policy_or_none(policy)
        self.dam = part_or_none("dam", dam, len(channels))
        # A buffer, so that compiled steps fill it too; not in the state_dict: the next step overwrites it.
        statistics = torch.zeros(len(channels), len(STATISTICS), dtype=torch.float32)
        self.register_buffer("statistics", statistics, persistent=False)

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

        Args:
            student_features, teacher_features: as `sokd.loss` takes them.
            draw: what `self.policy.draw(batch)` gave, to evaluate twice alike; None: the next draw.
            differentiable: whether the policy gets a gradient (from "areas" alone: in the agreement the
                teacher's features are constants). Such a call leaves no statistics.
        """
        pairs = self._pairs(student_features, teacher_features)
        draw = self._draw(pairs, draw)
        agreement, areas, rows = [], [], []
        for index, pair in enumerate(pairs):
            student, refined = self._meet(index, *pair, draw, differentiable)
            attention = self._attention(index, student, refined)
            weight = None if attention is None else attention.weight
            seen = [] if differentiable else _spread_and_share(attention, self.statistics)
            areas.append(
                self._distance(student, refined, weight, self.lambda_areas, differentiable)
            )
            agreement.append(
                torch.zeros_like(areas[-1]) if attention is None else attention.agreement
            )
            rows.append([agreement[-1], areas[-1], *seen])
        if not differentiable:
            self._record(rows)
            sanity.look(self, student_features, teacher_features)
        terms = {"agreement": _sum(agreement), "areas": _sum(areas)}
        return {**terms, "total": terms["agreement"] + terms["areas"]}

    def consistency(
        self, student_features: Features, teacher_features: Features, *,
        draw: Draw | None = None, differentiable: bool = True,
    ) -> Tensor:  # fmt: skip
        """L_aug = 1/2 mean (F_hat_t - Phi(F_s))^2, summed over the layers: the search's upper level [P].

        Arguments as those of `terms`. Without the mask: it is about the features alone.
        """
        pairs = self._pairs(student_features, teacher_features)
        draw = self._draw(pairs, draw)
        met = [self._meet(index, *pair, draw, differentiable) for index, pair in enumerate(pairs)]
        return _sum([self._distance(*pair, None, 0.5, differentiable) for pair in met])

    def diagnostics(self) -> dict[str, Tensor]:
        """What to watch (docs/method.md section 6), of the last loss: scalars, copied; nothing is waited for.

        "agreement", "areas": the two terms.
        "heat_variance": of the student's heat maps over samples and cells, the mean over maps; at 0 the heads
        are constant. "covered_share": of the cells, under at least one area.
        "entropy", "beta", "magnitude": the policy's.
        With several layers the terms are sums, variance and share are means, and "heat_variance.0",
        "covered_share.0", ... are each layer's own. What is None has no entries.
        """
        columns = dict(zip(STATISTICS, self.statistics.clone().unbind(1), strict=True))
        found = {"areas": columns["areas"].sum()}
        if self.dam is not None:
            found["agreement"] = columns["agreement"].sum()
            for name in ("heat_variance", "covered_share"):
                found[name] = columns[name].mean()
                if len(self.student_channels) > 1:
                    found |= {
                        f"{name}.{index}": value
                        for index, value in enumerate(columns[name].unbind())
                    }
        return found if self.policy is None else found | self.policy.diagnostics()

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

        Every list of parameters comes from here: `parameters()` of this module and of any that holds it, and
        DistributedDataParallel's, which would wait for gradients that the loss never gives the policy.
        """
        memo = set() if memo is None else memo
        hidden = set() if self.policy is None else {self.policy} - memo
        memo |= hidden  # taken for listed already
        yield from super().named_modules(memo, prefix, remove_duplicate)
        memo -= hidden
        for policy in hidden:
            yield f"{prefix}.policy" if prefix else "policy", _BuffersOf(policy)

    def extra_repr(self) -> str:
        return f"lambda_agreement={self.lambda_agreement:g}, lambda_areas={self.lambda_areas:g}"

    def _pairs(self, student_features: Features, teacher_features: Features) -> Maps:
        """The layers' checked features as maps, the teacher's without a graph."""
        pairs = checked_pairs(
            student_features, teacher_features, self.student_channels, self.teacher_channels
        )
        layouts = zip(self._student_layout, self._teacher_layout, strict=True)
        return [
            (tokens_to_map(student, **of_student), tokens_to_map(teacher.detach(), **of_teacher))
            for (student, teacher), (of_student, of_teacher) in zip(pairs, layouts, strict=True)
        ]

    def _draw(self, pairs: Maps, draw: Draw | None) -> Draw | None:
        """One draw for all layers: the same sub-policy, gates and magnitudes."""
        return (
            self.policy.draw(pairs[0][1].shape[0])
            if draw is None and self.policy is not None
            else draw
        )

    def _meet(
        self, index: int, student: Tensor, teacher: Tensor, draw: Draw | None, differentiable: bool
    ) -> tuple[Tensor, Tensor]:
        """The adapted student's and the refined teacher's maps, equal in shape and dtype."""
        self._check_first(index, student)
        student = self._adapted(index, student, teacher)
        if differentiable or self.policy is None:  # else the refined features are new ones
            teacher = _savable(teacher)
        if self.policy is not None:
            with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
                teacher = self.policy(teacher, draw, layer=index, differentiable=differentiable)
        if student.dtype != teacher.dtype:  # only under autocast: the wider of the two
            dtype = torch.promote_types(student.dtype, teacher.dtype)
            student, teacher = student.to(dtype), teacher.to(dtype)
        return student, teacher

    def _adapted(self, index: int, student: Tensor, teacher: Tensor) -> Tensor:
        adapter = _at(self.adapter, index)
        if isinstance(adapter, Adapter):
            _check_values(adapter, teacher)
            student = adapter(student, (teacher.shape[2], teacher.shape[3]))
        elif adapter is not None:
            student = adapter(student)
        if student.shape != teacher.shape:
            when = "(kd.adapter is None)" if adapter is None else "after kd.adapter"
            rule = f"have the teacher's shape {list(teacher.shape)} {when}"
            raise ValueError(f"loss: student_features must {rule}, got {list(student.shape)}")
        return student

    def _check_first(self, index: int, student: Tensor) -> None:
        """Say in our words what the first convolution would say of dtype and device in its own."""
        adapter, dam = _at(self.adapter, index), _at(self.dam, index)
        first = (
            adapter.match
            if isinstance(adapter, Adapter)
            else dam.first
            if isinstance(dam, DAM)
            else None
        )
        if first is None:
            return
        if student.device != first.weight.device:
            rule = f"be on the device of kd's parameters, {first.weight.device} (see kd.to)"
            raise ValueError(f"loss: student_features must {rule}, got {student.device}")
        if student.dtype == first.weight.dtype or mixed_dtypes_allowed(student):
            return
        rule = (
            f"have the dtype {first.weight.dtype} of kd's parameters (see kd.to and torch.autocast)"
        )
        raise TypeError(f"loss: student_features must {rule}, got {student.dtype}")

    def _attention(self, index: int, student: Tensor, refined: Tensor) -> Attention | None:
        dam = _at(self.dam, index)
        found = None if dam is None else dam(student, refined, scale=self.lambda_agreement)
        if found is None or isinstance(found, Attention):
            return found
        raise TypeError(f"loss: kd.dam must return an Attention, got {type(found).__name__}")

    def _distance(
        self,
        student: Tensor,
        refined: Tensor,
        weight: Tensor | None,
        scale: float,
        differentiable: bool,
    ) -> Tensor:
        options: dict[str, Any] = {
            "normalise": self.normalise,
            "scale": scale,
            "mutual": differentiable,
        }
        return _masked_mse(student, refined, weight, **options)

    @torch.no_grad()
    def _record(self, rows: list[list[Tensor]]) -> None:
        if not sanity.transformed():
            values = [value.detach().to(self.statistics.dtype) for row in rows for value in row]
            self.statistics.copy_(torch.stack(values).view_as(self.statistics))


class _BuffersOf(nn.Module):
    """A module's buffers without its parameters, so that DistributedDataParallel keeps the draws in step."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._buffers = module._buffers


@torch.no_grad()
def _spread_and_share(attention: Attention | None, like: Tensor) -> list[Tensor]:
    """The last two of `STATISTICS`; 0 without a DAM or a batch."""
    if attention is None or attention.heat.numel() == 0:
        return [like.new_zeros(())] * 2
    heat = attention.heat.to(
        torch.float32
    )  # `var` is ten times slower on the CPU than these two passes
    spread = (heat - heat.mean((0, 2, 3), keepdim=True)).square_().mean()
    return [spread, (attention.coverage > 0).to(torch.float32).mean()]


def _check_values(adapter: Adapter, teacher: Tensor) -> None:
    """Say in our words what a BatchNorm would say of one value a channel; SyncBatchNorm counts all ranks'."""
    one = teacher.shape[0] * teacher.shape[2] * teacher.shape[3] == 1
    if one and adapter.norm.training and isinstance(adapter.norm, nn.BatchNorm2d):
        rule = "give the BatchNorm of kd.adapter more than 1 value per channel in train mode"
        got = "got 1 sample of 1 cell (drop_last=True in the DataLoader, or larger batches)"
        raise ValueError(f"loss: student_features must {rule}, {got}")


def _savable(teacher: Tensor) -> Tensor:
    """What came out of torch.inference_mode() as a tensor that may be kept for a backward."""
    return (
        teacher if torch.compiler.is_compiling() or not teacher.is_inference() else teacher.clone()
    )


def _sum(terms: list[Tensor]) -> Tensor:
    return functools.reduce(operator.add, terms)


def _at(part: nn.Module | None, index: int) -> nn.Module | None:
    """The layer's own adapter or DAM, or the one that all layers share."""
    return part[index] if isinstance(part, nn.ModuleList) else part
