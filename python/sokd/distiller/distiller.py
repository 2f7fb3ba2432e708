"""Any two models, any method, SoKD plugged in: layers found by name, shapes by one dry run, adapters made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sokd.distiller import guards
from sokd.distiller.assemble import Needs, Plug, checked_plug, find_heads, make_adapters, make_kd
from sokd.distiller.auto import auto_layers
from sokd.distiller.maps import as_map, check_pair, layouts, untouched
from sokd.distiller.outputs import (
    Logits,
    Task,
    call,
    check_needs,
    checked_task,
    find_logits,
    is_for_model,
    labels_of,
    own_losses,
    task_losses,
)
from sokd.distiller.recipe import Chosen, chosen
from sokd.distiller.taps import Layers, Pair, Taps, layer_pairs, untapped
from sokd.kd import sanity
from sokd.kd.plug import Plugged, own_distance, plug, record, unplugged
from sokd.kd.sokd import SoKD
from sokd.kd.virtual import replayed, unwrapped
from sokd.methods.common import Method, Step
from sokd.ops.runtime import is_eager

__all__ = ["Distiller"]

Losses = dict[str, Tensor]

NOT_READY = (
    "Distiller: parameters must be asked for once the shapes are known, got the call before; pass example=, "
    "a batch of inputs, or call distiller.setup(x) first: an optimiser made now would lack the adapters"
)


class Pass(NamedTuple):
    """What one forward pass of a model gave."""

    output: Any
    logits: Tensor | None
    maps: list[Tensor]  # [B, C, H, W], one for each pair of layers


class Distiller(nn.Module):
    """Distils one model into another without a change to either.

    In train mode `distiller(x, y)` is `(logits, losses)`: the student's logits (what the student returned,
    where it has none) and a dict of scalars whose sum is the objective: the task's (`loss_ce`), one for each
    method (`loss_<name>`, weighted), and SoKD's `loss_agreement`. In eval mode `distiller(x)` is the student;
    `distiller(x, y)` is its logits and the task's loss.

    `parameters()` and `state_dict()` are those of the student, the adapters, methods and SoKD: what the
    optimiser is to hold. The teacher is in neither; it is frozen, put in eval mode, runs without gradients,
    and `.to()` moves it too. `distiller.student` is the student itself (it only got hooks, which do nothing
    outside a Distiller), `distiller.export()` a copy of it without them.

    With `fullgraph=True` compile: the Distiller, once its shapes are known (`torch.compile(distiller)`); a
    training step around it; the student alone, by `torch.compile(student)` or `student.compile()`. The hooks
    are part of the graph. Compiled code skips the guards against silent mistakes.

    Args:
        teacher, student: any two modules. They are called as `model(x)`, or `model(**x)` for a dict. Under
            DistributedDataParallel wrap the Distiller; for FSDP, `fully_shard(distiller, ignored_params=set(
            distiller.kd.policy.parameters()))`. A model that is compiled may be given compiled.
        layers: where features are taken: a dict of student layer -> teacher layer, a name, a list of names or
            (student, teacher) pairs, names as in `named_modules`, `name:key` for a layer that gives a dict or
            tuple; "auto": the last map of each resolution that both have, of what stages give, without a map
            of logits (`task=None` where the models give features). Maps [B, C, H, W], tokens [B, N, C] and
            vectors [B, C] (as 1x1 maps) meet through adapters. A layer that runs several times counts with
            its first run.
        method: a name of `sokd.methods`, a dict of name -> weight (None: the method's own), a callable (f_s,
            f_t) -> scalar for maps of one shape, or None. A method's own options are further keywords.
        sokd: whether SoKD is plugged in: the teacher's maps refined, the mask on, `loss_agreement` added;
            where no method looks at features, its own masked term too (`loss_sokd`). A dict: options of
            `SoKD`; a `SoKD`: that one. `distiller.kd`, None for False.
        task: the task's loss: "auto", losses that the student returns, else cross entropy with y; "model",
            the student is called as `student(x, y)` and returns them (also done for y that is a list of
            dicts); a callable (logits, y) -> scalar, as `loss_task`; None.
        logits: where logits are in an output that is no tensor: a key, an index or a function; None:
            "logits", "out", the first tensor. They have to be named where that is one of several [B, D] of
            different D: an embedding, perhaps.
        example: a batch of inputs for the dry run that finds the shapes (eval mode, no gradients; it leaves
            buffers, modes and random state as they were). None: the first batch is, and asking for
            `parameters()` before it is refused.
        student_tokens, teacher_tokens, student_grid, teacher_grid: of token features, see `SoKD`.
        student_order, teacher_order: "BCHW", or "BHWC" for layers that put the channels last. A list has one
            entry for each pair.
        check_finite: on the CPU, raise FloatingPointError for a term that is NaN or infinite, naming term and
            layer.

    Raises:
        TypeError, ValueError, RuntimeError: `Distiller: {argument} must {rule}, got {value}`.
    """

    def __init__(
        self, teacher: nn.Module, student: nn.Module, *, layers: Layers = "auto", method: Chosen = "fitnet",
        sokd: Plug = True, task: Task = "auto", logits: Logits = None,
        example: Any = None, student_tokens: Any = None, teacher_tokens: Any = None, student_grid: Any = None,
        teacher_grid: Any = None, student_order: Any = "BCHW", teacher_order: Any = "BCHW",
        check_finite: bool = True, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        guards.check_models(teacher, student)
        self.student = student
        self._constant = (teacher.requires_grad_(False).eval(),)  # in a tuple it is no submodule
        self._teacher_parts = tuple(teacher.modules())
        self._recipes = chosen(method, options)
        self.weights = {recipe.name: recipe.weight for recipe in self._recipes}
        self._plug, self.task = checked_plug(sokd), checked_task(task)
        self.logits, self.check_finite = logits, check_finite
        self._given = {"student": (student_tokens, student_grid, student_order),
                       "teacher": (teacher_tokens, teacher_grid, teacher_order)}  # fmt: skip
        self.kd: SoKD | None = None
        self.adapters: nn.ModuleList | None = None
        self.methods = nn.ModuleDict()
        self._ready = self._checked = False
        self._needs = Needs(self._recipes, sokd)
        self.pairs: list[Pair] = []
        self._layers: Layers = layers if self._needs.maps else ()
        if self._layers != "auto":
            self._tap(layer_pairs(layers) if self._needs.maps else [])
        if not self._needs.maps:
            self._build([], [])
        elif example is not None:
            self.setup(example)

    # ------------------------------------------------------------------------------------------------- calls

    def forward(self, x: Any, target: Any = None, *, index: Tensor | None = None) -> Any:
        """`(logits, losses)` in train mode; in eval mode the student's output, with `target` as in train
        mode.

        Args:
            x: what the models take: a tensor, a list of images, or a dict of keywords.
            target: [B] class indices, or what `task` takes. None: no task loss.
            index: [B] int64, the samples' places in the training set, for methods that keep a memory (crd).
        """
        if torch.compiler.is_compiling():
            return self._forward(x, target, index)
        with guards.explained(self, x):
            return self._forward(x, target, index)

    def _forward(self, x: Any, target: Any, index: Tensor | None) -> Any:
        if not self.training:
            return self._evaluate(x, target)
        eager = not torch.compiler.is_compiling()
        if not self._ready:
            self.setup(x)
        if eager:
            self._check()
        teacher = self._teach(x)
        student = self._study(self.student, x, target)
        losses = task_losses(self.task, student.output, student.logits, target)
        if eager:
            guards.check_maps(self, student.maps, teacher.maps, self._labels)
        losses |= self._distil(student, teacher, target, index)
        if eager:
            self._look(losses, student, teacher)
        return student.output if student.logits is None else student.logits, losses

    def _evaluate(self, x: Any, target: Any) -> Any:
        output = call(self.student, x)
        if target is None:
            return output
        logits = find_logits(output, self.logits)
        losses = {} if self._is_models(target) else task_losses(self.task, output, logits, target)
        return output if logits is None else logits, own_losses(output) or losses

    def step(self, model: nn.Module, batch: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """What `sokd.PolicySearch.step` takes: the task's loss, the student's maps, the teacher's.

            search = sokd.PolicySearch(distiller.kd, distiller.student)
            search.step(distiller.step, (x, y))

        The hooks are in the student's own modules, so the maps are those at the search's virtual weights. The
        inner level of the search is the task's loss plus SoKD's own, whichever method is trained.
        """
        x, target = batch[:2] if isinstance(batch, (tuple, list)) else (batch, None)
        self.setup(x)
        teacher, student = self._teach(x), self._study(model, x, target)
        losses = list(task_losses(self.task, student.output, student.logits, target).values())
        task = torch.stack(losses).sum() if losses else student.maps[0].sum() * 0
        return task, student.maps, teacher.maps

    @torch.no_grad()
    def features(self, x: Any) -> tuple[list[Tensor], list[Tensor]]:
        """The student's and the teacher's maps of x [B, C, H, W], one for each pair of layers; in eval mode,
        leaving no trace."""
        models = unwrapped(self.setup(x).student), self.teacher
        with guards.explained(self, x), untouched(*models), self._replayed():
            return self._study(models[0], x, None).maps, self._teach(x).maps

    def logits_of(self, output: Any) -> Any:
        """The logits in what the student returned, or all of it where there are none."""
        logits = find_logits(output, self.logits)
        return output if logits is None else logits

    def export(self) -> nn.Module:
        """A copy of the student alone, in eval mode, without wrappers and hooks: what is deployed."""
        return untapped(deepcopy(unwrapped(self.student))).eval()

    # ------------------------------------------------------------------------------------------------ set-up

    def setup(self, example: Any) -> Distiller:
        """Find the shapes by a dry run on a batch of inputs, and make adapters, methods and SoKD; only
        once."""
        if self._ready:
            return self
        if torch.compiler.is_compiling():
            raise RuntimeError(NOT_READY)
        guards.check_devices(self)
        student, teacher = unwrapped(self.student), self.teacher
        with guards.explained(self, example), untouched(student, teacher), self._replayed():
            if self._layers == "auto":
                self._tap(self._auto(student, teacher, example))
            named = self._layers != "auto"  # else nobody reads anything out of the names
            maps = [
                self._as_maps(
                    side, self._taps[side].run(partial(call, model, example), warn=named)[1]
                )
                for side, model in (("student", student), ("teacher", teacher))
            ]
        for of_student, of_teacher, names in zip(*maps, self._labels, strict=True):
            check_pair(of_student, of_teacher, names)
        self._build(*([tuple(features.shape[1:]) for features in side] for side in maps))
        return self

    def _auto(self, student: nn.Module, teacher: nn.Module, example: Any) -> list[Pair]:
        asked = self.task is not None or self._needs.logits
        logits = partial(find_logits, where=self.logits, guess=False) if asked else lambda _: None
        orders = {side: given[2] for side, given in self._given.items()}
        return auto_layers(
            student, teacher, partial(call, x=example), example, logits=logits, orders=orders
        )

    def _tap(self, pairs: list[Pair]) -> None:
        self.pairs = pairs
        sides = {"student": self.student, "teacher": self.teacher}
        self._taps = {
            side: Taps(side, model, [pair[at] for pair in pairs])
            for at, (side, model) in enumerate(sides.items())
        }
        self._layouts = {side: layouts(side, len(pairs), *self._given[side]) for side in sides}

    def _build(self, students: list[Any], teachers: list[Any]) -> None:
        """Make what is trained beside the student, where the student is and in its dtype."""
        self.kd = make_kd(self._plug, students, teachers, self._needs)
        if self.kd is None and self._needs.adapted:
            self.adapters = make_adapters(students, teachers)
        for recipe in self._recipes:
            heads = find_heads(
                recipe, (unwrapped(self.student), self.teacher), (students, teachers)
            )
            self.methods[recipe.name] = recipe.make(students, teachers, **heads)
        place = next((p for p in self.student.parameters() if p.is_floating_point()), None)
        for module in (self.kd, self.adapters, self.methods):
            if module is not None:
                module.train(self.training)
                if place is not None:
                    module.to(place.device, place.dtype)
        self._ready = True

    def _replayed(self) -> AbstractContextManager[Callable[[], None]]:
        return replayed(parameter.device for parameter in self.student.parameters())

    # ------------------------------------------------------------------------------------------------ a step

    def _teach(self, x: Any) -> Pass:
        with torch.no_grad():
            output, taken = self._taps["teacher"].run(lambda: call(self.teacher, x))
            return Pass(output, find_logits(output, self.logits), self._as_maps("teacher", taken))

    def _study(self, model: nn.Module, x: Any, target: Any) -> Pass:
        given = (target,) if self._is_models(target) else ()
        output, taken = self._taps["student"].run(lambda: call(model, x, *given))
        return Pass(output, find_logits(output, self.logits), self._as_maps("student", taken))

    def _is_models(self, target: Any) -> bool:
        """Whether the student takes the target itself."""
        return target is not None and (
            self.task == "model" or (self.task == "auto" and is_for_model(target))
        )

    def _as_maps(self, side: str, taken: list[Tensor]) -> list[Tensor]:
        layers = zip(taken, self._layouts[side], self._taps[side].labels, strict=True)
        return [as_map(features, layout, label) for features, layout, label in layers]

    @property
    def _labels(self) -> list[tuple[str, str]]:
        """The pairs' layers, for people."""
        return list(zip(self._taps["student"].labels, self._taps["teacher"].labels, strict=True))

    def _distil(self, student: Pass, teacher: Pass, target: Any, index: Tensor | None) -> Losses:
        """The methods' terms and SoKD's."""
        if self.kd is not None:
            made = plug(self.kd, student.maps, teacher.maps, adapt=self._needs.adapted)
        else:
            made = unplugged(self.adapters, student.maps, teacher.maps)
        step = Step(
            student.logits, teacher.logits, labels_of(target), student.maps, made.refined, made.adapted,
            made.weight, index,
        )  # fmt: skip
        losses = {}
        for name, method in self.methods.items():
            check_needs(name, cast(Method, method).needs, step, target)
            losses[f"loss_{name}"] = self.weights[name] * method(step)
        return losses if self.kd is None else losses | self._plugged(self.kd, made, losses)

    def _plugged(self, kd: SoKD, made: Plugged, losses: Losses) -> Losses:
        """SoKD's terms beside the methods'; leaves the step's figures in `kd.diagnostics()`."""
        added = {"loss_sokd": own_distance(kd, made)} if self._needs.plain else {}
        terms = list((added or losses).values())
        record(kd, made, torch.stack(terms).sum())
        if made.agreement:
            added["loss_agreement"] = torch.stack(made.agreement).sum()
        return added

    # ------------------------------------------------------------------------------------------------ guards

    def _check(self) -> None:
        if not self._checked:
            guards.check_start(self)
            self._checked = True
        guards.check_teacher(self)

    def _look(self, losses: Losses, student: Pass, teacher: Pass) -> None:
        if not is_eager(*losses.values()):
            return
        if self.check_finite:
            labels = (label for taps in self._taps.values() for label in taps.labels)
            guards.check_finite(losses, dict(zip(labels, student.maps + teacher.maps, strict=True)))
        if torch.is_grad_enabled():
            guards.look(self)
            if self.kd is not None:
                sanity.look_at_mask(self.kd)

    # ------------------------------------------------------------------------------------------- as a module

    @property
    def teacher(self) -> nn.Module:
        """The teacher, which is no submodule."""
        return self._constant[0]

    def own_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """What is trained beside the student, by name."""
        for name, method in self.methods.items():
            yield f"methods.{name}", method
        if self.adapters is not None:
            yield "adapters", self.adapters
        for name in ("adapter", "dam"):
            part = getattr(self.kd, name, None)
            if part is not None:
                yield f"kd.{name}", part

    def own_parameters(self) -> Iterator[nn.Parameter]:
        """Those of `own_modules`."""
        for _, module in self.own_modules():
            yield from module.parameters()

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As `nn.Module.named_modules`; every list of parameters comes from here.

        Raises:
            RuntimeError: before the shapes are known.
        """
        if not self._ready:
            raise RuntimeError(NOT_READY)
        yield from super().named_modules(memo, prefix, remove_duplicate)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if not self._ready:
            raise RuntimeError(NOT_READY)
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        """As `nn.Module._apply` (`.to()` and its like), the teacher included."""
        self.teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._checked = False
        return cast(Distiller, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        pairs = ", ".join(f"{student} -> {teacher}" for student, teacher in self.pairs)
        weights = ", ".join(f"{name}={weight:g}" for name, weight in self.weights.items())
        return f"teacher={type(self.teacher).__name__}, layers: {pairs or 'none'}, weights: {weights or 'none'}"
