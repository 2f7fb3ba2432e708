"""SoKD as a module, its match of student and teacher, and the loss.

refined   = policy(F_t)                  constant in training, differentiable in the search
student   = adapter(F_s)
agreement = lambda_agreement * L_D       of student and refined, or of F_s and refined (attention)
areas     = lambda_areas * masked_mse(student, refined, omega of the areas)
base      = lambda_base * mse(student, F_t), with base="keep"
total     = agreement + areas + base, summed over the layers    [docs/method.md sections 3, 4, 7]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, overload

import torch
from torch import Tensor, nn

from sokd.kd import sanity
from sokd.kd.adapter import Adapter, apply_adapter, kind_of_state
from sokd.kd.attention import AttentionDAM
from sokd.kd.dam import DAM, Attention, heads_of_state, reads_adapted
from sokd.kd.features import (
    Features,
    Size,
    checked_maps,
    kept,
    layouts,
    not_negative,
    of_one_dtype,
    one_of,
    total,
)  # fmt: skip
from sokd.kd.options import (
    adapters_of,
    channel_lists,
    check_left_out,
    dams_of,
    part_or_none,
    policy_or_none,
    search_or_none,
    settled,
)  # fmt: skip
from sokd.kd.policy import Draw, Policy
from sokd.kd.policy.online import Layer
from sokd.kd.virtual import unwrapped
from sokd.ops.masked_mse import scaled_mse
from sokd.ops.runtime import savable, transformed
from sokd.ops.torch_internals import share_buffers

__all__ = ["Match", "SoKD", "Terms", "check_state", "loss", "part_of", "parts_in"]

T = TypeVar("T")
PerLayer: TypeAlias = T | list[T] | None
Default = Literal["default"]
Terms = dict[str, Tensor]

# Columns of the buffer `statistics`, which has one row for each layer.
STATISTICS = ("agreement", "areas", "heat_variance", "covered_share")


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
    """The terms of SoKD, to be added to the task's loss [docs/method.md sections 4 and 7].

    lambda_D * L_D + lambda_DA * L_DA, and lambda_base * mse(adapted student, teacher) with
    base="keep".

        kd = sokd.SoKD(student_channels=64, teacher_channels=256)
        f_s, f_t = torch.randn(8, 64, 7, 7, requires_grad=True), torch.randn(8, 256, 7, 7)
        sokd.loss(f_s, f_t, kd).backward()

    Args:
        student_features: [B, C_s, H_s, W_s], tokens [B, N, C_s], or a list, one for each layer of
            `kd`.
        teacher_features: [B, C, H, W], tokens [B, N, C], or an equally long list. It gets no
            gradient.
        kd: a `sokd.SoKD`, also wrapped by DistributedDataParallel or torch.compile.
        return_terms: return a dict of "agreement", "areas", "base" (0 with base="replace") and
            their sum "total" instead of the sum.

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
    """The type of a value that is not a SoKD, for an error."""
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
    clean: Tensor  # the teacher as given [B, C, H, W], constant


class SoKD(nn.Module):
    """Student-Oriented Knowledge Distillation for one or more pairs of layers.

        kd = sokd.SoKD(student_channels=64, teacher_channels=256)
        optimizer = torch.optim.SGD([*student.parameters(), *kd.parameters()], lr=0.05)
        loss = F.cross_entropy(logits, y) + kd(f_s, f_t)          # or sokd.loss(f_s, f_t, kd)

    `parameters()`, of this module and of any module that holds it, are those the student's
    optimiser trains: those of the adapter and of DAM's trained heads. The policy is trained by the
    search only, `search="online"` or `PolicySearch`: `kd.policy.parameters()`; `state_dict()`,
    `buffers()`, `.to()` and `.train()` include it. Draws continue in `eval()`: a validation loss is
    refined as the training loss is (`kd.policy = None` for one that is not). Several ranks: wrap kd
    in DistributedDataParallel, or put it into the module that is wrapped; otherwise adapters and
    DAMs diverge between ranks. Draws are the same on all ranks if `sokd.manual_seed` was called
    with the same seed before kd was made.
    `kd.adapter`, `kd.policy` and `kd.dam` can be replaced or set to None: no adapter (shapes must
    be equal already), no refinement, no mask (the plain mean squared error). With several layers
    `kd.adapter` and `kd.dam` are ModuleLists, or one module that the layers share.

    Args:
        student_channels, teacher_channels: channels of the features, one number or equally long
            lists. Below, a list has one entry for each layer, any other value is for all layers.
        student_size, teacher_size: (height, width) or one number, for a strided or transposed
            convolution in the `Adapter`; None: maps of unequal size are resized.
        student_tokens, teacher_tokens: prefix tokens to drop from token features; None: see
            `sokd.kd.features.tokens_to_map`.
        student_grid, teacher_grid: (H, W) of token features; None: square.
        preset: "paper": what the paper or its prototype does, in every option left at "default";
            None: what the trials support (docs/results.md). `sokd.kd.options.PRESETS` lists both.
        adapter: "conv" [A], "separable" (the default), "regressor" or "linear", which alone reaches
            negative values (see `Adapter`); None, or a module, which is called with the student's
            map alone if it is no `Adapter`.
        heads: "attention" [S], without parameters (`AttentionDAM`), or the trained "bounded" [S]
            and "paper" [A] (`DAM`).
        base: "keep" [S]: the base method's own loss of the clean teacher is added to the masked
            loss of the refined one; "replace" [P]: the masked loss takes its place. For
            `sokd.loss` the base method is the mean square of adapted student and teacher.
        lambda_agreement, lambda_areas, lambda_base: the terms' weights, to be tuned; they may be
            set at any time, to a float (a compiled loss is compiled once more). The prototype uses
            1000 and 1000 on CIFAR-100 [A], which diverge on features of unit variance with SGD at
            lr 0.05: the preset "paper" has 10 and 10.
        normalise: "elements" [A] or "area", see `sokd.ops.masked_mse`.
        areas, overlap, k, kernel: of the DAM; areas "teacher" [S] or, with preset="paper", "mutual"
            [P], where it is left at "default". heat_channels: of `DAM` only, None: 100.
            attention_temperature: `temperature` of `AttentionDAM` only, None: 1.
        policies, estimator, magnitude_gradient: of `Policy`. The last two are of `PolicySearch` and
            `differentiable=True`; an online search has a gradient of its own.
        granularity: of `Policy`; "default": "sample" with search="online", else "batch".
        search: "online": the policy moves in each loss (docs/method.md 2.6), see `freeze_policy`;
            None: it stays as it is, unless a `PolicySearch` trains it.
        policy, dam: "default", None, or a module in its place, and then the options above that
            make the part are refused. A DAM is called as `dam(student, refined,
            scale=lambda_agreement)` and returns an `Attention`; it gets the student's own map where
            it has an attribute `adapts = False`, else the adapted one. A policy is a `sokd.Policy`.
        generator: source of the seed of the policy's draws; None: see `sokd.manual_seed`.

    `load_state_dict` refuses the state of other parts (adapter, heads, policy; an online search
    where this object has none) with the options that load it. With strict=False, and inside another
    module that is loaded, only another adapter or other heads are refused.

    Raises:
        TypeError, ValueError: `SoKD: {argument} must {rule}, got {value}`; options that exclude
            each other.
    """

    statistics: Tensor

    @torch.inference_mode(False)
    def __init__(
        self, student_channels: int | Sequence[int], teacher_channels: int | Sequence[int], *,
        student_size: PerLayer[int | Size] = None, teacher_size: PerLayer[int | Size] = None,
        student_tokens: PerLayer[int] = None, teacher_tokens: PerLayer[int] = None,
        student_grid: PerLayer[Size] = None, teacher_grid: PerLayer[Size] = None,
        preset: str | None = None, adapter: nn.Module | str | None = "default",
        heads: str = "default", base: str = "default",
        lambda_agreement: float | Default = "default", lambda_areas: float | Default = "default",
        lambda_base: float | Default = "default", normalise: str = "elements",
        heat_channels: int | None = None, attention_temperature: float | None = None,
        areas: str = "default", overlap: str = "sum", k: int = 8, kernel: int = 3,
        policies: Sequence[Sequence[int | str]] | None = None,
        estimator: str = "gumbel", magnitude_gradient: str = "default",
        granularity: str = "default", search: str | None = "default",
        policy: Policy | Default | None = "default", dam: nn.Module | Default | None = "default",
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        given = {
            "adapter": adapter, "heads": heads, "areas": areas, "base": base,
            "lambda_agreement": lambda_agreement, "lambda_areas": lambda_areas,
            "lambda_base": lambda_base, "granularity": granularity,
            "magnitude_gradient": magnitude_gradient, "search": search,
        }  # fmt: skip
        chosen = settled(preset, given)
        one_of("SoKD", "normalise", normalise, ("elements", "area"))
        self.student_channels, self.teacher_channels = channel_lists(
            student_channels, teacher_channels
        )
        count = len(self.student_channels)
        self._layouts = list(zip(
            layouts("student", count, student_tokens, student_grid),
            layouts("teacher", count, teacher_tokens, teacher_grid), strict=True,
        ))  # fmt: skip
        self.base: str = chosen["base"]
        self.lambda_agreement = not_negative("SoKD", "lambda_agreement", chosen["lambda_agreement"])
        self.lambda_areas = not_negative("SoKD", "lambda_areas", chosen["lambda_areas"])
        self.lambda_base = not_negative("SoKD", "lambda_base", chosen["lambda_base"])
        self.normalise = normalise
        if isinstance(kind := chosen["adapter"], str):
            sizes = student_size, teacher_size
            adapter = adapters_of(kind, self.student_channels, self.teacher_channels, *sizes)
        of_dam = {"areas": areas, "overlap": overlap, "k": k, "kernel": kernel}
        of_heads = {"heat_channels": heat_channels, "attention_temperature": attention_temperature}
        if dam == "default":
            dam = dams_of(
                chosen["heads"],
                self.teacher_channels,
                of_dam | {"areas": chosen["areas"]},
                of_heads,
            )
        else:
            check_left_out("dam", {"heads": heads, **of_heads, **of_dam}, SoKD)
        of_policy = dict[str, Any](policies=policies, estimator=estimator, generator=generator)
        learned = {name: given[name] for name in ("magnitude_gradient", "granularity")}
        if policy == "default":
            policy = Policy(**of_policy, **{name: chosen[name] for name in learned})
        else:
            check_left_out("policy", of_policy | learned, SoKD)
        self.adapter = part_or_none("adapter", adapter, count)
        self.policy = policy_or_none(policy)
        self.dam = part_or_none("dam", dam, count)
        searched = None if search == "default" and self.policy is None else chosen["search"]
        self.search = search_or_none(searched, self.policy)
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

        `sokd.loss`, `sokd.wrap`, `sokd.Distiller`, `sokd.PolicySearch` and `sokd.inspect` call this
        method. It records no statistics and gives no warnings. A kd with search="online" moves its
        policy here: in train mode, with grad mode on, without `draw`, `differentiable`,
        `adapt=False`, `attend=False` or `refine=False`.

        Args:
            student_features, teacher_features: as `sokd.loss` takes them.
            draw: the result of `self.policy.draw(batch)`, to repeat an evaluation; None: the next
                draw. All layers share one draw: the same sub-policy, gates and magnitudes.
            adapt: False: `student` is the map as given. Trained heads compare maps of one shape and
                read an adapted copy.
            refine: False: no draw is taken and `refined` is the clean teacher.
            attend: False: the DAM does not run and `attention` is None.
            differentiable: whether `refined` carries the policy's gradient.
            valid: for each layer [B, 1, H, W] at the teacher's size, 0 for cells of padding: there
                the adapted map, the refined one and omega are 0.

        Raises:
            TypeError, ValueError: as `sokd.loss`.
        """
        channels = list(zip(self.student_channels, self.teacher_channels, strict=True))
        adapters = [part_of(self.adapter, index) for index in range(len(channels))]
        dams = [part_of(self.dam, index) if attend else None for index in range(len(channels))]
        compared = [adapt or reads_adapted(dam) for dam in dams]
        first = [
            _first_parameter(*parts) if here else None
            for *parts, here in zip(adapters, dams, compared, strict=True)
        ]
        maps = checked_maps(student_features, teacher_features, channels, self._layouts, first)
        policy = self.policy if refine else None
        searches = adapt and attend and self._searches(draw, differentiable)
        layers = []
        if searches and policy is not None and self.search is not None:
            self.search.agree(unwrapped(policy))
        if policy is not None and draw is None:
            draw = policy.draw(maps[0][1].shape[0])
        matches = []
        for index, (student, clean) in enumerate(maps):
            adapted, refined, dam = student, clean, dams[index]
            if compared[index]:
                adapted = apply_adapter(adapters[index], student, clean)
            if policy is None or differentiable:  # otherwise the refined features are new tensors
                refined = savable(refined)
            if policy is not None:
                with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
                    refined = policy(refined, draw, layer=index, differentiable=differentiable)
            if compared[index]:
                adapted, refined = of_one_dtype(adapted, refined)
                if self.base == "keep":
                    clean = of_one_dtype(adapted, clean)[1]
            cells = None if valid is None else valid[index]
            refined, clean = kept(refined, cells), kept(clean, cells)
            if compared[index]:
                adapted = kept(adapted, cells)
            if searches:
                layers.append(Layer(clean, refined, adapted))
            seen = adapted if reads_adapted(dam) else student
            attention = _attend(dam, seen, refined, self.lambda_agreement)
            if attention is not None and cells is not None:
                agreement, weight, *rest = attention  # no `_replace`: see `Plans.parts`
                attention = Attention(agreement, weight * cells[:, 0], *rest)
            matches.append(Match(adapted if adapt else student, refined, attention, clean))
        if self.search is not None and policy is not None and draw is not None and layers:
            self.search.step(unwrapped(policy), draw, layers)
        return matches

    def _searches(self, draw: Draw | None, differentiable: bool) -> bool:
        """Whether a loss that was given `draw` moves the policy."""
        own_draw = self.search is not None and draw is None and not differentiable
        return own_draw and self.training and torch.is_grad_enabled()

    def freeze_policy(self) -> None:
        """End the search: the policy stays as it is from now on, draws continue.

            kd.freeze_policy()                     # for example after some epochs

        The state_dict keeps the end of an online search; with search=None call it again after a
        resume. A `PolicySearch` refuses a frozen policy.
        `kd.requires_grad_(False)` ends no search, which needs no optimiser.
        """
        if self.search is not None:
            self.search.freeze()
        elif self.policy is not None:
            self.policy.requires_grad_(False)

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
        """The loss's "agreement", "areas", "base" and "total", scalars, weighted as in the total.

            draw = kd.policy.draw(batch=8)
            kd.terms(f_s, f_t, draw=draw)["areas"]                # the same value in every call

        Args:
            student_features, teacher_features: as `sokd.loss` takes them.
            draw: see `match`.
            differentiable: whether the policy gets a gradient (from "areas" only: in the agreement
                the teacher's features are constants). Such a call records no statistics.
        """
        matches = self.match(
            student_features, teacher_features, draw=draw, differentiable=differentiable
        )
        areas = self.distances(matches, differentiable=differentiable)
        if not differentiable:
            self.record(matches, areas)
            sanity.look(self, student_features, teacher_features)
        agreement = [match.attention.agreement for match in matches if match.attention is not None]
        base = self.bases(matches) if self.base == "keep" else []
        found = {"agreement": agreement, "areas": areas, "base": base}
        terms = {
            name: total(of) if of else torch.zeros_like(areas[0]) for name, of in found.items()
        }
        terms["total"] = terms["agreement"] + terms["areas"]
        if base:
            terms["total"] = terms["total"] + terms["base"]
        return terms

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

    def bases(self, matches: Sequence[Match]) -> list[Tensor]:
        """lambda_base * mse(student, clean teacher) of each layer: the base method of `sokd.loss`.

        sum(kd.bases(kd.match(f_s, f_t)))                     # the "base" of kd.terms
        """
        pairs = [of_one_dtype(match.student, match.clean) for match in matches]
        inner, outer = _parted(self.lambda_base)
        options: dict[str, Any] = {"normalise": "elements", "scale": inner}
        return [_times(scaled_mse(*pair, None, **options), outer) for pair in pairs]

    def _distance(self, match: Match, scale: float, mutual: bool) -> Tensor:
        weight = None if match.attention is None else match.attention.weight
        inner, outer = _parted(scale)
        found = scaled_mse(
            match.student, match.refined, weight,
            normalise=self.normalise, scale=inner, mutual=mutual,
        )  # fmt: skip
        return _times(found, outer)

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
        for index, match in enumerate(matches):
            attention = match.attention
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
        the heads are constant. "covered_share": share of the cells that are distilled: those under
        an area, or all of a sample in which `AttentionDAM` finds none.
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

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As `nn.Module.load_state_dict`; if strict, refuse the state of other parts by name."""
        if strict:
            check_state(self, state_dict)
        return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """As `nn.Module._load_from_state_dict`, but refuse another adapter or heads by name."""
        check_state(self, state_dict, prefix, strict=False)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        weights = ["lambda_agreement", "lambda_areas"]
        weights += ["lambda_base"] if self.base == "keep" else []
        terms = ", ".join(f"{name}={getattr(self, name):g}" for name in weights)
        return f"base={self.base!r}, {terms}"


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


def _attend(
    dam: nn.Module | None, student: Tensor, refined: Tensor, scale: float
) -> Attention | None:
    """The output of `dam`, a `DAM` or a module called as one is; None without one.

    Raises:
        TypeError: the module returns something else than an `Attention`.
    """
    if dam is None:
        return None
    linear = type(unwrapped(dam)) in (DAM, AttentionDAM)  # another DAM may use `scale` otherwise
    inner, outer = _parted(scale) if linear else (scale, None)
    found = dam(student, refined, scale=inner)
    if found is not None and not isinstance(found, Attention):
        raise TypeError(f"loss: kd.dam must return an Attention, got {type(found).__name__}")
    if found is None or outer is None:
        return found
    agreement, *rest = found  # no `_replace`: see `Plans.parts`
    return Attention(_times(agreement, outer), *rest)


def _parted(scale: float) -> tuple[float, float | None]:
    """The weight of a loss as an argument of its operator and a factor of the operator's result.

    Under torch.compile an operator's argument is a constant, which recompiles for each value, and a
    factor of a tensor becomes an input of the graph. None: no factor.
    """
    return (1.0, scale) if torch.compiler.is_compiling() else (scale, None)


def _times(loss: Tensor, factor: float | None) -> Tensor:
    return loss if factor is None else loss * factor


def _variance_and_share(attention: Attention | None, nothing: Tensor) -> list[Tensor]:
    """The last two of `STATISTICS`; 0 without a DAM or a batch."""
    if attention is None or attention.heat.numel() == 0:
        return [nothing, nothing]
    # `var` is ten times slower on the CPU than these two passes
    heat = attention.heat.to(torch.float32)
    variance = (heat - heat.mean((0, 2, 3), keepdim=True)).square_().mean()
    return [variance, (attention.weight > 0).to(torch.float32).mean()]


# ---------------------------------------------------------------------------- the parts in a state


def check_state(
    kd: SoKD, state: Mapping[str, Any], prefix: str = "", *, strict: bool = True
) -> None:
    """Refuse a state_dict that does not fit kd's parts; not strict: a part that only one side has.

    Raises:
        RuntimeError: names the options that load it.
    """
    own = _names_of(kd)
    other = {
        name: values
        for name, values in _names_in(state, prefix).items()
        if name in own and own[name] not in values
        and (strict or None not in (own[name], *values))
    }  # fmt: skip
    if other:
        fits = " and ".join(f"{name}={' or '.join(map(repr, v))}" for name, v in other.items())
        load = ", ".join(f"{name}={values[0]!r}" for name, values in other.items())
        raise RuntimeError(
            f"SoKD: the state fits {fits}, not this object; to load it make kd with "
            f"SoKD(..., {load})"
        )


def _names_of(kd: SoKD) -> dict[str, str | None]:
    """The options that name the parts of a SoKD; the user's own modules have no name."""
    adapter, dam = (unwrapped(part_of(part, 0)) for part in (kd.adapter, kd.dam))
    names: dict[str, str | None] = dict.fromkeys(("adapter", "policy", "search"))
    if kd.policy is not None:
        names["policy"] = "default"
    if kd.search is not None:
        names["search"] = "online"
    if isinstance(adapter, Adapter):
        names["adapter"] = adapter.kind
    elif adapter is not None:
        del names["adapter"]
    if isinstance(dam, DAM):
        names["heads"] = dam.heads
    elif dam is None or isinstance(dam, AttentionDAM):  # neither has a state
        names["heads"] = "attention"
    return names


def _names_in(state: Mapping[str, Any], prefix: str) -> dict[str, tuple[str | None, ...]]:
    """The same options of the SoKD whose state_dict this is, as far as its keys show them."""
    parts = parts_in(state, prefix)
    if not parts:
        return {}
    names: dict[str, tuple[str | None, ...]] = {}
    kinds = [kind_of_state(state, f"{prefix}adapter.{layer}") for layer in ("", "0.")]
    if any(kinds) or "adapter" not in parts:
        names["adapter"] = (next(filter(None, kinds), None),)
    heads = [heads_of_state(state, f"{prefix}dam.{layer}") for layer in ("", "0.")]
    if any(heads) or "dam" not in parts:
        names["heads"] = next(filter(None, heads), ("attention",))
    names["policy"] = ("default" if "policy" in parts else None,)
    if {"policy", "search"} <= parts:  # without one it starts afresh
        names["search"] = ("online",)
    return names


def parts_in(state: Mapping[str, Any], prefix: str) -> set[str]:
    """The parts of a SoKD that have keys in a state_dict."""
    return {key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)}
